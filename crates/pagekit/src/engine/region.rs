//! The region map of a target: which page of the template, if any, belongs at an address.
//!
//! Events change it: REMOVE turns content into zeros for good, UNMAP forgets, REMAP moves. A region
//! that an event touches in the middle is cut in pieces, so a lookup never crosses a change.

use std::collections::BTreeMap;

use crate::page::{Run, PAGE};

/// What belongs into a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Belongs {
    /// The template's pages from this one on.
    Template(u64),
    /// Zeros: the target gave the pages back.
    Zero,
}

/// A lookup's answer: what belongs at the address asked for, and for how many bytes from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) belongs: Belongs,
    pub(crate) bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    end: u64,
    belongs: Belongs,
}

/// Pieces by their first address; they never overlap.
#[derive(Debug, Clone, Default)]
pub struct RegionMap {
    pieces: BTreeMap<u64, Piece>,
}

impl RegionMap {
    /// A map of one region: `run` of the template at `start`.
    pub fn new(start: u64, run: Run) -> RegionMap {
        let mut map = RegionMap::default();
        map.put(start, start + run.bytes(), Belongs::Template(run.start));
        map
    }

    /// What belongs at `address`, a multiple of the page size.
    pub(crate) fn find(&self, address: u64) -> Option<Place> {
        let (start, piece) = self.pieces.range(..=address).next_back()?;
        (address < piece.end).then(|| Place {
            belongs: advance(piece.belongs, address - start),
            bytes: piece.end - address,
        })
    }

    /// REMOVE: from now on zeros belong there.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        for (from, piece) in self.cut_out(start, end) {
            self.put(from, piece.end, Belongs::Zero);
        }
    }

    /// UNMAP: nothing of ours is there any more.
    pub(crate) fn unmap(&mut self, start: u64, end: u64) {
        self.cut_out(start, end);
    }

    /// REMAP: what was at `from` is at `to` now.
    pub(crate) fn remap(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.cut_out(from, from.saturating_add(len));
        // Whatever was at the new place was unmapped by the move.
        self.cut_out(to, to.saturating_add(len));
        for (start, piece) in moved {
            self.put(start - from + to, piece.end - from + to, piece.belongs);
        }
    }

    /// All addresses of the map, as start and length.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().map(|(start, piece)| (*start, piece.end - start))
    }

    /// Some address of the map, for asking whether the target lives.
    pub(crate) fn any_address(&self) -> Option<u64> {
        self.pieces.keys().next().copied()
    }

    fn put(&mut self, start: u64, end: u64, belongs: Belongs) {
        if start < end {
            self.pieces.insert(start, Piece { end, belongs });
        }
    }

    /// Takes out everything between `start` and `end`, and gives it back in pieces.
    fn cut_out(&mut self, start: u64, end: u64) -> Vec<(u64, Piece)> {
        self.split(start);
        self.split(end);
        let inside: Vec<u64> =
            self.pieces.range(start..end.max(start)).map(|(at, _)| *at).collect();
        inside.into_iter().filter_map(|at| Some((at, self.pieces.remove(&at)?))).collect()
    }

    /// Makes `at` a border between pieces, if it lies inside one.
    fn split(&mut self, at: u64) {
        let Some((start, piece)) = self.pieces.range(..at).next_back() else { return };
        let (start, piece) = (*start, *piece);
        if piece.end > at {
            self.put(start, at, piece.belongs);
            self.put(at, piece.end, advance(piece.belongs, at - start));
        }
    }
}

fn advance(belongs: Belongs, bytes: u64) -> Belongs {
    match belongs {
        Belongs::Template(page) => Belongs::Template(page + bytes / PAGE),
        Belongs::Zero => Belongs::Zero,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7000_0000_0000;

    fn at(map: &RegionMap, page: u64) -> Option<(Belongs, u64)> {
        map.find(BASE + page * PAGE).map(|place| (place.belongs, place.bytes / PAGE))
    }

    #[test]
    fn a_region_maps_addresses_to_pages() {
        let map = RegionMap::new(BASE, Run { start: 100, pages: 10 });
        assert_eq!(at(&map, 0), Some((Belongs::Template(100), 10)));
        assert_eq!(at(&map, 9), Some((Belongs::Template(109), 1)));
        assert_eq!(at(&map, 10), None);
        assert_eq!(map.find(BASE - PAGE), None);
    }

    #[test]
    fn removed_pages_are_zero_for_good() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 10 });
        map.remove(BASE + 3 * PAGE, BASE + 5 * PAGE);
        assert_eq!(at(&map, 2), Some((Belongs::Template(2), 1)), "a lookup stops at the border");
        assert_eq!(at(&map, 3), Some((Belongs::Zero, 2)));
        assert_eq!(at(&map, 5), Some((Belongs::Template(5), 5)));
        map.remove(BASE - PAGE, BASE + 20 * PAGE);
        assert_eq!(at(&map, 0).map(|found| found.0), Some(Belongs::Zero));
        assert_eq!(at(&map, 10), None, "removal adds nothing that was not there");
    }

    #[test]
    fn moved_pages_keep_their_content_and_the_old_place_is_empty() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 10 });
        map.remove(BASE + PAGE, BASE + 2 * PAGE);
        map.remap(BASE, BASE + 100 * PAGE, 4 * PAGE);
        assert_eq!(at(&map, 0), None);
        assert_eq!(at(&map, 100), Some((Belongs::Template(0), 1)));
        assert_eq!(at(&map, 101), Some((Belongs::Zero, 1)));
        assert_eq!(at(&map, 102), Some((Belongs::Template(2), 2)));
        assert_eq!(at(&map, 4), Some((Belongs::Template(4), 6)));
        map.unmap(BASE, BASE + 200 * PAGE);
        assert_eq!(map.any_address(), None);
    }
}
