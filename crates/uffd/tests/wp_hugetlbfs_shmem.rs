//! WP_HUGETLBFS_SHMEM: write protection of memfd, tmpfs and hugetlbfs, shared and private.

mod common;

use common::*;
use uffd::Features;

const BOTH: [&[Kind]; 2] = [Kind::SHMEM, Kind::HUGETLB];

#[test]
fn writes_to_protected_pages_wait() {
    if need("WP_HUGETLBFS_SHMEM") {
        on_each(&BOTH.concat(), 4, |_, memory| {
            scenario::write_protection(memory, Features::WP_HUGETLBFS_SHMEM);
        });
    }
}

#[test]
fn a_child_is_not_protected_without_the_event_and_is_with_it() {
    let _alone = alone();
    if need("WP_HUGETLBFS_SHMEM") && need("EVENT_FORK") {
        // Seen on 6.1: a child has it anyway, until "mm/hugetlb: fix uffd-wp during fork()".
        let kinds = match need_kernel((6, 4), "protection of hugetlbfs in a child") {
            true => BOTH.concat(),
            false => Kind::SHMEM.to_vec(),
        };
        for (with_event, pinned) in [(false, false), (true, false), (false, true), (true, true)] {
            println!("with event: {with_event}, pinned: {pinned}");
            on_each(&kinds, 1, |_, memory| {
                scenario::protection_and_fork(memory, with_event, pinned);
            });
        }
    }
}
