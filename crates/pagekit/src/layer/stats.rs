//! `stats`: counts what passes through it, wherever in a stack it is put.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::Next;
use crate::error::Result;
use crate::page::Run;
use crate::source::{Capabilities, Content, Identity, Source};

/// Counts reads, bytes, errors and the time spent below.
#[derive(Debug)]
pub struct Stats {
    next: Next,
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Stats {
    /// Wraps `next`.
    pub fn new(next: Next) -> Stats {
        Stats {
            next,
            reads: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
        }
    }

    fn count<T>(
        &self,
        bytes: usize,
        read: impl FnOnce() -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let began = Instant::now();
        let outcome = read();
        match &outcome {
            Ok(None) => return outcome,
            Ok(Some(_)) => self.bytes.fetch_add(bytes as u64, Relaxed),
            Err(_) => self.errors.fetch_add(1, Relaxed),
        };
        self.reads.fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(began.elapsed().as_nanos() as u64, Relaxed);
        outcome
    }
}

impl Source for Stats {
    fn name(&self) -> String {
        "stats".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        self.next.capabilities()
    }

    fn identity(&self) -> Result<Identity> {
        self.next.identity()
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        self.next.zero_runs()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content> {
        let bytes = buffer.len();
        let content = self.count(bytes, || self.next.read(offset, buffer).map(Some))?;
        Ok(content.expect("an ordinary read always brings content"))
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<Content>> {
        self.count(buffer.len(), || self.next.try_read(offset, buffer))
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let mut all = vec![
            ("stats.reads".to_owned(), self.reads.load(Relaxed)),
            ("stats.bytes".to_owned(), self.bytes.load(Relaxed)),
            ("stats.errors".to_owned(), self.errors.load(Relaxed)),
            ("stats.nanoseconds".to_owned(), self.nanoseconds.load(Relaxed)),
        ];
        all.extend(self.next.statistics());
        all
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::source::conformance;
    use crate::source::zero::Zero;

    #[test]
    fn conforms_and_counts() {
        let layer = Stats::new(Arc::new(Zero::new(32 * 4096)));
        conformance::check(&layer, &vec![0; 32 * 4096]);
        let before: Vec<_> = layer.statistics();
        layer.read(0, &mut [0; 8192]).unwrap();
        let after = layer.statistics();
        assert_eq!(after[0].1, before[0].1 + 1);
        assert_eq!(after[1].1, before[1].1 + 8192);
        assert_eq!(after[2].1, 0);
    }
}
