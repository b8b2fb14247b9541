//! The region map of a target: which page of the template, if any, belongs at an address, and at
//! which addresses a page of the template belongs.
//!
//! Events change it: REMOVE turns content into zeros for good, UNMAP forgets, REMAP moves. A region
//! that an event touches in the middle is cut in pieces, so a lookup never crosses a change. A guest
//! that gives back single pages here and there (a balloon) leaves pieces by the hundred thousand, so
//! pieces that go on where their neighbour ends are joined again.
//!
//! What the events leave open, and what follows:
//! - A move is told, and what it leaves behind is told to be unmapped. If that is not told, it was not
//!   (MREMAP_DONTUNMAP), and the old range is still registered.
//! - Growth is not told. It is found by asking the kernel whether an unknown address is one mapping with
//!   what is known before it.
//! - In both cases zeros belong there if the memory is anonymous. A file may have anything there.
//! - Mappings, moves and forks are told when the kernel has given its lock back. If two threads of a target
//!   do such things at once and one takes the addresses that the other has just left, the events may come
//!   in another order than they happened, and nobody can tell what is where. (It takes addresses that the
//!   kernel chose, or a thread that does not wait for the other's call to return.)
//! - MADV_DONTNEED of shared memory is told as MADV_REMOVE is, and holes that are punched by fallocate are
//!   not told: they read what belonged there before. So does what one process removed of memory that it
//!   shares with another, in the other.
//! - Without EVENT_UNMAP what was unmapped stays in the map, and growth into it is taken for it.
//!
//! The way back, from pages to addresses, is for filling ahead only. It is not kept up to date: a
//! *home* is where the client put pages of the template, and the pieces say whether they still belong
//! there. What was moved since is not found, and faults.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::page::{Run, PAGE};

/// What belongs into a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Belongs {
    /// The template's pages from this one on.
    Template(u64),
    /// Zeros: the target gave the pages back.
    Zero,
    /// What a move has left behind that unmapped nothing (MREMAP_DONTUNMAP): zeros where the memory is
    /// anonymous; else still the template's pages from this one on, as in the file that is mapped there.
    Left(u64),
}

/// A lookup's answer: what belongs at the address asked for, for how many bytes from there, and for
/// how many bytes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) belongs: Belongs,
    pub(crate) bytes: u64,
    pub(crate) bytes_before: u64,
}

impl Place {
    /// `page`, which belongs here, and what of `along` is in the same piece, on both sides of it. (The
    /// run may be of another page that belonged here, and lie anywhere.)
    pub(crate) fn around(&self, page: u64, along: Run) -> Run {
        if !along.contains(page) {
            return Run { start: page, pages: 1 };
        }
        let first = page - (self.bytes_before / PAGE).min(page);
        let end = page + self.bytes / PAGE;
        Run::between(along.start.max(first), along.end().min(end))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    end: u64,
    belongs: Belongs,
}

/// Where the client put pages of the template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Home {
    run: Run,
    address: u64,
    /// The last end of a run, of this home and all before it.
    reach: u64,
}

/// Pieces by their first address; they never overlap.
#[derive(Debug, Clone, Default)]
pub struct RegionMap {
    pieces: BTreeMap<u64, Piece>,
    /// By the first page of their run.
    homes: Arc<[Home]>,
}

impl RegionMap {
    /// A map of one region: `run` of the template at `start`.
    pub fn new(start: u64, run: Run) -> RegionMap {
        RegionMap::of([(start, run)])
    }

    /// A map of regions that do not overlap: a first address and the pages that belong there, each.
    pub fn of(regions: impl IntoIterator<Item = (u64, Run)>) -> RegionMap {
        let mut map = RegionMap::default();
        let mut homes = Vec::new();
        for (address, run) in regions {
            map.put(address, address + run.bytes(), Belongs::Template(run.start));
            homes.push(Home { run, address, reach: 0 });
        }
        homes.sort_unstable_by_key(|home| home.run.start);
        let mut reach = 0;
        for home in &mut homes {
            reach = reach.max(home.run.end());
            home.reach = reach;
        }
        map.homes = homes.into();
        map
    }

    /// What belongs at `address`, a multiple of the page size.
    pub(crate) fn find(&self, address: u64) -> Option<Place> {
        let (start, piece) = self.pieces.range(..=address).next_back()?;
        (address < piece.end).then(|| Place {
            belongs: advance(piece.belongs, address - start),
            bytes: piece.end - address,
            bytes_before: address - start,
        })
    }

    /// Whether the client put a page of the template at several addresses.
    pub(crate) fn repeats(&self) -> bool {
        self.homes.windows(2).any(|two| two[1].run.start < two[0].reach)
    }

    /// Where pages of `run` belong, as addresses and the pages from there on; rising by pages. A page
    /// may belong at several addresses, or at none.
    pub(crate) fn places(&self, run: Run) -> Vec<(u64, Run)> {
        let mut places = Vec::new();
        let after = self.homes.partition_point(|home| home.run.start < run.end());
        for home in self.homes[..after].iter().rev().take_while(|home| home.reach > run.start) {
            let start = home.run.start.max(run.start);
            let end = home.run.end().min(run.end());
            let mut page = start;
            while page < end {
                let address = home.address + (page - home.run.start) * PAGE;
                let pages = match self.find(address) {
                    Some(place) => {
                        let pages = (place.bytes / PAGE).min(end - page);
                        if place.belongs == Belongs::Template(page) {
                            places.push((address, Run { start: page, pages }));
                        }
                        pages
                    }
                    None => self.empty_from(address).min(end - page),
                };
                page += pages;
            }
        }
        places.sort_unstable_by_key(|(address, run)| (run.start, *address));
        places
    }

    /// REMOVE: from now on zeros belong there.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        for (from, piece) in self.cut_out(start, end) {
            self.put(from, piece.end, Belongs::Zero);
            self.join(from);
        }
        // Zeros that were there before may begin where these end.
        self.join(end);
    }

    /// UNMAP: nothing of ours is there any more.
    pub(crate) fn unmap(&mut self, start: u64, end: u64) {
        self.cut_out(start, end);
    }

    /// REMAP: what was at `from` is at `to` now. If nothing is left at `from`, the next event says so.
    pub(crate) fn remap(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.cut_out(from, from.saturating_add(len));
        // Whatever was at the new place was unmapped by the move.
        self.cut_out(to, to.saturating_add(len));
        for (start, piece) in moved {
            let left = match piece.belongs {
                Belongs::Template(page) | Belongs::Left(page) => Belongs::Left(page),
                Belongs::Zero => Belongs::Zero,
            };
            self.put(start, piece.end, left);
            self.join(start);
            let (start, end) = (start - from + to, piece.end - from + to);
            self.put(start, end, piece.belongs);
            self.join(start);
        }
        self.join(from.saturating_add(len));
        self.join(to.saturating_add(len));
    }

    /// Where the piece ends that comes last before `address`, at which nothing of ours is.
    pub(crate) fn end_before(&self, address: u64) -> Option<u64> {
        let (_, piece) = self.pieces.range(..address).next_back()?;
        (piece.end <= address).then_some(piece.end)
    }

    /// A mapping has grown from `start` to `end`, by zeros.
    pub(crate) fn grow(&mut self, start: u64, end: u64) {
        self.put(start, end, Belongs::Zero);
        self.join(start);
        self.join(end);
    }

    /// All addresses of the map, as start and length.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().map(|(start, piece)| (*start, piece.end - start))
    }

    /// All of the map, rising: address, bytes, and the first page of the template, or none where zeros
    /// belong, or what a move left behind.
    pub(crate) fn pieces(&self) -> impl ExactSizeIterator<Item = (u64, u64, Option<u64>)> + '_ {
        self.pieces.iter().map(|(start, piece)| {
            let page = match piece.belongs {
                Belongs::Template(page) => Some(page),
                Belongs::Zero | Belongs::Left(_) => None,
            };
            (*start, piece.end - start, page)
        })
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

    /// Makes one piece of the two that meet at `at`, if the second goes on where the first ends.
    fn join(&mut self, at: u64) {
        let Some(second) = self.pieces.get(&at).copied() else { return };
        let Some((start, first)) = self.pieces.range_mut(..at).next_back() else { return };
        if first.end == at && advance(first.belongs, at - start) == second.belongs {
            first.end = second.end;
            self.pieces.remove(&at);
        }
    }

    /// How many pages from `address` on nothing belongs to.
    fn empty_from(&self, address: u64) -> u64 {
        let next = self.pieces.range(address..).next();
        next.map_or(u64::MAX, |(start, _)| (start - address) / PAGE)
    }
}

fn advance(belongs: Belongs, bytes: u64) -> Belongs {
    match belongs {
        Belongs::Template(page) => Belongs::Template(page + bytes / PAGE),
        Belongs::Left(page) => Belongs::Left(page + bytes / PAGE),
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
    fn what_comes_along_is_of_the_same_piece() {
        let map = RegionMap::new(BASE, Run { start: 100, pages: 10 });
        let place = map.find(BASE + 4 * PAGE).unwrap();
        let around = |start, end| place.around(104, Run::between(start, end));
        assert_eq!(around(102, 106), Run::between(102, 106));
        assert_eq!(around(96, 112), Run::between(100, 110));
        for elsewhere in [around(10, 20), around(200, 216), around(104, 104)] {
            assert_eq!(elsewhere, Run::between(104, 105));
        }
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

    /// Single pages at random, until nothing is left: right at every step, and in the end one piece.
    #[test]
    fn pieces_are_joined_again() {
        const PAGES: u64 = 2000;
        let mut map = RegionMap::new(BASE, Run { start: 7, pages: PAGES });
        let mut removed = vec![false; PAGES as usize];
        let mut order: Vec<u64> = (0..PAGES).collect();
        order.sort_by_key(|page| page.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17));
        for page in order {
            map.remove(BASE + page * PAGE, BASE + (page + 1) * PAGE);
            removed[page as usize] = true;
            let borders = removed.windows(2).filter(|two| two[0] != two[1]).count();
            assert_eq!(map.pieces.len(), borders + 1);
        }
        assert_eq!(at(&map, 0), Some((Belongs::Zero, PAGES)));
        map.remove(BASE, BASE + PAGES * PAGE);
        assert_eq!(map.pieces.len(), 1);
    }

    #[test]
    fn a_lookup_never_crosses_a_border_of_regions() {
        let run = Run { start: 0, pages: 4 };
        let map = RegionMap::of([(BASE + 4 * PAGE, Run { start: 4, pages: 4 }), (BASE, run)]);
        assert_eq!(at(&map, 3), Some((Belongs::Template(3), 1)));
        assert_eq!(at(&map, 4), Some((Belongs::Template(4), 4)));
    }

    #[test]
    fn pages_are_found_where_they_belong_as_long_as_they_do() {
        let run = |start, end| Run::between(start, end);
        let there = |page: u64| BASE + page * PAGE;
        // Shuffled, and pages 20 to 30 twice.
        let mut map = RegionMap::of([
            (there(1000), run(0, 30)),
            (there(0), run(40, 50)),
            (there(500), run(20, 40)),
        ]);
        assert_eq!(map.places(run(5, 7)), [(there(1005), run(5, 7))]);
        assert_eq!(
            map.places(run(28, 42)),
            [(there(508), run(28, 40)), (there(1028), run(28, 30)), (there(0), run(40, 42))]
        );
        assert_eq!(map.places(run(50, 99)), []);
        map.remove(there(1001), there(1003));
        map.unmap(there(500), there(519));
        assert_eq!(
            map.places(run(0, 50)),
            [
                (there(1000), run(0, 1)),
                (there(1003), run(3, 30)),
                (there(519), run(39, 40)),
                (there(0), run(40, 50)),
            ]
        );
        // Something else belongs to a home now: what was moved there is not what belonged there.
        map.remap(there(1003), there(0), 4 * PAGE);
        assert_eq!(map.places(run(40, 50)), [(there(4), run(44, 50))]);
        assert_eq!(map.places(run(3, 8)), [(there(1007), run(7, 8))]);
    }

    #[test]
    fn moved_pages_keep_their_content_and_the_old_place_is_empty() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 10 });
        map.remove(BASE + PAGE, BASE + 2 * PAGE);
        map.remap(BASE, BASE + 100 * PAGE, 4 * PAGE);
        map.unmap(BASE, BASE + 4 * PAGE);
        assert_eq!(at(&map, 0), None);
        assert_eq!(at(&map, 100), Some((Belongs::Template(0), 1)));
        assert_eq!(at(&map, 101), Some((Belongs::Zero, 1)));
        assert_eq!(at(&map, 102), Some((Belongs::Template(2), 2)));
        assert_eq!(at(&map, 4), Some((Belongs::Template(4), 6)));
        map.unmap(BASE, BASE + 200 * PAGE);
        assert_eq!(map.any_address(), None);
    }

    #[test]
    fn a_move_that_unmaps_nothing_leaves_something_behind() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 10 });
        map.remove(BASE + 3 * PAGE, BASE + 4 * PAGE);
        map.remap(BASE + 2 * PAGE, BASE + 100 * PAGE, 3 * PAGE);
        assert_eq!(at(&map, 1), Some((Belongs::Template(1), 1)));
        assert_eq!(at(&map, 2), Some((Belongs::Left(2), 1)));
        assert_eq!(at(&map, 3), Some((Belongs::Zero, 1)));
        assert_eq!(at(&map, 4), Some((Belongs::Left(4), 1)));
        assert_eq!(at(&map, 5), Some((Belongs::Template(5), 5)));
        assert_eq!(at(&map, 100), Some((Belongs::Template(2), 1)));
        map.remove(BASE + 2 * PAGE, BASE + 5 * PAGE);
        assert_eq!(at(&map, 2), Some((Belongs::Zero, 3)));
    }

    /// Onto the middle of another region, and with the very pages that are before and behind it.
    #[test]
    fn what_is_moved_onto_a_region_replaces_its_middle() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 10 });
        map.remap(BASE + 8 * PAGE, BASE + 3 * PAGE, 2 * PAGE);
        map.unmap(BASE + 8 * PAGE, BASE + 10 * PAGE);
        let found: Vec<_> = [0, 3, 5, 8].map(|page| at(&map, page)).to_vec();
        assert_eq!(
            found,
            [
                Some((Belongs::Template(0), 3)),
                Some((Belongs::Template(8), 2)),
                Some((Belongs::Template(5), 3)),
                None
            ]
        );
        map.remap(BASE + 3 * PAGE, BASE + 8 * PAGE, 2 * PAGE);
        assert_eq!(map.pieces.len(), 3, "0 to 3, zeros left behind, 5 to 10");
    }

    #[test]
    fn what_has_grown_is_zeros() {
        let mut map = RegionMap::new(BASE, Run { start: 0, pages: 4 });
        let end = BASE + 4 * PAGE;
        assert_eq!(map.end_before(BASE + 3 * PAGE), None, "there is something");
        assert_eq!(map.end_before(BASE + 6 * PAGE), Some(end));
        assert_eq!(map.end_before(BASE), None);
        map.grow(end, end + 2 * PAGE);
        map.grow(end + 2 * PAGE, end + 3 * PAGE);
        assert_eq!(at(&map, 4), Some((Belongs::Zero, 3)));
        assert_eq!(at(&map, 3), Some((Belongs::Template(3), 1)));
    }
}
