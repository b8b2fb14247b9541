//! EXACT_ADDRESS: the very address that was touched, where there is only its page otherwise.

mod common;

use common::*;
use uffd::{Features, How, RegisterMode};

#[test]
fn missing_and_protected_pages_tell_the_very_address() {
    if !need("EXACT_ADDRESS") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    for (exact, mask) in [(true, u64::MAX), (false, 0)] {
        on_each(Kind::ALL, 2, |_, memory| {
            let mut features = Features::WP_HUGETLBFS_SHMEM;
            if exact {
                features = features | Features::EXACT_ADDRESS;
            }
            let mode = RegisterMode::MISSING | RegisterMode::WP;
            let target = Registered::with(memory, features, mode);
            let (uffd, memory) = (&target.uffd, &target.memory);
            let offset = memory.page as u64 - 3;
            let expected = memory.at(1) + (offset & mask);
            let thread = writer(memory.at(1) + offset, 1);
            assert_eq!(next_fault(uffd).0, expected);
            let done = uffd.copy_with(memory.at(1), &memory.filled(2), How::PROTECTED);
            assert_done(done, memory.page);
            assert_eq!(next_fault(uffd).0, expected);
            uffd.unprotect(memory.at(1), memory.pages(1)).unwrap();
            thread.join().unwrap();
            assert_eq!(touch(memory.at(1) + offset), 1);
        });
    }
}

#[test]
fn minor_faults_tell_it_too() {
    if !need("EXACT_ADDRESS") || !need("MINOR_SHMEM") || !need("MINOR_HUGETLBFS") {
        return;
    }
    on_each(Kind::SHARED, 1, |_, memory| {
        let target = Registered::with(memory, Features::EXACT_ADDRESS, RegisterMode::MINOR);
        let memory = &target.memory;
        let other = memory.again();
        write(other.at(0), 1);
        let thread = toucher(memory.at(0) + 77);
        assert_eq!(target.next_fault(), memory.at(0) + 77);
        assert_done(target.uffd.continue_(memory.at(0), memory.pages(1)), memory.page);
        assert_eq!(thread.join().unwrap(), 0);
    });
}
