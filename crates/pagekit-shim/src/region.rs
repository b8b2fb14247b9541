//! Mappings that became ours.
//!
//! How a region is made, and why in this order:
//! 1. The memory is mapped without any access. A locked or pre-populated mapping would read holes of
//!    the shared file at once, and a hole that is read unregistered becomes a zero page for everyone.
//! 2. Zero runs are mapped over as anonymous memory: they never trap, and cost nothing until written.
//! 3. The userfaultfd goes to the server as it was made: the server negotiates it, because it may
//!    have a right (to fork events) that this process lacks.
//! 4. What is left is registered, MISSING only, so that the kernel's fault-around keeps working.
//! 5. Only now the memory gets the access that the program asked for.
//!
//! Discards: `MADV_DONTNEED` of a private file mapping reads the file again, and so does a region. But
//! where the program punched a hole into its file first (QEMU's balloon and free-page reporting do),
//! zeros belong there for good: the zero page is installed after the drop, without a mapping of its
//! own for each page given back.
//!
//! Huge pages are refused silently: writing one byte of a zero run would take 2 MiB.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_void};
use pagekit::page::{complement, Run, PAGE};
use pagekit::wire::{Mapping, Message};
use uffd::{Access, Errno, Opening, RegisterMode, Userfaultfd};

use crate::attach::Connection;
use crate::hooks::{real_madvise, real_mmap};
use crate::settings::{Settings, Supply};

/// The arguments of the program's `mmap`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) address: *mut c_void,
    pub(crate) length: usize,
    pub(crate) protection: c_int,
    pub(crate) flags: c_int,
    pub(crate) offset: u64,
}

/// Why the program's `mmap` fails.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) errno: c_int,
    pub(crate) text: String,
}

impl From<String> for Refusal {
    fn from(text: String) -> Refusal {
        Refusal { errno: libc::EIO, text }
    }
}

/// A mapping of ours.
#[derive(Debug)]
pub(crate) struct Region {
    start: u64,
    /// What it maps of the file.
    run: Run,
    protection: c_int,
    /// None in a plain mapping.
    pub(crate) served: Option<Served>,
    /// Runs of the file that the program punched, rising.
    punched: Vec<Run>,
}

/// What keeps a region served.
#[derive(Debug)]
pub(crate) struct Served {
    /// Held so that the death of the server does not turn what is missing into zeros.
    pub(crate) uffd: Userfaultfd,
    pub(crate) target: u64,
    /// A page that tells a child its number; none if children are kept out.
    pub(crate) beacon: Option<u64>,
    zero_runs: Vec<Run>,
}

static REGIONS: Mutex<Vec<Region>> = Mutex::new(Vec::new());
static ANY: AtomicBool = AtomicBool::new(false);

/// Whether there is a region at all.
pub(crate) fn any() -> bool {
    ANY.load(Relaxed)
}

/// All regions.
pub(crate) fn all() -> MutexGuard<'static, Vec<Region>> {
    REGIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the mapping that the program wanted of its file.
pub(crate) fn map(settings: &Settings, wanted: &Wanted) -> Result<*mut c_void, Refusal> {
    if wanted.flags & libc::MAP_TYPE != libc::MAP_PRIVATE {
        return Err(Refusal {
            errno: libc::EACCES,
            text: "only private mappings of it are served (for QEMU: share=off)".to_owned(),
        });
    }
    let region = match &settings.supply {
        Supply::Plain { memory } => map_plain_file(memory, wanted)?,
        Supply::Server { socket, wish } => {
            let connection = Connection::open(socket)?;
            let attach = Message::Attach {
                wish: *wish,
                offset: wanted.offset,
                length: wanted.length as u64,
            };
            let (offer, descriptors) = connection.ask(&attach, None)?;
            let Message::Offer { mapping, fork_events, zero_runs } = offer else {
                return Err(format!("the server answered {offer:?} to an attach").into());
            };
            let offer = Offer { mapping, fork_events, zero_runs, descriptors };
            let region = accept(offer, wanted, &connection)?;
            crate::watch::server(connection)?;
            region
        }
    };
    let start = region.start;
    all().push(region);
    ANY.store(true, Relaxed);
    Ok(start as *mut c_void)
}

struct Offer {
    mapping: Mapping,
    fork_events: bool,
    zero_runs: Vec<Run>,
    descriptors: Vec<OwnedFd>,
}

fn map_plain_file(memory: &std::path::Path, wanted: &Wanted) -> Result<Region, Refusal> {
    let file = std::fs::File::open(memory).map_err(|error| {
        format!("the memory file {} cannot be opened: {error}", memory.display())
    })?;
    map_plain(&file, wanted)
}

fn map_plain(file: impl AsFd, wanted: &Wanted) -> Result<Region, Refusal> {
    let start = new_mapping(wanted, wanted.protection, wanted.flags, Some(&file), wanted.offset)?;
    let pages = (wanted.length as u64).div_ceil(PAGE);
    let run = Run { start: wanted.offset / PAGE, pages };
    Ok(Region { start, run, protection: wanted.protection, served: None, punched: Vec::new() })
}

fn accept(offer: Offer, wanted: &Wanted, connection: &Connection) -> Result<Region, Refusal> {
    let mut descriptors = offer.descriptors.into_iter();
    let file = match offer.mapping {
        Mapping::Copy => None,
        _ => Some(descriptors.next().ok_or_else(|| "the offer came without its file".to_owned())?),
    };
    if let (Mapping::Plain, Some(file)) = (offer.mapping, &file) {
        return map_plain(file, wanted);
    }
    let device = descriptors.next();

    let pages = (wanted.length as u64).div_ceil(PAGE);
    let run = Run { start: wanted.offset / PAGE, pages };
    // MAP_POPULATE and MAP_LOCKED would touch pages before they are registered.
    let flags = wanted.flags & !(libc::MAP_POPULATE | libc::MAP_LOCKED);
    let start = new_mapping(wanted, libc::PROT_NONE, flags, file.as_ref(), wanted.offset)?;
    let address_of = |page: u64| start + (page - run.start) * PAGE;
    if file.is_some() {
        for zero in &offer.zero_runs {
            map_anonymous(address_of(zero.start), zero.bytes(), libc::PROT_NONE)?;
        }
    }
    advise_all(start, run.bytes(), libc::MADV_NOHUGEPAGE)?;
    if !offer.fork_events {
        advise_all(start, run.bytes(), libc::MADV_DONTFORK)?;
    }

    let uffd = match &device {
        Some(device) => Userfaultfd::open(Opening::Device(device.as_fd())),
        None => Userfaultfd::open(Opening::SystemCall(Access::Full)),
    };
    let uffd = uffd.map_err(|error| format!("no userfaultfd for this process: {error}"))?;
    let beacon = match offer.fork_events {
        true => Some(map_beacon()?),
        false => None,
    };
    let (ready, _) = connection.ask(&Message::Region { start, beacon }, Some(uffd.as_fd()))?;
    let Message::Ready { target } = ready else {
        return Err(format!("the server answered {ready:?} to a region").into());
    };
    let register = |start: u64, bytes: u64| {
        uffd.register(start, bytes, RegisterMode::Missing)
            .map_err(|error| format!("{bytes} bytes at {start:#x} cannot be registered: {error}"))
    };
    for part in complement(run, &offer.zero_runs) {
        register(address_of(part.start), part.bytes())?;
    }
    if let Some(beacon) = beacon {
        register(beacon, PAGE)?;
    }
    // SAFETY: all of it was mapped above and is not known to the program yet.
    let allowed = unsafe { libc::mprotect(start as _, run.bytes() as usize, wanted.protection) };
    if allowed != 0 {
        return Err(last_error("the mapping's access cannot be set").into());
    }
    let served = Served { uffd, target, beacon, zero_runs: offer.zero_runs };
    Ok(Region {
        start,
        run,
        protection: wanted.protection,
        served: Some(served),
        punched: Vec::new(),
    })
}

/// A mapping where the program wants it; anonymous without a file.
fn new_mapping(
    wanted: &Wanted,
    protection: c_int,
    flags: c_int,
    file: Option<&impl AsFd>,
    offset: u64,
) -> Result<u64, Refusal> {
    use std::os::fd::AsRawFd;
    let (flags, descriptor, offset) = match file {
        Some(file) => (flags, file.as_fd().as_raw_fd(), offset),
        None => (flags | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0),
    };
    // SAFETY: the program asked for a mapping with this address, length and kind of flags, and this
    // is the one it gets.
    let mapped = unsafe {
        real_mmap(wanted.address, wanted.length, protection, flags, descriptor, offset as i64)
    };
    if mapped == libc::MAP_FAILED {
        let error = std::io::Error::last_os_error();
        return Err(Refusal {
            errno: error.raw_os_error().unwrap_or(libc::ENOMEM),
            text: format!("the kernel refuses the mapping: {error}"),
        });
    }
    Ok(mapped as u64)
}

/// Puts anonymous memory over a part of a region.
fn map_anonymous(start: u64, bytes: u64, protection: c_int) -> Result<(), String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range lies inside a mapping of ours.
    let mapped = unsafe { real_mmap(start as _, bytes as usize, protection, flags, -1, 0) };
    match mapped == libc::MAP_FAILED {
        true => Err(last_error("a zero run cannot be mapped (vm.max_map_count?)")),
        false => Ok(()),
    }
}

/// A page that nobody has touched.
fn map_beacon() -> Result<u64, String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page =
        unsafe { real_mmap(std::ptr::null_mut(), PAGE as usize, libc::PROT_READ, flags, -1, 0) };
    match page == libc::MAP_FAILED {
        true => Err(last_error("no page for telling children who they are")),
        false => Ok(page as u64),
    }
}

fn advise_all(start: u64, bytes: u64, advice: c_int) -> Result<(), String> {
    // SAFETY: the range is a mapping of ours, and these advices change no content.
    match unsafe { real_madvise(start as _, bytes as usize, advice) } {
        0 => Ok(()),
        // A kernel without huge pages refuses advice about them.
        _ if advice == libc::MADV_NOHUGEPAGE => Ok(()),
        _ => Err(last_error("advice on the mapping is refused")),
    }
}

fn last_error(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// What becomes of the program's `madvise`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Advised {
    /// Not about a region, or nothing that a region treats differently.
    PassOn,
    /// It is done.
    Done,
    /// It fails with this errno.
    Refused(c_int),
}

/// `MADV_COLLAPSE` and `MADV_DONTNEED_LOCKED`, which libc does not name on every system.
const MADV_COLLAPSE: c_int = 25;
const MADV_DONTNEED_LOCKED: c_int = 24;

/// Treats the advices that mean something else on a region than on the mapping behind it.
pub(crate) fn advise(start: u64, length: u64, advice: c_int) -> Advised {
    let end = start.saturating_add(length);
    let regions = all();
    let touched =
        |region: &&Region| start < region.start + region.run.bytes() && end > region.start;
    if !regions.iter().any(|region| touched(&region)) {
        return Advised::PassOn;
    }
    match advice {
        libc::MADV_HUGEPAGE | MADV_COLLAPSE => Advised::Done,
        // As the kernel answers for a private file mapping; a copied region is none to the kernel.
        libc::MADV_FREE => Advised::Refused(libc::EINVAL),
        libc::MADV_REMOVE => Advised::Refused(libc::EACCES),
        libc::MADV_DOFORK if regions.iter().filter(touched).any(Region::kept_from_children) => {
            Advised::Refused(libc::EINVAL)
        }
        libc::MADV_DONTNEED | MADV_DONTNEED_LOCKED => {
            // SAFETY: the program's own call, made here so that zeros can follow it.
            if unsafe { real_madvise(start as _, length as usize, advice) } != 0 {
                return Advised::Refused(
                    std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
                );
            }
            for region in regions.iter().filter(touched) {
                if let Err(text) = region.zero_what_is_punched(start, end, advice) {
                    crate::end(&format!("memory that was given back cannot be cleared: {text}"));
                }
            }
            Advised::Done
        }
        _ => Advised::PassOn,
    }
}

/// The program punched a hole into its file.
pub(crate) fn punched(offset: u64, length: u64) {
    let hole = Run::between(offset.div_ceil(PAGE), (offset.saturating_add(length)) / PAGE);
    if hole.pages == 0 {
        return;
    }
    for region in all().iter_mut() {
        insert(&mut region.punched, hole);
    }
}

/// Adds a run to rising runs, merging what touches it.
fn insert(runs: &mut Vec<Run>, run: Run) {
    let from = runs.partition_point(|other| other.end() < run.start);
    let to = runs.partition_point(|other| other.start <= run.end());
    let merged = runs[from..to].iter().fold(run, |all, other| {
        Run::between(all.start.min(other.start), all.end().max(other.end()))
    });
    runs.splice(from..to, [merged]);
}

impl Region {
    fn kept_from_children(&self) -> bool {
        self.served.as_ref().is_some_and(|served| served.beacon.is_none())
    }

    /// After the pages between `start` and `end` were dropped: zeros where the file has holes now.
    fn zero_what_is_punched(&self, start: u64, end: u64, advice: c_int) -> Result<(), String> {
        let first = start.max(self.start);
        let last = end.min(self.start + self.run.bytes());
        let dropped = Run::between(
            self.run.start + (first - self.start) / PAGE,
            self.run.start + (last - self.start).div_ceil(PAGE),
        );
        let from = self.punched.partition_point(|hole| hole.end() <= dropped.start);
        for hole in self.punched[from..].iter().take_while(|hole| hole.start < dropped.end()) {
            let hole = Run::between(hole.start.max(dropped.start), hole.end().min(dropped.end()));
            match &self.served {
                // Zero runs are anonymous: they read zero after a drop by themselves.
                Some(served) => {
                    for part in complement(hole, &served.zero_runs) {
                        self.install_zeros(&served.uffd, part, advice)?;
                    }
                }
                None => map_anonymous(self.address_of(hole.start), hole.bytes(), self.protection)?,
            }
        }
        Ok(())
    }

    fn install_zeros(&self, uffd: &Userfaultfd, run: Run, advice: c_int) -> Result<(), String> {
        let (mut at, end) = (self.address_of(run.start), self.address_of(run.end()));
        let mut refusals = 0;
        while at < end {
            let progress = uffd.zeropage(at, end - at);
            at += progress.done as u64;
            match progress.errno {
                None => break,
                Some(_) if progress.done > 0 => continue,
                // Another thread touched the page in between and got content: drop it again.
                Some(Errno::EXIST) if refusals < 1000 => {
                    // SAFETY: a page that the program is giving back.
                    unsafe { real_madvise(at as _, PAGE as usize, advice) };
                }
                // An event is on its way to the server; it passes.
                Some(Errno::AGAIN) if refusals < 1_000_000 => std::thread::yield_now(),
                Some(errno) => return Err(format!("page at {at:#x}: {errno}")),
            }
            refusals += 1;
        }
        Ok(())
    }

    fn address_of(&self, page: u64) -> u64 {
        self.start + (page - self.run.start) * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_merge() {
        let mut runs = Vec::new();
        for (start, end) in [(10, 12), (20, 22), (12, 14), (5, 6), (13, 21)] {
            insert(&mut runs, Run::between(start, end));
        }
        assert_eq!(runs, [Run::between(5, 6), Run::between(10, 22)]);
    }
}
