//! Resolving: what ends a fault, and what puts pages into a target ahead of one.
//!
//! Some facts about the kernel, and what follows here:
//! - An operation can stop in the middle: "n bytes done, then EAGAIN". A single result word cannot
//!   say both, so every resolve returns [`Progress`] with the bytes done and the errno.
//! - EAGAIN with nothing done leaves the result field untouched on some kernels (fixed about 6.15),
//!   so the field is initialised to zero and only a positive value counts as progress.
//! - EEXIST never wakes the thread that waits for the page: the caller has to [`Userfaultfd::wake`].
//! - While an event of the mm is unread, or the thread that caused it has not run again, every fill
//!   answers EAGAIN: nothing in this file ever retries by itself.
//! - Exit and exec of the target make no event and no hang-up; operations then answer ESRCH.
//! - The same option has another bit in each ioctl: [`How`] has one name for it. What an ioctl does not
//!   have is refused here with EINVAL, as the kernel would.

use std::io;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{mmap_anonymous, MapFlags, ProtFlags};

use crate::abi;
use crate::bits::bits;
use crate::descriptor::Userfaultfd;
use crate::Features;

bits! {
    /// How something is resolved.
    How {
        /// The waiters are not woken: [`Userfaultfd::wake`] does that later.
        DONT_WAKE = 0;
        /// The pages arrive write-protected ([`Userfaultfd::copy_with`] since 5.7,
        /// [`Userfaultfd::continue_with`] since 6.4). The range must be registered for it.
        PROTECTED = 1;
        /// Holes of the source are no error ([`Userfaultfd::move_with`]).
        HOLES = 2;
    }
}

impl How {
    /// The mode word of an ioctl that has these bits for these options.
    fn mode(self, known: &[(How, u64)]) -> Result<u64, Errno> {
        let all = known.iter().fold(How::NONE, |all, (one, _)| all | *one);
        if !all.contains(self) {
            return Err(Errno::INVAL);
        }
        Ok(known.iter().filter(|(one, _)| self.contains(*one)).map(|(_, bit)| bit).sum())
    }
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

impl Progress {
    fn refused(errno: Errno) -> Progress {
        Progress { done: 0, errno: Some(errno) }
    }
}

impl Userfaultfd {
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
    pub unsafe fn copy_from(&self, dst: u64, src: *const u8, len: usize, how: How) -> Progress {
        let mode = match how.mode(&[(How::DONT_WAKE, 1), (How::PROTECTED, 2)]) {
            Ok(mode) => mode,
            Err(errno) => return Progress::refused(errno),
        };
        let mut argument = abi::Copy { dst, src: src as u64, len: len as u64, mode, copy: 0 };
        let outcome = self.ioctl(abi::UFFDIO_COPY, &mut argument);
        progress(outcome, argument.copy, len)
    }

    /// [`Self::copy_from`] with an ordinary slice.
    pub fn copy(&self, dst: u64, src: &[u8]) -> Progress {
        self.copy_with(dst, src, How::NONE)
    }

    /// [`Self::copy`]; how: DONT_WAKE, PROTECTED.
    pub fn copy_with(&self, dst: u64, src: &[u8], how: How) -> Progress {
        // SAFETY: the slice is initialised memory that stays borrowed for the whole call.
        unsafe { self.copy_from(dst, src.as_ptr(), src.len(), how) }
    }

    /// Maps the zero page at a range, and wakes. Not on hugetlbfs.
    pub fn zeropage(&self, start: u64, len: u64) -> Progress {
        self.zeropage_with(start, len, How::NONE)
    }

    /// [`Self::zeropage`]; how: DONT_WAKE.
    pub fn zeropage_with(&self, start: u64, len: u64, how: How) -> Progress {
        self.fill(abi::UFFDIO_ZEROPAGE, start, len, how.mode(&[(How::DONT_WAKE, 1)]))
    }

    /// Maps pages that the page cache of the mapped file has already, and wakes. Registration with MINOR is
    /// not asked for, any will do. Not on anonymous memory (EINVAL).
    pub fn continue_(&self, start: u64, len: u64) -> Progress {
        self.continue_with(start, len, How::NONE)
    }

    /// [`Self::continue_`]; how: DONT_WAKE, PROTECTED.
    pub fn continue_with(&self, start: u64, len: u64, how: How) -> Progress {
        let mode = how.mode(&[(How::DONT_WAKE, 1), (How::PROTECTED, 2)]);
        self.fill(abi::UFFDIO_CONTINUE, start, len, mode)
    }

    /// Makes the missing pages of a range raise SIGBUS when touched, and wakes (Linux ≥ 6.6, else
    /// EINVAL). The kernel's own accesses fail with EFAULT.
    ///
    /// The signal's code is BUS_MCEERR_AR with the size of the page where the kernel was built with
    /// CONFIG_MEMORY_FAILURE, else BUS_ADRERR. Poison is in the page table: it outlives the registration, a
    /// copy mends it, MADV_DONTNEED ends it, other mappings of the file do not see it. A forked child
    /// inherits it in private memory; in shared memory it finds what the file has, which may be zeros.
    pub fn poison(&self, start: u64, len: u64) -> Progress {
        self.poison_with(start, len, How::NONE)
    }

    /// [`Self::poison`]; how: DONT_WAKE.
    pub fn poison_with(&self, start: u64, len: u64, how: How) -> Progress {
        self.fill(abi::UFFDIO_POISON, start, len, how.mode(&[(How::DONT_WAKE, 1)]))
    }

    /// Moves pages of the target from `src` to `dst` without copying them, and wakes (Linux ≥ 6.8).
    /// Anonymous memory of the *calling* process only; `dst` is registered, `src` need not be.
    ///
    /// EBUSY: a page is shared with a forked child, or pinned. ENOENT: a hole in `src`. EINVAL: memory
    /// of another kind, or another process's.
    pub fn move_pages(&self, dst: u64, src: u64, len: u64) -> Progress {
        self.move_with(dst, src, len, How::NONE)
    }

    /// [`Self::move_pages`]; how: DONT_WAKE, HOLES.
    pub fn move_with(&self, dst: u64, src: u64, len: u64, how: How) -> Progress {
        let mode = match how.mode(&[(How::DONT_WAKE, 1), (How::HOLES, 2)]) {
            Ok(mode) => mode,
            Err(errno) => return Progress::refused(errno),
        };
        let mut argument = abi::Copy { dst, src, len, mode, copy: 0 };
        let outcome = self.ioctl(abi::UFFDIO_MOVE, &mut argument);
        progress(outcome, argument.copy, len as usize)
    }

    /// Write-protects the pages of a range that is registered with WP. Pages that are not there are
    /// passed over in anonymous memory, unless WP_UNPOPULATED was negotiated; there MADV_DONTNEED takes the
    /// protection along with the page. In memory of files it stays.
    ///
    /// # Errors
    /// ENOENT (not all of it is registered with WP), EINVAL (unaligned), EAGAIN (an event is pending),
    /// ESRCH.
    pub fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        self.change(abi::UFFDIO_WRITEPROTECT, start, len, 1)
    }

    /// Takes the write protection of a range back, and wakes whoever waits to write there.
    ///
    /// # Errors
    /// Those of [`Self::protect`].
    pub fn unprotect(&self, start: u64, len: u64) -> io::Result<()> {
        self.change(abi::UFFDIO_WRITEPROTECT, start, len, 0)
    }

    /// [`Self::unprotect`]; how: DONT_WAKE.
    ///
    /// # Errors
    /// Those of [`Self::protect`].
    pub fn unprotect_with(&self, start: u64, len: u64, how: How) -> io::Result<()> {
        self.change(abi::UFFDIO_WRITEPROTECT, start, len, how.mode(&[(How::DONT_WAKE, 2)])?)
    }

    /// Protects the pages of a range, registered with RWP, against any access (Linux ≥ 7.3).
    ///
    /// # Errors
    /// EINVAL or ENOTTY: this kernel cannot. Else those of [`Self::protect`].
    pub fn protect_against_access(&self, start: u64, len: u64) -> io::Result<()> {
        self.change(abi::UFFDIO_RWPROTECT, start, len, 1)
    }

    /// Takes [`Self::protect_against_access`] back, and wakes.
    ///
    /// # Errors
    /// Those of [`Self::protect_against_access`].
    pub fn allow_access(&self, start: u64, len: u64) -> io::Result<()> {
        self.change(abi::UFFDIO_RWPROTECT, start, len, 0)
    }

    /// Switches features on and off after the handshake: RWP_ASYNC is the only one (Linux ≥ 7.3).
    ///
    /// # Errors
    /// EINVAL or ENOTTY: this kernel cannot.
    pub fn set_mode(&self, enable: Features, disable: Features) -> io::Result<()> {
        let mut argument = abi::SetMode { enable: enable.0, disable: disable.0 };
        self.ioctl(abi::UFFDIO_SET_MODE, &mut argument)
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
        unsafe { self.copy_from(start, unreadable_page(), len as usize, How::NONE) }.errno
    }

    fn fill(&self, request: u64, start: u64, len: u64, mode: Result<u64, Errno>) -> Progress {
        let mode = match mode {
            Ok(mode) => mode,
            Err(errno) => return Progress::refused(errno),
        };
        let mut argument = abi::Fill { range: abi::Range { start, len }, mode, done: 0 };
        let outcome = self.ioctl(request, &mut argument);
        progress(outcome, argument.done, len as usize)
    }

    fn change(&self, request: u64, start: u64, len: u64, mode: u64) -> io::Result<()> {
        self.ioctl(request, &mut abi::Protect { range: abi::Range { start, len }, mode })
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
