//! Where the loop's thread runs.
//!
//! What was measured (two virtual processors, one thread that faults on single pages), and what follows:
//!
//! | where the handler is, and how it waits | µs a fault | processor's µs a fault |
//! |---|---|---|
//! | on the processor of the thread that faults | 7–8 | 7–8 |
//! | on another one, never sleeping | 18 | 22 |
//! | on another one, asleep: a halted virtual processor must be woken, twice | 55–60 | 40 |
//!
//! - So a single thread that faults all the time had better be *near*: on the same processor.
//! - To move there is not enough. The kernel wakes the thread that faulted on an idle processor, if there
//!   is one, and the one that we run on is not: the two would part with every fault. But a processor that
//!   runs nothing but `SCHED_IDLE` threads counts as idle. With that policy the thread stays; and it goes
//!   before us the moment it is woken, so that we come back when it waits for its next page: there is
//!   always one to be read, and nobody is ever woken who sleeps.
//! - With that policy we run only when nobody else wants that processor, and may lose it with any lock
//!   held. So somebody else must take us back: a *guard*, who looks every two milliseconds whether the loop
//!   still gets to do anything. If it does not, because the target computes or others need the
//!   processor, it is an ordinary thread again, and free to go elsewhere. It is the guard alone who
//!   changes what the loop's thread is, both ways, and they share no lock.
//! - The way back needs `CAP_SYS_NICE` or `RLIMIT_NICE`: tried once, with a thread made for that. Without
//!   it the loop goes near only those threads that cannot part with it, being bound to one processor.
//! - With two threads that fault at once every processor is needed by them; where the scheduler puts us is
//!   as good as anything (95 000 faults/s on two processors, against 45 000 for a handler that sleeps).
//!
//! Which thread faults is not in Firecracker's messages. It is the one that `/proc` shows waiting in
//! `handle_userfault` while its fault is read and not served.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::{gettid, sched_getaffinity, sched_setaffinity, CpuSet, Pid};

use super::target::Target;
use super::TargetId;

/// The guard looks so often. On a processor of the target's, if there is no other, that costs 20 µs.
const GUARD: Duration = Duration::from_millis(2);
/// Near a target that does not fault for so long there is no use in staying. Shorter than the guard
/// would mind.
pub(super) const QUIET: Duration = Duration::from_micros(500);
/// So many faults of one target, and of nobody else, one at a time …
const STREAK: u32 = 32;
/// … within this time make it worth while to look where they come from.
const STREAK_TIME: Duration = Duration::from_millis(5);
/// After a stay that was not worth it: so long no other. Twice as long each time.
const SHORTEST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A stay with so many faults was worth it …
const WORTH: u64 = 500;
/// … even if the guard had to end it, which is when others may have waited for two of his looks.
const WORTH_THE_WAIT: u64 = 8 * WORTH;
/// With every so many faults of a stay, look whether there are more at once.
const LOOK: u64 = 16;
/// Threads of a target that are looked at.
const MOST_THREADS: usize = 256;

/// Where the loop wishes to be, and the guard who sees to it.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// The number of the processor that the loop wishes to stay at, plus one; 0 for none.
    wish: AtomicUsize,
    /// Goes on as long as the loop does something.
    beats: AtomicU64,
    stays: AtomicU64,
    stopped: AtomicBool,
    guard: Mutex<Option<JoinHandle<()>>>,
}

impl Placement {
    /// How often the loop went to stay near a target.
    pub(super) fn stays(&self) -> u64 {
        self.stays.load(Relaxed)
    }

    /// Whether the loop stays near a target, or is about to. Who is served then goes on before us.
    pub(super) fn stays_somewhere(&self) -> bool {
        self.wish.load(Relaxed) != 0
    }

    /// Starts the guard of the calling thread. Without one nothing is done about any wish, and nothing is
    /// needed.
    fn start_guard(self: &Arc<Self>) {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() && !self.stopped.load(SeqCst) {
            let (placement, watched) = (Arc::clone(self), gettid());
            *guard = crate::thread::spawn("pk-guard", move || placement.guard(watched)).ok();
        }
    }

    fn call_guard(&self) {
        if let Some(guard) = &*self.guard.lock().unwrap_or_else(PoisonError::into_inner) {
            guard.thread().unpark();
        }
    }

    /// Ends the guard, who makes the loop's thread what it was.
    pub(super) fn stop(&self) {
        self.stopped.store(true, SeqCst);
        self.call_guard();
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(guard) = guard {
            // It has nothing to say that anybody waits for.
            let _ = guard.join();
        }
    }

    /// The guard of the thread `watched`.
    fn guard(&self, watched: Pid) {
        let mut stay: Option<Stay> = None;
        let mut beats = 0;
        while !self.stopped.load(SeqCst) {
            let wish = self.wish.load(SeqCst);
            let goes_on = match (wish.checked_sub(1), &mut stay) {
                (None, None) => {
                    std::thread::park();
                    continue;
                }
                (None, Some(_)) => false,
                (Some(processor), None) => {
                    stay = Stay::begin(watched, processor);
                    self.stays.fetch_add(u64::from(stay.is_some()), Relaxed);
                    stay.is_some()
                }
                (Some(processor), Some(stay)) if processor != stay.processor => {
                    stay.move_to(processor)
                }
                _ => self.beats.load(Relaxed) != beats,
            };
            if goes_on {
                beats = self.beats.load(Relaxed);
                std::thread::park_timeout(GUARD);
            } else {
                // Unless the loop wishes something else by now.
                let _ = self.wish.compare_exchange(wish, 0, SeqCst, SeqCst);
                stay = None;
            }
        }
    }
}

/// A thread bound to a processor, until dropped.
#[derive(Debug)]
struct Stay {
    thread: Pid,
    processor: usize,
    /// Where it may run otherwise.
    before: CpuSet,
    idle: bool,
}

impl Stay {
    fn begin(thread: Pid, processor: usize) -> Option<Stay> {
        let before = sched_getaffinity(Some(thread)).ok()?;
        let mut stay = Stay { thread, processor, before, idle: false };
        stay.move_to(processor).then_some(())?;
        // Somebody who made it something else than ordinary has reasons.
        stay.idle = may_return()
            && policy(thread) == libc::SCHED_OTHER
            && set_policy(thread, libc::SCHED_IDLE).is_ok();
        Some(stay)
    }

    /// False where the thread may not go, by its own limits or others.
    fn move_to(&mut self, processor: usize) -> bool {
        self.processor = processor;
        self.before.is_set(processor)
            && sched_setaffinity(Some(self.thread), &only(processor)).is_ok()
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if self.idle {
            // It could be done when it was tried. If not now, the loop is slow where others compute.
            let _ = set_policy(self.thread, libc::SCHED_OTHER);
        }
        // Who bound it to other processors meanwhile meant it. An error: the thread has ended.
        if sched_getaffinity(Some(self.thread)).is_ok_and(|found| found == only(self.processor)) {
            let _ = sched_setaffinity(Some(self.thread), &self.before);
        }
    }
}

/// What the loop knows of the faults that came last, and does about it.
#[derive(Debug)]
pub(super) struct Neighbour {
    placement: Arc<Placement>,
    /// The target whose faults came last, how many there were and nobody else's, and since when.
    target: TargetId,
    streak: u32,
    since: Instant,
    /// No stay before this moment.
    not_before: Instant,
    pause: Duration,
    /// The thread that faults, during a stay, and how often it did.
    thread: Option<Thread>,
    faults: u64,
}

impl Neighbour {
    pub(super) fn new(placement: Arc<Placement>) -> Neighbour {
        // Now, not when they are needed: a thread of this very process that waits for its page may hold
        // what starting a thread takes.
        may_return();
        placement.start_guard();
        let now = Instant::now();
        let (target, streak, faults, thread) = (0, 0, 0, None);
        let (since, not_before, pause) = (now, now, SHORTEST_PAUSE);
        Neighbour { placement, target, streak, since, not_before, pause, thread, faults }
    }

    /// Some faults of a target were read, and none is served yet.
    pub(super) fn faults(&mut self, target: &Target, count: usize, now: Instant) {
        self.placement.beats.fetch_add(1, Relaxed);
        if self.stays() {
            self.faults += 1;
            if count > 1 || target.id != self.target {
                self.leave(now);
            }
        } else if count > 1 || target.id != self.target || now - self.since > STREAK_TIME {
            if target.id != self.target {
                (self.not_before, self.pause) = (now, SHORTEST_PAUSE);
            }
            (self.target, self.streak, self.since) = (target.id, 0, now);
        } else {
            self.streak += 1;
            if self.streak >= STREAK && now >= self.not_before {
                self.streak = 0;
                self.approach(target, now);
            }
        }
    }

    /// Whether the loop stays near a target.
    pub(super) fn stays(&mut self) -> bool {
        let stays = self.thread.is_some() && self.placement.stays_somewhere();
        if !stays && self.thread.is_some() {
            // The guard has ended it.
            self.end(Instant::now(), WORTH_THE_WAIT);
        }
        stays
    }

    /// Whether there will be one fault to read, and no more. From time to time it says no, so that somebody
    /// looks whether that is so.
    pub(super) fn expects_one(&mut self) -> bool {
        self.stays() && self.faults % LOOK != 0
    }

    /// There is nothing to be read of the target that the loop stays with: it may be elsewhere now. Says
    /// whether so, and follows.
    pub(super) fn missed(&mut self) -> bool {
        self.placement.beats.fetch_add(1, Relaxed);
        let moved = self.thread.as_mut().and_then(Thread::moved);
        if let Some(processor) = moved {
            self.wish(processor + 1);
        }
        moved.is_some()
    }

    /// Ends a stay.
    pub(super) fn leave(&mut self, now: Instant) {
        self.end(now, WORTH);
    }

    fn end(&mut self, now: Instant, worth: u64) {
        if self.thread.take().is_some() {
            self.pause = match self.faults < worth {
                true => (self.pause * 2).min(LONGEST_PAUSE),
                false => SHORTEST_PAUSE,
            };
            self.not_before = now + self.pause;
            self.wish(0);
        }
    }

    /// Looks where the faults come from, and wishes to be there.
    fn approach(&mut self, target: &Target, now: Instant) {
        self.faults = 0;
        self.thread = target.pid().and_then(waiting_thread);
        let thread = self.thread.as_mut().filter(|thread| may_return() || thread.is_bound());
        match thread.and_then(Thread::moved) {
            Some(processor) => self.wish(processor + 1),
            None => {
                // There will be no better answer soon.
                self.thread = None;
                self.not_before = now + LONGEST_PAUSE;
            }
        }
    }

    fn wish(&self, wish: usize) {
        self.placement.wish.store(wish, SeqCst);
        self.placement.call_guard();
    }
}

/// A thread that faults.
#[derive(Debug)]
struct Thread {
    id: Pid,
    stat: File,
    processor: Option<usize>,
}

impl Thread {
    /// The processor that it is on, if that is another one than before.
    fn moved(&mut self) -> Option<usize> {
        let mut text = [0; 1024];
        let length = self.stat.read_at(&mut text, 0).ok()?;
        // Field 39; the second one is a name in brackets, which may contain anything.
        let text = String::from_utf8_lossy(&text[..length]);
        let processor = text.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()?;
        (self.processor.replace(processor) != Some(processor)).then_some(processor)
    }

    /// Whether it can run on one processor only.
    fn is_bound(&self) -> bool {
        sched_getaffinity(Some(self.id)).is_ok_and(|processors| processors.count() == 1)
    }
}

/// The one thread of a process that waits for a page. None if there are several, or if that cannot be
/// known.
fn waiting_thread(process: i32) -> Option<Thread> {
    let mut found = None;
    for entry in fs::read_dir(format!("/proc/{process}/task")).ok()?.take(MOST_THREADS) {
        let place = entry.ok()?.path();
        if fs::read(place.join("wchan")).is_ok_and(|waits_in| waits_in == b"handle_userfault")
            && found.replace(place).is_some()
        {
            return None;
        }
    }
    let place = found?;
    let id = Pid::from_raw(place.file_name()?.to_str()?.parse().ok()?)?;
    Some(Thread { id, stat: File::open(place.join("stat")).ok()?, processor: None })
}

fn only(processor: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(processor);
    set
}

/// Whether a thread of ours that lets everybody go first can be made an ordinary one again.
fn may_return() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    let there_and_back = || {
        let thread = gettid();
        set_policy(thread, libc::SCHED_IDLE)?;
        set_policy(thread, libc::SCHED_OTHER)
    };
    *ANSWER.get_or_init(|| {
        let trial = std::thread::Builder::new().spawn(there_and_back);
        trial.is_ok_and(|trial| matches!(trial.join(), Ok(Ok(()))))
    })
}

fn policy(thread: Pid) -> i32 {
    // SAFETY: takes a number and answers one.
    unsafe { libc::sched_getscheduler(thread.as_raw_nonzero().get()) }
}

fn set_policy(thread: Pid, policy: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters are read during the call, and say nothing for these policies.
    match unsafe { libc::sched_setscheduler(thread.as_raw_nonzero().get(), policy, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
