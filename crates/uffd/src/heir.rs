//! What becomes of a process whose faults another one handles, when that one ends.
//!
//! Some facts about the kernel, and what follows here:
//! - A userfaultfd that nobody reads lets its threads wait for ever, and one whose last descriptor is
//!   closed lets them read zeros. So the process itself holds a descriptor, and an [`Heir`]: a thread of
//!   its own that takes over when the handler's process has ended.
//! - Faults that were read and not resolved are in no queue any more. Their threads are woken, touch the
//!   page again, and send a message again.
//! - Whoever causes an event (`munmap`, `madvise`) waits until it is read: an heir reads them all.
//! - The threads that wait may hold any lock, Python's too. So an heir takes none that they could hold.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use crate::descriptor::Userfaultfd;
use crate::event::{Cause, Event, MessageBuffer};
use crate::resolve::Progress;
use crate::threads;

/// Ranges, as (start, length), that somebody else may add to.
pub type Ranges = Arc<Mutex<Vec<(u64, u64)>>>;

/// Waits for the end of a process that handles the faults of this one, and takes its place: whoever
/// touches a page that is missing from then on gets SIGBUS (Linux ≥ 6.6; before, this process ends
/// with status 70), and whoever writes to a protected one goes on. It says so once on standard error.
#[derive(Debug)]
pub struct Heir {
    retired: OwnedFd,
}

impl Heir {
    /// Starts the thread. `process` is a pidfd; `closed` becomes readable when the userfaultfd is not
    /// used any more, which ends the thread in any case.
    ///
    /// # Errors
    /// No descriptor, or no thread, can be had.
    pub fn start(
        uffd: &Userfaultfd,
        process: OwnedFd,
        closed: OwnedFd,
        ranges: Ranges,
    ) -> io::Result<Heir> {
        let uffd = uffd.try_clone()?;
        let retired = eventfd(0, EventfdFlags::CLOEXEC)?;
        let retire = retired.try_clone()?;
        threads::spawn("uffd-heir", move || {
            if process_ended(&process, &[&retire, &closed]) {
                inherit(&uffd, &closed, &ranges);
            }
        })?;
        Ok(Heir { retired })
    }

    /// The process ends as it should: nothing is taken over. Too late if that has happened.
    pub fn retire(&self) {
        let _ = rustix::io::write(&self.retired, &1_u64.to_ne_bytes());
    }
}

/// Waits; false if one of the others was readable first.
fn process_ended(process: &OwnedFd, others: &[&OwnedFd]) -> bool {
    let mut polled = vec![PollFd::new(process, PollFlags::IN)];
    polled.extend(others.iter().map(|other| PollFd::new(*other, PollFlags::IN)));
    loop {
        match poll(&mut polled, None) {
            Err(Errno::INTR) => {}
            Err(_) => return false,
            Ok(_) => return polled[1..].iter().all(|one| one.revents().is_empty()),
        }
    }
}

fn inherit(uffd: &Userfaultfd, closed: &OwnedFd, ranges: &Ranges) {
    say("the process that handled page faults of this one has ended; pages that are missing raise SIGBUS from now on");
    for (start, len) in ranges.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let _ = uffd.wake(*start, *len);
    }
    let mut buffer = MessageBuffer::new(16);
    loop {
        let mut polled = [
            PollFd::new(uffd, PollFlags::IN),
            PollFd::from_borrowed_fd(closed.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if !polled[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        let Ok(events) = uffd.read_events(&mut buffer) else { return };
        for event in events {
            // The other events were waited for, and mean nothing to somebody who fills nothing.
            if let Event::Fault { address, flags, .. } = event {
                refuse(uffd, address, Cause::of(flags));
            }
        }
    }
}

/// Ends one fault: by SIGBUS if a page is missing, by letting it be if one is protected.
fn refuse(uffd: &Userfaultfd, address: u64, cause: Cause) {
    // Pages may be huge: the smallest that the kernel accepts is that of the memory.
    for page in [1_u64 << 12, 1 << 14, 1 << 16, 1 << 21, 1 << 25, 1 << 30] {
        let start = address & !(page - 1);
        let outcome = match cause {
            Cause::Missing | Cause::Minor => uffd.poison(start, page),
            Cause::WriteProtected => progress(uffd.unprotect(start, page)),
            Cause::Protected => progress(uffd.allow_access(start, page)),
        };
        match outcome.errno {
            Some(Errno::INVAL) => {}
            // Somebody was quicker, or memory is changing: the thread shall look again, and come back.
            Some(Errno::EXIST | Errno::AGAIN | Errno::NOENT) => {
                let _ = uffd.wake(start, page);
                return;
            }
            None | Some(Errno::SRCH) => return,
            Some(_) => break,
        }
    }
    say("this kernel cannot poison pages (Linux 6.6 can): ending the process, for it would wait for ever");
    // SAFETY: _exit ends the process, without running anything of it.
    unsafe { libc::_exit(70) }
}

fn progress(outcome: io::Result<()>) -> Progress {
    let errno = outcome.err().map(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    Progress { done: 0, errno }
}

fn say(words: &str) {
    let _ = writeln!(io::stderr(), "pagekit: {words}");
}
