//! MINOR_HUGETLBFS: faults on pages of hugetlbfs that are in the page cache and not mapped, in
//! shared mappings and in private ones.

mod common;

use common::*;

#[test]
fn cached_pages_are_mapped_when_they_are_asked_for() {
    if need("MINOR_HUGETLBFS") {
        on_each(Kind::HUGETLB, 5, |kind, memory| scenario::minor(kind, memory, false));
    }
}

#[test]
fn missing_until_the_cache_has_it_and_minor_from_then_on() {
    if need("MINOR_HUGETLBFS") {
        on_each(Kind::HUGETLB, 2, scenario::missing_and_minor);
    }
}
