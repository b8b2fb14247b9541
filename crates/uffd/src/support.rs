//! Which features this machine has, for this process: [`FEATURES`], looked up and tried.
//!
//! Some facts about the kernel, and what follows here:
//! - The handshake answers with all features of the kernel, whoever asks and however the descriptor was
//!   opened; EVENT_FORK alone is refused later, with EPERM, to those without CAP_SYS_PTRACE. So it is
//!   negotiated once, on a throw-away descriptor; RWP_ASYNC together with RWP, without which 7.3 refuses
//!   it.
//! - What has no bit is tried on memory of our own, and what an older kernel answers to it (EINVAL,
//!   ENOTTY) is told from what a process may not do (EPERM, EACCES).

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

use crate::descriptor::{open_device, Access, Opening, RegisterMode, Userfaultfd, DEVICE};
use crate::features::{Feature, Features, Probe, FEATURES};
use crate::pagemap::{Pagemap, Scan};
use crate::resolve::How;

/// Whether a feature can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It can.
    Have,
    /// The kernel has it, but this process may not use it.
    Forbidden,
    /// The kernel has not got it.
    Lacking,
}

/// What was found out about this machine, for this process.
#[derive(Debug, Clone)]
pub struct Support {
    rows: Vec<(&'static Feature, State)>,
    reported: Features,
}

impl Support {
    /// Finds it out; takes well under a millisecond, changes nothing, and needs no privilege. Where no
    /// userfaultfd can be had at all, everything is [`State::Forbidden`] or [`State::Lacking`].
    pub fn probe() -> Support {
        let device = open_device();
        let by_device = device.as_ref().ok().map(|device| Opening::Device(device.as_fd()));
        let ways = [
            by_device,
            Some(Opening::SystemCall(Access::Full)),
            Some(Opening::SystemCall(Access::UserModeOnly)),
        ];
        let way = ways.into_iter().flatten().find(|way| Userfaultfd::open(*way).is_ok());
        let reported = way.and_then(|way| Userfaultfd::probe(way).ok());
        let rows = FEATURES
            .iter()
            .map(|feature| {
                let state = match (feature.probe, reported) {
                    (Probe::Bit(bit), Some(features)) => match features.0 >> bit & 1 {
                        0 => State::Lacking,
                        _ => negotiable(way, Features(1 << bit)),
                    },
                    (Probe::Bit(_), None) => without_any(),
                    (Probe::Try, _) => tried(feature.name, way),
                };
                (feature, state)
            })
            .collect();
        Support { rows, reported: reported.unwrap_or(Features::NONE) }
    }

    /// Every feature of [`FEATURES`], and whether it can be used.
    pub fn rows(&self) -> &[(&'static Feature, State)] {
        &self.rows
    }

    /// Whether the feature of that name can be used. A name that is not in the table cannot.
    pub fn has(&self, name: &str) -> bool {
        self.rows.iter().any(|(feature, state)| feature.name == name && *state == State::Have)
    }

    /// All bits that the kernel reports, those included that this crate does not know.
    pub fn reported(&self) -> Features {
        self.reported
    }

    /// The bits that the kernel reports and this crate does not know.
    pub fn unknown(&self) -> Features {
        let known = FEATURES.iter().filter_map(Feature::bit).fold(0, |all, bit| all | 1 << bit);
        self.reported.without(Features(known))
    }
}

/// Whether a feature that the kernel has may be negotiated.
fn negotiable(way: Option<Opening<'_>>, feature: Features) -> State {
    let Some(uffd) = way.and_then(|way| Userfaultfd::open(way).ok()) else {
        return State::Forbidden;
    };
    // The one that is refused alone.
    let wanted = match feature == Features::RWP_ASYNC {
        true => feature | Features::RWP,
        false => feature,
    };
    match uffd.handshake(wanted) {
        Ok(()) => State::Have,
        Err(_) => State::Forbidden,
    }
}

/// What it means that there is no userfaultfd.
fn without_any() -> State {
    match Userfaultfd::open(Opening::SystemCall(Access::UserModeOnly)) {
        Err(error) => refusal(&error),
        Ok(_) => State::Have,
    }
}

/// Whether a seccomp filter is installed on this process.
pub fn filtered() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mode = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

fn refusal(error: &io::Error) -> State {
    match Errno::from_io_error(error) {
        Some(Errno::PERM | Errno::ACCESS) => State::Forbidden,
        // Filters of containers like to say that there is no such call.
        Some(Errno::NOSYS) if filtered() => State::Forbidden,
        _ => State::Lacking,
    }
}

fn of(outcome: io::Result<()>) -> State {
    outcome.map_or_else(|error| refusal(&error), |()| State::Have)
}

fn tried(name: &str, way: Option<Opening<'_>>) -> State {
    let open = |opening| Userfaultfd::open(opening).map(drop);
    match name {
        "KERNEL_FAULTS" => match (open_device(), open(Opening::SystemCall(Access::Full))) {
            (_, Ok(())) => State::Have,
            (Ok(device), _) => of(open(Opening::Device(device.as_fd()))),
            (_, Err(error)) => refusal(&error),
        },
        "USER_MODE_ONLY" => of(open(Opening::SystemCall(Access::UserModeOnly))),
        "DEVICE" => match open_device() {
            Ok(device) => of(open(Opening::Device(device.as_fd()))),
            Err(_) if Path::new(DEVICE).exists() => State::Forbidden,
            Err(_) => State::Lacking,
        },
        "CONTINUE_MODE_WP" => match way {
            Some(way) => of(continue_protected(way)),
            None => without_any(),
        },
        "PAGEMAP_SCAN" => of(scan_something()),
        _ => State::Lacking,
    }
}

/// Maps a cached page of shared memory write-protected.
fn continue_protected(way: Opening<'_>) -> io::Result<()> {
    const PAGE: usize = 4096;
    let uffd = Userfaultfd::open(way)?;
    uffd.handshake(Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM)?;
    let file = memfd_create("pagekit-probe", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, PAGE as u64)?;
    rustix::io::write(&file, &[1])?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new shared mapping at an address of the kernel's choice, unmapped below.
    let address = unsafe { mmap(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED, &file, 0) }?;
    let start = address as u64;
    let outcome = uffd
        .register(start, PAGE as u64, RegisterMode::MINOR | RegisterMode::WP)
        .and_then(|_| match uffd.continue_with(start, PAGE as u64, How::PROTECTED).errno {
            None => Ok(()),
            Some(errno) => Err(errno.into()),
        });
    // SAFETY: mapped above, and nobody borrowed from it.
    unsafe { munmap(address, PAGE) }?;
    outcome
}

fn scan_something() -> io::Result<()> {
    let page = std::ptr::from_ref(&FEATURES) as u64 & !0xFFF;
    Pagemap::of_self()?.scan(page, page + 0x1000, &Scan::default()).map(drop)
}
