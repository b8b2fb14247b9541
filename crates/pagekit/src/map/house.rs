//! What all maps of a process share: an engine, the line on which children call, and threads that fetch
//! ahead. Made with the first map, and never taken down: idle, it sleeps.

use std::collections::{HashMap, VecDeque};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::fork;
use super::table::registry;
use super::Supply;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::page::Run;
use crate::process;
use crate::template::Template;

/// Pages of one request of those that are fetched ahead: 512 KiB.
const EXTENT: u64 = 128;
/// Requests at once at most, all maps together; and so many of a source's are left to demand.
const MOST_PARALLEL: usize = 14;
const LEFT_TO_DEMAND: usize = 2;
/// A thread that had nothing to fetch for so long ends.
const IDLE: Duration = Duration::from_secs(5);

/// What all maps of a process share.
#[derive(Debug)]
pub(super) struct House {
    pub(super) process: u64,
    pub(super) engine: Engine,
    /// The end on which children call. They inherit it.
    pub(super) line: fork::Line,
    supplies: Mutex<HashMap<u64, Weak<Supply>>>,
    next: AtomicU64,
    ends: Mutex<fork::Ends>,
    ahead: Mutex<Ahead>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Ahead {
    extents: VecDeque<(Weak<Template>, Run)>,
    threads: usize,
}

impl House {
    /// The house of this process.
    ///
    /// # Errors
    /// `Kernel` when threads or descriptors run out.
    pub(super) fn of_this_process() -> Result<&'static House> {
        // First: who forks from now on waits until the registry is given back.
        fork::install();
        let mut registry = registry();
        if let Some(house) = registry.house.filter(|house| house.process == process::current()) {
            return Ok(house);
        }
        let (line, door) = fork::Line::new()?;
        // Threads use it for as long as the process lives. (A child leaves its parent's alone.)
        let house: &'static House = Box::leak(Box::new(House {
            process: process::current(),
            engine: Engine::start_quiet()?,
            line,
            supplies: Mutex::default(),
            next: AtomicU64::new(1),
            ends: Mutex::new(fork::Ends::new(door)),
            ahead: Mutex::default(),
            more: Condvar::new(),
        }));
        house.answer()?;
        registry.house = Some(house);
        Ok(house)
    }

    fn answer(&'static self) -> Result<()> {
        crate::thread::spawn("pk-children", || fork::answer(self))
            .map(drop)
            .map_err(|error| Error::kernel("cannot start a thread for children", error))
    }

    /// The ends of ties that are held for children. Held for moments only, and while a thread forks.
    pub(super) fn ends(&self) -> MutexGuard<'_, fork::Ends> {
        lock(&self.ends)
    }

    /// A number for a map.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    /// Lets children find what serves them.
    pub(super) fn list(&self, supply: &Arc<Supply>) {
        let mut supplies = lock(&self.supplies);
        supplies.retain(|_, supply| supply.strong_count() > 0);
        supplies.insert(supply.id, Arc::downgrade(supply));
    }

    /// What serves the map of this number.
    pub(super) fn supply(&self, id: u64) -> Option<Arc<Supply>> {
        lock(&self.supplies).get(&id).and_then(Weak::upgrade)
    }

    /// Fetches `run` of a template ahead, and waits for nothing.
    pub(super) fn fetch_ahead(&'static self, template: &Arc<Template>, run: Run) {
        let mut ahead = lock(&self.ahead);
        let mut start = run.start;
        while start < run.end() {
            let end = (start + EXTENT).min(run.end());
            ahead.extents.push_back((Arc::downgrade(template), Run::between(start, end)));
            start = end;
        }
        let most = template.capabilities().concurrency.saturating_sub(LEFT_TO_DEMAND);
        let wanted = ahead.extents.len().min(most.clamp(1, MOST_PARALLEL));
        while ahead.threads < wanted {
            // Without that thread it comes by demand.
            if crate::thread::spawn("pk-will-need", || self.work_ahead()).is_err() {
                break;
            }
            ahead.threads += 1;
        }
        drop(ahead);
        self.more.notify_all();
    }

    fn work_ahead(&self) {
        while let Some((template, run)) = self.next_extent() {
            let Some(template) = template.upgrade() else { continue };
            // Whoever needs a page that could not be had asks again; and a panic in a source is told by
            // the fetch to those who wait.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                for fetch in template.want_all(run, Box::new(|_| {})) {
                    fetch.finish();
                }
            }));
        }
    }

    fn next_extent(&self) -> Option<(Weak<Template>, Run)> {
        let mut ahead = lock(&self.ahead);
        let nothing = |ahead: &mut Ahead| ahead.extents.is_empty();
        let waited = self.more.wait_timeout_while(ahead, IDLE, nothing);
        ahead = waited.unwrap_or_else(PoisonError::into_inner).0;
        let next = ahead.extents.pop_front();
        if next.is_none() {
            ahead.threads -= 1;
        }
        next
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while one of these is held leaves plain data in a usable state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
