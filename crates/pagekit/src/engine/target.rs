//! One target: a process whose faults are served, and everything that is known of it.

use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::process::{pidfd_send_signal, Signal};
use uffd::{Errno, Progress, Userfaultfd};

use super::deputy::{Answer, Passed};
use super::locality::{Locality, Window};
use super::outcome::Outcome;
use super::region::{Belongs, RegionMap};
use super::Shared;
use crate::backend::{fill_gaps, Backend, Resolution};
use crate::error::Error;
use crate::page::{find, Run, PAGE};
use crate::template::{Template, Waiter, Want};

/// Number of a target, never used twice by a server.
pub type TargetId = u64;

/// How long a fault may be refused by the kernel before it is given up.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(10);

/// Somebody who is told what cannot be had, before whoever touches it finds out.
pub trait Owner: Send + Sync + std::fmt::Debug {
    /// The page at `address` cannot be had: calls `poison`, and says what came of it. Where the kernel
    /// cannot poison, it may make touching the page raise SIGBUS by other means; else the target is
    /// killed. On a thread of the engine: it must not wait.
    fn lose(&self, address: u64, error: &Error, poison: &dyn Fn() -> Progress) -> Progress;
}

/// A process whose faults are served.
#[derive(Debug)]
pub struct Target {
    /// Its number.
    pub id: TargetId,
    /// Its parent, if it came by a fork of a target.
    pub parent: Option<TargetId>,
    /// The process, where known: a forked child tells when it says hello.
    process: Mutex<Option<Process>>,
    pub(super) uffd: Userfaultfd,
    pub(super) template: Arc<Template>,
    pub(super) backend: Arc<dyn Backend>,
    /// A page of the target that is answered with the target's number; see [`crate::client::shim`].
    pub(super) beacon: Option<u64>,
    /// Bytes of the target's own pages: 4096, or 2 MiB for hugetlb.
    pub(super) page_size: u64,
    /// Which page belongs where. Written from before events are read until they are applied, read around
    /// every fill: a page that was given back can never be filled again by somebody who looked before.
    /// (Who waits to write goes before who comes to read: events are read though others fill.)
    regions: RwLock<RegionMap>,
    /// Which pages had better come along. Never held for long.
    locality: Mutex<Locality>,
    /// Addresses of the huge pages that were filled, and not given back since.
    filled_huge: Mutex<HashSet<u64>>,
    /// Faults that the kernel refused for now, by address and kind.
    deferred: Mutex<BTreeMap<(u64, bool), Fault>>,
    pub(super) faults: AtomicU64,
    /// How many there were when pages last came ahead of demand.
    pub(super) faults_before: AtomicU64,
    /// Pages that came ahead of demand.
    pub(super) ahead: AtomicU64,
    pub(super) gone: AtomicBool,
    owner: Option<Arc<dyn Owner>>,
    /// Whether a deputy is called on: asked at every fault.
    pub(super) relayed: AtomicBool,
    /// Which pages of the template are the deputy's, in whole pages of the target. Changes with the
    /// region map held.
    pub(super) claims: Mutex<Arc<[Run]>>,
    /// The client's connection, if it is to be open as long as the target lives.
    _connection: Option<OwnedFd>,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    pidfd: Arc<OwnedFd>,
}

/// A fault on its way.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    pub(super) address: u64,
    /// When it was read.
    pub(super) born: Instant,
    /// How many more threads wait for the same page, and will be served with it.
    pub(super) joined: u64,
    attempts: u32,
    /// Since when the kernel refuses to fill it. Time that a source took does not count.
    refused: Option<Instant>,
    /// Not before this moment again.
    pub(super) due: Instant,
    /// Why its page cannot be had, if so.
    pub(super) failure: Option<Arc<Error>>,
    /// Whether it is a write to a page that is there, and write-protected.
    pub(super) protected: bool,
    /// What a deputy says of it, and of which page.
    pub(super) answer: Option<Arc<(u64, Answer)>>,
    /// The window chosen for it, once chosen.
    window: Option<Window>,
    /// How old it was when it was last tried, if nothing can be known after that: the thread that is
    /// served goes on before us.
    pub(super) age: Option<Duration>,
}

impl Fault {
    /// Whether nobody has looked at it yet, and from now on somebody has.
    pub(super) fn is_new(&mut self) -> bool {
        self.window.replace(Window::alone(0)).is_none()
    }
}

/// What a client brings to make a target.
#[derive(Debug)]
pub struct NewTarget {
    /// Negotiated, and registered or about to be.
    pub uffd: Userfaultfd,
    /// The process and its pidfd, where known.
    pub process: Option<(i32, OwnedFd)>,
    /// Where its memory comes from.
    pub template: Arc<Template>,
    /// How bytes get there.
    pub backend: Arc<dyn Backend>,
    /// Which page of the template belongs where.
    pub regions: RegionMap,
    /// A registered page to be answered with the target's number.
    pub beacon: Option<u64>,
    /// Bytes of the target's own pages: 4096, or 2 MiB for hugetlb.
    pub page_size: u64,
    /// Who is told what cannot be had.
    pub owner: Option<Arc<dyn Owner>>,
    /// The client's connection, if it is to be open as long as the target lives.
    pub connection: Option<OwnedFd>,
}

impl Target {
    pub(super) fn new(id: TargetId, parent: Option<TargetId>, new: NewTarget) -> Target {
        let process = new.process.map(|(pid, pidfd)| Process { pid, pidfd: Arc::new(pidfd) });
        let fills = !new.backend.sees_template();
        // Where a page of the template belongs at several addresses, it may be there at one of them.
        let keeps = match fills && new.page_size == PAGE && !new.regions.repeats() {
            true => new.template.whole().pages,
            false => 0,
        };
        Target {
            id,
            parent,
            process: Mutex::new(process),
            uffd: new.uffd,
            template: new.template,
            backend: new.backend,
            beacon: new.beacon,
            page_size: new.page_size,
            regions: RwLock::new(new.regions),
            locality: Mutex::new(Locality::new(keeps)),
            filled_huge: Mutex::default(),
            deferred: Mutex::default(),
            faults: AtomicU64::new(0),
            faults_before: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            owner: new.owner,
            relayed: AtomicBool::new(false),
            claims: Mutex::new(Arc::new([])),
            _connection: new.connection,
        }
    }

    /// The process id, where known. (A process of another pid namespace has none here.)
    pub fn pid(&self) -> Option<i32> {
        lock(&self.process).as_ref().map(|process| process.pid).filter(|pid| *pid != 0)
    }

    /// Faults read from it.
    pub fn faults(&self) -> u64 {
        self.faults.load(Relaxed)
    }

    /// Whether pages can be put there ahead of demand: not where the target maps the template's file.
    pub fn can_be_filled(&self) -> bool {
        !self.backend.sees_template()
    }

    /// Another descriptor of the target's userfaultfd, for whoever must hold one.
    pub fn dup_uffd(&self) -> std::io::Result<Userfaultfd> {
        self.uffd.try_clone()
    }

    pub(super) fn pidfd(&self) -> Option<Arc<OwnedFd>> {
        lock(&self.process).as_ref().map(|process| Arc::clone(&process.pidfd))
    }

    /// Tells which process it is; false if that is known already.
    pub(super) fn identify(&self, pid: i32, pidfd: OwnedFd) -> bool {
        let mut process = lock(&self.process);
        if process.is_some() {
            return false;
        }
        *process = Some(Process { pid, pidfd: Arc::new(pidfd) });
        true
    }

    /// For looking up what belongs where, and filling it.
    pub(super) fn regions(&self) -> RwLockReadGuard<'_, RegionMap> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For reading events and applying them.
    pub(super) fn regions_mut(&self) -> RwLockWriteGuard<'_, RegionMap> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn locality(&self) -> MutexGuard<'_, Locality> {
        lock(&self.locality)
    }

    pub(super) fn filled_huge(&self) -> MutexGuard<'_, HashSet<u64>> {
        lock(&self.filled_huge)
    }

    /// A fault that was read now.
    pub(super) fn fault(&self, address: u64, protected: bool, now: Instant) -> Fault {
        Fault {
            address: address & !(self.page_size - 1),
            born: now,
            joined: 0,
            attempts: 0,
            refused: None,
            due: now,
            failure: None,
            protected,
            answer: None,
            window: None,
            age: None,
        }
    }

    /// Wakes everybody who waits: whose page is still missing faults again.
    pub(super) fn wake_all(&self) {
        for (start, bytes) in self.regions().ranges() {
            let _ = self.uffd.wake(start, bytes);
        }
    }

    /// Whether its address space still exists.
    pub(super) fn is_alive(&self) -> bool {
        let address = self.regions().any_address().or(self.beacon);
        !self.gone.load(Relaxed) && address.is_some_and(|address| self.uffd.is_alive(address))
    }

    /// Takes the deferred faults that are due.
    pub(super) fn take_due(&self, now: Instant) -> Vec<Fault> {
        let mut deferred = lock(&self.deferred);
        let (due, later): (BTreeMap<_, _>, _) =
            std::mem::take(&mut *deferred).into_iter().partition(|(_, fault)| fault.due <= now);
        *deferred = later;
        due.into_values().collect()
    }

    /// Ends what was put aside: nobody will try it again.
    pub(super) fn abandon(&self, shared: &Shared) {
        let mut deferred = lock(&self.deferred);
        self.gone.store(true, Relaxed);
        for fault in std::mem::take(&mut *deferred).into_values() {
            shared.count(Outcome::Abandoned, &fault);
        }
    }

    /// Takes all memory from it: who fills holds the map of regions, and finds nothing from now on.
    pub(super) fn release(&self) {
        let mut regions = self.regions_mut();
        self.gone.store(true, Relaxed);
        *regions = RegionMap::default();
    }

    /// When the next deferred fault is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        lock(&self.deferred).values().map(|fault| fault.due).min()
    }

    /// Makes all deferred faults due: events were read, so the kernel may accept fills now.
    pub(super) fn hasten(&self, now: Instant) {
        lock(&self.deferred).values_mut().for_each(|fault| fault.due = now);
    }

    /// Serves one fault as far as that is possible without waiting. Called by the event loop, and
    /// again by whoever ends a fetch. Re-entrant: it decides everything anew.
    pub(super) fn serve(self: &Arc<Self>, shared: &Arc<Shared>, mut fault: Fault) {
        fault.age = shared.placement.stays_somewhere().then(|| fault.born.elapsed());
        if let Some(error) = fault.failure.clone() {
            if let Some(fault) = self.pass_on_declined(shared, fault) {
                self.give_up(shared, fault, error);
            }
            return;
        }
        if fault.protected {
            return self.serve_protected(shared, fault);
        }
        if self.beacon == Some(fault.address) {
            return self.answer_beacon(shared, fault);
        }
        let regions = self.regions();
        let Some(mut place) = regions.find(fault.address) else {
            drop(regions);
            return self.nothing_known(shared, fault);
        };
        if self.is_relayed() || fault.answer.is_some() {
            match self.pass_on(shared, fault, place) {
                Passed::Taken => return,
                Passed::Answered(fault, resolution) => {
                    drop(regions);
                    return self.settle(shared, fault, resolution);
                }
                Passed::Ours(ours, part) => (fault, place) = (ours, part),
            }
        }
        let belongs = match place.belongs {
            Belongs::Left(page) => match self.is_anonymous(fault.address) {
                Ok(true) => Belongs::Zero,
                Ok(false) => Belongs::Template(page),
                Err(resolution) => {
                    drop(regions);
                    return self.settle(shared, fault, resolution);
                }
            },
            belongs => belongs,
        };
        let resolution = match belongs {
            Belongs::Zero => {
                let pages = self.locality().zeros(fault.address / PAGE);
                self.zero(fault.address, place.bytes.min(pages * PAGE))
            }
            Belongs::Template(page) | Belongs::Left(page) => {
                if let Err(error) = self.template.check() {
                    drop(regions);
                    return self.give_up(shared, fault, error);
                }
                if self.page_size != PAGE {
                    return self.serve_huge(shared, fault, regions, page, place.bytes);
                }
                let window = *fault.window.get_or_insert_with(|| {
                    self.template.demanded(page);
                    let usual = self.locality().window(fault.address / PAGE, page);
                    self.window(usual, page)
                });
                let (put, filled) = match find(self.template.zero_runs(), page) {
                    Some(zero) => {
                        let pages = window.zeros.min(zero.end() - page);
                        let bytes = place.bytes.min(pages * PAGE);
                        let put = Run { start: page, pages: bytes / PAGE };
                        (put, Some(self.zero(fault.address, bytes)))
                    }
                    None => (window.fill, self.fill(fault.address, page, place, window.fill)),
                };
                if let Some(resolution) = filled {
                    drop(regions);
                    self.spread(shared, resolution, put);
                    return self.settle(shared, fault, resolution);
                }
                match self.template.want(page, window.fetch, || self.waiter(shared, &fault)) {
                    // Published a moment ago.
                    Want::Here | Want::Zero(_) => self
                        .fill(fault.address, page, place, window.fill)
                        .unwrap_or(Resolution::Blocked),
                    Want::Waiting => return,
                    Want::Fetch(fetch) => {
                        // Ending a fetch serves its waiters, us included: not under the lock.
                        drop(regions);
                        if let Some(fetch) = fetch.now() {
                            shared.workers.submit(fetch);
                        }
                        return;
                    }
                }
            }
        };
        drop(regions);
        self.settle(shared, fault, resolution);
    }

    /// The window of a fault at `page`, of which `usual` is usual.
    fn window(&self, usual: Window, page: u64) -> Window {
        match (self.template.recording(), self.backend.sees_template()) {
            (false, _) => usual,
            // Its neighbours shall be demanded themselves, or not be recorded.
            (true, true) => Window::alone(page),
            (true, false) => Window { fetch: usual.fetch, ..Window::alone(page) },
        }
    }

    /// A fault at an address of which no event and no client said what belongs there.
    fn nothing_known(self: &Arc<Self>, shared: &Arc<Shared>, fault: Fault) {
        match self.uffd.probe_range(fault.address, PAGE) {
            Some(Errno::AGAIN) => self.settle(shared, fault, Resolution::Blocked),
            Some(Errno::FAULT | Errno::INVAL) => {
                match self.learn_growth(fault.address) {
                    Ok(true) => return self.serve(shared, fault),
                    Ok(false) => {}
                    Err(blocked) => return self.settle(shared, fault, blocked),
                }
                // Zeros could be wrong, and waking would go on for ever.
                let message = "it is registered, but in no region".to_owned();
                self.give_up(shared, fault, Arc::new(Error::Integrity { message }));
            }
            // Unmapped since; whoever waits there shall look again.
            _ => self.settle(shared, fault, Resolution::NotCovered),
        }
    }

    /// Whether anything belongs to `address` after all: mremap says nothing of what it has grown. That
    /// is one mapping with what we know before it; if it is anonymous, zeros belong there, and from now
    /// on that is known. (Of a file, it could be anything.)
    ///
    /// # Errors
    /// Blocked: nothing can be known now.
    fn learn_growth(&self, address: u64) -> Result<bool, Resolution> {
        // Against events: if it is unmapped meanwhile, that is read afterwards.
        let mut regions = self.regions_mut();
        let Some(end) = regions.end_before(address) else {
            return Ok(regions.find(address).is_some());
        };
        let from = end - PAGE;
        match self.uffd.probe_range(from, address + PAGE - from) {
            Some(Errno::AGAIN) => return Err(Resolution::Blocked),
            Some(Errno::FAULT | Errno::EXIST) => {}
            _ => return Ok(false),
        }
        let anonymous = self.is_anonymous(address)?;
        if anonymous {
            regions.grow(end, address + PAGE);
        }
        Ok(anonymous)
    }

    /// Whether the target's own memory, and not a file, is mapped at `address`, where a page is missing:
    /// only a file can have the page already, to be mapped.
    ///
    /// # Errors
    /// Nothing can be known now, or nothing of ours is there.
    fn is_anonymous(&self, address: u64) -> Result<bool, Resolution> {
        if self.page_size != PAGE {
            return Ok(false);
        }
        match self.uffd.continue_(address, PAGE).errno {
            Some(Errno::AGAIN) => Err(Resolution::Blocked),
            Some(Errno::NOENT) => Err(Resolution::NotCovered),
            Some(Errno::SRCH) => Err(Resolution::Gone),
            errno => Ok(errno == Some(Errno::INVAL)),
        }
    }

    pub(super) fn waiter(self: &Arc<Self>, shared: &Arc<Shared>, fault: &Fault) -> Waiter {
        let (target, shared, mut fault) = (Arc::clone(self), Arc::clone(shared), fault.clone());
        Box::new(move |outcome| {
            fault.failure = match outcome {
                // Another engine stopped in the middle of it: the next fetch is ours.
                Err(error) if error.given_up() && !shared.stopped.load(Relaxed) => None,
                outcome => outcome.as_ref().err().map(Arc::clone),
            };
            target.serve(&shared, fault);
        })
    }

    pub(super) fn settle(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut fault: Fault,
        resolution: Resolution,
    ) {
        let outcome = match resolution {
            Resolution::Copied | Resolution::Zeroed if fault.is_relayed() => Outcome::Relayed,
            Resolution::Copied => Outcome::Copied,
            Resolution::Shared => Outcome::Shared,
            Resolution::Zeroed => Outcome::Zeroed,
            Resolution::Woken => Outcome::Woken,
            Resolution::NotCovered => {
                let _ = self.uffd.wake(fault.address, self.page_size);
                Outcome::Abandoned
            }
            Resolution::Gone => {
                self.end(shared);
                Outcome::Abandoned
            }
            Resolution::Blocked | Resolution::Refused(_) => {
                if fault.refused.get_or_insert_with(Instant::now).elapsed() < REFUSAL_DEADLINE {
                    return self.defer(shared, fault);
                }
                let errno = match resolution {
                    Resolution::Refused(errno) => errno,
                    _ => Errno::AGAIN,
                };
                let error = Error::kernel("the kernel refuses to fill a page", errno);
                if fault.failure.is_some() {
                    // Neither filled nor poisoned: what is left is to end the target.
                    return self.kill(shared, &fault, &error);
                }
                fault.failure = Some(Arc::new(error));
                return self.serve(shared, fault);
            }
        };
        shared.count(outcome, &fault);
    }

    /// Puts a fault aside. The kernel refuses until the thread that caused an event has run again:
    /// milliseconds, so the pause starts small and doubles.
    fn defer(&self, shared: &Shared, mut fault: Fault) {
        fault.due = Instant::now() + Duration::from_micros(100 << fault.attempts.min(6));
        fault.attempts += 1;
        let mut deferred = lock(&self.deferred);
        if self.gone.load(Relaxed) {
            return shared.count(Outcome::Abandoned, &fault);
        }
        match deferred.entry((fault.address, fault.protected)) {
            Entry::Vacant(entry) => {
                entry.insert(fault);
            }
            Entry::Occupied(mut entry) => {
                let first = entry.get_mut();
                first.joined += 1 + fault.joined;
                first.failure = first.failure.take().or(fault.failure);
                first.answer = first.answer.take().or(fault.answer);
            }
        }
        shared.deferred.store(true, Release);
        shared.poke();
    }

    /// The page cannot be had. The target must neither read zeros nor wait for ever: the page is
    /// poisoned, or, where the kernel cannot do that, the target is killed.
    pub(super) fn give_up(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut fault: Fault,
        error: Arc<Error>,
    ) {
        // Held meanwhile: what was released is not poisoned, whoever has those addresses then.
        let regions = self.regions();
        if self.gone.load(Relaxed) {
            return shared.count(Outcome::Abandoned, &fault);
        }
        let poison = || self.uffd.poison(fault.address, self.page_size);
        let progress = match &self.owner {
            Some(owner) => owner.lose(fault.address, &error, &poison),
            None => poison(),
        };
        drop(regions);
        let resolution = match progress.errno {
            None => {
                self.report(shared, &fault, &error, "poisoned: touching it raises SIGBUS");
                return shared.count(Outcome::Poisoned, &fault);
            }
            Some(Errno::EXIST) => {
                let _ = self.uffd.wake(fault.address, self.page_size);
                return shared.count(Outcome::Woken, &fault);
            }
            Some(Errno::NOENT) => Resolution::NotCovered,
            Some(Errno::SRCH) => Resolution::Gone,
            Some(Errno::AGAIN) => Resolution::Blocked,
            Some(_) => return self.kill(shared, &fault, &error),
        };
        fault.failure = Some(error);
        self.settle(shared, fault, resolution);
    }

    fn kill(&self, shared: &Shared, fault: &Fault, error: &Error) {
        match self.kill_process() {
            Ok(_) => {
                self.report(shared, fault, error, "the process was killed");
                shared.count(Outcome::Killed, fault);
                // It may wait for a page even while it ends, in the kernel: only closing our
                // descriptor of its memory ends that.
                self.end(shared);
            }
            Err(why) => {
                let consequence = format!("and the process could not be killed: {why}");
                self.report(shared, fault, error, &consequence);
                shared.count(Outcome::Abandoned, fault);
            }
        }
    }

    /// Kills the process, which nobody serves any more. See [`kill`].
    pub(super) fn kill_process(&self) -> Result<bool, String> {
        match &*lock(&self.process) {
            Some(process) => kill(process.pid, &process.pidfd),
            None => Err("nobody said which it is".to_owned()),
        }
    }

    /// Nobody will serve it any more, and nobody can tell it; see [`strand`].
    pub(super) fn strand(&self) -> bool {
        let uffd = self.uffd.try_clone();
        uffd.is_ok_and(|uffd| strand(uffd, &self.regions(), self.page_size))
    }

    /// Nothing can be done for it any more.
    pub(super) fn end(&self, shared: &Shared) {
        self.gone.store(true, Relaxed);
        shared.forget(self.id);
    }

    fn report(&self, shared: &Shared, fault: &Fault, error: &Error, consequence: &str) {
        let process = self.pid().map_or("pid unknown".to_owned(), |pid| format!("pid {pid}"));
        shared.report(&format!(
            "target {} ({process}): page at {:#x} cannot be had: {error}; {consequence}",
            self.id, fault.address
        ));
    }

    /// Answers a touch of the beacon page with the target's number.
    pub(super) fn answer_beacon(&self, shared: &Shared, fault: Fault) {
        let mut page = [0; PAGE as usize];
        page[..8].copy_from_slice(&self.id.to_ne_bytes());
        let progress = self.uffd.copy(fault.address, &page);
        match progress.errno {
            None => {}
            Some(Errno::AGAIN) => self.defer(shared, fault),
            Some(_) => {
                let _ = self.uffd.wake(fault.address, PAGE);
            }
        }
    }
}

/// Kills a process that would wait for ever; never this one, whose number is compared. False if it has
/// ended already.
///
/// # Errors
/// Why it lives on.
pub(crate) fn kill(pid: i32, pidfd: impl AsFd) -> Result<bool, String> {
    if pid.unsigned_abs() == std::process::id() {
        return Err("it is this very process".to_owned());
    }
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(errno) => Err(errno.to_string()),
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while one of these is held leaves plain data in a usable state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes all that is missing in the regions raise SIGBUS. Where that cannot be done (the kernel: Linux
/// < 6.6) false, and the descriptor stays open for ever: if it was closed, whoever touches what is missing
/// would read zeros.
pub(super) fn strand(uffd: Userfaultfd, regions: &RegionMap, page_size: u64) -> bool {
    let poison = |at, bytes| uffd.poison(at, bytes);
    let poisoned = regions.ranges().all(|(start, bytes)| {
        // Not there any more: nobody reads it.
        let outcome = fill_gaps(start, bytes, page_size, poison);
        matches!(outcome, None | Some(Errno::SRCH | Errno::NOENT))
    });
    if !poisoned {
        std::mem::forget(uffd);
    }
    poisoned
}
