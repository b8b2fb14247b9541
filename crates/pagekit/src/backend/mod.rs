//! Backends: the mechanism that puts bytes into a target. One file each.
//!
//! | backend | a present page is resolved by | private memory for a page read |
//! |---|---|---|
//! | [`copy`] | `UFFDIO_COPY` from the template's file | one page |
//! | [`share`] | `UFFDIO_WAKE`: the target maps the template's file itself | none until written |
//!
//! A backend sees pages that are present in the template, in one piece, and a range of the target in
//! one region; it never waits and never retries.

use uffd::{Errno, Progress, Userfaultfd};

use crate::page::{Run, PAGE};
use crate::template::cache_file::CacheFile;

pub mod copy;
pub mod share;

/// Most bytes that are zeroed at once: those of a huge page.
pub const MOST_ZEROS: usize = 2 << 20;

/// How a resolve ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// The first page is there and its waiters were woken.
    Copied,
    /// The page is in the shared file, and its waiters were woken.
    Shared,
    /// Somebody was first: the page was there, and its waiters were woken.
    Woken,
    /// The zero page is there and its waiters were woken.
    Zeroed,
    /// An event of the target is pending: try again after reading, or a little later.
    Blocked,
    /// The range is not registered, or lies in more than one mapping.
    NotCovered,
    /// The target's address space is gone.
    Gone,
    /// The kernel refused for another reason.
    Refused(Errno),
}

/// The mechanism that puts bytes into a target.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Its one name, as in specs and statistics.
    fn name(&self) -> &'static str;

    /// Whether a page in the template's file is in the target's memory too: it traps no more then, and
    /// needs no filling ahead.
    fn sees_template(&self) -> bool;

    /// Puts the pages of `run`, all of them present in `cache`, at `address`, and wakes who waits for
    /// them.
    fn fill(&self, uffd: &Userfaultfd, cache: &CacheFile, address: u64, run: Run) -> Progress;

    /// What a page that was filled is counted as.
    fn filled(&self) -> Resolution;
}

/// Puts zeros at `len` bytes from `address`, and wakes who waits for them. `len` is a multiple of
/// `page_size`, the size of the target's pages, and [`MOST_ZEROS`] at most.
pub fn zero(uffd: &Userfaultfd, address: u64, len: u64, page_size: u64) -> Progress {
    // Never written, so it takes no memory: the kernel reads its zero page.
    static ZEROS: [u8; MOST_ZEROS] = [0; MOST_ZEROS];
    match page_size {
        PAGE => uffd.zeropage(address, len),
        // There is no zero page of this size.
        _ => uffd.copy(address, &ZEROS[..len as usize]),
    }
}

/// What a fill's progress means for its first page. Only that has to be there.
pub fn settle(
    uffd: &Userfaultfd,
    address: u64,
    page_size: u64,
    progress: Progress,
    filled: Resolution,
) -> Resolution {
    match progress.errno {
        None => filled,
        // Stopped by a page that is there already, or by an event: the first page is done.
        Some(_) if progress.done > 0 => filled,
        // EEXIST does not wake.
        Some(Errno::EXIST) => match uffd.wake(address, page_size) {
            Ok(()) => Resolution::Woken,
            Err(_) => Resolution::NotCovered,
        },
        Some(Errno::AGAIN) => Resolution::Blocked,
        Some(Errno::NOENT) => Resolution::NotCovered,
        Some(Errno::SRCH) => Resolution::Gone,
        Some(errno) => Resolution::Refused(errno),
    }
}
