//! Threads of ours inside programs of others.

use std::io;
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// Starts a named thread that blocks all signals: they belong to the program around us.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    start(std::thread::Builder::new().name(name.to_owned()), body)
}

/// The same in a child of a fork, with a small stack. The C library takes the stacks of threads that
/// were not forked for free, and a program may still use what is on them: a stack that is much smaller
/// than those is a new one.
pub(crate) fn spawn_in_a_child(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    const SMALL: usize = 128 << 10;
    start(std::thread::Builder::new().name(name.to_owned()).stack_size(SMALL), body)
}

fn start(
    thread: std::thread::Builder,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let blocked = BlockedSignals::new();
    let thread = thread.spawn(body);
    drop(blocked);
    thread
}

/// Gives this thread a descriptor table of its own, with `kept` in it and nothing else. (A program may
/// close descriptors that it does not know, and must not find those it closed kept open by us.)
///
/// # Errors
/// The kernel's. The table is the process's still then.
pub fn own_table(kept: &[i32]) -> Result<(), Errno> {
    let mut kept: Vec<u32> = kept.iter().map(|number| number.unsigned_abs()).collect();
    kept.sort_unstable();
    // SAFETY: the caller says which descriptors this thread uses.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES)? };
    let mut first = 0;
    for number in kept {
        close_range(first, number.checked_sub(1));
        first = number + 1;
    }
    close_range(first, Some(u32::MAX));
    Ok(())
}

/// Closes descriptors from `first` to `last`, both included; the kernel has the call since 5.9.
fn close_range(first: u32, last: Option<u32>) {
    if let Some(last) = last.filter(|last| *last >= first) {
        // SAFETY: descriptors of this thread's own table that it does not use.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// All signals of this thread, blocked until dropped. A thread started meanwhile inherits it.
pub(crate) struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    pub(crate) fn new() -> BlockedSignals {
        // SAFETY: both sets are plain data that sigfillset and pthread_sigmask fill.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            BlockedSignals(before)
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}
