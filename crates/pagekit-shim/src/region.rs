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
//!
//! What the program unmaps, moves or maps over is followed, so that addresses that are used again are
//! never taken for ours. A region cannot grow, and cannot be moved while staying where it was.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_void};
use pagekit::page::{complement, Run, PAGE};
use pagekit::wire::shim::{Mapping, Message};
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
    /// What is left of it; one piece, unless the program took out a part.
    pieces: Vec<Piece>,
    protection: c_int,
    /// None in a plain mapping.
    pub(crate) served: Option<Served>,
    /// Runs of the file that the program punched, rising.
    punched: Vec<Run>,
}

/// Addresses, and what they map of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    start: u64,
    run: Run,
}

impl Piece {
    fn end(&self) -> u64 {
        self.start + self.run.bytes()
    }

    fn touches(&self, start: u64, end: u64) -> bool {
        start < self.end() && end > self.start
    }

    fn address_of(&self, page: u64) -> u64 {
        self.start + (page - self.run.start) * PAGE
    }

    /// The part between two addresses, if there is any; whole pages.
    fn part(&self, start: u64, end: u64) -> Option<Piece> {
        let first = (start.max(self.start) - self.start) / PAGE;
        let last = (end.min(self.end()).saturating_sub(self.start)).div_ceil(PAGE);
        let run = Run::between(self.run.start + first, self.run.start + last);
        (self.touches(start, end) && run.pages > 0)
            .then(|| Piece { start: self.start + first * PAGE, run })
    }
}

/// What keeps a region served.
#[derive(Debug)]
pub(crate) struct Served {
    /// For clearing what is given back.
    pub(crate) uffd: InTable,
    pub(crate) target: u64,
    /// A page that tells a child its number; none if children are kept out.
    pub(crate) beacon: Option<u64>,
    zero_runs: Vec<Run>,
}

/// A userfaultfd in the program's own descriptor table, where the program may have closed it, and may
/// have got the same number for something else. (The one that keeps the memory from turning into
/// zeros is in the table of a thread of ours: [`crate::watch`].)
#[derive(Debug)]
pub(crate) struct InTable(ManuallyDrop<Userfaultfd>);

impl From<Userfaultfd> for InTable {
    fn from(uffd: Userfaultfd) -> InTable {
        InTable(ManuallyDrop::new(uffd))
    }
}

impl Drop for InTable {
    fn drop(&mut self) {
        // Only a userfaultfd can be asked this.
        if uffd::handshake_needed(&*self.0).is_ok() {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
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
            if let Some(served) = &region.served {
                let held = served.uffd.0.as_fd().try_clone_to_owned();
                crate::watch::server(connection, held.map_err(|error| error.to_string())?)?;
            }
            region
        }
    };
    let mut regions = all();
    let Some(Piece { start, run }) = region.pieces.first().copied() else {
        return Err("a mapping without pages".to_owned().into());
    };
    // What was mapped there before, if anything, is not any more.
    cut_out(&mut regions, start, start + run.bytes());
    regions.push(region);
    ANY.store(true, Relaxed);
    Ok(start as *mut c_void)
}

/// Does what gives the addresses from `start` on to somebody else, and forgets what was there.
pub(crate) fn replacing(start: u64, length: u64, replace: impl FnOnce() -> bool) {
    // Held meanwhile: a region made at these addresses right after is not the one to forget.
    let mut regions = all();
    if replace() {
        cut_out(&mut regions, start, start.saturating_add(length.next_multiple_of(PAGE)));
    }
}

/// The program's `mremap`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    pub(crate) from: u64,
    pub(crate) old_length: u64,
    pub(crate) new_length: u64,
    pub(crate) flags: c_int,
}

/// Moves or shrinks a mapping by `remap`, which gives the new address; an errno if it cannot be done.
pub(crate) fn moving(wanted: &Move, remap: impl FnOnce() -> Option<u64>) -> Result<(), c_int> {
    let mut regions = all();
    let old_end = wanted.from.saturating_add(wanted.old_length);
    let touched = regions
        .iter()
        .any(|region| region.pieces.iter().any(|piece| piece.touches(wanted.from, old_end)));
    if touched && wanted.flags & libc::MREMAP_DONTUNMAP != 0 {
        return Err(libc::EINVAL);
    }
    let grows = wanted.new_length.div_ceil(PAGE) > wanted.old_length.div_ceil(PAGE);
    if touched && grows {
        crate::say("a mapping that is served cannot grow");
        return Err(libc::ENOMEM);
    }
    let Some(to) = remap() else { return Ok(()) };
    let length = wanted.new_length.next_multiple_of(PAGE);
    if to == wanted.from {
        cut_out(&mut regions, to.saturating_add(length), old_end.next_multiple_of(PAGE));
        return Ok(());
    }
    cut_out(&mut regions, to, to.saturating_add(length));
    for region in regions.iter_mut() {
        let moved = region.cut_out(wanted.from, old_end.next_multiple_of(PAGE));
        let kept = moved.iter().filter_map(|piece| piece.part(0, wanted.from + length));
        region.pieces.extend(
            kept.map(|piece| Piece { start: piece.start - wanted.from + to, run: piece.run }),
        );
    }
    Ok(())
}

/// Forgets what is mapped between two addresses.
fn cut_out(regions: &mut Vec<Region>, start: u64, end: u64) {
    regions.retain_mut(|region| {
        let cut = region.cut_out(start, end);
        // One that was just unmapped entirely is over; the server hears of it by itself.
        cut.is_empty() || !region.pieces.is_empty()
    });
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
    Ok(Region {
        pieces: vec![Piece { start, run }],
        protection: wanted.protection,
        served: None,
        punched: Vec::new(),
    })
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
    let piece = Piece { start, run };
    if file.is_some() {
        for zero in &offer.zero_runs {
            map_anonymous(piece.address_of(zero.start), zero.bytes(), libc::PROT_NONE)?;
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
        uffd.register(start, bytes, RegisterMode::MISSING)
            .map_err(|error| format!("{bytes} bytes at {start:#x} cannot be registered: {error}"))
    };
    for part in complement(run, &offer.zero_runs) {
        register(piece.address_of(part.start), part.bytes())?;
    }
    if let Some(beacon) = beacon {
        register(beacon, PAGE)?;
    }
    // SAFETY: all of it was mapped above and is not known to the program yet.
    let allowed = unsafe { libc::mprotect(start as _, run.bytes() as usize, wanted.protection) };
    if allowed != 0 {
        return Err(last_error("the mapping's access cannot be set").into());
    }
    let served = Served { uffd: uffd.into(), target, beacon, zero_runs: offer.zero_runs };
    Ok(Region {
        pieces: vec![piece],
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
    let touched = |region: &&Region| region.pieces.iter().any(|piece| piece.touches(start, end));
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

    /// Takes out what lies between two addresses, and gives it.
    fn cut_out(&mut self, start: u64, end: u64) -> Vec<Piece> {
        let mut rest = Vec::with_capacity(self.pieces.len() + 1);
        let mut cut = Vec::new();
        for piece in std::mem::take(&mut self.pieces) {
            match piece.part(start, end) {
                Some(part) => {
                    rest.extend(piece.part(0, part.start));
                    rest.extend(piece.part(part.end(), u64::MAX));
                    cut.push(part);
                }
                None => rest.push(piece),
            }
        }
        self.pieces = rest;
        cut
    }

    /// After the pages between `start` and `end` were dropped: zeros where the file has holes now.
    fn zero_what_is_punched(&self, start: u64, end: u64, advice: c_int) -> Result<(), String> {
        for dropped in self.pieces.iter().filter_map(|piece| piece.part(start, end)) {
            let from = self.punched.partition_point(|hole| hole.end() <= dropped.run.start);
            let holes = self.punched[from..].iter();
            for hole in holes.take_while(|hole| hole.start < dropped.run.end()) {
                let first = hole.start.max(dropped.run.start);
                let hole = Run::between(first, hole.end().min(dropped.run.end()));
                match &self.served {
                    // Zero runs are anonymous: they read zero after a drop by themselves.
                    Some(served) => {
                        for part in complement(hole, &served.zero_runs) {
                            let at = dropped.address_of(part.start);
                            match install_zeros(&served.uffd.0, at, part.bytes(), advice) {
                                Ok(()) => {}
                                // The program closed it: zeros in a mapping of their own, then.
                                Err(Errno::BADF | Errno::NOTTY) => {
                                    map_anonymous(at, part.bytes(), self.protection)?;
                                }
                                Err(errno) => {
                                    return Err(format!("{} pages at {at:#x}: {errno}", part.pages))
                                }
                            }
                        }
                    }
                    None => {
                        let at = dropped.address_of(hole.start);
                        map_anonymous(at, hole.bytes(), self.protection)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn install_zeros(uffd: &Userfaultfd, start: u64, bytes: u64, advice: c_int) -> Result<(), Errno> {
    let (mut at, end) = (start, start + bytes);
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
            Some(errno) => return Err(errno),
        }
        refusals += 1;
    }
    Ok(())
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

    #[test]
    fn what_is_unmapped_is_forgotten() {
        let whole = Piece { start: 100 * PAGE, run: Run::between(0, 10) };
        let (pieces, protection) = (vec![whole], 0);
        let mut region = Region { pieces, protection, served: None, punched: Vec::new() };
        assert_eq!(region.cut_out(0, 100 * PAGE), []);
        let cut = region.cut_out(103 * PAGE, 105 * PAGE);
        assert_eq!(cut, [Piece { start: 103 * PAGE, run: Run::between(3, 5) }]);
        let left = Piece { start: 100 * PAGE, run: Run::between(0, 3) };
        let right = Piece { start: 105 * PAGE, run: Run::between(5, 10) };
        assert_eq!(region.pieces, [left, right]);
        assert_eq!(region.cut_out(0, u64::MAX), [left, right]);
        assert_eq!(region.pieces, []);
    }
}
