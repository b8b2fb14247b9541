//! Threads that end this process when it can no longer be served.
//!
//! While this process holds a descriptor of its userfaultfd, a fault without a server waits for ever:
//! better than zeros, but nobody would notice. So a thread watches the connection; when the server
//! closes it, dying or not, the process says so and ends.
//!
//! The threads block all signals: a handler of the program must not run on them, where it could wait
//! for memory that only this thread knows will never come.

use std::os::fd::AsFd;

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use crate::attach::Connection;

/// Ends the process when the server closes `connection`.
pub(crate) fn server(connection: Connection) -> Result<(), String> {
    start(
        "pagekit-server",
        connection,
        "the pagekit server is gone, and the rest of this process's memory with it: ending".into(),
    )
}

/// Ends the process when process `owner` does.
pub(crate) fn owner(owner: i32) {
    let gone = format!("process {owner}, which started this one, is gone: ending");
    let pidfd = Pid::from_raw(owner).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let watched = match pidfd {
        Some(pidfd) => start("pagekit-owner", pidfd, gone),
        None => Err(gone),
    };
    if let Err(text) = watched {
        crate::end(&text);
    }
}

/// Ends the process with `text` as soon as there is anything to read from `watched`, which never
/// happens before its other end is gone.
fn start(name: &str, watched: impl AsFd + Send + 'static, text: String) -> Result<(), String> {
    let wait = move || {
        let mut entries = [PollFd::new(&watched, PollFlags::IN)];
        while let Err(Errno::INTR | Errno::AGAIN) = poll(&mut entries, None) {}
        crate::end(&text);
    };
    let thread = pagekit::thread::spawn(name, wait);
    thread.map(drop).map_err(|error| format!("cannot watch over the server: {error}"))
}
