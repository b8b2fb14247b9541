//! The event loop.
//!
//! Some facts about userfaultfd:
//! - `read` hands out page faults *before* other events: a fault just read may be the consequence of
//!   a removal that was not read yet.
//! - The thread that caused an event (fork, mremap, madvise, munmap) waits until it is read. While
//!   it has not run again, every fill of that process answers EAGAIN, for milliseconds.
//! - A fault is delivered once.
//! - On a halted virtual CPU a wake-up costs 40 µs and more; a thread that is polling costs none.
//!
//! What that means for us:
//! - Drain everything that is pending, apply events to the region map, then serve the faults. The
//!   target's lock is held from before the read until the events are applied, so that no worker
//!   installs a page in between that was just removed.
//! - A refused fault goes to the target's deferred queue, and is tried again when events were read
//!   *and* on a timer that starts small: neither alone is enough.
//! - Where only one thread faults, one fault is read, and served without a look at what else there is:
//!   that look is 3 % of a fault. If there is an event, the kernel refuses.
//! - After a fault, keep looking at that target for a little while, about as long as a wake-up would
//!   cost, longer where that succeeds. Between faults the loop sleeps: an idle server costs nothing.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, Event as EpollEvent};
use rustix::event::Timespec;
use rustix::io::Errno;
use uffd::{Cause, Event, MessageBuffer};

use super::deputy::Happening;
use super::placement::{Neighbour, QUIET};
use super::region::RegionMap;
use super::target::{strand, NewTarget, Target};
use super::{after, Shared, TargetId, Token};

/// Messages read at once: a read costs a system call, a message 32 bytes.
const MESSAGES: usize = 64;
/// Polling after a fault lasts between these; each miss halves the time, each hit doubles it.
const SHORTEST_POLL: Duration = Duration::from_micros(10);
const LONGEST_POLL: Duration = Duration::from_micros(200);
/// A thread that offers its processor while it polls, and gets it back later than after a poll, has lost
/// it to others: who sleeps is preferred to who polls then. So long no polling.
const CROWDED: Duration = Duration::from_millis(5);
/// While polling for one target, see so often whether others wait.
const LOOK_AROUND: Duration = Duration::from_micros(500);
/// Exit and exec of a process without pidfd announce nothing: ask so often.
const LIFE_SIGN: Duration = Duration::from_secs(1);

/// Pause after a fork's descriptor found no room.
const STARVED_PAUSE: Duration = Duration::from_millis(10);

pub(super) fn run(shared: &Arc<Shared>) {
    let mut state = Loop {
        shared,
        messages: MessageBuffer::new(MESSAGES),
        one: MessageBuffer::new(1),
        faults: Vec::with_capacity(MESSAGES),
        poll: SHORTEST_POLL,
        crowded: Instant::now(),
        neighbour: Neighbour::new(Arc::clone(&shared.placement)),
        next_life_sign: after(LIFE_SIGN),
        starved: false,
    };
    let mut ready: Vec<EpollEvent> = Vec::with_capacity(MESSAGES);
    let mut due = None;
    while !shared.stopped.load(Relaxed) {
        ready.clear();
        state.wait(&mut ready, due);
        let mut hot = state.handle(&ready);
        if hot.is_empty() {
            state.neighbour.leave(Instant::now());
        }
        due = state.retry_deferred();
        if let (Some(target), None) = (hot.pop(), hot.pop()) {
            // Only one target is busy: polling for several would take the CPU they need.
            state.keep_polling(&target);
        }
        state.look_for_life();
    }
}

struct Loop<'a> {
    shared: &'a Arc<Shared>,
    messages: MessageBuffer,
    /// Room for one message.
    one: MessageBuffer,
    /// Faults just read, and whether each is a write to a protected page; empty in between.
    faults: Vec<(u64, bool)>,
    poll: Duration,
    /// No polling before this moment: others need the processor.
    crowded: Instant,
    neighbour: Neighbour,
    next_life_sign: Instant,
    /// Whether the last fork found no room for its descriptor.
    starved: bool,
}

impl Loop<'_> {
    fn wait(&mut self, ready: &mut Vec<EpollEvent>, due: Option<Instant>) {
        let mut until = due;
        if self.neighbour.stays() {
            let quiet = after(QUIET);
            until = Some(until.map_or(quiet, |due| due.min(quiet)));
        } else if !self.shared.targets().is_empty() {
            until = Some(until.map_or(self.next_life_sign, |due| due.min(self.next_life_sign)));
        }
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match epoll::wait(
            &self.shared.epoll,
            rustix::buffer::spare_capacity(ready),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                // The set is ours and valid; should it ever fail, do not turn that into a busy loop.
                self.shared.report(&format!("the event loop cannot wait: {errno}"));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Handles what is ready, and returns the targets that had faults.
    fn handle(&mut self, ready: &[EpollEvent]) -> Vec<Arc<Target>> {
        let mut hot = Vec::new();
        for event in ready {
            match Token::decode(event.data) {
                Token::Poke => {
                    let _ = rustix::io::read(&self.shared.poke, &mut [0; 8][..]);
                }
                Token::Exit(id) => self.shared.forget(id),
                Token::Events(id) => {
                    if let Some(target) = self.find(id) {
                        if self.drain(&target, Instant::now()) {
                            hot.push(target);
                        }
                    }
                }
            }
        }
        hot
    }

    fn find(&self, id: TargetId) -> Option<Arc<Target>> {
        self.shared.targets().get(&id).cloned()
    }

    /// Reads everything pending, now, applies events, then serves faults. Says whether there were any.
    fn drain(&mut self, target: &Arc<Target>, now: Instant) -> bool {
        let mut faults = std::mem::take(&mut self.faults);
        let mut children = Vec::new();
        let mut events = false;
        let mut starved = None;
        let alone = self.neighbour.expects_one();
        let (buffer, room) = match alone {
            true => (&mut self.one, 1),
            false => (&mut self.messages, MESSAGES),
        };
        let mut regions = target.regions_mut();
        loop {
            let mut read = 0;
            match target.uffd.read_events(buffer) {
                Err(error) if out_of_room(&error) => {
                    starved = Some(error);
                    break;
                }
                Err(error) => {
                    drop(regions);
                    let message = format!("target {}: cannot read its events: {error}", target.id);
                    self.shared.report(&message);
                    self.shared.forget(target.id);
                    return false;
                }
                Ok(messages) => {
                    for event in messages {
                        read += 1;
                        match event {
                            Event::Fault { address, flags, .. } => {
                                faults.push((address, Cause::of(flags) == Cause::WriteProtected));
                                continue;
                            }
                            Event::Remove { start, end } => {
                                regions.remove(start, end);
                                target.huge_given_back(start, end);
                                target.tell(self.shared, Happening::Remove(start, end));
                            }
                            Event::Unmap { start, end } => {
                                regions.unmap(start, end);
                                target.huge_given_back(start, end);
                                target.tell(self.shared, Happening::Unmap(start, end));
                            }
                            Event::Remap { from, to, len } => {
                                regions.remap(from, to, len);
                                target.huge_moved(from, to, len);
                                target.tell(self.shared, Happening::Remap(from, to, len));
                            }
                            // The child has what the parent has at this moment.
                            Event::Fork(uffd) => {
                                let child = self.shared.number();
                                target.tell(self.shared, Happening::Fork(child));
                                children.push((child, uffd, regions.clone()));
                            }
                            Event::Unknown(code) => {
                                self.shared.report(&format!("unknown userfaultfd event {code:#x}"));
                            }
                        }
                        events = true;
                    }
                }
            }
            if read < room || alone && !faults.is_empty() {
                break;
            }
        }
        drop(regions);
        for (child, uffd, regions) in children {
            self.adopt(target, child, uffd, regions);
        }
        let any = !faults.is_empty();
        if any {
            self.neighbour.faults(target, faults.len(), now);
        }
        for (address, protected) in faults.drain(..) {
            let fault = target.fault(address, protected, now);
            match target.beacon == Some(fault.address) {
                // A child asks who it is: no fault of the template's memory.
                true => target.answer_beacon(self.shared, fault),
                false => {
                    self.shared.faults.fetch_add(1, Relaxed);
                    target.faults.fetch_add(1, Relaxed);
                    target.serve(self.shared, fault);
                }
            }
        }
        self.faults = faults;
        if events {
            target.hasten(now);
        }
        self.starved = match (starved, self.starved) {
            (Some(error), before) => {
                if !before {
                    let message = format!("target {} cannot fork: {error}", target.id);
                    self.shared.report(&message);
                }
                // It is readable still: without a pause this would be a busy loop.
                std::thread::sleep(STARVED_PAUSE);
                true
            }
            (None, _) => false,
        };
        any
    }

    fn adopt(
        &self,
        parent: &Arc<Target>,
        id: TargetId,
        uffd: uffd::Userfaultfd,
        regions: RegionMap,
    ) {
        // Kept until it is known that the child is served: without a holder it would read zeros.
        let (spare, ranges) = (uffd.try_clone(), regions.clone());
        let child = NewTarget {
            uffd,
            process: None,
            template: Arc::clone(&parent.template),
            backend: Arc::clone(&parent.backend),
            regions,
            beacon: parent.beacon,
            page_size: parent.page_size,
            owner: None,
            connection: None,
        };
        let Err(error) = self.shared.add(id, Some(parent.id), child) else { return };
        let fate = match spare.map(|uffd| strand(uffd, &ranges, parent.page_size)) {
            Ok(false) => "it waits for ever for pages that it misses",
            _ => "its missing pages are poisoned",
        };
        let parent = parent.id;
        self.shared
            .report(&format!("a child of target {parent} cannot be served: {error}; {fate}"));
    }

    /// Tries deferred faults again, and says when the next one is due.
    fn retry_deferred(&self) -> Option<Instant> {
        if !self.shared.deferred.swap(false, AcqRel) {
            return None;
        }
        let targets: Vec<_> = self.shared.targets().values().cloned().collect();
        let mut next: Option<Instant> = None;
        for target in targets {
            for fault in target.take_due(Instant::now()) {
                target.serve(self.shared, fault);
            }
            next = [next, target.next_due()].into_iter().flatten().min();
        }
        if next.is_some() {
            self.shared.deferred.store(true, Release);
        }
        next
    }

    /// Looks at one target again and again for a while, which saves the wake-up of its next fault.
    /// Gives up the moment anybody else wants something.
    fn keep_polling(&mut self, target: &Arc<Target>) {
        let mut now = Instant::now();
        if now < self.crowded && !self.neighbour.stays() {
            return;
        }
        let (mut until, mut look_around) = (now + self.poll, now + LOOK_AROUND);
        let (mut hits, mut missed) = (0, 0);
        while now < until && !self.shared.stopped.load(Relaxed) {
            if now > look_around {
                if self.others_wait() {
                    break;
                }
                look_around = now + LOOK_AROUND;
            }
            let hit = self.drain(target, now);
            if hit {
                hits += 1;
                missed = 0;
            } else {
                missed += 1;
                if self.neighbour.stays() && missed > 1 && !self.neighbour.missed() {
                    // It does something else; to look again and again would only keep it from that.
                    break;
                }
                // The target may need this very CPU to get to its next fault.
                std::thread::yield_now();
            }
            let before = std::mem::replace(&mut now, Instant::now());
            if hit {
                until = now + self.poll;
            } else if now - before > LONGEST_POLL {
                self.crowded = now + CROWDED;
            }
        }
        self.poll = match hits {
            0 => (self.poll / 2).max(SHORTEST_POLL),
            _ => (self.poll * 2).min(LONGEST_POLL),
        };
    }

    /// Whether any descriptor is ready, or a deferred fault due.
    fn others_wait(&self) -> bool {
        let mut ready = [const { MaybeUninit::uninit() }; 1];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let (ready, _) = match epoll::wait(&self.shared.epoll, &mut ready, Some(&now)) {
            Ok(ready) => ready,
            Err(_) => return true,
        };
        !ready.is_empty() || self.shared.deferred.load(Relaxed)
    }

    /// Forgets targets whose address space is gone without a word.
    fn look_for_life(&mut self) {
        if Instant::now() < self.next_life_sign {
            return;
        }
        self.next_life_sign = after(LIFE_SIGN);
        let targets: Vec<_> = self.shared.targets().values().cloned().collect();
        for target in targets.iter().filter(|target| !target.is_alive()) {
            self.shared.forget(target.id);
        }
    }
}

/// Whether a read failed because a fork's descriptor found no room. The event is not lost then, nor
/// the child: it waits with its parent until there is room.
fn out_of_room(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}
