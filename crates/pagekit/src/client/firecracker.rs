//! The server's side of Firecracker's userfaultfd handler protocol, which other VMMs speak too (see
//! [`crate::wire::firecracker`]). The backend is `copy`.
//!
//! Some facts, and what follows:
//! - The userfaultfd comes negotiated and registered, and neither can be done again, nor asked. What
//!   the client says of its memory is checked by fills that can never fill anything.
//! - The client waits for no answer, and goes on to touch its memory. It holds its userfaultfd too, so
//!   that closing ours lets nobody go: a client that handed one over and cannot be served would wait for
//!   ever at its first fault, and is killed, with a word on why. So are those that live when we stop.
//! - `SO_PEERPIDFD` is the very process that connected, whatever its number means meanwhile. It tells
//!   when the target has ended. The end of the connection does not; a connection is kept open, and not
//!   read, as long as its target lives.
//! - A descriptor that finds no room in our table is closed by the kernel while it is received. The
//!   client that sent it cannot be served.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::SocketType;
use uffd::{passing, Errno, Features, Userfaultfd};

use crate::backend::copy::Copy;
use crate::door::{open_pidfd, Address, Door, Peer, Visit};
use crate::engine::region::RegionMap;
use crate::engine::{kill, Engine, NewTarget, TargetId};
use crate::error::{Error, Result};
use crate::page::PAGE;
use crate::template::Template;
use crate::wire::firecracker::{Handshake, Incoming, Region};

/// From the connection until the handshake is complete.
const PATIENCE: Duration = Duration::from_secs(10);
/// From the end of a connection or of its memory, which a process gives up while it ends, until it has
/// ended.
const ENDING: Duration = Duration::from_secs(1);
/// Why nobody is served whose memory is gone.
const GONE: &str = "its userfaultfd is of a process that has ended";
/// Clients in the middle of their handshake; further ones wait at the door.
const MOST_VISITORS: usize = 1024;
/// Bytes of incomplete handshakes, of all clients together.
const MOST_BYTES: usize = 64 << 20;
/// Bytes received at once.
const PIECE: usize = 64 << 10;
/// Questions asked about the memory of one client: at least two a region, more where a region consists
/// of several mappings.
const MOST_PROBES: u32 = 1 << 20;

/// How the clients of all sockets fared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Clients {
    /// Became targets.
    pub served: u64,
    /// Could not be served.
    pub refused: u64,
    /// Killed: those of the refused that had handed over a userfaultfd.
    pub killed: u64,
    /// Turned away, as their user is not on the list.
    pub not_allowed: u64,
}

/// The sockets at which VMMs connect. Dropping it kills the VMMs that live, which nobody would serve.
#[derive(Debug)]
pub struct Listener {
    service: Arc<Service>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Service {
    doors: Vec<Door>,
    wake: OwnedFd,
    stopped: AtomicBool,
    engine: Arc<Engine>,
    template: Arc<Template>,
    targets: Mutex<Vec<TargetId>>,
    served: AtomicU64,
    refused: AtomicU64,
    killed: AtomicU64,
    not_allowed: AtomicU64,
}

/// A client in the middle of its handshake.
#[derive(Debug)]
struct Visitor {
    socket: OwnedFd,
    peer: Peer,
    pidfd: OwnedFd,
    deadline: Instant,
    message: Incoming,
    descriptors: Vec<OwnedFd>,
    /// Whether it handed over a userfaultfd, so far as we know.
    handed_over: bool,
    /// Why it cannot be served, if it has hung up. Perhaps it is just ending.
    hung_up: Option<String>,
}

impl Visitor {
    /// What tells that there is something to attend to.
    fn watched(&self) -> BorrowedFd<'_> {
        match self.hung_up {
            None => self.socket.as_fd(),
            Some(_) => self.pidfd.as_fd(),
        }
    }

    /// It seems to be ending: that is waited for. Not done with.
    fn ends(&mut self, why: String) -> bool {
        self.hung_up = Some(why);
        self.deadline = self.deadline.min(Instant::now() + ENDING);
        false
    }
}

impl Listener {
    /// Listens at `addresses`.
    ///
    /// # Errors
    /// Those of [`Door::open`]; `Kernel` when threads or descriptors run out.
    pub fn start(
        addresses: Vec<Address>,
        engine: Arc<Engine>,
        template: Arc<Template>,
    ) -> Result<Listener> {
        let failed = |error: io::Error| Error::kernel("cannot wait for VMMs", error);
        let open = |address| Door::open(address, SocketType::STREAM);
        let service = Arc::new(Service {
            doors: addresses.into_iter().map(open).collect::<Result<_>>()?,
            wake: eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?,
            stopped: AtomicBool::new(false),
            engine,
            template,
            targets: Mutex::default(),
            served: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            killed: AtomicU64::new(0),
            not_allowed: AtomicU64::new(0),
        });
        let running = Arc::clone(&service);
        let thread =
            crate::thread::spawn("pk-firecracker", move || running.run()).map_err(failed)?;
        Ok(Listener { service, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens, in the order given.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.service.doors.iter().map(Door::path)
    }

    /// Counters, now.
    pub fn clients(&self) -> Clients {
        let service = &self.service;
        Clients {
            served: service.served.load(Relaxed),
            refused: service.refused.load(Relaxed),
            killed: service.killed.load(Relaxed),
            not_allowed: service.not_allowed.load(Relaxed),
        }
    }

    /// Closes the sockets, and kills the VMMs that live.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.service.stopped.store(true, Relaxed);
        let _ = rustix::io::write(&self.service.wake, &1u64.to_ne_bytes());
        // Whatever ended it, the rest is to be done.
        let _ = thread.join();
        self.service.doors.iter().for_each(Door::remove);
        for id in std::mem::take(&mut *self.service.targets()) {
            if let Some(target) = self.service.engine.target(id) {
                let why = "the server ends, and pages that it misses would never come";
                self.service.engine.kill(&target, why);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Service {
    fn run(&self) {
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut buffer = vec![0; PIECE];
        while !self.stopped.load(Relaxed) {
            let (doors, ready) = self.wait(&visitors);
            // From the last one on: taking one out moves only those that were attended to.
            for at in ready.into_iter().rev() {
                match self.attend(&mut visitors[at], &mut buffer) {
                    Ok(true) => drop(visitors.swap_remove(at)),
                    Ok(false) => {}
                    Err(why) => self.refuse(visitors.swap_remove(at), &why),
                }
            }
            self.limit(&mut visitors);
            doors.into_iter().for_each(|at| self.accept(&self.doors[at], &mut visitors));
        }
        visitors.into_iter().for_each(|visitor| self.refuse(visitor, "the server ends"));
    }

    /// Waits until something is ready or a visitor has no time left. Returns the places of doors and of
    /// visitors that are ready.
    fn wait(&self, visitors: &[Visitor]) -> (Vec<usize>, Vec<usize>) {
        let doors = if visitors.len() < MOST_VISITORS { &self.doors[..] } else { &[] };
        let mut watched: Vec<PollFd<'_>> =
            doors.iter().map(|door| PollFd::new(door, PollFlags::IN)).collect();
        watched
            .extend(visitors.iter().map(|v| PollFd::from_borrowed_fd(v.watched(), PollFlags::IN)));
        watched.push(PollFd::new(&self.wake, PollFlags::IN));
        let until = visitors.iter().map(|visitor| visitor.deadline).min();
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        // An error (EINTR) is an early return, nothing else.
        let _ = poll(&mut watched, timeout.as_ref());
        let ready = |watched: &[PollFd<'_>]| -> Vec<usize> {
            let places = watched.iter().enumerate();
            places.filter(|(_, one)| !one.revents().is_empty()).map(|(at, _)| at).collect()
        };
        let (doors, visitors) = watched[..watched.len() - 1].split_at(doors.len());
        (ready(doors), ready(visitors))
    }

    fn accept(&self, door: &Door, visitors: &mut Vec<Visitor>) {
        while visitors.len() < MOST_VISITORS {
            let (socket, peer) = match door.accept() {
                Visit::Admitted(socket, peer) => (socket, peer),
                Visit::Refused(peer) => {
                    self.engine.report(&format!(
                        "user {} (pid {}) is not allowed to connect to {}",
                        peer.uid,
                        peer.pid,
                        door.path().display()
                    ));
                    self.not_allowed.fetch_add(1, Relaxed);
                    continue;
                }
                Visit::Nobody => return,
            };
            let pidfd = match open_pidfd(&socket, peer) {
                Ok(pidfd) => pidfd,
                Err(why) => {
                    self.engine.report(&format!("{} cannot be served: {why}", name(peer)));
                    self.refused.fetch_add(1, Relaxed);
                    continue;
                }
            };
            visitors.push(Visitor {
                socket,
                peer,
                pidfd,
                deadline: Instant::now() + PATIENCE,
                message: Incoming::default(),
                descriptors: Vec::new(),
                handed_over: false,
                hung_up: None,
            });
        }
    }

    /// Takes what a visitor has sent, and serves it if that is all. Says whether it is done with.
    fn attend(&self, visitor: &mut Visitor, buffer: &mut [u8]) -> Result<bool, String> {
        if let Some(why) = &visitor.hung_up {
            return Err(why.clone());
        }
        let received = match passing::receive_some(&visitor.socket, buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(format!("its connection failed: {error}")),
        };
        visitor.handed_over |=
            received.cut || received.descriptors.iter().any(|one| uffd::negotiated(one).is_ok());
        visitor.descriptors.extend(received.descriptors);
        if received.cut {
            return Err("not all descriptors that it sent could be received".to_owned());
        }
        if visitor.descriptors.len() > 1 {
            let sent = visitor.descriptors.len();
            return Err(format!("it sent {sent} descriptors instead of one"));
        }
        if received.bytes == 0 {
            let why = match (visitor.message.is_complete(), visitor.message.is_empty()) {
                (true, _) => "it sent no userfaultfd",
                (false, false) => "it hung up in the middle of its handshake",
                // Somebody looked whether somebody is there.
                (false, true) => return Ok(true),
            };
            if !visitor.handed_over {
                return Err(why.to_owned());
            }
            return Ok(visitor.ends(why.to_owned()));
        }
        let message = &mut visitor.message;
        message.push(&buffer[..received.bytes]).map_err(|malformed| malformed.to_string())?;
        if !message.is_complete() || visitor.descriptors.is_empty() {
            return Ok(false);
        }
        let target = match self.serve(visitor) {
            Err(why) if why == GONE => return Ok(visitor.ends(why)),
            served => served?,
        };
        self.served.fetch_add(1, Relaxed);
        let mut targets = self.targets();
        targets.retain(|id| self.engine.target(*id).is_some());
        targets.push(target);
        Ok(true)
    }

    /// Makes a target of a visitor that has said everything.
    fn serve(&self, visitor: &mut Visitor) -> Result<TargetId, String> {
        let handshake = Handshake::decode(visitor.message.bytes(), self.template.size())
            .map_err(|malformed| malformed.to_string())?;
        self.template.check().map_err(|error| error.to_string())?;
        let failed = |error: io::Error| format!("the server is out of descriptors: {error}");
        let descriptor = visitor.descriptors.pop().ok_or("it sent no userfaultfd")?;
        let features = uffd::negotiated(&descriptor).map_err(|error| error.to_string())?;
        let features = features.ok_or("its userfaultfd was not negotiated (UFFDIO_API)")?;
        if features.contains(Features::SIGBUS) {
            return Err("its userfaultfd was negotiated with SIGBUS, and tells nobody".to_owned());
        }
        // The loop that reads it serves others too, and must never wait for this one.
        rustix::io::ioctl_fionbio(&descriptor, true).map_err(|error| error.to_string())?;
        let uffd = Userfaultfd::from(descriptor);
        Registered { uffd: &uffd, page_size: handshake.page_size, probes: 0 }
            .check(&handshake.regions)?;
        if !features.contains(Features::EVENT_REMOVE) {
            self.engine.report(&format!(
                "{} does not announce what it gives back (EVENT_REMOVE): there it will read the \
                 template's content again, not zeros",
                name(visitor.peer)
            ));
        }
        let regions = handshake.regions.iter().map(|region| (region.start, region.run));
        let new = NewTarget {
            uffd,
            process: Some((visitor.peer.pid, visitor.pidfd.try_clone().map_err(failed)?)),
            template: Arc::clone(&self.template),
            backend: Arc::new(Copy),
            regions: RegionMap::of(regions),
            beacon: None,
            page_size: handshake.page_size,
            owner: None,
            connection: Some(visitor.socket.try_clone().map_err(failed)?),
        };
        self.engine.add(new).map(|target| target.id).map_err(|error| error.to_string())
    }

    /// Turns a visitor away. One that would wait for ever is killed.
    fn refuse(&self, visitor: Visitor, why: &str) {
        let consequence = match visitor.handed_over {
            false => "it was disconnected".to_owned(),
            true if has_ended(&visitor.pidfd) => "it has ended already".to_owned(),
            true => match kill(visitor.peer.pid, &visitor.pidfd) {
                Ok(_) => {
                    self.killed.fetch_add(1, Relaxed);
                    "it was killed, for it would wait for its memory for ever".to_owned()
                }
                Err(error) => format!("and it could not be killed: {error}"),
            },
        };
        let who = name(visitor.peer);
        self.engine.report(&format!("{who} cannot be served: {why}; {consequence}"));
        self.refused.fetch_add(1, Relaxed);
    }

    /// Turns away who takes too long, or too much room.
    fn limit(&self, visitors: &mut Vec<Visitor>) {
        let now = Instant::now();
        while let Some(at) = visitors.iter().position(|visitor| visitor.deadline <= now) {
            let mut visitor = visitors.swap_remove(at);
            let what = match (visitor.message.is_complete(), visitor.descriptors.is_empty()) {
                (true, true) => "it sent no userfaultfd",
                (_, true) => "it sent neither all of its regions nor its userfaultfd",
                (_, false) => "it did not send all of its regions",
            };
            let late = || format!("{what} within {} s", PATIENCE.as_secs());
            let why = visitor.hung_up.take().unwrap_or_else(late);
            self.refuse(visitor, &why);
        }
        while visitors.iter().map(|visitor| visitor.message.len()).sum::<usize>() > MOST_BYTES {
            let sizes = visitors.iter().enumerate().map(|(at, v)| (v.message.len(), at));
            let Some((_, at)) = sizes.max() else { return };
            let visitor = visitors.swap_remove(at);
            self.refuse(visitor, "too many large handshakes arrive at once");
        }
    }

    fn targets(&self) -> MutexGuard<'_, Vec<TargetId>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(peer: Peer) -> String {
    format!("a VMM (user {}, pid {})", peer.uid, peer.pid)
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Finds out whether memory is what the client says.
struct Registered<'a> {
    uffd: &'a Userfaultfd,
    page_size: u64,
    probes: u32,
}

impl Registered<'_> {
    /// # Errors
    /// What is not as it must be.
    fn check(&mut self, regions: &[Region]) -> Result<(), String> {
        for region in regions {
            // The kernel wakes at any address of a process, and only there.
            if self.uffd.wake(region.start, region.run.bytes()).is_err() {
                return Err(format!("the region at {:#x} is in no address space", region.start));
            }
            let found = match self.probe(region.start, PAGE)? {
                Errno::INVAL => "huge pages",
                Errno::FAULT => "pages of 4096 bytes",
                // Not registered, as the next question finds; or nothing can be known now.
                _ => "",
            };
            let said = if self.page_size == PAGE { "pages of 4096 bytes" } else { "huge pages" };
            if !found.is_empty() && found != said {
                let start = region.start;
                return Err(format!("the region at {start:#x} has {found}, not {said}"));
            }
            self.is_covered(region)?;
        }
        Ok(())
    }

    /// A region may be several mappings: a client may have protected parts of it. Then the kernel says
    /// ENOENT of all of it, and the parts are asked for.
    fn is_covered(&mut self, region: &Region) -> Result<(), String> {
        let mut parts = vec![(region.start, region.run.bytes())];
        while let Some((start, len)) = parts.pop() {
            // A question for whole huge pages would take one.
            let asked = if self.page_size == PAGE { len } else { len - PAGE };
            if self.probe(start, asked)? != Errno::NOENT {
                continue;
            }
            if len == self.page_size {
                return Err(format!(
                    "the page at {start:#x}, of the region at {:#x}, is not registered with its \
                     userfaultfd",
                    region.start
                ));
            }
            let half = (len / 2).next_multiple_of(self.page_size);
            parts.extend([(start + half, len - half), (start, half)]);
        }
        Ok(())
    }

    fn probe(&mut self, start: u64, len: u64) -> Result<Errno, String> {
        self.probes += 1;
        if self.probes > MOST_PROBES {
            return Err("its regions consist of too many mappings".to_owned());
        }
        match self.uffd.probe_range(start, len) {
            Some(Errno::SRCH) => Err(GONE.to_owned()),
            answer => Ok(answer.unwrap_or(Errno::FAULT)),
        }
    }
}
