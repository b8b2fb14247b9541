//! Descriptors over Unix sockets.
//!
//! What the kernel does and what follows from it:
//! - Up to 253 descriptors travel with one message (`SCM_MAX_FD`).
//! - Descriptors that find no room, in the control buffer or in the table of the process, are closed
//!   by the kernel and the message is marked `MSG_CTRUNC`; payload that finds no room is cut and
//!   marked `MSG_TRUNC`. Either is an error of [`receive`]: half a message is no message.
//! - Received descriptors are close-on-exec (`MSG_CMSG_CLOEXEC`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// Most descriptors that [`receive`] accepts with one message.
pub const MOST_DESCRIPTORS: usize = 16;

/// Sends `bytes` and `descriptors` as one message. Blocks as the socket does; never raises SIGPIPE.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    // Alignment leaves room for more than were asked for, so the room alone is no limit.
    let fits = descriptors.is_empty()
        || descriptors.len() <= MOST_DESCRIPTORS
            && control.push(SendAncillaryMessage::ScmRights(descriptors));
    if !fits {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} descriptors in one message, {MOST_DESCRIPTORS} at most", descriptors.len()),
        ));
    }
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => return Ok(()),
            Ok(sent) => {
                return Err(io::Error::new(
                    io::ErrorKind::WriteZero,
                    format!("only {sent} of {} bytes were sent", bytes.len()),
                ));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// What one call received.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 is the end of the connection.
    pub bytes: usize,
    /// Descriptors that came along.
    pub descriptors: Vec<OwnedFd>,
    /// Whether something did not fit: bytes of a message, or descriptors, which are closed then.
    pub cut: bool,
}

/// Receives one message into `buffer` and returns its length and descriptors. Length 0 is the end
/// of the connection. A message that does not fit is an `InvalidData` error.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    match receive_some(socket, buffer)? {
        Received { cut: true, .. } => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message or its descriptors did not fit",
        )),
        Received { bytes, descriptors, .. } => Ok((bytes, descriptors)),
    }
}

/// Like [`receive`], but what did not fit is no error. Of a stream, what does not fit comes next.
pub fn receive_some(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    let cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Received { bytes: received.bytes, descriptors, cut })
}
