//! Templates: a stack plus the page cache that all forks share.
//!
//! A page is fetched from the stack once, whoever asks, and published in the template's file
//! ([`cache_file`]). The life of a page:
//!
//! ```text
//!            want()                  publish               (for ever)
//!   absent ─────────► in flight ───────────────► present
//!      ▲                  │ fails
//!      └──────────────────┘ every waiter is told
//! ```
//!
//! Pages of a *zero run* (known to be zero without reading) are never fetched: clients map them as
//! anonymous memory, or get the zero page.
//!
//! The present-map is the server's own record. The file must agree with it: a page in the file that
//! we did not publish was put there by a stranger who read a hole, and forks may have seen zeros
//! where content belongs. There is no mending that, so the template is *damaged* from then on and
//! every later fault fails loudly ([`Template::audit`], and each publication).

pub mod cache_file;
pub mod replay;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{
    AtomicBool, AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Relaxed},
};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::delivery::Delivery;
use crate::error::{Error, Result};
use crate::page::{self, find, Run, PAGE};
use crate::page_set::PageSet;
use crate::source::{Capabilities, Content, Identity, Source};
use crate::stack;
use crate::working_set::{Recorder, WorkingSet};
use cache_file::CacheFile;
use replay::{Replay, Sink};

/// Zero runs shorter than this are fetched like data: splitting a fetch or a mapping for them costs
/// more than their bytes.
const SHORTEST_ZERO_RUN: u64 = 16;

/// Pages that one fetch brings at most: 2 MiB.
const LONGEST_FETCH: u64 = 512;
/// Pages that come along with one that is asked for, at most.
pub(crate) const LONGEST_WINDOW: u64 = 256;
/// Bytes of one read where all is fetched.
pub const USUAL_REQUEST: u64 = 1 << 20;

/// Called once when the page it waits for is there, or never will be; on whatever thread finishes
/// the fetch. Must not block.
pub type Waiter = Box<dyn FnOnce(&Result<(), Arc<Error>>) + Send>;

/// Answer to [`Template::want`].
#[derive(Debug)]
pub enum Want {
    /// The page is in the template's file; the waiter is not called.
    Here,
    /// The page is zero by the map; the waiter is not called.
    Zero(Run),
    /// Somebody fetches it already; the waiter will be called.
    Waiting,
    /// The caller must see to this fetch; the waiter will be called.
    Fetch(Fetch),
}

/// An opened stack, its shared page cache and its present-map. Shared by threads.
#[derive(Debug)]
pub struct Template {
    spec: String,
    stack: Arc<dyn Source>,
    zero_runs: Vec<Run>,
    cache: CacheFile,
    present: PageSet,
    flights: Mutex<Flights>,
    identity: OnceLock<Identity>,
    ahead: Mutex<Ahead>,
    recorder: RwLock<Option<Arc<Recorder>>>,
    /// Whether there is a recorder: asked at every fault.
    recording: AtomicBool,
    damaged: OnceLock<Arc<Error>>,
    deadline: Duration,
    counters: Counters,
}

/// The replay, and where its pages go.
#[derive(Debug, Default)]
struct Ahead {
    replay: Option<Arc<Replay>>,
    sinks: Vec<Arc<dyn Sink>>,
}

/// What a template counts.
#[derive(Debug, Default)]
struct Counters {
    fetches: AtomicU64,
    failures: AtomicU64,
    bytes_read: AtomicU64,
}

/// A snapshot of a template's counters.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Statistics {
    /// The spec string of the source.
    pub spec: String,
    /// Bytes.
    pub size: u64,
    /// Pages in all.
    pub pages: u64,
    /// Pages in the template's file.
    pub present_pages: u64,
    /// Pages that are zero by the map.
    pub zero_pages: u64,
    /// Reads of the stack that brought pages.
    pub fetches: u64,
    /// Reads of the stack that failed.
    pub failures: u64,
    /// Bytes that the reads brought.
    pub bytes_read: u64,
    /// What keeps clients from writing the shared file: `read-only mount` or `seals`.
    pub protection: &'static str,
    /// Why nothing is served any more, if so.
    pub damaged: Option<String>,
    /// The replay that was started last.
    pub replay: Option<replay::Statistics>,
    /// What the pieces of the stack count.
    pub stack: Vec<(String, u64)>,
}

struct Flight {
    run: Run,
    /// Who waits for which of its pages.
    waiters: Vec<(Run, Waiter)>,
}

/// Fetches under way, by their first page; they never overlap.
type Flights = BTreeMap<u64, Flight>;

/// The flight that will bring `page`.
fn flight_of(flights: &mut Flights, page: u64) -> Option<&mut Flight> {
    let (_, flight) = flights.range_mut(..=page).next_back()?;
    flight.run.contains(page).then_some(flight)
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Flight({:?}, {} waiters)", self.run, self.waiters.len())
    }
}

impl Template {
    /// Opens `spec` through `layers` (outermost first; see [`stack`]). A page whose fetch still
    /// fails after `deadline` is given up.
    ///
    /// # Errors
    /// Those of [`stack::open`]; `Unsupported` where the page size is not 4096; `Kernel` where the
    /// template's file cannot be made.
    pub fn open<L: AsRef<str>>(
        spec: &str,
        layers: &[L],
        delivery: &Delivery,
        deadline: Duration,
    ) -> Result<Arc<Template>> {
        if rustix::param::page_size() as u64 != PAGE {
            return Err(Error::Unsupported {
                message: format!("the page size here is {} bytes", rustix::param::page_size()),
                hint: format!("pagekit serves kernels with pages of {PAGE} bytes"),
            });
        }
        let stack = stack::open(spec, layers)?;
        let size = stack.capabilities().size;
        let mut zero_runs = stack.zero_runs()?;
        zero_runs.retain(|run| run.pages >= SHORTEST_ZERO_RUN);
        Ok(Arc::new(Template {
            spec: spec.to_owned(),
            cache: CacheFile::create(size, delivery)?,
            present: PageSet::new(size / PAGE),
            zero_runs,
            stack,
            flights: Mutex::default(),
            identity: OnceLock::new(),
            ahead: Mutex::default(),
            recorder: RwLock::default(),
            recording: AtomicBool::new(false),
            damaged: OnceLock::new(),
            deadline,
            counters: Counters::default(),
        }))
    }

    /// What it was opened as.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.stack.capabilities().size
    }

    /// All of it.
    pub fn whole(&self) -> Run {
        Run::between(0, self.size() / PAGE)
    }

    /// How long a page is waited for until it is given up.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Runs that are zero by the map, rising.
    pub fn zero_runs(&self) -> &[Run] {
        &self.zero_runs
    }

    /// The page cache of the template.
    pub fn cache(&self) -> &CacheFile {
        &self.cache
    }

    /// A file that can be mapped instead of being served, if the stack is nothing but one.
    pub fn mappable(&self) -> Option<BorrowedFd<'_>> {
        self.stack.mappable()
    }

    /// Asks for `page`. If it is neither here nor zero, a `waiter` is made and called when a fetch
    /// ends, and the fetch covers up to `window` pages around and behind it, as far as they are
    /// absent.
    pub fn want(self: &Arc<Self>, page: u64, window: u64, waiter: impl FnOnce() -> Waiter) -> Want {
        if self.present.contains(page) {
            return Want::Here;
        }
        if let Some(run) = find(&self.zero_runs, page) {
            return Want::Zero(run);
        }
        let mut flights = self.lock_flights();
        // Published while we waited for the lock?
        if self.present.contains(page) {
            return Want::Here;
        }
        let one = Run { start: page, pages: 1 };
        if let Some(flight) = flight_of(&mut flights, page) {
            flight.waiters.push((one, waiter()));
            return Want::Waiting;
        }
        let run = self.absent_around(&flights, page, window);
        Want::Fetch(self.take_off(&mut flights, run, vec![(one, waiter())]))
    }

    /// Asks for all pages of `run`: calls `waiter` once when each of them is in the template's file
    /// or zero by the map, on this thread if that is so already; or when one cannot be had. The
    /// caller must see to the fetches.
    pub fn want_all(self: &Arc<Self>, run: Run, waiter: Waiter) -> Vec<Fetch> {
        self.want_window(run, run, waiter)
    }

    /// As [`Self::want_all`], but the fetches cover all that is absent of `window`, which `run` is a
    /// part of.
    pub fn want_window(self: &Arc<Self>, run: Run, window: Run, waiter: Waiter) -> Vec<Fetch> {
        let all = Arc::new(Gathering::new(waiter));
        let fetches = self.claim(run, window, &all);
        all.arrived(&Ok(()));
        fetches
    }

    fn claim(self: &Arc<Self>, run: Run, window: Run, all: &Arc<Gathering>) -> Vec<Fetch> {
        let mut fetches = Vec::new();
        let mut flights = self.lock_flights();
        let mut page = window.start;
        while page < window.end() {
            let (end, flight) = if self.present.contains(page) {
                (page + 1, None)
            } else if let Some(zero) = find(&self.zero_runs, page) {
                (zero.end(), None)
            } else if let Some(flight) = flight_of(&mut flights, page) {
                (flight.run.end(), Some(flight))
            } else {
                let mut end = page + 1;
                let last = window.end().min(page + LONGEST_FETCH);
                while end < last && self.is_absent(&flights, end) {
                    end += 1;
                }
                fetches.push(self.take_off(&mut flights, Run::between(page, end), Vec::new()));
                (end, flights.get_mut(&page))
            };
            let awaited = Run::between(page.max(run.start), end.min(run.end()));
            if let (Some(flight), true) = (flight, awaited.pages > 0) {
                flight.waiters.push((awaited, all.waiter()));
            }
            page = end;
        }
        fetches
    }

    fn take_off(
        self: &Arc<Self>,
        flights: &mut Flights,
        run: Run,
        waiters: Vec<(Run, Waiter)>,
    ) -> Fetch {
        flights.insert(run.start, Flight { run, waiters });
        Fetch { template: Arc::clone(self), run, began: Instant::now(), attempts: 0, ended: false }
    }

    /// A client says that `page` was demanded, before it asks for it. What is fetched ahead, or along
    /// with another page, was not demanded.
    pub fn demanded(&self, page: u64) {
        if self.recording.load(Relaxed) {
            if let Some(recorder) = &*self.recorder.read().unwrap_or_else(PoisonError::into_inner) {
                recorder.demanded(page);
            }
        }
    }

    /// Whether demands are recorded: then pages must come one by one, so that each is demanded.
    pub fn recording(&self) -> bool {
        self.recording.load(Relaxed)
    }

    /// Records demands from now on, instead of what was recorded before.
    ///
    /// # Errors
    /// Those of the source, which is asked for its identity.
    pub fn record(&self) -> Result<Arc<Recorder>> {
        let recorder = Arc::new(Recorder::new(self.identity()?, self.whole().pages));
        *self.recorder.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::clone(&recorder));
        self.recording.store(true, Relaxed);
        Ok(recorder)
    }

    /// Ends the recording: demands are served in windows again.
    pub fn stop_recording(&self) {
        self.recording.store(false, Relaxed);
        *self.recorder.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What the source says it is: the same for the same content, wherever it lies.
    ///
    /// # Errors
    /// Those of the source.
    pub fn identity(&self) -> Result<Identity> {
        if let Some(known) = self.identity.get() {
            return Ok(*known);
        }
        let identity = self.stack.identity()?;
        Ok(*self.identity.get_or_init(|| identity))
    }

    /// What the stack can do.
    pub fn capabilities(&self) -> Capabilities {
        self.stack.capabilities()
    }

    /// Fetches the pages of `set` ahead, from now on, instead of what another replay had left to do.
    ///
    /// # Errors
    /// `Integrity` if the set is of another template; those of the source, which is asked for its
    /// identity; `Kernel` when threads run out.
    pub fn replay(
        self: &Arc<Self>,
        set: &WorkingSet,
        options: replay::Options,
    ) -> Result<Arc<Replay>> {
        let replay = Replay::start(self, set, options)?;
        let (before, sinks) = {
            let mut ahead = self.lock_ahead();
            (ahead.replay.replace(Arc::clone(&replay)), ahead.sinks.clone())
        };
        sinks.into_iter().for_each(|sink| replay.fill(sink));
        if let Some(before) = before {
            before.cancel();
        }
        Ok(replay)
    }

    /// The replay that was started last.
    pub fn current_replay(&self) -> Option<Arc<Replay>> {
        self.lock_ahead().replay.clone()
    }

    /// Brings pages that are fetched ahead into `sink` too, until it says that it is over.
    pub fn add_sink(&self, sink: Arc<dyn Sink>) {
        let replay = {
            let mut ahead = self.lock_ahead();
            ahead.sinks.retain(|sink| !sink.is_over());
            ahead.sinks.push(Arc::clone(&sink));
            ahead.replay.clone()
        };
        if let Some(replay) = replay {
            replay.fill(sink);
        }
    }

    fn lock_ahead(&self) -> MutexGuard<'_, Ahead> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of `run` from its start on that are in the template's file, in one piece.
    pub fn present_from(&self, run: Run) -> Run {
        let mut end = run.start;
        while end < run.end() && self.present.contains(end) {
            end += 1;
        }
        Run::between(run.start, end)
    }

    /// Reads `buffer.len()` bytes at `offset`, any values inside the template, fetching what is
    /// absent. Blocks.
    pub fn read(self: &Arc<Self>, offset: u64, buffer: &mut [u8]) -> Result<(), Arc<Error>> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size()) {
            return Err(Arc::new(Error::usage(
                format!(
                    "{} bytes at {offset} reach beyond the template's {}",
                    buffer.len(),
                    self.size()
                ),
                "read inside the template",
            )));
        }
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let inside = at % PAGE;
            let length = rest.len().min((PAGE - inside) as usize);
            let (part, tail) = rest.split_at_mut(length);
            match self.bring(at / PAGE, LONGEST_WINDOW)? {
                Some(_) => part.fill(0),
                None => self.cache.read_present(at, part),
            }
            at += length as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Fetches everything that is neither present nor zero, `request` bytes at a time (rounded up to
    /// pages), so many requests at once as `parallel` says or suits the source. Blocks.
    pub fn load(self: &Arc<Self>, request: u64, parallel: Option<usize>) -> Result<(), Arc<Error>> {
        let options = replay::Options { parallel, ..replay::Options::default() };
        let pages = request.div_ceil(PAGE).clamp(1, LONGEST_FETCH);
        let all = Replay::start_all(self, pages, options).map_err(Arc::new)?;
        all.wait(Duration::MAX)?;
        // What others were fetching meanwhile was left to them.
        let mut page = 0;
        while page < self.whole().end() {
            page = match self.bring(page, LONGEST_WINDOW)? {
                Some(zero) => zero.end(),
                None => page + 1,
            };
        }
        Ok(())
    }

    /// Compares the template's file with the present-map.
    ///
    /// # Errors
    /// `Integrity` if the file holds a page that was not published: the template is damaged then.
    pub fn audit(&self) -> Result<(), Arc<Error>> {
        let flights = self.lock_flights();
        for run in self.cache.data_runs().map_err(Arc::new)? {
            // Who reads a hole where zeros belong gets what belongs there.
            let strange = (run.start..run.end()).find(|page| self.is_absent(&flights, *page));
            if let Some(page) = strange {
                return Err(self.damage(page));
            }
        }
        self.check()
    }

    /// # Errors
    /// The reason, if the template is damaged.
    pub fn check(&self) -> Result<(), Arc<Error>> {
        self.damaged.get().map_or(Ok(()), |error| Err(Arc::clone(error)))
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        Statistics {
            spec: self.spec.clone(),
            size: self.size(),
            pages: self.whole().pages,
            present_pages: self.present.len(),
            zero_pages: self.zero_runs.iter().map(|run| run.pages).sum(),
            fetches: self.counters.fetches.load(Relaxed),
            failures: self.counters.failures.load(Relaxed),
            bytes_read: self.counters.bytes_read.load(Relaxed),
            protection: self.cache.protection().name(),
            damaged: self.damaged.get().map(|error| error.to_string()),
            replay: self.current_replay().map(|replay| replay.statistics()),
            stack: self.stack.statistics(),
        }
    }

    /// Makes one page present on this thread, or says which zero run it lies in. If it has to be
    /// fetched, up to `window` pages come along. Blocks.
    pub(crate) fn bring(
        self: &Arc<Self>,
        page: u64,
        window: u64,
    ) -> Result<Option<Run>, Arc<Error>> {
        self.check()?;
        if self.present.contains(page) {
            return Ok(None);
        }
        loop {
            match self.bring_once(page, window) {
                Err(error) if error.given_up() => {}
                outcome => return outcome,
            }
        }
    }

    fn bring_once(self: &Arc<Self>, page: u64, window: u64) -> Result<Option<Run>, Arc<Error>> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let waiter: Waiter = Box::new(move |outcome| {
            // The receiver lives until it got this one message.
            let _ = sender.send(outcome.clone());
        });
        match self.want(page, window, || waiter) {
            Want::Here => return Ok(None),
            Want::Zero(run) => return Ok(Some(run)),
            Want::Waiting => {}
            Want::Fetch(fetch) => fetch.finish(),
        }
        receiver.recv().expect("a fetch always tells its waiters").map(|()| None)
    }

    /// The longest run around `page` with nothing in it that is present, zero or in flight, at most
    /// `window` pages behind its aligned start.
    fn absent_around(&self, flights: &Flights, page: u64, window: u64) -> Run {
        let window = window.max(1);
        let aligned = page - page % window;
        let absent = |page: u64| self.is_absent(flights, page);
        let mut start = page;
        while start > aligned && absent(start - 1) {
            start -= 1;
        }
        let last = (aligned + window).min(self.whole().end());
        let mut end = page + 1;
        while end < last && absent(end) {
            end += 1;
        }
        Run::between(start, end)
    }

    /// Whether `page` is neither here, nor zero, nor on its way.
    fn is_absent(&self, flights: &Flights, page: u64) -> bool {
        let before = flights.range(..=page).next_back();
        !self.present.contains(page)
            && find(&self.zero_runs, page).is_none()
            && !before.is_some_and(|(_, flight)| flight.run.contains(page))
    }

    fn damage(&self, page: u64) -> Arc<Error> {
        let error = Error::Integrity {
            message: format!(
                "template {}: page {page} is in the shared file, but was never published: a process \
                 read a hole of it (a mapping without registration, or a child of a fork that was \
                 not announced), and forks may have read zeros there; nothing is served any more",
                self.spec
            ),
        };
        Arc::clone(self.damaged.get_or_init(|| Arc::new(error)))
    }

    fn lock_flights(&self) -> MutexGuard<'_, Flights> {
        // Nothing that holds this lock can leave the list half changed, so poison means nothing.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One read of the stack under way. Whatever happens to it, a panic included, its waiters are told.
#[derive(Debug)]
pub struct Fetch {
    template: Arc<Template>,
    run: Run,
    began: Instant,
    attempts: u32,
    ended: bool,
}

impl Fetch {
    /// Fetches if that needs no waiting; gives itself back if it does.
    pub fn now(mut self) -> Option<Fetch> {
        if !self.template.stack.capabilities().immediate {
            return Some(self);
        }
        let outcome = with_buffer(self.run.bytes() as usize, |buffer| {
            match self.template.stack.try_read(self.run.offset(), buffer) {
                Ok(Some(content)) => self.publish(self.run, content, buffer).map(|()| true),
                // A failure is looked at where there is time for another try.
                Ok(None) | Err(_) => Ok(false),
            }
        });
        match outcome {
            Ok(false) => Some(self),
            Err(error) if error.retryable() => Some(self),
            outcome => {
                self.end(outcome.map(drop));
                None
            }
        }
    }

    /// Fetches, waiting as long as the stack does. After a failure that may pass it gives itself
    /// back, with the time to wait before the next attempt. When the deadline is over, or no other
    /// attempt can succeed, the pages that somebody waits for are tried one by one: a bad page does
    /// not take its neighbours with it. Who waits for one that still fails gets the failure.
    pub fn attempt(mut self) -> Option<(Fetch, Duration)> {
        let outcome = self.bring(self.run);
        if let Err(error) = &outcome {
            let pause = Duration::from_millis(1 << self.attempts.min(9));
            if error.retryable() && self.began.elapsed() + pause < self.template.deadline {
                self.attempts += 1;
                return Some((self, pause));
            }
            if self.run.pages > 1 && self.template.check().is_ok() {
                self.one_by_one();
                return None;
            }
        }
        self.end(outcome);
        None
    }

    /// Attempts again and again until it has ended, on this thread.
    pub(crate) fn finish(mut self) {
        while let Some((again, pause)) = self.attempt() {
            std::thread::sleep(pause);
            self = again;
        }
    }

    /// Reads and publishes `run`, a part of this fetch.
    fn bring(&self, run: Run) -> Result<(), Arc<Error>> {
        with_buffer(run.bytes() as usize, |buffer| {
            match self.template.stack.read(run.offset(), buffer) {
                Ok(content) => self.publish(run, content, buffer),
                Err(error) => {
                    self.template.counters.failures.fetch_add(1, Relaxed);
                    Err(Arc::new(error))
                }
            }
        })
    }

    /// One attempt for each page that somebody waits for, until nobody waits.
    fn one_by_one(&mut self) {
        while let Some(wanted) = self.next_waited_for() {
            let outcome = (wanted.start..wanted.end()).try_for_each(|page| {
                match self.template.present.contains(page) {
                    true => Ok(()),
                    false => self.bring(Run { start: page, pages: 1 }),
                }
            });
            // Taken only now: should the read panic, they are told by the drop.
            let waiters = {
                let mut flights = self.template.lock_flights();
                let Some(flight) = flights.get_mut(&self.run.start) else { break };
                let all = std::mem::take(&mut flight.waiters);
                let (these, others) = all.into_iter().partition(|(waited, _)| *waited == wanted);
                flight.waiters = others;
                these
            };
            tell(waiters, &outcome);
        }
        self.ended = true;
    }

    /// Pages of this fetch that somebody waits for; if there are none, the fetch is over.
    fn next_waited_for(&self) -> Option<Run> {
        let mut flights = self.template.lock_flights();
        let wanted = flights.get(&self.run.start)?.waiters.first().map(|(wanted, _)| *wanted);
        if wanted.is_none() {
            flights.remove(&self.run.start);
        }
        wanted
    }

    fn publish(&self, run: Run, content: Content, buffer: &[u8]) -> Result<(), Arc<Error>> {
        let template = &self.template;
        template.counters.fetches.fetch_add(1, Relaxed);
        let bytes = match content {
            Content::Bytes => {
                template.counters.bytes_read.fetch_add(run.bytes(), Relaxed);
                Some(buffer)
            }
            Content::Zero => None,
        };
        // An earlier attempt may have published the first part before it failed.
        let there = template.present_from(run).pages;
        let mut run = Run::between(run.start + there, run.end());
        let bytes = bytes.map(|bytes| &bytes[(there * PAGE) as usize..]);
        // Marked piece by piece, so that a failure half-way leaves a present-map that is true.
        let published = template.cache.publish(run, bytes, |pages| {
            template.present.insert(Run { start: run.start, pages });
            run = Run::between(run.start + pages, run.end());
        });
        published.map_err(|failure| match failure {
            cache_file::Failure::Occupied(page) => template.damage(page),
            cache_file::Failure::Other(error) => Arc::new(error),
        })
    }

    fn end(&mut self, outcome: Result<(), Arc<Error>>) {
        self.ended = true;
        let waiters = {
            let mut flights = self.template.lock_flights();
            flights.remove(&self.run.start).map(|flight| flight.waiters).unwrap_or_default()
        };
        tell(waiters, &outcome);
    }
}

fn tell(waiters: Vec<(Run, Waiter)>, outcome: &Result<(), Arc<Error>>) {
    for (_, waiter) in waiters {
        waiter(outcome);
    }
}

/// One waiter for several fetches: told when the last of them has ended, of the first failure if
/// there was one.
struct Gathering {
    left: AtomicUsize,
    failure: OnceLock<Arc<Error>>,
    waiter: Mutex<Option<Waiter>>,
}

impl Gathering {
    /// The one who gathers counts as one that has yet to arrive.
    fn new(waiter: Waiter) -> Gathering {
        Gathering {
            left: AtomicUsize::new(1),
            failure: OnceLock::new(),
            waiter: Mutex::new(Some(waiter)),
        }
    }

    fn waiter(self: &Arc<Self>) -> Waiter {
        self.left.fetch_add(1, AcqRel);
        let all = Arc::clone(self);
        Box::new(move |outcome| all.arrived(outcome))
    }

    fn arrived(&self, outcome: &Result<(), Arc<Error>>) {
        if let Err(error) = outcome {
            let _ = self.failure.set(Arc::clone(error));
        }
        if self.left.fetch_sub(1, AcqRel) == 1 {
            let waiter = self.waiter.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waiter) = waiter {
                waiter(&self.failure.get().map_or(Ok(()), |error| Err(Arc::clone(error))));
            }
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        if !self.ended {
            let what = format!("fetch of {} pages at page {}", self.run.pages, self.run.start);
            self.end(Err(Arc::new(match std::thread::panicking() {
                true => Error::Integrity { message: format!("{what}: the source panicked") },
                // Somebody else may go on with it: see `Error::given_up`.
                false => Error::Unavailable { what, error: std::io::ErrorKind::Interrupted.into() },
            })));
        }
    }
}

/// A page of a buffer. The alignment matters: on some processors (AMD with FSRM) the kernel's copy
/// into a buffer that begins 16 bytes behind a page's start takes four times as long.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct AlignedPage([u8; PAGE as usize]);

/// Runs `work` with this thread's buffer, grown to at least `bytes`. Fetches are often and alike, so
/// the buffer is kept.
pub(crate) fn with_buffer<T>(bytes: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    thread_local! {
        static BUFFER: std::cell::RefCell<Vec<AlignedPage>> =
            const { std::cell::RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        let pages = bytes.div_ceil(PAGE as usize);
        if buffer.len() < pages {
            buffer.resize(pages, AlignedPage([0; PAGE as usize]));
        }
        // SAFETY: the pages lie side by side, are initialised, and are plain bytes; `bytes` fits.
        work(unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), bytes) })
    })
}

/// `run` cut into the parts that are zero by the map and those that are not, for a client that maps
/// the former anonymously: at most `most` zero parts, the longest ones.
pub fn zero_parts(template: &Template, run: Run, most: usize) -> Vec<Run> {
    let mut zeros: Vec<Run> = template
        .zero_runs()
        .iter()
        .map(|zero| {
            Run::between(zero.start.max(run.start), zero.end().min(run.end()).max(run.start))
        })
        .filter(|zero| zero.pages > 0)
        .collect();
    if zeros.len() > most {
        zeros.sort_by_key(|zero| std::cmp::Reverse(zero.pages));
        zeros.truncate(most);
        zeros.sort_by_key(|zero| zero.start);
    }
    debug_assert!(page::complement(run, &zeros).iter().all(|rest| rest.pages > 0));
    zeros
}
