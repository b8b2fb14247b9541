//! PAGEMAP_SCAN: finding pages by what is true of them; and the entries of the pagemap, which are older.

mod common;

use common::*;
use rustix::mm::{Advice, MapFlags};
use uffd::{Categories, Errno, Features, PageRegion, Pagemap, RegisterMode, Scan};

fn scan(memory: &Mapping, from: usize, to: usize, scan: &Scan) -> Vec<PageRegion> {
    Pagemap::of_self().unwrap().scan(memory.at(from), memory.at(to), scan).unwrap()
}

/// Regions as page numbers.
fn numbers(memory: &Mapping, regions: &[PageRegion]) -> Vec<(usize, usize)> {
    let number = |address: u64| (address - memory.start) as usize / memory.page;
    regions.iter().map(|region| (number(region.start), number(region.end))).collect()
}

/// Memory that is tracked, all of it protected.
fn tracked(memory: Mapping) -> Registered {
    let target = Registered::with(memory, Features::WP_ASYNC, RegisterMode::WP);
    target.uffd.protect(target.memory.start, target.memory.bytes()).unwrap();
    target
}

/// Whether memory that is not registered counts as written. It did until 7.3.
fn plain_is_written() -> bool {
    let memory = Mapping::anonymous(1);
    write(memory.start, 1);
    !scan(&memory, 0, 1, &WRITTEN).is_empty()
}

const WRITTEN: Scan = Scan {
    all_of: Categories::WRITTEN,
    any_of: Categories::NONE,
    inverted: Categories::NONE,
    reported: Categories::WRITTEN,
    protect: false,
    only_tracked: false,
    most_pages: 0,
};

#[test]
fn what_is_true_of_a_page() {
    if !need("PAGEMAP_SCAN") {
        return;
    }
    on_each(Kind::ALL, 4, |kind, memory| {
        write(memory.at(1), 1);
        write(memory.at(2), 1);
        let present = Scan { all_of: Categories::PRESENT, ..Scan::default() };
        let found = scan(&memory, 0, 4, &present);
        assert_eq!(numbers(&memory, &found), [(1, 3)]);
        let categories = Categories(found[0].categories);
        // A private page that was written is not the file's any more.
        assert_eq!(categories.contains(Categories::FILE), kind.is_shared(), "{categories:?}");
        assert_eq!(categories.contains(Categories::HUGE), kind.is_huge(), "{categories:?}");
        assert_eq!(categories.contains(Categories::WRITTEN), plain_is_written());
        let no = Categories::WPALLOWED | Categories::SWAPPED | Categories::PFNZERO;
        assert_eq!(categories & no, Categories::NONE);
        // The same, the other way round: what is not present.
        let absent = Scan { inverted: Categories::PRESENT, ..present };
        assert_eq!(numbers(&memory, &scan(&memory, 0, 4, &absent)), [(0, 1), (3, 4)]);
        // And all that there is, in pieces of the same kind.
        let all = scan(&memory, 0, 4, &Scan { reported: Categories::PRESENT, ..Scan::default() });
        assert_eq!(numbers(&memory, &all), [(0, 1), (1, 3), (3, 4)]);
        assert_eq!(all.iter().map(|region| region.categories).collect::<Vec<_>>(), [0, 8, 0]);
    });
}

#[test]
fn the_zero_page_and_private_pages_of_files() {
    if !need("PAGEMAP_SCAN") {
        return;
    }
    let memory = Mapping::anonymous(3);
    assert_eq!(memory.touch(0), 0);
    write(memory.at(1), 1);
    let zero = Scan { all_of: Categories::PFNZERO, ..Scan::default() };
    assert_eq!(numbers(&memory, &scan(&memory, 0, 3, &zero)), [(0, 1)]);
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let memory = Mapping::of(&program, 2, READ_WRITE, MapFlags::PRIVATE);
    memory.touch(0);
    memory.touch(1);
    write(memory.at(1), 1);
    let file = Scan { all_of: Categories::FILE | Categories::PRESENT, ..Scan::default() };
    assert_eq!(numbers(&memory, &scan(&memory, 0, 2, &file)), [(0, 1)]);
}

#[test]
fn all_of_any_of_and_none_of() {
    if !need("PAGEMAP_SCAN") || !need("WP_ASYNC") {
        return;
    }
    // Page 0 is empty and protected, 1 was written, 2 is there and protected, 3 is plain and empty.
    let target = tracked(Mapping::anonymous(4));
    let (uffd, memory) = (&target.uffd, &target.memory);
    uffd.unregister(memory.at(3), memory.pages(1)).unwrap();
    write(memory.at(1), 1);
    write(memory.at(2), 1);
    uffd.protect(memory.at(2), memory.pages(1)).unwrap();
    let (written, present) = (Categories::WRITTEN, Categories::PRESENT);
    let allowed = Categories::WPALLOWED;
    let none = Categories::NONE;
    let plain = plain_is_written();
    let either =
        |yes: &[(usize, usize)], no: &[(usize, usize)]| if plain { yes } else { no }.to_vec();
    for (all_of, any_of, inverted, expected) in [
        (written, none, none, either(&[(1, 2), (3, 4)], &[(1, 2)])),
        (written | present, none, none, vec![(1, 2)]),
        (none, written | present, none, either(&[(1, 4)], &[(1, 3)])),
        (written, none, written, either(&[(0, 1), (2, 3)], &[(0, 1), (2, 4)])),
        (written | present, none, written, vec![(2, 3)]),
        (none, written | present, written, either(&[(0, 3)], &[(0, 4)])),
        (allowed, none, none, vec![(0, 3)]),
        (allowed, none, allowed, vec![(3, 4)]),
        (allowed, written | present, none, vec![(1, 3)]),
        (none, none, none, vec![(0, 4)]),
    ] {
        let reported = Categories::SWAPPED;
        let asked = Scan { all_of, any_of, inverted, reported, ..Scan::default() };
        let mut found = scan(memory, 0, 4, &asked);
        found.dedup_by(|next, last| {
            last.end == next.start && {
                last.end = next.end;
                true
            }
        });
        assert_eq!(numbers(memory, &found), expected, "{asked:?}");
    }
}

#[test]
fn what_is_found_is_protected_in_the_same_pass() {
    if !need("PAGEMAP_SCAN") || !need("WP_ASYNC") {
        return;
    }
    on_each(Kind::ALL, 6, |kind, memory| {
        let target = tracked(memory);
        let memory = &target.memory;
        for at in [0, 2, 4, 5] {
            write(memory.at(at), 1);
        }
        let protect = Scan { protect: true, ..WRITTEN };
        assert_eq!(numbers(memory, &scan(memory, 0, 6, &WRITTEN)), [(0, 1), (2, 3), (4, 6)]);
        assert_eq!(numbers(memory, &scan(memory, 2, 5, &protect)), [(2, 3), (4, 5)]);
        assert_eq!(numbers(memory, &scan(memory, 0, 6, &WRITTEN)), [(0, 1), (5, 6)]);
        // So many at most, counted in pages of 4096 bytes.
        let (small, at_most) =
            ((memory.page / PAGE) as u64, |most_pages| Scan { most_pages, ..protect });
        assert_eq!(numbers(memory, &scan(memory, 0, 6, &at_most(small))), [(0, 1)]);
        assert_eq!(numbers(memory, &scan(memory, 0, 6, &at_most(2 * small))), [(5, 6)]);
        assert_eq!(scan(memory, 0, 6, &WRITTEN), []);
        if kind.is_huge() {
            // A part of a page is found, and is not protected.
            write(memory.at(0), 1);
            let (start, end) = (memory.start + PAGE as u64, memory.start + 3 * PAGE as u64);
            let found = Pagemap::of_self().unwrap().scan(start, end, &protect).unwrap();
            assert!(found.iter().all(|region| region.start >= start && region.end <= end));
            assert_eq!(numbers(memory, &scan(memory, 0, 6, &WRITTEN)), [(0, 1)]);
        }
        target.assert_silent();
    });
}

/// More regions than the kernel has room for in one call: the scan goes on by itself.
#[test]
fn a_result_of_many_regions_is_whole() {
    if !need("PAGEMAP_SCAN") || !need("WP_ASYNC") {
        return;
    }
    const PAGES: usize = 5000;
    let target = tracked(Mapping::anonymous(PAGES));
    let memory = &target.memory;
    for at in (0..PAGES).step_by(2) {
        write(memory.at(at), 1);
    }
    let every_other: Vec<_> = (0..PAGES).step_by(2).map(|at| (at, at + 1)).collect();
    assert_eq!(numbers(memory, &scan(memory, 0, PAGES, &WRITTEN)), every_other);
    // With a limit that lies beyond one call, and the rest with the next.
    let protect = Scan { protect: true, most_pages: 1000, ..WRITTEN };
    assert_eq!(numbers(memory, &scan(memory, 0, PAGES, &protect)), every_other[..1000]);
    let rest = Scan { most_pages: 0, ..protect };
    assert_eq!(numbers(memory, &scan(memory, 0, PAGES, &rest)), every_other[1000..]);
    assert_eq!(scan(memory, 0, PAGES, &WRITTEN), []);
    // One long region comes as one.
    (0..PAGES).for_each(|at| write(memory.at(at), 2));
    assert_eq!(numbers(memory, &scan(memory, 0, PAGES, &WRITTEN)), [(0, PAGES)]);
}

/// Ranges of several mappings, holes between them; and of none.
#[test]
fn what_is_not_mapped_is_passed_over() {
    if !need("PAGEMAP_SCAN") || !need("WP_ASYNC") {
        return;
    }
    let target = tracked(Mapping::anonymous(6));
    let (uffd, memory) = (&target.uffd, &target.memory);
    (0..6).for_each(|at| write(memory.at(at), 1));
    memory.unmapping(2, 1).join().unwrap();
    uffd.unregister(memory.at(4), memory.pages(1)).unwrap();
    let tracked = Scan { all_of: WRITTEN.all_of | Categories::WPALLOWED, ..WRITTEN };
    assert_eq!(numbers(memory, &scan(memory, 0, 6, &tracked)), [(0, 2), (3, 4), (5, 6)]);
    assert_eq!(scan(memory, 3, 3, &WRITTEN), [], "nothing at all");
    // Protecting passes over what is not tracked, unless that is to be an error.
    let protect = Scan { protect: true, ..WRITTEN };
    let insist = Scan { only_tracked: true, ..protect };
    let pagemap = Pagemap::of_self().unwrap();
    assert_errno(pagemap.scan(memory.at(3), memory.at(6), &insist), Errno::PERM);
    assert_eq!(numbers(memory, &scan(memory, 3, 6, &tracked)), [(5, 6)], "done until then");
    assert_eq!(numbers(memory, &scan(memory, 3, 6, &protect)), [(5, 6)], "nor is it found then");
    let plain: &[_] = if plain_is_written() { &[(4, 5)] } else { &[] };
    assert_eq!(numbers(memory, &scan(memory, 3, 6, &WRITTEN)), plain);
}

/// Protection that is not asynchronous is found too, but not set: its faults would wait for a handler.
#[test]
fn protection_with_a_handler_is_not_tracking() {
    if !need("PAGEMAP_SCAN") || !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let target = Registered::with(Mapping::anonymous(2), Features::NONE, RegisterMode::WP);
    let (uffd, memory) = (&target.uffd, &target.memory);
    (0..2).for_each(|at| write(memory.at(at), 1));
    uffd.protect(memory.at(0), memory.pages(1)).unwrap();
    assert_eq!(numbers(memory, &scan(memory, 0, 2, &WRITTEN)), [(1, 2)]);
    let insist = Scan { protect: true, only_tracked: true, ..WRITTEN };
    let outcome = Pagemap::of_self().unwrap().scan(memory.at(0), memory.at(2), &insist);
    assert_errno(outcome, Errno::PERM);
    let allowed = Scan { all_of: Categories::WPALLOWED, ..Scan::default() };
    assert_eq!(scan(memory, 0, 2, &allowed), []);
}

#[test]
fn what_cannot_be_asked() {
    if !need("PAGEMAP_SCAN") {
        return;
    }
    let memory = Mapping::anonymous(2);
    let pagemap = Pagemap::of_self().unwrap();
    let unknown = Scan { all_of: Categories(1 << 60), ..Scan::default() };
    assert_errno(pagemap.scan(memory.at(0), memory.at(2), &unknown), Errno::INVAL);
    assert_errno(pagemap.scan(memory.start + 1, memory.at(2), &WRITTEN), Errno::INVAL);
    assert_errno(pagemap.scan(memory.at(1), memory.at(0), &WRITTEN), Errno::FAULT);
    assert_eq!(pagemap.scan(memory.at(0), memory.at(2), &Scan::default()).unwrap().len(), 1);
}

#[test]
fn another_processs_pages_and_those_of_one_that_is_gone() {
    let _alone = alone();
    if !need("PAGEMAP_SCAN") {
        return;
    }
    let memory = Mapping::anonymous(3);
    write(memory.at(0), 1);
    let address = memory.at(2);
    let child = forking(move || {
        write(address, 1);
        0
    });
    let child = child.join().unwrap();
    let pagemap = Pagemap::of(child.pid).unwrap();
    let present = Scan { all_of: Categories::PRESENT, ..Scan::default() };
    let of_child = || pagemap.scan(memory.at(0), memory.at(3), &present);
    until("the child has written", || of_child().unwrap().len() == 2);
    assert_eq!(numbers(&memory, &of_child().unwrap()), [(0, 1), (2, 3)]);
    let entries = pagemap.entries(memory.start, 3).unwrap();
    assert_eq!(
        entries.iter().map(|entry| entry.present()).collect::<Vec<_>>(),
        [true, false, true]
    );
    assert!(!entries[0].exclusive() && entries[2].exclusive());
    assert_eq!(child.end(), Ok(0));
    assert!(pagemap.entries(memory.start, 3).unwrap().is_empty());
    assert_errno(of_child(), Errno::SRCH);
    assert_eq!(Pagemap::of(u32::MAX).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

/// Entries of 8 bytes, which every kernel has.
#[test]
fn entries_of_the_pagemap() {
    on_each(Kind::ALL, 3, |kind, memory| {
        write(memory.at(1), 1);
        let pagemap = Pagemap::of_self().unwrap();
        let entry = |at: usize| pagemap.entries(memory.at(at), 1).unwrap()[0];
        assert!(entry(1).present() && !entry(0).present() && !entry(2).present());
        assert_eq!(entry(1).file(), kind.is_shared());
        assert!(entry(1).exclusive());
        assert!(!entry(1).swapped() && !entry(1).write_protected() && !entry(1).guard());
        assert_eq!(
            (entry(0).frame(), entry(1).frame() != 0),
            (0, rustix::process::geteuid().is_root())
        );
        let count = memory.len / PAGE;
        assert_eq!(pagemap.entries(memory.start, count).unwrap().len(), count);
        assert_eq!(
            pagemap.entries(memory.start + 1, 1).unwrap_err().kind(),
            std::io::ErrorKind::InvalidInput
        );
        memory.advise(Advice::LinuxDontNeed);
        assert!(!entry(1).present());
    });
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("PAGEMAP_SCAN") {
        let memory = Mapping::anonymous(1);
        let outcome = Pagemap::of_self().unwrap().scan(memory.at(0), memory.at(1), &WRITTEN);
        assert_errno(outcome, Errno::NOTTY);
    }
}

/// Guard pages (6.13) are seen as such by the pagemap (6.15) and by scans (6.16). Touching one is no
/// fault that a userfaultfd would be told of. The zero page does not come there; but COPY puts memory
/// there, and the guard is gone (7.3 refuses that too).
#[test]
fn guard_pages() {
    const GUARD_INSTALL: i32 = 102;
    if running() < (6, 16) {
        return;
    }
    let target = Registered::anonymous(3, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    // SAFETY: a page of this test, which only the kernel touches from now on.
    let guarded = unsafe { libc::madvise(memory.at(1) as *mut _, PAGE, GUARD_INSTALL) };
    assert_eq!(guarded, 0, "{}", std::io::Error::last_os_error());
    let entries = Pagemap::of_self().unwrap().entries(memory.start, 3).unwrap();
    let guard: Vec<bool> = entries.iter().map(|entry| entry.guard()).collect();
    assert_eq!(guard, [false, true, false]);
    if need("PAGEMAP_SCAN") {
        let asked = Scan { all_of: Categories::GUARD, ..Scan::default() };
        assert_eq!(numbers(memory, &scan(memory, 0, 3, &asked)), [(1, 2)]);
    }
    assert_errno(touch_in_kernel(memory.at(1)), Errno::FAULT);
    target.assert_silent();
    assert_stopped(uffd.zeropage(memory.at(1), PAGE as u64), 0, Errno::EXIST);
    assert_errno(touch_in_kernel(memory.at(1)), Errno::FAULT);
    match uffd.copy(memory.at(1), &page(1)).errno {
        None => memory.assert_content(1, 1),
        Some(errno) => {
            assert_eq!(errno, Errno::EXIST);
            assert_errno(touch_in_kernel(memory.at(1)), Errno::FAULT);
        }
    }
}
