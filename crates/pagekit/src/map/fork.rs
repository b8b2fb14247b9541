//! Children.
//!
//! Facts about the kernel, and what follows:
//! - A child inherits a mapping, but not its registration: it would read holes of the template's file
//!   as zeros, and make them zeros for everybody. So the memory is kept out of children
//!   (MADV_DONTFORK). One that a bare `clone` made, for which no handler runs, gets SIGSEGV there.
//! - Fork events would register the child's memory, but need a capability. `fork` of libc calls our
//!   handlers instead: the memory is let into this one child, with what was written to it, and before
//!   `fork` returns there the child makes a userfaultfd of its own and registers it. Until then no
//!   signal handler of the program may run on that thread: all signals are blocked meanwhile. (Who
//!   calls bare `clone` on another thread in that very moment gets the memory unregistered; the
//!   template finds out at the next publication.)
//! - The child has one thread, and none of ours. So it hands its userfaultfd to the process that made
//!   the map, over a line that all descendants inherit: the engine there serves it as a target, as it
//!   does the child's children. It does not wait for an answer: until the other end has adopted it, a
//!   fault waits, and if that never happens the other end of the child's *tie* is closed.
//! - The tie is a socket whose other end the serving process holds. When it closes, a thread of the child
//!   poisons what is missing (nobody will bring it), as a fault would wait for ever; where the kernel
//!   cannot poison, it maps nothing there, which raises SIGBUS too. That thread holds
//!   the userfaultfd and the tie in a descriptor table of its own, so that a program that closes all
//!   descriptors closes neither.
//! - A child also inherits the other ends of its siblings' ties, which would keep those open when the
//!   serving process is gone. It closes them; so nobody may change their list while somebody forks.
//! - Pages in the template's file can be had without anybody, and what is zero by the map is known: both
//!   are not missing.
//! - Private pages of hugetlbfs come with no reservation in a child, where a missing one could be lost
//!   for want of room: maps of huge pages are not in children.
//! - `vfork` and `posix_spawn` run in the parent's memory until exec: nothing to do.

use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::fs::{fstat, seek, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{mprotect, MprotectFlags};
use rustix::net::{shutdown, socketpair, AddressFamily, Shutdown, SocketFlags, SocketType};
use rustix::process::{getpid, pidfd_open, PidfdFlags};
use uffd::{passing, Features, RegisterMode, Userfaultfd};

use super::house::House;
use super::space::{put_zeros, Children, Space};
use super::table::{registry, Registry};
use super::{How, Lost, Map, Supply};
use crate::backend::fill_gaps;
use crate::engine::region::RegionMap;
use crate::engine::{NewTarget, TargetId};
use crate::error::{Error, Result};
use crate::page::{complement, Run, PAGE};
use crate::process;
use crate::thread::BlockedSignals;

// The forking thread, before and after.

/// What the forking thread holds from before the fork until after it, in both processes.
struct Held {
    registry: MutexGuard<'static, Registry>,
    /// The ends of ties that this process holds.
    ends: Option<MutexGuard<'static, Ends>>,
    process: u64,
    _signals: BlockedSignals,
}

struct Forking(UnsafeCell<Option<Held>>);

// SAFETY: only the thread that holds the registry, or its copy in the child, touches the content.
unsafe impl Sync for Forking {}

static FORKING: Forking = Forking(UnsafeCell::new(None));

/// Registers the handlers.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers are functions of this library, which is never unloaded.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

impl Held {
    /// Maps that the forking process serves, or has served for it, and lets into children.
    fn maps(&self) -> impl Iterator<Item = &'static Map> {
        let process = self.process;
        let inherited = move |map: &&Map| map.space.process() == process && map.can_be_inherited();
        self.registry.maps().filter(inherited)
    }
}

extern "C" fn before() {
    let signals = BlockedSignals::new();
    let (registry, process) = (registry(), process::current());
    let house = registry.house.filter(|house| house.process == process);
    let ends = house.map(|house| house.ends());
    let held = Held { registry, ends, process, _signals: signals };
    held.maps().for_each(|map| map.space.children(Children::Inherit));
    // SAFETY: we hold the registry now.
    unsafe { *FORKING.0.get() = Some(held) };
}

extern "C" fn in_parent() {
    // SAFETY: we still hold the registry; it is given back when this is dropped.
    let held = unsafe { (*FORKING.0.get()).take() };
    if let Some(held) = held {
        held.maps().for_each(|map| map.space.children(Children::KeepOut));
    }
}

extern "C" fn in_child() {
    // SAFETY: the child has one thread, the copy of the one that took the registry.
    let Some(mut held) = (unsafe { (*FORKING.0.get()).take() }) else { return };
    if let Some(ends) = &mut held.ends {
        ends.close();
    }
    let mut watched = Vec::new();
    let maps: Vec<&Map> = held.registry.maps().collect();
    for map in maps {
        if map.space.process() != held.process {
            // Was not in the parent either.
            held.registry.remove(map);
            continue;
        }
        match map.how() {
            How::Loaded => map.space.belongs_here(),
            How::Thread | How::Signal | How::Parent if map.can_be_inherited() => {
                map.space.belongs_here();
                match adopted(map) {
                    Ok(watch) => watched.push((map, watch)),
                    Err(text) => map.shut(&text),
                }
            }
            _ => match map.space.reserve() {
                // What an address of it leads to is defined, at least.
                true => map.shut("huge pages are not in children"),
                false => held.registry.remove(map),
            },
        }
    }
    watch(watched);
}

// The child's side.

/// What a child's thread needs to watch over one map.
#[derive(Debug)]
struct Watched {
    tie: OwnedFd,
    uffd: Userfaultfd,
    /// The template's file.
    file: Option<OwnedFd>,
    ward: Arc<Ward>,
}

/// A map in a child, for the thread that watches over it.
#[derive(Debug)]
pub(super) struct Ward {
    pieces: Vec<(u64, Run)>,
    zero_runs: Vec<Run>,
    /// Whether the child has unmapped it.
    closed: Mutex<bool>,
    /// Whether nobody serves it any more.
    orphaned: AtomicBool,
    tie: Known,
}

impl Ward {
    /// Whether nobody serves the map any more.
    pub(super) fn orphaned(&self) -> bool {
        self.orphaned.load(Relaxed)
    }

    /// The child unmaps it: its thread and the serving process let go of it.
    pub(super) fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        // Somebody who closed it has nobody to tell.
        let _ = self.tie.with(|tie| shutdown(tie, Shutdown::Both));
    }
}

/// Registers the memory of `map` in this process, a child, and asks to be served.
fn adopted(map: &Map) -> std::result::Result<Watched, String> {
    let supply = map.supply.copied();
    let text = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let uffd = match supply.delivery.open() {
        Ok(Some(uffd)) => uffd,
        Ok(None) => return Err("no userfaultfd".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    uffd.handshake(Features::NONE).map_err(|error| text("no userfaultfd", &error))?;
    for (start, run) in &supply.pieces {
        uffd.register(*start, run.bytes(), RegisterMode::MISSING)
            .map_err(|error| text("it cannot be registered", &error))?;
    }
    map.space.children(Children::KeepOut);
    let (tie, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| text("no socket", &errno))?;
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|errno| text("no descriptor of this process", &errno))?;
    let Some(house) = map.house else { return Err("nobody can be asked".to_owned()) };
    // Who cannot be reached leaves the tie ended, and the map orphaned.
    let _ = house.line.call(supply.id, [uffd.as_fd(), pidfd.as_fd(), theirs.as_fd()]);
    let file = supply.template.cache().readonly();
    let file = supply.file.is(file).then(|| file.try_clone_to_owned().ok()).flatten();
    let ward = Arc::new(Ward {
        pieces: supply.pieces.clone(),
        zero_runs: supply.template.zero_runs().to_vec(),
        closed: Mutex::new(false),
        // The child of an orphan is one.
        orphaned: AtomicBool::new(map.ward().is_some_and(Ward::orphaned)),
        tie: Known::new(tie.try_clone().map_err(|error| text("no socket", &error))?),
    });
    map.inherited(Arc::clone(&ward));
    Ok(Watched { tie, uffd, file, ward })
}

/// Starts the thread that watches over the maps of a child.
fn watch(watched: Vec<(&Map, Watched)>) {
    if watched.is_empty() {
        return;
    }
    let numbers: Vec<i32> = watched
        .iter()
        .flat_map(|(_, watched)| {
            let file = watched.file.as_ref().map(AsRawFd::as_raw_fd);
            [Some(watched.tie.as_raw_fd()), Some(watched.uffd.as_fd().as_raw_fd()), file]
        })
        .flatten()
        .collect();
    let kept = numbers.clone();
    let (maps, watched): (Vec<&Map>, Vec<Watched>) = watched.into_iter().unzip();
    let (sender, receiver) = sync_channel(1);
    let body = move || {
        let own = crate::thread::own_table(&kept);
        let failed = own.is_err();
        // The starter waits for this one message.
        let _ = sender.send(own);
        if !failed {
            keep_watch(watched);
        }
    };
    let started =
        crate::thread::spawn_in_a_child("pk-watch", body).map_err(|error| error.to_string());
    let own = started.and_then(|_| match receiver.recv() {
        Ok(own) => own.map_err(|errno| errno.to_string()),
        Err(_) => Err("its thread ended".to_owned()),
    });
    match own {
        Ok(()) => numbers.into_iter().for_each(|number| {
            // SAFETY: the thread has it in a table of its own; in this one nobody knows it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }),
        Err(error) => {
            let text = format!("nobody can watch over it: {error}");
            maps.iter().for_each(|map| map.shut(&text));
        }
    }
}

/// Waits for the ends of ties.
fn keep_watch(mut watched: Vec<Watched>) {
    while !watched.is_empty() {
        let mut entries: Vec<PollFd<'_>> =
            watched.iter().map(|watched| PollFd::new(&watched.tie, PollFlags::IN)).collect();
        match poll(&mut entries, None) {
            Ok(_) => {}
            // No room for the call: it passes.
            Err(_) => std::thread::yield_now(),
        }
        let ended: Vec<bool> = entries.iter().map(|entry| !entry.revents().is_empty()).collect();
        drop(entries);
        let mut ended = ended.into_iter();
        watched.retain(|watched| {
            let over = ended.next() == Some(true);
            if over {
                watched.orphan();
            }
            !over
        });
    }
}

impl Watched {
    /// Nobody serves it any more: what is missing raises SIGBUS from now on.
    fn orphan(&self) {
        let closed = self.ward.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return;
        }
        self.ward.orphaned.store(true, Relaxed);
        for (start, run) in &self.ward.pieces {
            let address = |page: u64| start + (page - run.start) * PAGE;
            let data = complement(*run, &self.ward.zero_runs);
            for zero in complement(*run, &data) {
                put_zeros(&self.uffd, address(zero.start), zero.bytes());
            }
            for part in data {
                for hole in self.holes(part) {
                    let (at, bytes) = (address(hole.start), hole.bytes());
                    if !poison(&self.uffd, at, bytes) && !Space::bar(at, bytes) {
                        take_away(at, bytes);
                    }
                }
            }
            let _ = self.uffd.wake(*start, run.bytes());
        }
    }

    /// Runs of `run` that are not in the template's file.
    fn holes(&self, run: Run) -> Vec<Run> {
        let Some(file) = &self.file else { return vec![run] };
        let mut holes = Vec::new();
        let mut at = run.offset();
        let end = run.offset() + run.bytes();
        while at < end {
            let Ok(hole) = seek(file, SeekFrom::Hole(at)) else { return vec![run] };
            if hole >= end {
                break;
            }
            at = match seek(file, SeekFrom::Data(hole)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => end,
                Err(_) => return vec![run],
            };
            holes.push(Run::between(hole / PAGE, at / PAGE));
        }
        holes
    }
}

/// Poisons what is not there; false if the kernel cannot.
fn poison(uffd: &Userfaultfd, start: u64, bytes: u64) -> bool {
    fill_gaps(start, bytes, PAGE, |at, bytes| uffd.poison(at, bytes)).is_none()
}

/// The last resort: SIGSEGV.
fn take_away(start: u64, bytes: u64) {
    // SAFETY: memory of a map that nobody serves: whoever touches it must fail.
    let _ = unsafe { mprotect(start as *mut _, bytes as usize, MprotectFlags::empty()) };
}

// The line, and its other end.

/// A descriptor whose number somebody else may have closed, and got for something else.
#[derive(Debug)]
pub(super) struct Known {
    descriptor: ManuallyDrop<OwnedFd>,
    identity: Identity,
}

/// What a descriptor is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity(Option<(u64, u64)>);

impl Identity {
    pub(super) fn of(descriptor: BorrowedFd<'_>) -> Identity {
        Identity(fstat(descriptor).ok().map(|stat| (stat.st_dev, stat.st_ino)))
    }

    /// Whether a descriptor of this number is still what it was.
    pub(super) fn is(self, descriptor: BorrowedFd<'_>) -> bool {
        self.0.is_some() && Identity::of(descriptor) == self
    }
}

impl Known {
    fn new(descriptor: OwnedFd) -> Known {
        let identity = Identity::of(descriptor.as_fd());
        Known { descriptor: ManuallyDrop::new(descriptor), identity }
    }

    fn with<T>(&self, act: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        let descriptor = self.descriptor.as_fd();
        self.identity.is(descriptor).then(|| act(descriptor))
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        if self.identity.is(self.descriptor.as_fd()) {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.descriptor) };
        }
    }
}

/// The line on which descendants call the process that made a map.
#[derive(Debug)]
pub(super) struct Line(Known);

/// Bytes of a call: the map's number, and the process's.
const CALL: usize = 12;

impl Line {
    /// A line, and its other end.
    pub(super) fn new() -> Result<(Line, OwnedFd)> {
        let (line, door) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| Error::kernel("no socket for children", errno))?;
        Ok((Line(Known::new(line)), door))
    }

    fn call(&self, map: u64, descriptors: [BorrowedFd<'_>; 3]) -> std::io::Result<()> {
        let mut message = [0; CALL];
        message[..8].copy_from_slice(&map.to_ne_bytes());
        message[8..].copy_from_slice(&getpid().as_raw_nonzero().get().to_ne_bytes());
        let sent = self.0.with(|line| passing::send(line, &message, &descriptors));
        sent.unwrap_or_else(|| Err(Errno::BADF.into()))
    }
}

/// The ends of the line and of ties that the serving process holds.
#[derive(Debug)]
pub(super) struct Ends {
    door: Option<OwnedFd>,
    identity: Identity,
    /// And which targets of the engine they are of.
    ties: Vec<(OwnedFd, TargetId)>,
}

impl Ends {
    pub(super) fn new(door: OwnedFd) -> Ends {
        Ends { identity: Identity::of(door.as_fd()), door: Some(door), ties: Vec::new() }
    }

    /// How many children's maps are served.
    pub(super) fn len(&self) -> usize {
        self.ties.len()
    }

    /// Whether the door is what it was. If not it is let go of: the number is somebody else's.
    fn is_open(&mut self) -> bool {
        let open = self.door.as_ref().is_some_and(|door| self.identity.is(door.as_fd()));
        if !open {
            std::mem::forget(self.door.take());
        }
        open
    }

    /// In a child: these are not its own.
    fn close(&mut self) {
        if self.is_open() {
            self.door = None;
        }
        self.ties.clear();
    }

    /// Takes in a child that calls. Who is not taken in finds its tie ended: it is dropped with what
    /// came along.
    fn adopt(&mut self, house: &House) -> Option<()> {
        let mut message = [0; CALL];
        let (bytes, descriptors) = passing::receive(self.door.as_ref()?, &mut message).ok()?;
        let [uffd, pidfd, tie] = <[OwnedFd; 3]>::try_from(descriptors).ok()?;
        if bytes != CALL {
            return None;
        }
        let map = u64::from_ne_bytes(message[..8].try_into().ok()?);
        let pid = i32::from_ne_bytes(message[8..].try_into().ok()?);
        let supply: Arc<Supply> = house.supply(map)?;
        let new = NewTarget {
            uffd: Userfaultfd::from(uffd),
            process: Some((pid, pidfd)),
            template: Arc::clone(&supply.template),
            backend: Arc::clone(&supply.backend),
            regions: RegionMap::of(supply.pieces.iter().copied()),
            beacon: None,
            page_size: supply.page_size,
            owner: Some(Arc::new(Lost::in_a_child(supply))),
            connection: None,
        };
        let target = house.engine.add(new).ok()?;
        self.ties.push((tie, target.id));
        Some(())
    }
}

/// Serves the memory of children that call, until their ties end.
pub(super) fn answer(house: &House) {
    let mut numbers = Vec::new();
    loop {
        {
            let ends = house.ends();
            numbers.clear();
            numbers.extend(ends.door.iter().map(AsRawFd::as_raw_fd));
            numbers.extend(ends.ties.iter().map(|(tie, _)| tie.as_raw_fd()));
        }
        // By their numbers, and without the lock: only this thread closes any of them in this process.
        let watched = |number: &i32| {
            // SAFETY: they stay open until this thread takes them from the list.
            let end = unsafe { BorrowedFd::borrow_raw(*number) };
            PollFd::from_borrowed_fd(end, PollFlags::IN)
        };
        let mut entries: Vec<PollFd<'_>> = numbers.iter().map(watched).collect();
        if poll(&mut entries, None).is_err() {
            // No room for the call: it passes.
            std::thread::yield_now();
            continue;
        }
        let mut ready = entries.iter().map(|entry| !entry.revents().is_empty());
        let called = ready.next() == Some(true);
        let mut ends = house.ends();
        ends.ties.retain(|(_, target)| {
            let stays = ready.next() != Some(true);
            if !stays {
                house.engine.forget(*target);
            }
            stays
        });
        if called && ends.adopt(house).is_none() && !ends.is_open() {
            // The program closed what it does not know: children that call now are orphans at once.
            return;
        }
    }
}
