//! What each resolve answers: bytes done and the errno that stopped it, as the kernel has them.

mod common;

use std::os::fd::{AsFd, AsRawFd};

use common::*;
use rustix::mm::{madvise, mprotect, Advice, MapFlags, MprotectFlags};
use uffd::{Errno, Event, Features, How, Progress, RegisterMode};

/// Three registered pages over a file whose pages 0 and 1 are in the page cache already.
fn shared_file() -> (Registered, Mapping) {
    let file = memory_file(3);
    let writer = Mapping::of(&file, 3, READ_WRITE, MapFlags::SHARED);
    write(writer.at(0), 0xA0);
    write(writer.at(1), 0xA1);
    let memory = Mapping::of(&file, 3, READ_WRITE, MapFlags::SHARED);
    (Registered::over(memory, Features::NONE), writer)
}

#[test]
fn copy_fills_and_wakes() {
    let target = Registered::anonymous(4, Features::NONE);
    let thread = toucher(target.memory.at(2));
    assert_eq!(target.next_fault(), target.memory.at(2));
    let content: Vec<u8> = (0..4).flat_map(|fill| page(fill + 1)).collect();
    assert_eq!(waiters(&target.uffd), 1);
    assert_done(target.uffd.copy(target.memory.start, &content), 4 * PAGE);
    assert_eq!(waiters(&target.uffd), 0);
    assert_eq!(thread.join().unwrap(), 3);
    assert_eq!(target.memory.content(3), page(4));
}

#[test]
fn the_source_of_a_copy_may_lie_anywhere() {
    let target = Registered::anonymous(1, Features::NONE);
    let content: Vec<u8> = (0..=PAGE).map(|at| (at % 251) as u8).collect();
    assert_done(target.uffd.copy(target.memory.start, &content[1..]), PAGE);
    assert_eq!(target.memory.content(0), content[1..]);
}

#[test]
fn zeropage_fills_and_wakes() {
    let target = Registered::anonymous(2, Features::NONE);
    let thread = toucher(target.memory.at(0));
    assert_eq!(target.next_fault(), target.memory.at(0));
    assert_done(target.uffd.zeropage(target.memory.start, target.memory.bytes()), 2 * PAGE);
    assert_eq!(thread.join().unwrap(), 0);
    assert_eq!(target.memory.touch(1), 0);
}

#[test]
fn continue_maps_what_the_page_cache_has() {
    let (target, _writer) = shared_file();
    let (uffd, memory) = (&target.uffd, &target.memory);
    assert_done(uffd.continue_(memory.at(0), 2 * PAGE as u64), 2 * PAGE);
    assert_eq!((memory.touch(0), memory.touch(1)), (0xA0, 0xA1));
    assert_stopped(uffd.continue_(memory.at(0), PAGE as u64), 0, Errno::EXIST);
    assert_stopped(uffd.continue_(memory.at(2), PAGE as u64), 0, Errno::FAULT);
    let anonymous = Registered::anonymous(1, Features::NONE);
    let refused = anonymous.uffd.continue_(anonymous.memory.start, PAGE as u64);
    assert_stopped(refused, 0, Errno::INVAL);
}

#[test]
fn beyond_the_end_of_the_file() {
    let file = memory_file(1);
    let memory = Mapping::of(&file, 2, READ_WRITE, MapFlags::SHARED);
    let target = Registered::over(memory, Features::NONE);
    let beyond = target.memory.at(1);
    // Until 6.18 EINVAL and EFAULT, on 7.3 EFAULT and ENOMEM.
    let refused = target.uffd.continue_(beyond, PAGE as u64);
    assert!(matches!(refused.errno, Some(Errno::INVAL | Errno::FAULT)), "{refused:?}");
    let copied = target.uffd.copy(beyond, &page(1));
    assert!(matches!(copied.errno, Some(Errno::FAULT | Errno::NOMEM)), "{copied:?}");
    assert_eq!((refused.done, copied.done), (0, 0));
}

#[test]
fn a_shared_page_that_the_page_cache_has_is_not_overwritten() {
    let (target, writer) = shared_file();
    assert_stopped(target.uffd.copy(target.memory.at(1), &page(9)), 0, Errno::EXIST);
    assert_eq!(writer.touch(1), 0xA1);
    // The hole behind it is filled for everybody.
    assert_done(target.uffd.copy(target.memory.at(2), &page(0xA2)), PAGE);
    assert_eq!(writer.content(2), page(0xA2));
}

#[test]
fn a_present_page_is_eexist_whatever_the_operation() {
    let target = Registered::anonymous(1, Features::NONE);
    let (uffd, start) = (&target.uffd, target.memory.start);
    assert_done(uffd.copy(start, &page(5)), PAGE);
    assert_stopped(uffd.copy(start, &page(6)), 0, Errno::EXIST);
    assert_stopped(uffd.zeropage(start, PAGE as u64), 0, Errno::EXIST);
    if support().has("POISON") {
        assert_stopped(uffd.poison(start, PAGE as u64), 0, Errno::EXIST);
    }
    assert_eq!(target.memory.content(0), page(5));
}

#[test]
fn an_operation_that_meets_a_present_page_says_how_far_it_came() {
    for present in [1, 3] {
        let fresh = || {
            let target = Registered::anonymous(5, Features::NONE);
            assert_done(target.uffd.copy(target.memory.at(present), &page(0xEE)), PAGE);
            target
        };
        let done = present * PAGE;
        let target = fresh();
        let len = target.memory.bytes();
        let stopped = target.uffd.copy(target.memory.start, &page(1).repeat(5));
        assert_stopped(stopped, done, Errno::AGAIN);
        assert_eq!(target.memory.content(present - 1), page(1), "what was done is there");
        assert_eq!(target.memory.content(present), page(0xEE));
        // To go on from there names the reason.
        assert_stopped(target.uffd.copy(target.memory.at(present), &page(1)), 0, Errno::EXIST);
        let target = fresh();
        assert_stopped(target.uffd.zeropage(target.memory.start, len), done, Errno::AGAIN);
        let target = fresh();
        if support().has("POISON") {
            assert_stopped(target.uffd.poison(target.memory.start, len), done, Errno::AGAIN);
        }
    }
    let (target, _writer) = shared_file();
    assert_done(target.uffd.continue_(target.memory.at(1), PAGE as u64), PAGE);
    let stopped = target.uffd.continue_(target.memory.at(0), 2 * PAGE as u64);
    assert_stopped(stopped, PAGE, Errno::AGAIN);
}

#[test]
fn what_was_done_before_it_stopped_is_woken() {
    let target = Registered::anonymous(3, Features::NONE);
    assert_done(target.uffd.copy(target.memory.at(2), &page(9)), PAGE);
    let thread = toucher(target.memory.at(1));
    assert_eq!(target.next_fault(), target.memory.at(1));
    let stopped = target.uffd.copy(target.memory.start, &page(4).repeat(3));
    assert_stopped(stopped, 2 * PAGE, Errno::AGAIN);
    assert_eq!(thread.join().unwrap(), 4);
}

#[test]
fn a_source_that_cannot_be_read() {
    let target = Registered::anonymous(2, Features::NONE);
    let source = Mapping::anonymous(2);
    write(source.at(0), 0x11);
    let protected = source.at(1) as *mut _;
    // SAFETY: a page of a mapping that only this test knows.
    unsafe { mprotect(protected, PAGE, MprotectFlags::empty()) }.unwrap();
    let copy = |from: usize, bytes| -> Progress {
        // SAFETY: the kernel answers EFAULT for the part that cannot be read.
        unsafe {
            target.uffd.copy_from(
                target.memory.start,
                source.at(from) as *const u8,
                bytes,
                uffd::How::NONE,
            )
        }
    };
    assert_stopped(copy(1, PAGE), 0, Errno::FAULT);
    assert_stopped(copy(0, 2 * PAGE), PAGE, Errno::AGAIN);
    assert_eq!(target.memory.touch(0), 0x11);
}

/// Asked, and never filled.
#[test]
fn a_range_can_be_asked_for() {
    let target = Registered::anonymous(8, Features::EVENT_REMOVE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    assert_done(uffd.copy(memory.at(3), &page(1)), PAGE);
    for (from, pages) in [(0, 8), (0, 1), (3, 1), (3, 5)] {
        let answer = uffd.probe_range(memory.at(from), (pages * PAGE) as u64);
        assert_eq!(answer, Some(Errno::FAULT), "{pages} pages from {from}");
    }
    uffd.unregister(memory.at(7), PAGE as u64).unwrap();
    assert_eq!(uffd.probe_range(memory.at(7), PAGE as u64), Some(Errno::NOENT));
    assert_eq!(uffd.probe_range(memory.at(0), memory.bytes()), Some(Errno::NOENT));
    assert!(uffd.is_alive(memory.at(7)));
    // What was asked for is missing still.
    let waiting = toucher(memory.at(0));
    assert_eq!(target.next_fault(), memory.at(0));
    assert_done(uffd.copy(memory.at(0), &page(2)), PAGE);
    assert_eq!(waiting.join().unwrap(), 2);
    let address = memory.at(1);
    let giver = std::thread::spawn(move || {
        // SAFETY: a page of the test, which it does not look at again.
        unsafe { madvise(address as *mut _, PAGE, Advice::LinuxDontNeed).unwrap() };
    });
    wait_readable(uffd);
    assert_eq!(uffd.probe_range(memory.at(4), PAGE as u64), Some(Errno::AGAIN), "nothing is known");
    assert!(matches!(next_event(uffd), Event::Remove { .. }));
    giver.join().unwrap();
}

#[test]
fn a_range_that_is_not_registered_or_ends_too_soon() {
    let memory = Mapping::anonymous(4);
    let uffd = negotiated(Features::NONE);
    uffd.register(memory.at(1), 2 * PAGE as u64, RegisterMode::MISSING).unwrap();
    let len = PAGE as u64;
    let unmapped = Mapping::anonymous(1).start;
    for outside in [memory.at(0), memory.at(3), unmapped] {
        assert_stopped(uffd.copy(outside, &page(1)), 0, Errno::NOENT);
        assert_stopped(uffd.zeropage(outside, len), 0, Errno::NOENT);
        assert_stopped(uffd.continue_(outside, len), 0, Errno::NOENT);
        if support().has("POISON") {
            assert_stopped(uffd.poison(outside, len), 0, Errno::NOENT);
        }
    }
    // Across the end nothing is done at all.
    assert_stopped(uffd.copy(memory.at(2), &page(1).repeat(2)), 0, Errno::NOENT);
    assert_done(uffd.copy(memory.at(1), &page(1).repeat(2)), 2 * PAGE);
    // Waking asks for no registration.
    uffd.wake(memory.at(0), len).unwrap();
    uffd.wake(unmapped, len).unwrap();
}

#[test]
fn absurd_ranges_are_invalid() {
    let target = Registered::anonymous(2, Features::NONE);
    let (uffd, start) = (&target.uffd, target.memory.start);
    for (start, len) in
        [(start + 1, PAGE as u64), (start, 100), (start, 0), (u64::MAX - 4095, 8192)]
    {
        assert_stopped(uffd.copy(start, &vec![1; len as usize]), 0, Errno::INVAL);
        assert_stopped(uffd.zeropage(start, len), 0, Errno::INVAL);
        assert_stopped(uffd.continue_(start, len), 0, Errno::INVAL);
        assert_stopped(uffd.poison(start, len), 0, Errno::INVAL);
        assert_stopped(uffd.move_pages(start, target.memory.start, len), 0, Errno::INVAL);
        assert_errno(uffd.protect(start, len), Errno::INVAL);
        assert_errno(uffd.unprotect(start, len), Errno::INVAL);
        assert_errno(uffd.wake(start, len), Errno::INVAL);
    }
}

/// What an operation has no word for is refused, and nothing is done.
#[test]
fn options_of_other_operations_are_refused() {
    let target = Registered::anonymous(1, Features::NONE);
    let (uffd, start, len) = (&target.uffd, target.memory.start, PAGE as u64);
    for how in [How::HOLES, How::HOLES | How::DONT_WAKE, How(1 << 40)] {
        assert_stopped(uffd.copy_with(start, &page(1), how), 0, Errno::INVAL);
        assert_stopped(uffd.continue_with(start, len, how), 0, Errno::INVAL);
    }
    for how in [How::HOLES, How::PROTECTED, How(1 << 40)] {
        assert_stopped(uffd.zeropage_with(start, len, how), 0, Errno::INVAL);
        assert_stopped(uffd.poison_with(start, len, how), 0, Errno::INVAL);
        assert_errno(uffd.unprotect_with(start, len, how), Errno::INVAL);
    }
    for how in [How::PROTECTED, How(1 << 40)] {
        assert_stopped(uffd.move_with(start, start, len, how), 0, Errno::INVAL);
    }
    assert_done(uffd.copy(start, &page(1)), PAGE);
}

/// The binding has no way to say these: protecting wakes nobody anyway.
#[test]
fn modes_of_protecting_that_mean_nothing() {
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let target = Registered::with(Mapping::anonymous(1), Features::NONE, RegisterMode::WP);
    for mode in [3, 4, 1 << 40] {
        let range = uffd::abi::Range { start: target.memory.start, len: PAGE as u64 };
        let mut argument = uffd::abi::Protect { range, mode };
        let descriptor = target.uffd.as_fd().as_raw_fd();
        let request = uffd::abi::UFFDIO_WRITEPROTECT;
        // SAFETY: the structure that the request takes, borrowed for the call.
        let outcome = unsafe { libc::ioctl(descriptor, request as _, &raw mut argument) };
        assert_eq!(outcome, -1);
        assert_errno::<()>(Err(std::io::Error::last_os_error()), Errno::INVAL);
    }
}

/// COPY does not ask who registered the range, but wakes its own waiters only.
#[test]
fn another_userfaultfd_of_the_process_fills_it_too() {
    let target = Registered::anonymous(2, Features::NONE);
    let other = negotiated(Features::NONE);
    let thread = toucher(target.memory.at(1));
    target.next_fault();
    assert_done(other.copy(target.memory.start, &page(5).repeat(2)), 2 * PAGE);
    assert_eq!(waiters(&target.uffd), 1);
    target.uffd.wake(target.memory.start, target.memory.bytes()).unwrap();
    assert_eq!(thread.join().unwrap(), 5);
}

/// The rule that costs most when it is forgotten: a page that somebody else brought wakes nobody.
#[test]
fn eexist_does_not_wake_and_wake_does() {
    let target = Registered::anonymous(1, Features::NONE);
    let start = target.memory.start;
    let thread = toucher(start);
    target.next_fault();
    // Another userfaultfd of the same process fills the page; it knows only its own waiters.
    assert_done(negotiated(Features::NONE).copy(start, &page(8)), PAGE);
    assert_eq!(waiters(&target.uffd), 1);
    assert_stopped(target.uffd.copy(start, &page(9)), 0, Errno::EXIST);
    assert_stopped(target.uffd.zeropage(start, PAGE as u64), 0, Errno::EXIST);
    assert_eq!(waiters(&target.uffd), 1, "EEXIST woke nobody");
    target.uffd.wake(start, PAGE as u64).unwrap();
    assert_eq!(waiters(&target.uffd), 0);
    assert_eq!(thread.join().unwrap(), 8);
}

#[test]
fn who_is_woken_without_a_page_faults_again() {
    let target = Registered::anonymous(1, Features::NONE);
    let start = target.memory.start;
    let thread = toucher(start);
    for _ in 0..3 {
        assert_eq!(target.next_fault(), start);
        target.uffd.wake(start, PAGE as u64).unwrap();
    }
    assert_eq!(target.next_fault(), start);
    assert_done(target.uffd.copy(start, &page(2)), PAGE);
    assert_eq!(thread.join().unwrap(), 2);
}

#[test]
fn a_clone_is_the_same_userfaultfd() {
    let Registered { uffd, memory } = Registered::anonymous(1, Features::NONE);
    let clone = uffd.try_clone().unwrap();
    drop(uffd);
    let thread = toucher(memory.start);
    assert!(matches!(next_event(&clone), uffd::Event::Fault { .. }), "still served");
    assert_done(clone.copy(memory.start, &page(1)), PAGE);
    assert_eq!(thread.join().unwrap(), 1);
    drop(clone);
}
