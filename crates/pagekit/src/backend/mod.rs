//! Backends: the mechanism that puts bytes into a target. One file each.
//!
//! | backend | a present page is resolved by | private memory for a page read |
//! |---|---|---|
//! | [`copy`] | `UFFDIO_COPY` from the template's file | one page |
//! | [`share`] | `UFFDIO_WAKE`: the target maps the template's file itself | none until written |
//!
//! A backend sees pages that are present in the template, in one piece, and a range of the target in
//! one region; it never waits and never retries.

use std::time::{Duration, Instant};

use uffd::{Errno, Progress, Userfaultfd};

use crate::page::{Run, PAGE};
use crate::template::cache_file::CacheFile;

pub mod copy;
pub mod share;

/// How long [`fill_gaps`] tries where it is refused for now: perhaps nobody reads the event any more that
/// has to be read first.
const PATIENCE: Duration = Duration::from_secs(1);

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

/// Has `fill` (start, bytes) fill what is missing of a range: passes over what is there, and tries again
/// where it is refused for now. None if all of it is there in the end, else why it is not.
pub fn fill_gaps(
    start: u64,
    bytes: u64,
    page_size: u64,
    fill: impl Fn(u64, u64) -> Progress,
) -> Option<Errno> {
    let (mut at, end) = (start, start + bytes);
    let mut refused: Option<Instant> = None;
    while at < end {
        let progress = fill(at, end - at);
        let before = at;
        at += progress.done as u64;
        match progress.errno {
            None => break,
            Some(Errno::EXIST) => at += page_size,
            Some(Errno::AGAIN) => {
                if at > before {
                    refused = None;
                } else if refused.get_or_insert_with(Instant::now).elapsed() < PATIENCE {
                    std::thread::yield_now();
                } else {
                    return Some(Errno::AGAIN);
                }
            }
            errno => return errno,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn gaps_are_filled_around_what_is_there() {
        // Page 2 is there; the kernel stops at each other one, and refuses page 4 once.
        let (filled, refused) = (RefCell::new(Vec::new()), RefCell::new(false));
        let fill = |start: u64, _| match start / PAGE {
            2 => Progress { done: 0, errno: Some(Errno::EXIST) },
            4 if !refused.replace(true) => Progress { done: 0, errno: Some(Errno::AGAIN) },
            page => {
                filled.borrow_mut().push(page);
                Progress { done: PAGE as usize, errno: Some(Errno::AGAIN) }
            }
        };
        assert_eq!(fill_gaps(0, 6 * PAGE, PAGE, fill), None);
        assert_eq!(*filled.borrow(), [0, 1, 3, 4, 5]);
    }

    #[test]
    fn what_cannot_be_filled_ends_it() {
        let fill = |errno| move |_, _| Progress { done: 0, errno: Some(errno) };
        assert_eq!(fill_gaps(0, PAGE, PAGE, fill(Errno::INVAL)), Some(Errno::INVAL));
        assert_eq!(fill_gaps(0, PAGE, PAGE, fill(Errno::AGAIN)), Some(Errno::AGAIN));
    }
}
