//! Memory of this very process that fills itself: a buffer over a template.
//!
//! ```text
//!   thread of the program ── touches ──► mapping of the template's file, private
//!                                           │ missing: not in the file yet
//!              ┌── waits ───────────────────┤                   └── SIGBUS ──┐
//!              ▼                                                             ▼
//!   "thread": the engine of this process fetches,     "signal": the thread itself fetches and
//!             publishes, wakes                                  publishes, in its signal handler
//! ```
//!
//! Some facts, and what follows:
//! - The thread that touches a page may hold any lock of the program, and Python's. So whoever serves it
//!   takes none of those, and writes nothing to anybody: the engine is a quiet one.
//! - A page that cannot be had can only be told by a signal to who touches it. So everything that reads
//!   through a [`Map`], and not behind its back, asks the template first, and gets an error.
//! - With a userfaultfd for user mode only (all that unprivileged users get where nothing was done for
//!   them), and with SIGBUS instead of events, the kernel cannot wait: a system call that meets a missing
//!   page fails with EFAULT. [`Map::populate`] first.
//! - Without any userfaultfd everything is loaded before it is mapped.
//! - A thread that blocks SIGBUS is ended by it. Threads of other people's libraries block what they
//!   like, so memory is served by signals only on request.
//! - Events (unmapping, moving) are not asked for: the memory belongs to the map, and whoever unmaps or
//!   moves it by hand breaks it. `MADV_DONTNEED` is harmless: what was written is lost, and the template
//!   read again.
//!
//! | file | what |
//! |---|---|
//! | `space` | address space, what children inherit of it |
//! | `house` | what all maps of a process share |
//! | `table` | maps by address, for who may take no lock |
//! | `losses` | what cannot be had, and why |
//! | `signal` | the handler of SIGBUS |
//! | `fork` | children |

mod fork;
mod house;
mod losses;
mod signal;
mod space;
mod table;

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicU8, Ordering::*};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};

use rustix::mm::{madvise, Advice};
use rustix::process::{getpid, pidfd_open, PidfdFlags};
use uffd::{Access, Errno, Features, Progress, RegisterMode, Userfaultfd};

use crate::backend::{copy::Copy, share::Share, Backend};
use crate::delivery::Delivery;
use crate::engine::region::RegionMap;
use crate::engine::{self, NewTarget, Owner, Target};
use crate::error::{Error, Result};
use crate::page::{complement, find, Run, PAGE};
use crate::process::Ours;
use crate::template::{self, Template, USUAL_REQUEST};
use fork::{Identity, Ward};
use house::House;
use losses::{Losses, Stand};
use space::{Space, HUGE};
use table::registry;

/// Bytes that are brought at once where much is read: so many requests as there are workers.
const PIECE: u64 = 32 << 20;
/// Bytes that are searched at once.
const SEARCHED: u64 = 1 << 20;

/// What is said where nothing better is known.
const ORPHANED: &str = "the process that served it is gone";
const FORGOTTEN: &str = "the reason is not known any more";

/// Who brings a page that is touched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Faults {
    /// A thread, where there is a userfaultfd; else everything is loaded first.
    #[default]
    Auto,
    /// A thread of ours, while the one that touches it waits.
    Thread,
    /// The thread that touches it, in a handler of SIGBUS.
    Signal,
}

impl std::str::FromStr for Faults {
    type Err = Error;

    fn from_str(text: &str) -> Result<Faults> {
        match text {
            "auto" => Ok(Faults::Auto),
            "thread" => Ok(Faults::Thread),
            "signal" => Ok(Faults::Signal),
            _ => Err(Error::usage(
                format!("faults={text:?} is not understood"),
                "it is auto, thread or signal",
            )),
        }
    }
}

/// How to map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whether the memory can be written. What is written stays in this process.
    pub writable: bool,
    /// Who brings a page that is touched.
    pub faults: Faults,
    /// Bytes of the memory's own pages: 4096, or 2 MiB from the kernel's pool of huge pages.
    pub page_size: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { writable: false, faults: Faults::Auto, page_size: PAGE }
    }
}

/// Who brings a page that is touched, in fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum How {
    /// Nobody: everything was loaded before.
    Loaded,
    /// The engine of this process.
    Thread,
    /// Who touches it.
    Signal,
    /// The engine of the process that this one was forked from.
    Parent,
    /// Nobody: it is not in this process, a child.
    Absent,
}

impl How {
    const ALL: [How; 5] = [How::Loaded, How::Thread, How::Signal, How::Parent, How::Absent];

    fn name(self) -> &'static str {
        match self {
            How::Loaded => "loaded",
            How::Thread => "thread",
            How::Signal => "signal",
            How::Parent => "parent",
            How::Absent => "absent",
        }
    }
}

/// What a map counts.
#[derive(Debug, serde::Serialize)]
pub struct Statistics {
    /// Who brings a page that is touched: `thread`, `signal`, `loaded` (nobody: everything was loaded
    /// first), `parent` (the process that this one was forked from), `absent` (nobody: it is not in
    /// this process).
    pub faults: &'static str,
    /// Whether system calls can meet missing pages. If not they fail with EFAULT.
    pub kernel_faults: bool,
    /// Why nobody serves it, or not in full.
    pub reason: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of the memory's own pages.
    pub page_size: u64,
    /// Whether it can be written.
    pub writable: bool,
    /// Touches of missing pages, of this process.
    pub demand_faults: u64,
    /// Pages that could not be had, ever.
    pub failures: u64,
    /// Pages that raise SIGBUS now.
    pub lost_pages: u64,
    /// Maps in children of this process, and theirs, that it serves: of all its maps together.
    pub children: u64,
    /// What serves all maps of this process.
    pub engine: Option<engine::Statistics>,
    /// The template, in the process that opened it.
    pub template: Option<template::Statistics>,
}

/// What a map is served from, for all processes that have it.
#[derive(Debug)]
struct Supply {
    id: u64,
    start: u64,
    page_size: u64,
    pieces: Vec<(u64, Run)>,
    template: Arc<Template>,
    backend: Arc<dyn Backend>,
    delivery: Arc<Delivery>,
    losses: Losses,
    /// Of the template's file.
    file: Identity,
}

impl Supply {
    fn page_of(&self, address: u64) -> u64 {
        (address - self.start) / PAGE
    }
}

/// Who is told by the engine what cannot be had.
#[derive(Debug)]
struct Lost {
    supply: Arc<Supply>,
    here: bool,
}

impl Lost {
    fn here(supply: Arc<Supply>) -> Lost {
        Lost { supply, here: true }
    }

    fn in_a_child(supply: Arc<Supply>) -> Lost {
        Lost { supply, here: false }
    }
}

impl Owner for Lost {
    fn lose(&self, address: u64, error: &Error, poison: &dyn Fn() -> Progress) -> Progress {
        let mut progress = Progress { done: 0, errno: Some(Errno::INVAL) };
        self.supply.losses.lose(self.supply.page_of(address), error, || {
            progress = poison();
            match progress.errno {
                None if self.here => Some(Stand::Poison),
                None | Some(Errno::EXIST | Errno::NOENT | Errno::SRCH | Errno::AGAIN) => None,
                Some(_)
                    if self.here && self.supply.page_size == PAGE && Space::bar(address, PAGE) =>
                {
                    // Who waits there finds it when woken, as where somebody was first.
                    progress.errno = Some(Errno::EXIST);
                    Some(Stand::Nothing)
                }
                Some(_) => None,
            }
        });
        progress
    }
}

/// What serves a map in the process that made it.
#[derive(Debug)]
struct Service {
    uffd: Userfaultfd,
    target: Option<Arc<Target>>,
    /// Zero by the template's map, and registered all the same.
    zero_runs: Vec<Run>,
}

/// Memory of this process that fills itself from a template. Dropping it unmaps it.
#[derive(Debug)]
pub struct Map {
    space: Space,
    writable: bool,
    how: AtomicU8,
    supply: Ours<Arc<Supply>>,
    service: Ours<Option<Service>>,
    kernel_faults: bool,
    /// Why it is not served, or not in full.
    reason: OnceLock<String>,
    house: Option<&'static House>,
    /// In a child: leaked by the one before it, dropped by the one that it belongs to.
    ward: AtomicPtr<Ward>,
    /// Where the last fetch of a signal handler ended, and how many pages it asked for.
    next: AtomicU64,
    window: AtomicU64,
    signals: AtomicU64,
}

impl Map {
    /// Maps `template`.
    ///
    /// # Errors
    /// `Usage` (a page size that there is not, or that does not fit the template or the way of
    /// serving), `Permission` (who is to bring pages was given, and there is no userfaultfd for it),
    /// `Unsupported` (no free huge pages), `Kernel`; and those of the source, where everything must be
    /// loaded first.
    pub fn new(
        template: Arc<Template>,
        delivery: &Arc<Delivery>,
        options: Options,
    ) -> Result<Arc<Map>, Arc<Error>> {
        let (how, uffd) = Map::plan(delivery, options)?;
        if how == How::Loaded {
            template.load(USUAL_REQUEST, None)?;
        }
        template.check()?;
        let huge = options.page_size == HUGE;
        let space = match huge {
            true => Space::of_huge_pages(&template, options.writable)?,
            false => Space::of_file(&template, options.writable)?,
        };
        let backend: Arc<dyn Backend> = if huge { Arc::new(Copy) } else { Arc::new(Share) };
        let house = uffd.is_some().then(House::of_this_process).transpose()?;
        let supply = Arc::new(Supply {
            id: house.map_or(0, House::number),
            start: space.start,
            page_size: options.page_size,
            pieces: space.pieces.clone(),
            backend,
            delivery: Arc::clone(delivery),
            losses: Losses::new()?,
            file: Identity::of(template.cache().readonly()),
            template,
        });
        signal::install()?;
        fork::install();
        let service = match (uffd, house) {
            (Some(uffd), Some(house)) => {
                space.children(space::Children::KeepOut);
                Some(Service::start(house, &supply, uffd, how)?)
            }
            _ => None,
        };
        space.open()?;
        if how == How::Loaded && huge {
            // SAFETY: the memory was just mapped, readable and writable or made so for this once.
            unsafe { space.fill(&supply.template)? };
        }
        let kernel_faults = match how {
            How::Thread => delivery.access() == Some(Access::Full),
            How::Signal => false,
            _ => true,
        };
        let reason = match how {
            How::Loaded => Some("there is no userfaultfd, so all of it was loaded first"),
            How::Thread if kernel_faults => None,
            How::Thread => Some("the userfaultfd that this user may have is for user mode only"),
            _ => Some("a signal cannot be raised in the middle of a system call"),
        };
        let reason = reason.map(|reason| match (how, delivery.check()) {
            (How::Signal, _) | (_, Ok(())) => reason.to_owned(),
            (_, Err(error)) => format!("{reason}: {error}"),
        });
        let map = Arc::new(Map {
            writable: options.writable,
            how: AtomicU8::new(how as u8),
            supply: Ours::new(supply),
            service: Ours::new(service),
            kernel_faults,
            reason: reason.map_or_else(OnceLock::new, OnceLock::from),
            house,
            ward: AtomicPtr::default(),
            next: AtomicU64::new(u64::MAX),
            window: AtomicU64::new(0),
            signals: AtomicU64::new(0),
            space,
        });
        let (start, bytes) = (map.space.start, map.space.bytes);
        registry().insert(Arc::as_ptr(&map), start, start + bytes);
        Ok(map)
    }

    fn plan(delivery: &Delivery, options: Options) -> Result<(How, Option<Userfaultfd>)> {
        if ![PAGE, HUGE].contains(&options.page_size) {
            return Err(Error::usage(
                format!("there are no pages of {} bytes", options.page_size),
                format!("page_size is {PAGE} or {HUGE}"),
            ));
        }
        if options.page_size == HUGE && options.faults == Faults::Signal {
            return Err(Error::usage(
                "a signal handler brings no huge pages",
                "use faults=\"thread\" with them",
            ));
        }
        let (how, features) = match options.faults {
            Faults::Auto | Faults::Thread => (How::Thread, Features::NONE),
            Faults::Signal => (How::Signal, Features::SIGBUS),
        };
        let uffd = delivery.open()?.map(|uffd| uffd.handshake(features).map(|()| uffd));
        match (uffd.transpose(), options.faults) {
            (Ok(Some(uffd)), _) => Ok((how, Some(uffd))),
            (Ok(None), Faults::Auto) => Ok((How::Loaded, None)),
            (Ok(None), _) => delivery.check().map(|()| (How::Loaded, None)),
            (Err(error), _) => Err(Error::kernel("the userfaultfd cannot be negotiated", error)),
        }
    }

    /// Where it begins. It stays there, and can be touched, as long as the value lives.
    pub fn address(&self) -> *mut u8 {
        self.space.start as *mut u8
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.space.bytes
    }

    /// Whether it can be written.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// # Errors
    /// `Usage` in a process that has not got it.
    pub fn check(&self) -> Result<()> {
        let here = self.space.process() == crate::process::current();
        match (here, self.how()) {
            (true, How::Absent) => Err(Error::usage(
                format!(
                    "the map is not in this process: {}",
                    self.reason.get().map_or("it could not be inherited", |reason| reason)
                ),
                "make one of its own in the child",
            )),
            (true, _) => Ok(()),
            (false, _) => Err(Error::usage(
                "the map is not in this process, which was not made by fork",
                "make one of its own in the child",
            )),
        }
    }

    /// Brings what of these bytes is missing, and waits for it.
    ///
    /// # Errors
    /// `Usage` if they are not all inside the map, or it is not in this process; those of the source.
    pub fn bring(&self, offset: u64, length: u64) -> Result<(), Arc<Error>> {
        let run = self.run(offset, length)?;
        let mut start = run.start;
        while start < run.end() {
            let end = (start + PIECE / PAGE).min(run.end());
            self.bring_run(Run::between(start, end))?;
            start = end;
        }
        Ok(())
    }

    /// Copies bytes at `offset` into `buffer`, bringing what is missing.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Arc<Error>> {
        self.bring(offset, buffer.len() as u64)?;
        // SAFETY: inside the map, as `bring` has checked, and readable.
        unsafe {
            let from = self.address().add(offset as usize);
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len());
        }
        Ok(())
    }

    /// The first offset of `needle` in the bytes from `start` to `end`, bringing what is missing as far
    /// as it searches.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub fn find(&self, needle: &[u8], start: u64, end: u64) -> Result<Option<u64>, Arc<Error>> {
        self.run(start, end.saturating_sub(start))?;
        if needle.is_empty() {
            return Ok((start <= end).then_some(start));
        }
        let mut at = start;
        while at + needle.len() as u64 <= end {
            let last = (at + SEARCHED.max(needle.len() as u64 * 2)).min(end);
            self.bring(at, last - at)?;
            // SAFETY: all inside the map, and readable; another thread may write there meanwhile, which
            // this C function does not mind.
            let found = unsafe {
                libc::memmem(
                    self.address().add(at as usize).cast(),
                    (last - at) as usize,
                    needle.as_ptr().cast(),
                    needle.len(),
                )
            };
            if !found.is_null() {
                return Ok(Some(found as u64 - self.space.start));
            }
            // What begins in front of the border may go on behind it.
            at = last - (needle.len() as u64 - 1);
            if last == end {
                break;
            }
        }
        Ok(None)
    }

    /// Begins to fetch these bytes, rounded outwards to pages, and waits for nothing. What cannot be
    /// had now is asked for again by whoever touches it. In a child it does nothing.
    ///
    /// # Errors
    /// `Usage` if they are not all inside the map, or it is not in this process.
    pub fn will_need(&self, offset: u64, length: u64) -> Result<()> {
        let run = self.run(offset, length)?;
        if let (How::Thread | How::Signal, Some(house)) = (self.how(), self.house) {
            let template = &self.supply.get()?.template;
            if run.pages > 0 && template.present_from(run) != run {
                house.fetch_ahead(template, run);
            }
        }
        Ok(())
    }

    /// Brings everything, and waits for it. Afterwards no touch waits for the source, and system calls
    /// do not meet missing pages.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub fn populate(&self) -> Result<(), Arc<Error>> {
        self.check()?;
        if matches!(self.how(), How::Thread | How::Signal) {
            self.supply.get()?.template.load(USUAL_REQUEST, None)?;
        }
        self.bring(0, self.size())
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let supply = self.supply.copied();
        let ours = self.supply.is_here();
        let target = self.service.get().ok().and_then(|service| service.as_ref()?.target.as_ref());
        let house = self.house.filter(|_| ours);
        Statistics {
            faults: self.how().name(),
            kernel_faults: self.kernel_faults,
            reason: self.reason.get().cloned(),
            size: self.size(),
            page_size: supply.page_size,
            writable: self.writable,
            demand_faults: target.map_or(0, |target| target.faults()) + self.signals.load(Relaxed),
            failures: supply.losses.ever(),
            lost_pages: if ours { supply.losses.len() as u64 } else { 0 },
            children: house.map_or(0, |house| house.ends().len() as u64),
            engine: house.map(|house| house.engine.statistics()),
            template: ours.then(|| supply.template.statistics()),
        }
    }

    fn how(&self) -> How {
        How::ALL[usize::from(self.how.load(Relaxed))]
    }

    /// The pages of bytes that must be inside.
    fn run(&self, offset: u64, length: u64) -> Result<Run> {
        self.check()?;
        match offset.checked_add(length) {
            Some(end) if end <= self.size() => {
                let end = if length == 0 { offset / PAGE } else { end.div_ceil(PAGE) };
                Ok(Run::between(offset / PAGE, end))
            }
            _ => Err(Error::usage(
                format!("{length} bytes at {offset} are not inside a map of {}", self.size()),
                "stay inside the map",
            )),
        }
    }

    fn bring_run(&self, run: Run) -> Result<(), Arc<Error>> {
        match self.how() {
            How::Loaded | How::Absent => Ok(()),
            How::Parent => self.touch(run),
            How::Thread | How::Signal => {
                let supply = self.supply.get()?;
                let service = self.service.get()?;
                let template = &supply.template;
                template.check()?;
                if template.present_from(run) != run {
                    self.fetch(template, run)?;
                }
                let Some(service) = service else { return Ok(()) };
                if supply.page_size != PAGE {
                    return self.fill_huge(run);
                }
                self.mend(supply, service, run)?;
                for zero in &service.zero_runs {
                    let start = zero.start.max(run.start);
                    let part = Run::between(start, zero.end().min(run.end()));
                    if part.pages > 0 {
                        space::put_zeros(&service.uffd, self.at(part.start), part.bytes());
                    }
                }
                Ok(())
            }
        }
    }

    /// Fetches what of `run` is absent: one request on this thread, others on the engine's.
    fn fetch(&self, template: &Arc<Template>, run: Run) -> Result<(), Arc<Error>> {
        loop {
            let (sender, receiver) = sync_channel(1);
            let waiter = Box::new(move |outcome: &Result<(), Arc<Error>>| {
                // The receiver lives until it got this one message.
                let _ = sender.send(outcome.clone());
            });
            let mut fetches = template.want_all(run, waiter);
            let mine = fetches.pop();
            for fetch in fetches {
                match self.house {
                    Some(house) => house.engine.submit(fetch),
                    None => fetch.finish(),
                }
            }
            if let Some(mine) = mine {
                mine.finish();
            }
            match receiver.recv().expect("a fetch always tells its waiters") {
                Err(error) if error.given_up() => {}
                outcome => return outcome,
            }
        }
    }

    /// Removes what stands in the place of pages that can be had again.
    fn mend(&self, supply: &Supply, service: &Service, run: Run) -> Result<()> {
        supply.losses.mend(run.start, run.end(), |page, stand| match stand {
            Stand::Poison => space::drop_page(self.at(page))
                .map_err(|errno| Error::kernel(format!("page {page} cannot be had again"), errno)),
            Stand::Nothing => {
                self.space.unbar(&supply.template, &service.uffd, page, self.at(page))
            }
        })
    }

    /// Has the huge pages of `run` filled, whose content is in the template.
    fn fill_huge(&self, run: Run) -> Result<(), Arc<Error>> {
        let pages = HUGE / PAGE;
        let supply = self.supply.get()?;
        let whole = Run::between(
            run.start - run.start % pages,
            run.end().next_multiple_of(pages).min(supply.template.whole().end()),
        );
        if whole != run {
            self.fetch(&supply.template, whole)?;
        }
        // One that was lost for a small page's sake.
        let starts = (whole.start..whole.end()).step_by(pages as usize);
        for start in starts {
            supply.losses.mend(start, start + pages, |_, _| {
                // SAFETY: a huge page of the map, in whose place stands a mark and nothing else.
                let dropped = unsafe {
                    madvise(self.at(start) as *mut _, HUGE as usize, Advice::LinuxDontNeed)
                };
                dropped.map_err(|errno| Error::kernel("a huge page cannot be had again", errno))
            })?;
            // SAFETY: inside the map, readable; the engine serves the fault, and all it needs is here.
            unsafe { std::ptr::read_volatile(self.at(start) as *const u8) };
        }
        Ok(())
    }

    /// In a child: lets the kernel touch every page of `run`, which tells of those that cannot be had.
    fn touch(&self, run: Run) -> Result<(), Arc<Error>> {
        let supply = self.supply.copied();
        let mut page = run.start;
        while page < run.end() {
            // Page by page behind one that failed, to find out which it is.
            let all = Run::between(page, run.end());
            if self.kernel_touches(all).is_ok() {
                return Ok(());
            }
            let one = Run { start: page, pages: 1 };
            match self.kernel_touches(one) {
                Ok(()) => {}
                Err(_) if self.ward().is_some_and(Ward::orphaned) => {
                    return Err(Arc::new(Error::Unavailable {
                        what: format!("page {page} cannot be had"),
                        error: std::io::Error::other(ORPHANED),
                    }));
                }
                Err(Errno::HWPOISON) => {
                    // The next one who asks may be luckier.
                    let _ = space::drop_page(self.at(page));
                    return Err(Arc::new(match supply.losses.reason(page) {
                        Some(reason) => reason.error(page),
                        None => Error::Unavailable {
                            what: format!("page {page} cannot be had"),
                            error: std::io::Error::other(FORGOTTEN),
                        },
                    }));
                }
                // The kernel may not wait here: a touch of our own, for better or worse.
                // SAFETY: inside the map, and readable.
                Err(_) => drop(unsafe { std::ptr::read_volatile(self.at(page) as *const u8) }),
            }
            page += 1;
        }
        Ok(())
    }

    fn kernel_touches(&self, run: Run) -> Result<(), Errno> {
        let (at, bytes) = (self.at(run.start) as *mut _, run.bytes() as usize);
        // SAFETY: our own mapping; the call only reads.
        unsafe { madvise(at, bytes, Advice::LinuxPopulateRead) }
    }

    fn at(&self, page: u64) -> u64 {
        self.space.start + page * PAGE
    }

    // For children.

    fn can_be_inherited(&self) -> bool {
        self.supply.copied().page_size == PAGE
            && matches!(self.how(), How::Thread | How::Signal | How::Parent)
    }

    /// This process, a child, has it, and `ward` stands for its tie.
    fn inherited(&self, ward: Arc<Ward>) {
        self.ward.store(Arc::into_raw(ward).cast_mut(), Relaxed);
        self.how.store(How::Parent as u8, Relaxed);
    }

    /// This process, a child, cannot have it.
    fn shut(&self, why: &str) {
        self.space.shut();
        let _ = self.reason.set(why.to_owned());
        self.how.store(How::Absent as u8, Relaxed);
    }

    fn ward(&self) -> Option<&Ward> {
        match self.how() {
            // SAFETY: put there by `inherited` of this process, and dropped with self.
            How::Parent => unsafe { self.ward.load(Relaxed).cast_const().as_ref() },
            _ => None,
        }
    }
}

impl Service {
    fn start(house: &House, supply: &Arc<Supply>, uffd: Userfaultfd, how: How) -> Result<Service> {
        for (start, run) in &supply.pieces {
            uffd.register(*start, run.bytes(), RegisterMode::MISSING)
                .map_err(|error| Error::kernel("memory cannot be registered", error))?;
        }
        let held =
            uffd.try_clone().map_err(|error| Error::kernel("no descriptor for a map", error))?;
        let target = (how == How::Thread).then(|| {
            let pid = getpid();
            let pidfd = pidfd_open(pid, PidfdFlags::empty())
                .map_err(|errno| Error::kernel("no descriptor of this process", errno))?;
            house.engine.add(NewTarget {
                uffd,
                process: Some((pid.as_raw_nonzero().get(), pidfd)),
                template: Arc::clone(&supply.template),
                backend: Arc::clone(&supply.backend),
                regions: RegionMap::of(supply.pieces.iter().copied()),
                beacon: None,
                page_size: supply.page_size,
                owner: Some(Arc::new(Lost::here(Arc::clone(supply)))),
                connection: None,
            })
        });
        house.list(supply);
        let registered: Vec<Run> = supply.pieces.iter().map(|(_, run)| *run).collect();
        let apart = complement(supply.template.whole(), &registered);
        let zero_runs = supply
            .template
            .zero_runs()
            .iter()
            .filter(|zero| find(&apart, zero.start).is_none())
            .copied()
            .collect();
        Ok(Service { uffd: held, target: target.transpose()?, zero_runs })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let here = self.space.process() == crate::process::current();
        if here {
            registry().remove(self);
        }
        if let (Ok(Some(service)), Some(house)) = (self.service.get(), self.house) {
            if let Some(target) = &service.target {
                house.engine.release(target);
            }
        }
        if let (true, Some(ward)) = (here, self.ward()) {
            ward.close();
            // SAFETY: leaked by `inherited` of this process, and used by nobody any more.
            drop(unsafe { Arc::from_raw(std::ptr::from_ref(ward)) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    fn map() -> Arc<Map> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 64 * PAGE as usize]).unwrap();
        let delivery = Arc::new(Delivery::probe());
        let spec = format!("file:{}", file.path().display());
        let layers: [&str; 0] = [];
        let template = Template::open(&spec, &layers, &delivery, Duration::ZERO).unwrap();
        Map::new(template, &delivery, Options { writable: true, ..Options::default() }).unwrap()
    }

    /// Whether the kernel can read a page of the map.
    fn readable(map: &Map, page: u64) -> bool {
        map.kernel_touches(Run { start: page, pages: 1 }).is_ok()
    }

    /// As before Linux 6.6.
    #[test]
    fn where_the_kernel_cannot_poison_a_page_of_nothing_stands_in() {
        let map = map();
        let error = Error::Integrity { message: "gone".to_owned() };
        let cannot = || Progress { done: 0, errno: Some(Errno::NOTTY) };
        let lost = Lost::here(Arc::clone(map.supply.copied()));
        assert_eq!(lost.lose(map.at(3), &error, &cannot).errno, Some(Errno::EXIST));
        assert_eq!(map.statistics().lost_pages, 1);
        assert!(!readable(&map, 3) && readable(&map, 2) && readable(&map, 4));
        let mut bytes = [0; 9];
        map.read(4 * PAGE - 4, &mut bytes).unwrap();
        assert_eq!((bytes, map.statistics().lost_pages), ([7; 9], 0));
        // It is as every other page again: dropped, it is read from the template.
        // SAFETY: inside the map, which is writable.
        unsafe { map.address().add(3 * PAGE as usize).write_volatile(8) };
        space::drop_page(map.at(3)).unwrap();
        map.read(3 * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 9]);
        // In a child nobody but the child can do that.
        let elsewhere = Lost::in_a_child(Arc::clone(map.supply.copied()));
        assert_eq!(elsewhere.lose(map.at(5), &error, &cannot).errno, Some(Errno::NOTTY));
        assert!(readable(&map, 5));
    }

    #[test]
    fn a_page_that_is_there_is_not_lost() {
        let map = map();
        let error = Error::Integrity { message: "gone".to_owned() };
        let there = || Progress { done: 0, errno: Some(Errno::EXIST) };
        let lost = Lost::here(Arc::clone(map.supply.copied()));
        // SAFETY: inside the map, which is writable.
        unsafe { map.address().write_volatile(8) };
        assert_eq!(lost.lose(map.at(0), &error, &there), there());
        map.bring(0, 1).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { map.address().read_volatile() }, 8, "what was written stays");
    }
}
