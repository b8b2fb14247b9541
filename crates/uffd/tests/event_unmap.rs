//! EVENT_UNMAP: registered memory is no longer mapped.

mod common;

use common::*;
use rustix::mm::{mmap_anonymous, mremap, MapFlags, MremapFlags};
use uffd::{Errno, Event, Features, Userfaultfd};

#[track_caller]
fn assert_unmapped(uffd: &Userfaultfd, expected: (u64, u64)) {
    match next_event(uffd) {
        Event::Unmap { start, end } => assert_eq!((start, end), expected),
        other => panic!("{other:?}"),
    }
}

#[test]
fn unmapping_mapping_over_and_shrinking_tell_what_is_gone() {
    if !need("EVENT_UNMAP") {
        return;
    }
    on_each(Kind::ALL, 6, |kind, memory| {
        let target = Registered::over(memory, Features::EVENT_UNMAP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let bytes = memory.page;
        assert_done(uffd.copy(memory.at(0), &memory.filled(1)), bytes);

        // Unmapped, from within.
        let thread = memory.unmapping(1, 1);
        assert_unmapped(uffd, (memory.at(1), memory.at(2)));
        thread.join().unwrap();
        assert_stopped(uffd.copy(memory.at(1), &memory.filled(1)), 0, Errno::NOENT);

        // Something else mapped over it.
        let at = memory.at(3);
        let thread = std::thread::spawn(move || {
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            // SAFETY: over a page of this test.
            unsafe { mmap_anonymous(at as *mut _, bytes, READ_WRITE, flags).unwrap() };
        });
        assert_unmapped(uffd, (memory.at(3), memory.at(4)));
        thread.join().unwrap();
        assert_eq!(memory.touch(3), 0, "plain memory");

        // Made smaller, where the kernel can: of hugetlbfs too.
        let at = memory.at(4);
        memory.gone(5, 1);
        let thread = std::thread::spawn(move || {
            // SAFETY: the last two pages of this test.
            unsafe { mremap(at as *mut _, 2 * bytes, bytes, MremapFlags::empty()).map(drop) }
        });
        assert_unmapped(uffd, (memory.at(5), memory.at(6)));
        thread.join().unwrap().unwrap_or_else(|errno| panic!("{kind:?}: {errno}"));
        // What is left is served as before.
        assert_done(uffd.copy(memory.at(4), &memory.filled(4)), bytes);
        memory.assert_content(4, 4);
        memory.assert_content(0, 1);
        target.assert_silent();
    });
}

/// What is told is what the call was about, not what was registered of it: one event, over memory that
/// was never registered, over holes, and over what lies beside.
#[test]
fn the_event_tells_the_range_of_the_call() {
    if !need("EVENT_UNMAP") {
        return;
    }
    let target = Registered::anonymous(5, Features::EVENT_UNMAP);
    let (uffd, memory) = (&target.uffd, &target.memory);
    for at in [0, 2, 4] {
        uffd.unregister(memory.at(at), memory.pages(1)).unwrap();
    }
    let thread = memory.unmapping(0, 5);
    assert_unmapped(uffd, (memory.at(0), memory.at(5)));
    thread.join().unwrap();
    target.assert_silent();
}

#[test]
fn without_the_event_only_errors_tell() {
    on_each(Kind::ALL, 2, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        memory.unmapping(1, 1).join().unwrap();
        target.assert_silent();
        let outcome = uffd.copy(memory.at(1), &memory.filled(1));
        assert_stopped(outcome, 0, Errno::NOENT);
    });
}
