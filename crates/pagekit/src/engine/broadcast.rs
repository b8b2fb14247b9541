//! Broadcast: what one target demanded is put into its siblings, too.
//!
//! Siblings that *wait* for a page need no broadcast: they wait for one fetch, and whoever ends it serves
//! them all, in one pass. This is for those that will want it a little later. `share` has no use for it:
//! there a page in the template's file is in every target.
//!
//! What was measured (`benchmarks/broadcast.py`: twenty targets, the same pages in the same order), and
//! what follows:
//! - Whoever serves the fault puts its pages into the siblings at once, behind the one who waits: then
//!   each page is demanded by one of twenty (51 faults a target instead of 1024), and the server needs a
//!   fifth less of the processor. A thread of its own came too late: the siblings had faulted already,
//!   and three of four faults stayed.
//! - Where the source must be waited for, siblings wait together for the same page, which is one fetch
//!   with or without a broadcast: half of the faults stay, and nobody is ready sooner.
//! - Putting a page costs 1 µs, and those that have faulted meanwhile wait as long. So a pass ends with
//!   [`MOST_PAGES`] pages. Siblings that it did not reach demand the page, and that is the next pass.
//! - A page that is never demanded costs a target its 4 KiB all the same, and that is the price: unless
//!   somebody says that siblings do the same, there is no broadcast.
//! - While demands are recorded nothing comes along with anything, so nothing is broadcast.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use super::target::Target;
use super::{Engine, Shared};
use crate::backend::Resolution;
use crate::error::Error;
use crate::page::{Run, PAGE};

/// Pages put into siblings for one fault: half a millisecond.
const MOST_PAGES: u64 = 512;

/// Which pages that one target demanded are put into its siblings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// None.
    #[default]
    Off,
    /// Those of the working set that is replayed, critical or not.
    WorkingSet,
    /// All.
    All,
}

impl std::str::FromStr for Policy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Policy, Error> {
        match name {
            "off" => Ok(Policy::Off),
            "working-set" => Ok(Policy::WorkingSet),
            "all" => Ok(Policy::All),
            _ => Err(Error::usage(
                format!("{name:?} is no way to broadcast"),
                "give off, working-set or all",
            )),
        }
    }
}

impl Engine {
    /// Puts pages that one target demands into its siblings, as far as `policy` says so; from now on, and
    /// whatever was said before.
    pub fn broadcast(&self, policy: Policy) {
        self.shared.broadcast.store(policy as u8, Relaxed);
    }
}

impl Shared {
    fn policy(&self) -> Policy {
        [Policy::Off, Policy::WorkingSet, Policy::All][usize::from(self.broadcast.load(Relaxed))]
    }
}

impl Target {
    /// A fault of this target was resolved, and these pages were put there with it: its siblings may want
    /// them, too. No region map is held.
    pub(super) fn spread(&self, shared: &Shared, resolution: Resolution, run: Run) {
        let filled = matches!(resolution, Resolution::Copied | Resolution::Zeroed);
        let policy = shared.policy();
        if policy == Policy::Off || !filled || self.template.recording() {
            return;
        }
        let runs = match (policy, self.template.current_replay()) {
            (Policy::All, _) => vec![run],
            (Policy::WorkingSet, Some(replay)) => replay.of_its_set(run),
            _ => return,
        };
        let siblings: Vec<_> = shared.targets().values().cloned().collect();
        let mut left = MOST_PAGES;
        // (A page of 2 MiB costs too much for a guess.)
        for sibling in siblings.iter().filter(|sibling| {
            sibling.id != self.id
                && sibling.can_be_filled()
                && sibling.page_size == PAGE
                && Arc::ptr_eq(&sibling.template, &self.template)
        }) {
            for run in &runs {
                let pages = run.pages.min(left);
                // What is refused now comes by demand.
                let installed = sibling.install_at_once(shared, Run { pages, ..*run });
                shared.spread.fetch_add(installed, Relaxed);
                left -= installed;
                if left == 0 {
                    return;
                }
            }
        }
    }
}
