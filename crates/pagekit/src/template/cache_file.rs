//! The template's file: the page cache that all forks map.
//!
//! Facts about the kernel (all observed on 6.18), and what follows:
//! - `pwrite` into a file that others map is not atomic to them: they can read zeros in between.
//!   `UFFDIO_COPY` into our own shared mapping of the file, the *alias*, is. So pages are published
//!   that way only. The alias is registered with the SIGBUS feature: nobody can create a page by
//!   touching it, we included.
//! - Where huge pages are allowed in shmem, filling 4 KiB can expose 2 MiB of zeros: the file lives
//!   on a tmpfs of ours, mounted `huge=never`, that has no path (`fsopen` + `fsmount`, never moved).
//! - A writable descriptor can be had from a read-only one by opening `/proc/self/fd/N`, unless the
//!   *mount* is read-only: clients get a descriptor opened through a read-only clone of the mount.
//!   Nobody but this process can write the file (root with CAP_SYS_ADMIN could).
//! - Until Linux 6.14 a mount can be cloned only while it is attached in the caller's mount namespace.
//!   There a thread makes the clone, in a namespace of its own, which ends with it.
//! - Without the right to mount, a memfd sealed with F_SEAL_FUTURE_WRITE does nearly the same: the
//!   alias, mapped before the seal, is the last writable view.
//! - A child of ours would inherit the alias without its registration and make zero pages by reading
//!   it: the alias is marked MADV_DONTFORK.
//! - A piece of 2 MiB that is full can be put into a huge page (MADV_COLLAPSE of the alias, Linux ≥ 6.1),
//!   while forks have it mapped and registered: what a later fork maps costs 0.02 µs a page then, not 0.5
//!   (`folded` and `second` of `benchmarks/fault.py`). A piece with a hole is refused. It is not done: most
//!   pieces of a guest's memory have holes, its zeros; and it took 5 ms of the processor a piece, ten times
//!   that on a busy machine, during which a fork that touches the piece waits: more than all but many
//!   forks that read nearly everything would save.
//! - The memory cgroup of *this* process pays for every page of the file, whoever reads it.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{ftruncate, memfd_create, openat, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{madvise, mmap, munmap, Advice, MapFlags, ProtFlags};
use rustix::mount::{
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags,
};
use rustix::thread::{unshare_unsafe, UnshareFlags};
use uffd::{Features, RegisterMode, Userfaultfd};

use crate::delivery::Delivery;
use crate::error::{Error, Result};
use crate::page::{Run, PAGE};
use crate::process;

/// Why a publication stopped.
#[derive(Debug)]
pub enum Failure {
    /// This page was in the file already, though nobody published it.
    Occupied(u64),
    /// Anything else; memory, mostly.
    Other(Error),
}

/// Who keeps clients from writing the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// A detached tmpfs with a read-only clone for clients.
    ReadOnlyMount,
    /// A sealed memfd.
    Seals,
}

impl Protection {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Protection::ReadOnlyMount => "read-only mount",
            Protection::Seals => "seals",
        }
    }
}

/// The file, our alias of it, and the userfaultfd through which the alias is filled.
#[derive(Debug)]
pub struct CacheFile {
    writable: OwnedFd,
    readonly: OwnedFd,
    protection: Protection,
    alias: Alias,
    /// None where userfaultfd is unavailable: then everything is loaded before anybody maps the
    /// file, so that publications need not be atomic.
    publisher: Option<Userfaultfd>,
}

#[derive(Debug)]
struct Alias {
    start: NonNull<u8>,
    bytes: usize,
    /// The process that has it: see [`process::Ours`]. In children the addresses are somebody else's.
    process: u64,
}

// SAFETY: the mapping is plain memory owned by this value; what is read through it is published
// before the present-map says so.
unsafe impl Send for Alias {}
// SAFETY: as above; all access goes through methods that state what they rely on.
unsafe impl Sync for Alias {}

impl Drop for Alias {
    fn drop(&mut self) {
        if self.process != process::current() {
            return;
        }
        // SAFETY: mapped by CacheFile::create with this length, and no borrow of it outlives self.
        // A failure leaves address space behind, nothing else.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl CacheFile {
    /// Makes an empty file of `size` bytes, a multiple of the page size.
    pub fn create(size: u64, delivery: &Delivery) -> Result<CacheFile> {
        let bytes = usize::try_from(size)
            .map_err(|_| Error::usage(format!("{size} bytes do not fit this machine"), ""))?;
        let failed = |what: &str, errno: Errno| {
            Error::kernel(format!("cannot {what} the template's file of {size} bytes"), errno)
        };
        let mounted = on_detached_tmpfs(size, clone_mount);
        let (writable, mounted_readonly) = match mounted {
            Ok((writable, readonly)) => (writable, Some(readonly)),
            Err(_) => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
                (memfd_create("pagekit-template", flags).map_err(|e| failed("make", e))?, None)
            }
        };
        ftruncate(&writable, size).map_err(|e| failed("size", e))?;
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &writable,
                0,
            )
        }
        .map_err(|e| failed("map", e))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| failed("map", Errno::NOMEM))?;
        let alias = Alias { start, bytes, process: process::current() };
        // SAFETY: the whole mapping just made; MADV_DONTFORK does not change our view of it.
        unsafe { madvise(start.as_ptr().cast(), bytes, Advice::LinuxDontFork) }
            .map_err(|e| failed("protect from children", e))?;
        let publisher = delivery.open()?.map(|uffd| {
            uffd.handshake(Features::SIGBUS)?;
            uffd.register(start.as_ptr() as u64, size, RegisterMode::MISSING)?;
            Ok::<_, std::io::Error>(uffd)
        });
        let publisher = publisher
            .transpose()
            .map_err(|error| Error::kernel("cannot register the template's file", error))?;
        let (readonly, protection) = match mounted_readonly {
            Some(readonly) => (readonly, Protection::ReadOnlyMount),
            None => (sealed(&writable).map_err(|e| failed("seal", e))?, Protection::Seals),
        };
        Ok(CacheFile { writable, readonly, protection, alias, publisher })
    }

    /// The descriptor for clients: private mappings and reads, nothing else.
    pub fn readonly(&self) -> BorrowedFd<'_> {
        self.readonly.as_fd()
    }

    /// Who keeps clients from writing.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// Where present pages of `run` can be read in this process, for filling targets.
    pub fn address(&self, run: Run) -> *const u8 {
        assert!(
            run.offset() + run.bytes() <= self.alias.bytes as u64,
            "{run:?} is inside the file"
        );
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.alias.start.as_ptr().add(run.offset() as usize) }
    }

    /// Copies bytes of present pages. The caller knows that all of them are present: a hole raises
    /// SIGBUS, never zeros.
    pub fn read_present(&self, offset: u64, buffer: &mut [u8]) {
        let end = offset + buffer.len() as u64;
        assert!(end <= self.alias.bytes as u64, "{offset} to {end} is inside the file");
        // SAFETY: inside the mapping; published pages are never changed.
        unsafe {
            let from = self.alias.start.as_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len());
        }
    }

    /// Publishes `content` (zeros, if none) as the pages of `run`, atomically page by page, and
    /// calls `done` with the number of further pages that are there.
    pub fn publish(
        &self,
        run: Run,
        content: Option<&[u8]>,
        mut done: impl FnMut(u64),
    ) -> Result<(), Failure> {
        let Some(publisher) = &self.publisher else {
            self.write(run, content);
            done(run.pages);
            return Ok(());
        };
        let mut rest = run;
        let mut content = content;
        while rest.pages > 0 {
            let at = self.address(rest) as u64;
            let progress = match content {
                Some(bytes) => publisher.copy(at, &bytes[..rest.bytes() as usize]),
                None => publisher.zeropage(at, rest.bytes()),
            };
            let pages = progress.done as u64 / PAGE;
            done(pages);
            rest = Run::between(rest.start + pages, rest.end());
            content = content.map(|bytes| &bytes[progress.done..]);
            match progress.errno {
                None => {}
                Some(Errno::EXIST) => return Err(Failure::Occupied(rest.start)),
                // Stopped after some pages: the next round says why.
                Some(Errno::AGAIN) if pages > 0 => {}
                Some(Errno::AGAIN) => std::thread::yield_now(),
                Some(errno) => {
                    return Err(Failure::Other(Error::Unavailable {
                        what: format!(
                            "no room for page {} of the template (its {} MiB are charged to the \
                             memory limit of this process)",
                            rest.start,
                            self.alias.bytes >> 20
                        ),
                        error: errno.into(),
                    }))
                }
            }
        }
        Ok(())
    }

    /// Runs of pages that the file holds.
    pub fn data_runs(&self) -> Result<Vec<Run>> {
        let failed = |errno| Error::kernel("cannot audit the template's file", errno);
        let mut runs = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.writable, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return Ok(runs),
                Err(errno) => return Err(failed(errno)),
            };
            at = rustix::fs::seek(&self.writable, SeekFrom::Hole(start)).map_err(failed)?;
            runs.push(Run::between(start / PAGE, at / PAGE));
        }
    }

    fn write(&self, run: Run, content: Option<&[u8]>) {
        let to = self.address(run).cast_mut();
        // SAFETY: inside the mapping; without a publisher nobody maps the file before it is loaded.
        unsafe {
            match content {
                Some(bytes) => {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, run.bytes() as usize)
                }
                None => std::ptr::write_bytes(to, 0, run.bytes() as usize),
            }
        }
    }
}

const NAME: &CStr = c"template";

/// A file of a tmpfs that no path leads to, and a read-only view of it, through a clone of the mount
/// that is made in the given way. Needs CAP_SYS_ADMIN.
fn on_detached_tmpfs(
    size: u64,
    clone: impl Fn(&OwnedFd) -> rustix::io::Result<OwnedFd>,
) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let configuration = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(configuration.as_fd(), c"huge", c"never")?;
    // Without a size it would be half of the machine's memory. One page for the directory entry.
    fsconfig_set_string(configuration.as_fd(), c"size", (size + PAGE).to_string().as_str())?;
    fsconfig_create(configuration.as_fd())?;
    let mount = fsmount(
        configuration.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV,
    )?;
    let create = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let writable = openat(&mount, NAME, create, Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
    let clone = clone(&mount)?;
    make_readonly(&clone)?;
    let readonly = openat(&clone, NAME, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok((writable, readonly))
}

/// Another mount of the same file system, detached too.
fn clone_mount(mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    match clone_directly(mount) {
        Err(Errno::INVAL) => clone_by_attaching(mount),
        cloned => cloned,
    }
}

fn clone_directly(mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(mount, c"", flags)
}

/// The same for kernels that clone no detached mount. Afterwards it is detached again.
fn clone_by_attaching(mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let in_a_namespace = || {
        // SAFETY: what this thread no longer shares with the others (root and working directory,
        // mounts) it uses no further than here; the descriptor table stays common.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }?;
        // Or it would appear in the namespace that this one is a copy of.
        mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(mount, c"", rustix::fs::CWD, c"/", flags)?;
        clone_directly(mount)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("pagekit-mount".to_owned());
        let thread = thread.spawn_scoped(scope, in_a_namespace).map_err(|_| Errno::AGAIN)?;
        thread.join().map_err(|_| Errno::INVAL)?
    })
}

/// `mount_setattr(2)` with MOUNT_ATTR_RDONLY (Linux ≥ 5.12); rustix has no wrapper for it.
pub(crate) fn make_readonly(mount: &OwnedFd) -> rustix::io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = MountAttr {
        set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()),
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the structure is the one the call takes, its size is passed, and it is borrowed for
    // the call; the path is an empty C string.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attributes),
            size_of::<MountAttr>(),
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}

/// Seals a memfd against everything that is not done through the alias, and opens a read-only view.
fn sealed(writable: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    rustix::fs::fcntl_add_seals(
        writable,
        SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
    rustix::fs::open(path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As root, like the tests of the engine.
    #[test]
    fn a_mount_that_had_to_be_attached_leaves_no_trace_and_its_clone_is_read_only() {
        for clone in [clone_mount, clone_by_attaching] {
            let (writable, readonly) = on_detached_tmpfs(PAGE, clone).unwrap();
            let device = rustix::fs::fstat(&writable).unwrap().st_dev;
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(&format!(" {major}:{minor} ")), "{mounts}");
            rustix::io::write(&writable, b"content").unwrap();
            let mut found = [0; 7];
            rustix::io::pread(&readonly, &mut found[..], 0).unwrap();
            assert_eq!(&found, b"content");
            let again = format!("/proc/self/fd/{}", readonly.as_raw_fd());
            let refused = rustix::fs::open(again.as_str(), OFlags::RDWR, Mode::empty());
            assert_eq!(refused.unwrap_err(), Errno::ROFS);
        }
    }
}
