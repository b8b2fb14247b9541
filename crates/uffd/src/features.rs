//! What userfaultfd can do, in one table: [`FEATURES`]. The constants of [`Features`], the rows that
//! `pagekit doctor` prints, the page `docs/userfaultfd.md` and the list of the tests are made from it.
//!
//! Features that have a bit are asked for in the handshake, and a kernel reports all it has. Others have
//! none, and are found out by trying ([`crate::Support`]).

use crate::bits::bits;

/// How it is found out whether a kernel has a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// It has this bit in what the handshake answers.
    Bit(u32),
    /// It is tried, in the way that [`crate::Support`] knows for its name.
    Try,
}

/// One row of the table. Texts are in lower case, without a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as the kernel has it without `UFFD_FEATURE_`.
    pub name: &'static str,
    /// How it is found out.
    pub probe: Probe,
    /// The first release of Linux that has it.
    pub since: &'static str,
    /// The commit that brought it; empty where it has none yet that stays.
    pub commit: &'static str,
    /// That commit's title.
    pub title: &'static str,
    /// What it gives.
    pub gives: &'static str,
    /// What it needs beside the kernel; empty: nothing.
    pub needs: &'static str,
    /// What one loses without it.
    pub without: &'static str,
}

impl Feature {
    /// The row of that name.
    pub fn named(name: &str) -> Option<&'static Feature> {
        FEATURES.iter().find(|feature| feature.name == name)
    }

    /// Its bit, if it has one.
    pub const fn bit(&self) -> Option<u32> {
        match self.probe {
            Probe::Bit(bit) => Some(bit),
            Probe::Try => None,
        }
    }
}

macro_rules! features {
    (
        bits { $($name:ident = $bit:literal: $since:literal, $commit:literal, $title:literal;
            gives $gives:literal; needs $needs:literal; without $without:literal)* }
        tried { $($other:ident: $o_since:literal, $o_commit:literal, $o_title:literal;
            gives $o_gives:literal; needs $o_needs:literal; without $o_without:literal)* }
    ) => {
        bits! {
            /// A set of userfaultfd features. Bits this crate does not know are carried along.
            Features { $(
                #[doc = concat!("Gives ", $gives, " (Linux ", $since, ").")]
                $name = $bit;
            )* }
        }

        /// The one table: every feature, those with a bit first.
        pub const FEATURES: &[Feature] = &[
            $(Feature {
                name: stringify!($name), probe: Probe::Bit($bit), since: $since, commit: $commit,
                title: $title, gives: $gives, needs: $needs, without: $without,
            },)*
            $(Feature {
                name: stringify!($other), probe: Probe::Try, since: $o_since, commit: $o_commit,
                title: $o_title, gives: $o_gives, needs: $o_needs, without: $o_without,
            },)*
        ];
    };
}

features! {
    bits {
        PAGEFAULT_FLAG_WP = 0: "5.7", "e06f1e1dd499",
            "userfaultfd: wp: enabled write protection in userfaultfd API";
            gives "write protection of anonymous memory";
            needs "";
            without "no tracking of writes, no live snapshots"
        EVENT_FORK = 1: "4.11", "893e26e61d04",
            "userfaultfd: non-cooperative: Add fork() event";
            gives "a userfaultfd for every child that the target forks";
            needs "CAP_SYS_PTRACE of whoever makes the handshake";
            without "children of a target cannot be served"
        EVENT_REMAP = 2: "4.11", "72f87654c696",
            "userfaultfd: non-cooperative: add mremap() event";
            gives "a message when the target moves memory with mremap";
            needs "";
            without "memory that was moved is not served any more"
        EVENT_REMOVE = 3: "4.11", "d811914d8757",
            "userfaultfd: non-cooperative: rename *EVENT_MADVDONTNEED to *EVENT_REMOVE";
            gives "a message when the target gives pages back with madvise";
            needs "";
            without "pages that were given back come again instead of zeros"
        MISSING_HUGETLBFS = 4: "4.11", "163e11bc4f6e",
            "userfaultfd: hugetlbfs: UFFD_FEATURE_MISSING_HUGETLBFS";
            gives "missing pages of hugetlbfs";
            needs "a pool of huge pages (vm.nr_hugepages)";
            without "memory of huge pages cannot be served"
        MISSING_SHMEM = 5: "4.11", "47dd924508f5",
            "userfaultfd: hugetlbfs: UFFD_FEATURE_MISSING_SHMEM";
            gives "missing pages of shmem, memfd and tmpfs";
            needs "";
            without "backend share does not work: every fork copies"
        EVENT_UNMAP = 6: "4.11", "897ab3e0c49e",
            "userfaultfd: non-cooperative: add event for memory unmaps";
            gives "a message when the target unmaps memory";
            needs "";
            without "pages may be put where something else is mapped by now"
        SIGBUS = 7: "4.14", "2d6d6f5a09a9",
            "mm: userfaultfd: add feature to request for a signal delivery";
            gives "a signal in the thread that faults, instead of a message";
            needs "";
            without "pages cannot be published atomically, and buffers are filled by a thread only"
        THREAD_ID = 8: "4.14", "9d4ac934829a",
            "userfaultfd: provide pid in userfault msg";
            gives "the faulting thread in every message";
            needs "";
            without "the handler does not follow the target's processor"
        MINOR_HUGETLBFS = 9: "5.13", "7677f7fd8be7",
            "userfaultfd: add minor fault registration mode";
            gives "faults on pages of hugetlbfs that are cached and not mapped";
            needs "a pool of huge pages (vm.nr_hugepages)";
            without "no minor faults on huge pages"
        MINOR_SHMEM = 10: "5.14", "964ab0040ff9",
            "userfaultfd/shmem: advertise shmem minor fault support";
            gives "faults on pages of shmem that are cached and not mapped";
            needs "";
            without "no minor faults on shared memory"
        EXACT_ADDRESS = 11: "5.18", "824ddc601adc",
            "userfaultfd: provide unmasked address on page-fault";
            gives "the very address that was touched, not only its page";
            needs "";
            without "traces show pages only"
        WP_HUGETLBFS_SHMEM = 12: "5.19", "b1f9e876862d",
            "mm/uffd: enable write protection for shmem & hugetlbfs";
            gives "write protection of shmem and hugetlbfs, empty pages included";
            needs "";
            without "no tracking of writes to shared memory"
        WP_UNPOPULATED = 13: "6.4", "2bad466cc9d9",
            "mm/uffd: UFFD_FEATURE_WP_UNPOPULATED";
            gives "write protection of anonymous pages that are not there yet";
            needs "";
            without "memory must be populated before it is protected"
        POISON = 14: "6.6", "fc71884a5f59",
            "mm: userfaultfd: add new UFFDIO_POISON ioctl";
            gives "pages that raise SIGBUS where they are touched";
            needs "";
            without "a target one of whose pages cannot be had is killed"
        WP_ASYNC = 15: "6.7", "d61ea1cb0095",
            "userfaultfd: UFFD_FEATURE_WP_ASYNC";
            gives "write protection that the kernel resolves itself, on any kind of memory";
            needs "";
            without "tracking writes costs a fault with a handler for each page"
        MOVE = 16: "6.8", "adef440691ba",
            "userfaultfd: UFFDIO_MOVE uABI";
            gives "pages moved within a process, without copying";
            needs "";
            without "filling from a buffer of the same process copies"
        RWP = 17: "7.3", "",
            "mm/userfaultfd: add RWP fault delivery and expose UFFDIO_REGISTER_MODE_RWP";
            gives "a fault at any access to a page that is there";
            needs "";
            without "which pages are in use is found out by sampling"
        RWP_ASYNC = 18: "7.3", "",
            "userfaultfd: add UFFD_FEATURE_RWP_ASYNC for async fault resolution";
            gives "such faults resolved by the kernel itself, to be read with PAGEMAP_SCAN";
            needs "RWP in the same handshake";
            without "finding out which pages are in use costs a fault for each"
    }
    tried {
        KERNEL_FAULTS: "4.3", "86039bd3b4e6",
            "userfaultfd: add new syscall to provide memory externalization";
            gives "faults that system calls and KVM run into, not only the program itself";
            needs "CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or a /dev/userfaultfd that may be opened";
            without "system calls that meet a missing page fail with EFAULT, and guests cannot be served"
        USER_MODE_ONLY: "5.11", "37cd0575b851",
            "userfaultfd: add UFFD_USER_MODE_ONLY";
            gives "userfaultfd for everybody, for faults of the program itself";
            needs "";
            without "unprivileged programs have no userfaultfd at all"
        DEVICE: "6.1", "2d5de004e009",
            "userfaultfd: add /dev/userfaultfd for fine grained access control";
            gives "userfaultfd in full to whoever may open a file";
            needs "permission to open /dev/userfaultfd";
            without "the right cannot be given to one user, nor handed over"
        CONTINUE_MODE_WP: "6.4", "0289184476c8",
            "mm: userfaultfd: add UFFDIO_CONTINUE_MODE_WP to install WP PTEs";
            gives "cached pages mapped write-protected in one step";
            needs "";
            without "a write between mapping and protecting is lost to the tracker"
        PAGEMAP_SCAN: "6.7", "52526ca7fdb9",
            "fs/proc/task_mmu: implement IOCTL to get and optionally clear info about PTEs";
            gives "the written pages of a range, found and protected again in one call";
            needs "";
            without "dirty pages are found by reading 8 bytes for each page"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_whole_and_differ() {
        for (at, feature) in FEATURES.iter().enumerate() {
            let texts =
                [feature.name, feature.since, feature.title, feature.gives, feature.without];
            assert!(texts.iter().all(|text| !text.is_empty()), "{}", feature.name);
            assert!(feature.commit.is_empty() || feature.commit.len() == 12, "{}", feature.name);
            assert!(FEATURES[..at].iter().all(|other| other.name != feature.name));
            assert_eq!(Feature::named(feature.name), Some(feature));
            match feature.probe {
                Probe::Bit(bit) => {
                    assert_eq!(bit as usize, at, "bits come first, in their order");
                    assert_eq!(Features::named(feature.name), Some(Features(1 << bit)));
                }
                Probe::Try => assert_eq!(Features::named(feature.name), None),
            }
        }
    }

    #[test]
    fn unknown_bits_have_a_name_too() {
        let newer = Features::MOVE | Features(1 << 40);
        assert_eq!(newer.names(), ["MOVE", "bit 40"]);
        assert_eq!(format!("{newer:?}"), "Features(MOVE | bit 40)");
    }
}
