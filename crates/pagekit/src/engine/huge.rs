//! Huge pages: targets on hugetlbfs.
//!
//! Some facts, and what follows:
//! - A huge page is filled whole, from one piece of memory, or not at all (EINVAL). So all pages of the
//!   template that belong into it are brought first, and the thread that touched it waits for the last.
//! - Holes of the template's file where its content is zero cannot be copied from. Such a huge page is
//!   put together in a buffer; one without holes is copied from the file as it lies there.
//! - There is no zero page of this size: zeros are copied.
//! - Whoever fills one takes it from the pool that the target reserved when it mapped its memory. If it
//!   reserved nothing and the pool is empty, the kernel answers EEXIST, as if the page were there. (The
//!   place for it in the page table is.) Who took that for true would wake a thread that faults again at
//!   once, for ever. So it is kept which pages were filled, and EEXIST of any other means no room.

use std::sync::{Arc, RwLockReadGuard};

use uffd::{Errno, Progress};

use super::fill::Fill;
use super::region::RegionMap;
use super::target::{Fault, Target};
use super::Shared;
use crate::error::Error;
use crate::page::{find, Run, PAGE};
use crate::template::with_buffer;

impl Target {
    /// Serves a fault of a huge page into which the template's pages from `page` on belong. `bytes` of
    /// them lie side by side.
    pub(super) fn serve_huge(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        mut fault: Fault,
        regions: RwLockReadGuard<'_, RegionMap>,
        page: u64,
        bytes: u64,
    ) {
        let run = Run { start: page, pages: self.page_size / PAGE };
        if bytes < self.page_size {
            drop(regions);
            let message = "only a part of a huge page belongs to its region".to_owned();
            return self.give_up(shared, fault, Arc::new(Error::Integrity { message }));
        }
        if fault.is_new() {
            // All of them: without any of them it cannot be filled.
            (run.start..run.end()).for_each(|page| self.template.demanded(page));
        }
        if let Some(fill) = self.fill_huge(fault.address, run) {
            drop(regions);
            let resolution = self.settled(fault.address, fill.progress, fill.filled);
            return self.settle(shared, fault, resolution);
        }
        // The waiter may be called at once, and serves: not under the lock.
        drop(regions);
        for fetch in self.template.want_all(run, self.waiter(shared, &fault)) {
            if let Some(fetch) = fetch.now() {
                shared.workers.submit(fetch);
            }
        }
    }

    /// Fills one huge page at `address` with `run`, if all of that can be had at once.
    pub(super) fn fill_huge(&self, address: u64, run: Run) -> Option<Fill> {
        let fill = self.fill_huge_at_once(address, run)?;
        Some(Fill { progress: self.true_of_huge(address, fill.progress), ..fill })
    }

    /// What the kernel's answer to filling the huge page at `address` means.
    pub(super) fn true_of_huge(&self, address: u64, progress: Progress) -> Progress {
        let mut filled = self.filled_huge();
        match progress.errno {
            Some(Errno::EXIST) if progress.done == 0 && !filled.contains(&address) => {
                Progress { errno: Some(Errno::NOMEM), ..progress }
            }
            _ => {
                let end = address + progress.done as u64;
                filled.extend((address..end).step_by(self.page_size as usize));
                progress
            }
        }
    }

    /// The target gave these addresses back.
    pub(super) fn huge_given_back(&self, start: u64, end: u64) {
        self.filled_huge().retain(|address| !(start..end).contains(address));
    }

    /// The target moved these addresses.
    pub(super) fn huge_moved(&self, from: u64, to: u64, len: u64) {
        let mut filled = self.filled_huge();
        let moved = |address: &u64| (from..from.saturating_add(len)).contains(address);
        let there: Vec<u64> =
            filled.iter().filter(|at| moved(at)).map(|at| at - from + to).collect();
        filled.retain(|address| !moved(address));
        filled.extend(there);
    }

    fn fill_huge_at_once(&self, address: u64, run: Run) -> Option<Fill> {
        let template = &self.template;
        let zero =
            find(template.zero_runs(), run.start).is_some_and(|zero| zero.end() >= run.end());
        if zero || template.present_from(run) == run {
            return self.put(address, run);
        }
        if !self.is_here(run) {
            return None;
        }
        with_buffer(run.bytes() as usize, |buffer| {
            // Reads what is here, and so waits for nobody. Fails if the template is damaged.
            template.read(run.offset(), buffer).ok()?;
            let progress = self.uffd.copy(address, buffer);
            Some(Fill { run, progress, filled: self.backend.filled() })
        })
    }

    /// Whether every page of `run` is in the template's file or zero by the map.
    fn is_here(&self, run: Run) -> bool {
        let mut page = run.start;
        while page < run.end() {
            let present = self.template.present_from(Run::between(page, run.end()));
            page = match (present.pages, find(self.template.zero_runs(), page)) {
                (0, None) => return false,
                (0, Some(zero)) => zero.end(),
                _ => present.end(),
            };
        }
        true
    }
}
