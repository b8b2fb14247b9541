//! PAGEFAULT_FLAG_WP: write protection of anonymous memory, where there are pages.

mod common;

use common::*;
use uffd::{Cause, Errno, Features, RegisterMode};

#[test]
fn writes_to_protected_pages_wait() {
    if need("PAGEFAULT_FLAG_WP") {
        on_each(&[Kind::Anonymous], 4, |_, memory| {
            scenario::write_protection(memory, Features::PAGEFAULT_FLAG_WP);
        });
    }
}

#[test]
fn a_child_is_not_protected_without_the_event_and_is_with_it() {
    let _alone = alone();
    if need("PAGEFAULT_FLAG_WP") && need("EVENT_FORK") {
        for (with_event, pinned) in [(false, false), (true, false), (false, true), (true, true)] {
            println!("with event: {with_event}, pinned: {pinned}");
            scenario::protection_and_fork(Mapping::anonymous(1), with_event, pinned);
        }
    }
}

/// A huge page is protected whole or in part, and a write to it is told page by page.
#[test]
fn transparent_huge_pages_are_protected_whole_or_in_part() {
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let memory = Mapping::transparent(2);
    (0..1024).for_each(|at| write(memory.at(at), 1));
    let target = Registered::with(memory, Features::PAGEFAULT_FLAG_WP, RegisterMode::WP);
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.protect(memory.start, HUGE as u64).unwrap();
    assert!((0..512).all(|at| protected(memory.at(at))));
    let thread = writer(memory.at(300), 2);
    target.assert_fault(memory.at(300), Cause::WriteProtected);
    uffd.unprotect(memory.at(300), PAGE as u64).unwrap();
    thread.join().unwrap();
    assert!((0..512).all(|at| protected(memory.at(at)) == (at != 300)));
    // A part of a huge page that was not protected at all.
    uffd.protect(memory.at(600), 10 * PAGE as u64).unwrap();
    assert!((512..1024).all(|at| protected(memory.at(at)) == (600..610).contains(&at)));
    write(memory.at(599), 3);
    let thread = writer(memory.at(600), 4);
    target.assert_fault(memory.at(600), Cause::WriteProtected);
    uffd.unprotect(memory.start, memory.bytes()).unwrap();
    thread.join().unwrap();
    assert!((0..1024).all(|at| !protected(memory.at(at))));
    assert_eq!([299, 300, 599, 600].map(|at| memory.touch(at)), [1, 2, 3, 4]);
    target.assert_silent();
}

#[test]
fn empty_pages_and_the_zero_page() {
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(Mapping::anonymous(2), Features::NONE, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);
    // Without WP_UNPOPULATED what is not there is passed over.
    uffd.protect(memory.start, memory.bytes()).unwrap();
    assert!(!protected(memory.at(0)));
    // The zero page is there.
    assert_done(uffd.zeropage(memory.at(0), PAGE as u64), PAGE);
    uffd.protect(memory.at(0), PAGE as u64).unwrap();
    assert!(protected(memory.at(0)));
    let thread = writer(memory.at(0), 1);
    target.assert_fault(memory.at(0), Cause::WriteProtected);
    uffd.unprotect(memory.at(0), PAGE as u64).unwrap();
    thread.join().unwrap();
    memory.content(0)[1..].iter().for_each(|byte| assert_eq!(*byte, 0));
}

/// All of a range must be registered with it.
#[test]
fn what_cannot_be_protected() {
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let memory = Mapping::anonymous(4);
    let uffd = negotiated(Features::NONE);
    uffd.register(memory.at(0), 2 * PAGE as u64, RegisterMode::WP).unwrap();
    uffd.register(memory.at(2), PAGE as u64, RegisterMode::MISSING).unwrap();
    uffd.protect(memory.at(0), 2 * PAGE as u64).unwrap();
    for at in [2, 3] {
        assert_errno(uffd.protect(memory.at(at), PAGE as u64), Errno::NOENT);
        assert_errno(uffd.unprotect(memory.at(at), PAGE as u64), Errno::NOENT);
    }
    assert_errno(uffd.protect(memory.at(0), memory.bytes()), Errno::NOENT);
    // A page cannot arrive protected where nothing can be.
    let copied = uffd.copy_with(memory.at(2), &page(1), uffd::How::PROTECTED);
    assert_stopped(copied, 0, Errno::INVAL);
    drop(uffd);
}
