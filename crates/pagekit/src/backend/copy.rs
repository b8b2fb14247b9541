//! `copy`: `UFFDIO_COPY` from the template's file into private memory of the target.
//!
//! Works with every userfaultfd client. Each page read costs the target a page of its own. The
//! kernel copies from our alias of the file, whose holes raise an error instead of giving zeros.

use uffd::{Progress, Userfaultfd};

use super::{Backend, Resolution};
use crate::page::Run;
use crate::template::cache_file::CacheFile;

/// The backend.
#[derive(Debug)]
pub struct Copy;

impl Backend for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn sees_template(&self) -> bool {
        false
    }

    fn fill(&self, uffd: &Userfaultfd, cache: &CacheFile, address: u64, run: Run) -> Progress {
        // SAFETY: the pages of `run` are present, so this is initialised memory of the template.
        unsafe {
            uffd.copy_from(address, cache.address(run), run.bytes() as usize, uffd::How::NONE)
        }
    }

    fn filled(&self) -> Resolution {
        Resolution::Copied
    }
}
