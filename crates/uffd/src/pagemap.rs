//! `/proc/PID/pagemap`: what is true of the pages of a process.
//!
//! Some facts about the kernel, and what follows here:
//! - Reading gives one [`Entry`] of 8 bytes a page. Frame numbers are shown to CAP_SYS_ADMIN only, and
//!   read as 0 for everybody else; the flags are shown to all who may ptrace the process.
//! - `PAGEMAP_SCAN` (6.7) finds pages by what is true of them, and can write-protect those in the same
//!   pass: with WP_ASYNC that is the whole of dirty tracking, as no write is lost between the two.
//! - A page counts as *written* unless it is write-protected: so memory that was never protected is
//!   written, all of it, empty pages included. Empty pages of hugetlbfs are not. On Linux 7.3 memory that
//!   is not registered with WP is never written.
//! - It stops early where its result has no room, and says where: [`Pagemap::scan`] goes on from there.
//! - EPERM: the caller insisted on WP_ASYNC ([`Scan::only_tracked`]) and met memory without it. The
//!   manual page does not say so.
//! - Pages of hugetlbfs are protected whole: a range that cuts one is not.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::abi::{PageRegion, PmScan, PAGEMAP_SCAN};
use crate::bits::bits;

bits! {
    /// What can be true of a page, in the words of `PAGEMAP_SCAN`.
    Categories {
        /// Its mapping is registered with WP and WP_ASYNC.
        WPALLOWED = 0;
        /// It is not write-protected: it was written to since it was.
        WRITTEN = 1;
        /// It belongs to a file, or to shared memory.
        FILE = 2;
        /// It is in memory.
        PRESENT = 3;
        /// It is swapped out.
        SWAPPED = 4;
        /// It is the zero page.
        PFNZERO = 5;
        /// It is part of a huge page.
        HUGE = 6;
        /// It was written to since `clear_refs` (6.12, and kernels with CONFIG_MEM_SOFT_DIRTY).
        SOFT_DIRTY = 7;
        /// It is a guard page (6.15).
        GUARD = 8;
        /// It was touched since it was protected against any access (7.3).
        ACCESSED = 9;
    }
}

/// Which pages a scan is about, and what it does to them. The default: all, and nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scan {
    /// What a page must be, all of it.
    pub all_of: Categories,
    /// What a page must be, any of it; nothing: no matter.
    pub any_of: Categories,
    /// Those of `all_of` and `any_of` that a page must *not* be.
    pub inverted: Categories,
    /// What is reported of a page; nothing: all that there is.
    pub reported: Categories,
    /// Whether the pages found are write-protected, in the same pass. Only what is WPALLOWED is found
    /// then.
    pub protect: bool,
    /// Whether memory that is not WPALLOWED is an error (EPERM), instead of being found without
    /// `protect` and passed over with it.
    pub only_tracked: bool,
    /// How many pages are found at most, counted in 4096 bytes also where they are larger; 0: all.
    pub most_pages: u64,
}

/// What is true of one page, in the bits of `/proc/PID/pagemap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// It is in memory.
    pub fn present(self) -> bool {
        self.0 >> 63 & 1 == 1
    }

    /// It is swapped out.
    pub fn swapped(self) -> bool {
        self.0 >> 62 & 1 == 1
    }

    /// It belongs to a file, or to shared memory.
    pub fn file(self) -> bool {
        self.0 >> 61 & 1 == 1
    }

    /// It is a guard page (6.15).
    pub fn guard(self) -> bool {
        self.0 >> 58 & 1 == 1
    }

    /// It is write-protected by a userfaultfd (5.13).
    pub fn write_protected(self) -> bool {
        self.0 >> 57 & 1 == 1
    }

    /// It is mapped by this process alone (4.2).
    pub fn exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }

    /// It was written to since `clear_refs`, on kernels that keep track.
    pub fn soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }

    /// The number of its frame; 0 for those who may not know, and where there is none.
    pub fn frame(self) -> u64 {
        match self.present() {
            true => self.0 & ((1 << 55) - 1),
            false => 0,
        }
    }
}

/// Bytes of a page, as `/proc/PID/pagemap` counts.
const PAGE: u64 = 4096;
/// Regions that one call of the kernel reports at most.
const REGIONS: usize = 512;

/// An open `/proc/PID/pagemap`. It keeps showing the address space that the process had when it was
/// opened; after its end there is nothing to see.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// This process's.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn of_self() -> io::Result<Pagemap> {
        Ok(Pagemap(File::open("/proc/self/pagemap")?))
    }

    /// Another process's.
    ///
    /// # Errors
    /// `NotFound`; `PermissionDenied` for a process that one may not ptrace.
    pub fn of(pid: u32) -> io::Result<Pagemap> {
        Ok(Pagemap(File::open(format!("/proc/{pid}/pagemap"))?))
    }

    /// Entries of `pages` pages from `start` on, a multiple of the page size. Fewer where the address
    /// space ends.
    ///
    /// # Errors
    /// `InvalidInput` for an address that is not aligned.
    pub fn entries(&self, start: u64, pages: usize) -> io::Result<Vec<Entry>> {
        if start % PAGE != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the address is not aligned"));
        }
        let mut bytes = vec![0; pages * size_of::<u64>()];
        let mut read = 0;
        while read < bytes.len() {
            match self.0.read_at(&mut bytes[read..], start / PAGE * 8 + read as u64)? {
                0 => break,
                some => read += some,
            }
        }
        let words = bytes[..read].chunks_exact(8);
        Ok(words.map(|word| Entry(u64::from_ne_bytes(word.try_into().unwrap_or([0; 8])))).collect())
    }

    /// The pages of `start` to `end` (multiples of the page size) that `scan` is about, those side by
    /// side with the same categories as one region, rising (Linux ≥ 6.7).
    ///
    /// # Errors
    /// ENOTTY (this kernel cannot), EINVAL (`start` is not aligned, or a category that this kernel does
    /// not know), EFAULT (`end` lies before `start`), EPERM ([`Scan::only_tracked`]), ENOMEM, ESRCH (the
    /// process is gone). What was write-protected until then stays so.
    pub fn scan(&self, start: u64, end: u64, scan: &Scan) -> io::Result<Vec<PageRegion>> {
        let reported = match scan.reported {
            // All that every kernel with this call knows.
            Categories::NONE => Categories(0x7F),
            some => some,
        };
        let mut found: Vec<PageRegion> = Vec::new();
        let mut room = vec![PageRegion::default(); REGIONS];
        let mut left = scan.most_pages;
        let mut at = start;
        loop {
            let mut argument = PmScan {
                size: size_of::<PmScan>() as u64,
                flags: u64::from(scan.protect) | u64::from(scan.only_tracked) << 1,
                start: at,
                end,
                walk_end: 0,
                vec: room.as_mut_ptr() as u64,
                vec_len: room.len() as u64,
                max_pages: left,
                category_inverted: scan.inverted.0,
                category_mask: scan.all_of.0,
                category_anyof_mask: scan.any_of.0,
                return_mask: reported.0,
            };
            // SAFETY: the structure is the one this request takes, with its size; the kernel writes at
            // most `vec_len` regions to `room`, which is borrowed for the call.
            let regions = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    PAGEMAP_SCAN as _,
                    std::ptr::from_mut(&mut argument),
                )
            };
            let Ok(regions) = usize::try_from(regions) else {
                match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                }
            };
            for region in &room[..regions] {
                left = left.saturating_sub((region.end - region.start) / PAGE);
                match found.last_mut() {
                    Some(last)
                        if last.end == region.start && last.categories == region.categories =>
                    {
                        last.end = region.end;
                    }
                    _ => found.push(*region),
                }
            }
            at = argument.walk_end;
            if at >= end || at <= argument.start || scan.most_pages > 0 && left == 0 {
                return Ok(found);
            }
        }
    }
}
