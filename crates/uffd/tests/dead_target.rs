//! A target whose address space is gone: it says nothing, and every operation tells.

mod common;

use std::os::fd::AsFd;

use common::*;
use uffd::{Errno, Event, MessageBuffer, RegisterMode, Userfaultfd};

fn child_of(uffd: &Userfaultfd) -> Userfaultfd {
    match next_event(uffd) {
        Event::Fork(child) => child,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_process_that_exits_says_nothing_and_every_operation_tells() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(2, EVENTS);
    let thread = forking(|| 0);
    let child = child_of(&target.uffd);
    let process = thread.join().unwrap();
    assert!(child.is_alive(target.memory.at(0)), "absent");
    assert_done(child.copy(target.memory.at(0), &page(1)), PAGE);
    assert!(child.is_alive(target.memory.at(0)), "present");
    assert!(child.is_alive(0x1000), "unmapped");
    assert_eq!(process.end(), Ok(0));
    is_gone(&child, &target.memory);
    assert!(target.uffd.is_alive(target.memory.start));
}

#[test]
fn a_process_that_executes_another_program_is_gone_too() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(2, EVENTS);
    let thread = executing(c"/bin/cat");
    let child = child_of(&target.uffd);
    let process = thread.join().unwrap();
    // It lives on, but not its address space.
    until("the program was executed", || !child.is_alive(target.memory.start));
    is_gone(&child, &target.memory);
    // SAFETY: signal 0 only asks; the pid is a child that was not reaped.
    assert_eq!(unsafe { libc::kill(process.pid as i32, 0) }, 0);
    assert_eq!(process.end(), Ok(0));
}

/// A process that is killed while it waits for a page waits no more.
#[test]
fn a_process_that_is_killed_while_it_waits() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(2, EVENTS);
    let address = target.memory.start;
    let thread = forking(move || i32::from(touch(address)));
    let child = child_of(&target.uffd);
    let process = thread.join().unwrap();
    wait_readable(&child);
    // SAFETY: a child that was not reaped.
    assert_eq!(unsafe { libc::kill(process.pid as i32, libc::SIGKILL) }, 0);
    assert_eq!(process.end(), Err(libc::SIGKILL));
    is_gone(&child, &target.memory);
}

fn is_gone(child: &Userfaultfd, memory: &Mapping) {
    let (start, len) = (memory.at(1), PAGE as u64);
    assert!(!child.is_alive(start));
    assert_stopped(child.copy(start, &page(1)), 0, Errno::SRCH);
    assert_stopped(child.zeropage(start, len), 0, Errno::SRCH);
    assert_stopped(child.continue_(start, len), 0, Errno::SRCH);
    if support().has("POISON") {
        assert_stopped(child.poison(start, len), 0, Errno::SRCH);
    }
    if support().has("MOVE") {
        // Nobody but the process itself moves its pages.
        assert_stopped(child.move_pages(start, memory.at(0), len), 0, Errno::INVAL);
    }
    assert_errno(child.protect(start, len), Errno::SRCH);
    assert_errno(child.register(start, len, RegisterMode::MISSING), Errno::NOMEM);
    assert_errno(child.unregister(start, len), Errno::NOMEM);
    child.wake(start, len).unwrap();
    let mut buffer = MessageBuffer::new(4);
    assert_eq!(child.read_events(&mut buffer).unwrap().count(), 0, "and no event says so");
    let mut watched = [rustix::event::PollFd::new(child, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut watched, Some(&Default::default())).unwrap(), 0);
    assert!(!uffd::handshake_needed(child.as_fd()).unwrap());
}
