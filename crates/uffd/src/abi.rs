//! Numbers and structures of `linux/userfaultfd.h`, as the kernel lays them out (x86-64 and
//! aarch64 agree). All integers are in host byte order.
//!
//! ```text
//! ioctl                 argument, in and out                              bytes
//! UFFDIO_API            api u64, features u64 (in/out), ioctls u64 (out)     24
//! UFFDIO_REGISTER       start u64, len u64, mode u64, ioctls u64 (out)       32
//! UFFDIO_UNREGISTER     start u64, len u64                                   16
//! UFFDIO_WAKE           start u64, len u64                                   16
//! UFFDIO_COPY           dst u64, src u64, len u64, mode u64, copy i64 (out)  40
//! UFFDIO_ZEROPAGE       start u64, len u64, mode u64, zeropage i64 (out)     32
//! UFFDIO_CONTINUE       start u64, len u64, mode u64, mapped i64 (out)       32
//! UFFDIO_POISON         start u64, len u64, mode u64, updated i64 (out)      32
//! ```

/// Interface version that `UFFDIO_API` must carry.
pub const UFFD_API: u64 = 0xAA;

const fn iowr(number: u64, size: u64) -> u64 {
    (3 << 30) | (size << 16) | (0xAA << 8) | number
}
const fn ior(number: u64, size: u64) -> u64 {
    (2 << 30) | (size << 16) | (0xAA << 8) | number
}

/// Negotiate features (since 4.3).
pub const UFFDIO_API: u64 = iowr(0x3F, 24);
/// Register a range (since 4.3).
pub const UFFDIO_REGISTER: u64 = iowr(0x00, 32);
/// Unregister a range; wakes its waiters (since 4.3).
pub const UFFDIO_UNREGISTER: u64 = ior(0x01, 16);
/// Wake the threads that wait in a range (since 4.3).
pub const UFFDIO_WAKE: u64 = ior(0x02, 16);
/// Fill pages by copying (since 4.3).
pub const UFFDIO_COPY: u64 = iowr(0x03, 40);
/// Fill pages with the zero page (since 4.3).
pub const UFFDIO_ZEROPAGE: u64 = iowr(0x04, 32);
/// Map pages that are in the page cache already (since 5.13).
pub const UFFDIO_CONTINUE: u64 = iowr(0x07, 32);
/// Make pages raise SIGBUS when touched (since 6.6).
pub const UFFDIO_POISON: u64 = iowr(0x08, 32);
/// On `/dev/userfaultfd`: create a userfaultfd (since 6.1).
pub const USERFAULTFD_IOC_NEW: u64 = 0xAA00;

/// Deliver faults from user mode only (since 5.11).
pub const UFFD_USER_MODE_ONLY: i32 = 1;

/// Size of one event message.
pub const MESSAGE_BYTES: usize = 32;

/// Event codes, first byte of a message.
pub mod event {
    /// A thread waits for a page.
    pub const PAGEFAULT: u8 = 0x12;
    /// The process forked; a new userfaultfd for the child came along.
    pub const FORK: u8 = 0x13;
    /// `mremap` moved a range.
    pub const REMAP: u8 = 0x14;
    /// `madvise` is about to drop pages of a range.
    pub const REMOVE: u8 = 0x15;
    /// A range was unmapped.
    pub const UNMAP: u8 = 0x16;
}

/// Fault flags in a page-fault message.
pub mod fault {
    /// The access was a write.
    pub const WRITE: u64 = 1;
    /// A write-protected page was written.
    pub const WP: u64 = 2;
    /// The page is in the page cache but not mapped.
    pub const MINOR: u64 = 4;
}

/// Argument of `UFFDIO_API`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Api {
    /// [`UFFD_API`].
    pub api: u64,
    /// In: features asked for. Out: features of this kernel.
    pub features: u64,
    /// Out: bit set of ioctl numbers.
    pub ioctls: u64,
}

/// A range of addresses, both multiples of the page size.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Argument of `UFFDIO_REGISTER`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Register {
    /// What to register.
    pub range: Range,
    /// MISSING = 1, WP = 2, MINOR = 4.
    pub mode: u64,
    /// Out: bit set of ioctl numbers that work on the range.
    pub ioctls: u64,
}

/// Argument of `UFFDIO_COPY`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Copy {
    /// Where, in the target.
    pub dst: u64,
    /// From where, in the caller.
    pub src: u64,
    /// Bytes.
    pub len: u64,
    /// DONTWAKE = 1, WP = 2.
    pub mode: u64,
    /// Out: bytes done, or a negated errno.
    pub copy: i64,
}

/// Argument of `UFFDIO_ZEROPAGE`, `UFFDIO_CONTINUE` and `UFFDIO_POISON`, which are alike.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Fill {
    /// Where, in the target.
    pub range: Range,
    /// DONTWAKE = 1.
    pub mode: u64,
    /// Out: bytes done, or a negated errno.
    pub done: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as `linux/userfaultfd.h` of 6.18 computes them on x86-64.
    #[test]
    fn ioctl_numbers() {
        assert_eq!(UFFDIO_API, 0xC018_AA3F);
        assert_eq!(UFFDIO_REGISTER, 0xC020_AA00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_AA01);
        assert_eq!(UFFDIO_WAKE, 0x8010_AA02);
        assert_eq!(UFFDIO_COPY, 0xC028_AA03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xC020_AA04);
        assert_eq!(UFFDIO_CONTINUE, 0xC020_AA07);
        assert_eq!(UFFDIO_POISON, 0xC020_AA08);
        assert_eq!(size_of::<Copy>(), 40);
        assert_eq!(size_of::<Fill>(), 32);
        assert_eq!(size_of::<Register>(), 32);
        assert_eq!(size_of::<Api>(), 24);
    }
}
