//! Working sets: the pages that forks demand before they are *ready*, so that the next fork finds
//! them fetched before it asks.
//!
//! What others measured, and what follows:
//! - Sets repeat from run to run (97 %), orders do not: a page demanded next is its neighbour in one
//!   case of ten. So a set keeps a coarse order only, in *phases*: the first phase holds the pages
//!   demanded first. Within a phase, pages stand in rising order and are fetched in long runs.
//! - A single recording misses what the next request needs: sets of several recordings are united.
//! - Only what was *demanded* belongs in. What came along with another page, or was fetched ahead,
//!   was perhaps never looked at.
//!
//! | file | what |
//! |---|---|
//! | [`recording`] | demands, as they come, and the moment "ready" |
//! | [`format`](mod@format) | the file: bytes ↔ values |

pub mod format;
mod recording;

pub use recording::{Recorder, Until};

use crate::error::{Error, Result};
use crate::page::{coalesce, Run};
use crate::source::Identity;

/// Pages in the first phase; each later one has twice as many as the one before, up to
/// [`LONGEST_PHASE`]. The order matters most at the beginning, where the fork waits for each page.
const FIRST_PHASE: usize = 128;
const LONGEST_PHASE: usize = 4096;
/// Most phases that are kept apart; later pages join the last one.
const MOST_PHASES: usize = 256;

/// Pages in coarse order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    /// What the template was.
    identity: Identity,
    /// Pages of the template.
    template_pages: u64,
    /// Recordings that are united here.
    recordings: u32,
    /// Demanded before "ready"; the first phase was demanded first.
    critical: Vec<Vec<Run>>,
    /// Demanded later.
    rest: Vec<Vec<Run>>,
}

impl WorkingSet {
    /// Makes a set of pages in the order in which they were demanded, each once.
    fn of_demands(
        identity: Identity,
        template_pages: u64,
        critical: &[u64],
        rest: &[u64],
    ) -> WorkingSet {
        WorkingSet {
            identity,
            template_pages,
            recordings: 1,
            critical: phases(critical),
            rest: phases(rest),
        }
    }

    /// What the template was that it was recorded of.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// How many recordings are united here.
    pub fn recordings(&self) -> u32 {
        self.recordings
    }

    /// Phases demanded before "ready", the earliest first; in each, runs in rising order.
    pub fn critical(&self) -> &[Vec<Run>] {
        &self.critical
    }

    /// Phases demanded later.
    pub fn rest(&self) -> &[Vec<Run>] {
        &self.rest
    }

    /// Pages demanded before "ready".
    pub fn critical_pages(&self) -> u64 {
        count(&self.critical)
    }

    /// All pages.
    pub fn pages(&self) -> u64 {
        count(&self.critical) + count(&self.rest)
    }

    /// # Errors
    /// `Integrity` if it was recorded of another template than this one.
    pub fn check(&self, identity: Identity, template_pages: u64) -> Result<()> {
        if self.template_pages != template_pages {
            return Err(Error::Integrity {
                message: format!(
                    "the working set is of a template of {} pages, and this one has {template_pages}; \
                     record it anew",
                    self.template_pages
                ),
            });
        }
        if self.identity != identity {
            return Err(Error::Integrity {
                message: format!(
                    "the working set is of another template ({}; this one is {identity}); record it \
                     anew",
                    self.identity
                ),
            });
        }
        Ok(())
    }

    /// Both sets in one. A page is as early as in the one that has it earlier, and critical if it is
    /// in either.
    ///
    /// # Errors
    /// `Integrity` if they are of different templates.
    pub fn union(&self, other: &WorkingSet) -> Result<WorkingSet> {
        self.check(other.identity, other.template_pages)?;
        // Phase by page: critical ones first, so that the smaller number wins.
        let mut earliest = std::collections::BTreeMap::new();
        for set in [self, other] {
            let late = set.rest.iter().enumerate().map(|(at, runs)| (MOST_PHASES + at, runs));
            for (phase, runs) in set.critical.iter().enumerate().chain(late) {
                for page in runs.iter().flat_map(|run| run.start..run.end()) {
                    let known = earliest.entry(page).or_insert(phase);
                    *known = phase.min(*known);
                }
            }
        }
        let mut pages = vec![Vec::new(); 2 * MOST_PHASES];
        for (page, phase) in earliest {
            pages[phase].push(page);
        }
        let runs = |pages: &[Vec<u64>]| {
            let runs = pages.iter().map(|pages| coalesce(pages.iter().copied()));
            runs.filter(|runs| !runs.is_empty()).collect()
        };
        Ok(WorkingSet {
            identity: self.identity,
            template_pages: self.template_pages,
            recordings: self.recordings.saturating_add(other.recordings),
            critical: runs(&pages[..MOST_PHASES]),
            rest: runs(&pages[MOST_PHASES..]),
        })
    }
}

fn phases(demanded: &[u64]) -> Vec<Vec<Run>> {
    let (mut phases, mut rest, mut length) = (Vec::new(), demanded, FIRST_PHASE);
    while !rest.is_empty() {
        let last = phases.len() + 1 == MOST_PHASES;
        let (phase, later) = rest.split_at(if last { rest.len() } else { length.min(rest.len()) });
        let mut pages = phase.to_vec();
        pages.sort_unstable();
        phases.push(coalesce(pages));
        rest = later;
        length = (length * 2).min(LONGEST_PHASE);
    }
    phases
}

fn count(phases: &[Vec<Run>]) -> u64 {
    phases.iter().flatten().map(|run| run.pages).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const WHO: Identity = Identity([7; 32]);

    #[test]
    fn phases_keep_the_order_coarsely() {
        let demanded: Vec<u64> = (0..1000).rev().collect();
        let set = WorkingSet::of_demands(WHO, 2000, &demanded, &[1500]);
        assert_eq!(set.critical()[0], [Run::between(872, 1000)]);
        assert_eq!(set.critical()[1], [Run::between(616, 872)]);
        assert_eq!((set.critical_pages(), set.pages()), (1000, 1001));
        let many: Vec<u64> = (0..2_000_000).collect();
        let set = WorkingSet::of_demands(WHO, 2_000_000, &many, &[]);
        assert_eq!((set.critical().len(), set.pages()), (MOST_PHASES, 2_000_000));
    }

    #[test]
    fn a_union_has_the_earlier_phase_and_the_more_critical_class() {
        let one = WorkingSet::of_demands(WHO, 2000, &(0..300).collect::<Vec<_>>(), &[900, 901]);
        let other = WorkingSet::of_demands(WHO, 2000, &[299, 901, 1000], &[5, 1200]);
        let both = one.union(&other).unwrap();
        assert_eq!(
            both.critical()[0],
            [
                Run::between(0, 128),
                Run::between(299, 300),
                Run::between(901, 902),
                Run::between(1000, 1001)
            ]
        );
        assert_eq!(both.critical()[1], [Run::between(128, 299)]);
        assert_eq!(both.rest(), [vec![Run::between(900, 901), Run::between(1200, 1201)]]);
        assert_eq!((both.recordings(), both.pages()), (2, 304));
        assert_eq!(both, other.union(&one).unwrap());
        assert_eq!(one.union(&one).unwrap().critical(), one.critical());
    }

    #[test]
    fn sets_of_different_templates_are_kept_apart() {
        let set = WorkingSet::of_demands(WHO, 2000, &[1], &[]);
        for other in [
            WorkingSet::of_demands(Identity([8; 32]), 2000, &[1], &[]),
            WorkingSet::of_demands(WHO, 2001, &[1], &[]),
        ] {
            assert!(matches!(set.union(&other), Err(Error::Integrity { .. })));
            assert!(set.check(other.identity(), other.template_pages).is_err());
        }
    }

    /// Pages in the order of their demand, each once.
    fn demands() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(0..3000u64, 0..700).prop_map(|mut pages| {
            let mut seen = std::collections::HashSet::new();
            pages.retain(|page| seen.insert(*page));
            pages
        })
    }

    /// A set as a recording makes it: the first part of the demands is critical.
    fn sets() -> impl Strategy<Value = WorkingSet> {
        (demands(), any::<prop::sample::Index>()).prop_map(|(demands, ready)| {
            let (critical, rest) = demands.split_at(ready.index(demands.len() + 1));
            WorkingSet::of_demands(WHO, 3000, critical, rest)
        })
    }

    fn pages(phases: &[Vec<Run>]) -> BTreeSet<u64> {
        phases.iter().flatten().flat_map(|run| run.start..run.end()).collect()
    }

    proptest! {
        #[test]
        fn every_set_has_one_file(set in sets()) {
            prop_assert_eq!(WorkingSet::decode(&set.encode()).unwrap(), set);
        }

        #[test]
        fn a_union_has_every_page_once_and_knows_no_order(one in sets(), other in sets()) {
            let both = one.union(&other).unwrap();
            let critical = &pages(one.critical()) | &pages(other.critical());
            let all = &(&pages(one.rest()) | &pages(other.rest())) | &critical;
            prop_assert_eq!(both.pages(), all.len() as u64);
            prop_assert_eq!(pages(both.critical()), critical);
            prop_assert_eq!(&both, &other.union(&one).unwrap());
            prop_assert_eq!(WorkingSet::decode(&both.encode()).unwrap(), both);
        }

        /// With the right hash, as whoever wants to do harm makes it.
        #[test]
        fn any_bytes_are_refused_or_the_file_of_one_set(
            set in sets(),
            from in any::<prop::sample::Index>(),
            bytes in prop::collection::vec(any::<u8>(), 1..40),
        ) {
            let mut file = set.encode();
            let content = file.len() - 32;
            let at = from.index(content);
            for (place, byte) in file[at..content].iter_mut().zip(bytes) {
                *place = byte;
            }
            let hash = blake3::hash(&file[..content]);
            file[content..].copy_from_slice(hash.as_bytes());
            if let Ok(set) = WorkingSet::decode(&file) {
                prop_assert_eq!(set.encode(), file);
            }
        }
    }
}
