//! SIGBUS: a signal in the thread that faults instead of a message; whoever catches it can fill the page
//! there and then.

mod common;

use common::*;
use uffd::{Errno, Event, Features, How, RegisterMode, Userfaultfd};

/// One signal of this kind.
#[track_caller]
fn assert_signal(caught: &[Caught], address: u64) {
    assert_eq!(caught, [Caught { code: NO_PAGE, address, size: 0 }]);
}

#[test]
fn a_missing_page_is_a_signal_whose_handler_fills_it() {
    if !need("SIGBUS") {
        return;
    }
    on_each(Kind::ALL, 3, |_, memory| {
        let target = Registered::over(memory, Features::SIGBUS);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let content = memory.filled(9);
        let fill = |caught: &Caught| {
            let start = caught.address & !(memory.page as u64 - 1);
            assert_done(uffd.copy(start, &content), memory.page);
        };
        // The very address, also without EXACT_ADDRESS.
        let (value, caught) = catching(&fill, || touch(memory.at(1) + 5));
        assert_eq!(value, 9);
        assert_signal(&caught, memory.at(1) + 5);
        let (value, caught) = catching(&fill, || touch(memory.at(1) + 6));
        assert_eq!((value, caught.len()), (9, 0), "it is there now");
        let ((), caught) = catching(&fill, || write(memory.at(2), 8));
        assert_signal(&caught, memory.at(2));
        assert_eq!(memory.content(2)[..2], [8, 9]);
        // The kernel's faults are errors, and nothing is ever told.
        assert_errno(touch_in_kernel(memory.at(0)), Errno::FAULT);
        assert_errno(write_in_kernel(memory.at(0), 1), Errno::FAULT);
        target.assert_silent();
        // Who does not fill it is told of the next access as well.
        assert_eq!(signal_of(memory.at(0), memory.page).map(|caught| caught.code), Ok(NO_PAGE));
    });
}

#[test]
fn a_write_to_a_protected_page_is_a_signal_too() {
    if !need("SIGBUS") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let features = Features::SIGBUS | Features::WP_HUGETLBFS_SHMEM;
        let mode = RegisterMode::MISSING | RegisterMode::WP;
        let target = Registered::with(memory, features, mode);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let content = memory.filled(9);
        let (start, len) = (memory.at(1), memory.pages(1));
        // Missing first, then protected.
        let resolve = |_: &Caught| match uffd.copy_with(start, &content, How::PROTECTED).errno {
            None => {}
            Some(errno) => {
                assert_eq!(errno, Errno::EXIST);
                uffd.unprotect(start, len).unwrap();
            }
        };
        let ((), caught) = catching(&resolve, || write(start, 7));
        assert_eq!(caught, [Caught { code: NO_PAGE, address: start, size: 0 }; 2]);
        assert_eq!(memory.content(1)[..2], [7, 9]);
        uffd.protect(start, len).unwrap();
        assert_errno(write_in_kernel(start, 6), Errno::FAULT);
        assert_eq!(touch_in_kernel(start).unwrap(), 7, "reading is allowed");
        target.assert_silent();
    });
}

#[test]
fn a_cached_page_is_a_signal_too() {
    if !need("SIGBUS") || !need("MINOR_SHMEM") || !need("MINOR_HUGETLBFS") {
        return;
    }
    on_each(Kind::SHARED, 2, |_, memory| {
        let target = Registered::with(memory, Features::SIGBUS, RegisterMode::MINOR);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let other = memory.again();
        write(other.at(1), 5);
        let (start, len) = (memory.at(1), memory.pages(1));
        let resolve = |_: &Caught| assert_done(uffd.continue_(start, len), len as usize);
        let (value, caught) = catching(&resolve, || touch(start));
        assert_eq!(value, 5);
        assert_signal(&caught, start);
        target.assert_silent();
    });
}

/// A child gets its signals by itself, though its descriptor went to the parent.
#[test]
fn a_child_gets_signals_and_its_descriptor_no_faults() {
    let _alone = alone();
    if !need("SIGBUS") || !need("EVENT_FORK") {
        return;
    }
    on_each(Kind::ALL, 1, |_, memory| {
        let target = Registered::over(memory, Features::SIGBUS | Features::EVENT_FORK);
        let address = target.memory.start;
        let thread = forking(move || i32::from(touch(address)));
        let child: Userfaultfd = match next_event(&target.uffd) {
            Event::Fork(child) => child,
            other => panic!("{other:?}"),
        };
        assert_eq!(thread.join().unwrap().end(), Err(libc::SIGBUS), "it catches none");
        assert_eq!(waiters(&child), 0);
        target.assert_silent();
    });
}
