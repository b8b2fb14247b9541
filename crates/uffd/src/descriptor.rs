//! The descriptor.
//!
//! Some facts about the kernel, and what follows here:
//! - An operation can stop in the middle: "n bytes done, then EAGAIN". A single result word cannot
//!   say both, so every resolve returns [`Progress`] with the bytes done and the errno.
//! - EAGAIN with nothing done leaves the result field untouched on some kernels (fixed about 6.15),
//!   so the field is initialised to zero and only a positive value counts as progress.
//! - EEXIST never wakes the thread that waits for the page: the caller has to [`Userfaultfd::wake`].
//! - While an event of the mm is unread, or the thread that caused it has not run again, every fill
//!   answers EAGAIN: nothing in this file ever retries by itself.
//! - A successful handshake cannot be repeated (EINVAL), so features are probed on a throw-away
//!   descriptor. A failed one can: unknown bits give EINVAL and leave the descriptor usable.
//! - `poll` on a descriptor without `O_NONBLOCK` reports POLLERR: all are opened non-blocking.
//! - Exit and exec of the target make no event and no hang-up; operations then answer ESRCH.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{open, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{mmap_anonymous, MapFlags, ProtFlags};

use crate::abi;
use crate::Features;

/// The device whose file permissions replace every other check (Linux ≥ 6.1).
pub const DEVICE: &str = "/dev/userfaultfd";

/// How a descriptor was opened, and which faults it can therefore deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Faults from user mode and from the kernel (system calls, KVM).
    Full,
    /// Faults from user mode only; a system call that meets a missing page fails with EFAULT.
    UserModeOnly,
}

/// Where to get a descriptor from.
#[derive(Debug, Clone, Copy)]
pub enum Opening<'a> {
    /// The system call. [`Access::Full`] needs `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd=1`.
    SystemCall(Access),
    /// An open `/dev/userfaultfd`, perhaps handed over by a privileged process: always full.
    Device(BorrowedFd<'a>),
}

/// Which accesses a registered range reports. A later version adds WP and MINOR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisterMode {
    /// Pages that are not there.
    Missing,
}

/// What a resolve did. `errno` is `None` when all of it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Progress {
    /// Bytes filled before it ended or stopped.
    pub done: usize,
    /// Why it stopped.
    pub errno: Option<Errno>,
}

/// One event, decoded.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at `address` (rounded down to the page unless EXACT_ADDRESS).
    Fault {
        /// The address touched.
        address: u64,
        /// [`abi::fault`] bits.
        flags: u64,
        /// Faulting thread, in its own pid namespace; 0 without THREAD_ID.
        thread: u32,
    },
    /// The target forked; this is the child's userfaultfd, registered and negotiated as the
    /// parent's was.
    Fork(Userfaultfd),
    /// `mremap` moved `len` bytes; the new range is registered.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Old length.
        len: u64,
    },
    /// Pages of the range are about to be dropped; they read zero from then on.
    Remove {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// The range is no longer mapped.
    Unmap {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// An event code of a newer kernel.
    Unknown(u8),
}

/// Room for the messages of one read; owned by the caller, reused.
#[derive(Debug)]
pub struct MessageBuffer(Vec<MaybeUninit<[u8; abi::MESSAGE_BYTES]>>);

impl MessageBuffer {
    /// Room for `messages` messages.
    pub fn new(messages: usize) -> Self {
        Self(vec![MaybeUninit::uninit(); messages])
    }
}

/// The events of one read, in the kernel's order: faults first, then the others.
///
/// A FORK event owns a descriptor: events that are not taken out are closed on drop.
#[derive(Debug)]
pub struct Events<'a>(std::slice::Iter<'a, [u8; abi::MESSAGE_BYTES]>);

impl Iterator for Events<'_> {
    type Item = Event;
    fn next(&mut self) -> Option<Event> {
        self.0.next().map(decode)
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        for _ in self {}
    }
}

fn decode(message: &[u8; abi::MESSAGE_BYTES]) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        abi::event::PAGEFAULT => {
            Event::Fault { flags: word(8), address: word(16), thread: word(24) as u32 }
        }
        abi::event::FORK => {
            // SAFETY: the kernel installed this descriptor in our table during the read that
            // produced the message; each message is decoded once, so nobody else owns it.
            Event::Fork(Userfaultfd(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) }))
        }
        abi::event::REMAP => Event::Remap { from: word(8), to: word(16), len: word(24) },
        abi::event::REMOVE => Event::Remove { start: word(8), end: word(16) },
        abi::event::UNMAP => Event::Unmap { start: word(8), end: word(16) },
        other => Event::Unknown(other),
    }
}

/// Opens [`DEVICE`]. Its file permissions are the only check.
pub fn open_device() -> io::Result<OwnedFd> {
    Ok(open(Path::new(DEVICE), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// The features that a descriptor was negotiated with, or none if it still has to be; told from
/// `/proc/self/fdinfo` (there is no ioctl to ask).
///
/// # Errors
/// `InvalidInput`: it is no userfaultfd. Others: there is no `/proc` to ask.
pub fn negotiated(descriptor: impl AsFd) -> io::Result<Option<Features>> {
    const INITIALIZED: u64 = 1 << 31;
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path)?;
    // "API:\taa:80017f31:80000000000001ff": bit 31 of the features says "initialised".
    let features = text
        .lines()
        .find_map(|line| line.strip_prefix("API:"))
        .and_then(|rest| rest.trim().split(':').nth(1))
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no userfaultfd")
        })?;
    Ok((features & INITIALIZED != 0).then_some(Features(features & !INITIALIZED)))
}

/// Whether a descriptor still has to be negotiated; see [`negotiated`].
pub fn handshake_needed(descriptor: impl AsFd) -> io::Result<bool> {
    Ok(negotiated(descriptor)?.is_none())
}

/// A userfaultfd. Closing the last descriptor of one lets its memory read as zeros: see to it that
/// somebody who outlives the target's reads holds it.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl From<OwnedFd> for Userfaultfd {
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfaultfd {
    /// Creates a userfaultfd for the calling process, non-blocking and close-on-exec.
    ///
    /// # Errors
    /// EPERM (no right to full access), ENOSYS (kernel built without it), EMFILE, ENOMEM.
    pub fn open(from: Opening<'_>) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let raw = match from {
            Opening::SystemCall(access) => {
                let mode = match access {
                    Access::Full => 0,
                    Access::UserModeOnly => abi::UFFD_USER_MODE_ONLY,
                };
                // SAFETY: userfaultfd(2) takes one integer and returns a descriptor or -1.
                unsafe { libc::syscall(libc::SYS_userfaultfd, flags | mode) as i32 }
            }
            Opening::Device(device) => {
                // SAFETY: this ioctl takes its argument by value and returns a descriptor or -1.
                unsafe { libc::ioctl(device.as_raw_fd(), abi::USERFAULTFD_IOC_NEW as _, flags) }
            }
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(raw) }))
    }

    /// Features of this kernel, asked on a throw-away descriptor.
    pub fn probe(from: Opening<'_>) -> io::Result<Features> {
        let mut argument = abi::Api { api: abi::UFFD_API, ..Default::default() };
        Self::open(from)?.ioctl(abi::UFFDIO_API, &mut argument)?;
        Ok(Features(argument.features))
    }

    /// Negotiates `wanted`. Must succeed once before anything else.
    ///
    /// # Errors
    /// EINVAL: a bit that this kernel lacks (another try is possible), or negotiated already.
    /// EPERM: EVENT_FORK without `CAP_SYS_PTRACE`.
    pub fn handshake(&self, wanted: Features) -> io::Result<()> {
        let mut argument = abi::Api { api: abi::UFFD_API, features: wanted.0, ioctls: 0 };
        self.ioctl(abi::UFFDIO_API, &mut argument)
    }

    /// Registers `len` bytes at `start` of the target; both multiples of the page size.
    ///
    /// # Errors
    /// EINVAL (unaligned, unmapped, or memory that cannot be registered), EBUSY (another
    /// userfaultfd owns it), EPERM, ENOMEM (the target is gone).
    pub fn register(&self, start: u64, len: u64, mode: RegisterMode) -> io::Result<()> {
        let RegisterMode::Missing = mode;
        let mut argument = abi::Register { range: abi::Range { start, len }, mode: 1, ioctls: 0 };
        self.ioctl(abi::UFFDIO_REGISTER, &mut argument)
    }

    /// Unregisters a range and wakes its waiters, whose pages then read as the mapping says.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(abi::UFFDIO_UNREGISTER, &mut abi::Range { start, len })
    }

    /// Wakes the threads that wait in a range; they touch again, and fault again if the page is
    /// still missing. Works on unregistered ranges too. `len` must not be 0.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(abi::UFFDIO_WAKE, &mut abi::Range { start, len })
    }

    /// Fills pages at `dst` of the target by copying from `src` of this process, and wakes their
    /// waiters. `dst` and `len` are multiples of the page size; `src` need not be.
    ///
    /// # Safety
    /// Nothing unsafe can happen to *this* process (the kernel reads `src` and answers EFAULT where
    /// it cannot), but the bytes must be initialised and meant for the target.
    pub unsafe fn copy_from(&self, dst: u64, src: *const u8, len: usize) -> Progress {
        let mut argument = abi::Copy { dst, src: src as u64, len: len as u64, mode: 0, copy: 0 };
        let outcome = self.ioctl(abi::UFFDIO_COPY, &mut argument);
        progress(outcome, argument.copy, len)
    }

    /// [`Self::copy_from`] with an ordinary slice.
    pub fn copy(&self, dst: u64, src: &[u8]) -> Progress {
        // SAFETY: the slice is initialised memory that stays borrowed for the whole call.
        unsafe { self.copy_from(dst, src.as_ptr(), src.len()) }
    }

    /// Maps the zero page at a range, and wakes. Not on hugetlbfs.
    pub fn zeropage(&self, start: u64, len: u64) -> Progress {
        self.fill(abi::UFFDIO_ZEROPAGE, start, len)
    }

    /// Maps pages that are in the page cache of a shared mapping already, and wakes.
    pub fn continue_(&self, start: u64, len: u64) -> Progress {
        self.fill(abi::UFFDIO_CONTINUE, start, len)
    }

    /// Makes a range raise SIGBUS when touched, and wakes (Linux ≥ 6.6, else ENOTTY or EINVAL).
    pub fn poison(&self, start: u64, len: u64) -> Progress {
        self.fill(abi::UFFDIO_POISON, start, len)
    }

    /// Whether the target's address space still exists: it goes with exit and with exec, and the
    /// kernel sends nothing then. `address` is any page-aligned address of the target.
    pub fn is_alive(&self, address: u64) -> bool {
        self.probe_range(address, 4096) != Some(Errno::SRCH)
    }

    /// What the kernel says to a fill of `len` bytes at `start` that can never fill anything, because
    /// its source cannot be read:
    ///
    /// | | |
    /// |---|---|
    /// | ESRCH | the target is gone |
    /// | EAGAIN | an event is pending: nothing is known |
    /// | ENOENT | not all of it is registered, or it is several mappings |
    /// | EINVAL | registered memory of hugetlbfs, of which `start` and `len` are no whole pages |
    /// | EFAULT, EEXIST | registered, whether there are pages or not |
    ///
    /// On hugetlbfs whole pages take a huge page out of the pool for a moment: ask for less. (All of
    /// it but 4096 bytes asks for all of it too, as mappings there are made of whole pages.)
    pub fn probe_range(&self, start: u64, len: u64) -> Option<Errno> {
        // SAFETY: the source is a page without any access: the kernel fills nothing.
        unsafe { self.copy_from(start, unreadable_page(), len as usize) }.errno
    }

    /// Reads all events that are pending and fit; none pending is an empty iterator.
    ///
    /// # Errors
    /// EINVAL before the handshake.
    pub fn read_events<'a>(&self, buffer: &'a mut MessageBuffer) -> io::Result<Events<'a>> {
        let room = buffer.0.len() * abi::MESSAGE_BYTES;
        // SAFETY: the buffer has `room` bytes and is borrowed for the call.
        let read = unsafe { libc::read(self.0.as_raw_fd(), buffer.0.as_mut_ptr().cast(), room) };
        let count = match usize::try_from(read) {
            Ok(bytes) => bytes / abi::MESSAGE_BYTES,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => 0,
                error if error.kind() == io::ErrorKind::Interrupted => 0,
                error => return Err(error),
            },
        };
        // SAFETY: the kernel initialised the first `count` messages, and the type is plain bytes.
        let messages = unsafe { std::slice::from_raw_parts(buffer.0.as_ptr().cast(), count) };
        Ok(Events(messages.iter()))
    }

    /// Another descriptor of the same userfaultfd.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    fn fill(&self, request: u64, start: u64, len: u64) -> Progress {
        let mut argument = abi::Fill { range: abi::Range { start, len }, ..Default::default() };
        let outcome = self.ioctl(request, &mut argument);
        progress(outcome, argument.done, len as usize)
    }

    fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: every request of this file is paired with the structure of the ABI it takes, and
        // the structure is borrowed for the call.
        let outcome =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
        if outcome < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A page of this process that nobody can read, made once. At a low address if that is free: the
/// kernel refuses a source whose end would lie beyond the last address, and regions are large.
fn unreadable_page() -> *const u8 {
    const LOW: usize = 4 << 30;
    static PAGE: OnceLock<usize> = OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: a fresh anonymous mapping where the kernel finds room, never unmapped.
        let page =
            unsafe { mmap_anonymous(LOW as *mut _, 4096, ProtFlags::empty(), MapFlags::PRIVATE) };
        page.map_or(0, |pointer| pointer as usize)
    }) as *const u8
}

fn progress(outcome: io::Result<()>, field: i64, len: usize) -> Progress {
    match outcome {
        Ok(()) => Progress { done: len, errno: None },
        Err(error) => Progress {
            done: usize::try_from(field).unwrap_or(0),
            errno: Some(Errno::from_io_error(&error).unwrap_or(Errno::INVAL)),
        },
    }
}
