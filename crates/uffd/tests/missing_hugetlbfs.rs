//! MISSING_HUGETLBFS: missing pages of hugetlbfs, shared and private, always whole ones.

mod common;

use common::*;

#[test]
fn missing_pages_are_reported_and_filled() {
    if need("MISSING_HUGETLBFS") {
        on_each(Kind::HUGETLB, 4, scenario::missing);
    }
}

#[test]
fn the_page_cache_is_filled_for_all_and_asked_first() {
    if need("MISSING_HUGETLBFS") {
        on_each(Kind::HUGETLB, 4, scenario::shared_page_cache);
    }
}
