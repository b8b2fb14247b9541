//! MINOR_SHMEM: faults on pages of memfd and tmpfs that are in the page cache and not mapped, in
//! shared mappings and in private ones.

mod common;

use common::*;
use uffd::{Cause, Features, RegisterMode};

#[test]
fn cached_pages_are_mapped_when_they_are_asked_for() {
    if need("MINOR_SHMEM") {
        on_each(Kind::SHMEM, 5, |kind, memory| scenario::minor(kind, memory, false));
    }
}

#[test]
fn missing_until_the_cache_has_it_and_minor_from_then_on() {
    if need("MINOR_SHMEM") {
        on_each(Kind::SHMEM, 2, scenario::missing_and_minor);
    }
}

/// Pages that were mapped one by one may be gathered into a huge one: nothing is asked for again.
#[test]
fn mapped_pages_can_be_collapsed() {
    if !need("MINOR_SHMEM") {
        return;
    }
    const PAGES: usize = HUGE / PAGE;
    let room = Mapping::room(HUGE as u64);
    let memory = Mapping::over(room, memory_file(PAGES));
    let target = Registered::with(memory, Features::NONE, RegisterMode::MINOR);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let other = memory.again();
    (0..PAGES).for_each(|at| write(other.at(at), (at % 255) as u8));
    let thread = toucher(memory.at(9));
    target.assert_fault(memory.at(9), Cause::Minor);
    assert_done(uffd.continue_(memory.start, memory.bytes()), memory.len);
    assert_eq!(thread.join().unwrap(), 9);
    if let Err(error) = collapse(memory) {
        println!("not collapsed: {error}");
    }
    assert!((0..PAGES).all(|at| memory.touch(at) == (at % 255) as u8));
    target.assert_silent();
}
