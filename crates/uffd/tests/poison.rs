//! POISON: pages that raise SIGBUS where they are touched, as broken memory does.

mod common;

use common::*;
use rustix::mm::Advice;
use uffd::{Cause, Errno, Features, How, Operations, RegisterMode};

/// The signal that a poisoned page raises at an address: what broken memory raises, with its size, if the
/// kernel was built to handle that (CONFIG_MEMORY_FAILURE), else what any page that cannot be had raises.
fn signal_at(address: u64, page: usize) -> Caught {
    match std::path::Path::new("/proc/sys/vm/memory_failure_recovery").exists() {
        true => Caught { code: POISONED, address, size: page as u64 },
        false => Caught { code: NO_PAGE, address, size: 0 },
    }
}

#[track_caller]
fn assert_poisoned(memory: &Mapping, at: usize) {
    let address = memory.at(at) + 9;
    assert_eq!(signal_of(address, memory.page), Ok(signal_at(address, memory.page)));
}

#[test]
fn a_poisoned_page_raises_a_signal_and_the_next_one_does_not() {
    if !need("POISON") {
        return;
    }
    on_each(Kind::ALL, 4, |kind, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let page = memory.pages(1);

        // Who waits gets the signal: in the kernel, an error.
        let address = memory.at(1);
        let thread = std::thread::spawn(move || touch_in_kernel(address));
        target.assert_fault(address, Cause::Missing);
        assert_done(uffd.poison_with(address, page, How::DONT_WAKE), memory.page);
        assert_eq!(waiters(uffd), 1);
        uffd.wake(address, page).unwrap();
        assert_errno(thread.join().unwrap(), Errno::FAULT);
        let thread = std::thread::spawn(move || signal_of(address + 9, page as usize));
        assert_eq!(thread.join().unwrap(), Ok(signal_at(address + 9, page as usize)));

        // Poisoned pages are there, but COPY mends them.
        assert_done(uffd.poison(memory.at(2), memory.pages(2)), 2 * memory.page);
        assert_stopped(uffd.poison(memory.at(2), page), 0, Errno::EXIST);
        assert_errno(touch_in_kernel(memory.at(2)), Errno::FAULT);
        assert_done(uffd.copy(memory.at(2), &memory.filled(6)), memory.page);
        memory.assert_content(2, 6);
        assert_stopped(uffd.poison(memory.at(2), page), 0, Errno::EXIST);
        memory.assert_content(2, 6);
        // So does the zero page in a shared mapping, where it is a page of the file like any other.
        let zeroed = uffd.zeropage(memory.at(3), page);
        if kind.is_huge() {
            assert_stopped(zeroed, 0, Errno::INVAL);
        } else if kind.is_shared() {
            assert_done(zeroed, memory.page);
            memory.assert_content(3, 0);
        } else {
            assert_stopped(zeroed, 0, Errno::EXIST);
        }
        if kind.is_huge() || !kind.is_shared() {
            assert_poisoned(memory, 3);
        }
        target.assert_silent();
    });
}

/// It is the page table's entry that is poisoned, not the page of the file.
#[test]
fn another_mapping_of_the_file_is_not_poisoned() {
    if !need("POISON") {
        return;
    }
    on_each(Kind::SHARED, 2, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let other = memory.again();
        assert_done(uffd.poison(memory.at(0), memory.pages(2)), 2 * memory.page);
        write(other.at(0), 3);
        assert_eq!(other.touch(0), 3);
        assert_poisoned(memory, 0);
        assert_errno(touch_in_kernel(memory.at(1)), Errno::FAULT);
    });
}

#[test]
fn poison_outlives_the_registration_and_ends_when_the_page_is_given_back() {
    if !need("POISON") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let Registered { uffd, memory } = Registered::over(memory, Features::NONE);
        assert_done(uffd.poison(memory.at(0), memory.pages(2)), 2 * memory.page);
        uffd.unregister(memory.start, memory.bytes()).unwrap();
        drop(uffd);
        assert_errno(touch_in_kernel(memory.at(0)), Errno::FAULT);
        memory.advise(Advice::LinuxDontNeed);
        memory.assert_content(0, 0);
        memory.assert_content(1, 0);
    });
}

/// A child's private pages are poisoned as its parent's are, whether it is served or not. Of a shared
/// mapping a fork copies nothing, so that the child finds there what the file has.
#[test]
fn a_child_inherits_it_in_private_memory() {
    let _alone = alone();
    if !need("POISON") {
        return;
    }
    on_each(Kind::ALL, 1, |kind, memory| {
        let target = Registered::over(memory, Features::NONE);
        let address = target.memory.start;
        assert_done(target.uffd.poison(address, target.memory.pages(1)), target.memory.page);
        let thread = forking(move || i32::from(touch(address)));
        let expected = if kind.is_shared() { Ok(0) } else { Err(libc::SIGBUS) };
        assert_eq!(thread.join().unwrap().end(), expected);
    });
}

#[test]
fn a_present_page_is_not_poisoned() {
    if !need("POISON") {
        return;
    }
    on_each(Kind::ALL, 3, |_, memory| {
        let uffd = negotiated(Features::NONE);
        let operations = uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING);
        assert!(operations.unwrap().contains(Operations::POISON));
        assert_done(uffd.copy(memory.at(1), &memory.filled(1)), memory.page);
        assert_stopped(uffd.poison(memory.at(0), memory.bytes()), memory.page, Errno::AGAIN);
        memory.assert_content(1, 1);
        assert_errno(touch_in_kernel(memory.at(0)), Errno::FAULT);
        drop(uffd);
    });
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("POISON") {
        let target = Registered::anonymous(1, Features::NONE);
        let outcome = target.uffd.poison(target.memory.start, PAGE as u64);
        assert_stopped(outcome, 0, Errno::INVAL);
    }
}
