//! Missing pages of anonymous memory, which userfaultfd has had from the start (4.3) and has no bit for.

mod common;

use common::*;
use rustix::mm::{mprotect, MprotectFlags};
use uffd::{Cause, Features};

#[test]
fn missing_pages_are_reported_and_filled() {
    on_each(&[Kind::Anonymous], 4, scenario::missing);
}

/// A range that transparent huge pages could back faults page by page all the same, as nothing may
/// appear that nobody put there.
#[test]
fn transparent_huge_pages_hide_no_fault() {
    let target = Registered::over(Mapping::transparent(1), Features::NONE);
    for at in [0, 1, 511] {
        let thread = toucher(target.memory.at(at));
        target.assert_fault(target.memory.at(at), Cause::Missing);
        assert_done(target.uffd.copy(target.memory.at(at), &page(at as u8)), PAGE);
        assert_eq!(thread.join().unwrap(), at as u8);
    }
    let rest = target.uffd.copy(target.memory.at(2), &page(7).repeat(509));
    assert_done(rest, 509 * PAGE);
    target.memory.assert_content(510, 7);
}

/// Memory that may only be read is filled all the same: the server writes, not the target.
#[test]
fn memory_that_cannot_be_written_can_be_filled() {
    let target = Registered::anonymous(2, Features::NONE);
    // SAFETY: memory of this test, which only reads it from now on.
    unsafe {
        mprotect(target.memory.start as *mut _, target.memory.len, MprotectFlags::READ).unwrap();
    }
    let thread = toucher(target.memory.at(1));
    target.assert_fault(target.memory.at(1), Cause::Missing);
    assert_done(target.uffd.copy(target.memory.at(1), &page(3)), PAGE);
    assert_eq!(thread.join().unwrap(), 3);
    assert_done(target.uffd.zeropage(target.memory.at(0), PAGE as u64), PAGE);
    target.memory.assert_content(0, 0);
}

#[test]
fn closing_wakes_all_and_what_is_missing_reads_as_zeros() {
    let Registered { uffd, memory } = Registered::anonymous(3, Features::NONE);
    assert_done(uffd.copy(memory.at(0), &page(1)), PAGE);
    let threads: Vec<_> = [1, 2].map(|at| toucher(memory.at(at))).into();
    until("both wait", || waiters(&uffd) == 2);
    drop(uffd);
    threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), 0));
    memory.assert_content(0, 1);
}

/// The kernel may gather small pages into a huge one, but not over pages that are missing.
#[test]
fn collapsing_leaves_missing_pages_missing() {
    let target = Registered::over(Mapping::transparent(1), Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    assert_done(uffd.copy(memory.start, &page(6).repeat(511)), 511 * PAGE);
    assert!(collapse(memory).is_err(), "one is missing");
    let thread = toucher(memory.at(511));
    target.assert_fault(memory.at(511), Cause::Missing);
    assert_done(uffd.copy(memory.at(511), &page(7)), PAGE);
    assert_eq!(thread.join().unwrap(), 7);
    // Now there is nothing to hide.
    if let Err(error) = collapse(memory) {
        println!("not collapsed: {error}");
    }
    assert_eq!((memory.touch(0), memory.touch(510), memory.touch(511)), (6, 6, 7));
    target.assert_silent();
}
