//! Filling ahead: pages go from the template into a target before it asks for them.
//!
//! Some facts, and what follows:
//! - A page that the target gave back reads zero for good. What belongs where is looked up, and filled,
//!   under the lock under which removals are applied: none can come between. So they wait for us, and so
//!   do the faults that are read along with them: the lock is given back after every piece.
//! - A thread that has used up its time loses the processor, wherever it is; not with that lock held, if
//!   it offers the processor of its own accord after every piece.
//! - A fill stops at a page that is there already. It goes on behind it.
//! - A fill that the kernel refuses for now (EAGAIN) is for the caller to try again later: an event is
//!   pending, and the loop must have the lock to read it.

use std::sync::atomic::Ordering::Relaxed;

use uffd::Errno;

use super::fill::Fill;
use super::region::RegionMap;
use super::target::Target;
use super::Shared;
use crate::page::{Run, PAGE};

/// Pages filled under the lock at once while the target faults, which takes as long as a fault.
const SHORTEST_PIECE: u64 = 8;
/// The same while it does not.
const LONGEST_PIECE: u64 = 64;

/// How far filling ahead came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ahead {
    /// Pages put into the target.
    pub installed: u64,
    /// What the kernel refuses for now: try again a little later. Empty if there is nothing left to do.
    pub rest: Run,
}

/// How a part of the work ended.
enum End {
    Done,
    /// At this page of the template.
    Blocked(u64),
    /// Nothing can be put there any more.
    Over,
}

impl Target {
    pub(super) fn install_ahead(&self, shared: &Shared, run: Run) -> Ahead {
        let unit = self.page_size / PAGE;
        let run = Run::between(
            run.start - run.start % unit,
            run.end().next_multiple_of(unit).min(self.template.whole().end()),
        );
        let mut ahead = Ahead { installed: 0, rest: run };
        while ahead.rest.pages > 0 {
            let faults = self.faults.load(Relaxed);
            let piece = match self.faults_before.swap(faults, Relaxed) == faults {
                true => LONGEST_PIECE.max(unit),
                false => SHORTEST_PIECE.max(unit),
            };
            let part = Run { pages: piece.min(ahead.rest.pages), ..ahead.rest };
            std::thread::yield_now();
            let end = self.install_piece(part, &mut ahead.installed);
            let next = match end {
                End::Done => part.end(),
                End::Blocked(page) => page,
                End::Over => run.end(),
            };
            ahead.rest = Run::between(next, run.end());
            if let End::Blocked(_) = end {
                break;
            }
        }
        self.count_ahead(shared, ahead.installed);
        ahead
    }

    /// As [`Self::install_ahead`], but in one piece, and without letting anybody go first. Says how many
    /// pages were put there.
    pub(super) fn install_at_once(&self, shared: &Shared, run: Run) -> u64 {
        let mut installed = 0;
        // What could not be done now is for demand.
        let _ = self.install_piece(run, &mut installed);
        self.count_ahead(shared, installed);
        installed
    }

    fn count_ahead(&self, shared: &Shared, pages: u64) {
        self.ahead.fetch_add(pages, Relaxed);
        shared.ahead.fetch_add(pages, Relaxed);
    }

    fn install_piece(&self, run: Run, installed: &mut u64) -> End {
        let regions = self.regions();
        match self.template.check() {
            Ok(()) => self.install_part(&regions, run, installed),
            Err(_) => End::Over,
        }
    }

    /// Fills what of `run` can be had at once, wherever it belongs.
    fn install_part(&self, regions: &RegionMap, run: Run, installed: &mut u64) -> End {
        let mut places = regions.places(run).into_iter().flat_map(|(address, run)| {
            let parts = self.unclaimed(run).into_iter();
            parts.map(move |part| (address + (part.start - run.start) * PAGE, part))
        });
        while let Some((address, run)) = places.next() {
            match self.install_place(address, run, installed) {
                End::Done => {}
                End::Over => return End::Over,
                // The same pages may belong to the places behind, which rise by their first pages.
                End::Blocked(page) => {
                    return End::Blocked(places.fold(page, |page, (_, next)| page.min(next.start)));
                }
            }
        }
        End::Done
    }

    fn install_place(&self, address: u64, run: Run, installed: &mut u64) -> End {
        let unit = self.page_size / PAGE;
        let mut at = run.start;
        let mut most = u64::MAX;
        while at < run.end() {
            let Some(missing) = self.missing(Run::between(at, run.end())) else { break };
            at = missing.start;
            let address = address + (at - run.start) * PAGE;
            let fill = match unit {
                1 => self.put(address, Run { start: at, pages: missing.pages.min(most) }),
                _ => self.fill_huge(address, Run { start: at, pages: unit }),
            };
            let Some(Fill { run: tried, progress, .. }) = fill else {
                at += unit;
                continue;
            };
            let done = progress.done as u64 / PAGE;
            *installed += done;
            at += done;
            match progress.errno {
                None => {}
                // The page is there already, and who brought it woke who waited for it.
                Some(Errno::EXIST) => at += unit,
                // Stopped in the middle: the next round says why.
                Some(Errno::AGAIN) if done > 0 => {}
                Some(Errno::AGAIN) => return End::Blocked(at),
                // Across a border that the target made, or unmapped and not read yet.
                Some(Errno::NOENT) if tried.pages > unit => most = tried.pages / 2,
                Some(Errno::NOENT) => at += unit,
                // The target is gone, or has no room for more.
                Some(_) => return End::Over,
            }
        }
        End::Done
    }
}
