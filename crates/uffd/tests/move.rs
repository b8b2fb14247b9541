//! MOVE: pages moved within a process, without copying. Anonymous memory only.

mod common;

use common::*;
use rustix::mm::{mlock, mprotect, munlock, Advice, MprotectFlags};
use uffd::{
    Categories, Cause, Errno, Event, Features, How, Operations, Pagemap, RegisterMode, Scan,
};

/// Pages numbered from 1 on; the kernel moves only what belongs to this process alone, which pages that a
/// forked child had, however shortly, may not.
fn numbered(pages: usize) -> Mapping {
    let source = Mapping::anonymous(pages);
    (0..pages).for_each(|at| write(source.at(at), at as u8 + 1));
    source
}

fn frames(memory: &Mapping) -> Vec<u64> {
    let entries = Pagemap::of_self().unwrap().entries(memory.start, memory.len / PAGE).unwrap();
    entries.iter().map(|entry| entry.frame()).collect()
}

#[test]
fn a_fault_is_ended_by_moving_the_page_there() {
    let _alone = alone();
    if !need("MOVE") {
        return;
    }
    let memory = Mapping::anonymous(4);
    let uffd = negotiated(Features::NONE);
    let operations = uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    assert!(operations.contains(Operations::MOVE));
    let target = Registered { uffd, memory };
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = numbered(4);
    let were = frames(&source);
    for at in 0..3 {
        let thread = toucher(memory.at(at));
        target.assert_fault(memory.at(at), Cause::Missing);
        assert_done(uffd.move_pages(memory.at(at), source.at(at), PAGE as u64), PAGE);
        assert_eq!(thread.join().unwrap(), at as u8 + 1);
    }
    let thread = toucher(memory.at(3));
    target.assert_fault(memory.at(3), Cause::Missing);
    let moved = uffd.move_with(memory.at(3), source.at(3), PAGE as u64, How::DONT_WAKE);
    assert_done(moved, PAGE);
    assert_eq!(waiters(uffd), 1);
    uffd.wake(memory.at(3), PAGE as u64).unwrap();
    assert_eq!(thread.join().unwrap(), 4);
    // The very pages (root sees their numbers), and nothing is left where they were.
    assert_eq!(frames(memory), were);
    assert!((0..4).all(|at| source.touch(at) == 0));
    target.assert_silent();
}

#[test]
fn what_is_there_already_and_what_is_not_there() {
    let _alone = alone();
    if !need("MOVE") {
        return;
    }
    let target = Registered::anonymous(4, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = numbered(4);
    assert_done(uffd.copy(memory.at(2), &page(9)), PAGE);
    let moved = uffd.move_pages(memory.at(2), source.at(2), PAGE as u64);
    assert_stopped(moved, 0, Errno::EXIST);
    assert_stopped(
        uffd.move_pages(memory.at(0), source.at(0), 4 * PAGE as u64),
        2 * PAGE,
        Errno::AGAIN,
    );
    assert_eq!([0, 1, 2].map(|at| memory.touch(at)), [1, 2, 9]);
    assert_eq!([2, 3].map(|at| source.touch(at)), [3, 4], "what was not moved is where it was");

    // Holes of the source.
    let target = Registered::anonymous(3, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = Mapping::anonymous(3);
    write(source.at(0), 1);
    write(source.at(2), 3);
    assert_stopped(uffd.move_pages(memory.at(1), source.at(1), PAGE as u64), 0, Errno::NOENT);
    let moved = uffd.move_pages(memory.at(0), source.at(0), 3 * PAGE as u64);
    assert_stopped(moved, PAGE, Errno::AGAIN);
    let rest = uffd.move_with(memory.at(1), source.at(1), 2 * PAGE as u64, How::HOLES);
    assert_done(rest, 2 * PAGE);
    assert_eq!([0, 2].map(|at| memory.touch(at)), [1, 3]);
    let thread = toucher(memory.at(1));
    target.assert_fault(memory.at(1), Cause::Missing);
    assert_done(uffd.zeropage(memory.at(1), PAGE as u64), PAGE);
    assert_eq!(thread.join().unwrap(), 0, "a hole moved is a hole");
}

/// A huge page moves as one where it fits, and is split where it does not.
#[test]
fn huge_pages_move_whole_or_are_split() {
    let _alone = alone();
    if !need("MOVE") || !need("PAGEMAP_SCAN") {
        return;
    }
    let source = Mapping::transparent(2);
    (0..1024).for_each(|at| write(source.at(at), (at % 255) as u8 + 1));
    if !is_huge(&source) {
        return;
    }
    let huge = HUGE as u64;
    let target = Registered::over(Mapping::transparent(2), Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let thread = toucher(memory.start + 77 * PAGE as u64);
    target.assert_fault(memory.start + 77 * PAGE as u64, Cause::Missing);
    assert_done(uffd.move_pages(memory.start, source.start, huge), HUGE);
    assert_eq!(thread.join().unwrap(), 78);
    let scan = Scan { all_of: Categories::HUGE, ..Scan::default() };
    let whole = Pagemap::of_self().unwrap().scan(memory.start, memory.start + huge, &scan).unwrap();
    assert_eq!(whole.len(), 1, "still one huge page");
    // Half of the other one.
    let second = source.at(512);
    assert_done(uffd.move_pages(memory.at(512), second, huge / 2), HUGE / 2);
    assert!((512..768).all(|at| memory.touch(at) == (at % 255) as u8 + 1));
    assert!((512..768).all(|at| source.touch(at) == 0));
    assert!((768..1024).all(|at| source.touch(at) == (at % 255) as u8 + 1));
    // And the rest of it, to a place that is not aligned alike.
    let other = Registered::anonymous(257, Features::NONE);
    let moved = other.uffd.move_pages(other.memory.at(1), source.at(768), huge / 2);
    assert_done(moved, HUGE / 2);
    assert!((0..256).all(|at| other.memory.touch(at + 1) == ((at + 768) % 255) as u8 + 1));
}

/// Whether it is in huge pages; says so if it is not.
fn is_huge(memory: &Mapping) -> bool {
    let scan = Scan { all_of: Categories::HUGE, ..Scan::default() };
    let end = memory.start + memory.bytes();
    let found = Pagemap::of_self().unwrap().scan(memory.start, end, &scan).unwrap();
    let all = found.iter().map(|region| region.end - region.start).sum::<u64>() == memory.bytes();
    if !all {
        skip(
            "transparent huge pages",
            "the kernel gave none; see /sys/kernel/mm/transparent_hugepage",
        );
    }
    all
}

/// Pages that somebody else has too stay where they are.
#[test]
fn pages_of_a_child_and_pinned_pages_are_busy() {
    let _alone = alone();
    if !need("MOVE") {
        return;
    }
    let target = Registered::anonymous(2, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = numbered(2);
    let child = forking(|| 0).join().unwrap();
    assert_stopped(uffd.move_pages(memory.at(0), source.at(0), PAGE as u64), 0, Errno::BUSY);
    assert_eq!(child.end(), Ok(0));
    // Alone again, but it has to be written to before the kernel knows.
    write(source.at(0), 5);
    assert_done(uffd.move_pages(memory.at(0), source.at(0), PAGE as u64), PAGE);
    assert_eq!(memory.touch(0), 5);
    // A page that the child never got.
    source.advise(Advice::LinuxDontFork);
    write(source.at(1), 6);
    let child = forking(|| 0).join().unwrap();
    if let Some(pin) = Pin::of(source.at(1), PAGE as u64) {
        assert_stopped(uffd.move_pages(memory.at(1), source.at(1), PAGE as u64), 0, Errno::BUSY);
        pin.end();
    }
    assert_done(uffd.move_pages(memory.at(1), source.at(1), PAGE as u64), PAGE);
    assert_eq!(memory.touch(1), 6);
    assert_eq!(child.end(), Ok(0));
}

/// Only the process itself moves its pages, not whoever serves it.
#[test]
fn another_processs_pages_are_not_moved() {
    let _alone = alone();
    if !need("MOVE") || !need("EVENT_FORK") {
        return;
    }
    let target = Registered::anonymous(1, Features::EVENT_FORK);
    let source = numbered(1);
    let thread = forking(|| 0);
    let Event::Fork(child) = next_event(&target.uffd) else { panic!("no fork") };
    let process = thread.join().unwrap();
    let moved = child.move_pages(target.memory.start, source.start, PAGE as u64);
    assert_stopped(moved, 0, Errno::INVAL);
    assert_done(child.copy(target.memory.start, &page(1)), PAGE);
    assert_eq!(process.end(), Ok(0));
}

/// Both are locked into memory, or none.
#[test]
fn locked_memory_moves_to_locked_memory() {
    let _alone = alone();
    if !need("MOVE") {
        return;
    }
    let target = Registered::anonymous(1, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = numbered(1);
    let lock = |memory: &Mapping| {
        // SAFETY: memory of this test; MCL_ONFAULT touches none of it.
        let locked = unsafe { libc::mlock2(memory.start as *const _, memory.len, 1) };
        assert_eq!(locked, 0, "{}", std::io::Error::last_os_error());
    };
    // SAFETY: memory of this test.
    unsafe { mlock(source.start as *mut _, source.len).unwrap() };
    let moved = || uffd.move_pages(memory.start, source.start, PAGE as u64);
    assert_stopped(moved(), 0, Errno::INVAL);
    lock(memory);
    assert_done(moved(), PAGE);
    assert_eq!(memory.touch(0), 1);
    // SAFETY: memory of this test.
    unsafe { munlock(source.start as *mut _, source.len).unwrap() };
}

#[test]
fn what_cannot_be_moved() {
    let _alone = alone();
    if !need("MOVE") {
        return;
    }
    let len = PAGE as u64;
    let target = Registered::anonymous(2, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let source = numbered(2);
    // Memory of another kind, from and to.
    on_each(&[Kind::SHMEM, Kind::HUGETLB].concat(), 1, |kind, other| {
        write(other.start, 1);
        let moved = uffd.move_pages(memory.start, other.start, len);
        // A private mapping of a file has anonymous pages, but is none.
        assert_stopped(moved, 0, Errno::INVAL);
        let other = Registered::over(other, Features::NONE);
        let moved = other.uffd.move_pages(other.memory.start, source.start, other.memory.pages(1));
        assert!(matches!(moved.errno, Some(Errno::INVAL | Errno::NOENT)), "{kind:?}: {moved:?}");
    });
    // What is registered with nobody, or with somebody else: unlike COPY, it is only for its own.
    let plain = Mapping::anonymous(1);
    assert_stopped(uffd.move_pages(plain.start, source.start, len), 0, Errno::INVAL);
    let others = Registered::anonymous(1, Features::NONE);
    assert_stopped(uffd.move_pages(others.memory.start, source.start, len), 0, Errno::INVAL);
    assert_done(uffd.copy(others.memory.start, &page(1)), PAGE);
    // What is not mapped, or ends too soon.
    let unmapped = Mapping::anonymous(1).start;
    let moved = uffd.move_pages(memory.start, unmapped, len);
    assert!(matches!(moved.errno, Some(Errno::INVAL | Errno::NOENT)), "{moved:?}");
    let moved = uffd.move_pages(memory.at(1), source.start, 2 * len);
    assert!(matches!(moved.errno, Some(Errno::INVAL | Errno::NOENT)), "{moved:?}");
    // Unaligned, nothing at all.
    for (to, from, len) in [
        (memory.start + 1, source.start, len),
        (memory.start, source.start + 1, len),
        (memory.start, source.start, 0),
        (memory.start, source.start, 100),
    ] {
        assert_stopped(uffd.move_pages(to, from, len), 0, Errno::INVAL);
    }
    // Onto itself is nothing special: a hole where it is empty, there already where it is not.
    let moved = || uffd.move_pages(memory.start, memory.start, len);
    assert_stopped(moved(), 0, Errno::NOENT);
    assert_done(uffd.copy(memory.start, &page(1)), PAGE);
    assert_stopped(moved(), 0, Errno::EXIST);
    memory.assert_content(0, 1);
    // What it has no word for.
    let moved = uffd.move_with(memory.start, source.start, len, How::PROTECTED);
    assert_stopped(moved, 0, Errno::INVAL);
    // Other access.
    // SAFETY: memory of this test.
    unsafe { mprotect(source.start as *mut _, source.len, MprotectFlags::READ).unwrap() };
    assert_stopped(uffd.move_pages(memory.at(1), source.start, len), 0, Errno::INVAL);
    assert_eq!([0, 1].map(|at| source.touch(at)), [1, 2], "all is where it was");
}

#[test]
fn a_kernel_without_it_says_so() {
    if lacking("MOVE") {
        let target = Registered::anonymous(1, Features::NONE);
        let source = numbered(1);
        let moved = target.uffd.move_pages(target.memory.start, source.start, PAGE as u64);
        assert_stopped(moved, 0, Errno::INVAL);
    }
}
