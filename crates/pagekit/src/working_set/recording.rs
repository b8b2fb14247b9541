//! Recording: which pages were demanded, in which order, and until when that mattered.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::WorkingSet;
use crate::page_set::PageSet;
use crate::source::Identity;

/// When the critical part of a recording ends, if nobody said "ready" meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// At its end.
    TheEnd,
    /// When nothing new was demanded for so long.
    Settled(Duration),
    /// So long after the first demand.
    Time(Duration),
}

/// Takes down demands. Shared by threads.
#[derive(Debug)]
pub struct Recorder {
    identity: Identity,
    template_pages: u64,
    seen: PageSet,
    demands: Mutex<Vec<(u64, Instant)>>,
    ready: OnceLock<Instant>,
}

impl Recorder {
    pub(crate) fn new(identity: Identity, template_pages: u64) -> Recorder {
        Recorder {
            identity,
            template_pages,
            seen: PageSet::new(template_pages),
            demands: Mutex::default(),
            ready: OnceLock::new(),
        }
    }

    /// Only the first demand of a page counts.
    pub(crate) fn demanded(&self, page: u64) {
        if page < self.template_pages && self.seen.put(page) {
            let mut demands = self.demands.lock().unwrap_or_else(PoisonError::into_inner);
            demands.push((page, Instant::now()));
        }
    }

    /// The sandbox is ready: what is demanded from now on is not critical. Only the first time counts.
    pub fn ready(&self) {
        let _ = self.ready.set(Instant::now());
    }

    /// The set of what was demanded so far; recording goes on.
    pub fn working_set(&self, until: Until) -> WorkingSet {
        let demands = self.demands.lock().unwrap_or_else(PoisonError::into_inner);
        let critical = match (self.ready.get(), until) {
            (Some(ready), _) => demands.partition_point(|(_, at)| at <= ready),
            (None, Until::TheEnd) => demands.len(),
            (None, Until::Time(time)) => match demands.first() {
                Some((_, first)) => demands.partition_point(|(_, at)| *at - *first <= time),
                None => 0,
            },
            (None, Until::Settled(time)) => {
                let pauses = demands.windows(2).position(|pair| pair[1].1 - pair[0].1 >= time);
                pauses.map_or(demands.len(), |last| last + 1)
            }
        };
        let pages: Vec<u64> = demands.iter().map(|(page, _)| *page).collect();
        let (critical, rest) = pages.split_at(critical);
        WorkingSet::of_demands(self.identity, self.template_pages, critical, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorder(moments: &[(u64, u64)]) -> Recorder {
        let recorder = Recorder::new(Identity([1; 32]), 100);
        let began = Instant::now();
        let moments = moments.iter().map(|(page, ms)| (*page, began + Duration::from_millis(*ms)));
        recorder.demands.lock().unwrap().extend(moments);
        recorder
    }

    fn critical(recorder: &Recorder, until: Until) -> u64 {
        recorder.working_set(until).critical_pages()
    }

    #[test]
    fn ready_is_the_end_a_pause_or_a_time() {
        let recorder = recorder(&[(1, 0), (2, 10), (3, 30), (4, 900), (5, 1000)]);
        assert_eq!(critical(&recorder, Until::TheEnd), 5);
        assert_eq!(critical(&recorder, Until::Settled(Duration::from_millis(500))), 3);
        assert_eq!(critical(&recorder, Until::Settled(Duration::from_secs(5))), 5);
        assert_eq!(critical(&recorder, Until::Time(Duration::from_millis(10))), 2);
        assert_eq!(recorder.working_set(Until::Time(Duration::ZERO)).pages(), 5);
    }

    #[test]
    fn saying_so_decides() {
        let recorder = Recorder::new(Identity([1; 32]), 100);
        for page in [7, 3, 7] {
            recorder.demanded(page);
        }
        recorder.ready();
        recorder.demanded(9);
        recorder.ready();
        recorder.demanded(3);
        recorder.demanded(100);
        let set = recorder.working_set(Until::TheEnd);
        assert_eq!((set.critical_pages(), set.pages()), (2, 3));
        let empty = Recorder::new(Identity([1; 32]), 100);
        assert_eq!(empty.working_set(Until::Time(Duration::ZERO)).pages(), 0);
    }
}
