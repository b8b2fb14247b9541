//! The deputy's side: a connection to a server's relay.
//!
//! Descriptors of the targets' userfaultfds are kept here until their targets leave, as the server wants
//! it. Any thread may answer; one at a time hears the news.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{
    connect, socket_with, AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};
use uffd::{passing, Errno, Features, Userfaultfd};

use crate::page::PAGE;
use crate::wire::relay::{Answer, Claim, Joined, Message, Region, Why, LARGEST};

/// What a deputy hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// A target is served from now on, and that is what belongs where.
    Joined(Joined, Vec<Region>),
    /// A thread of a target waits.
    Fault {
        /// Number, for the answer.
        fault: u64,
        /// The target.
        target: u64,
        /// Where.
        address: u64,
        /// The page of the template.
        page: u64,
        /// Why it comes here.
        why: Why,
    },
    /// A target forked: parent, child.
    Fork(u64, u64),
    /// A target moved memory: target, from, to, bytes.
    Remap(u64, u64, u64, u64),
    /// A target gave memory back: target, start, end.
    Remove(u64, u64, u64),
    /// A target unmapped memory: target, start, end.
    Unmap(u64, u64, u64),
    /// A target is served no more.
    Left(u64),
}

/// Why a deputy cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server does not want it, or no more.
    #[error("{0}")]
    Refused(String),
    /// A system call failed.
    #[error("{0}")]
    System(#[from] io::Error),
    /// A signal came: call again.
    #[error("interrupted")]
    Interrupted,
    /// There is no such target, any more.
    #[error("target {0} is gone")]
    Gone(u64),
}

/// A connection to a relay. Dropping it is as good as dying, for the server.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// Pages of the template, and how long an answer may take.
    pages: u64,
    deadline: Duration,
    receiving: Mutex<Receiving>,
    targets: Mutex<HashMap<u64, (Joined, Arc<Userfaultfd>)>>,
}

struct Receiving {
    buffer: Vec<u8>,
    /// A target of which regions are still to come.
    joining: Option<(Joined, Vec<Region>)>,
}

impl std::fmt::Debug for Receiving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Receiving(joining {:?})", self.joining)
    }
}

impl Client {
    /// Connects to the relay at `path`, and claims.
    ///
    /// # Errors
    /// `Refused`: the server does not want that. `System`: nobody listens there, or one may not connect.
    pub fn connect(path: &Path, claim: Claim) -> Result<Client, Failure> {
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(io::Error::from)?;
        connect(&socket, &address).map_err(io::Error::from)?;
        let receiving = Receiving { buffer: vec![0; LARGEST], joining: None };
        let mut client = Client {
            socket,
            pages: 0,
            deadline: Duration::ZERO,
            receiving: Mutex::new(receiving),
            targets: Mutex::default(),
        };
        client.say(&Message::Claim(claim))?;
        let welcome = {
            let mut receiving = lock(&client.receiving);
            client.message(&mut receiving)?
        };
        match welcome {
            Some((Message::Welcome { pages, deadline }, _)) => {
                client.pages = pages;
                client.deadline = Duration::from_nanos(deadline);
                Ok(client)
            }
            Some(_) => Err(Failure::Refused("the server speaks another protocol".to_owned())),
            None => Err(Failure::Refused("the server hung up".to_owned())),
        }
    }

    /// Pages of the template.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How long an answer may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Waits for the next thing that happens, at most `time` if given.
    ///
    /// # Errors
    /// `Refused`: the server hung up, and says why. `Interrupted`: a signal came. `System`.
    pub fn next(&self, time: Option<Duration>) -> Result<Heard, Failure> {
        let mut receiving = lock(&self.receiving);
        loop {
            let timeout = time.map(|time| Timespec {
                tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: time.subsec_nanos().into(),
            });
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) => return Ok(Heard::Nothing),
                Ok(_) => {}
                Err(Errno::INTR) => return Err(Failure::Interrupted),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
            let Some((message, descriptor)) = self.message(&mut receiving)? else {
                return Ok(Heard::End);
            };
            if let Some(news) = self.understand(&mut receiving, message, descriptor)? {
                return Ok(Heard::News(news));
            }
        }
    }

    fn understand(
        &self,
        receiving: &mut Receiving,
        message: Message,
        descriptor: Option<OwnedFd>,
    ) -> Result<Option<News>, Failure> {
        Ok(Some(match message {
            Message::Joined(joined) => {
                let descriptor = descriptor.ok_or(Failure::Refused(
                    "a userfaultfd could not be received: is this process out of descriptors?"
                        .to_owned(),
                ))?;
                let uffd = Arc::new(Userfaultfd::from(descriptor));
                lock(&self.targets).insert(joined.target, (joined, uffd));
                receiving.joining = Some((joined, Vec::new()));
                return Ok(Self::complete(receiving));
            }
            Message::Regions { regions, .. } => {
                if let Some((_, all)) = &mut receiving.joining {
                    all.extend(regions);
                }
                return Ok(Self::complete(receiving));
            }
            Message::Fault { fault, target, address, page, why } => {
                News::Fault { fault, target, address, page, why }
            }
            Message::Fork { target, child } => News::Fork(target, child),
            Message::Remap { target, from, to, bytes } => News::Remap(target, from, to, bytes),
            Message::Remove { target, start, end } => News::Remove(target, start, end),
            Message::Unmap { target, start, end } => News::Unmap(target, start, end),
            Message::Left { target } => {
                lock(&self.targets).remove(&target);
                News::Left(target)
            }
            _ => return Err(Failure::Refused("the server speaks another protocol".to_owned())),
        }))
    }

    fn complete(receiving: &mut Receiving) -> Option<News> {
        let (joined, regions) = receiving.joining.take()?;
        if (regions.len() as u64) < joined.regions {
            receiving.joining = Some((joined, regions));
            return None;
        }
        Some(News::Joined(joined, regions))
    }

    /// The next message and its descriptor; none at the end of the connection.
    fn message(
        &self,
        receiving: &mut Receiving,
    ) -> Result<Option<(Message, Option<OwnedFd>)>, Failure> {
        let (length, mut descriptors) = match passing::receive(&self.socket, &mut receiving.buffer)
        {
            Ok((0, _)) => return Ok(None),
            Ok(received) => received,
            // It hung up without reading all that we said.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match Message::decode(&receiving.buffer[..length]) {
            Ok(Message::Refusal { text }) => Err(Failure::Refused(text)),
            Ok(message) => Ok(Some((message, descriptors.pop()))),
            Err(malformed) => Err(Failure::Refused(malformed.to_string())),
        }
    }

    /// Says what is to be done about a fault. Blocks while the server is behind with reading.
    ///
    /// # Errors
    /// `System`: the connection is over.
    pub fn answer(&self, fault: u64, answer: Answer) -> Result<(), Failure> {
        self.say(&Message::Answer { fault, answer })
    }

    /// Says that these bytes, a page of the target, belong to a fault at `address`. Where a message has no
    /// room for such a page, they are put there from here, and the server is told that this is done.
    ///
    /// # Errors
    /// `System`: the connection is over, or the kernel refuses. `Gone`: the target is.
    pub fn fill(&self, fault: u64, target: u64, address: u64, bytes: &[u8]) -> Result<(), Failure> {
        if bytes.len() as u64 == PAGE {
            return self.answer(fault, Answer::Content(bytes.into()));
        }
        let uffd = self.userfaultfd(target)?;
        let patience = Instant::now() + self.deadline;
        loop {
            match uffd.copy(address, bytes).errno {
                // Somebody was first; unmapped since; gone since: the server sees to who waits.
                None | Some(Errno::EXIST | Errno::NOENT | Errno::SRCH) => break,
                // An event is under way, until the server has read it and the target has run again.
                Some(Errno::AGAIN) if Instant::now() < patience => std::thread::yield_now(),
                Some(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        self.answer(fault, Answer::Done)
    }

    /// Gives back what was claimed: it is the template's from now on.
    ///
    /// # Errors
    /// `System`: the connection is over.
    pub fn release(&self) -> Result<(), Failure> {
        self.say(&Message::Release)
    }

    /// The userfaultfd of a target, which it is to be resolved by as long as the target is there.
    ///
    /// # Errors
    /// `Gone`: it has left, or there never was such a target.
    pub fn userfaultfd(&self, target: u64) -> Result<Arc<Userfaultfd>, Failure> {
        let targets = lock(&self.targets);
        targets.get(&target).map(|(_, uffd)| Arc::clone(uffd)).ok_or(Failure::Gone(target))
    }

    /// Ends the connection; who waits for news learns of it.
    pub fn close(&self) {
        // Fails if it is over already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        lock(&self.targets).clear();
    }

    fn say(&self, message: &Message) -> Result<(), Failure> {
        Ok(passing::send(&self.socket, &message.encode(), &[])?)
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The names of the features that a target's userfaultfd was negotiated with.
pub fn feature_names(features: u64) -> Vec<String> {
    Features(features).names()
}

/// What came of waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// That.
    News(News),
    /// Nothing, in the time that was given.
    Nothing,
    /// The connection is over.
    End,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data, which a panic leaves in a usable state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
