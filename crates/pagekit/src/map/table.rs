//! The maps of this process, by address.
//!
//! A signal handler looks an address up in the thread that touched it: no lock may be taken there. So
//! the table is an array of entries (more arrays follow when it is full, and stay), each with a
//! sequence number that is odd while the entry changes.
//!
//! Why what is found can be used: an address that is being touched lies in memory that somebody
//! holds, so its map lives. Entries of other maps may change meanwhile, which the number tells.

use std::sync::atomic::{fence, AtomicPtr, AtomicU64, Ordering::*};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::house::House;
use super::Map;

const ENTRIES: usize = 128;

struct Entry {
    sequence: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    map: AtomicPtr<Map>,
}

struct Entries {
    all: [Entry; ENTRIES],
    more: AtomicPtr<Entries>,
}

impl Entries {
    const fn new() -> Entries {
        Entries {
            all: [const {
                Entry {
                    sequence: AtomicU64::new(0),
                    start: AtomicU64::new(0),
                    end: AtomicU64::new(0),
                    map: AtomicPtr::new(std::ptr::null_mut()),
                }
            }; ENTRIES],
            more: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    fn more(&self) -> Option<&'static Entries> {
        // SAFETY: null, or leaked by `Registry::insert`.
        unsafe { self.more.load(Acquire).as_ref() }
    }
}

static FIRST: Entries = Entries::new();
static REGISTRY: Mutex<Registry> = Mutex::new(Registry { house: None });

/// What there is once a process. Whoever holds it may change the table; a fork holds it.
pub(super) struct Registry {
    pub(super) house: Option<&'static House>,
}

/// The registry. Held for moments only, and while a thread forks.
pub(super) fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    std::iter::successors(Some(&FIRST), |entries| entries.more()).flat_map(|entries| &entries.all)
}

/// The map that `address` belongs to. Takes neither locks nor memory.
pub(super) fn find(address: u64) -> Option<*const Map> {
    entries().find_map(|entry| {
        let before = entry.sequence.load(Acquire);
        let inside = (entry.start.load(Relaxed)..entry.end.load(Relaxed)).contains(&address);
        let map = entry.map.load(Relaxed);
        fence(Acquire);
        let unchanged = before % 2 == 0 && entry.sequence.load(Relaxed) == before;
        (inside && unchanged).then_some(map.cast_const())
    })
}

impl Registry {
    /// All maps, those of other processes included that this one was forked from.
    pub(super) fn maps(&self) -> impl Iterator<Item = &'static Map> {
        // SAFETY: a map is in the table from after it was made until it is dropped, and both need the
        // lock that the caller holds.
        entries().filter_map(|entry| unsafe { entry.map.load(Relaxed).cast_const().as_ref() })
    }

    pub(super) fn insert(&mut self, map: *const Map, start: u64, end: u64) {
        loop {
            if let Some(free) = entries().find(|entry| entry.map.load(Relaxed).is_null()) {
                return free.set(map.cast_mut(), start, end);
            }
            let last = std::iter::successors(Some(&FIRST), |entries| entries.more()).last();
            if let Some(last) = last {
                last.more.store(Box::leak(Box::new(Entries::new())), Release);
            }
        }
    }

    pub(super) fn remove(&mut self, map: *const Map) {
        if let Some(entry) = entries().find(|entry| std::ptr::eq(entry.map.load(Relaxed), map)) {
            entry.set(std::ptr::null_mut(), 0, 0);
        }
    }
}

impl Entry {
    fn set(&self, map: *mut Map, start: u64, end: u64) {
        self.sequence.fetch_add(1, Relaxed);
        fence(Release);
        self.start.store(start, Relaxed);
        self.end.store(end, Relaxed);
        self.map.store(map, Relaxed);
        self.sequence.fetch_add(1, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_until_it_is_taken_out() {
        // Nothing is ever read through these.
        let map = |number: usize| std::ptr::without_provenance::<Map>(number * 64);
        let many = ENTRIES * 2 + 5;
        // Addresses that no mapping has.
        let start = |number: usize| (1 << 60) + number as u64 * 4096;
        let mut registry = registry();
        for number in 1..=many {
            registry.insert(map(number), start(number), start(number) + 4096);
        }
        for number in 1..=many {
            assert_eq!(find(start(number) + 17), Some(map(number)));
        }
        for number in 1..=many {
            registry.remove(map(number));
            assert_eq!(find(start(number)), None);
        }
    }
}
