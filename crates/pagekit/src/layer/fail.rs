//! `fail=N`: the first N reads fail, as a place does that is out of reach for a while.
//! `fail=always`: every read fails. `fail=page:P`: every read that covers page P fails for good.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::Next;
use crate::error::{Error, Result};
use crate::page::{Run, PAGE};
use crate::source::{Capabilities, Content, Identity, Source};

/// Which reads fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The first so many; another try may succeed.
    First(u64),
    /// All of them; another try is made in vain.
    Always,
    /// Those that cover this page; it is said that no other try can succeed.
    Page(u64),
}

/// Makes reads fail on purpose.
#[derive(Debug)]
pub struct Fail {
    next: Next,
    rule: Rule,
    reads: AtomicU64,
    failed: AtomicU64,
}

impl Fail {
    /// Wraps `next`.
    pub fn new(next: Next, rule: Rule) -> Fail {
        Fail { next, rule, reads: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }
}

impl Source for Fail {
    fn name(&self) -> String {
        match self.rule {
            Rule::First(reads) => format!("fail={reads}"),
            Rule::Always => "fail=always".to_owned(),
            Rule::Page(page) => format!("fail=page:{page}"),
        }
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
        let read = self.reads.fetch_add(1, Relaxed);
        let run = Run { start: offset / PAGE, pages: buffer.len() as u64 / PAGE };
        let fails = match self.rule {
            Rule::First(reads) => read < reads,
            Rule::Always => true,
            Rule::Page(page) => run.contains(page),
        };
        if !fails {
            return self.next.read(offset, buffer);
        }
        self.failed.fetch_add(1, Relaxed);
        let what = format!(
            "layer {} failed the read of {} pages at {}",
            self.name(),
            run.pages,
            run.start
        );
        match self.rule {
            Rule::Page(_) => Err(Error::Integrity { message: what }),
            _ => Err(Error::Unavailable { what, error: io::ErrorKind::TimedOut.into() }),
        }
    }

    fn try_read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<Option<Content>> {
        Ok(None)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let mut all = vec![("fail.failed".to_owned(), self.failed.load(Relaxed))];
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

    fn layer(rule: Rule) -> Fail {
        Fail::new(Arc::new(Zero::new(16 * 4096)), rule)
    }

    #[test]
    fn conforms_when_nothing_fails() {
        conformance::check(&layer(Rule::First(0)), &vec![0; 16 * 4096]);
    }

    #[test]
    fn fails_as_told() {
        let mut page = [0; 4096];
        let first = layer(Rule::First(2));
        let outcomes: Vec<bool> = (0..4).map(|_| first.read(0, &mut page).is_ok()).collect();
        assert_eq!(outcomes, [false, false, true, true]);
        assert!(layer(Rule::Always).read(0, &mut page).unwrap_err().retryable());
        let third = layer(Rule::Page(3));
        assert!(third.read(2 * 4096, &mut page).is_ok());
        assert!(!third.read(3 * 4096, &mut page).unwrap_err().retryable());
        assert_eq!(third.statistics(), [("fail.failed".to_owned(), 1)]);
    }
}
