//! Which process this is. After a fork the child has a copy of every object, but not of what some of
//! them stand for: threads, descriptors that somebody reads, mappings that are kept out of children.
//!
//! Facts about the kernel, and what follows:
//! - A child's copy of a joined thread waits for ever, its copy of a lock may be held by nobody, and
//!   addresses that the parent unmaps later may belong to something else in it. So what a process made
//!   is dropped in that process only: [`Ours`].
//! - A process number says nothing across pid namespaces, and fork handlers do not run for a bare
//!   `clone`. A page that the kernel wipes in every child (`MADV_WIPEONFORK`, Linux 4.14) tells both.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::OnceLock;

use rustix::mm::{madvise, mmap_anonymous, Advice, MapFlags, ProtFlags};

use crate::error::{Error, Result};

/// A number that this process has, and none that it comes from. Never 0.
pub fn current() -> u64 {
    // Copied into children with the rest of the memory: what they take next, no ancestor has.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let Some(mark) = mark() else { return u64::from(std::process::id()) };
    match mark.load(Acquire) {
        0 => {
            let new = NEXT.fetch_add(1, Relaxed);
            match mark.compare_exchange(0, new, AcqRel, Acquire) {
                Ok(_) => new,
                Err(first) => first,
            }
        }
        known => known,
    }
}

/// A word that is 0 in every process until it is written there.
fn mark() -> Option<&'static AtomicU64> {
    static MARK: OnceLock<usize> = OnceLock::new();
    let address = *MARK.get_or_init(|| {
        let bytes = rustix::param::page_size();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh anonymous mapping, never unmapped; the advice concerns children only.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE).and_then(
                |page| madvise(page, bytes, Advice::LinuxWipeOnFork).map(|()| page as usize),
            )
        };
        page.unwrap_or(0)
    });
    // SAFETY: a mapping of at least eight bytes, aligned, initialised to zero, and never unmapped.
    (address != 0).then(|| unsafe { &*(address as *const AtomicU64) })
}

/// Something that means nothing in other processes: there it is neither used nor dropped.
#[derive(Debug)]
pub struct Ours<T> {
    value: ManuallyDrop<T>,
    process: u64,
}

impl<T> Ours<T> {
    /// Something of this process.
    pub fn new(value: T) -> Ours<T> {
        Ours { value: ManuallyDrop::new(value), process: current() }
    }

    /// Whether this is the process that made it.
    pub fn is_here(&self) -> bool {
        self.process == current()
    }

    /// The value, in the process that made it.
    ///
    /// # Errors
    /// `Usage` in any other.
    pub fn get(&self) -> Result<&T> {
        match self.is_here() {
            true => Ok(&self.value),
            false => Err(Error::usage(
                "it was made by the process that this one was forked from, and works there only",
                "make one of its own in the child",
            )),
        }
    }

    /// The value as the fork copied it, for parts of it that are plain memory.
    pub(crate) fn copied(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Ours<T> {
    fn drop(&mut self) {
        if self.is_here() {
            // SAFETY: dropped here and nowhere else.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counts<'a>(&'a AtomicU64);

    impl Drop for Counts<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn what_a_process_made_is_dropped_there_only() {
        let drops = AtomicU64::new(0);
        let ours = Ours::new(Counts(&drops));
        assert!(ours.is_here() && ours.get().is_ok());
        drop(ours);
        assert_eq!(drops.load(Relaxed), 1);
        let theirs = Ours { process: current() + 1, value: ManuallyDrop::new(Counts(&drops)) };
        assert!(matches!(theirs.get().map(drop), Err(Error::Usage { .. })));
        drop(theirs);
        assert_eq!(drops.load(Relaxed), 1);
    }

    #[test]
    fn a_child_and_its_child_are_others() {
        let here = current();
        assert_eq!(here, current());
        // SAFETY: the children do nothing but system calls, atomics, and to end.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                let me = current();
                let grandchild = libc::fork();
                if grandchild == 0 {
                    libc::_exit(i32::from(current() == me || current() == here));
                }
                let mut status = -1;
                libc::waitpid(grandchild, &mut status, 0);
                libc::_exit(i32::from(status != 0 || me == here || me != current()));
            }
            let mut status = -1;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            status
        };
        assert_eq!(status, 0);
        assert_eq!(here, current());
    }
}
