//! `share`: the target maps the template's file privately; a published page only needs a wake-up.
//!
//! The region is registered MISSING and nothing else. That mode traps where the *file* has a hole,
//! so a page that any fork brought never traps again in another one, and the kernel's fault-around
//! maps its neighbours along (MINOR and WP registrations would turn that off).

use uffd::{Errno, Progress, Userfaultfd};

use super::{Backend, Resolution};
use crate::page::Run;
use crate::template::cache_file::CacheFile;

/// The backend.
#[derive(Debug)]
pub struct Share;

impl Backend for Share {
    fn name(&self) -> &'static str {
        "share"
    }

    fn sees_template(&self) -> bool {
        true
    }

    fn fill(&self, uffd: &Userfaultfd, _cache: &CacheFile, address: u64, run: Run) -> Progress {
        // No error says that the target is gone: a wake-up of nobody succeeds.
        match uffd.wake(address, run.bytes()) {
            Ok(()) => Progress { done: run.bytes() as usize, errno: None },
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::INVAL);
                Progress { done: 0, errno: Some(errno) }
            }
        }
    }

    fn filled(&self) -> Resolution {
        Resolution::Shared
    }
}
