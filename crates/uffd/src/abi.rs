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
//! UFFDIO_MOVE           dst u64, src u64, len u64, mode u64, move i64 (out)  40
//! UFFDIO_WRITEPROTECT   start u64, len u64, mode u64                         24
//! UFFDIO_RWPROTECT      start u64, len u64, mode u64                         24
//! UFFDIO_SET_MODE       enable u64, disable u64                              16
//! PAGEMAP_SCAN          see [`PmScan`]                                       96
//! ```
//!
//! What Linux 7.3 adds (RWP) is used behind a probe only; its numbers were tried on 7.3.4.

/// Interface version that `UFFDIO_API` must carry.
pub const UFFD_API: u64 = 0xAA;

const fn iowr(number: u64, size: u64) -> u64 {
    (3 << 30) | (size << 16) | (0xAA << 8) | number
}
const fn ior(number: u64, size: u64) -> u64 {
    (2 << 30) | (size << 16) | (0xAA << 8) | number
}
const fn iow(number: u64, size: u64) -> u64 {
    (1 << 30) | (size << 16) | (0xAA << 8) | number
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
/// Move pages within a process (since 6.8).
pub const UFFDIO_MOVE: u64 = iowr(0x05, 40);
/// Write-protect pages, or take that back (since 5.7).
pub const UFFDIO_WRITEPROTECT: u64 = iowr(0x06, 24);
/// Protect pages against any access, or take that back (since 7.3).
pub const UFFDIO_RWPROTECT: u64 = iowr(0x09, 24);
/// Switch features on and off after the handshake (since 7.3).
pub const UFFDIO_SET_MODE: u64 = iow(0x0A, 16);
/// On `/proc/PID/pagemap`: find pages by what is true of them, and write-protect them (since 6.7).
pub const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | (0x66 << 8) | 16;
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
    /// A page protected against any access was touched.
    pub const RWP: u64 = 8;
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
    /// MISSING = 1, WP = 2, MINOR = 4, RWP = 8.
    pub mode: u64,
    /// Out: bit set of ioctl numbers that work on the range.
    pub ioctls: u64,
}

/// Argument of `UFFDIO_COPY` and of `UFFDIO_MOVE`, which are alike but for the modes.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Copy {
    /// Where, in the target.
    pub dst: u64,
    /// From where: in the caller, or (`UFFDIO_MOVE`) in the target.
    pub src: u64,
    /// Bytes.
    pub len: u64,
    /// DONTWAKE = 1; `UFFDIO_COPY` WP = 2, `UFFDIO_MOVE` ALLOW_SRC_HOLES = 2.
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
    /// DONTWAKE = 1; `UFFDIO_CONTINUE` WP = 2.
    pub mode: u64,
    /// Out: bytes done, or a negated errno.
    pub done: i64,
}

/// Argument of `UFFDIO_WRITEPROTECT` and of `UFFDIO_RWPROTECT`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct Protect {
    /// Where, in the target.
    pub range: Range,
    /// Protect = 1 (else the protection is taken back), DONTWAKE = 2; not both.
    pub mode: u64,
}

/// Argument of `UFFDIO_SET_MODE`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct SetMode {
    /// Features to switch on.
    pub enable: u64,
    /// Features to switch off.
    pub disable: u64,
}

/// Argument of `PAGEMAP_SCAN`: twelve u64.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct PmScan {
    /// Bytes of this structure.
    pub size: u64,
    /// WP_MATCHING = 1, CHECK_WPASYNC = 2.
    pub flags: u64,
    /// First address, a multiple of the page size.
    pub start: u64,
    /// End, exclusive.
    pub end: u64,
    /// Out: where the walk stopped.
    pub walk_end: u64,
    /// Address of an array of [`PageRegion`].
    pub vec: u64,
    /// Elements of that array.
    pub vec_len: u64,
    /// Pages to report at most; 0: all.
    pub max_pages: u64,
    /// Categories that count when they are *not* there.
    pub category_inverted: u64,
    /// Categories that a page must have, all of them.
    pub category_mask: u64,
    /// Categories of which a page must have one, if there are any here.
    pub category_anyof_mask: u64,
    /// Categories to report.
    pub return_mask: u64,
}

/// What `PAGEMAP_SCAN` reports: pages side by side with the same categories.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// End, exclusive.
    pub end: u64,
    /// Those asked for that the pages have.
    pub categories: u64,
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
        assert_eq!(UFFDIO_MOVE, 0xC028_AA05);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xC018_AA06);
        assert_eq!(UFFDIO_RWPROTECT, 0xC018_AA09);
        assert_eq!(UFFDIO_SET_MODE, 0x4010_AA0A);
        assert_eq!(PAGEMAP_SCAN, 0xC060_6610);
        assert_eq!(size_of::<Protect>(), 24);
        assert_eq!(size_of::<SetMode>(), 16);
        assert_eq!(size_of::<PmScan>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
        assert_eq!(size_of::<Copy>(), 40);
        assert_eq!(size_of::<Fill>(), 32);
        assert_eq!(size_of::<Register>(), 32);
        assert_eq!(size_of::<Api>(), 24);
    }
}
