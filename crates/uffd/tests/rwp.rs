//! RWP: a fault at any access to a page that is there (Linux 7.3).

mod common;

use common::*;
use rustix::mm::{mprotect, MprotectFlags};
use uffd::{Cause, Errno, Event, Features, Operations, RegisterMode};

/// Pages numbered from 1 on, registered and protected.
fn protected_pages(memory: Mapping, features: Features) -> Registered {
    for at in 0..memory.len / memory.page {
        write(memory.at(at), at as u8 + 1);
    }
    let uffd = negotiated(features);
    let operations = uffd.register(memory.start, memory.bytes(), RegisterMode::RWP).unwrap();
    assert!(operations.contains(Operations::WAKE | Operations::RWPROTECT), "{operations:?}");
    uffd.protect_against_access(memory.start, memory.bytes()).unwrap();
    Registered { uffd, memory }
}

#[test]
fn reading_and_writing_wait_until_it_is_allowed() {
    if !need("RWP") {
        return;
    }
    on_each(Kind::ALL, 3, |_, memory| {
        let target = protected_pages(memory, Features::RWP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let page = memory.pages(1);
        let thread = toucher(memory.at(0));
        target.assert_fault(memory.at(0), Cause::Protected);
        uffd.allow_access(memory.at(0), page).unwrap();
        assert_eq!(thread.join().unwrap(), 1);
        assert_eq!(memory.touch(0), 1, "and again");
        let thread = writer(memory.at(1), 9);
        target.assert_fault(memory.at(1), Cause::Protected);
        uffd.allow_access(memory.at(1), page).unwrap();
        thread.join().unwrap();
        assert_eq!(memory.touch(1), 9);
        // The kernel waits too.
        let address = memory.at(2);
        let thread = std::thread::spawn(move || touch_in_kernel(address).unwrap());
        target.assert_fault(address, Cause::Protected);
        uffd.allow_access(address, page).unwrap();
        assert_eq!(thread.join().unwrap(), 3);
        target.assert_silent();
    });
}

#[test]
fn it_shares_a_bit_with_write_protection_so_that_a_range_has_one_of_them() {
    if !need("RWP") {
        return;
    }
    on_each(Kind::ALL, 1, |_, memory| {
        let uffd = negotiated(Features::RWP | Features::WP_HUGETLBFS_SHMEM);
        let both = RegisterMode::WP | RegisterMode::RWP;
        assert_errno(uffd.register(memory.start, memory.bytes(), both), Errno::INVAL);
        uffd.register(memory.start, memory.bytes(), RegisterMode::RWP).unwrap();
        assert!(uffd.protect(memory.start, memory.bytes()).is_err());
    });
}

#[test]
fn closing_gives_the_access_back() {
    if !need("RWP") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let Registered { uffd, memory } = protected_pages(memory, Features::RWP);
        let thread = toucher(memory.at(1));
        assert_eq!(next_fault(&uffd).0, memory.at(1));
        drop(uffd);
        assert_eq!(thread.join().unwrap(), 2);
        assert_eq!(memory.touch(0), 1);
    });
}

#[test]
fn a_child_that_is_served_is_protected_too() {
    let _alone = alone();
    if !need("RWP") || !need("EVENT_FORK") {
        return;
    }
    on_each(Kind::ALL, 1, |_, memory| {
        let target = protected_pages(memory, Features::RWP | Features::EVENT_FORK);
        let address = target.memory.start;
        assert!(protected(address));
        let thread = forking(move || i32::from(touch(address)));
        let child = match next_event(&target.uffd) {
            Event::Fork(child) => child,
            other => panic!("{other:?}"),
        };
        let (at, flags) = next_fault(&child);
        assert_eq!((at, Cause::of(flags)), (address, Cause::Protected));
        child.allow_access(address, target.memory.pages(1)).unwrap();
        assert_eq!(thread.join().unwrap().end(), Ok(1));
        assert!(protected(address));
    });
}

/// Protection of the mapping comes and goes, this stays.
#[test]
fn it_outlives_mprotect() {
    if !need("RWP") {
        return;
    }
    on_each(Kind::ALL, 1, |_, memory| {
        let target = protected_pages(memory, Features::RWP);
        let memory = &target.memory;
        for access in [MprotectFlags::empty(), MprotectFlags::READ | MprotectFlags::WRITE] {
            // SAFETY: memory of this test.
            unsafe { mprotect(memory.start as *mut _, memory.len, access).unwrap() };
        }
        let thread = toucher(memory.at(0));
        target.assert_fault(memory.at(0), Cause::Protected);
        target.uffd.allow_access(memory.at(0), memory.pages(1)).unwrap();
        assert_eq!(thread.join().unwrap(), 1);
    });
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("RWP") {
        assert_errno(open().handshake(Features::RWP), Errno::INVAL);
        let memory = Mapping::anonymous(1);
        let (start, len) = (memory.start, memory.bytes());
        let uffd = negotiated(Features::NONE);
        assert_errno(uffd.register(start, len, RegisterMode::RWP), Errno::INVAL);
        assert_errno(uffd.protect_against_access(start, len), Errno::INVAL);
        assert_errno(uffd.allow_access(start, len), Errno::INVAL);
    }
}
