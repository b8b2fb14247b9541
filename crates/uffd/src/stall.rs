//! Noticing that a lock is never given back, because its holder waits for a page that only we could
//! bring: Python's global lock, when a handler is a thread of the interpreter that touches its memory.
//!
//! Nobody can be asked who holds a lock. But `/proc/self/task/*/syscall` says of each thread that it
//! runs, in which system call it waits, or that it waits in none: and that is what a thread does in a
//! page fault. So [`Waiting`] says since when a handler waits for the lock, and if that lasts while one
//! and the same thread stays in a fault, somebody waits for a page of that very userfaultfd, and no
//! thread runs that could give the lock back, it is no delay.
//!
//! The thread in the fault then gets SIGBUS, which ends the process: it could only hang. (Python's
//! `faulthandler` prints the line that touched the page.) Whoever catches SIGBUS meets SIGABRT next.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::thread::Thread;
use std::time::{Duration, Instant};

use crate::threads;

/// How long a lock is waited for before anybody looks who could have it.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often is looked then.
const LOOK: Duration = Duration::from_millis(250);
/// How often in a row the same must be seen.
const LOOKS: u32 = 8;
/// Threads of which it is known that they wait; others are not noticed.
const SLOTS: usize = 32;

/// Since when threads wait: nanoseconds on our clock; 0: nobody. No lock, as a process may fork at any
/// time, and its child must not find one taken.
static SINCE: [AtomicU64; SLOTS] = [const { AtomicU64::new(0) }; SLOTS];
/// The descriptors that they handle.
static HANDLED: [AtomicI32; SLOTS] = [const { AtomicI32::new(-1) }; SLOTS];
static PARKED: AtomicBool = AtomicBool::new(false);
static WATCH: OnceLock<Option<Thread>> = OnceLock::new();

/// A handler waits for a lock, until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Waiting(Option<usize>);

impl Waiting {
    /// The handler of a userfaultfd does, from now on.
    pub fn now(handled: impl AsFd) -> Waiting {
        let Some(watch) = WATCH.get_or_init(start) else { return Waiting(None) };
        let now = nanoseconds();
        let free = |slot: &AtomicU64| {
            slot.compare_exchange(0, now, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        };
        let slot = SINCE.iter().position(free);
        if let Some(slot) = slot {
            HANDLED[slot].store(handled.as_fd().as_raw_fd(), Ordering::SeqCst);
        }
        if PARKED.swap(false, Ordering::SeqCst) {
            watch.unpark();
        }
        Waiting(slot)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            SINCE[slot].store(0, Ordering::SeqCst);
        }
    }
}

fn nanoseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + 1
}

fn start() -> Option<Thread> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    threads::spawn("uffd-stall", move || {
        let _ = tell.send(std::thread::current());
        watch();
    })
    .ok()?;
    told.recv().ok()
}

fn watch() {
    // The thread in a fault, how often it was seen there, and whether it was told.
    let mut seen = (0, 0, false);
    loop {
        let oldest =
            SINCE.iter().map(|slot| slot.load(Ordering::SeqCst)).filter(|at| *at > 0).min();
        let Some(oldest) = oldest else {
            seen = (0, 0, false);
            PARKED.store(true, Ordering::SeqCst);
            if SINCE.iter().all(|slot| slot.load(Ordering::SeqCst) == 0) {
                std::thread::park();
            }
            PARKED.store(false, Ordering::SeqCst);
            continue;
        };
        let waited = Duration::from_nanos(nanoseconds().saturating_sub(oldest));
        if waited < PATIENCE {
            std::thread::sleep(PATIENCE - waited);
            continue;
        }
        // Those who wait for pages of others are theirs, however long that takes.
        let fault = if ours_are_waited_for() { in_a_fault() } else { None };
        seen = match fault {
            Some(thread) if thread == seen.0 => (thread, seen.1 + 1, seen.2),
            Some(thread) => (thread, 1, false),
            None => (0, 0, false),
        };
        if seen.1 >= LOOKS {
            end(seen.0, if seen.2 { libc::SIGABRT } else { libc::SIGBUS });
            seen = (seen.0, 0, true);
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether somebody waits for a page of a userfaultfd whose handler waits for long.
fn ours_are_waited_for() -> bool {
    let long = |slot: &AtomicU64| match slot.load(Ordering::SeqCst) {
        0 => false,
        since => Duration::from_nanos(nanoseconds().saturating_sub(since)) >= PATIENCE,
    };
    let handled = SINCE.iter().zip(&HANDLED).filter(|(since, _)| long(since));
    handled.map(|(_, handled)| handled.load(Ordering::SeqCst)).any(|descriptor| {
        // "total:\t1": threads that wait, whether their message was read or not.
        let path = format!("/proc/self/fdinfo/{descriptor}");
        let text = fs::read_to_string(path).unwrap_or_default();
        let total = text.lines().find_map(|line| line.strip_prefix("total:"));
        total.is_some_and(|total| total.trim() != "0")
    })
}

/// A thread of this process that waits in a page fault, if no other one runs.
fn in_a_fault() -> Option<i32> {
    // SAFETY: gettid takes nothing and cannot fail.
    let own = unsafe { libc::gettid() };
    let mut found = None;
    for entry in fs::read_dir("/proc/self/task").ok()?.flatten() {
        let thread: i32 = entry.file_name().to_str()?.parse().ok()?;
        if thread == own {
            continue;
        }
        let state = fs::read_to_string(entry.path().join("syscall")).unwrap_or_default();
        if state.starts_with("running") {
            return None;
        }
        if state.starts_with("-1 ") {
            found = found.max(Some(thread));
        }
    }
    found
}

fn end(thread: i32, signal: i32) {
    let _ = writeln!(
        io::stderr(),
        "pagekit: deadlock: thread {thread} waits for a page of a userfaultfd and holds a lock (the GIL) \
         that the handler of its faults waits for; ending the process (hint: handle faults in another \
         process)"
    );
    // SAFETY: tgkill takes three integers.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal) };
}
