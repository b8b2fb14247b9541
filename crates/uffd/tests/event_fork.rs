//! EVENT_FORK: the target forked. All in one process, whose forks every userfaultfd of the process that
//! asked for this hears of: one test at a time.

mod common;

use common::*;
use uffd::{Cause, Errno, Event, Features, MessageBuffer, Userfaultfd};

fn child_of(uffd: &Userfaultfd) -> Userfaultfd {
    match next_event(uffd) {
        Event::Fork(child) => child,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_fork_brings_the_childs_descriptor_which_serves_the_child() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    on_each(Kind::ALL, 3, |kind, memory| {
        let target = Registered::over(memory, Features::EVENT_FORK);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &memory.filled(4)), memory.page);
        let (first, last) = (memory.at(0), memory.at(2));
        let thread = forking(move || i32::from(touch(first)) * 10 + i32::from(touch(last)));
        wait_readable(uffd);
        assert!(!thread.is_finished(), "the parent waits until the event is read");
        let child = child_of(uffd);
        let process = thread.join().unwrap();
        let flags = rustix::io::fcntl_getfd(&child).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(uffd::negotiated(&child).unwrap(), Some(Features::EVENT_FORK));

        // The child's faults come by the child's descriptor.
        assert_eq!(next_fault(&child), (memory.at(2), 0));
        target.assert_silent();
        assert_done(child.copy(memory.at(2), &memory.filled(5)), memory.page);

        // What the parent has the child has. The rest is filled in each of them apart, unless it is one
        // page of one file.
        if kind.is_shared() {
            assert_done(uffd.copy(memory.at(1), &memory.filled(7)), memory.page);
            assert_stopped(child.copy(memory.at(1), &memory.filled(6)), 0, Errno::EXIST);
            assert_eq!(memory.touch(2), 5);
        } else {
            assert_stopped(child.copy(memory.at(0), &memory.filled(5)), 0, Errno::EXIST);
            assert_done(child.copy(memory.at(1), &memory.filled(6)), memory.page);
            assert_done(uffd.copy(memory.at(1), &memory.filled(7)), memory.page);
        }
        memory.assert_content(1, 7);
        assert_eq!(process.end(), Ok(45));
    });
}

#[test]
fn a_childs_child_is_told_by_the_childs_descriptor() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(1, Features::EVENT_FORK);
    let address = target.memory.start;
    let thread = forking(move || {
        // SAFETY: this child has one thread, and its child only touches memory and ends.
        unsafe {
            let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32;
            if pid == 0 {
                libc::_exit(i32::from(touch(address)));
            }
            let mut status = 0;
            libc::waitpid(pid, &raw mut status, 0);
            libc::WEXITSTATUS(status)
        }
    });
    let child = child_of(&target.uffd);
    let grandchild = child_of(&child);
    assert_eq!(next_fault(&grandchild), (address, 0));
    target.assert_silent();
    assert_done(grandchild.copy(address, &page(33)), PAGE);
    assert_eq!(thread.join().unwrap().end(), Ok(33));
}

#[test]
fn an_event_that_nobody_takes_is_closed() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(1, Features::EVENT_FORK);
    let before = descriptors_open();
    let mut buffer = MessageBuffer::new(4);
    for taken in [false, true] {
        let thread = forking(|| 0);
        wait_readable(&target.uffd);
        let mut events = target.uffd.read_events(&mut buffer).unwrap();
        if taken {
            assert!(matches!(events.next(), Some(Event::Fork(_))), "taken, and dropped");
        }
        drop(events);
        assert_eq!(thread.join().unwrap().end(), Ok(0));
    }
    assert_eq!(descriptors_open(), before);
}

/// Once the child's descriptor is closed, the child's memory is as if nobody had ever served it.
#[test]
fn a_child_whose_descriptor_is_closed_reads_zeros() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(1, Features::EVENT_FORK);
    let address = target.memory.start;
    let thread = forking(move || i32::from(touch(address)) + 7);
    drop(child_of(&target.uffd));
    assert_eq!(thread.join().unwrap().end(), Ok(7));
    target.assert_silent();
}

/// A child is plain memory without the event: what is missing reads as zeros, and fills the cache of
/// shared memory with them.
#[test]
fn without_the_event_a_child_reads_zeros_where_nothing_is() {
    let _alone = alone();
    on_each(Kind::ALL, 2, |kind, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &memory.filled(4)), memory.page);
        let (first, last) = (memory.at(0), memory.at(1));
        let thread = forking(move || i32::from(touch(first)) * 10 + i32::from(touch(last)));
        assert_eq!(thread.join().unwrap().end(), Ok(40));
        target.assert_silent();
        let outcome = uffd.copy(memory.at(1), &memory.filled(5));
        // A private mapping of a file has its cache filled too, but may cover it.
        if kind.is_shared() {
            assert_stopped(outcome, 0, Errno::EXIST);
        } else {
            assert_done(outcome, memory.page);
        }
    });
}

/// Programs are started by vfork, which copies no memory.
#[test]
fn starting_a_program_is_no_fork() {
    let _alone = alone();
    if !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(1, Features::EVENT_FORK);
    let mut child = std::process::Command::new("true").spawn().unwrap();
    assert!(child.wait().unwrap().success());
    target.assert_silent();
    let thread = toucher(target.memory.start);
    target.assert_fault(target.memory.start, Cause::Missing);
    assert_done(target.uffd.zeropage(target.memory.start, PAGE as u64), PAGE);
    assert_eq!(thread.join().unwrap(), 0);
}
