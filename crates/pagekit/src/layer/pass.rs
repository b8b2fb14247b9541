//! `pass`: forwards everything. The do-nothing example of a layer.

use super::Next;
use crate::error::Result;
use crate::page::Run;
use crate::source::{Capabilities, Content, Identity, Source};

/// Forwards everything to `next`.
#[derive(Debug)]
pub struct Pass {
    next: Next,
}

impl Pass {
    /// Wraps `next`.
    pub fn new(next: Next) -> Pass {
        Pass { next }
    }
}

impl Source for Pass {
    fn name(&self) -> String {
        "pass".to_owned()
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
        self.next.read(offset, buffer)
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<Content>> {
        self.next.try_read(offset, buffer)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        self.next.statistics()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::source::conformance;
    use crate::source::zero::Zero;

    #[test]
    fn conforms() {
        let layer = super::Pass::new(Arc::new(Zero::new(32 * 4096)));
        conformance::check(&layer, &vec![0; 32 * 4096]);
    }
}
