//! `delay=TIME`: waits before each read, so that a local file behaves like a place far away.

use std::time::Duration;

use super::Next;
use crate::error::Result;
use crate::page::Run;
use crate::source::{Capabilities, Content, Identity, Source};

/// Waits before each read. Reads that wait do so side by side.
#[derive(Debug)]
pub struct Delay {
    next: Next,
    time: Duration,
}

impl Delay {
    /// Wraps `next`.
    pub fn new(next: Next, time: Duration) -> Delay {
        Delay { next, time }
    }
}

impl Source for Delay {
    fn name(&self) -> String {
        format!("delay={}us", self.time.as_micros())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { immediate: false, ..self.next.capabilities() }
    }

    fn identity(&self) -> Result<Identity> {
        self.next.identity()
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        self.next.zero_runs()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content> {
        std::thread::sleep(self.time);
        self.next.read(offset, buffer)
    }

    fn try_read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<Option<Content>> {
        Ok(None)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        self.next.statistics()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;
    use crate::source::conformance;
    use crate::source::zero::Zero;

    #[test]
    fn conforms_and_waits() {
        let time = Duration::from_millis(1);
        let layer = Delay::new(Arc::new(Zero::new(16 * 4096)), time);
        conformance::check(&layer, &vec![0; 16 * 4096]);
        let began = Instant::now();
        layer.read(0, &mut [0; 4096]).unwrap();
        assert!(began.elapsed() >= time);
        assert_eq!(layer.try_read(0, &mut [0; 4096]).unwrap(), None, "it never answers at once");
    }
}
