//! Children of a test.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::JoinHandle;

/// A child, which lives until it is released, unless what it does ends it.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    release: OwnedFd,
}

impl Child {
    /// Lets it end, and says how: its exit status, or the signal that ended it.
    pub fn end(self) -> Result<i32, i32> {
        drop(self.release);
        let mut status = 0;
        // SAFETY: a child of this process.
        let waited = unsafe { libc::waitpid(self.pid as i32, &raw mut status, 0) };
        assert_eq!(waited, self.pid as i32);
        match libc::WIFEXITED(status) {
            true => Ok(libc::WEXITSTATUS(status)),
            false => Err(libc::WTERMSIG(status)),
        }
    }
}

/// A thread that forks, by the bare system call: the C library's fork holds the locks of malloc until
/// the kernel returns, which is not before another thread of this same process has read the event.
/// So `body`, what the child does first, may not allocate; its outcome is the exit status.
pub fn forking(body: impl FnOnce() -> i32 + Send + 'static) -> JoinHandle<Child> {
    forking_with(0, body)
}

/// [`forking`], with flags of clone(2).
pub fn forking_with(flags: i32, body: impl FnOnce() -> i32 + Send + 'static) -> JoinHandle<Child> {
    let (hold, release) = rustix::pipe::pipe().unwrap();
    std::thread::spawn(move || {
        // SAFETY: the child touches memory, makes system calls, and never returns.
        unsafe {
            let pid = libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) as i32;
            if pid == 0 {
                libc::close(release.as_raw_fd());
                let status = body();
                let mut byte = 0_u8;
                libc::read(hold.as_raw_fd(), (&raw mut byte).cast(), 1);
                libc::_exit(status);
            }
            assert!(pid > 0, "{}", std::io::Error::last_os_error());
            Child { pid: pid as u32, release }
        }
    })
}

/// A thread that forks a child which executes a program that reads its standard input to the end.
pub fn executing(program: &'static CStr) -> JoinHandle<Child> {
    let (hold, release) = rustix::pipe::pipe().unwrap();
    std::thread::spawn(move || {
        // SAFETY: as above.
        unsafe {
            let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32;
            if pid == 0 {
                libc::close(release.as_raw_fd());
                libc::dup2(hold.as_raw_fd(), 0);
                libc::execl(program.as_ptr(), program.as_ptr(), std::ptr::null::<i8>());
                libc::_exit(127);
            }
            assert!(pid > 0, "{}", std::io::Error::last_os_error());
            Child { pid: pid as u32, release }
        }
    })
}
