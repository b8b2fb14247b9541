//! What the tests of this crate share: memory, threads that touch it, children, SIGBUS, and the kernel's
//! own word on who waits. Nothing here sleeps to wait for a state.

#![allow(dead_code, unused_imports, reason = "each test program uses a part of it")]

pub mod bus;
pub mod memory;
pub mod need;
pub mod pin;
pub mod process;
pub mod scenario;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use uffd::{
    Access, Cause, Errno, Event, Features, MessageBuffer, Opening, Pagemap, RegisterMode,
    Userfaultfd,
};

pub use bus::*;
pub use memory::*;
pub use need::*;
pub use pin::*;
pub use process::*;

/// Longer than anything here takes: only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Everything that a target's owner may want to hear.
pub const EVENTS: Features = Features(
    Features::EVENT_FORK.0
        | Features::EVENT_REMAP.0
        | Features::EVENT_REMOVE.0
        | Features::EVENT_UNMAP.0,
);

/// Keeps the tests of a program apart, where they count descriptors or fork: every userfaultfd of a
/// process hears of its forks.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A page filled with a number that is not zero.
pub fn page(fill: u8) -> Vec<u8> {
    vec![fill; PAGE]
}

/// A full userfaultfd, not negotiated. These tests need the right to one: as root, or with
/// `vm.unprivileged_userfaultfd=1`.
pub fn open() -> Userfaultfd {
    Userfaultfd::open(Opening::SystemCall(Access::Full))
        .expect("a full userfaultfd (run as root, or: sudo sysctl vm.unprivileged_userfaultfd=1)")
}

pub fn negotiated(features: Features) -> Userfaultfd {
    let uffd = open();
    uffd.handshake(features).unwrap();
    uffd
}

/// Registered memory; the descriptor goes first, so that unmapping waits for nobody.
#[derive(Debug)]
pub struct Registered {
    pub uffd: Userfaultfd,
    pub memory: Mapping,
}

impl Registered {
    pub fn anonymous(pages: usize, features: Features) -> Registered {
        Registered::over(Mapping::anonymous(pages), features)
    }

    pub fn over(memory: Mapping, features: Features) -> Registered {
        Registered::with(memory, features, RegisterMode::MISSING)
    }

    #[track_caller]
    pub fn with(memory: Mapping, features: Features, mode: RegisterMode) -> Registered {
        let uffd = negotiated(features);
        uffd.register(memory.start, memory.bytes(), mode).unwrap();
        Registered { uffd, memory }
    }

    /// The address of the one fault that comes next.
    #[track_caller]
    pub fn next_fault(&self) -> u64 {
        next_fault(&self.uffd).0
    }

    /// The one fault that comes next is this.
    #[track_caller]
    pub fn assert_fault(&self, address: u64, cause: Cause) {
        let (at, flags) = next_fault(&self.uffd);
        assert_eq!((at, Cause::of(flags)), (address, cause));
    }

    /// Nobody waits, and there is nothing to read.
    #[track_caller]
    pub fn assert_silent(&self) {
        let mut buffer = MessageBuffer::new(4);
        let events: Vec<Event> = self.uffd.read_events(&mut buffer).unwrap().collect();
        assert!(events.is_empty(), "{events:?}");
        assert_eq!(waiters(&self.uffd), 0);
    }
}

/// Address and flags of the one fault that comes next.
#[track_caller]
pub fn next_fault(uffd: &Userfaultfd) -> (u64, u64) {
    match next_event(uffd) {
        Event::Fault { address, flags, .. } => (address, flags),
        other => panic!("a fault was expected, not {other:?}"),
    }
}

/// Waits until there is something to read.
#[track_caller]
pub fn wait_readable(descriptor: impl AsFd) {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut watched = [PollFd::new(&descriptor, PollFlags::IN)];
    assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1, "nothing happened");
    assert_eq!(watched[0].revents(), PollFlags::IN);
}

/// Reads the next event, one.
#[track_caller]
pub fn next_event(uffd: &Userfaultfd) -> Event {
    wait_readable(uffd);
    let mut buffer = MessageBuffer::new(1);
    let mut events = uffd.read_events(&mut buffer).unwrap();
    events.next().expect("it was readable")
}

/// How many threads the kernel keeps asleep for this userfaultfd, read or not, from fdinfo. A thread
/// leaves the count in the very call that wakes it.
pub fn waiters(uffd: &Userfaultfd) -> u64 {
    fdinfo(uffd.as_fd(), "total:")
}

fn fdinfo(descriptor: BorrowedFd<'_>, name: &str) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

pub fn descriptors_open() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Whether the page at an address is write-protected, as this process's pagemap says.
pub fn protected(address: u64) -> bool {
    Pagemap::of_self().unwrap().entries(address, 1).unwrap()[0].write_protected()
}

/// Looks again and again until it is so; for conditions that announce themselves in no way.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < patience, "never: {what}");
        std::thread::yield_now();
    }
}

/// Whether a resolve did all of it.
#[track_caller]
pub fn assert_done(progress: uffd::Progress, bytes: usize) {
    assert_eq!((progress.done, progress.errno), (bytes, None));
}

#[track_caller]
pub fn assert_stopped(progress: uffd::Progress, done: usize, errno: Errno) {
    assert_eq!((progress.done, progress.errno), (done, Some(errno)));
}

#[track_caller]
pub fn assert_errno<T: std::fmt::Debug>(outcome: io::Result<T>, errno: Errno) {
    let error = outcome.expect_err("it must be refused");
    assert_eq!(Errno::from_io_error(&error), Some(errno), "{error}");
}
