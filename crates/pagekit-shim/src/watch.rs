//! Threads that end this process when it can no longer be served.
//!
//! While this process holds a descriptor of its userfaultfd, a fault without a server waits for ever:
//! better than zeros, but nobody would notice. So a thread watches the connection; when the server
//! closes it, dying or not, the process says so and ends.
//!
//! Facts, and what follows:
//! - A program may close descriptors that it does not know: a child between fork and exec does, a
//!   daemon does. The last descriptor of a userfaultfd must not go that way, and a closed connection
//!   must not look like a dead server. So each thread unshares its descriptor table and keeps nothing
//!   in it but what it watches, a descriptor to hold, and stderr; the program sees none of them.
//! - Exec ends these threads, and with them their tables.
//! - A handler of the program must not run on them, where it could wait for memory that only this
//!   thread knows will never come: they block all signals.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::sync_channel;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use crate::attach::Connection;

/// Ends the process when the server closes `connection`, and holds `uffd` until then.
pub(crate) fn server(connection: Connection, uffd: OwnedFd) -> Result<(), String> {
    start(
        "pagekit-server",
        connection.into(),
        Some(uffd),
        "the pagekit server is gone, and the rest of this process's memory with it: ending".into(),
    )
}

/// Ends the process when process `owner` does.
pub(crate) fn owner(owner: i32) {
    let gone = format!("process {owner}, which started this one, is gone: ending");
    let pidfd = Pid::from_raw(owner).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let watched = match pidfd {
        Some(pidfd) => start("pagekit-owner", pidfd, None, gone),
        None => Err(gone),
    };
    if let Err(text) = watched {
        crate::end(&text);
    }
}

/// Ends the process with `text` as soon as there is anything to read from `watched`, which never
/// happens before its other end is gone. Both descriptors disappear from the caller's table.
fn start(name: &str, watched: OwnedFd, held: Option<OwnedFd>, text: String) -> Result<(), String> {
    let numbers: Vec<i32> = [Some(&watched), held.as_ref()]
        .into_iter()
        .flatten()
        .map(|descriptor| descriptor.as_raw_fd())
        .collect();
    let stderr = rustix::stdio::stderr().as_raw_fd();
    let kept: Vec<i32> = numbers.iter().copied().chain([stderr]).collect();
    let (sender, receiver) = sync_channel(1);
    let wait = move || {
        let own = pagekit::thread::own_table(&kept);
        let failed = own.is_err();
        // The starter waits for this one message.
        let _ = sender.send(own);
        if failed {
            return;
        }
        let mut entries = [PollFd::new(&watched, PollFlags::IN)];
        while let Err(Errno::INTR | Errno::AGAIN) = poll(&mut entries, None) {}
        drop(held);
        crate::end(&text);
    };
    let started = pagekit::thread::spawn(name, wait).map_err(|error| error.to_string());
    let own = started.and_then(|_| match receiver.recv() {
        Ok(own) => own.map_err(|errno| errno.to_string()),
        Err(_) => Err("its thread ended".to_owned()),
    });
    match own {
        // SAFETY: these descriptors belong to the thread, which has them in a table of its own now:
        // in this one nobody knows them.
        Ok(()) => numbers.into_iter().for_each(|number| unsafe {
            libc::close(number);
        }),
        Err(error) => return Err(format!("cannot watch over the server: {error}")),
    }
    Ok(())
}
