//! WP_ASYNC: write protection that the kernel resolves itself, on any kind of memory; which pages were
//! written is read back with PAGEMAP_SCAN.

mod common;

use std::fs::File;

use common::*;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use uffd::{Categories, Errno, Features, How, Operations, PageRegion, Pagemap, RegisterMode, Scan};

/// The written pages of a mapping, by number, which are protected again if that is wished.
fn written(memory: &Mapping, protect: bool) -> Vec<usize> {
    let scan = Scan {
        all_of: Categories::WRITTEN,
        reported: Categories::WRITTEN,
        protect,
        only_tracked: true,
        ..Scan::default()
    };
    let end = memory.start + memory.bytes();
    let regions = Pagemap::of_self().unwrap().scan(memory.start, end, &scan).unwrap();
    let page = memory.page as u64;
    let number = |address: u64| ((address - memory.start) / page) as usize;
    let pages = |region: &PageRegion| number(region.start)..number(region.end);
    regions.iter().flat_map(pages).collect()
}

fn tracked(memory: Mapping) -> Registered {
    Registered::with(memory, Features::WP_ASYNC, RegisterMode::WP)
}

fn ready() -> bool {
    need("WP_ASYNC") && need("PAGEMAP_SCAN")
}

#[test]
fn writes_wait_for_nobody_and_are_found_afterwards() {
    if !ready() {
        return;
    }
    on_each(Kind::ALL, 4, |kind, memory| {
        let target = tracked(memory);
        let (uffd, memory) = (&target.uffd, &target.memory);
        // What was never protected counts as written. So do empty pages beside it, of which the page
        // table has room; a page of hugetlbfs has none.
        write(memory.at(0), 1);
        let expected: &[usize] = if kind.is_huge() { &[0] } else { &[0, 1, 2, 3] };
        assert_eq!(written(memory, false), expected);
        // Empty pages are protected too.
        uffd.protect(memory.start, memory.bytes()).unwrap();
        assert_eq!(written(memory, false), []);
        write(memory.at(0), 2);
        write(memory.at(2), 3);
        write_in_kernel(memory.at(3), 4).unwrap();
        assert_eq!(touch(memory.at(1)), 0, "reading is no writing");
        target.assert_silent();
        // Found and protected again in one call.
        assert_eq!(written(memory, true), [0, 2, 3]);
        assert_eq!(written(memory, true), []);
        write(memory.at(3), 5);
        assert_eq!(written(memory, false), [3]);
        assert_eq!([0, 1, 2, 3].map(|at| memory.touch(at)), [2, 0, 3, 5]);
        assert!(protected(memory.at(0)) && !protected(memory.at(3)));
        // Unprotected by hand is written too.
        uffd.unprotect(memory.at(0), memory.pages(1)).unwrap();
        assert_eq!(written(memory, false), [0, 3]);
        target.assert_silent();
    });
}

/// Where there is not even a page table a scan protects too: whatever it says of it, it says it once.
#[test]
fn memory_that_was_never_touched_is_tracked_by_a_first_scan() {
    if !ready() {
        return;
    }
    let memory = Mapping::transparent(2);
    memory.advise(Advice::LinuxNoHugepage);
    let target = tracked(memory);
    let memory = &target.memory;
    written(memory, true);
    assert_eq!(written(memory, true), []);
    write(memory.at(600), 1);
    assert_eq!(written(memory, true), [600]);
    target.assert_silent();
}

/// Every kind of mapping, not only those that userfaultfd knows otherwise.
#[test]
fn a_mapping_of_any_file_is_tracked_and_needs_this_feature() {
    if !ready() {
        return;
    }
    let program = File::open("/proc/self/exe").unwrap();
    let map = || Mapping::of(&program, 3, READ_WRITE, MapFlags::PRIVATE);
    let memory = map();
    let before = memory.content(1);
    let without = negotiated(Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED);
    let outcome = without.register(memory.start, memory.bytes(), RegisterMode::WP);
    assert_errno(outcome, Errno::INVAL);
    let target = tracked(memory);
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.protect(memory.start, memory.bytes()).unwrap();
    assert_eq!(written(memory, false), []);
    write(memory.at(1), !before[0]);
    assert_eq!(written(memory, true), [1]);
    assert_eq!(written(memory, false), []);
    assert_eq!(memory.content(1)[0], !before[0]);
    assert_eq!(memory.content(1)[1..], before[1..]);
    target.assert_silent();
    // Nothing but this: no other mode.
    let other = map();
    for mode in
        [RegisterMode::MISSING, RegisterMode::MINOR, RegisterMode::MISSING | RegisterMode::WP]
    {
        assert_errno(uffd.register(other.start, other.bytes(), mode), Errno::INVAL);
    }
    // A mapping that is only read is tracked as well: it may become writable.
    let other = Mapping::of(&program, 1, ProtFlags::READ, MapFlags::PRIVATE);
    uffd.register(other.start, other.bytes(), RegisterMode::WP).unwrap();
    uffd.unregister(other.start, other.bytes()).unwrap();
}

/// Missing pages of the same range are told as ever, and may arrive protected.
#[test]
fn missing_pages_are_told_as_ever() {
    if !ready() {
        return;
    }
    on_each(Kind::ALL, 3, |_, memory| {
        let mode = RegisterMode::MISSING | RegisterMode::WP;
        let uffd = negotiated(Features::WP_ASYNC);
        let operations = uffd.register(memory.start, memory.bytes(), mode).unwrap();
        assert!(operations.contains(Operations::WRITEPROTECT | Operations::COPY));
        let target = Registered { uffd, memory };
        let (uffd, memory) = (&target.uffd, &target.memory);
        for at in [0, 1] {
            let thread = writer(memory.at(at), 7);
            assert_eq!(target.next_fault(), memory.at(at));
            let done = uffd.copy_with(memory.at(at), &memory.filled(1), How::PROTECTED);
            assert_done(done, memory.page);
            thread.join().unwrap();
        }
        let done = uffd.copy_with(memory.at(2), &memory.filled(1), How::PROTECTED);
        assert_done(done, memory.page);
        assert_eq!(written(memory, false), [0, 1]);
        target.assert_silent();
    });
}

/// It brings WP_UNPOPULATED along, asked for or not.
#[test]
fn it_implies_protection_of_empty_pages() {
    if !ready() {
        return;
    }
    let uffd = negotiated(Features::WP_ASYNC);
    let negotiated = uffd::negotiated(&uffd).unwrap().unwrap();
    assert_eq!(negotiated, Features::WP_ASYNC | Features::WP_UNPOPULATED);
}

#[test]
fn transparent_huge_pages_are_split_where_they_are_written() {
    if !ready() {
        return;
    }
    let memory = Mapping::transparent(1);
    (0..512).for_each(|at| write(memory.at(at), 1));
    let target = tracked(memory);
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.protect(memory.start, memory.bytes()).unwrap();
    assert_eq!(written(memory, false), []);
    write(memory.at(77), 2);
    assert_eq!(written(memory, true), [77], "a page of it, not all");
    // Protected in part, by a scan of a part.
    (0..512).for_each(|at| write(memory.at(at), 3));
    assert_eq!(written(memory, false).len(), 512);
    let scan = Scan { all_of: Categories::WRITTEN, protect: true, ..Scan::default() };
    let pagemap = Pagemap::of_self().unwrap();
    pagemap.scan(memory.at(100), memory.at(200), &scan).unwrap();
    let expected: Vec<usize> = (0..100).chain(200..512).collect();
    assert_eq!(written(memory, false), expected);
}

/// No write is lost between finding and protecting, while threads write.
#[test]
fn nothing_is_lost_while_threads_write() {
    if !ready() {
        return;
    }
    const PAGES: usize = 256;
    const ROUNDS: u8 = 40;
    let target = tracked(Mapping::anonymous(PAGES));
    let memory = &target.memory;
    target.uffd.protect(memory.start, memory.bytes()).unwrap();
    let start = memory.start;
    let writers: Vec<_> = (0..4_usize)
        .map(|lane| {
            std::thread::spawn(move || {
                for round in 1..=ROUNDS {
                    for at in (lane..PAGES).step_by(4) {
                        write(start + (at * PAGE) as u64, round);
                    }
                }
            })
        })
        .collect();
    // A copy kept current by what is found, read after it was protected.
    let mut copy = vec![0; PAGES];
    let mut update = || {
        for at in written(memory, true) {
            copy[at] = memory.touch(at);
        }
    };
    while writers.iter().any(|thread| !thread.is_finished()) {
        update();
    }
    update();
    writers.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(copy, vec![ROUNDS; PAGES]);
    target.assert_silent();
}

#[test]
fn a_child_is_not_tracked() {
    let _alone = alone();
    if !ready() {
        return;
    }
    let target = tracked(Mapping::anonymous(2));
    let (uffd, memory) = (&target.uffd, &target.memory);
    write(memory.at(0), 1);
    uffd.protect(memory.start, memory.bytes()).unwrap();
    let address = memory.at(0);
    let child = forking(move || i32::from(touch(address))).join().unwrap();
    let scan = Scan { all_of: Categories::WPALLOWED, ..Scan::default() };
    let pagemap = Pagemap::of(child.pid).unwrap();
    assert_eq!(pagemap.scan(memory.at(0), memory.at(2), &scan).unwrap(), []);
    assert!(!pagemap.entries(memory.at(0), 1).unwrap()[0].write_protected());
    assert_eq!(child.end(), Ok(1));
    // And the parent is, still.
    assert_eq!(written(memory, false), []);
    write(memory.at(0), 2);
    assert_eq!(written(memory, false), [0]);
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("WP_ASYNC") {
        assert_errno(open().handshake(Features::WP_ASYNC), Errno::INVAL);
    }
}
