//! The relay: second handlers, *deputies*, in other processes get faults and events of the targets that
//! this server serves. (See [`crate::engine::deputy`] for why the engine has to read them all.)
//!
//! Some facts, and what follows:
//! - Deputies die, at any instant, and programs have bugs. A fault in a deputy's hands is known here until
//!   it is answered. When the deputy's end of the connection closes, what it had *claimed* waits, as long
//!   as an answer might have taken, for a successor that claims it: the template has other bytes there.
//!   What it was given because the template had failed has no better place to go, and fails at once.
//! - The thread that reads the events of all targets must wait for nobody. What a deputy does not read
//!   is kept for it, up to [`MOST_UNREAD`] messages; then it is cut off.
//! - What a deputy sends is checked like a stranger's. Whatever is not in the protocol ends the
//!   connection with a word on why; the rest is as if it had died.
//! - A deputy has a descriptor of each target's userfaultfd. By it, it could read events that are meant
//!   for us, or put anything anywhere in the target's regions: it is trusted with the targets' memory,
//!   like this server. Who may connect is up to the socket's owner, mode and list of users. (What we can
//!   prevent is that anybody waits for ever, or reads what neither the template nor the deputy has.)
//! - The kernel refuses to fill a target between an event and our reading of it, not until the deputy has
//!   read of it. Who resolves by the descriptor while the target gives memory back may so bring back a
//!   page for good. Content in an answer is put there only if it belongs there still.
//! - A process that is killed while it waits for a page may end only when all descriptors of its
//!   userfaultfd are closed: deputies close theirs at the target's end.

mod client;
mod line;
mod seats;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::SocketType;
use uffd::{passing, Features};

use crate::door::{Address, Door, Peer, Visit};
use crate::engine::deputy::{Deputy, Happening, Relayed};
use crate::engine::region::RegionMap;
use crate::engine::{Engine, Target, TargetId};
use crate::error::{Error, Result};
use crate::page::Run;
use crate::wire::relay::{self as wire, Claim, Joined, Message, LARGEST, MOST_REGIONS};
pub use client::{feature_names, Client, Failure, Heard, News};
use line::Line;
pub use line::MOST_UNREAD;
use seats::{SeatId, Seats};

/// From the connection until the claim.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections without a seat; further ones wait at the door.
const MOST_VISITORS: usize = 64;
/// Messages taken from one deputy before the others have their turn.
const MOST_AT_ONCE: usize = 256;

/// What the relay counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Statistics {
    /// Deputies that are connected.
    pub deputies: usize,
    /// Deputies that were.
    pub deputies_ever: u64,
    /// Deputies that were cut off.
    pub cut_off: u64,
    /// Faults that deputies have yet to answer.
    pub open_faults: usize,
    /// Faults that wait for a successor of a deputy that died.
    pub waiting_faults: usize,
}

/// The socket at which deputies connect. Dropping it ends their work: what they have not answered fails.
#[derive(Debug)]
pub struct Listener {
    service: Arc<Service>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What deputies are told of the template.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// Its pages.
    pub pages: u64,
    /// How long an answer may take.
    pub deadline: Duration,
}

#[derive(Debug)]
struct Service {
    door: Door,
    wake: OwnedFd,
    stopped: AtomicBool,
    engine: Arc<Engine>,
    served: Served,
    /// Never held while the engine is called. (The engine calls with a target's region map held.)
    seats: Mutex<Seats>,
    ever: AtomicU64,
    cut_off: AtomicU64,
}

/// A connection that has not said what it wants.
#[derive(Debug)]
struct Visitor {
    socket: OwnedFd,
    peer: Peer,
    deadline: Instant,
}

/// What the thread found to be ready.
#[derive(Debug, Default)]
struct Ready {
    door: bool,
    visitors: Vec<usize>,
    readable: Vec<SeatId>,
    writable: Vec<SeatId>,
}

impl Listener {
    /// Listens at `address`, and hands on what the deputies that come claim.
    ///
    /// # Errors
    /// Those of [`Door::open`]; `Kernel` when threads or descriptors run out.
    pub fn start(address: Address, engine: Arc<Engine>, served: Served) -> Result<Listener> {
        let failed = |error: io::Error| Error::kernel("cannot wait for second handlers", error);
        let service = Arc::new(Service {
            door: Door::open(address, SocketType::SEQPACKET)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| failed(errno.into()))?,
            stopped: AtomicBool::new(false),
            engine: Arc::clone(&engine),
            served,
            seats: Mutex::default(),
            ever: AtomicU64::new(0),
            cut_off: AtomicU64::new(0),
        });
        let running = Arc::clone(&service);
        let thread = crate::thread::spawn("pk-relay", move || running.keep_running());
        let thread = thread.map_err(failed)?;
        engine.appoint(Arc::clone(&service) as Arc<dyn Deputy>);
        Ok(Listener { service, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.service.door.path()
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let seats = self.service.seats();
        let (open_faults, waiting_faults) = seats.open();
        Statistics {
            deputies: seats.seats.iter().filter(|seat| seat.line.is_some()).count(),
            deputies_ever: self.service.ever.load(Relaxed),
            cut_off: self.service.cut_off.load(Relaxed),
            open_faults,
            waiting_faults,
        }
    }

    /// Closes the socket and all connections; what deputies have not answered fails.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.service.stopped.store(true, Relaxed);
        self.service.attend_soon();
        // Whatever ended it, the rest is to be done.
        let _ = thread.join();
        self.service.door.remove();
        self.service.engine.dismiss();
        let open = self.service.seats().clear();
        open.into_iter().for_each(|fault| fault.fail("is served no more: the server ends"));
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Deputy for Service {
    fn joined(&self, target: &Arc<Target>, regions: &RegionMap) {
        self.join(target, None, regions);
    }

    fn happened(&self, target: &Target, event: Happening) {
        let target = target.id;
        let message = match event {
            Happening::Fork(child) => Message::Fork { target, child },
            Happening::Remap(from, to, bytes) => Message::Remap { target, from, to, bytes },
            Happening::Remove(start, end) => Message::Remove { target, start, end },
            Happening::Unmap(start, end) => Message::Unmap { target, start, end },
        };
        if self.seats().tell(target, &message) {
            self.attend_soon();
        }
    }

    fn take(&self, fault: Relayed) -> Option<Relayed> {
        let taken = self.seats().take(fault);
        match taken {
            Ok(attention) => {
                if attention {
                    self.attend_soon();
                }
                None
            }
            Err(fault) => Some(fault),
        }
    }

    fn left(&self, target: TargetId) {
        let (faults, attention) = self.seats().left(target);
        if attention {
            self.attend_soon();
        }
        faults.into_iter().for_each(Relayed::abandon);
    }

    fn claimed(&self) -> Vec<Run> {
        self.seats().claimed_of_all()
    }
}

impl Service {
    fn seats(&self) -> MutexGuard<'_, Seats> {
        // Plain data, which a panic leaves in a usable state.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread, so that it looks at lines and times again.
    fn attend_soon(&self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Runs the relay. A panic in it is a bug, but must not leave anybody waiting: who is connected, and
    /// what is open, is known still.
    fn keep_running(&self) {
        while catch_unwind(AssertUnwindSafe(|| self.run())).is_err() {
            self.engine.report("a bug ended the relay; it starts again (please report this)");
        }
    }

    fn run(&self) {
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut buffer = vec![0; LARGEST];
        while !self.stopped.load(Relaxed) {
            let ready = self.wait(&visitors);
            for seat in ready.writable {
                let mut seats = self.seats();
                let seat = seats.seats.iter_mut().find(|one| one.id == seat);
                if let Some(line) = seat.and_then(|seat| seat.line.as_mut()) {
                    line.flush();
                }
            }
            for seat in ready.readable {
                self.attend(seat, &mut buffer);
            }
            // From the last one on: taking one out moves only those that were attended to.
            for at in ready.visitors.into_iter().rev() {
                let visitor = visitors.swap_remove(at);
                if let Some(back) = self.hear(visitor, &mut buffer) {
                    visitors.push(back);
                }
            }
            let now = Instant::now();
            visitors.retain(|visitor| visitor.deadline > now);
            self.enforce(now);
            if ready.door {
                self.accept(&mut visitors);
            }
        }
    }

    fn wait(&self, visitors: &[Visitor]) -> Ready {
        let mut due = visitors.iter().map(|visitor| visitor.deadline).min();
        let mut lines = Vec::new();
        {
            let seats = self.seats();
            // A fault that is handed over while we wait has that much time, so it needs no word of it.
            let next = (!seats.seats.is_empty()).then(|| Instant::now() + self.served.deadline);
            for seat in &seats.seats {
                due = [due, seat.due(), next].into_iter().flatten().min();
                let Some(line) = &seat.line else { continue };
                let mut events = PollFlags::IN;
                events.set(PollFlags::OUT, line.waits());
                lines.push((seat.id, line.socket(), events));
            }
        }
        let takes = if visitors.len() < MOST_VISITORS { PollFlags::IN } else { PollFlags::empty() };
        let mut watched =
            vec![PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&self.door, takes)];
        watched.extend(visitors.iter().map(|one| PollFd::new(&one.socket, PollFlags::IN)));
        watched.extend(lines.iter().map(|(_, socket, events)| PollFd::new(socket, *events)));
        let timeout = due.map(|due| {
            let left = due.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        // An error (EINTR) is an early return, nothing else.
        let _ = poll(&mut watched, timeout.as_ref());
        let events: Vec<PollFlags> = watched.iter().map(PollFd::revents).collect();
        if !events[0].is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8][..]);
        }
        let (guests, served) = events[2..].split_at(visitors.len());
        let seats = |which: fn(&PollFlags) -> bool| {
            let these = lines.iter().zip(served).filter(|(_, events)| which(events));
            these.map(|((seat, ..), _)| *seat).collect()
        };
        Ready {
            door: !events[1].is_empty(),
            visitors: (0..guests.len()).filter(|at| !guests[*at].is_empty()).collect(),
            readable: seats(|events| !events.difference(PollFlags::OUT).is_empty()),
            writable: seats(|events| events.contains(PollFlags::OUT)),
        }
    }

    fn accept(&self, visitors: &mut Vec<Visitor>) {
        while visitors.len() < MOST_VISITORS {
            match self.door.accept() {
                Visit::Admitted(socket, peer) => {
                    let deadline = Instant::now() + PATIENCE;
                    visitors.push(Visitor { socket, peer, deadline });
                }
                Visit::Refused(peer) => self.engine.report(&format!(
                    "user {} (pid {}) is not allowed to connect to {}",
                    peer.uid,
                    peer.pid,
                    self.door.path().display()
                )),
                Visit::Nobody => return,
            }
        }
    }

    /// Hears what a visitor wants; gives it back if it has said nothing yet.
    fn hear(&self, visitor: Visitor, buffer: &mut [u8]) -> Option<Visitor> {
        let claim = match passing::receive(&visitor.socket, buffer) {
            Ok((0, _)) => return None,
            Ok((length, _)) => Message::decode(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(visitor),
            Err(_) => return None,
        };
        let whole = Run { start: 0, pages: self.served.pages };
        let refusal = match claim {
            Ok(Message::Claim(claim)) => {
                match claim.runs.last().is_some_and(|last| last.end() > whole.end()) {
                    true => format!("the template has {} pages", whole.pages),
                    false => match self.welcome(visitor.socket, visitor.peer, claim) {
                        Ok(()) => return None,
                        Err((line, why)) => return Self::refuse(line, why),
                    },
                }
            }
            Ok(_) => "a claim comes first".to_owned(),
            Err(malformed) => malformed.to_string(),
        };
        Self::refuse(Line::corked(visitor.socket), refusal)
    }

    fn refuse(mut line: Line, text: String) -> Option<Visitor> {
        line.push(&Message::Refusal { text }, None);
        line.flush();
        None
    }

    /// Gives a deputy its seat. Before it hears that it has it, every target that lives has joined: from
    /// then on nothing that it claimed comes from the template.
    fn welcome(&self, socket: OwnedFd, peer: Peer, claim: Claim) -> Result<(), (Line, String)> {
        let line = Line::corked(socket);
        let deadline = u64::try_from(self.served.deadline.as_nanos()).unwrap_or(u64::MAX);
        let welcome = Message::Welcome { pages: self.served.pages, deadline };
        let holder = format!("a second handler (user {}, pid {})", peer.uid, peer.pid);
        let seat = self.seats().admit(claim, holder, line, &welcome)?;
        self.ever.fetch_add(1, Relaxed);
        for target in self.engine.living() {
            target.hold(|regions| self.join(&target, Some(seat), regions));
        }
        self.seats().succeed(seat);
        self.attend_soon();
        Ok(())
    }

    /// Lets a target join; its region map is held.
    fn join(&self, target: &Target, only: Option<SeatId>, regions: &RegionMap) {
        let mut seats = self.seats();
        // One that ended meanwhile has left already.
        if target.is_gone() {
            return;
        }
        let attention = seats.join(target, only, |line| introduce(target, regions, line));
        self.set(target, &seats);
        drop(seats);
        if attention {
            self.attend_soon();
        }
    }

    /// Tells a target whose it is now; its region map is held.
    fn set(&self, target: &Target, seats: &Seats) {
        let (relayed, claims) = seats.claims_of(target.id);
        target.relay(relayed, if target.can_be_filled() { claims } else { Vec::new() });
    }

    /// Tells all targets whose they are now.
    fn set_all(&self) {
        for target in self.engine.living() {
            target.hold(|_| self.set(&target, &self.seats()));
        }
    }

    /// Takes what a deputy has sent.
    fn attend(&self, seat: SeatId, buffer: &mut [u8]) {
        for _ in 0..MOST_AT_ONCE {
            let received = {
                let mut seats = self.seats();
                let seat = seats.seats.iter_mut().find(|one| one.id == seat);
                let Some(line) = seat.and_then(|seat| seat.line.as_mut()) else { return };
                passing::receive(&*line, buffer)
            };
            let outcome = match received {
                Ok((0, _)) => return self.vacate(seat, None),
                Ok((length, _)) => Message::decode(&buffer[..length])
                    .map_err(|malformed| malformed.to_string())
                    .and_then(|message| self.obey(seat, message)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return self.vacate(seat, None)
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = outcome {
                return self.vacate(seat, Some(&why));
            }
        }
    }

    fn obey(&self, seat: SeatId, message: Message) -> Result<(), String> {
        match message {
            Message::Answer { fault, answer } => {
                let answered = self.seats().answered(seat, fault, answer)?;
                if let Some((fault, answer)) = answered {
                    fault.answer(answer);
                }
                Ok(())
            }
            Message::Release => {
                let open = self.seats().release(seat);
                self.set_all();
                let decline = crate::engine::deputy::Answer::Decline;
                open.into_iter().for_each(|fault| fault.answer(decline.clone()));
                Ok(())
            }
            Message::Claim(_) => Err("it has claimed already".to_owned()),
            _ => Err("it sent a message of the server's".to_owned()),
        }
    }

    /// A deputy has ended, or is cut off: `why`.
    fn vacate(&self, seat: SeatId, why: Option<&str>) {
        let vacated = self.seats().vacate(seat);
        let Some((holder, line, lost, waiting)) = vacated else { return };
        if let Some(why) = why {
            // If it has no room for that it will have to guess.
            let refusal = Message::Refusal { text: why.to_owned() }.encode();
            let _ = passing::send(&line, &refusal, &[]);
        }
        if why.is_some() || waiting + lost.len() > 0 {
            let end = why.map_or("ended".to_owned(), |why| format!("was cut off: {why}"));
            self.engine.report(&format!(
                "{holder} {end}; of its faults {} fail, and {waiting} wait for a successor",
                lost.len()
            ));
        }
        self.cut_off.fetch_add(u64::from(why.is_some()), Relaxed);
        drop(line);
        lost.into_iter().for_each(|fault| fault.fail("is gone"));
        self.set_all();
    }

    /// Ends what takes too long, or has no room left.
    fn enforce(&self, now: Instant) {
        let (faults, slow) = self.seats().overdue(now);
        for fault in faults {
            fault.fail(&format!("did not come within {:?}", self.served.deadline));
        }
        for seat in slow {
            let why = format!("it did not answer a fault within {:?}", self.served.deadline);
            self.vacate(seat, Some(&why));
        }
        let broken: Vec<(SeatId, String)> = {
            let seats = self.seats();
            let broken = |line: &Option<Line>| line.as_ref()?.broken().map(str::to_owned);
            seats.seats.iter().filter_map(|seat| Some((seat.id, broken(&seat.line)?))).collect()
        };
        for (seat, why) in broken {
            self.vacate(seat, Some(&why));
        }
    }
}

/// Tells a deputy of a target. Says whether somebody must see to the line.
fn introduce(target: &Target, regions: &RegionMap, line: &mut Line) -> bool {
    let uffd = match target.dup_uffd().and_then(|uffd| uffd.as_fd().try_clone_to_owned()) {
        Ok(uffd) => uffd,
        Err(_) => return line.give_up("the server is out of descriptors"),
    };
    let features = uffd::negotiated(&uffd).ok().flatten().unwrap_or(Features::NONE);
    let pieces = regions.pieces();
    let joined = Joined {
        target: target.id,
        parent: target.parent,
        pid: target.pid().map(i32::unsigned_abs),
        page_size: target.page_size(),
        features: features.0,
        claims: target.can_be_filled(),
        regions: pieces.len() as u64,
    };
    let mut attention = line.push(&Message::Joined(joined), Some(uffd));
    let regions: Vec<wire::Region> =
        pieces.map(|(start, bytes, page)| wire::Region { start, bytes, page }).collect();
    for part in regions.chunks(MOST_REGIONS) {
        let message = Message::Regions { target: target.id, regions: part.to_vec() };
        attention |= line.push(&message, None);
    }
    attention
}
