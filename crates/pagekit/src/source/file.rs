//! `file:PATH`: a file of raw memory, such as a VMM's snapshot. Holes are zeros.
//!
//! Facts about the kernel, and what follows:
//! - A mapping of a file that is cut short raises SIGBUS in whoever reads it, and a cold mapping
//!   makes copies stop half-way: the file is read by `pread` into memory of ours, never mapped.
//! - `preadv2` with `RWF_NOWAIT` reads what is in the page cache and answers EAGAIN for the rest:
//!   so the event loop can serve cached content itself, without a thread that could block. On tmpfs
//!   it is refused, but there an ordinary read waits for nothing either, unless pages were swapped.
//! - `SEEK_HOLE` tells what was never written: such runs are zero without being read.
//! - Nothing protects the file from being changed. Size and modification time are compared with
//!   those at opening after every read; a file that was changed or cut is an error for ever, never
//!   zeros or a mixture.

use std::fs::{File as Handle, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;
use rustix::io::{preadv2, Errno, ReadWriteFlags};

use super::{Capabilities, Content, Identity, Source};
use crate::error::{Error, Result};
use crate::page::{complement, Run, PAGE};

/// Pages that an identity is made of.
const SAMPLES: u64 = 128;

/// A file of raw memory, opened read-only.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    handle: Handle,
    opened_as: Metadata,
    /// Whether it lies on tmpfs.
    in_memory: bool,
}

impl File {
    /// Opens the file.
    ///
    /// # Errors
    /// `Missing` (no such file, or no right to read it), `Usage` (no regular file, empty, or not a
    /// whole number of pages).
    pub fn open(path: &Path) -> Result<File> {
        let what = || format!("cannot open template file {}", path.display());
        let handle = Handle::open(path).map_err(|error| Error::Missing { what: what(), error })?;
        let opened_as =
            handle.metadata().map_err(|error| Error::Missing { what: what(), error })?;
        let refuse = |why: String, hint: &str| {
            Err(Error::usage(format!("template file {} {why}", path.display()), hint))
        };
        if !opened_as.is_file() {
            return refuse("is no regular file".into(), "name the snapshot's memory file");
        }
        if opened_as.len() == 0 {
            return refuse("is empty".into(), "make the snapshot again");
        }
        if opened_as.len() % PAGE != 0 {
            return refuse(
                format!(
                    "has {} bytes, which is no whole number of {PAGE}-byte pages",
                    opened_as.len()
                ),
                "it was cut short, or it is no memory image; make the snapshot again",
            );
        }
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        let in_memory = rustix::fs::fstatfs(&handle).is_ok_and(|found| found.f_type == TMPFS_MAGIC);
        Ok(File { path: path.to_owned(), handle, opened_as, in_memory })
    }

    /// Whether the file is still what was opened, as far as size and modification time tell.
    fn unchanged(&self) -> Result<()> {
        let now = self.handle.metadata().map_err(|error| self.unreadable(error))?;
        let same = |of: fn(&Metadata) -> i64| of(&now) == of(&self.opened_as);
        if now.size() == self.opened_as.size()
            && same(Metadata::mtime)
            && same(Metadata::mtime_nsec)
        {
            return Ok(());
        }
        Err(Error::Integrity {
            message: format!(
                "template file {} was changed while it was served: it has {} bytes now, and had {} \
                 when opened",
                self.path.display(),
                now.size(),
                self.opened_as.size()
            ),
        })
    }

    fn unreadable(&self, error: io::Error) -> Error {
        Error::Unavailable { what: format!("cannot read {}", self.path.display()), error }
    }
}

impl Source for File {
    fn name(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { size: self.opened_as.len(), concurrency: 8, immediate: true }
    }

    /// Size, and a sample of pages evenly spread: hashing all of a large file takes longer than a
    /// boot, and names and times do not survive a copy. Two snapshots that agree in all of that would
    /// be taken for one; what is fetched ahead then is of less use, and nothing worse happens.
    fn identity(&self) -> Result<Identity> {
        let pages = self.opened_as.len() / PAGE;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&pages.to_le_bytes());
        let mut buffer = [0; PAGE as usize];
        for sample in 0..SAMPLES.min(pages) {
            let page = sample * pages / SAMPLES.min(pages);
            self.read(page * PAGE, &mut buffer)?;
            hasher.update(&buffer);
        }
        Ok(Identity(hasher.finalize().into()))
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        let failed = |errno: Errno| Error::Unavailable {
            what: format!("cannot map the holes of {}", self.path.display()),
            error: errno.into(),
        };
        let mut data = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.handle, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                // A file system without holes: everything is data.
                Err(Errno::INVAL) => return Ok(Vec::new()),
                Err(errno) => return Err(failed(errno)),
            };
            let end = rustix::fs::seek(&self.handle, SeekFrom::Hole(start)).map_err(failed)?;
            data.push(Run::between(start / PAGE, end.div_ceil(PAGE)));
            at = end;
        }
        Ok(complement(Run::between(0, self.opened_as.len() / PAGE), &data))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content> {
        let read = self.handle.read_exact_at(buffer, offset);
        // Asked after the read, so that what was read is what was opened.
        self.unchanged()?;
        read.map(|()| Content::Bytes).map_err(|error| self.unreadable(error))
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<Content>> {
        if self.in_memory {
            return self.read(offset, buffer).map(Some);
        }
        let mut parts = [io::IoSliceMut::new(buffer)];
        match preadv2(&self.handle, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == buffer.len() => {
                self.unchanged()?;
                Ok(Some(Content::Bytes))
            }
            // Not cached, partly cached, or a file system that cannot say: let a worker read it.
            Ok(_) | Err(_) => Ok(None),
        }
    }

    fn mappable(&self) -> Option<BorrowedFd<'_>> {
        Some(self.handle.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::conformance::{self, pattern};

    fn temporary(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn conforms() {
        let content = pattern(64);
        let file = temporary(&content);
        conformance::check(&File::open(file.path()).unwrap(), &content);
    }

    #[test]
    fn holes_are_zero_runs() {
        let file = temporary(&[]);
        let handle = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
        handle.set_len(64 * PAGE).unwrap();
        handle.write_all_at(&pattern(2), 8 * PAGE).unwrap();
        let source = File::open(file.path()).unwrap();
        let zeros = [Run::between(0, 8), Run::between(10, 64)];
        assert_eq!(source.zero_runs().unwrap(), zeros);
        let mut expected = vec![0; 64 * PAGE as usize];
        expected[8 * PAGE as usize..10 * PAGE as usize].copy_from_slice(&pattern(2));
        conformance::check(&source, &expected);
    }

    #[test]
    fn refuses_what_is_no_memory_image() {
        assert!(matches!(File::open(Path::new("/nonexistent")), Err(Error::Missing { .. })));
        for (content, expected) in [(&b""[..], "is empty"), (&b"x"[..], "no whole number")] {
            let error = File::open(temporary(content).path()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.hint().is_some());
        }
        let error = File::open(Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("no regular file"), "{error}");
    }

    #[test]
    fn a_file_that_is_cut_short_is_an_error_not_zeros() {
        let file = temporary(&pattern(8));
        let source = File::open(file.path()).unwrap();
        file.as_file().set_len(4 * PAGE).unwrap();
        let mut buffer = vec![0; PAGE as usize];
        let error = source.read(6 * PAGE, &mut buffer).unwrap_err();
        assert!(matches!(error, Error::Integrity { .. }), "{error}");
        assert!(!error.retryable());
        // Left to who can say more, or, on tmpfs, as good as read.
        match source.try_read(6 * PAGE, &mut buffer) {
            Ok(found) => assert_eq!(found, None),
            Err(error) => assert!(source.in_memory && !error.retryable(), "{error}"),
        }
    }
}
