//! Registering: which memory takes which modes and what works on it then, and what is refused.

mod common;

use std::os::fd::AsRawFd;

use common::*;
use rustix::mm::{mmap_anonymous, munmap, MapFlags, ProtFlags};
use uffd::{Cause, Errno, Features, Operations, RegisterMode, Userfaultfd};

const MISSING: RegisterMode = RegisterMode::MISSING;

/// Whether this kernel has a mode on memory of this kind.
fn accepts(kind: Kind, mode: RegisterMode) -> bool {
    let wp = support().has(match kind {
        Kind::Anonymous => "PAGEFAULT_FLAG_WP",
        _ => "WP_HUGETLBFS_SHMEM",
    });
    let minor = match kind {
        Kind::Anonymous => false,
        kind if kind.is_huge() => support().has("MINOR_HUGETLBFS"),
        _ => support().has("MINOR_SHMEM"),
    };
    mode != RegisterMode::NONE
        && (wp || !mode.contains(RegisterMode::WP))
        && (minor || !mode.contains(RegisterMode::MINOR))
}

#[test]
fn every_mode_on_every_kind_of_memory() {
    on_each(Kind::ALL, 1, |kind, memory| {
        for bits in 0..8 {
            let mode = RegisterMode(bits);
            let uffd = negotiated(Features::NONE);
            let outcome = uffd.register(memory.start, memory.bytes(), mode);
            if !accepts(kind, mode) {
                assert_errno(outcome, Errno::INVAL);
                continue;
            }
            let operations = outcome.unwrap_or_else(|error| panic!("{mode:?}: {error}"));
            let has = |operation| operations.contains(operation);
            println!("{mode:?}: {operations:?}");
            assert!(has(Operations::WAKE | Operations::COPY));
            assert_eq!(has(Operations::WRITEPROTECT), mode.contains(RegisterMode::WP));
            assert_eq!(has(Operations::CONTINUE), mode.contains(RegisterMode::MINOR));
            assert_eq!(has(Operations::ZEROPAGE), !kind.is_huge());
            assert!(support().has("POISON") || !has(Operations::POISON));
            uffd.unregister(memory.start, memory.bytes()).unwrap();
        }
        // A mode that nobody knows.
        let uffd = negotiated(Features::NONE);
        let unknown = RegisterMode(1 << 40);
        assert_errno(uffd.register(memory.start, memory.bytes(), unknown), Errno::INVAL);
        assert_errno(uffd.register(memory.start, memory.bytes(), MISSING | unknown), Errno::INVAL);
    });
}

#[test]
fn what_cannot_be_registered() {
    let uffd = negotiated(Features::NONE);
    let memory = Mapping::anonymous(4);
    let refused = |start, len| uffd.register(start, len, MISSING);
    assert_errno(refused(memory.start + 1, PAGE as u64), Errno::INVAL);
    assert_errno(refused(memory.start, 100), Errno::INVAL);
    assert_errno(refused(memory.start, 0), Errno::INVAL);
    assert_errno(refused(u64::MAX - 4095, PAGE as u64), Errno::INVAL);
    assert_errno(refused(0x1000_0000_0000_0000, PAGE as u64), Errno::INVAL);
    let unmapped = Mapping::anonymous(1).start;
    assert_errno(refused(unmapped, PAGE as u64), Errno::INVAL);
    // A private mapping of a file of a real file system: this very program.
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let program = Mapping::of(&program, 1, ProtFlags::READ, MapFlags::PRIVATE);
    assert_errno(refused(program.start, PAGE as u64), Errno::INVAL);
    // A shared mapping that can never be made writable.
    let file = memory_file(1);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let readable = std::fs::File::open(path).unwrap();
    let readable = Mapping::of(&readable, 1, ProtFlags::READ, MapFlags::SHARED);
    assert_errno(refused(readable.start, PAGE as u64), Errno::PERM);
    // A part of a huge page.
    on_each(Kind::HUGETLB, 1, |_, memory| {
        assert_errno(refused(memory.start, PAGE as u64), Errno::INVAL);
        assert_errno(refused(memory.start + PAGE as u64, PAGE as u64), Errno::INVAL);
    });
}

#[test]
fn what_can_be_registered() {
    let uffd = negotiated(Features::NONE);
    for protection in [ProtFlags::READ, ProtFlags::empty()] {
        let memory = Mapping::anonymous_with(1, protection);
        uffd.register(memory.start, PAGE as u64, MISSING).unwrap();
    }
    on_each(Kind::ALL, 1, |_, memory| {
        uffd.register(memory.start, memory.bytes(), MISSING).unwrap();
        // Again is no error.
        uffd.register(memory.start, memory.bytes(), MISSING).unwrap();
    });
}

/// Several mappings at once, of kinds that all take the mode, whatever lies between them.
#[test]
fn a_range_of_several_mappings_and_holes() {
    // Where the kernel puts nothing by itself, so that the holes stay holes.
    const PLACE: usize = 0x2000_0000_0000;
    let at = |page: usize| (PLACE + page * PAGE) as u64;
    let put = |page: usize, protection| {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: where nothing is mapped, else it fails.
        unsafe { mmap_anonymous(at(page) as *mut _, PAGE, protection, flags).unwrap() };
    };
    put(1, READ_WRITE);
    put(2, ProtFlags::READ);
    put(4, READ_WRITE);
    let uffd = negotiated(Features::NONE);
    // It only has to meet something.
    uffd.register(at(0), 6 * PAGE as u64, MISSING).unwrap();
    for page in [1, 2, 4] {
        assert_done(uffd.copy(at(page), &vec![page as u8; PAGE]), PAGE);
        assert_eq!(touch(at(page)), page as u8);
    }
    for page in [0, 3, 5] {
        assert_stopped(uffd.copy(at(page), &vec![1; PAGE]), 0, Errno::NOENT);
    }
    // But no operation crosses a border.
    assert_stopped(uffd.copy(at(1), &vec![1; 2 * PAGE]), 0, Errno::NOENT);
    uffd.unregister(at(0), 6 * PAGE as u64).unwrap();
    assert_errno(uffd.register(at(5), PAGE as u64, MISSING), Errno::INVAL);
    drop(uffd);
    // SAFETY: mapped above.
    unsafe { munmap(at(0) as *mut _, 6 * PAGE).unwrap() };
}

/// All or nothing: where one of the mappings is refused, none is registered.
#[test]
fn a_range_with_something_that_is_refused() {
    let memory = Mapping::anonymous(3);
    let (first, second) = (negotiated(Features::NONE), negotiated(Features::NONE));
    second.register(memory.at(2), memory.pages(1), MISSING).unwrap();
    assert_errno(first.register(memory.start, memory.bytes(), MISSING), Errno::BUSY);
    assert_stopped(first.copy(memory.at(0), &page(1)), 0, Errno::NOENT);
    second.unregister(memory.start, memory.bytes()).unwrap();
    first.register(memory.start, memory.bytes(), MISSING).unwrap();
}

#[test]
fn a_range_has_one_owner_until_it_is_unregistered() {
    on_each(Kind::ALL, 2, |_, memory| {
        let (first, second) = (negotiated(Features::NONE), negotiated(Features::NONE));
        let (start, len) = (memory.start, memory.bytes());
        first.register(start, len, MISSING).unwrap();
        assert_errno(second.register(start, len, MISSING), Errno::BUSY);
        first.unregister(start, len).unwrap();
        first.unregister(start, len).unwrap();
        second.register(start, len, MISSING).unwrap();
        assert_errno(first.unregister(start + 1, len), Errno::INVAL);
        assert_errno(first.unregister(start, 0), Errno::INVAL);
        // Closing is unregistering.
        drop(second);
        first.register(start, len, MISSING).unwrap();
    });
}

/// Has a range registered with a mode instead of what it has. 7.3 refuses to take a mode away while pages
/// may depend on it: EBUSY, and the range has to be unregistered.
fn register_instead(uffd: &Userfaultfd, start: u64, len: u64, mode: RegisterMode) {
    match uffd.register(start, len, mode) {
        Ok(_) => {}
        Err(refused) => {
            assert_eq!(Errno::from_io_error(&refused), Some(Errno::BUSY));
            assert!(running() > (6, 18), "{refused}");
            uffd.unregister(start, len).unwrap();
            uffd.register(start, len, mode).unwrap();
        }
    }
}

/// Fewer modes than there are change nothing (or are refused, from 7.3 on); others take their place.
#[test]
fn registering_again() {
    if !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let both = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(Mapping::anonymous(3), Features::NONE, both);
    let (uffd, memory) = (&target.uffd, &target.memory);
    match uffd.register(memory.start, memory.bytes(), MISSING) {
        Ok(operations) => assert!(!operations.contains(Operations::WRITEPROTECT), "as asked for"),
        refused => assert_errno(refused, Errno::BUSY),
    }
    assert_done(uffd.copy(memory.at(0), &page(1)), PAGE);
    uffd.protect(memory.at(0), memory.pages(1)).unwrap();
    let thread = writer(memory.at(0), 2);
    target.assert_fault(memory.at(0), Cause::WriteProtected);
    uffd.unprotect(memory.at(0), memory.pages(1)).unwrap();
    thread.join().unwrap();

    let target = Registered::anonymous(2, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    register_instead(uffd, memory.start, memory.bytes(), RegisterMode::WP);
    assert_eq!(memory.touch(0), 0, "missing pages are not reported any more");
    target.assert_silent();
    // A part of what is registered.
    register_instead(uffd, memory.at(1), memory.pages(1), MISSING);
    let thread = toucher(memory.at(1));
    target.assert_fault(memory.at(1), Cause::Missing);
    assert_done(uffd.zeropage(memory.at(1), memory.pages(1)), PAGE);
    thread.join().unwrap();
}

#[test]
fn unregistering_wakes_who_waits_and_the_memory_is_plain_again() {
    on_each(Kind::ALL, 2, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let memory = &target.memory;
        let thread = toucher(memory.at(1));
        assert_eq!(target.next_fault(), memory.at(1));
        target.uffd.unregister(memory.start, memory.bytes()).unwrap();
        assert_eq!(thread.join().unwrap(), 0);
        assert_eq!(memory.touch(0), 0);
        target.assert_silent();
    });
}
