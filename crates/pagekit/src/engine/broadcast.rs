//! Broadcast: what one target demanded is put into its siblings, too.
//!
//! Siblings that *wait* for a page need no broadcast: they wait for one fetch, and whoever ends it serves
//! them all, one after the other. This is for those that will want it a little later. `share` has no use
//! for it: there a page in the template's file is in every target.
//!
//! What was measured (`benchmarks/broadcast.py`), and what follows:
//! BROADCAST-FINDINGS
//! - It is work that nobody waits for: a thread of its own does it, nicer than those that serve, and what
//!   comes while it works is done together in the next pass.
//! - While demands are recorded nothing comes along with anything, so nothing is broadcast.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use super::target::Target;
use super::{Engine, Shared};
use crate::backend::Resolution;
use crate::error::Error;
use crate::page::{union, Run, PAGE};
use crate::template::Template;

/// Which pages that one target demanded are put into its siblings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// None.
    #[default]
    Off,
    /// Those of the working set that is replayed, critical or not.
    WorkingSet,
    /// All.
    All,
}

impl std::str::FromStr for Policy {
    type Err = Error;
    fn from_str(name: &str) -> Result<Policy, Error> {
        match name {
            "off" => Ok(Policy::Off),
            "working-set" => Ok(Policy::WorkingSet),
            "all" => Ok(Policy::All),
            _ => Err(Error::usage(
                format!("{name:?} is no way to broadcast"),
                "give off, working-set or all",
            )),
        }
    }
}

/// What is to be put into all targets of a template.
#[derive(Debug)]
pub(super) struct Broadcast {
    policy: Policy,
    queue: Mutex<Vec<(Arc<Template>, Run)>>,
    changed: Condvar,
    stopped: AtomicBool,
    pages: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Puts pages that one target demands into its siblings from now on, as far as `policy` says so. To be
    /// called once, before there are targets.
    ///
    /// # Errors
    /// `Kernel` when threads run out.
    pub fn broadcast(&self, policy: Policy) -> Result<(), Error> {
        if policy == Policy::Off {
            return Ok(());
        }
        let broadcast = Arc::new(Broadcast {
            policy,
            queue: Mutex::default(),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            thread: Mutex::default(),
        });
        let (working, shared) = (Arc::clone(&broadcast), Arc::downgrade(&self.shared));
        let thread = crate::thread::spawn("pk-broadcast", move || working.work(&shared))
            .map_err(|error| Error::kernel("cannot start a thread for the broadcast", error))?;
        *broadcast.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        // Whoever was first stays; the other one ends.
        self.shared.broadcast.set(broadcast).map_err(|other| {
            other.stop();
            Error::usage("there is a broadcast already", "")
        })
    }
}

impl Shared {
    /// Pages that came by broadcast.
    pub(super) fn broadcast_pages(&self) -> u64 {
        self.broadcast.get().map_or(0, |broadcast| broadcast.pages.load(Relaxed))
    }
}

impl Target {
    /// A fault of this target was resolved, and these pages were put there with it: its siblings may want
    /// them, too.
    pub(super) fn spread(&self, shared: &Shared, resolution: Resolution, run: Run) {
        let Some(broadcast) = shared.broadcast.get() else { return };
        let filled = matches!(resolution, Resolution::Copied | Resolution::Zeroed);
        if filled && !self.template.recording() && shared.targets().len() > 1 {
            broadcast.add(&self.template, run);
        }
    }
}

impl Broadcast {
    fn add(&self, template: &Arc<Template>, run: Run) {
        let mut queue = self.lock();
        queue.push((Arc::clone(template), run));
        drop(queue);
        self.changed.notify_one();
    }

    fn work(&self, shared: &Weak<Shared>) {
        crate::thread::be_nice();
        while let Some(batch) = self.next() {
            let Some(shared) = shared.upgrade() else { return };
            let mut rest = batch;
            while let Some((template, _)) = rest.first() {
                let template = Arc::clone(template);
                let (these, others): (Vec<_>, Vec<_>) =
                    rest.into_iter().partition(|(of, _)| Arc::ptr_eq(of, &template));
                rest = others;
                self.put(&shared, &template, &self.wanted(&template, these));
            }
        }
    }

    /// What came since it was last asked; none at the end.
    fn next(&self) -> Option<Vec<(Arc<Template>, Run)>> {
        let waiting = |queue: &mut Vec<_>| queue.is_empty() && !self.stopped.load(Relaxed);
        let mut queue =
            self.changed.wait_while(self.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
        (!self.stopped.load(Relaxed)).then(|| std::mem::take(&mut *queue))
    }

    fn wanted(&self, template: &Template, batch: Vec<(Arc<Template>, Run)>) -> Vec<Run> {
        let runs = union(batch.into_iter().map(|(_, run)| run));
        match (self.policy, template.current_replay()) {
            (Policy::All, _) => runs,
            (Policy::WorkingSet, Some(replay)) => replay.of_its_set(&runs),
            (Policy::WorkingSet | Policy::Off, _) => Vec::new(),
        }
    }

    fn put(&self, shared: &Shared, template: &Arc<Template>, runs: &[Run]) {
        if runs.is_empty() {
            return;
        }
        let targets: Vec<_> = shared.targets().values().cloned().collect();
        let of_it = |target: &&Arc<Target>| {
            // (One of 2 MiB costs too much for a guess.)
            let fits = target.can_be_filled() && target.page_size() == PAGE;
            fits && Arc::ptr_eq(&target.template, template)
        };
        for target in targets.iter().filter(of_it) {
            for run in runs {
                // What is refused now comes by demand.
                let ahead = target.install_ahead(shared, *run);
                self.pages.fetch_add(ahead.installed, Relaxed);
            }
        }
    }

    pub(super) fn stop(&self) {
        // Under the lock, so that nobody misses it who is about to wait.
        {
            let _queue = self.lock();
            self.stopped.store(true, Relaxed);
        }
        self.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Whatever ended it, nothing depends on it.
            let _ = thread.join();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Arc<Template>, Run)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
