//! Who has which seat: what each deputy claims, which targets that concerns, and the faults it has yet
//! to answer. No sockets but those of [`Line`], and no threads.
//!
//! ```text
//!            Claim                  end, or cut off
//!   nobody ─────────► held by a line ─────────────► vacant ──► held by a successor that claims it
//!                          │ Release, end (nothing claimed)        (its open faults come along)
//!                          ▼
//!                         gone
//! ```
//! A seat outlives its deputy as long as it has claims: they say that the template has not got those
//! pages, and that stays true.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Instant;

use super::line::Line;
use crate::engine::deputy::{Answer, Relayed, Why};
use crate::engine::{Target, TargetId};
use crate::page::{complement, overlaps, union, Run};
use crate::wire::relay::{self as wire, Claim, Message};

/// Faults that ended without the deputy, to which it may yet send an answer: so many are remembered.
const MOST_ENDED: usize = 65_536;

/// Number of a seat, never used twice.
pub(super) type SeatId = u64;

/// A fault in a deputy's hands.
#[derive(Debug)]
struct Open {
    fault: Relayed,
    until: Instant,
}

/// What tells whether two faults are of the same page, and of the same kind.
type Place = (TargetId, u64, bool);

fn place(fault: &Relayed) -> Place {
    (fault.target().id, fault.address(), fault.why() == Why::Protected)
}

/// A deputy's, or what one has left.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) id: SeatId,
    pub(super) claim: Claim,
    /// Who holds it, for people.
    pub(super) holder: String,
    /// None while it is vacant.
    pub(super) line: Option<Line>,
    targets: HashSet<TargetId>,
    /// Faults without an answer. The time for each is the same, so the first is the first due.
    open: BTreeMap<u64, Open>,
    places: HashMap<Place, u64>,
    ended: BTreeSet<u64>,
}

impl Seat {
    fn claims(&self, run: Run) -> bool {
        overlaps(&self.claim.runs, run)
    }

    /// Whether targets that one concerns are, or may come to be, the other's too.
    fn meets(&self, other: &Claim) -> bool {
        self.claim.pid == 0 || other.pid == 0 || self.claim.pid == other.pid
    }

    fn concerns(&self, target: &Target) -> bool {
        let pid = target.pid().map_or(0, i32::unsigned_abs);
        self.claim.pid == 0
            || self.claim.pid == pid
            || target.parent.is_some_and(|parent| self.targets.contains(&parent))
    }

    /// Sends to the holder, if there is one. Says whether somebody must see to the line.
    fn push(&mut self, message: &Message) -> bool {
        self.line.as_mut().is_some_and(|line| line.push(message, None))
    }

    /// Takes a fault in. Says whether somebody must see to the line.
    fn take(&mut self, number: u64, fault: Relayed) -> bool {
        let place = place(&fault);
        if let Some(known) = self.places.get(&place).and_then(|known| self.open.get_mut(known)) {
            known.fault.join(fault);
            return false;
        }
        let until = Instant::now() + fault.patience();
        let message = Message::Fault {
            fault: number,
            target: place.0,
            address: place.1,
            page: fault.run().start,
            why: match fault.why() {
                Why::Claimed => wire::Why::Claimed,
                Why::Declined => wire::Why::Declined,
                Why::Protected => wire::Why::Protected,
            },
        };
        self.places.insert(place, number);
        self.open.insert(number, Open { fault, until });
        self.push(&message)
    }

    fn close(&mut self, number: u64) -> Option<Relayed> {
        let open = self.open.remove(&number)?;
        self.places.remove(&place(&open.fault));
        Some(open.fault)
    }

    /// Takes out the open faults of which this is true.
    fn close_all(&mut self, which: impl Fn(&Relayed) -> bool) -> Vec<Relayed> {
        let these: Vec<u64> =
            self.open.iter().filter(|(_, open)| which(&open.fault)).map(|(at, _)| *at).collect();
        these
            .into_iter()
            .filter_map(|number| {
                if self.line.is_some() {
                    self.ended.insert(number);
                    if self.ended.len() > MOST_ENDED {
                        self.ended.pop_first();
                    }
                }
                self.close(number)
            })
            .collect()
    }

    /// When the first fault is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.open.first_key_value().map(|(_, open)| open.until)
    }

    /// Whether nothing is left of it.
    fn is_over(&self) -> bool {
        let no_targets = self.claim.pid != 0 && self.targets.is_empty();
        self.line.is_none() && self.open.is_empty() && (self.claim.runs.is_empty() || no_targets)
    }
}

/// All seats.
#[derive(Debug, Default)]
pub(super) struct Seats {
    pub(super) seats: Vec<Seat>,
    seats_ever: SeatId,
    faults_ever: u64,
}

impl Seats {
    /// Gives a seat to somebody who wants one, and will be told `welcome` first.
    ///
    /// # Errors
    /// Why it cannot have it.
    pub(super) fn admit(
        &mut self,
        claim: Claim,
        holder: String,
        mut line: Line,
        welcome: &Message,
    ) -> Result<SeatId, (Line, String)> {
        for seat in self.seats.iter().filter(|seat| seat.line.is_some() && seat.meets(&claim)) {
            let taken = claim.runs.iter().find(|run| seat.claims(**run));
            let why = match taken {
                Some(run) => format!("pages {} to {} are claimed", run.start, run.end()),
                None if claim.declined && seat.claim.declined => {
                    "what is declined is taken".to_owned()
                }
                None => continue,
            };
            return Err((line, format!("{why} by {}", seat.holder)));
        }
        line.push(welcome, None);
        self.seats_ever += 1;
        self.seats.push(Seat {
            id: self.seats_ever,
            claim,
            holder,
            line: Some(line),
            targets: HashSet::new(),
            open: BTreeMap::new(),
            places: HashMap::new(),
            ended: BTreeSet::new(),
        });
        Ok(self.seats_ever)
    }

    /// What `seat`, whose targets have joined, takes over from vacant ones; and its line is open.
    pub(super) fn succeed(&mut self, seat: SeatId) {
        let Some(at) = self.seats.iter().position(|one| one.id == seat) else { return };
        let mut heir = self.seats.swap_remove(at);
        for vacant in self.seats.iter_mut().filter(|one| one.line.is_none()) {
            let comes = |fault: &Relayed| {
                heir.targets.contains(&fault.target().id) && heir.claims(fault.run())
            };
            for fault in vacant.close_all(comes) {
                self.faults_ever += 1;
                heir.take(self.faults_ever, fault);
            }
            if heir.claim.pid == 0 || heir.claim.pid == vacant.claim.pid {
                let rest = vacant.claim.runs.iter();
                let rest = rest.flat_map(|run| complement(*run, &heir.claim.runs)).collect();
                vacant.claim.runs = rest;
            }
        }
        if let Some(line) = &mut heir.line {
            line.flush();
        }
        self.seats.push(heir);
        self.tidy();
    }

    /// Lets a target join one seat, or every one that it concerns: `tell` makes the messages for it.
    /// Says whether somebody must see to a line.
    pub(super) fn join(
        &mut self,
        target: &Target,
        only: Option<SeatId>,
        mut tell: impl FnMut(&mut Line) -> bool,
    ) -> bool {
        let mut attention = false;
        for seat in &mut self.seats {
            let asked = only.is_none_or(|only| only == seat.id);
            if asked && seat.concerns(target) && seat.targets.insert(target.id) {
                attention |= seat.line.as_mut().is_some_and(&mut tell);
            }
        }
        attention
    }

    /// Whether a target concerns anybody, and what is claimed of it.
    pub(super) fn claims_of(&self, target: TargetId) -> (bool, Vec<Run>) {
        let seats = || self.seats.iter().filter(|seat| seat.targets.contains(&target));
        (seats().next().is_some(), union(seats().flat_map(|seat| seat.claim.runs.clone())))
    }

    /// What is claimed of whatever target may come.
    pub(super) fn claimed_of_all(&self) -> Vec<Run> {
        let seats = self.seats.iter().filter(|seat| seat.claim.pid == 0);
        union(seats.flat_map(|seat| seat.claim.runs.clone()))
    }

    /// Tells every deputy that a target concerns. Says whether somebody must see to a line.
    pub(super) fn tell(&mut self, target: TargetId, message: &Message) -> bool {
        let mut attention = false;
        for seat in self.seats.iter_mut().filter(|seat| seat.targets.contains(&target)) {
            attention |= seat.push(message);
        }
        attention
    }

    /// Gives a fault to whom it belongs, or back; says whether somebody must see to a line.
    pub(super) fn take(&mut self, fault: Relayed) -> Result<bool, Relayed> {
        let (target, run, why) = (fault.target().id, fault.run(), fault.why());
        let seats = self.seats.iter_mut().filter(|seat| {
            seat.targets.contains(&target)
                && match why {
                    Why::Declined => seat.line.is_some() && seat.claim.declined,
                    Why::Claimed | Why::Protected => seat.claims(run),
                }
        });
        // One that somebody holds, if any.
        let Some(seat) = seats.max_by_key(|seat| seat.line.is_some()) else { return Err(fault) };
        self.faults_ever += 1;
        Ok(seat.take(self.faults_ever, fault))
    }

    /// A deputy's answer to a fault; none if the fault has ended meanwhile.
    ///
    /// # Errors
    /// How it breaks the protocol.
    pub(super) fn answered(
        &mut self,
        seat: SeatId,
        number: u64,
        answer: wire::Answer,
    ) -> Result<Option<(Relayed, Answer)>, String> {
        let Some(seat) = self.seats.iter_mut().find(|one| one.id == seat) else { return Ok(None) };
        let Some(open) = seat.open.get(&number) else {
            return match seat.ended.remove(&number) {
                true => Ok(None),
                false => Err(format!("it answered fault {number}, which it has not")),
            };
        };
        let (size, why) = (open.fault.target().page_size(), open.fault.why());
        let answer = match answer {
            wire::Answer::Content(bytes) if bytes.len() as u64 != size => {
                return Err(format!("it gave {} bytes for a page of {size}", bytes.len()));
            }
            wire::Answer::Content(bytes) => Answer::Content(bytes),
            wire::Answer::Done => Answer::Done,
            wire::Answer::Zero => Answer::Zero,
            wire::Answer::Poison => Answer::Poison,
            wire::Answer::Decline => Answer::Decline,
        };
        if why == Why::Protected && !matches!(answer, Answer::Done | Answer::Decline) {
            return Err("it gave content for a page that was there, and write-protected".to_owned());
        }
        Ok(seat.close(number).map(|fault| (fault, answer)))
    }

    /// A target is gone: the faults of it that were open.
    pub(super) fn left(&mut self, target: TargetId) -> (Vec<Relayed>, bool) {
        let (mut faults, mut attention) = (Vec::new(), false);
        for seat in &mut self.seats {
            if seat.targets.remove(&target) {
                attention |= seat.push(&Message::Left { target });
                faults.extend(seat.close_all(|fault| fault.target().id == target));
            }
        }
        self.tidy();
        (faults, attention)
    }

    /// What was claimed is the template's again: the faults that were open for that reason.
    pub(super) fn release(&mut self, seat: SeatId) -> Vec<Relayed> {
        let Some(seat) = self.seats.iter_mut().find(|one| one.id == seat) else {
            return Vec::new();
        };
        seat.claim.runs.clear();
        seat.close_all(|fault| fault.why() != Why::Declined)
    }

    /// The deputy is gone: its line, the faults that nobody can answer, and how many wait for a
    /// successor.
    pub(super) fn vacate(&mut self, seat: SeatId) -> Option<(String, Line, Vec<Relayed>, usize)> {
        let seat = self.seats.iter_mut().find(|one| one.id == seat)?;
        let line = seat.line.take()?;
        seat.ended.clear();
        let lost = seat.close_all(|fault| fault.why() == Why::Declined);
        let (holder, wait) = (seat.holder.clone(), seat.open.len());
        self.tidy();
        Some((holder, line, lost, wait))
    }

    /// The faults whose time is over, and the seats whose holders let that happen.
    pub(super) fn overdue(&mut self, now: Instant) -> (Vec<Relayed>, Vec<SeatId>) {
        let (mut faults, mut slow) = (Vec::new(), Vec::new());
        for seat in &mut self.seats {
            let before = faults.len();
            while seat.due().is_some_and(|due| due <= now) {
                let first = seat.open.first_key_value().map(|(number, _)| *number);
                faults.extend(first.and_then(|number| seat.close(number)));
            }
            if faults.len() > before && seat.line.is_some() {
                slow.push(seat.id);
            }
        }
        self.tidy();
        (faults, slow)
    }

    /// Everything, at the end.
    pub(super) fn clear(&mut self) -> Vec<Relayed> {
        let seats = std::mem::take(&mut self.seats);
        seats.into_iter().flat_map(|mut seat| seat.close_all(|_| true)).collect()
    }

    fn tidy(&mut self) {
        self.seats.retain(|seat| !seat.is_over());
    }

    /// Faults that are open: with deputies, and waiting for one.
    pub(super) fn open(&self) -> (usize, usize) {
        let count = |held: bool| {
            let seats = self.seats.iter().filter(|seat| seat.line.is_some() == held);
            seats.map(|seat| seat.open.len()).sum()
        };
        (count(true), count(false))
    }
}
