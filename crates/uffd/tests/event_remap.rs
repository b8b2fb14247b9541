//! EVENT_REMAP: registered memory is moved with mremap.

mod common;

use std::thread::JoinHandle;

use common::*;
use rustix::mm::{mremap, mremap_fixed, MremapFlags};
use uffd::{Cause, Event, Features, MessageBuffer, RegisterMode, Userfaultfd};

/// A thread that moves memory into `room`, which takes its place: what `room` unmaps later.
fn moving(memory: &Mapping, room: &Mapping, stays: bool) -> JoinHandle<()> {
    let (from, len, to) = (memory.start, memory.len, room.start);
    if !stays {
        memory.gone(0, len / memory.page);
    }
    std::thread::spawn(move || {
        let flags = MremapFlags::MAYMOVE
            | if stays { MremapFlags::DONTUNMAP } else { MremapFlags::empty() };
        // SAFETY: both ranges are the test's own.
        unsafe { mremap_fixed(from as *mut _, len, len, flags, to as *mut _).unwrap() };
    })
}

#[track_caller]
fn assert_moved(uffd: &Userfaultfd, memory: &Mapping, room: &Mapping) {
    match next_event(uffd) {
        Event::Remap { from, to, len } => {
            assert_eq!((from, to, len), (memory.start, room.start, memory.bytes()));
        }
        other => panic!("{other:?}"),
    }
}

/// The new range is registered, with what was there; the old one is gone, which EVENT_UNMAP tells.
#[test]
fn moved_memory_is_told_and_served_where_it_is_now() {
    if !need("EVENT_REMAP") || !need("EVENT_UNMAP") {
        return;
    }
    on_each(Kind::ALL, 3, |_, memory| {
        // Unmapped after the descriptor is closed, else that would wait for somebody to hear of it.
        let room = Mapping::room(memory.bytes());
        let features = Features::EVENT_REMAP | Features::EVENT_UNMAP;
        let target = Registered::over(memory, features);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &memory.filled(7)), memory.page);
        let thread = moving(memory, &room, false);
        assert_moved(uffd, memory, &room);
        match next_event(uffd) {
            Event::Unmap { start, end } => {
                assert_eq!((start, end), (memory.start, memory.start + memory.bytes()));
            }
            other => panic!("{other:?}"),
        }
        thread.join().unwrap();
        assert_eq!(touch(room.start), 7, "what was there moved along");
        let next = room.start + memory.pages(1);
        let thread = toucher(next);
        target.assert_fault(next, Cause::Missing);
        assert_done(uffd.copy(next, &memory.filled(8)), memory.page);
        assert_eq!(thread.join().unwrap(), 8);
    });
}

/// MREMAP_DONTUNMAP: the pages go, the old range stays and is missing again; both are registered.
#[test]
fn memory_that_stays_mapped_where_it_was_faults_in_both_places() {
    if !need("EVENT_REMAP") {
        return;
    }
    let kinds = [Kind::Anonymous, Kind::Shmem, Kind::ShmemPrivate, Kind::Tmpfs];
    on_each(&kinds, 2, |kind, memory| {
        // Unmapped after the descriptor is closed, else that would wait for somebody to hear of it.
        let room = Mapping::room(memory.bytes());
        let features = Features::EVENT_REMAP | Features::EVENT_UNMAP;
        let target = Registered::over(memory, features);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &memory.filled(7)), memory.page);
        let thread = moving(memory, &room, true);
        assert_moved(uffd, memory, &room);
        thread.join().unwrap();
        target.assert_silent();
        assert_eq!(touch(room.start), 7);
        if kind.is_shared() {
            assert_eq!(memory.touch(0), 7, "the cache has it");
        } else {
            let thread = toucher(memory.at(0));
            target.assert_fault(memory.at(0), Cause::Missing);
            assert_done(uffd.copy(memory.at(0), &memory.filled(6)), memory.page);
            assert_eq!(thread.join().unwrap(), 6);
        }
        for address in [memory.at(1), room.start + memory.pages(1)] {
            if kind.is_shared() && address != memory.at(1) {
                assert_eq!(touch(address), 5, "the cache has it by now");
                continue;
            }
            let thread = toucher(address);
            target.assert_fault(address, Cause::Missing);
            assert_done(uffd.copy(address, &memory.filled(5)), memory.page);
            assert_eq!(thread.join().unwrap(), 5);
        }
    });
}

#[test]
fn a_range_that_grew_faults_in_its_new_part_too() {
    if !need("EVENT_REMAP") {
        return;
    }
    let Registered { uffd, memory } =
        Registered::anonymous(1, EVENTS.without(Features::EVENT_FORK));
    let start = memory.start;
    let thread = std::thread::spawn(move || {
        // SAFETY: the test's own range.
        unsafe { mremap(start as *mut _, PAGE, 64 * PAGE, MremapFlags::MAYMOVE).unwrap() as u64 }
    });
    // It may grow where it is, silently, or move: the length told is the old one.
    let mut moved = None;
    until("moved or grown", || {
        let mut buffer = MessageBuffer::new(4);
        for event in uffd.read_events(&mut buffer).unwrap() {
            if let Event::Remap { from, to, len } = event {
                assert_eq!((from, len), (start, PAGE as u64));
                moved = Some(to);
            }
        }
        thread.is_finished()
    });
    let at = thread.join().unwrap();
    assert_eq!(moved.unwrap_or(start), at);
    std::mem::forget(memory);
    let memory = Registered { uffd, memory: Mapping::taken(at, 64) };
    let last = memory.memory.at(63);
    let reader = toucher(last);
    memory.assert_fault(last, Cause::Missing);
    assert_done(memory.uffd.zeropage(last, PAGE as u64), PAGE);
    assert_eq!(reader.join().unwrap(), 0);
}

/// Moved memory of all kinds, transparent huge pages too: protection goes along with the event, and is
/// lost, with the registration, without.
#[test]
fn write_protection_moves_along_with_the_event_and_is_lost_without() {
    if !need("EVENT_REMAP") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    let check = |memory: Mapping, with_event: bool| {
        let features = match with_event {
            true => Features::EVENT_REMAP | Features::WP_HUGETLBFS_SHMEM,
            false => Features::WP_HUGETLBFS_SHMEM,
        };
        let pages = memory.len / memory.page;
        (0..pages).for_each(|at| write(memory.at(at), 1));
        let target = Registered::with(memory, features, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        uffd.protect(memory.start, memory.bytes()).unwrap();
        let room = Mapping::room(memory.bytes());
        let thread = moving(memory, &room, false);
        if with_event {
            assert_moved(uffd, memory, &room);
        }
        thread.join().unwrap();
        let moved = |at: usize| room.start + memory.pages(at);
        assert!((0..pages).all(|at| protected(moved(at)) == with_event));
        let thread = writer(moved(0), 2);
        if with_event {
            target.assert_fault(moved(0), Cause::WriteProtected);
            uffd.unprotect(moved(0), memory.bytes()).unwrap();
        }
        thread.join().unwrap();
        assert_eq!(touch(moved(0)), 2);
    };
    for with_event in [false, true] {
        on_each(Kind::ALL, 2, |_, memory| check(memory, with_event));
        check(Mapping::transparent(1), with_event);
    }
}

#[test]
fn without_the_event_moved_memory_is_plain() {
    on_each(Kind::ALL, 2, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &memory.filled(7)), memory.page);
        let room = Mapping::room(memory.bytes());
        moving(memory, &room, false).join().unwrap();
        assert_eq!((touch(room.start), touch(room.start + memory.pages(1))), (7, 0));
        target.assert_silent();
    });
}
