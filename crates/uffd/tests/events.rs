//! Events of all sorts: how they are read, what the kernel refuses while they are unread, and a child
//! that does everything at once.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use rustix::mm::Advice;
use uffd::{Cause, Errno, Event, Features, How, MessageBuffer, RegisterMode, Userfaultfd};

/// Each of them is refused while an event is unread, and works when the thread that caused it has run.
#[test]
fn nothing_is_filled_while_an_event_is_unread() {
    if !need("EVENT_REMOVE") {
        return;
    }
    let mode = RegisterMode::MISSING | RegisterMode::MINOR;
    let memory = Kind::Shmem.map(5).unwrap();
    let other = memory.again();
    write(other.at(4), 4);
    let target = Registered::with(memory, Features::EVENT_REMOVE, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let page_of = |at: usize| (memory.at(at), memory.pages(1));
    let protected = support().has("PAGEFAULT_FLAG_WP").then(|| {
        let anonymous = Mapping::anonymous(1);
        uffd.register(anonymous.start, anonymous.bytes(), RegisterMode::WP).unwrap();
        anonymous
    });
    let remover = memory.giving_back(0, 1, Advice::LinuxRemove);
    wait_readable(uffd);
    let (start, len) = page_of(1);
    assert_stopped(uffd.copy(start, &page(1)), 0, Errno::AGAIN);
    assert_stopped(uffd.zeropage(start, len), 0, Errno::AGAIN);
    assert_stopped(uffd.continue_(memory.at(4), len), 0, Errno::AGAIN);
    if support().has("POISON") {
        assert_stopped(uffd.poison(start, len), 0, Errno::AGAIN);
    }
    if support().has("MOVE") {
        assert_stopped(uffd.move_pages(start, memory.at(2), len), 0, Errno::AGAIN);
    }
    if let Some(anonymous) = &protected {
        assert_errno(uffd.protect(anonymous.start, len), Errno::AGAIN);
    }
    assert_eq!(uffd.probe_range(start, len), Some(Errno::AGAIN));
    assert!(uffd.is_alive(memory.start), "busy is alive");
    // What changes no page is not.
    uffd.wake(start, len).unwrap();
    assert!(matches!(next_event(uffd), Event::Remove { .. }));
    // And until the thread that caused it has run again.
    remover.join().unwrap();
    assert_done(uffd.copy(start, &page(1)), PAGE);
    assert_done(uffd.continue_(memory.at(4), len), PAGE);
    if let Some(anonymous) = &protected {
        uffd.protect(anonymous.start, len).unwrap();
    }
}

#[test]
fn every_event_has_that_effect() {
    let _alone = alone();
    if !need("EVENT_FORK") || !need("EVENT_REMAP") || !need("EVENT_UNMAP") {
        return;
    }
    let refused = |cause: &dyn Fn(&Registered) -> std::thread::JoinHandle<()>, events: usize| {
        let target = Registered::anonymous(3, EVENTS);
        let thread = cause(&target);
        for _ in 0..events {
            wait_readable(&target.uffd);
            let last = target.memory.at(2);
            assert_stopped(target.uffd.copy(last, &page(1)), 0, Errno::AGAIN);
            drop(next_event(&target.uffd));
        }
        thread.join().unwrap();
        assert_done(target.uffd.copy(target.memory.at(2), &page(1)), PAGE);
        target.assert_silent();
    };
    refused(&|target| target.memory.giving_back(0, 1, Advice::LinuxDontNeed), 1);
    refused(&|target| target.memory.unmapping(0, 1), 1);
    refused(
        &|_| {
            let thread = forking(|| 0);
            std::thread::spawn(move || assert_eq!(thread.join().unwrap().end(), Ok(0)))
        },
        1,
    );
}

#[test]
fn many_faults_come_in_one_read_and_the_rest_in_the_next() {
    let _alone = alone();
    let target = Registered::anonymous(8, Features::NONE);
    let threads: Vec<_> = (0..8).map(|page| toucher(target.memory.at(page))).collect();
    until("all wait", || waiters(&target.uffd) == 8);
    let mut buffer = MessageBuffer::new(5);
    let mut seen = Vec::new();
    for expected in [5, 3, 0] {
        let events = target.uffd.read_events(&mut buffer).unwrap();
        let addresses: Vec<u64> = events
            .map(|event| match event {
                Event::Fault { address, .. } => address,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(addresses.len(), expected);
        seen.extend(addresses);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..8).map(|page| target.memory.at(page)).collect::<Vec<_>>());
    assert_done(target.uffd.zeropage(target.memory.start, target.memory.bytes()), 8 * PAGE);
    threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), 0));
}

/// How a child of the test below ends.
const FINE: i32 = 0;

/// One process's memory, as its server sees it.
struct Space {
    uffd: Userfaultfd,
    start: u64,
    /// Everything was given back: it reads zero from then on.
    empty: bool,
}

/// Serves a parent and the child that it forks, until it is told to stop: how many pages were missing.
fn serve(target: &Registered, protect: bool, stop: &AtomicBool) -> usize {
    let memory = &target.memory;
    let start = memory.start;
    let mut spaces = vec![Space { uffd: target.uffd.try_clone().unwrap(), start, empty: false }];
    let mut buffer = MessageBuffer::new(16);
    let mut later: Vec<(usize, u64, u64)> = Vec::new();
    let mut missing = 0;
    while !stop.load(Ordering::Acquire) {
        let mut born = Vec::new();
        let mut faults = std::mem::take(&mut later);
        for (number, space) in spaces.iter_mut().enumerate() {
            for event in space.uffd.read_events(&mut buffer).unwrap() {
                match event {
                    Event::Fault { address, flags, .. } => faults.push((number, address, flags)),
                    Event::Fork(uffd) => {
                        born.push(Space { uffd, start: space.start, empty: space.empty });
                    }
                    Event::Remap { to, .. } => space.start = to,
                    Event::Remove { .. } => space.empty = true,
                    other => panic!("{other:?}"),
                }
            }
        }
        spaces.extend(born);
        for (number, address, flags) in faults {
            let space = &spaces[number];
            let outcome = if Cause::of(flags) == Cause::WriteProtected {
                space.uffd.unprotect(address, memory.pages(1)).err()
            } else {
                let at = (address - space.start) as usize / memory.page;
                let fill = if space.empty { 0 } else { at as u8 + 1 };
                let how = if protect { How::PROTECTED } else { How::NONE };
                let copied = space.uffd.copy_with(address, &memory.filled(fill), how);
                missing += usize::from(copied.errno.is_none());
                copied.errno.map(Into::into)
            };
            match outcome.map(|error| Errno::from_io_error(&error)) {
                None => {}
                Some(Some(Errno::AGAIN)) => later.push((number, address, flags)),
                // The page was there by then, or the process is gone.
                Some(Some(Errno::EXIST | Errno::SRCH)) => {
                    let _ = space.uffd.wake(address, memory.pages(1));
                }
                Some(other) => panic!("{other:?}"),
            }
        }
        if later.is_empty() {
            let _ = spaces.last().unwrap().uffd.wait(Some(Duration::from_millis(5)));
        } else {
            std::thread::yield_now();
        }
    }
    missing
}

/// A child touches one half of its memory, moves all of it, touches the other half, gives it back, and
/// finds zeros. Writing what was read there runs into the protection, where there is one.
fn touches_moves_and_gives_back(protect: bool) {
    const PAGES: usize = 8;
    on_each(Kind::ALL, PAGES, |kind, memory| {
        let page = memory.page;
        let bytes = memory.len;
        let room = Mapping::room(memory.bytes());
        let mut mode = RegisterMode::MISSING;
        if protect {
            mode = mode | RegisterMode::WP;
        }
        let features = Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE;
        let target = Registered::with(memory, features, mode);
        let (from, to) = (target.memory.start, room.start);
        // What gives up the pages themselves, of shared memory.
        let advice = if kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        let body = move || {
            let check = |start: u64, pages: std::ops::Range<usize>| {
                for at in pages {
                    let address = start + (at * page) as u64;
                    if touch(address) != at as u8 + 1 {
                        return 10 + at as i32;
                    }
                    write(address, at as u8 + 1);
                }
                FINE
            };
            let half = check(from, 0..PAGES / 2);
            if half != FINE {
                return half;
            }
            // SAFETY: the child's own memory; nothing else in it is touched.
            unsafe {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let moved = libc::mremap(from as *mut _, bytes, bytes, flags, to as *mut u8);
                if moved as u64 != to {
                    return 2;
                }
            }
            let half = check(to, PAGES / 2..PAGES);
            if half != FINE {
                return half;
            }
            // SAFETY: as above.
            if unsafe { libc::madvise(to as *mut _, bytes, advice) } != 0 {
                return 3;
            }
            for at in 0..PAGES {
                if touch(to + (at * page) as u64) != 0 {
                    return 30 + at as i32;
                }
            }
            FINE
        };
        let stop = AtomicBool::new(false);
        let (status, missing) = std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&target, protect, &stop));
            let status = forking(body).join().unwrap().end();
            stop.store(true, Ordering::Release);
            (status, server.join().unwrap())
        });
        assert_eq!(status, Ok(FINE));
        // Each page, and each again after it was given back.
        assert_eq!(missing, 2 * PAGES);
    });
}

#[test]
fn a_child_that_touches_moves_and_gives_back() {
    let _alone = alone();
    if need("EVENT_FORK") && need("EVENT_REMAP") && need("EVENT_REMOVE") {
        touches_moves_and_gives_back(false);
    }
}

#[test]
fn and_writes_to_protected_pages() {
    let _alone = alone();
    if need("EVENT_FORK")
        && need("EVENT_REMAP")
        && need("EVENT_REMOVE")
        && need("WP_HUGETLBFS_SHMEM")
    {
        touches_moves_and_gives_back(true);
    }
}
