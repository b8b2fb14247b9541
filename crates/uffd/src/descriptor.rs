//! The descriptor.
//!
//! Some facts about the kernel, and what follows here:
//! - A successful handshake cannot be repeated (EINVAL), so features are probed on a throw-away
//!   descriptor. A failed one can: unknown bits give EINVAL and leave the descriptor usable.
//! - `poll` on a descriptor without `O_NONBLOCK` reports POLLERR: all are opened non-blocking.
//! - One mapping belongs to one userfaultfd: there is no nesting, and another one gets EBUSY.
//! - Registering again with fewer modes succeeds and changes nothing; with others it replaces them. Linux
//!   7.3 refuses what would take a mode away, with EBUSY: unregister first.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{open, Mode, OFlags};

use crate::abi;
use crate::bits::bits;
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

bits! {
    /// Which accesses to a registered range are reported. Not every kind of memory has every mode:
    ///
    /// | memory | MISSING | WP | MINOR |
    /// |---|---|---|---|
    /// | anonymous | 4.3 | 5.7 | |
    /// | shmem, memfd, tmpfs; shared or private | 4.11 | 5.19 | 5.14 |
    /// | hugetlbfs; shared or private | 4.11 | 5.19 | 5.13 |
    /// | any other, with WP_ASYNC alone | | 6.7 | |
    RegisterMode {
        /// Pages that are not there.
        MISSING = 0;
        /// Writing to write-protected pages.
        WP = 1;
        /// Pages that are in the page cache and not mapped.
        MINOR = 2;
        /// Any access to protected pages (7.3).
        RWP = 3;
    }
}

bits! {
    /// Which operations work on a registered range, as the kernel says: it does not look whether the memory
    /// is of the kind they are for, but for CONTINUE and on hugetlbfs. MOVE is named for shared memory too.
    Operations {
        /// [`Userfaultfd::wake`]
        WAKE = 2;
        /// [`Userfaultfd::copy`]
        COPY = 3;
        /// [`Userfaultfd::zeropage`]
        ZEROPAGE = 4;
        /// [`Userfaultfd::move_pages`]
        MOVE = 5;
        /// [`Userfaultfd::protect`]
        WRITEPROTECT = 6;
        /// [`Userfaultfd::continue_`]
        CONTINUE = 7;
        /// [`Userfaultfd::poison`]
        POISON = 8;
        /// [`Userfaultfd::protect_against_access`]
        RWPROTECT = 9;
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

    /// Registers `len` bytes at `start` of the target, both multiples of the page size, and says which
    /// operations work on them. The range may be several mappings, and holes between them are passed over;
    /// but no later operation fills across a border.
    ///
    /// # Errors
    /// Nothing is registered then. EINVAL (unaligned, nothing mapped at all, no mode, or memory of a kind
    /// that has not got it), EBUSY (another userfaultfd owns some of it, or it has
    /// modes that are not asked for now, from 7.3 on), EPERM (a shared mapping of a file that may not be written), ENOMEM (the
    /// target is gone).
    pub fn register(&self, start: u64, len: u64, mode: RegisterMode) -> io::Result<Operations> {
        let range = abi::Range { start, len };
        let mut argument = abi::Register { range, mode: mode.0, ioctls: 0 };
        self.ioctl(abi::UFFDIO_REGISTER, &mut argument)?;
        Ok(Operations(argument.ioctls))
    }

    /// Unregisters a range and wakes its waiters, whose pages then read as the mapping says.
    ///
    /// # Errors
    /// EINVAL (unaligned, or memory that cannot be registered), ENOMEM (the target is gone).
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(abi::UFFDIO_UNREGISTER, &mut abi::Range { start, len })
    }

    /// Another descriptor of the same userfaultfd.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    pub(crate) fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
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
