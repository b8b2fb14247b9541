//! CONTINUE_MODE_WP: cached pages mapped write-protected in one step.

mod common;

use common::*;

#[test]
fn cached_pages_are_mapped_protected() {
    if need("CONTINUE_MODE_WP") && need("MINOR_SHMEM") {
        on_each(Kind::SHMEM, 5, |kind, memory| scenario::minor(kind, memory, true));
    }
    if need("CONTINUE_MODE_WP") && need("MINOR_HUGETLBFS") {
        on_each(Kind::HUGETLB, 5, |kind, memory| scenario::minor(kind, memory, true));
    }
}
