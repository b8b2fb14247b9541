//! Outcomes: how faults end, counted with their latency.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, Serializer};

/// How a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The page was copied into the target.
    Copied,
    /// The page is in the shared file; the target maps it itself.
    Shared,
    /// The zero page was mapped.
    Zeroed,
    /// Somebody else had brought the page; the waiters were woken.
    Woken,
    /// A second handler resolved it, or said what belongs there.
    Relayed,
    /// The page cannot be had; touching it raises SIGBUS.
    Poisoned,
    /// The page cannot be had; the target was killed.
    Killed,
    /// Nothing of ours belongs there any more, or the target is gone.
    Abandoned,
}

impl Outcome {
    const ALL: [Outcome; 8] = [
        Outcome::Copied,
        Outcome::Shared,
        Outcome::Zeroed,
        Outcome::Woken,
        Outcome::Relayed,
        Outcome::Poisoned,
        Outcome::Killed,
        Outcome::Abandoned,
    ];

    /// Its one name.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Copied => "copied",
            Outcome::Shared => "shared",
            Outcome::Zeroed => "zeroed",
            Outcome::Woken => "woken",
            Outcome::Relayed => "relayed",
            Outcome::Poisoned => "poisoned",
            Outcome::Killed => "killed",
            Outcome::Abandoned => "abandoned",
        }
    }
}

/// Buckets of a histogram: four to each doubling, from 1 ns to beyond an hour.
const BUCKETS: usize = 4 * 43;

/// A latency histogram. Within a bucket's width (a quarter of its value) exact.
#[derive(Debug)]
pub struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Histogram(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Histogram {
    /// Counts one.
    pub fn count(&self, time: Duration) {
        self.0[bucket(time.as_nanos() as u64)].fetch_add(1, Relaxed);
    }

    /// How many were counted.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// Whether none was counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The time in microseconds that `share` (0 to 1) of all stayed below; 0 if there are none.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let counts: Vec<u64> = self.0.iter().map(|count| count.load(Relaxed)).collect();
        let wanted = (counts.iter().sum::<u64>() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (at, count) in counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= wanted {
                return upper_edge(at) as f64 / 1e3;
            }
        }
        0.0
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let value = nanoseconds.max(4);
    let log = 63 - value.leading_zeros();
    let quarter = (value >> (log - 2)) & 3;
    ((log as usize - 2) * 4 + quarter as usize).min(BUCKETS - 1)
}

fn upper_edge(bucket: usize) -> u64 {
    let log = bucket / 4 + 2;
    (5 + bucket as u64 % 4) << (log - 2)
}

/// All outcomes of a server, with their latency from the moment the fault was read.
#[derive(Debug, Default)]
pub struct Outcomes([Histogram; Outcome::ALL.len()]);

impl Outcomes {
    /// Counts one.
    pub fn count(&self, outcome: Outcome, time: Duration) {
        self.0[outcome as usize].count(time);
    }

    /// How often it happened.
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.0[outcome as usize].len()
    }

    /// All together.
    pub fn len(&self) -> u64 {
        self.0.iter().map(Histogram::len).sum()
    }

    /// Whether no fault has ended yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Serialize for Outcomes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(serde::Serialize)]
        struct Row {
            count: u64,
            p50_us: f64,
            p99_us: f64,
        }
        let mut map = serializer.serialize_map(None)?;
        for outcome in Outcome::ALL {
            let histogram = &self.0[outcome as usize];
            if !histogram.is_empty() {
                let row = Row {
                    count: histogram.len(),
                    p50_us: histogram.quantile_us(0.5),
                    p99_us: histogram.quantile_us(0.99),
                };
                map.serialize_entry(outcome.name(), &row)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_a_quarter_wide_and_in_order() {
        let mut last = 0;
        for value in [1, 4, 5, 7, 8, 100, 1_000, 6_400, 51_000, 1_000_000, u64::MAX] {
            let at = bucket(value);
            assert!(at >= last && at < BUCKETS);
            last = at;
            if (4..1 << 40).contains(&value) {
                assert!(
                    upper_edge(at) > value && upper_edge(at) <= value + value / 4 + 1,
                    "{value}"
                );
            }
        }
    }

    #[test]
    fn quantiles() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile_us(0.5), 0.0);
        for _ in 0..99 {
            histogram.count(Duration::from_micros(10));
        }
        histogram.count(Duration::from_millis(5));
        assert_eq!(histogram.len(), 100);
        assert!((10.0..12.6).contains(&histogram.quantile_us(0.5)));
        assert!((10.0..12.6).contains(&histogram.quantile_us(0.99)));
        assert!((5000.0..6300.0).contains(&histogram.quantile_us(1.0)));
    }
}
