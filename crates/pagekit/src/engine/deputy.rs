//! The deputy: a second handler of the same targets, somewhere else.
//!
//! Some facts about the kernel, and what follows:
//! - There is no nesting: a mapping has one userfaultfd, and an event goes to one reader. So the engine
//!   reads everything, as ever, and hands on what is the deputy's.
//! - An event is read once, and faults are looked up behind the events that were read with them. The
//!   deputy is told of both with the target's region map held, so it hears of them in that very order.
//! - Whoever has a descriptor of a userfaultfd can resolve, protect and register by it. So a page can be
//!   there before the deputy says so, and write-protected though nobody here asked for that: a write to
//!   such a page is the deputy's fault to answer, and if there is none the protection is taken back.
//! - A page of `share` is in the target as soon as it is in the template's file. What a deputy claims it
//!   claims of targets that are filled, of `copy`.
//!
//! What is claimed is not the template's: it comes along with no other page, is not filled ahead, and if
//! nobody answers for it the target gets no other bytes, but the failure policy. A [`Relayed`] fault ends
//! in that way, too, when it is dropped. Without a deputy all this costs a look at one flag.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use uffd::Errno;

use super::outcome::Outcome;
use super::region::{Belongs, Place, RegionMap};
use super::target::{lock, Fault, Target, TargetId};
use super::{Engine, Shared};
use crate::backend::Resolution;
use crate::error::Error;
use crate::page::{complement, overlaps, union, Run, PAGE};

/// A second handler. All calls are short: they come with the target's region map held, so it must not
/// wait, nor ask the engine for anything that concerns that target.
pub trait Deputy: Send + Sync + std::fmt::Debug {
    /// A target is served from now on, with these regions. To be called on with its faults and events,
    /// it calls [`Target::relay`].
    fn joined(&self, target: &Arc<Target>, regions: &RegionMap);

    /// Something happened to a target, and was applied.
    fn happened(&self, target: &Target, event: Happening);

    /// Takes a fault, or gives it back.
    fn take(&self, fault: Relayed) -> Option<Relayed>;

    /// A target is served no more. (Its region map is not held.)
    fn left(&self, target: TargetId);

    /// Pages that are claimed of whatever target may come.
    fn claimed(&self) -> Vec<Run>;
}

/// An event of a target, as deputies are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    /// It forked; the child will join with this number.
    Fork(TargetId),
    /// It moved memory: from, to, bytes.
    Remap(u64, u64, u64),
    /// It gave memory back: start, end.
    Remove(u64, u64),
    /// It unmapped memory: start, end.
    Unmap(u64, u64),
}

/// Why a fault is a deputy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its page is claimed.
    Claimed,
    /// Its page cannot be had from the template.
    Declined,
    /// It is a write to a page that was write-protected.
    Protected,
}

/// What a deputy says of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is resolved.
    Done,
    /// These bytes belong there: one page of 4096, for targets with such pages.
    Content(Box<[u8]>),
    /// Zeros belong there.
    Zero,
    /// Nobody has it.
    Poison,
    /// As without a deputy.
    Decline,
}

/// A fault in a deputy's hands. Dropped without an answer, it ends as a page that cannot be had.
#[derive(Debug)]
pub struct Relayed {
    shared: Arc<Shared>,
    target: Arc<Target>,
    /// Taken out by whoever ends it.
    fault: Option<Box<Fault>>,
    page: u64,
    why: Why,
}

impl Relayed {
    /// Whose it is.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Where.
    pub fn address(&self) -> u64 {
        self.fault.as_ref().map_or(0, |fault| fault.address)
    }

    /// The template's pages that belong there: one, or those of a huge page.
    pub fn run(&self) -> Run {
        Run { start: self.page, pages: self.target.page_size / PAGE }
    }

    /// Why it is a deputy's.
    pub fn why(&self) -> Why {
        self.why
    }

    /// How long an answer may take.
    pub fn patience(&self) -> Duration {
        self.target.template.deadline()
    }

    /// `other` is of the same page, and ends with this one.
    pub fn join(&mut self, mut other: Relayed) {
        if let (Some(fault), Some(other)) = (&mut self.fault, other.fault.take()) {
            fault.joined += 1 + other.joined;
        }
    }

    /// Does what the deputy says, as far as nothing has happened there since. On the caller's thread,
    /// without waiting for anything.
    pub fn answer(mut self, answer: Answer) {
        let Some(mut fault) = self.fault.take() else { return };
        match &answer {
            Answer::Decline => {}
            Answer::Poison if self.why != Why::Protected => {
                fault.failure = Some(Arc::new(self.refusal("has not got it")));
            }
            _ => fault.failure = None,
        }
        fault.answer = Some(Arc::new((self.page, answer)));
        self.target.serve(&self.shared, *fault);
    }

    /// Nobody answers: the page cannot be had.
    pub fn fail(mut self, why: &str) {
        self.end(why);
    }

    /// The target is gone.
    pub fn abandon(mut self) {
        if let Some(fault) = self.fault.take() {
            self.shared.count(Outcome::Abandoned, &fault);
        }
    }

    fn end(&mut self, why: &str) {
        let Some(mut fault) = self.fault.take() else { return };
        if self.why != Why::Protected {
            // Where the template has failed already, that is the reason that counts.
            fault.failure.get_or_insert_with(|| Arc::new(self.refusal(why)));
        }
        fault.answer = Some(Arc::new((self.page, Answer::Poison)));
        self.target.serve(&self.shared, *fault);
    }

    fn refusal(&self, why: &str) -> Error {
        Error::Unavailable {
            what: format!("page {} is a second handler's", self.page),
            error: std::io::Error::other(format!("it {why}")),
        }
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        self.end("gave no answer");
    }
}

/// What became of a fault that may be a deputy's.
pub(super) enum Passed {
    /// It is in other hands, or has ended.
    Taken,
    /// The deputy's answer was carried out, and that came of it.
    Answered(Fault, Resolution),
    /// It is the engine's to serve, with so much of the place as is the template's.
    Ours(Fault, Place),
}

impl Engine {
    /// Hands on what is `deputy`'s from now on. The targets that live have yet to join: see
    /// [`Target::hold`].
    pub fn appoint(&self, deputy: Arc<dyn Deputy>) {
        *self.shared.deputy.write().unwrap_or_else(PoisonError::into_inner) = Some(deputy);
    }

    /// Nothing is handed on any more. What is in the deputy's hands stays there.
    pub fn dismiss(&self) {
        *self.shared.deputy.write().unwrap_or_else(PoisonError::into_inner) = None;
        for target in self.living() {
            target.hold(|_| target.relay(false, Vec::new()));
        }
    }

    /// Pages that are claimed of whatever target may come.
    pub fn claimed(&self) -> Vec<Run> {
        self.shared.deputy().map(|deputy| deputy.claimed()).unwrap_or_default()
    }
}

impl Shared {
    pub(super) fn deputy(&self) -> Option<Arc<dyn Deputy>> {
        self.deputy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives a fault to the deputy, or back.
    fn hand_over(
        self: &Arc<Self>,
        target: &Arc<Target>,
        fault: Fault,
        page: u64,
        why: Why,
    ) -> Option<Fault> {
        let Some(deputy) = self.deputy() else { return Some(fault) };
        let (shared, target) = (Arc::clone(self), Arc::clone(target));
        let relayed = Relayed { shared, target, fault: Some(Box::new(fault)), page, why };
        deputy.take(relayed)?.fault.take().map(|fault| *fault)
    }
}

impl Target {
    /// Whether a deputy is called on with its faults and events, and the pages of the template that it
    /// claims. To be called with the region map held.
    pub fn relay(&self, relayed: bool, claims: Vec<Run>) {
        let unit = self.page_size / PAGE;
        let whole = claims.into_iter().map(|run| {
            Run::between(run.start - run.start % unit, run.end().next_multiple_of(unit))
        });
        *lock(&self.claims) = union(whole).into();
        self.relayed.store(relayed, Release);
    }

    /// Calls `work` while no event of the target is read, and nothing is put into it.
    pub fn hold<T>(&self, work: impl FnOnce(&RegionMap) -> T) -> T {
        work(&self.regions_mut())
    }

    /// Bytes of the target's pages.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Whether it is served no more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Relaxed)
    }

    pub(super) fn is_relayed(&self) -> bool {
        self.relayed.load(Relaxed)
    }

    /// Tells the deputy what happened; the region map is held.
    pub(super) fn tell(&self, shared: &Shared, event: Happening) {
        if self.is_relayed() {
            if let Some(deputy) = shared.deputy() {
                deputy.happened(self, event);
            }
        }
    }

    /// What of `run` is not claimed, in pieces.
    pub(super) fn unclaimed(&self, run: Run) -> Vec<Run> {
        match self.is_relayed() {
            true => complement(run, &lock(&self.claims).clone()),
            false => vec![run],
        }
    }

    /// Hands on what is the deputy's, and carries out what it has said. The region map is held.
    pub(super) fn pass_on(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut fault: Fault,
        place: Place,
    ) -> Passed {
        let Belongs::Template(page) = place.belongs else {
            // Given back, perhaps since it was answered: zeros belong there now.
            fault.answer = None;
            return Passed::Ours(fault, place);
        };
        let one = Place { bytes: place.bytes.min(self.page_size), bytes_before: 0, ..place };
        let answer = fault.answer.take().filter(|answer| answer.0 == page);
        if let Some(answer) = answer {
            let resolution = match &answer.1 {
                Answer::Done => {
                    if self.page_size != PAGE {
                        self.filled_huge().insert(fault.address);
                    }
                    let _ = self.uffd.wake(fault.address, self.page_size);
                    shared.count(Outcome::Relayed, &fault);
                    return Passed::Taken;
                }
                Answer::Content(bytes) => {
                    let progress = self.uffd.copy(fault.address, bytes);
                    Some(self.settled(fault.address, progress, Resolution::Copied))
                }
                Answer::Zero => Some(self.zero(fault.address, self.page_size)),
                Answer::Poison | Answer::Decline => None,
            };
            fault.answer = Some(answer);
            return match resolution {
                Some(resolution) => Passed::Answered(fault, resolution),
                None => Passed::Ours(fault, one),
            };
        }
        let claims = lock(&self.claims).clone();
        let run = Run { start: page, pages: self.page_size / PAGE };
        if overlaps(&claims, run) {
            return match shared.hand_over(self, fault, page, Why::Claimed) {
                None => Passed::Taken,
                // Released a moment ago.
                Some(fault) => Passed::Ours(fault, one),
            };
        }
        Passed::Ours(fault, narrowed(place, page, &claims))
    }

    /// Hands on a fault whose page cannot be had from the template, or gives it back.
    pub(super) fn pass_on_declined(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        fault: Fault,
    ) -> Option<Fault> {
        if fault.answer.is_some() || !self.is_relayed() {
            return Some(fault);
        }
        let regions = self.regions();
        match regions.find(fault.address).map(|place| place.belongs) {
            Some(Belongs::Template(page)) => shared.hand_over(self, fault, page, Why::Declined),
            _ => Some(fault),
        }
    }

    /// Serves a write to a write-protected page: by the deputy, or by taking the protection back.
    pub(super) fn serve_protected(self: &Arc<Self>, shared: &Arc<Shared>, mut fault: Fault) {
        if fault.answer.is_none() && self.is_relayed() {
            let regions = self.regions();
            if let Some(Belongs::Template(page)) = regions.find(fault.address).map(|p| p.belongs) {
                match shared.hand_over(self, fault, page, Why::Protected) {
                    None => return,
                    Some(back) => fault = back,
                }
            }
        }
        if fault.answer.as_ref().is_some_and(|answer| answer.1 == Answer::Done) {
            let _ = self.uffd.wake(fault.address, self.page_size);
            return shared.count(Outcome::Relayed, &fault);
        }
        let resolution = match self.uffd.unprotect(fault.address, self.page_size) {
            Ok(()) => Resolution::Woken,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN) => Resolution::Blocked,
                Some(Errno::SRCH) => Resolution::Gone,
                // Unmapped, or registered anew; whoever waits shall look again.
                _ => Resolution::NotCovered,
            },
        };
        self.settle(shared, fault, resolution);
    }
}

impl Fault {
    /// Whether what is put there now is what a deputy has said.
    pub(super) fn is_relayed(&self) -> bool {
        let answer = self.answer.as_ref().map(|answer| &answer.1);
        matches!(answer, Some(Answer::Content(_) | Answer::Zero))
    }
}

/// What of `place`, where `page` belongs, lies between the claims around it.
fn narrowed(place: Place, page: u64, claims: &[Run]) -> Place {
    let after = claims.partition_point(|run| run.start <= page);
    let next = claims.get(after).map_or(u64::MAX, |run| (run.start - page).saturating_mul(PAGE));
    let before = after.checked_sub(1).map_or(u64::MAX, |at| (page - claims[at].end()) * PAGE);
    Place { bytes: place.bytes.min(next), bytes_before: place.bytes_before.min(before), ..place }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_ends_where_a_claim_begins() {
        let claims = [Run::between(2, 4), Run::between(9, 12)];
        let place = |belongs, before: u64, pages: u64| Place {
            belongs: Belongs::Template(belongs),
            bytes: pages * PAGE,
            bytes_before: before * PAGE,
        };
        assert_eq!(narrowed(place(6, 6, 20), 6, &claims), place(6, 2, 3));
        assert_eq!(narrowed(place(6, 1, 2), 6, &claims), place(6, 1, 2));
        assert_eq!(narrowed(place(1, 1, 20), 1, &claims), place(1, 1, 1));
        assert_eq!(narrowed(place(12, 12, 20), 12, &claims), place(12, 0, 20));
        assert_eq!(narrowed(place(6, 6, 20), 6, &[]), place(6, 6, 20));
    }
}
