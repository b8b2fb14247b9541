//! The server's side of the shim: a socket at which preloaded programs attach (see [`crate::wire::shim`]).
//!
//! Some facts, and what follows:
//! - A userfaultfd gives no hang-up when its owner dies, and none on exec. `SO_PEERCRED` names the
//!   process that connected, and its pidfd tells when it exits; exec is noticed by the engine.
//! - The right to `EVENT_FORK` is checked on whoever makes the handshake. So the client sends its
//!   userfaultfd as it was created, and this side negotiates it.
//! - A FORK event brings the child's userfaultfd, but does not say which process the child is. The
//!   *beacon* does: a registered page that nobody has touched, answered with the target's number. The
//!   child reads its own number there, and asks for a descriptor of its own userfaultfd: until then
//!   this process is its only holder, and when the last holder goes the child reads zeros.
//! - A client that says nothing costs a descriptor: it is dropped after [`SILENCE`].
//! - In `share` a client can make zero pages of holes by reading its descriptor without registering.
//!   It is trusted like its siblings; [`crate::template`] audits what it does.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::SocketType;
use uffd::{passing, Features, Userfaultfd};

use crate::backend::{copy::Copy, share::Share, Backend};
use crate::delivery::Delivery;
use crate::door::{open_pidfd, Address, Door, Peer, Visit};
use crate::engine::region::RegionMap;
use crate::engine::{Engine, NewTarget};
use crate::error::{Error, Result};
use crate::page::{overlaps, Run, PAGE};
use crate::template::{zero_parts, Template, USUAL_REQUEST};
use crate::wire::shim::{Mapping, Message, Wish, LARGEST, MOST_ZERO_RUNS};

/// How long a client may be silent before it is served.
const SILENCE: Duration = Duration::from_secs(10);
/// Clients that may be connected at once.
const MOST_CLIENTS: usize = 4096;

/// What all clients of one socket get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// A plain private mapping of this very file, which is all the stack is.
    PlainSource,
    /// A plain private mapping of the template's file, loaded whole before.
    PlainLoaded,
    /// Served on demand.
    Served(Mapping),
}

impl Plan {
    /// The name for people: `plain`, `share` or `copy`.
    pub fn backend(self) -> &'static str {
        match self {
            Plan::PlainSource | Plan::PlainLoaded | Plan::Served(Mapping::Plain) => "plain",
            Plan::Served(Mapping::Share) => "share",
            Plan::Served(Mapping::Copy) => "copy",
        }
    }
}

/// Chooses how clients get the template, and says why.
///
/// # Errors
/// `Permission` if a served backend is demanded and there is no userfaultfd for it.
pub fn plan(template: &Template, delivery: &Delivery, backend: &str) -> Result<(Plan, String)> {
    let unavailable = delivery.check();
    match (backend, unavailable) {
        ("share", Ok(())) => Ok((Plan::Served(Mapping::Share), "asked for".to_owned())),
        ("copy", Ok(())) => Ok((Plan::Served(Mapping::Copy), "asked for".to_owned())),
        ("share" | "copy", Err(error)) => Err(error),
        ("plain", _) if template.mappable().is_some() => {
            Ok((Plan::PlainSource, "asked for; the source is a local file".to_owned()))
        }
        ("plain", _) => {
            let why = "asked for; the source is no plain file, so all of it is loaded first";
            Ok((Plan::PlainLoaded, why.to_owned()))
        }
        ("auto", _) if template.mappable().is_some() => Ok((
            Plan::PlainSource,
            "the source is a local raw file, which the kernel shares between forks by itself"
                .to_owned(),
        )),
        ("auto", Ok(())) if delivery.features().contains(Features::MISSING_SHMEM) => Ok((
            Plan::Served(Mapping::Share),
            "forks share the pages that any of them brought".to_owned(),
        )),
        ("auto", Ok(())) => Ok((
            Plan::Served(Mapping::Copy),
            "this kernel cannot serve mappings of a shared file".to_owned(),
        )),
        ("auto", Err(error)) => Ok((
            Plan::PlainLoaded,
            format!("userfaultfd is unavailable ({error}), so all of it is loaded first"),
        )),
        _ => Err(Error::usage(
            format!("{backend:?} names no backend"),
            "backends are auto, share, copy and plain",
        )),
    }
}

/// A socket at which shims attach. Dropping it closes all connections, which ends the clients.
#[derive(Debug)]
pub struct Listener {
    service: Arc<Service>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Service {
    door: Door,
    wake: OwnedFd,
    stopped: AtomicBool,
    engine: Arc<Engine>,
    template: Arc<Template>,
    delivery: Arc<Delivery>,
    plan: Plan,
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    peer: Peer,
    /// Until when it has to say the next thing; none once it is served.
    deadline: Option<Instant>,
    /// What it attached to, between Attach and Region.
    attached: Option<(Mapping, Run)>,
}

impl Listener {
    /// Listens at `address`.
    ///
    /// # Errors
    /// `AddressInUse` if another server answers there (a socket file that nobody listens at is
    /// replaced); `Kernel` otherwise.
    pub fn start(
        address: impl Into<Address>,
        engine: Arc<Engine>,
        template: Arc<Template>,
        delivery: Arc<Delivery>,
        plan: Plan,
    ) -> Result<Listener> {
        let address = address.into();
        let path = address.path.clone();
        let failed =
            |error: io::Error| Error::kernel(format!("cannot listen at {}", path.display()), error);
        if plan == Plan::PlainLoaded {
            template.load(USUAL_REQUEST, None).map_err(|error| Error::Unavailable {
                what: format!("cannot load {}", template.statistics().spec),
                error: io::Error::other(error.to_string()),
            })?;
        }
        let door = Door::open(address, SocketType::SEQPACKET)?;
        let service = Arc::new(Service {
            door,
            wake: eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?,
            stopped: AtomicBool::new(false),
            engine,
            template,
            delivery,
            plan,
        });
        let running = Arc::clone(&service);
        let thread = crate::thread::spawn("pk-shim", move || running.run()).map_err(failed)?;
        Ok(Listener { service, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.service.door.path()
    }

    /// Closes the socket and all connections.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.service.stopped.store(true, Relaxed);
        let _ = rustix::io::write(&self.service.wake, &1u64.to_ne_bytes());
        // The thread catches nothing, and owns nothing that others wait for.
        let _ = thread.join();
        self.service.door.remove();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Service {
    fn run(&self) {
        let mut connections: HashMap<i32, Connection> = HashMap::new();
        let mut buffer = vec![0; LARGEST];
        while !self.stopped.load(Relaxed) {
            let ready = self.wait(&connections);
            for descriptor in ready {
                if descriptor == self.door.as_fd().as_raw_fd() {
                    self.accept(&mut connections);
                } else if let Some(connection) = connections.get_mut(&descriptor) {
                    if !self.attend(connection, &mut buffer) {
                        connections.remove(&descriptor);
                    }
                }
            }
            let now = Instant::now();
            connections.retain(|_, connection| connection.deadline.is_none_or(|until| until > now));
        }
    }

    /// Waits until a descriptor is ready or a connection was silent too long.
    fn wait(&self, connections: &HashMap<i32, Connection>) -> Vec<i32> {
        let mut watched =
            vec![PollFd::new(&self.door, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        watched.extend(connections.values().map(|c| PollFd::new(&c.socket, PollFlags::IN)));
        let until = connections.values().filter_map(|connection| connection.deadline).min();
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        // An error (EINTR) is an early return, nothing else.
        let _ = poll(&mut watched, timeout.as_ref());
        watched
            .iter()
            .filter(|entry| !entry.revents().is_empty())
            .map(|entry| entry.as_fd().as_raw_fd())
            .collect()
    }

    fn accept(&self, connections: &mut HashMap<i32, Connection>) {
        loop {
            // Not blocking: a client that reads no answers must not stop us from answering others.
            let (socket, peer) = match self.door.accept() {
                Visit::Admitted(socket, peer) => (socket, peer),
                Visit::Refused(peer) => {
                    self.engine.report(&format!(
                        "user {} (pid {}) is not allowed to connect to {}",
                        peer.uid,
                        peer.pid,
                        self.door.path().display()
                    ));
                    continue;
                }
                Visit::Nobody => return,
            };
            // Connections above the limit are closed: their clients get a clear end.
            if connections.len() >= MOST_CLIENTS {
                continue;
            }
            let connection = Connection {
                peer,
                deadline: Some(Instant::now() + SILENCE),
                attached: None,
                socket,
            };
            connections.insert(connection.socket.as_raw_fd(), connection);
        }
    }

    /// Attends to one message; false when the connection is over.
    fn attend(&self, connection: &mut Connection, buffer: &mut [u8]) -> bool {
        let (length, descriptors) = match passing::receive(&connection.socket, buffer) {
            Ok((0, _)) | Err(_) => return false,
            Ok(received) => received,
        };
        let answer = Message::decode(&buffer[..length])
            .map_err(|malformed| malformed.to_string())
            .and_then(|message| self.answer(connection, message, descriptors));
        let (message, descriptors) = match &answer {
            Ok((message, descriptors)) => (message.clone(), &descriptors[..]),
            Err(text) => (Message::Refusal { text: text.clone() }, &[][..]),
        };
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        // Who cannot take an answer within its socket buffer is gone or hostile.
        passing::send(&connection.socket, &message.encode(), &borrowed).is_ok() && answer.is_ok()
    }

    fn answer(
        &self,
        connection: &mut Connection,
        message: Message,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(Message, Vec<OwnedFd>), String> {
        match message {
            Message::Attach { wish, offset, length } => {
                self.offer(connection, wish, offset, length)
            }
            Message::Region { start, beacon } => {
                let target = self.serve(connection, start, beacon, descriptors)?;
                connection.deadline = None;
                Ok((Message::Ready { target }, Vec::new()))
            }
            Message::Child { target } => {
                let uffd = self.identify(connection, target)?;
                connection.deadline = None;
                Ok((Message::Holder, vec![uffd]))
            }
            _ => Err("that is a message of the server's".to_owned()),
        }
    }

    fn offer(
        &self,
        connection: &mut Connection,
        wish: Wish,
        offset: u64,
        length: u64,
    ) -> Result<(Message, Vec<OwnedFd>), String> {
        let size = self.template.size();
        let end = length.checked_next_multiple_of(PAGE).and_then(|bytes| offset.checked_add(bytes));
        if length == 0 || offset % PAGE != 0 || end.is_none_or(|end| end > size) {
            return Err(format!(
                "a mapping of {length} bytes at {offset} is no part of the template's {size} bytes"
            ));
        }
        self.template.check().map_err(|error| error.to_string())?;
        let run = Run { start: offset / PAGE, pages: length.div_ceil(PAGE) };
        let mapping = match (self.plan, wish) {
            (Plan::Served(mapping), Wish::Auto) => mapping,
            (Plan::Served(_), Wish::Share) => Mapping::Share,
            (Plan::Served(_), Wish::Copy) => Mapping::Copy,
            (_, Wish::Auto) => Mapping::Plain,
            (_, wish) => {
                let asked = if wish == Wish::Share { "share" } else { "copy" };
                return Err(format!("this server does not serve {asked}: it maps a plain file"));
            }
        };
        let failed = |error: io::Error| format!("the server is out of descriptors: {error}");
        let mut descriptors = Vec::new();
        match mapping {
            Mapping::Plain => {
                let file = match self.plan {
                    Plan::PlainSource => self.template.mappable(),
                    _ => Some(self.template.cache().readonly()),
                };
                let file = file.ok_or("the source is no plain file")?;
                descriptors.push(file.try_clone_to_owned().map_err(failed)?);
                connection.deadline = None;
            }
            Mapping::Share => {
                let file = self.template.cache().readonly();
                descriptors.push(file.try_clone_to_owned().map_err(failed)?);
            }
            Mapping::Copy => {}
        }
        if mapping != Mapping::Plain {
            if let Some(device) = self.delivery.device() {
                descriptors.push(device.try_clone_to_owned().map_err(failed)?);
            }
            connection.attached = Some((mapping, run));
        }
        let zero_runs = match mapping {
            // A loaded file has its zeros as holes.
            Mapping::Plain => Vec::new(),
            Mapping::Share => zero_parts(&self.template, run, MOST_ZERO_RUNS),
            // What is zero in the template may be something else to whoever claims it.
            Mapping::Copy => {
                let claims = self.engine.claimed();
                let mut zeros = zero_parts(&self.template, run, MOST_ZERO_RUNS);
                zeros.retain(|zero| !overlaps(&claims, *zero));
                zeros
            }
        };
        let fork_events = self.delivery.fork_events();
        Ok((Message::Offer { mapping, fork_events, zero_runs }, descriptors))
    }

    fn serve(
        &self,
        connection: &mut Connection,
        start: u64,
        beacon: Option<u64>,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<u64, String> {
        let (mapping, run) = connection.attached.take().ok_or("a region came before its attach")?;
        let overflows = start.checked_add(run.bytes()).is_none();
        if start % PAGE != 0 || overflows || beacon.is_some_and(|beacon| beacon % PAGE != 0) {
            return Err(format!("no region can be at {start:#x}"));
        }
        let (Some(descriptor), true) = (descriptors.pop(), descriptors.is_empty()) else {
            return Err("a region comes with exactly one userfaultfd".to_owned());
        };
        if !uffd::handshake_needed(&descriptor).map_err(|error| error.to_string())? {
            return Err("the userfaultfd is negotiated already; send it as it was made".to_owned());
        }
        // The loop that reads it serves others too, and must never wait for this one.
        rustix::io::ioctl_fionbio(&descriptor, true).map_err(|error| error.to_string())?;
        let uffd = Userfaultfd::from(descriptor);
        let mut wanted = Features::EVENT_REMAP | Features::EVENT_UNMAP;
        if self.delivery.fork_events() {
            wanted = wanted | Features::EVENT_FORK;
        }
        // Removals are the shim's own business: it knows which discards mean zeros.
        uffd.handshake(wanted).map_err(|error| format!("the handshake failed: {error}"))?;
        let backend: Arc<dyn Backend> = match mapping {
            Mapping::Copy => Arc::new(Copy),
            _ => Arc::new(Share),
        };
        let new = NewTarget {
            uffd,
            process: Some((connection.peer.pid, watch(connection)?)),
            template: Arc::clone(&self.template),
            backend,
            regions: RegionMap::new(start, run),
            beacon,
            page_size: PAGE,
            owner: None,
            connection: None,
        };
        self.engine.add(new).map(|target| target.id).map_err(|error| error.to_string())
    }

    /// A child that was adopted says which process it is, and gets its userfaultfd to hold.
    fn identify(&self, connection: &Connection, id: u64) -> Result<OwnedFd, String> {
        let target = self.engine.target(id).filter(|target| target.parent.is_some());
        let target = target.ok_or(format!("there is no forked target {id}"))?;
        if !self.engine.identify(id, connection.peer.pid, watch(connection)?) {
            return Err(format!("target {id} is another process"));
        }
        let uffd = target.dup_uffd().map_err(|error| error.to_string())?;
        uffd.as_fd().try_clone_to_owned().map_err(|error| error.to_string())
    }
}

/// A descriptor of the client's process. A client whose number is not known here is not served: a
/// forked child could not be told from it.
fn watch(connection: &Connection) -> Result<OwnedFd, String> {
    if connection.peer.pid == 0 {
        return Err("the client is in another pid namespace".to_owned());
    }
    open_pidfd(&connection.socket, connection.peer)
}
