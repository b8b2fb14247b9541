//! `delay=TIME[,RATE][,N]`: a model of a store far away, so that a local file behaves like one and
//! comparisons are fair and repeatable.
//!
//! Each read is a *request*. It waits for a free place among `N` requests in flight, then `TIME` for
//! its first byte, then for its bytes on a line that carries `RATE` bytes a second and that all
//! requests share. What the read takes in truth counts as part of that time. Without `RATE` bytes
//! cost nothing, without `N` any number is in flight.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Next;
use crate::error::Result;
use crate::page::Run;
use crate::source::{Capabilities, Content, Identity, Source};

/// What the store is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// From a request to its first byte.
    pub latency: Duration,
    /// Bytes a second, for all requests together.
    pub rate: Option<u64>,
    /// Requests in flight at once.
    pub in_flight: Option<usize>,
}

/// Makes reads take as long as they do from a [`Model`] of a store.
#[derive(Debug)]
pub struct Delay {
    next: Next,
    model: Model,
    state: Mutex<State>,
    place_free: Condvar,
    requests: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct State {
    in_flight: usize,
    /// When the line has carried all that was given to it.
    line_free: Instant,
}

/// A place among the requests in flight.
struct Place<'a>(&'a Delay);

impl Delay {
    /// Wraps `next`.
    pub fn new(next: Next, model: Model) -> Delay {
        Delay {
            next,
            model,
            state: Mutex::new(State { in_flight: 0, line_free: Instant::now() }),
            place_free: Condvar::new(),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_place(&self) -> Place<'_> {
        let most = self.model.in_flight.unwrap_or(usize::MAX);
        let mut state = self
            .place_free
            .wait_while(self.lock(), |state| state.in_flight >= most)
            .unwrap_or_else(PoisonError::into_inner);
        state.in_flight += 1;
        Place(self)
    }

    /// When the last of `bytes` is here that were asked for at `asked`.
    fn arrival(&self, asked: Instant, bytes: u64) -> Instant {
        let first = asked + self.model.latency;
        let Some(rate) = self.model.rate else { return first };
        let mut state = self.lock();
        let takes =
            Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64);
        state.line_free = state.line_free.max(first) + takes;
        state.line_free
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.lock().in_flight -= 1;
        self.0.place_free.notify_one();
    }
}

impl Source for Delay {
    fn name(&self) -> String {
        let mut name = format!("delay={}us", self.model.latency.as_micros());
        if let Some(rate) = self.model.rate {
            name += &format!(",{rate}B/s");
        }
        if let Some(most) = self.model.in_flight {
            name += &format!(",{most}");
        }
        name
    }

    fn capabilities(&self) -> Capabilities {
        let below = self.next.capabilities();
        // A file allows few reads at once because more would not be faster; a store far away is.
        let concurrency = self.model.in_flight.unwrap_or(below.concurrency);
        Capabilities { immediate: false, concurrency, ..below }
    }

    fn identity(&self) -> Result<Identity> {
        self.next.identity()
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        self.next.zero_runs()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content> {
        let _place = self.take_place();
        let asked = Instant::now();
        self.requests.fetch_add(1, Relaxed);
        let content = self.next.read(offset, buffer)?;
        let bytes = match content {
            Content::Bytes => buffer.len() as u64,
            Content::Zero => 0,
        };
        self.bytes.fetch_add(bytes, Relaxed);
        let arrival = self.arrival(asked, bytes);
        std::thread::sleep(arrival.saturating_duration_since(Instant::now()));
        Ok(content)
    }

    fn try_read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<Option<Content>> {
        Ok(None)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let mut all = vec![
            ("delay.requests".to_owned(), self.requests.load(Relaxed)),
            ("delay.bytes".to_owned(), self.bytes.load(Relaxed)),
        ];
        all.extend(self.next.statistics());
        all
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::source::conformance::{self, pattern};
    use crate::source::file::File;
    use crate::source::zero::Zero;

    const MS: Duration = Duration::from_millis(1);

    /// 16 pages that are no zeros, `latency` away.
    fn store(latency: Duration, rate: Option<u64>, in_flight: Option<usize>) -> Delay {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pattern(16)).unwrap();
        let source = Arc::new(File::open(file.path()).unwrap());
        Delay::new(source, Model { latency, rate, in_flight })
    }

    /// How long `readers` take that read four pages each at once.
    fn time(store: &Delay, readers: usize) -> Duration {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..readers {
                scope.spawn(|| store.read(0, &mut [0; 4 * 4096]).unwrap());
            }
        });
        began.elapsed()
    }

    #[test]
    fn conforms_and_waits() {
        let store = store(MS, Some(1_000_000_000), Some(2));
        conformance::check(&store, &pattern(16));
        assert!(time(&store, 1) >= MS);
        assert_eq!(store.try_read(0, &mut [0; 4096]).unwrap(), None, "it never answers at once");
        assert_eq!(store.name(), "delay=1000us,1000000000B/s,2");
        assert_eq!((store.capabilities().concurrency, store.capabilities().immediate), (2, false));
    }

    #[test]
    fn requests_share_places_and_the_line() {
        // Six requests in three places: two turns.
        assert!(time(&store(20 * MS, None, Some(3)), 6) >= 40 * MS);
        // Four times 16 KiB on a line of 1 MiB/s.
        assert!(time(&store(Duration::ZERO, Some(1 << 20), None), 4) >= 62 * MS);
    }

    #[test]
    fn zeros_take_no_time_on_the_line() {
        let model = Model { latency: Duration::ZERO, rate: Some(1), in_flight: None };
        let store = Delay::new(Arc::new(Zero::new(16 * 4096)), model);
        store.read(0, &mut [0; 4096]).unwrap();
        let counted: Vec<u64> = store.statistics().into_iter().map(|(_, value)| value).collect();
        assert_eq!(counted, [1, 0]);
    }
}
