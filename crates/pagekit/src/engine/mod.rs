//! The engine: one loop that reads the events of all targets, and threads that wait for sources.
//!
//! ```text
//!   userfaultfd ─► event loop ──► region map ──► template ── absent ──► fetch now, or on a worker
//!                   │  ▲             │               │                        │
//!                   │  └ deferred ◄──┤ removed: zero │ present                │ waiters
//!                   │     (refused)  │               ▼                        │
//!                   └─ apply events  └──────────► backend ◄───────────────────┘
//! ```
//!
//! The loop never waits for a source. A page that is in the template, or whose source answers at
//! once, is resolved on the loop's own thread: a second thread would cost a wake-up of tens of
//! microseconds. Everything else goes to [`workers`], and whoever ends a fetch serves its waiters.

mod ahead;
pub mod broadcast;
pub mod deputy;
mod event_loop;
mod fill;
mod huge;
mod locality;
mod outcome;
mod placement;
pub mod region;
mod target;
mod workers;

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{eventfd, EventfdFlags};

use crate::error::{Error, Result};
use crate::page::Run;
use crate::template::Fetch;
pub use ahead::Ahead;
use deputy::Deputy;
pub use outcome::{Histogram, Outcome, Outcomes};
use placement::Placement;
pub(crate) use target::kill;
use target::Fault;
pub use target::{NewTarget, Owner, Target, TargetId};
use workers::Workers;

/// What a server counts, for people and machines.
#[derive(Debug, serde::Serialize)]
pub struct Statistics {
    /// Faults read from targets; each ends in one outcome.
    pub demand_faults: u64,
    /// How they ended.
    pub outcomes: Arc<Outcomes>,
    /// The targets that live.
    pub targets: Vec<TargetStatistics>,
    /// Targets that there have been.
    pub targets_ever: u64,
    /// Pages put into targets ahead of demand.
    pub ahead_pages: u64,
    /// How often the loop's thread went to stay on the processor of a target that faults all the time.
    pub stays: u64,
    /// Those of them that a sibling had demanded.
    pub broadcast_pages: u64,
    /// The last things that went wrong, oldest first.
    pub reports: Vec<String>,
}

/// What is counted of one target.
#[derive(Debug, serde::Serialize)]
pub struct TargetStatistics {
    /// Its number.
    pub id: TargetId,
    /// Its parent target.
    pub parent: Option<TargetId>,
    /// Its process, where known.
    pub pid: Option<i32>,
    /// Its backend.
    pub backend: &'static str,
    /// Bytes of its own pages.
    pub page_size: u64,
    /// Faults read from it.
    pub faults: u64,
    /// Pages put into it ahead of demand.
    pub ahead_pages: u64,
}

/// A piece of a target's memory: address, bytes, and the first page of the template, or none.
pub type Piece = (u64, u64, Option<u64>);

/// The engine. Dropping it stops it.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    loop_thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the loop, the workers and the handle share.
#[derive(Debug)]
pub(crate) struct Shared {
    epoll: OwnedFd,
    /// Wakes the loop.
    poke: OwnedFd,
    targets: Mutex<HashMap<TargetId, Arc<Target>>>,
    fewer_targets: Condvar,
    ever: AtomicU64,
    faults: AtomicU64,
    ahead: AtomicU64,
    /// Told of every target that a client brings.
    greeter: Mutex<Option<Greeter>>,
    /// What is put into siblings: a [`broadcast::Policy`].
    broadcast: AtomicU8,
    /// Pages that came so.
    spread: AtomicU64,
    /// The second handler, if there is one.
    deputy: RwLock<Option<Arc<dyn Deputy>>>,
    /// Whether a target may have deferred faults, so that the loop need not look for them in vain.
    deferred: AtomicBool,
    outcomes: Arc<Outcomes>,
    /// Whether reports go to stderr too.
    speaks: bool,
    reports: Mutex<Vec<String>>,
    workers: Workers,
    placement: Arc<Placement>,
    stopped: AtomicBool,
}

/// What [`Engine::on_target`] was given.
type Greet = dyn Fn(&Arc<Target>) + Send + Sync;

#[derive(Clone)]
struct Greeter(Arc<Greet>);

impl std::fmt::Debug for Greeter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Greeter")
    }
}

/// How many reports are kept.
const REPORTS: usize = 20;

/// What an epoll event is about, in 64 bits: a target's number, and which of its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Poke,
    Events(TargetId),
    Exit(TargetId),
}

impl Token {
    fn encode(self) -> EventData {
        EventData::new_u64(match self {
            Token::Poke => 0,
            Token::Events(id) => id << 1,
            Token::Exit(id) => id << 1 | 1,
        })
    }

    fn decode(data: EventData) -> Token {
        match (data.u64() >> 1, data.u64() & 1) {
            (0, _) => Token::Poke,
            (id, 0) => Token::Events(id),
            (id, _) => Token::Exit(id),
        }
    }
}

impl Engine {
    /// Starts the loop and the workers.
    ///
    /// # Errors
    /// `Kernel` when threads or descriptors run out.
    pub fn start() -> Result<Engine> {
        Engine::start_and(true)
    }

    /// Starts one that keeps what it has to say for the statistics. Where the targets are memory of
    /// this process it must not write: a thread that writes their memory into a pipe holds the pipe's
    /// lock while it waits for a page, and nobody else may wait for that lock who has to serve it.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_quiet() -> Result<Engine> {
        Engine::start_and(false)
    }

    fn start_and(speaks: bool) -> Result<Engine> {
        let failed = |error: io::Error| Error::kernel("cannot start the engine", error);
        let create = || -> io::Result<Shared> {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let poke = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            epoll::add(&epoll, &poke, Token::Poke.encode(), EventFlags::IN)?;
            Ok(Shared {
                epoll,
                poke,
                targets: Mutex::default(),
                fewer_targets: Condvar::new(),
                ever: AtomicU64::new(0),
                faults: AtomicU64::new(0),
                ahead: AtomicU64::new(0),
                greeter: Mutex::default(),
                broadcast: AtomicU8::new(0),
                spread: AtomicU64::new(0),
                deputy: RwLock::default(),
                deferred: AtomicBool::new(false),
                outcomes: Arc::default(),
                speaks,
                reports: Mutex::default(),
                workers: Workers::start()?,
                placement: Arc::default(),
                stopped: AtomicBool::new(false),
            })
        };
        let shared = Arc::new(create().map_err(failed)?);
        let for_loop = Arc::clone(&shared);
        let loop_thread =
            crate::thread::spawn("pk-loop", move || for_loop.keep_looping()).map_err(failed)?;
        Ok(Engine { shared, loop_thread: Mutex::new(Some(loop_thread)) })
    }

    /// Serves a target from now on, until its process or address space ends.
    ///
    /// # Errors
    /// `Kernel` when its descriptors cannot be watched.
    pub fn add(&self, new: NewTarget) -> Result<Arc<Target>> {
        let target = self
            .shared
            .add(self.shared.number(), None, new)
            .map_err(|error| Error::kernel("cannot watch a target's descriptors", error))?;
        let greeter = self.shared.greeter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(Greeter(greet)) = greeter {
            greet(&target);
        }
        Ok(target)
    }

    /// Calls `greet`, and nothing that was given before, for every target that a client brings from
    /// now on, when it is served already. (Forked children have what their parents have, and are not
    /// greeted.) On the client's thread: it must not wait.
    pub fn on_target(&self, greet: impl Fn(&Arc<Target>) + Send + Sync + 'static) {
        *self.shared.greeter.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Greeter(Arc::new(greet)));
    }

    /// The targets that live, by number.
    pub fn living(&self) -> Vec<Arc<Target>> {
        let mut targets: Vec<_> = self.shared.targets().values().cloned().collect();
        targets.sort_by_key(|target| target.id);
        targets
    }

    /// Puts what of `run` is in the template (or zero by its map) into a target, wherever it belongs
    /// and is missing, as far as the target has not given it back; see [`Target::can_be_filled`]. Works
    /// on the caller's thread, lets demand go first, and waits for no source. In huge pages the run is
    /// rounded outwards.
    pub fn install_ahead(&self, target: &Target, run: Run) -> Ahead {
        target.install_ahead(&self.shared, run)
    }

    /// Ends the process of a target that nobody will serve any more, and says why. Never this process.
    pub fn kill(&self, target: &Target, why: &str) {
        let process = target.pid().map_or("pid unknown".to_owned(), |pid| format!("pid {pid}"));
        let outcome = match target.kill_process() {
            Ok(true) => Some("was killed".to_owned()),
            Ok(false) => None,
            Err(error) => Some(format!("could not be killed ({error})")),
        };
        if let Some(outcome) = outcome {
            self.report(&format!("target {} ({process}) {outcome}: {why}", target.id));
        }
        target.end(&self.shared);
    }

    /// A living target.
    pub fn target(&self, id: TargetId) -> Option<Arc<Target>> {
        self.shared.targets().get(&id).cloned()
    }

    /// Tells which process a forked child is; false if the target is gone or known already.
    pub fn identify(&self, id: TargetId, pid: i32, pidfd: OwnedFd) -> bool {
        let Some(target) = self.target(id) else { return false };
        target.identify(pid, pidfd) && self.shared.watch_exit(&target).is_ok()
    }

    /// Attends to a fetch on a worker, for clients that bring pages by another way than a fault.
    pub fn submit(&self, fetch: Fetch) {
        self.shared.workers.submit(fetch);
    }

    /// Says on stderr what went wrong with a client, and keeps it for the statistics.
    pub fn report(&self, message: &str) {
        self.shared.report(message);
    }

    /// Stops serving a target whose process is known to be gone.
    pub fn forget(&self, id: TargetId) {
        self.shared.forget(id);
    }

    /// Stops serving memory of this process that nobody touches any more. When this returns, nothing
    /// will be put there: it can be unmapped, and its addresses be used again.
    pub fn release(&self, target: &Target) {
        target.release();
        self.shared.forget(target.id);
    }

    /// How many targets live.
    pub fn targets(&self) -> usize {
        self.shared.targets().len()
    }

    /// What belongs where in a living target, as far as its events were read: address, bytes, and the
    /// first page of the template, or none for zeros. Of one that gave single pages back here and
    /// there that may be long.
    pub fn regions(&self, id: TargetId) -> Option<Vec<Piece>> {
        Some(self.target(id)?.regions().pieces().collect())
    }

    /// Waits until no target lives, or the time is over; says whether none does.
    pub fn wait_idle(&self, time: Duration) -> bool {
        let targets = self.shared.targets();
        let (targets, _) = self
            .shared
            .fewer_targets
            .wait_timeout_while(targets, time, |targets| !targets.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        targets.is_empty()
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let mut targets: Vec<_> = self
            .shared
            .targets()
            .values()
            .map(|target| TargetStatistics {
                id: target.id,
                parent: target.parent,
                pid: target.pid(),
                backend: target.backend.name(),
                page_size: target.page_size,
                faults: target.faults.load(Relaxed),
                ahead_pages: target.ahead.load(Relaxed),
            })
            .collect();
        targets.sort_by_key(|target| target.id);
        Statistics {
            demand_faults: self.shared.faults.load(Relaxed),
            outcomes: Arc::clone(&self.shared.outcomes),
            targets,
            targets_ever: self.shared.ever.load(Relaxed),
            ahead_pages: self.shared.ahead.load(Relaxed),
            stays: self.shared.placement.stays(),
            broadcast_pages: self.shared.spread.load(Relaxed),
            reports: self.shared.reports.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Ends the threads. Targets that still live are not served any more; their clients must have
    /// been told before. (Those of which nobody knows the process, children that were announced by an
    /// event alone, could not be: what they miss raises SIGBUS.)
    pub fn stop(&self) {
        self.shared.stopped.store(true, Relaxed);
        self.shared.poke();
        let thread = self.loop_thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The loop reports its own panics; there is nothing left to learn from it.
            let _ = thread.join();
        }
        self.shared.placement.stop();
        self.shared.workers.stop();
        let targets = std::mem::take(&mut *self.shared.targets());
        let unknown = |target: &&Arc<Target>| target.parent.is_some() && target.pidfd().is_none();
        for target in targets.values().filter(unknown) {
            if !target.strand() {
                self.shared.report(&format!(
                    "target {} (pid unknown) waits for ever for pages that it misses: this kernel \
                     cannot poison them",
                    target.id
                ));
            }
        }
        drop(targets);
        self.shared.fewer_targets.notify_all();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// Runs the loop. A panic in it is a bug, but must not leave anybody waiting: faults that were
    /// read and not served are delivered again when their regions are woken.
    fn keep_looping(self: &Arc<Self>) {
        while catch_unwind(AssertUnwindSafe(|| event_loop::run(self))).is_err() {
            self.report("a bug ended the event loop; it starts again (please report this)");
            for target in self.targets().values() {
                target.wake_all();
            }
        }
    }

    /// The number of the next target.
    fn number(&self) -> TargetId {
        self.ever.fetch_add(1, Relaxed) + 1
    }

    fn add(
        &self,
        id: TargetId,
        parent: Option<TargetId>,
        new: NewTarget,
    ) -> io::Result<Arc<Target>> {
        let target = Arc::new(Target::new(id, parent, new));
        // Listed before it is watched: an event of an unknown target would be lost.
        self.targets().insert(id, Arc::clone(&target));
        if let Some(deputy) = self.deputy() {
            deputy.joined(&target, &target.regions());
        }
        let watch = || -> io::Result<()> {
            epoll::add(&self.epoll, &target.uffd, Token::Events(id).encode(), EventFlags::IN)?;
            self.watch_exit(&target)
        };
        if let Err(error) = watch() {
            self.forget(id);
            return Err(error);
        }
        Ok(target)
    }

    fn watch_exit(&self, target: &Target) -> io::Result<()> {
        if let Some(pidfd) = target.pidfd() {
            epoll::add(&self.epoll, pidfd, Token::Exit(target.id).encode(), EventFlags::IN)?;
        }
        Ok(())
    }

    fn targets(&self) -> MutexGuard<'_, HashMap<TargetId, Arc<Target>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, id: TargetId) {
        let Some(target) = self.targets().remove(&id) else { return };
        // Fails only if it was never added.
        let _ = epoll::delete(&self.epoll, target.uffd.as_fd());
        if let Some(pidfd) = target.pidfd() {
            let _ = epoll::delete(&self.epoll, pidfd);
        }
        target.abandon(self);
        if let Some(deputy) = self.deputy() {
            deputy.left(id);
        }
        self.fewer_targets.notify_all();
    }

    fn count(&self, outcome: Outcome, fault: &Fault) {
        let time = fault.age.unwrap_or_else(|| fault.born.elapsed());
        self.outcomes.count(outcome, time);
        // What was done for one of them woke the others.
        (0..fault.joined).for_each(|_| self.outcomes.count(Outcome::Woken, time));
    }

    /// Wakes the loop, so that it looks at the deferred faults again.
    fn poke(&self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.poke, &1u64.to_ne_bytes());
    }

    /// Says on stderr what went wrong, unless it is quiet, and keeps it for the statistics.
    fn report(&self, message: &str) {
        if self.speaks {
            // Not eprintln!, which panics where nobody reads: no thread of ours ends for that.
            let _ = writeln!(io::stderr(), "pagekit: {message}");
        }
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        if reports.len() == REPORTS {
            reports.remove(0);
        }
        reports.push(message.to_owned());
    }
}

/// The moment after `time`, for comparing with deadlines.
fn after(time: Duration) -> Instant {
    Instant::now() + time
}
