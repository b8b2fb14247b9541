//! Replay: pages of a working set are fetched before they are asked for.
//!
//! ```text
//!   working set ──plan──► extents ──threads──► template's file ──► sinks: copy targets, the mount
//! ```
//!
//! What was measured, by others and here, and what follows:
//! - A store far away costs a few milliseconds a request and little a byte: pages that lie near each
//!   other are fetched in one *extent*, gaps between them bridged, the smallest first, as long as
//!   that brings at most a tenth more than was asked for. (On a recorded guest 1002 runs became 306;
//!   a fifth more would have left 167 of them.)
//! - Extents are fetched in the order in which the first page of each was demanded. The order of the
//!   pages inside does not repeat from run to run, so it is not kept.
//! - An extent is a request of at most [`LONGEST_EXTENT`] pages: some of them fill the line, and a
//!   fault that needs a page of one does not wait for much else.
//! - Demand goes first: replay leaves some of the source's requests to it, and its threads are nicer
//!   to the processor than those that serve faults.
//! - Only the critical part goes to the sinks. Filling all of a sandbox's memory behind its back
//!   starves it and gives away what forks share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Fetch, Template};
use crate::error::{Error, Result};
use crate::page::{coalesce, find, union, Run, PAGE};
use crate::working_set::WorkingSet;

/// Pages of an extent at most: 512 KiB.
const LONGEST_EXTENT: u64 = 128;
/// Gaps up to so many pages are bridged. A larger one costs more than a request.
const WIDEST_GAP: u64 = 32;
/// Bridges bring at most one page for so many that are asked for.
const ASKED_PER_BRIDGED: u64 = 10;
/// Requests that are left to demand.
const LEFT_TO_DEMAND: usize = 2;
/// Requests at once at most.
const MOST_PARALLEL: usize = 64;
/// How much nicer than the rest of the process.
const NICENESS: i32 = 5;
/// A sink that could not take pages is asked again after this time.
const SINK_PAUSE: Duration = Duration::from_millis(2);

/// How to replay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Also fetch what was demanded after "ready", into the template only.
    pub rest: bool,
    /// Bytes a second at most; as fast as the source is if none.
    pub rate: Option<u64>,
    /// Requests at once; what suits the source if none.
    pub parallel: Option<usize>,
}

/// What is to be fetched, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    extents: Vec<Run>,
    /// So many of them are critical: the first.
    critical: usize,
}

/// Where pages go once they are in the template: into targets, or into a mount.
pub trait Sink: Send + Sync + std::fmt::Debug {
    /// Takes the present pages of `run`, as far as it can now. Called by one thread at a time.
    fn put(&self, run: Run) -> Taken;

    /// Whether it takes no more, for good.
    fn is_over(&self) -> bool;
}

/// What a sink did with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It has what it can have of them.
    All,
    /// It could not take all of them now.
    NotYet,
    /// It takes no more.
    Over,
}

/// A replay under way. It ends when all is fetched, when it is cancelled, or when a page cannot be
/// had: whoever needs that page will ask again.
#[derive(Debug)]
pub struct Replay {
    template: Weak<Template>,
    plan: Plan,
    /// The pages of the set, critical or not, rising.
    set: Vec<Run>,
    options: Options,
    began: Instant,
    next: AtomicUsize,
    /// Which extents are fetched.
    fetched: Vec<AtomicBool>,
    requests: AtomicU64,
    pages: AtomicU64,
    /// Bytes asked for, which the rate limits.
    asked: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    cancelled: AtomicBool,
    failure: OnceLock<Arc<Error>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    /// Threads that fetch.
    busy: usize,
    /// Changes whenever there may be something new for the sinks.
    news: u64,
    /// Took how long, once nobody is busy any more.
    took: Option<Duration>,
    sinks: Vec<Filling>,
    /// Whether the thread that fills sinks runs.
    filling: bool,
}

/// A sink, and which extents it still lacks.
#[derive(Debug)]
struct Filling {
    sink: Arc<dyn Sink>,
    lacks: Vec<usize>,
}

/// What a replay counts.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Statistics {
    /// Pages to be fetched ahead, bridged gaps included.
    pub planned_pages: u64,
    /// Pages of them that are critical.
    pub critical_pages: u64,
    /// Pages that the replay itself fetched; others were there, or came by demand.
    pub fetched_pages: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Reads of the source.
    pub requests: u64,
    /// Whether it is over.
    pub done: bool,
    /// Seconds until it was over, or so far.
    pub seconds: f64,
    /// Why it ended early, if it did.
    pub failure: Option<String>,
}

impl Replay {
    /// Starts to fetch.
    pub(super) fn start(
        template: &Arc<Template>,
        set: &WorkingSet,
        options: Options,
    ) -> Result<Arc<Replay>> {
        set.check(template.identity()?, template.whole().pages)?;
        let zeros = template.zero_runs();
        let critical = extents(set.critical(), zeros, LONGEST_EXTENT);
        let mut plan = Plan { critical: critical.len(), extents: critical };
        if options.rest {
            plan.extents.extend(extents(set.rest(), zeros, LONGEST_EXTENT));
        }
        let all = set.critical().iter().chain(set.rest()).flatten().copied();
        Replay::start_plan(template, plan, union(all), options)
    }

    /// Starts to fetch everything, in extents of `pages`.
    pub(super) fn start_all(
        template: &Arc<Template>,
        pages: u64,
        options: Options,
    ) -> Result<Arc<Replay>> {
        let data = crate::page::complement(template.whole(), template.zero_runs());
        let extents = data.into_iter().flat_map(|run| cut(run, pages)).collect();
        Replay::start_plan(template, Plan { extents, critical: 0 }, Vec::new(), options)
    }

    fn start_plan(
        template: &Arc<Template>,
        plan: Plan,
        set: Vec<Run>,
        options: Options,
    ) -> Result<Arc<Replay>> {
        let capabilities = template.capabilities();
        let usual = match capabilities.immediate {
            // The processor copies, and somebody is starting a sandbox: half of it is left to that.
            true => std::thread::available_parallelism().map_or(1, |all| all.get().div_ceil(2)),
            false => capabilities.concurrency.min(16).saturating_sub(LEFT_TO_DEMAND),
        };
        let parallel = options.parallel.unwrap_or(usual).clamp(1, MOST_PARALLEL);
        let threads = parallel.min(plan.extents.len());
        let replay = Arc::new(Replay {
            template: Arc::downgrade(template),
            fetched: plan.extents.iter().map(|_| AtomicBool::new(false)).collect(),
            plan,
            set,
            options,
            began: Instant::now(),
            next: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            state: Mutex::new(State {
                busy: threads,
                took: (threads == 0).then_some(Duration::ZERO),
                ..State::default()
            }),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
            failure: OnceLock::new(),
            threads: Mutex::default(),
        });
        for number in 0..threads {
            let working = Arc::clone(&replay);
            let name = format!("pk-replay-{number}");
            match crate::thread::spawn(&name, move || working.work()) {
                Ok(thread) => replay.lock_threads().push(thread),
                Err(error) => {
                    replay.lock().busy -= threads - number;
                    replay.cancel();
                    return Err(Error::kernel("cannot start a thread for the replay", error));
                }
            }
        }
        Ok(replay)
    }

    /// Fills `sink` with the critical pages, as they come, from now on.
    pub fn fill(self: &Arc<Self>, sink: Arc<dyn Sink>) {
        let lacks: Vec<usize> = (0..self.plan.critical).rev().collect();
        let mut state = self.lock();
        if lacks.is_empty() || self.cancelled.load(Relaxed) {
            return;
        }
        state.sinks.push(Filling { sink, lacks });
        state.news += 1;
        if !state.filling {
            let filling = Arc::clone(self);
            // Without that thread everything comes by demand.
            let thread = crate::thread::spawn("pk-ahead", move || filling.fill_sinks());
            state.filling = thread.is_ok();
            self.lock_threads().extend(thread);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until all is fetched, or `time` is over; says whether it is.
    ///
    /// # Errors
    /// Why it ended early.
    pub fn wait(&self, time: Duration) -> Result<bool, Arc<Error>> {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| state.took.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match (state.took, self.failure.get()) {
            (Some(_), Some(error)) => Err(Arc::clone(error)),
            (took, _) => Ok(took.is_some()),
        }
    }

    /// Ends it; what is being read is waited for.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
        // Under the lock, so that nobody misses it who is about to wait.
        drop(self.lock());
        self.changed.notify_all();
        // Taken out first: nobody waits for the list while we wait for the threads.
        let threads = std::mem::take(&mut *self.lock_threads());
        for thread in threads {
            // A panic is in the failure already.
            let _ = thread.join();
        }
    }

    /// What of `run` is of the set, fetched yet or not.
    pub(crate) fn of_its_set(&self, run: Run) -> Vec<Run> {
        let after = self.set.partition_point(|one| one.end() <= run.start);
        let near = self.set[after..].iter().take_while(|one| one.start < run.end());
        near.map(|one| Run::between(one.start.max(run.start), one.end().min(run.end()))).collect()
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let pages = |extents: &[Run]| extents.iter().map(|run| run.pages).sum();
        let took = self.lock().took;
        let fetched = self.pages.load(Relaxed);
        Statistics {
            planned_pages: pages(&self.plan.extents),
            critical_pages: pages(&self.plan.extents[..self.plan.critical]),
            fetched_pages: fetched,
            bytes: fetched * PAGE,
            requests: self.requests.load(Relaxed),
            done: took.is_some(),
            seconds: took.unwrap_or_else(|| self.began.elapsed()).as_secs_f64(),
            failure: self.failure.get().map(|error| error.to_string()),
        }
    }

    fn work(self: Arc<Self>) {
        be_nice();
        let _working = Working(&self);
        loop {
            let at = self.next.fetch_add(1, Relaxed);
            // Whoever serves the template keeps it; if nobody does, there is nothing left to do.
            let (Some(run), Some(template)) = (self.plan.extents.get(at), self.template.upgrade())
            else {
                return;
            };
            self.keep_to_rate(*run);
            if self.cancelled.load(Relaxed) || self.failure.get().is_some() {
                return;
            }
            let replay = Arc::clone(&self);
            let arrived = Box::new(move |outcome: &Result<(), Arc<Error>>| match outcome {
                Ok(()) => replay.arrived(at),
                // Given up by whoever fetched a part of it, because that one was stopped.
                Err(error) if error.given_up() => {}
                Err(error) => drop(replay.failure.set(Arc::clone(error))),
            });
            for fetch in template.want_all(*run, arrived) {
                self.see_to(&template, fetch);
            }
        }
    }

    fn arrived(&self, extent: usize) {
        self.fetched[extent].store(true, Release);
        self.tell();
    }

    /// Tells those who wait that something has changed.
    fn tell(&self) {
        self.lock().news += 1;
        self.changed.notify_all();
    }

    fn see_to(&self, template: &Template, mut fetch: Fetch) {
        let run = fetch.run;
        self.requests.fetch_add(1, Relaxed);
        while let Some((again, pause)) = fetch.attempt() {
            if self.cancelled.load(Relaxed) {
                // Dropped: who waits for its pages starts anew (see `Error::given_up`).
                return;
            }
            std::thread::sleep(pause);
            fetch = again;
        }
        // Of one that failed perhaps a part is there.
        self.pages.fetch_add(template.present_from(run).pages, Relaxed);
    }

    /// Waits until `run` may be asked for.
    fn keep_to_rate(&self, run: Run) {
        let Some(rate) = self.options.rate else { return };
        let before = self.asked.fetch_add(run.bytes(), Relaxed);
        let due = self.began + Duration::from_secs_f64(before as f64 / rate as f64);
        let left = due.saturating_duration_since(Instant::now());
        let _ = self.changed.wait_timeout_while(self.lock(), left, |_| {
            !self.cancelled.load(Relaxed) && Instant::now() < due
        });
    }

    /// Brings fetched pages into the sinks, each in turn, until all have all.
    fn fill_sinks(self: Arc<Self>) {
        be_nice();
        loop {
            let (mut sinks, news) = {
                let mut state = self.lock();
                (std::mem::take(&mut state.sinks), state.news)
            };
            let mut refused = false;
            for filling in &mut sinks {
                // The earliest stands last.
                for at in (0..filling.lacks.len()).rev() {
                    let extent = filling.lacks[at];
                    if self.cancelled.load(Relaxed) || !self.fetched[extent].load(Acquire) {
                        continue;
                    }
                    match filling.sink.put(self.plan.extents[extent]) {
                        Taken::All => drop(filling.lacks.remove(at)),
                        Taken::NotYet => refused = true,
                        Taken::Over => {
                            filling.lacks.clear();
                            break;
                        }
                    }
                }
            }
            sinks.retain(|filling| !filling.lacks.is_empty());
            let mut state = self.lock();
            // New ones may have come meanwhile.
            state.sinks.append(&mut sinks);
            let nothing_comes = state.took.is_some() && state.news == news && !refused;
            if state.sinks.is_empty() || self.cancelled.load(Relaxed) || nothing_comes {
                state.sinks.clear();
                state.filling = false;
                return;
            }
            let pause = if refused { SINK_PAUSE } else { Duration::MAX };
            let unchanged = |state: &mut State| state.news == news && !self.cancelled.load(Relaxed);
            drop(self.changed.wait_timeout_while(state, pause, unchanged));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that fetches; the last one to end, however it ends, ends the replay.
struct Working<'a>(&'a Replay);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let message = "the source panicked while pages were fetched ahead".to_owned();
            let _ = self.0.failure.set(Arc::new(Error::Integrity { message }));
        }
        let mut state = self.0.lock();
        state.busy -= 1;
        state.news += 1;
        if state.busy == 0 {
            state.took = Some(self.0.began.elapsed());
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

/// Lets the threads that serve faults go first.
fn be_nice() {
    // SAFETY: no memory is passed. On Linux this concerns the calling thread alone. A refusal costs
    // nothing but the courtesy.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}

/// The pages of `phases` in extents of at most `longest` pages, by the earliest phase of each.
fn extents(phases: &[Vec<Run>], zeros: &[Run], longest: u64) -> Vec<Run> {
    let mut pages: BTreeMap<u64, usize> = BTreeMap::new();
    for (phase, runs) in phases.iter().enumerate() {
        for page in runs.iter().flat_map(|run| run.start..run.end()) {
            // Zero pages need no fetching; a set may have them from a template that had no map.
            if find(zeros, page).is_none() {
                pages.entry(page).or_insert(phase);
            }
        }
    }
    let runs = bridged(coalesce(pages.keys().copied()), zeros);
    let mut extents: Vec<(usize, Run)> = runs
        .into_iter()
        .flat_map(|run| cut(run, longest))
        .filter_map(|run| {
            let earliest = pages.range(run.start..run.end()).map(|(_, phase)| *phase).min();
            earliest.map(|phase| (phase, run))
        })
        .collect();
    // Stable: within a phase they rise.
    extents.sort_by_key(|(phase, _)| *phase);
    extents.into_iter().map(|(_, run)| run).collect()
}

/// Joins runs that lie near each other, the nearest first, within the budget. A gap with zeros in it
/// is none that a single read could bridge.
fn bridged(runs: Vec<Run>, zeros: &[Run]) -> Vec<Run> {
    let wanted: u64 = runs.iter().map(|run| run.pages).sum();
    let mut gaps: Vec<(u64, usize)> = runs
        .windows(2)
        .enumerate()
        .map(|(at, pair)| (pair[1].start - pair[0].end(), at))
        .filter(|(gap, at)| {
            let gap = Run { start: runs[*at].end(), pages: *gap };
            let zero = zeros.partition_point(|zero| zero.end() <= gap.start);
            gap.pages <= WIDEST_GAP && zeros.get(zero).is_none_or(|zero| zero.start >= gap.end())
        })
        .collect();
    gaps.sort_unstable();
    let mut budget = wanted / ASKED_PER_BRIDGED;
    let mut joins = vec![false; runs.len()];
    for (gap, at) in gaps {
        if gap > budget {
            break;
        }
        budget -= gap;
        joins[at] = true;
    }
    let mut bridged: Vec<Run> = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        match bridged.last_mut() {
            Some(last) if joins[at - 1] => *last = Run::between(last.start, run.end()),
            _ => bridged.push(*run),
        }
    }
    bridged
}

/// `run` in parts of equal size, none longer than `longest`.
fn cut(run: Run, longest: u64) -> impl Iterator<Item = Run> {
    let parts = run.pages.div_ceil(longest);
    (0..parts).map(move |part| {
        let at = |part: u64| run.start + run.pages * part / parts;
        Run::between(at(part), at(part + 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(pages: &[(u64, u64)]) -> Vec<Run> {
        pages.iter().map(|(start, end)| Run::between(*start, *end)).collect()
    }

    #[test]
    fn near_runs_are_joined_within_the_budget() {
        // 101 pages: 10 more are allowed.
        let apart = runs(&[(0, 50), (59, 80), (81, 101), (120, 130)]);
        assert_eq!(bridged(apart.clone(), &[]), runs(&[(0, 101), (120, 130)]));
        let zeros = runs(&[(52, 55)]);
        assert_eq!(bridged(apart, &zeros), runs(&[(0, 50), (59, 101), (120, 130)]));
        assert_eq!(bridged(runs(&[(0, 1), (3, 4)]), &[]), runs(&[(0, 1), (3, 4)]), "no budget");
    }

    #[test]
    fn extents_go_by_their_earliest_page() {
        let phases = [runs(&[(500, 501), (900, 1000)]), runs(&[(0, 300), (501, 510)])];
        assert_eq!(
            extents(&phases, &[], 128),
            runs(&[(500, 510), (900, 1000), (0, 100), (100, 200), (200, 300)])
        );
        assert_eq!(extents(&phases, &runs(&[(0, 400)]), 128), runs(&[(500, 510), (900, 1000)]));
    }

    #[test]
    fn parts_are_even_and_whole() {
        let parts: Vec<Run> = cut(Run::between(10, 267), 128).collect();
        assert_eq!(parts, runs(&[(10, 95), (95, 181), (181, 267)]));
        assert_eq!(cut(Run::between(5, 6), 128).count(), 1);
    }
}
