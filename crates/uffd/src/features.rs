//! Feature bits of the handshake, by name.
//!
//! A kernel reports all it has; a handshake asks for some. Bits this crate does not know are
//! carried along unchanged, so that a newer kernel is never an error.

use std::fmt;
use std::ops::{BitAnd, BitOr};

/// A set of userfaultfd features.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Features(pub u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Features = Features(1 << $bit);)*
            const NAMES: &'static [(&'static str, u32)] = &[$((stringify!($name), $bit)),*];
        }
    };
}

features! {
    /// Write protection of anonymous memory (5.7).
    PAGEFAULT_FLAG_WP = 0;
    /// A fork of the target brings a userfaultfd for the child (4.11). The caller of the
    /// handshake needs `CAP_SYS_PTRACE`.
    EVENT_FORK = 1;
    /// `mremap` is announced; without it a moved range loses its registration (4.11).
    EVENT_REMAP = 2;
    /// `madvise` DONTNEED, FREE and REMOVE are announced (4.11).
    EVENT_REMOVE = 3;
    /// Missing faults on hugetlbfs (4.11).
    MISSING_HUGETLBFS = 4;
    /// Missing faults on shmem, memfd and tmpfs (4.11).
    MISSING_SHMEM = 5;
    /// `munmap` is announced (4.11).
    EVENT_UNMAP = 6;
    /// No messages: the faulting thread gets SIGBUS (4.14).
    SIGBUS = 7;
    /// Messages carry the id of the faulting thread (4.14).
    THREAD_ID = 8;
    /// Minor faults on hugetlbfs (5.13).
    MINOR_HUGETLBFS = 9;
    /// Minor faults on shmem (5.14).
    MINOR_SHMEM = 10;
    /// Fault addresses are not rounded down to the page (5.18).
    EXACT_ADDRESS = 11;
    /// Write protection of hugetlbfs and shmem (5.19).
    WP_HUGETLBFS_SHMEM = 12;
    /// Write protection of empty anonymous pages (6.4).
    WP_UNPOPULATED = 13;
    /// `UFFDIO_POISON` (6.6).
    POISON = 14;
    /// Write protection resolved by the kernel itself (6.7).
    WP_ASYNC = 15;
    /// `UFFDIO_MOVE` (6.8).
    MOVE = 16;
}

impl Features {
    /// No feature at all.
    pub const NONE: Features = Features(0);

    /// Whether all bits of `other` are in this set.
    pub fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of this set that `other` lacks.
    pub fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// Names of the known bits, then `bit N` for the others, lowest bit first.
    pub fn names(self) -> Vec<String> {
        (0..64)
            .filter(|bit| self.0 >> bit & 1 == 1)
            .map(|bit| match Self::NAMES.iter().find(|(_, known)| *known == bit) {
                Some((name, _)) => (*name).to_owned(),
                None => format!("bit {bit}"),
            })
            .collect()
    }
}

impl BitOr for Features {
    type Output = Features;
    fn bitor(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Features;
    fn bitand(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({})", self.names().join(" | "))
    }
}
