//! CONTINUE_MODE_WP: cached pages mapped write-protected in one step.

mod common;

use common::*;

#[test]
fn cached_pages_are_mapped_protected() {
    if need("CONTINUE_MODE_WP") && need("MINOR_SHMEM") {
        on_each(&[Kind::Shmem, Kind::Tmpfs], 5, |_, memory| scenario::minor(memory, true));
    }
    if need("CONTINUE_MODE_WP") && need("MINOR_HUGETLBFS") {
        on_each(&[Kind::Hugetlb], 5, |_, memory| scenario::minor(memory, true));
    }
}
