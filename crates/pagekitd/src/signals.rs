//! SIGINT, SIGTERM, SIGCHLD and SIGUSR1, waited for instead of handled.

/// The signals, blocked for this thread and all that it starts.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them. A child that is started resets that itself ([`crate::captive`]).
    pub fn block() -> Signals {
        // SAFETY: the set is plain data that these calls fill and read.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGUSR1] {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            Signals(set)
        }
    }

    /// The next of them.
    pub fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: both are valid for the call; it fails only for an invalid set.
        unsafe { libc::sigwait(&self.0, &mut signal) };
        signal
    }
}

/// Unblocks all signals of the calling thread.
pub fn unblock_all() {
    // SAFETY: the set is plain data that sigemptyset fills.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}
