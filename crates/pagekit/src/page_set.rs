//! A set of page numbers that is read without a lock and only ever grows.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::page::Run;

/// Numbers of pages, put in by many threads.
#[derive(Debug)]
pub struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    /// Room for the pages below `pages`.
    pub(crate) fn new(pages: u64) -> PageSet {
        PageSet { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Acquire, so that who sees a page present also sees its content published.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let word = self.words.get((page / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    pub(crate) fn insert(&self, run: Run) {
        for page in run.start..run.end() {
            self.words[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Puts one page in; says whether it was not in before.
    pub(crate) fn put(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        self.words[(page / 64) as usize].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_put_in() {
        let set = PageSet::new(130);
        set.insert(Run::between(60, 70));
        set.insert(Run::between(129, 130));
        assert!(!set.contains(59) && set.contains(60) && set.contains(69) && !set.contains(70));
        assert!(set.contains(129) && !set.contains(1000));
        assert_eq!(set.len(), 11);
        assert!(set.put(7) && !set.put(7) && !set.put(60));
    }
}
