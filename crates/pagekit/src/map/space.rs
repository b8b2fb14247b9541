//! Address space: the memory of a map.
//!
//! How it is made, and why in this order:
//! 1. The template's file is mapped without any access, privately. (A hole that is read unregistered
//!    becomes a zero page for everyone.)
//! 2. Long zero runs are mapped over as anonymous memory: they never trap, and cost nothing.
//! 3. It is kept out of children: see [`super::fork`].
//! 4. What is left is registered, MISSING only, and served.
//! 5. Only now it can be read, and written if it is to be.
//!
//! Huge pages come from hugetlbfs, anonymously, and are all registered. The kernel reserves them from
//! its pool when they are mapped, so that filling one never fails for want of room.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::Arc;

use rustix::fs::{memfd_create, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::{
    madvise, mmap, mmap_anonymous, mprotect, munmap, Advice, MapFlags, MprotectFlags, ProtFlags,
};
use uffd::Userfaultfd;

use crate::backend::fill_gaps;
use crate::error::{Error, Result};
use crate::page::{complement, Run, PAGE};
use crate::process;
use crate::template::{zero_parts, Template};

/// Bytes of a huge page.
pub(super) const HUGE: u64 = 2 << 20;
/// Zero runs of one map that get a mapping of their own, at most: a process may have 65530 mappings.
const MOST_ZERO_PARTS: usize = 1024;

/// Whether children of a fork inherit the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Children {
    Inherit,
    KeepOut,
}

/// Addresses of this process. Unmapped when dropped, by whom they belong to.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) start: u64,
    pub(super) bytes: u64,
    process: AtomicU64,
    writable: bool,
    /// What has to be registered: addresses, and the pages of the template that belong there.
    pub(super) pieces: Vec<(u64, Run)>,
}

impl Space {
    /// Maps a template's file, without access.
    pub(super) fn of_file(template: &Template, writable: bool) -> Result<Space> {
        let bytes = template.size();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes as usize,
                ProtFlags::empty(),
                flags,
                template.cache().readonly(),
                0,
            )
        };
        let start = start.map_err(|errno| no_room(bytes, errno))? as u64;
        let mut space = Space::here(start, bytes, writable);
        let zeros = zero_parts(template, template.whole(), MOST_ZERO_PARTS);
        for zero in &zeros {
            // SAFETY: a part of the mapping just made, that nobody knows yet.
            let part = unsafe {
                mmap_anonymous(
                    (start + zero.offset()) as *mut _,
                    zero.bytes() as usize,
                    ProtFlags::empty(),
                    flags | MapFlags::FIXED,
                )
            };
            let at = part.map_err(|errno| no_room(zero.bytes(), errno))?;
            // Writing one byte would take 2 MiB. A kernel without huge pages refuses to be told.
            // SAFETY: as above.
            let _ = unsafe { madvise(at, zero.bytes() as usize, Advice::LinuxNoHugepage) };
        }
        let rest = complement(template.whole(), &zeros);
        space.pieces = rest.into_iter().map(|run| (start + run.offset(), run)).collect();
        Ok(space)
    }

    /// Huge pages for a template, without access.
    pub(super) fn of_huge_pages(template: &Template, writable: bool) -> Result<Space> {
        let bytes = template.size();
        if bytes % HUGE != 0 {
            return Err(Error::usage(
                format!("{bytes} bytes are no whole huge pages of {HUGE}"),
                "use page_size=4096, or a source whose size is a multiple of 2 MiB",
            ));
        }
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes as usize, ProtFlags::empty(), flags)
        };
        let start = start.map_err(|errno| Error::Unsupported {
            message: format!(
                "the kernel's pool has no {} free huge pages of 2 MiB: {errno}",
                bytes / HUGE
            ),
            hint: "sudo sysctl vm.nr_hugepages=N for a larger pool, or use page_size=4096"
                .to_owned(),
        })? as u64;
        let mut space = Space::here(start, bytes, writable);
        space.pieces = vec![(start, template.whole())];
        Ok(space)
    }

    fn here(start: u64, bytes: u64, writable: bool) -> Space {
        let process = AtomicU64::new(process::current());
        Space { start, bytes, process, writable, pieces: Vec::new() }
    }

    /// Gives the access that the map is to have.
    pub(super) fn open(&self) -> Result<()> {
        let access = match self.writable {
            true => MprotectFlags::READ | MprotectFlags::WRITE,
            false => MprotectFlags::READ,
        };
        self.protect(access).map_err(|errno| Error::kernel("cannot give access to a map", errno))
    }

    /// Fills all of it from a template where nobody will do it later, and gives the access it is to have.
    ///
    /// # Safety
    /// Nobody may touch it meanwhile.
    pub(super) unsafe fn fill(&self, template: &Arc<Template>) -> Result<(), Arc<Error>> {
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        self.protect(access)
            .map_err(|errno| Error::kernel("cannot give access to a map", errno))?;
        // SAFETY: just mapped, readable and writable, initialised by the kernel, and ours alone.
        let all =
            unsafe { std::slice::from_raw_parts_mut(self.start as *mut u8, self.bytes as usize) };
        template.read(0, all)?;
        Ok(self.open()?)
    }

    /// Takes all access away.
    pub(super) fn shut(&self) {
        // Cannot fail where it matters: memory that is not mapped cannot be touched either.
        let _ = self.protect(MprotectFlags::empty());
    }

    fn protect(&self, access: MprotectFlags) -> Result<(), Errno> {
        // SAFETY: our own mapping; who touches it without the right to gets a signal.
        unsafe { mprotect(self.start as *mut _, self.bytes as usize, access) }
    }

    /// Says what children get of it.
    pub(super) fn children(&self, children: Children) {
        let advice = match children {
            Children::Inherit => Advice::LinuxDoFork,
            Children::KeepOut => Advice::LinuxDontFork,
        };
        // SAFETY: our own mapping, and advice about children only. It fails where the program has
        // unmapped a part of it behind our back.
        let _ = unsafe { madvise(self.start as *mut _, self.bytes as usize, advice) };
    }

    /// Keeps everything else away from addresses that this process, a child, did not inherit. False if
    /// something is there already.
    pub(super) fn reserve(&self) -> bool {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        let (at, bytes) = (self.start as *mut _, self.bytes as usize);
        // SAFETY: replaces nothing, and cannot be touched.
        match unsafe { mmap_anonymous(at, bytes, ProtFlags::empty(), flags) } {
            Ok(there) if there == at => {
                self.belongs_here();
                true
            }
            // A kernel that does not know the flag took it for a wish.
            Ok(elsewhere) => {
                // SAFETY: just mapped, known to nobody.
                let _ = unsafe { munmap(elsewhere, bytes) };
                false
            }
            Err(_) => false,
        }
    }

    /// The process that it belongs to: see [`process::current`].
    pub(super) fn process(&self) -> u64 {
        self.process.load(Relaxed)
    }

    /// This process, a child, has inherited it.
    pub(super) fn belongs_here(&self) {
        self.process.store(process::current(), Relaxed);
    }

    /// Puts a mapping of nothing in the place of pages: touching it raises SIGBUS. Says whether it did.
    pub(super) fn bar(address: u64, bytes: u64) -> bool {
        let Ok(nothing) = memfd_create("pagekit-nothing", MemfdFlags::CLOEXEC) else {
            return false;
        };
        map_over(nothing.as_fd(), address, bytes, 0, ProtFlags::READ).is_ok()
    }

    /// Maps `page` of the template at `address` again, where something stands in its place.
    pub(super) fn unbar(
        &self,
        template: &Template,
        uffd: &Userfaultfd,
        page: u64,
        address: u64,
    ) -> Result<()> {
        let failed = |error| Error::kernel(format!("cannot map page {page} again"), error);
        map_over(template.cache().readonly(), address, PAGE, page * PAGE, ProtFlags::empty())
            .map_err(|errno| failed(errno.into()))?;
        uffd.register(address, PAGE, uffd::RegisterMode::MISSING).map_err(failed)?;
        let one = Space {
            start: address,
            bytes: PAGE,
            process: AtomicU64::new(0),
            writable: self.writable,
            pieces: Vec::new(),
        };
        one.children(Children::KeepOut);
        one.open()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if self.process() == process::current() {
            // SAFETY: mapped by this process, or inherited by it, and touched by nobody any more.
            let _ = unsafe { munmap(self.start as *mut _, self.bytes as usize) };
        }
    }
}

fn map_over(
    file: BorrowedFd<'_>,
    address: u64,
    bytes: u64,
    offset: u64,
    access: ProtFlags,
) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: replaces pages of a map that cannot be had, or what stands in for them.
    unsafe { mmap(address as *mut _, bytes as usize, access, flags, file, offset) }.map(drop)
}

/// Drops one page, or what stands in its place: the next touch finds it anew.
pub(super) fn drop_page(address: u64) -> Result<(), Errno> {
    // SAFETY: a page of a map that holds nothing that anybody wrote.
    unsafe { madvise(address as *mut _, PAGE as usize, Advice::LinuxDontNeed) }
}

/// Puts zeros where nothing is.
pub(super) fn put_zeros(uffd: &Userfaultfd, start: u64, bytes: u64) {
    // Unmapped meanwhile: nobody reads it.
    let _ = fill_gaps(start, bytes, PAGE, |at, bytes| uffd.zeropage(at, bytes));
}

fn no_room(bytes: u64, errno: Errno) -> Error {
    Error::kernel(format!("no address space for a map of {bytes} bytes"), errno)
}
