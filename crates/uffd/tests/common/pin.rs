//! Pages pinned by the kernel, as a device that writes to them would have them: registered as a buffer
//! of an io_uring.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::need::skip;

/// A pin for as long as it lives.
#[derive(Debug)]
pub struct Pin(OwnedFd);

impl Pin {
    /// Pins some bytes for writing; none, with the reason printed, where there is no io_uring.
    pub fn of(start: u64, len: u64) -> Option<Pin> {
        const REGISTER_BUFFERS: i32 = 0;
        let mut parameters = [0_u8; 120];
        // SAFETY: io_uring_setup takes a number of entries and 120 bytes of parameters.
        let ring =
            unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) as i32 };
        if ring < 0 {
            skip("io_uring", &std::io::Error::last_os_error().to_string());
            return None;
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let ring = unsafe { OwnedFd::from_raw_fd(ring) };
        let buffer = libc::iovec { iov_base: start as *mut _, iov_len: len as usize };
        // SAFETY: one iovec, borrowed for the call, of memory of the test.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                &raw const buffer,
                1,
            )
        };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
        Some(Pin(ring))
    }

    /// Unpins, and waits until it is done.
    pub fn end(self) {
        const UNREGISTER_BUFFERS: i32 = 1;
        // SAFETY: takes no argument.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.0.as_raw_fd(),
                UNREGISTER_BUFFERS,
                std::ptr::null::<()>(),
                0,
            )
        };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    }
}
