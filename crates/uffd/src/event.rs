//! Events: what a userfaultfd tells.
//!
//! Some facts about the kernel:
//! - One `read` hands out page faults first, then the other events, each in their order: a fault may be
//!   the consequence of a removal that comes behind it, or in the next read.
//! - Whoever caused an event (fork, mremap, madvise, munmap) waits until it is read: a process that
//!   unmaps memory which it serves itself, by the thread that would read, hangs.
//! - No event tells of what happens to a file instead of to memory (a hole punched, an end cut off), nor of
//!   reclaim, exec, exit, or of starting a program by vfork.
//! - A FORK brings a descriptor, installed in the table of the process that reads.
//! - `poll` on a descriptor without `O_NONBLOCK` reports POLLERR.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::abi;
use crate::descriptor::Userfaultfd;

/// One event, decoded.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for the page at `address` (rounded down to the page unless EXACT_ADDRESS).
    Fault {
        /// The address touched.
        address: u64,
        /// [`abi::fault`] bits; [`Cause::of`] says what they mean together.
        flags: u64,
        /// Faulting thread, in its own pid namespace; 0 without THREAD_ID.
        thread: u32,
    },
    /// The target forked; this is the child's userfaultfd, registered and negotiated as the
    /// parent's was.
    Fork(Userfaultfd),
    /// `mremap` moved `len` bytes; the new range is registered, also where it is longer now. The old one
    /// stays registered, and empty, if the call left it mapped (MREMAP_DONTUNMAP); else EVENT_UNMAP, if
    /// negotiated, tells that it is gone.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Old length.
        len: u64,
    },
    /// Pages of the range are about to be dropped. What they had is gone: zeros from then on, not what
    /// they were filled with. But a shared mapping whose file keeps its pages (MADV_DONTNEED, where
    /// MADV_REMOVE would drop them) shows those again, without a fault.
    Remove {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// The range is no longer mapped. It is the range of the call that did it, one event however much of
    /// it was registered: it may begin before and end behind the registered memory, with other memory and
    /// holes between.
    Unmap {
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// An event code of a newer kernel.
    Unknown(u8),
}

/// Why a thread waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// There is no page.
    Missing,
    /// The page is write-protected, and was written to.
    WriteProtected,
    /// The page is in the page cache, and not mapped.
    Minor,
    /// The page is protected against any access (Linux ≥ 7.3).
    Protected,
}

impl Cause {
    /// What the flags of a fault say.
    pub const fn of(flags: u64) -> Cause {
        if flags & abi::fault::WP != 0 {
            Cause::WriteProtected
        } else if flags & abi::fault::MINOR != 0 {
            Cause::Minor
        } else if flags & abi::fault::RWP != 0 {
            Cause::Protected
        } else {
            Cause::Missing
        }
    }
}

/// Room for the messages of one read; owned by the caller, reused.
#[derive(Debug)]
pub struct MessageBuffer(Vec<MaybeUninit<[u8; abi::MESSAGE_BYTES]>>);

impl MessageBuffer {
    /// Room for `messages` messages.
    pub fn new(messages: usize) -> Self {
        Self(vec![MaybeUninit::uninit(); messages])
    }
}

/// The events of one read, in the kernel's order: faults first, then the others.
///
/// A FORK event owns a descriptor: events that are not taken out are closed on drop.
#[derive(Debug)]
pub struct Events<'a>(std::slice::Iter<'a, [u8; abi::MESSAGE_BYTES]>);

impl Iterator for Events<'_> {
    type Item = Event;
    fn next(&mut self) -> Option<Event> {
        self.0.next().map(decode)
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        for _ in self {}
    }
}

fn decode(message: &[u8; abi::MESSAGE_BYTES]) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        abi::event::PAGEFAULT => {
            Event::Fault { flags: word(8), address: word(16), thread: word(24) as u32 }
        }
        abi::event::FORK => {
            // SAFETY: the kernel installed this descriptor in our table during the read that
            // produced the message; each message is decoded once, so nobody else owns it.
            Event::Fork(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) }.into())
        }
        abi::event::REMAP => Event::Remap { from: word(8), to: word(16), len: word(24) },
        abi::event::REMOVE => Event::Remove { start: word(8), end: word(16) },
        abi::event::UNMAP => Event::Unmap { start: word(8), end: word(16) },
        other => Event::Unknown(other),
    }
}

impl Userfaultfd {
    /// Waits until there is something to read, or `time` (none: for ever) is over; says whether there
    /// is. A signal may end it early.
    ///
    /// # Errors
    /// `InvalidInput` where poll reports an error: before the handshake, and without `O_NONBLOCK`.
    pub fn wait(&self, time: Option<Duration>) -> io::Result<bool> {
        let time = time.map(|time| Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        let mut polled = [PollFd::new(self, PollFlags::IN)];
        match poll(&mut polled, time.as_ref()) {
            Err(Errno::INTR) => return Ok(false),
            outcome => outcome?,
        };
        match polled[0].revents().contains(PollFlags::ERR) {
            true => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor was not negotiated yet, or blocks",
            )),
            false => Ok(polled[0].revents().contains(PollFlags::IN)),
        }
    }

    /// Reads all events that are pending and fit; none pending is an empty iterator.
    ///
    /// # Errors
    /// EINVAL before the handshake.
    pub fn read_events<'a>(&self, buffer: &'a mut MessageBuffer) -> io::Result<Events<'a>> {
        let (at, room) = (buffer.0.as_mut_ptr().cast(), buffer.0.len() * abi::MESSAGE_BYTES);
        // SAFETY: the same memory, borrowed for the call, as bytes that need not be initialised.
        let bytes: &mut [MaybeUninit<u8>] = unsafe { std::slice::from_raw_parts_mut(at, room) };
        let count = match rustix::io::read(self, bytes) {
            Ok((read, _)) => read.len() / abi::MESSAGE_BYTES,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        // SAFETY: the kernel initialised the first `count` messages, and the type is plain bytes.
        let messages = unsafe { std::slice::from_raw_parts(buffer.0.as_ptr().cast(), count) };
        Ok(Events(messages.iter()))
    }
}
