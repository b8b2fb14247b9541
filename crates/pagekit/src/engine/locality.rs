//! Locality: how many pages are handled together with the one that was demanded.
//!
//! What was measured, and what follows:
//! - A fault costs 8 µs, however little it brings; each page that is copied along costs 1 µs, during
//!   which whoever waits goes on waiting, and in `copy` 4 KiB of private memory.
//! - Guests touch clusters of pages, not single ones; but of sixteen pages brought along blindly, others
//!   saw a guest need one and a half. So the first page demanded of a *block* comes alone. With the
//!   second one comes the rest of the block. At worst that is two faults a block, at best nothing that
//!   is not needed. (To bring the rest after waking who waited for the page saves him nothing: he is
//!   there with the next fault before it is done, or gets the processor only when it is.)
//! - Who reads on where he left off gets more each time, but never more at once than makes him wait for
//!   some 130 µs. A source is asked for more: there a request costs more than its bytes.

use crate::page::Run;

/// Pages of a block.
const BLOCK: u64 = 16;
/// Pages fetched together when accesses are sequential, at most: 1 MiB.
const LONGEST_FETCH: u64 = 256;
/// Pages put into a target together, at most: 512 KiB.
const LONGEST_FILL: u64 = 128;

/// What a target's faults tell of those to come.
#[derive(Debug)]
pub(super) struct Locality {
    /// The page behind those that the last fault brought, counted by address.
    next: u64,
    window: u64,
    /// Pages of the template that the target has, as far as we put them there: a bit each.
    there: Vec<u64>,
}

/// Which pages are handled together with the one that was demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// So many are fetched into the template.
    pub(super) fetch: u64,
    /// So many from the demanded one on are put into the target, if they are zero by the map.
    pub(super) zeros: u64,
    /// These are put into the target, as far as they are missing there and in the template.
    pub(super) fill: Run,
}

impl Window {
    /// That page and no other.
    pub(super) fn alone(page: u64) -> Window {
        Window { fetch: 1, zeros: 1, fill: Run { start: page, pages: 1 } }
    }
}

impl Locality {
    /// Nothing is known. Of a template of `pages` it is kept which pages the target has. With 0, where
    /// filling costs nothing, it is not: then every page counts as missing.
    pub(super) fn new(pages: u64) -> Locality {
        // Memory that is never written takes none.
        let there = vec![0; pages.div_ceil(64) as usize];
        Locality { next: u64::MAX, window: BLOCK, there }
    }

    /// The window for `page`, demanded at an address with the number `at`.
    pub(super) fn window(&mut self, at: u64, page: u64) -> Window {
        let goes_on = self.goes_on(at);
        let block = page - page % BLOCK;
        let fill = if self.there.is_empty() {
            Run { start: page, pages: self.window }
        } else if goes_on {
            Run { start: page, pages: self.window.min(LONGEST_FILL) }
        } else if (block..block + BLOCK).any(|page| self.is_there(page)) {
            Run { start: block, pages: BLOCK }
        } else {
            Run { start: page, pages: 1 }
        };
        Window { fetch: self.window, zeros: self.window, fill }
    }

    /// How many zero pages are put together at the address with the number `at`. They cost a tenth.
    pub(super) fn zeros(&mut self, at: u64) -> u64 {
        self.goes_on(at);
        self.window
    }

    fn goes_on(&mut self, at: u64) -> bool {
        let goes_on = at == self.next;
        self.window = if goes_on { (self.window * 2).min(LONGEST_FETCH) } else { BLOCK };
        goes_on
    }

    /// The page demanded last, and those behind it, came as far as the address with this number.
    pub(super) fn came_to(&mut self, next: u64) {
        self.next = next;
    }

    /// The target has these pages now.
    pub(super) fn put(&mut self, run: Run) {
        for page in run.start..run.end() {
            if let Some(word) = self.there.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// The first pages of `run` that the target has not got, in one piece.
    pub(super) fn missing(&self, run: Run) -> Option<Run> {
        let start = (run.start..run.end()).find(|page| !self.is_there(*page))?;
        let end = (start..run.end()).find(|page| self.is_there(*page)).unwrap_or(run.end());
        Some(Run::between(start, end))
    }

    fn is_there(&self, page: u64) -> bool {
        self.there.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_page_of_a_block_brings_the_rest() {
        let mut locality = Locality::new(1000);
        assert_eq!(locality.window(35, 35).fill, Run::between(35, 36));
        locality.put(Run::between(35, 36));
        assert_eq!(locality.window(50, 50).fill, Run::between(50, 51));
        assert_eq!(locality.window(40, 40).fill, Run::between(32, 48));
        let block = Run::between(32, 48);
        assert_eq!(locality.missing(block), Some(Run::between(32, 35)));
        assert_eq!(locality.missing(Run::between(35, 48)), Some(Run::between(36, 48)));
        locality.put(block);
        assert_eq!(locality.missing(block), None);
    }

    #[test]
    fn who_reads_on_gets_more_each_time() {
        let mut locality = Locality::new(1000);
        let mut at = 100;
        let mut sizes = Vec::new();
        for _ in 0..6 {
            let window = locality.window(at, at);
            sizes.push((window.fetch, window.fill.pages));
            at = window.fill.end();
            locality.came_to(at);
        }
        assert_eq!(sizes, [(16, 1), (32, 32), (64, 64), (128, 128), (256, 128), (256, 128)]);
        assert_eq!(locality.window(7, 7).fetch, 16);
        assert_eq!(locality.zeros(7), 16);
    }

    #[test]
    fn where_nothing_is_kept_everything_comes_along() {
        let mut locality = Locality::new(0);
        assert_eq!(locality.window(35, 35).fill, Run::between(35, 51));
        locality.came_to(51);
        assert_eq!(locality.window(51, 51).fill, Run::between(51, 83));
        locality.put(Run::between(35, 36));
        assert_eq!(locality.missing(Run::between(35, 40)), Some(Run::between(35, 40)));
    }
}
