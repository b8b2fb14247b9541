//! `zero:SIZE`: nothing but zeros. The do-nothing example of a source.

use super::{Capabilities, Content, Identity, Source};
use crate::error::Result;
use crate::page::{Run, PAGE};

/// Zeros, `size` bytes of them.
#[derive(Debug)]
pub struct Zero {
    size: u64,
}

impl Zero {
    /// A source of `size` bytes, a multiple of the page size ([`crate::stack`] checks it).
    pub fn new(size: u64) -> Zero {
        Zero { size }
    }
}

impl Source for Zero {
    fn name(&self) -> String {
        format!("zero:{}", self.size)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { size: self.size, concurrency: usize::MAX, immediate: true }
    }

    fn identity(&self) -> Result<Identity> {
        Ok(Identity(blake3::hash(self.name().as_bytes()).into()))
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        Ok(vec![Run::between(0, self.size / PAGE)])
    }

    fn read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<Content> {
        Ok(Content::Zero)
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<Content>> {
        self.read(offset, buffer).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn conforms() {
        let size = 64 * 4096;
        crate::source::conformance::check(&super::Zero::new(size), &vec![0; size as usize]);
    }
}
