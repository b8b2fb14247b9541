//! The conversation with the server (messages: `pagekit::wire`).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use pagekit::wire::shim::{Message, LARGEST};
use rustix::net::{
    connect, socket_with, sockopt, AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
};
use uffd::passing;

/// How long the server may take to answer. It may be busy; it is never meant to be silent.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// A connection to the server.
#[derive(Debug)]
pub(crate) struct Connection(OwnedFd);

impl Connection {
    pub(crate) fn open(path: &Path) -> Result<Connection, String> {
        let failed = |what: &str, errno: rustix::io::Errno| {
            format!("{what} the pagekit server at {}: {errno}", path.display())
        };
        let address =
            SocketAddrUnix::new(path).map_err(|errno| failed("no socket can be", errno))?;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed("no socket for", errno))?;
        connect(&socket, &address).map_err(|errno| failed("cannot reach", errno))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))
            .map_err(|errno| failed("no time-out for", errno))?;
        Ok(Connection(socket))
    }

    /// Sends a message, with a descriptor perhaps, and returns the answer.
    pub(crate) fn ask(
        &self,
        message: &Message,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(Message, Vec<OwnedFd>), String> {
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        passing::send(&self.0, &message.encode(), &descriptors)
            .map_err(|error| format!("the pagekit server does not listen: {error}"))?;
        let mut buffer = vec![0; LARGEST];
        let (length, descriptors) = passing::receive(&self.0, &mut buffer)
            .map_err(|error| format!("the pagekit server does not answer: {error}"))?;
        if length == 0 {
            return Err("the pagekit server closed the connection".to_owned());
        }
        match Message::decode(&buffer[..length]).map_err(|malformed| malformed.to_string())? {
            Message::Refusal { text } => Err(text),
            message => Ok((message, descriptors)),
        }
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> OwnedFd {
        connection.0
    }
}
