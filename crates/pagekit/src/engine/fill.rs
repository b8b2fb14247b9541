//! Filling: how pages that can be had at once get into a target.
//!
//! | where they are | how they get there |
//! |---|---|
//! | in the template's file | as the backend does it |
//! | nowhere: they are zero by the map | as zeros |
//!
//! What is at hand in the source (a file whose pages the kernel has cached) could go straight into a
//! target of `copy`, at half the cost of the way through the template's file. But then each fork would
//! fetch it anew: it takes the way on which the next fork finds it.

use uffd::{Errno, Progress};

use super::region::Place;
use super::target::Target;
use crate::backend::{self, Resolution};
use crate::page::{find, Run, PAGE};

/// A fill that was tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fill {
    /// Its pages: some of those asked for, from the first one on.
    pub(super) run: Run,
    /// What came of it.
    pub(super) progress: Progress,
    /// What a page that was filled is counted as.
    pub(super) filled: Resolution,
}

impl Target {
    /// Puts the first pages of `run` at `address`, as many as can be had at once, in one piece and from
    /// one place. None if the very first cannot be had at once.
    pub(super) fn put(&self, address: u64, run: Run) -> Option<Fill> {
        let fill = self.put_some(address, run)?;
        self.locality().put(fill.there());
        Some(fill)
    }

    fn put_some(&self, address: u64, run: Run) -> Option<Fill> {
        let template = &self.template;
        let present = template.present_from(run);
        if present.pages > 0 {
            let progress = self.backend.fill(&self.uffd, template.cache(), address, present);
            return Some(Fill { run: present, progress, filled: self.backend.filled() });
        }
        let zero = find(template.zero_runs(), run.start)?;
        let run = Run::between(run.start, run.end().min(zero.end()));
        let progress = backend::zero(&self.uffd, address, run.bytes(), self.page_size);
        Some(Fill { run, progress, filled: Resolution::Zeroed })
    }

    /// Puts `page` of the template at `address`, and what else of `along` is missing there, in the same
    /// place, and can be had at once. None if the page cannot.
    pub(super) fn fill(
        &self,
        address: u64,
        page: u64,
        place: Place,
        along: Run,
    ) -> Option<Resolution> {
        // The pages of a place lie side by side: addresses differ as pages do.
        let address_of = |of: u64| (address + of * PAGE).wrapping_sub(page * PAGE);
        let along = place.around(page, along);
        let behind = self.missing(Run::between(page + 1, along.end()));
        let end = behind.filter(|run| run.start == page + 1).map_or(page + 1, Run::end);
        let mut fill = self.put(address, Run::between(page, end))?;
        if fill.progress.errno == Some(Errno::NOENT) && fill.run.pages > 1 {
            // Perhaps the run crosses a border that the target made (mprotect): one page cannot.
            fill = self.put(address, Run { start: page, pages: 1 })?;
        }
        self.locality().came_to((address / PAGE).saturating_add(fill.there().pages));
        let resolution = self.settled(address, fill.progress, fill.filled);
        if resolution == fill.filled && !self.backend.sees_template() {
            for mut rest in
                [Run::between(fill.run.end(), along.end()), Run::between(along.start, page)]
            {
                while let Some(missing) = self.missing(rest) {
                    let fill = self.put(address_of(missing.start), missing);
                    let tried = fill.map_or(missing.start + 1, |fill| fill.run.end());
                    rest = Run::between(tried, rest.end());
                }
            }
        }
        Some(resolution)
    }

    /// The first pages of `run` that the target has not got, in one piece.
    pub(super) fn missing(&self, run: Run) -> Option<Run> {
        (run.pages > 0).then(|| self.locality().missing(run))?
    }

    /// Puts zeros at `bytes` bytes from `address`.
    pub(super) fn zero(&self, address: u64, bytes: u64) -> Resolution {
        let zero = |bytes| backend::zero(&self.uffd, address, bytes, self.page_size);
        let mut progress = zero(bytes.max(self.page_size));
        if progress.errno == Some(Errno::NOENT) && bytes > self.page_size {
            progress = zero(self.page_size);
        }
        if self.page_size != PAGE {
            progress = self.true_of_huge(address, progress);
        }
        self.locality().came_to((address + progress.done as u64) / PAGE);
        self.settled(address, progress, Resolution::Zeroed)
    }

    /// What a fill's progress means for the page that somebody waits for.
    pub(super) fn settled(
        &self,
        address: u64,
        progress: Progress,
        filled: Resolution,
    ) -> Resolution {
        backend::settle(&self.uffd, address, self.page_size, progress, filled)
    }
}

impl Fill {
    /// The pages that the target certainly has now.
    fn there(&self) -> Run {
        let found = u64::from(self.progress.errno == Some(Errno::EXIST));
        Run { start: self.run.start, pages: self.progress.done as u64 / PAGE + found }
    }
}
