//! RWP_ASYNC: accesses to protected pages resolved by the kernel itself, and read back with PAGEMAP_SCAN
//! (Linux 7.3).

mod common;

use common::*;
use uffd::{Categories, Cause, Errno, Features, Pagemap, RegisterMode, Scan};

const BOTH: Features = Features(Features::RWP.0 | Features::RWP_ASYNC.0);

fn protected_pages(memory: Mapping) -> Registered {
    for at in 0..memory.len / memory.page {
        write(memory.at(at), at as u8 + 1);
    }
    let target = Registered::with(memory, BOTH, RegisterMode::RWP);
    let memory = &target.memory;
    target.uffd.protect_against_access(memory.start, memory.bytes()).unwrap();
    target
}

/// Pages that nobody has touched since they were protected.
fn cold(memory: &Mapping) -> Vec<(u64, u64)> {
    let accessed = Categories::ACCESSED;
    let scan = Scan { all_of: accessed, inverted: accessed, reported: accessed, ..Scan::default() };
    let end = memory.start + memory.bytes();
    let found = Pagemap::of_self().unwrap().scan(memory.start, end, &scan).unwrap();
    found.iter().map(|region| (region.start, region.end)).collect()
}

#[test]
fn what_was_touched_is_found_and_nobody_waits() {
    if !need("RWP_ASYNC") {
        return;
    }
    on_each(Kind::ALL, 4, |_, memory| {
        let target = protected_pages(memory);
        let memory = &target.memory;
        assert_eq!(cold(memory), [(memory.at(0), memory.at(4))]);
        assert_eq!([0, 1].map(|at| memory.touch(at)), [1, 2]);
        assert_eq!(cold(memory), [(memory.at(2), memory.at(4))]);
        assert_eq!(touch_in_kernel(memory.at(2)).unwrap(), 3);
        assert_eq!(cold(memory), [(memory.at(3), memory.at(4))]);
        write(memory.at(3), 9);
        assert_eq!(cold(memory), []);
        target.assert_silent();
    });
}

/// Switched off and on again: what is cold can be taken away, one fault at a time, and then be tracked
/// again.
#[test]
fn it_can_be_switched_while_it_runs() {
    if !need("RWP_ASYNC") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let target = protected_pages(memory);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_eq!(memory.touch(0), 1);
        uffd.set_mode(Features::NONE, Features::RWP_ASYNC).unwrap();
        let thread = toucher(memory.at(1));
        target.assert_fault(memory.at(1), Cause::Protected);
        uffd.allow_access(memory.at(1), memory.pages(1)).unwrap();
        assert_eq!(thread.join().unwrap(), 2);
        uffd.set_mode(Features::RWP_ASYNC, Features::NONE).unwrap();
        uffd.protect_against_access(memory.start, memory.bytes()).unwrap();
        assert_eq!([0, 1].map(|at| memory.touch(at)), [1, 2]);
        assert_eq!(cold(memory), []);
        target.assert_silent();
    });
}

#[test]
fn nothing_else_can_be_switched() {
    if !need("RWP_ASYNC") {
        return;
    }
    let uffd = negotiated(BOTH);
    assert_errno(uffd.set_mode(Features::SIGBUS, Features::NONE), Errno::INVAL);
    let without = negotiated(Features::NONE);
    assert_errno(without.set_mode(Features::RWP_ASYNC, Features::NONE), Errno::INVAL);
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("RWP_ASYNC") {
        assert_errno(open().handshake(Features::RWP_ASYNC), Errno::INVAL);
        let uffd = negotiated(Features::NONE);
        assert_errno(uffd.set_mode(Features::RWP_ASYNC, Features::NONE), Errno::INVAL);
        assert_errno(uffd.set_mode(Features::NONE, Features::RWP_ASYNC), Errno::INVAL);
    }
}
