//! A connection to a deputy: what it has yet to read waits here, and nobody waits for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use uffd::passing;

use crate::wire::relay::Message;

/// Messages that a deputy may leave unread, beyond what the kernel keeps for it (some hundreds).
pub const MOST_UNREAD: usize = 65_536;
/// Bytes of them.
const MOST_UNREAD_BYTES: usize = 64 << 20;

/// A connection, and what waits to be sent.
#[derive(Debug)]
pub(super) struct Line {
    socket: Arc<OwnedFd>,
    waiting: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    bytes: usize,
    /// Nothing is sent yet: what is pushed behind shall not be seen before it is true.
    corked: bool,
    /// The other end has closed it; whoever reads from it will find that out.
    ended: bool,
    /// Why it is of no use any more.
    broken: Option<String>,
}

impl Line {
    /// A line that sends nothing before it is uncorked. The socket does not block.
    pub(super) fn corked(socket: OwnedFd) -> Line {
        Line {
            socket: Arc::new(socket),
            waiting: VecDeque::new(),
            bytes: 0,
            corked: true,
            ended: false,
            broken: None,
        }
    }

    /// Sends a message, now if nothing waits. Says whether somebody must see to the line: because it
    /// began to wait, or broke.
    pub(super) fn push(&mut self, message: &Message, descriptor: Option<OwnedFd>) -> bool {
        if self.broken.is_some() || self.ended {
            return false;
        }
        let bytes = message.encode();
        if self.waiting.is_empty() && !self.corked {
            match send(&self.socket, &bytes, descriptor.as_ref()) {
                Ok(()) => return false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return self.fail(&error),
            }
        }
        self.bytes += bytes.len();
        self.waiting.push_back((bytes, descriptor));
        if self.waiting.len() > MOST_UNREAD || self.bytes > MOST_UNREAD_BYTES {
            let unread = self.waiting.len();
            self.broken = Some(format!("it does not read: {unread} messages wait for it"));
        }
        self.broken.is_some() || self.waiting.len() == 1
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        self.corked = false;
        while let Some((bytes, descriptor)) = self.waiting.front() {
            match send(&self.socket, bytes, descriptor.as_ref()) {
                Ok(()) => {
                    self.bytes -= bytes.len();
                    self.waiting.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.fail(&error);
                    return;
                }
            }
        }
    }

    /// The connection, for waiting: it stays open as long as somebody does.
    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket)
    }

    /// Whether something waits for room.
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty() && !self.corked
    }

    fn fail(&mut self, error: &io::Error) -> bool {
        self.waiting.clear();
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                self.ended = true;
                false
            }
            _ => self.give_up(&format!("it cannot be told of a target: {error}")),
        }
    }

    /// Nothing is sent any more, and why. Somebody must see to that.
    pub(super) fn give_up(&mut self, why: &str) -> bool {
        self.broken.get_or_insert_with(|| why.to_owned());
        true
    }

    /// Why it is of no use any more, if so.
    pub(super) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().map(AsFd::as_fd).collect();
    passing::send(socket, bytes, &descriptors)
}
