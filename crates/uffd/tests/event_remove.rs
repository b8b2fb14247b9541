//! EVENT_REMOVE: the target gives pages back with madvise.

mod common;

use common::*;
use rustix::fs::{fallocate, ftruncate, FallocateFlags};
use rustix::mm::Advice;
use uffd::{Cause, Event, Features, MessageBuffer, Userfaultfd};

#[track_caller]
fn assert_removed(uffd: &Userfaultfd, memory: &Mapping, from: usize, to: usize) {
    match next_event(uffd) {
        Event::Remove { start, end } => assert_eq!((start, end), (memory.at(from), memory.at(to))),
        other => panic!("{other:?}"),
    }
}

/// Fills a page of registered memory and has a thread read it: what came, and whether it was asked for.
fn read_again(target: &Registered, at: usize, fill: u8) -> (u8, bool) {
    let thread = toucher(target.memory.at(at));
    until("it waits or has read", || thread.is_finished() || waiters(&target.uffd) == 1);
    let asked = waiters(&target.uffd) == 1;
    if asked {
        target.assert_fault(target.memory.at(at), Cause::Missing);
        let done = target.uffd.copy(target.memory.at(at), &target.memory.filled(fill));
        assert_done(done, target.memory.page);
    }
    (thread.join().unwrap(), asked)
}

/// Told before the pages go; the range stays registered.
#[test]
fn pages_that_are_given_back_are_told_and_missing_again() {
    if !need("EVENT_REMOVE") {
        return;
    }
    on_each(Kind::ALL, 4, |kind, memory| {
        let target = Registered::over(memory, Features::EVENT_REMOVE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(1), &memory.filled(1).repeat(2)), 2 * memory.page);
        let thread = memory.giving_back(1, 2, Advice::LinuxDontNeed);
        wait_readable(uffd);
        assert_eq!(memory.touch(1), 1, "still there");
        assert_removed(uffd, memory, 1, 3);
        thread.join().unwrap();
        // The cache of a shared mapping has not lost it: nobody is asked.
        let expected = if kind.is_shared() { (1, false) } else { (9, true) };
        assert_eq!(read_again(&target, 1, 9), expected);
        assert_eq!(read_again(&target, 3, 8), (8, true), "beside it all is as it was");

        // It has where the file itself loses its pages; a private mapping cannot ask for that.
        if kind.is_shared() {
            let thread = memory.giving_back(1, 2, Advice::LinuxRemove);
            assert_removed(uffd, memory, 1, 3);
            thread.join().unwrap();
            assert_eq!(read_again(&target, 1, 9), (9, true));
        }
        if kind == Kind::Anonymous {
            let thread = memory.giving_back(3, 1, Advice::LinuxFree);
            assert_removed(uffd, memory, 3, 4);
            thread.join().unwrap();
        }
        // Empty pages make an event too.
        let thread = memory.giving_back(0, 1, Advice::LinuxDontNeed);
        assert_removed(uffd, memory, 0, 1);
        thread.join().unwrap();
    });
}

#[test]
fn one_call_over_several_ranges_tells_the_registered_ones() {
    if !need("EVENT_REMOVE") {
        return;
    }
    let target = Registered::anonymous(5, Features::EVENT_REMOVE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.unregister(memory.at(2), memory.pages(1)).unwrap();
    let thread = memory.giving_back(0, 5, Advice::LinuxDontNeed);
    assert_removed(uffd, memory, 0, 2);
    assert_removed(uffd, memory, 3, 5);
    thread.join().unwrap();
}

#[test]
fn without_the_event_the_pages_are_just_missing_again() {
    on_each(Kind::ALL, 2, |kind, memory| {
        let target = Registered::over(memory, Features::NONE);
        assert_done(
            target.uffd.copy(target.memory.at(0), &target.memory.filled(1)),
            target.memory.page,
        );
        target.memory.giving_back(0, 2, Advice::LinuxDontNeed).join().unwrap();
        target.assert_silent();
        let expected = if kind.is_shared() { (1, false) } else { (9, true) };
        assert_eq!(read_again(&target, 0, 9), expected);
    });
}

/// Nobody is told of what happens to the file, not to the memory.
#[test]
fn a_hole_punched_into_the_file_is_no_event() {
    if !need("EVENT_REMOVE") {
        return;
    }
    on_each(Kind::SHARED, 2, |_, memory| {
        let target = Registered::over(memory, Features::EVENT_REMOVE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let file = memory.file.as_ref().unwrap();
        assert_done(uffd.copy(memory.at(0), &memory.filled(1).repeat(2)), 2 * memory.page);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, hole, 0, memory.pages(1)).unwrap();
        ftruncate(file, memory.pages(1)).unwrap();
        ftruncate(file, memory.pages(2)).unwrap();
        target.assert_silent();
        // And both pages are missing.
        assert_eq!(read_again(&target, 0, 5), (5, true));
        assert_eq!(read_again(&target, 1, 6), (6, true));
    });
}

/// Nor of what the kernel does by itself: reclaim, asked for.
#[test]
fn paging_out_is_no_event() {
    if !need("EVENT_REMOVE") {
        return;
    }
    let target = Registered::anonymous(2, Features::EVENT_REMOVE);
    assert_done(target.uffd.copy(target.memory.at(0), &page(1)), PAGE);
    target.memory.giving_back(0, 2, Advice::LinuxPageOut).join().unwrap();
    target.assert_silent();
    assert_eq!(target.memory.touch(0), 1);
}

/// Faults are read first, though they may be younger than the event.
#[test]
fn faults_come_before_it_in_one_read() {
    if !need("EVENT_REMOVE") {
        return;
    }
    let target = Registered::anonymous(4, Features::EVENT_REMOVE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let remover = memory.giving_back(1, 2, Advice::LinuxDontNeed);
    wait_readable(uffd);
    let reader = toucher(memory.at(3));
    until("both wait", || waiters(uffd) == 1);
    let mut buffer = MessageBuffer::new(8);
    let events: Vec<Event> = uffd.read_events(&mut buffer).unwrap().collect();
    match &events[..] {
        [Event::Fault { address, .. }, Event::Remove { start, end }] => {
            assert_eq!((*address, *start, *end), (memory.at(3), memory.at(1), memory.at(3)));
        }
        other => panic!("{other:?}"),
    }
    remover.join().unwrap();
    assert_done(uffd.copy(memory.at(3), &page(3)), PAGE);
    assert_eq!(reader.join().unwrap(), 3);
}
