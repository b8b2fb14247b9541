//! Many threads at once: memory bounces between two mappings while threads count in its pages, others
//! read faults, and others copy ahead. A page that were visible before all of it was there would lose
//! counts.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::*;
use rustix::fs::{fallocate, FallocateFlags};
use rustix::mm::Advice;
use uffd::{Cause, Errno, Event, Features, How, MessageBuffer, RegisterMode, Userfaultfd};

const COUNTING: usize = 3;
const READING: usize = 2;
const COPYING: usize = 2;
const BOUNCES: usize = 3;

/// The counter in the last bytes of a page, which a copy reaches last.
fn counter(memory: &Mapping, at: usize) -> &AtomicU64 {
    let address = memory.at(at) + memory.pages(1) - 8;
    // SAFETY: aligned, mapped as long as the memory is borrowed, and only used as an atomic.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}

struct Bounce<'a> {
    uffd: &'a Userfaultfd,
    from: &'a Mapping,
    to: &'a Mapping,
    protect: bool,
}

/// Lets all others go when a thread panics: else they would wait for it, and the test would hang.
struct OnPanic<'a>(&'a Bounce<'a>, [&'a AtomicBool; 2]);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.1.iter().for_each(|flag| flag.store(true, Ordering::Release));
            let _ = self.0.uffd.unregister(self.0.to.start, self.0.to.bytes());
        }
    }
}

impl Bounce<'_> {
    /// Copies a page, unless somebody did before.
    fn copy(&self, at: usize) {
        let how = if self.protect { How::PROTECTED } else { How::NONE };
        // SAFETY: a page that nobody writes to while it is on this side.
        let copied = unsafe {
            let source = self.from.at(at) as *const u8;
            self.uffd.copy_from(self.to.at(at), source, self.to.page, how)
        };
        match copied.errno {
            None => assert_eq!(copied.done, self.to.page),
            Some(Errno::EXIST) => self.uffd.wake(self.to.at(at), self.to.pages(1)).unwrap(),
            Some(errno) => panic!("{errno}"),
        }
    }

    fn read(&self, stop: &AtomicBool) {
        let mut buffer = MessageBuffer::new(2);
        while !stop.load(Ordering::Acquire) {
            let _ = self.uffd.wait(Some(Duration::from_millis(5))).unwrap();
            for event in self.uffd.read_events(&mut buffer).unwrap() {
                let Event::Fault { address, flags, .. } = event else { panic!("{event:?}") };
                match Cause::of(flags) {
                    Cause::WriteProtected => {
                        self.uffd.unprotect(address, self.to.pages(1)).unwrap();
                    }
                    Cause::Missing => {
                        self.copy((address - self.to.start) as usize / self.to.page);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

fn bounce(kind: Kind, pages: usize, protect: bool) {
    let (Some(first), Some(second)) = (kind.map(pages), kind.map(pages)) else { return };
    println!("on {kind:?}, protected: {protect}");
    let expected: Vec<AtomicU64> = (0..pages).map(|_| AtomicU64::new(1)).collect();
    (0..pages).for_each(|at| counter(&first, at).store(1, Ordering::Relaxed));
    let mut sides = [&first, &second];
    for round in 0..BOUNCES {
        let [from, to] = sides;
        let uffd = negotiated(if protect { Features::WP_HUGETLBFS_SHMEM } else { Features::NONE });
        let mode = if protect { RegisterMode::WP } else { RegisterMode::NONE };
        uffd.register(to.start, to.bytes(), RegisterMode::MISSING | mode).unwrap();
        let bounce = Bounce { uffd: &uffd, from, to, protect };
        let (copied, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let (bounce, copied, stop) = (&bounce, &copied, &stop);
            let flags = [copied, stop];
            let read = move || {
                let _others = OnPanic(bounce, flags);
                bounce.read(stop);
            };
            let readers: Vec<_> = (0..READING).map(|_| scope.spawn(read)).collect();
            let counters: Vec<_> = (0..COUNTING)
                .map(|lane| {
                    let expected = &expected;
                    scope.spawn(move || {
                        // Different ways through the pages, the same in some rounds: then they race.
                        let step = if round % 2 == 0 { 1 } else { 2 * lane + 1 };
                        let mut at = lane * pages / COUNTING;
                        let mut counted = 0;
                        while counted < pages || !copied.load(Ordering::Acquire) {
                            counter(to, at).fetch_add(1, Ordering::AcqRel);
                            expected[at].fetch_add(1, Ordering::AcqRel);
                            at = (at + step) % pages;
                            counted += 1;
                            if counted % pages == 0 {
                                std::thread::yield_now();
                            }
                        }
                    })
                })
                .collect();
            let copiers: Vec<_> = (0..COPYING)
                .map(|lane| {
                    scope.spawn(move || {
                        let _others = OnPanic(bounce, flags);
                        for at in (lane..pages).step_by(COPYING) {
                            bounce.copy(at);
                            if bounce.protect && at % 3 == 0 {
                                let page = bounce.to.pages(1);
                                bounce.uffd.protect(bounce.to.at(at), page).unwrap();
                            }
                        }
                    })
                })
                .collect();
            copiers.into_iter().for_each(|thread| thread.join().unwrap());
            copied.store(true, Ordering::Release);
            counters.into_iter().for_each(|thread| thread.join().unwrap());
            stop.store(true, Ordering::Release);
            readers.into_iter().for_each(|thread| thread.join().unwrap());
        });
        assert_eq!(waiters(&uffd), 0);
        drop(uffd);
        for (at, expected) in expected.iter().enumerate() {
            let (found, expected) =
                (counter(to, at).load(Ordering::Acquire), expected.load(Ordering::Acquire));
            assert_eq!(found, expected, "page {at} of round {round}");
        }
        // The other side is empty when it is bounced back: a page that the file had would not be missing.
        from.advise(Advice::LinuxDontNeed);
        if let Some(file) = &from.file {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, hole, 0, from.bytes()).unwrap();
        }
        sides.swap(0, 1);
    }
}

#[test]
fn memory_bounces_while_threads_count_in_it() {
    let _alone = alone();
    for kind in Kind::ALL {
        bounce(*kind, if kind.is_huge() { 4 } else { 24 }, false);
    }
}

#[test]
fn and_while_it_is_protected() {
    if !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    let _alone = alone();
    for kind in Kind::ALL {
        bounce(*kind, if kind.is_huge() { 4 } else { 24 }, true);
    }
}

/// Many threads wait for one page: one resolve wakes them all, and their faults are told one by one.
#[test]
fn many_threads_wait_for_one_page() {
    on_each(Kind::ALL, 1, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let threads: Vec<_> = (0..16).map(|_| toucher(target.memory.start)).collect();
        until("all wait", || waiters(&target.uffd) == 16);
        assert_done(
            target.uffd.copy(target.memory.start, &target.memory.filled(3)),
            target.memory.page,
        );
        assert_eq!(waiters(&target.uffd), 0);
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), 3));
        target.assert_silent();
    });
}

/// Closed in the middle of it: nobody waits for ever.
#[test]
fn closing_under_load() {
    const PAGES: usize = 64;
    for _ in 0..20 {
        let Registered { uffd, memory } = Registered::anonymous(PAGES, Features::NONE);
        let start = memory.start;
        let threads: Vec<_> = (0..4)
            .map(|lane| {
                std::thread::spawn(move || {
                    (0..PAGES)
                        .map(|at| touch(start + ((at + lane * 16) % PAGES * PAGE) as u64))
                        .all(|value| value <= 1)
                })
            })
            .collect();
        for at in 0..PAGES / 2 {
            let copied = uffd.copy(memory.at(at), &page(1));
            assert!(matches!(copied.errno, None | Some(Errno::EXIST)));
        }
        drop(uffd);
        threads.into_iter().for_each(|thread| assert!(thread.join().unwrap()));
    }
}
