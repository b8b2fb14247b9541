//! MINOR_HUGETLBFS: faults on pages of hugetlbfs that are in the page cache and not mapped.

mod common;

use common::*;

#[test]
fn cached_pages_are_mapped_when_they_are_asked_for() {
    if need("MINOR_HUGETLBFS") {
        on_each(&[Kind::Hugetlb], 5, |_, memory| scenario::minor(memory, false));
    }
}

#[test]
fn missing_until_the_cache_has_it_and_minor_from_then_on() {
    if need("MINOR_HUGETLBFS") {
        on_each(&[Kind::Hugetlb], 2, |_, memory| scenario::missing_and_minor(memory));
    }
}
