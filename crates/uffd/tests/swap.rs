//! Pages that are swapped out and in again: write protection stays, and missing pages are missing.
//!
//! A page that is swapped out keeps its protection in the entry of the page table that says where it is;
//! one of a file, which has no such entry, in a marker (Linux ≥ 5.19).

mod common;
#[path = "common/swap.rs"]
mod swap;

use common::*;
use rustix::mm::Advice;
use swap::{swapped_bytes, under_limit, Limit, Swap};
use uffd::{
    Categories, Cause, Event, Features, MessageBuffer, PageRegion, Pagemap, RegisterMode, Scan,
    Userfaultfd,
};

const PAGES: usize = 16;
/// Hugetlbfs is never swapped out.
const KINDS: &[Kind] = &[Kind::Anonymous, Kind::Shmem, Kind::ShmemPrivate, Kind::Tmpfs];

fn swap_space(bytes: usize) -> Option<Swap> {
    match Swap::on(bytes) {
        Ok(swap) => Some(swap),
        Err(why) => {
            skip("swap space", &why);
            None
        }
    }
}

/// Bytes of a mapping that are swapped out: its page tables, and the file for what they do not have,
/// have places in the swap space instead. (Until somebody needs the memory the kernel has the pages too.)
fn swapped_of(memory: &Mapping) -> usize {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut bytes) = (false, 0);
    for line in text.lines() {
        let first = line.split(' ').next().unwrap();
        if let Some((start, _)) = first.split_once('-') {
            let start = u64::from_str_radix(start, 16).unwrap();
            inside = (memory.start..memory.start + memory.bytes()).contains(&start);
        } else if let (true, Some(swap)) = (inside, line.strip_prefix("Swap:")) {
            bytes += swap.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024;
        }
    }
    bytes
}

/// Swaps out all `pages` pages that are there. A page that somebody else looks at just then is passed over.
fn swap_out(memory: &Mapping, pages: usize) {
    until("all pages are swapped out", || {
        memory.advise(Advice::LinuxPageOut);
        swapped_of(memory) == pages * PAGE
    });
}

fn fill(memory: &Mapping) {
    (0..PAGES).for_each(|page| write(memory.at(page), page as u8 + 1));
}

#[test]
fn a_protected_page_that_was_swapped_out_is_still_protected() {
    if !need("PAGEFAULT_FLAG_WP") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    let _alone = alone();
    let Some(_swap) = swap_space(16 << 20) else { return };
    on_each(KINDS, PAGES, |_, memory| {
        fill(&memory);
        let target = Registered::with(memory, Features::WP_HUGETLBFS_SHMEM, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        uffd.protect(memory.start, memory.pages(PAGES - 1)).unwrap();
        swap_out(memory, PAGES);
        for page in 0..PAGES - 1 {
            assert!(protected(memory.at(page)), "page {page}, while it is out");
        }
        // Brought in by a read, and out again; or by the very write.
        for page in [1, 2] {
            assert_eq!(memory.touch(page), page as u8 + 1);
            assert!(protected(memory.at(page)), "page {page}, in again");
        }
        swap_out(memory, PAGES);
        assert_eq!(memory.touch(2), 3);
        for page in [0, 1, 2] {
            let address = memory.at(page);
            let writer = std::thread::spawn(move || write(address, 100));
            target.assert_fault(address, Cause::WriteProtected);
            assert_eq!(memory.touch(page), page as u8 + 1, "not written yet");
            uffd.unprotect(address, PAGE as u64).unwrap();
            writer.join().unwrap();
            assert_eq!(memory.touch(page), 100);
            assert!(!protected(address));
        }
        // What was not protected still is not; nor what was unprotected, when it has been out.
        swap_out(memory, PAGES);
        write(memory.at(PAGES - 1), 7);
        write(memory.at(0), 101);
        target.assert_silent();
        assert_eq!((memory.touch(PAGES - 1), memory.touch(0)), (7, 101));
        assert!(protected(memory.at(3)));
    });
}

#[test]
fn tracked_writes_are_found_among_swapped_pages() {
    if !need("WP_ASYNC") || !need("PAGEMAP_SCAN") {
        return;
    }
    let _alone = alone();
    let Some(_swap) = swap_space(16 << 20) else { return };
    on_each(KINDS, PAGES, |_, memory| {
        fill(&memory);
        let target = Registered::with(memory, Features::WP_ASYNC, RegisterMode::WP);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let written = || -> Vec<usize> {
            let written = Categories::WRITTEN;
            let scan = Scan { all_of: written, reported: written, ..Scan::default() };
            let end = memory.start + memory.bytes();
            let number = |address: u64| (address - memory.start) as usize / PAGE;
            let regions = Pagemap::of_self().unwrap().scan(memory.start, end, &scan).unwrap();
            let pages = |region: &PageRegion| number(region.start)..number(region.end);
            regions.iter().flat_map(pages).collect()
        };
        uffd.protect(memory.start, memory.bytes()).unwrap();
        swap_out(memory, PAGES);
        assert_eq!(written(), []);
        assert_eq!(memory.touch(4), 5);
        write(memory.at(3), 100);
        assert_eq!(written(), [3]);
        swap_out(memory, PAGES);
        assert_eq!(written(), [3], "out again");
        write(memory.at(4), 101);
        assert_eq!(written(), [3, 4]);
        assert_eq!((memory.touch(3), memory.touch(4), memory.touch(5)), (100, 101, 6));
        target.assert_silent();
    });
}

#[test]
fn a_page_that_was_swapped_out_is_not_missing() {
    let _alone = alone();
    let Some(_swap) = swap_space(16 << 20) else { return };
    on_each(KINDS, PAGES, |_, memory| {
        // A hole of a file is missing wherever it is mapped.
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_done(uffd.copy(memory.at(0), &page(1).repeat(PAGES - 1)), (PAGES - 1) * PAGE);
        swap_out(memory, PAGES - 1);
        for page in 0..PAGES - 1 {
            memory.assert_content(page, 1);
        }
        target.assert_silent();
        let reader = toucher(memory.at(PAGES - 1));
        target.assert_fault(memory.at(PAGES - 1), Cause::Missing);
        assert_done(uffd.copy(memory.at(PAGES - 1), &page(2)), PAGE);
        assert_eq!(reader.join().unwrap(), 2);
    });
}

/// Answers faults until told by a word in a pipe: missing pages get their number, protected ones are
/// noted and unprotected.
fn serve(uffd: &Userfaultfd, memory: &Mapping, stop: &std::fs::File) -> Vec<usize> {
    use rustix::event::{poll, PollFd, PollFlags};
    let mut buffer = MessageBuffer::new(16);
    let mut caught = Vec::new();
    loop {
        let mut watched = [PollFd::new(uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        poll(&mut watched, None).unwrap();
        if !watched[1].revents().is_empty() {
            return caught;
        }
        for event in uffd.read_events(&mut buffer).unwrap() {
            let Event::Fault { address, flags, .. } = event else { panic!("{event:?}") };
            let number = (address - memory.start) as usize / PAGE;
            if Cause::of(flags) == Cause::WriteProtected {
                caught.push(number);
                uffd.unprotect(address, PAGE as u64).unwrap();
            } else {
                assert_done(uffd.copy(address, &page(number as u8 | 1)), PAGE);
            }
        }
    }
}

/// Four times as much memory as the process may have: pages that are brought in push others out.
#[test]
fn pages_are_served_and_writes_are_caught_under_pressure() {
    const LIMIT: usize = 16 << 20;
    const PAGES: usize = 4 * LIMIT / PAGE;
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    if !under_limit() {
        let _alone = alone();
        let Some(_swap) = swap_space(96 << 20) else { return };
        match Limit::of(LIMIT) {
            Ok(limit) => limit.run("pages_are_served_and_writes_are_caught_under_pressure"),
            Err(why) => skip("a memory limit", &why),
        }
        return;
    }
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(Mapping::anonymous(PAGES), Features::NONE, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let (stop, stopped) = rustix::pipe::pipe().unwrap();
    let stop = std::fs::File::from(stop);
    let caught = std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(uffd, memory, &stop));
        // Each page once, in an order that jumps: 7919 is prime.
        let order = |at: usize| at * 7919 % PAGES;
        for page in (0..PAGES).map(order) {
            assert_eq!(memory.touch(page), page as u8 | 1, "page {page}");
        }
        assert!(swapped_bytes() > LIMIT, "{} bytes are swapped out", swapped_bytes());
        uffd.protect(memory.start, memory.bytes()).unwrap();
        for page in (0..PAGES).map(order) {
            match page % 3 {
                0 => write(memory.at(page) + 8, 100),
                _ => assert_eq!(memory.touch(page), page as u8 | 1, "page {page}"),
            }
        }
        for page in 0..PAGES {
            let written = touch(memory.at(page) + 8);
            assert_eq!(written, if page % 3 == 0 { 100 } else { page as u8 | 1 });
            assert_eq!(memory.touch(page), page as u8 | 1);
        }
        drop(stopped);
        server.join().unwrap()
    });
    let mut caught = caught;
    caught.sort_unstable();
    assert_eq!(caught, (0..PAGES).step_by(3).collect::<Vec<_>>(), "each write, once");
}
