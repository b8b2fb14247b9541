//! WP_UNPOPULATED: write protection of anonymous pages that are not there yet. Memory of files has always
//! had it.

mod common;

use common::*;
use rustix::mm::Advice;
use uffd::{Cause, Errno, Features, RegisterMode};

#[test]
fn an_empty_page_is_protected_until_that_is_taken_back_or_the_page_given_back() {
    if !need("WP_UNPOPULATED") {
        return;
    }
    on_each(&[Kind::Anonymous], 2, |_, memory| {
        let target = Registered::with(memory, Features::WP_UNPOPULATED, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let (at, len) = (memory.at(0), memory.pages(1));
        uffd.protect(at, len).unwrap();
        assert!(protected(at) && !protected(memory.at(1)));
        uffd.unprotect(at, len).unwrap();
        assert!(!protected(at));
        // Giving it back takes the protection along.
        uffd.protect(at, len).unwrap();
        memory.advise(Advice::LinuxDontNeed);
        assert!(!protected(at));
        write(at, 1);
        assert!(!protected(at));
        memory.advise(Advice::LinuxDontNeed);
        // Reading leaves it protected, and the write after that is caught.
        uffd.protect(at, len).unwrap();
        assert_eq!(touch(at), 0);
        assert!(protected(at));
        let thread = writer(at, 2);
        target.assert_fault(at, Cause::WriteProtected);
        uffd.unprotect(at, len).unwrap();
        thread.join().unwrap();
        assert_eq!(touch(at), 2);
    });
}

/// Protection of a file's memory is not in the page, and outlives that it is given back.
#[test]
fn memory_of_files_stays_protected_when_it_is_given_back() {
    if !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    on_each(&[Kind::SHMEM, Kind::HUGETLB].concat(), 1, |_, memory| {
        write(memory.at(0), 1);
        let target = Registered::with(memory, Features::WP_HUGETLBFS_SHMEM, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        uffd.protect(memory.start, memory.bytes()).unwrap();
        memory.advise(Advice::LinuxDontNeed);
        assert!(protected(memory.at(0)));
        let thread = writer(memory.at(0), 2);
        target.assert_fault(memory.at(0), Cause::WriteProtected);
        uffd.unprotect(memory.start, memory.bytes()).unwrap();
        thread.join().unwrap();
        assert_eq!(memory.touch(0), 2);
    });
}

#[test]
fn the_first_write_to_an_empty_page_is_caught() {
    if !need("WP_UNPOPULATED") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let features = Features::WP_UNPOPULATED | Features::WP_HUGETLBFS_SHMEM;
        let target = Registered::with(memory, features, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        uffd.protect(memory.start, memory.bytes()).unwrap();
        let thread = writer(memory.at(1), 7);
        target.assert_fault(memory.at(1), Cause::WriteProtected);
        uffd.unprotect(memory.at(1), memory.pages(1)).unwrap();
        thread.join().unwrap();
        assert_eq!(memory.content(1)[..2], [7, 0]);
        target.assert_silent();
    });
}

/// A protected page that is not there is missing first. Copying fills it and takes the protection away;
/// the zero page does not come there.
#[test]
fn a_protected_empty_page_is_missing_first() {
    if !need("WP_UNPOPULATED") {
        return;
    }
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(Mapping::anonymous(2), Features::WP_UNPOPULATED, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.protect(memory.start, memory.bytes()).unwrap();
    let thread = writer(memory.at(0), 9);
    target.assert_fault(memory.at(0), Cause::Missing);
    assert_stopped(uffd.zeropage(memory.at(0), PAGE as u64), 0, Errno::EXIST);
    assert_done(uffd.copy(memory.at(0), &page(3)), PAGE);
    thread.join().unwrap();
    assert_eq!(memory.content(0)[..2], [9, 3]);
    assert!(!protected(memory.at(0)) && protected(memory.at(1)));
    target.assert_silent();
}

#[test]
fn without_it_empty_anonymous_pages_are_passed_over_and_others_are_not() {
    if !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    on_each(Kind::ALL, 2, |kind, memory| {
        let target = Registered::with(memory, Features::WP_HUGETLBFS_SHMEM, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        uffd.protect(memory.start, memory.bytes()).unwrap();
        assert_eq!(protected(memory.at(0)), kind != Kind::Anonymous);
        if kind == Kind::Anonymous {
            write(memory.at(0), 1);
            target.assert_silent();
        }
    });
}
