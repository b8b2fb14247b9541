//! What the tests of this crate share: memory, threads that touch it, and the kernel's own word on
//! who waits. Nothing here sleeps to wait for a state.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};
use uffd::{Access, Errno, Event, Features, MessageBuffer, Opening, RegisterMode, Userfaultfd};

pub const PAGE: usize = 4096;
/// Longer than anything here takes: only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Everything that a target's owner may want to hear.
pub const EVENTS: Features = Features(
    Features::EVENT_FORK.0
        | Features::EVENT_REMAP.0
        | Features::EVENT_REMOVE.0
        | Features::EVENT_UNMAP.0,
);

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

/// Some pages of address space.
#[derive(Debug)]
pub struct Mapping {
    pub start: u64,
    pub len: usize,
}

impl Mapping {
    pub fn anonymous(pages: usize) -> Mapping {
        Mapping::anonymous_with(pages, ProtFlags::READ | ProtFlags::WRITE)
    }

    pub fn anonymous_with(pages: usize, protection: ProtFlags) -> Mapping {
        let len = pages * PAGE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE).unwrap()
        };
        Mapping { start: start as u64, len }
    }

    /// A mapping of the first `pages` of a file.
    pub fn of(file: impl AsFd, pages: usize, protection: ProtFlags, flags: MapFlags) -> Mapping {
        let len = pages * PAGE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file, 0).unwrap() };
        Mapping { start: start as u64, len }
    }

    pub fn at(&self, page: usize) -> u64 {
        self.start + (page * PAGE) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.len as u64
    }

    /// The first byte of a page, read by this thread.
    pub fn touch(&self, page: usize) -> u8 {
        touch(self.at(page))
    }

    /// The whole page, read by this thread.
    pub fn content(&self, page: usize) -> Vec<u8> {
        (0..PAGE as u64).map(|at| touch(self.at(page) + at)).collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by this value, and no test touches it after the value is gone.
        let _ = unsafe { munmap(self.start as *mut _, self.len) };
    }
}

/// A memfd of so many pages.
pub fn memory_file(pages: usize) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, (pages * PAGE) as u64).unwrap();
    file
}

pub fn touch(address: u64) -> u8 {
    // SAFETY: the caller maps the address; the read may wait for a fault to be resolved.
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

pub fn write(address: u64, value: u8) {
    // SAFETY: the caller maps the address writable and no reference to it exists.
    unsafe { std::ptr::write_volatile(address as *mut u8, value) }
}

/// Reads one byte in kernel mode: by write(2) from the address.
pub fn touch_in_kernel(address: u64) -> io::Result<u8> {
    let (read, write) = rustix::pipe::pipe()?;
    // SAFETY: the kernel reads one byte of the address and answers EFAULT where it cannot.
    let written = unsafe { libc::write(write.as_raw_fd(), address as *const _, 1) };
    if written != 1 {
        return Err(io::Error::last_os_error());
    }
    let mut byte = [0];
    rustix::io::read(&read, &mut byte[..])?;
    Ok(byte[0])
}

/// A thread that touches an address in user mode.
pub fn toucher(address: u64) -> JoinHandle<u8> {
    std::thread::spawn(move || touch(address))
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
        let uffd = negotiated(features);
        uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
        Registered { uffd, memory }
    }

    /// The address of the one fault that comes next.
    pub fn next_fault(&self) -> u64 {
        match next_event(&self.uffd) {
            Event::Fault { address, .. } => address,
            other => panic!("a fault was expected, not {other:?}"),
        }
    }
}

/// Waits until there is something to read.
pub fn wait_readable(descriptor: impl AsFd) {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut watched = [PollFd::new(&descriptor, PollFlags::IN)];
    assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1, "nothing happened");
    assert_eq!(watched[0].revents(), PollFlags::IN);
}

/// Reads the next event, one.
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

/// Looks again and again until it is so; for conditions that announce themselves in no way.
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
