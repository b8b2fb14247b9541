//! MINOR_SHMEM: faults on pages of memfd and tmpfs that are in the page cache and not mapped.

mod common;

use common::*;

const SHARED: &[Kind] = &[Kind::Shmem, Kind::Tmpfs];

#[test]
fn cached_pages_are_mapped_when_they_are_asked_for() {
    if need("MINOR_SHMEM") {
        on_each(SHARED, 5, |_, memory| scenario::minor(memory, false));
    }
}

#[test]
fn missing_until_the_cache_has_it_and_minor_from_then_on() {
    if need("MINOR_SHMEM") {
        on_each(SHARED, 2, |_, memory| scenario::missing_and_minor(memory));
    }
}
