//! Filling ahead: pages go from the template into a target before it asks for them.
//!
//! Some facts, and what follows:
//! - A page that the target gave back reads zero for good. What belongs where is looked up, and filled,
//!   under the lock under which removals are applied: none can come between.
//! - While that lock is held nobody serves the target's faults. So it is given back after every piece,
//!   and demand goes first.
//! - A fill stops at a page that is there already. It goes on behind it.
//! - A fill that the kernel refuses for now (EAGAIN) is for the caller to try again later: an event is
//!   pending, and the loop must have the lock to read it.

use std::sync::atomic::Ordering::Relaxed;

use uffd::Errno;

use super::target::{State, Target};
use super::Shared;
use crate::backend;
use crate::page::{find, Run, PAGE};

/// Pages filled under the lock at once, which takes some 50 µs: longer than a wake-up, and not much.
const PIECE: u64 = 64;

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
        let piece = PIECE.max(unit);
        let run = Run::between(
            run.start - run.start % unit,
            run.end().next_multiple_of(unit).min(self.template.whole().end()),
        );
        let mut ahead = Ahead { installed: 0, rest: run };
        while ahead.rest.pages > 0 {
            let part = Run { pages: piece.min(ahead.rest.pages), ..ahead.rest };
            let mut state = self.state_after_demand();
            let end = match self.template.check() {
                Ok(()) => self.install_part(&mut state, part, &mut ahead.installed),
                Err(_) => End::Over,
            };
            drop(state);
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
        self.ahead.fetch_add(ahead.installed, Relaxed);
        shared.ahead.fetch_add(ahead.installed, Relaxed);
        ahead
    }

    /// Fills what of `run` is in the template wherever it belongs.
    fn install_part(&self, state: &mut State, run: Run, installed: &mut u64) -> End {
        let mut places = state.regions.places(run).into_iter().peekable();
        while let Some((address, run)) = places.next() {
            match self.install_place(state, address, run, installed) {
                End::Done => {}
                End::Over => return End::Over,
                // The same pages may belong to the places behind, which rise by their first pages.
                End::Blocked(page) => {
                    return End::Blocked(
                        places.peek().map_or(page, |(_, next)| page.min(next.start)),
                    )
                }
            }
        }
        End::Done
    }

    fn install_place(&self, state: &mut State, address: u64, run: Run, installed: &mut u64) -> End {
        let unit = self.page_size / PAGE;
        let mut at = run.start;
        let mut most = u64::MAX;
        while at < run.end() {
            let rest = Run::between(at, run.end());
            let address = address + (at - run.start) * PAGE;
            let (progress, tried) = if unit > 1 {
                let whole = Run { start: at, pages: unit };
                match self.fill_huge(address, whole) {
                    Some((progress, _)) => (progress, unit),
                    None => {
                        at += unit;
                        continue;
                    }
                }
            } else {
                let present = self.template.present_from(rest);
                let zero = find(self.template.zero_runs(), at);
                match (present.pages, zero) {
                    (0, None) => {
                        at += 1;
                        continue;
                    }
                    (0, Some(zero)) => {
                        let pages = (zero.end() - at).min(rest.pages).min(most);
                        (backend::zero(&self.uffd, address, pages * PAGE, PAGE), pages)
                    }
                    (pages, _) => {
                        let pages = pages.min(most);
                        let run = Run { start: at, pages };
                        let cache = self.template.cache();
                        (self.backend.fill(&self.uffd, cache, address, run), pages)
                    }
                }
            };
            let done = progress.done as u64 / PAGE;
            *installed += done;
            state.locality.put(Run { start: at, pages: done });
            at += done;
            match progress.errno {
                None => {}
                // The page is there already, and who brought it woke who waited for it.
                Some(Errno::EXIST) => at += unit,
                // Stopped in the middle: the next round says why.
                Some(Errno::AGAIN) if done > 0 => {}
                Some(Errno::AGAIN) => return End::Blocked(at),
                // Across a border that the target made, or unmapped and not read yet.
                Some(Errno::NOENT) if tried > unit => most = tried / 2,
                Some(Errno::NOENT) => at += unit,
                // The target is gone, or has no room for more.
                Some(_) => return End::Over,
            }
        }
        End::Done
    }
}
