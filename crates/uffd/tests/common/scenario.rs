//! What holds on every kind of memory, so that the files of several features run the same.

use rustix::mm::Advice;
use uffd::{Cause, Errno, Features, How, Operations, RegisterMode};

use super::*;

/// Missing pages: faults, copying, the zero page, and what is refused.
pub fn missing(kind: Kind, memory: Mapping) {
    let uffd = negotiated(Features::NONE);
    let operations = uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    assert!(operations.contains(Operations::WAKE | Operations::COPY), "{operations:?}");
    assert_eq!(operations.contains(Operations::ZEROPAGE), !kind.is_huge(), "{operations:?}");
    let target = Registered { uffd, memory };
    let (uffd, memory) = (&target.uffd, &target.memory);

    // A reading thread gets what was copied, whole.
    let thread = toucher(memory.at(1) + 17);
    let (address, flags) = next_fault(uffd);
    assert_eq!((address, flags), (memory.at(1), 0), "rounded down to the page");
    assert_done(uffd.copy(memory.at(1), &memory.filled(0x51)), memory.page);
    assert_eq!(thread.join().unwrap(), 0x51);
    memory.assert_content(1, 0x51);

    // A writing one says so, and writes to what was copied. It is not woken if that is wished.
    let thread = writer(memory.at(2), 0xAB);
    assert_eq!(next_fault(uffd), (memory.at(2), uffd::abi::fault::WRITE));
    assert_done(uffd.copy_with(memory.at(2), &memory.filled(0x52), How::DONT_WAKE), memory.page);
    assert_eq!(waiters(uffd), 1);
    uffd.wake(memory.at(2), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.content(2)[..2], [0xAB, 0x52]);

    // What is there is there.
    assert_stopped(uffd.copy(memory.at(1), &memory.filled(1)), 0, Errno::EXIST);
    memory.assert_content(1, 0x51);
    let two = memory.filled(0x50).repeat(2);
    assert_stopped(uffd.copy(memory.at(0), &two), memory.page, Errno::AGAIN);
    memory.assert_content(0, 0x50);

    // The kernel's faults are faults too.
    let address = memory.at(3);
    let thread = std::thread::spawn(move || touch_in_kernel(address).unwrap());
    target.assert_fault(memory.at(3), Cause::Missing);
    if kind.is_huge() {
        assert_stopped(uffd.zeropage(memory.at(3), memory.pages(1)), 0, Errno::INVAL);
        assert_done(uffd.copy(memory.at(3), &memory.filled(0)), memory.page);
        // Nor can a part of a page be filled.
        assert_stopped(uffd.copy(memory.at(3), &page(1)), 0, Errno::INVAL);
        assert_stopped(uffd.copy(memory.at(1) + PAGE as u64, &memory.filled(1)), 0, Errno::INVAL);
    } else {
        assert_done(uffd.zeropage_with(memory.at(3), memory.pages(1), How::DONT_WAKE), memory.page);
        assert_eq!(waiters(uffd), 1);
        assert_stopped(uffd.zeropage(memory.at(3), memory.pages(1)), 0, Errno::EXIST);
        assert_eq!(waiters(uffd), 1, "EEXIST wakes nobody");
        uffd.wake(memory.at(3), memory.pages(1)).unwrap();
    }
    assert_eq!(thread.join().unwrap(), 0);
    memory.assert_content(3, 0);
    target.assert_silent();

    // What this range was not registered for.
    for errno in [
        uffd.copy_with(memory.at(0), &memory.filled(1), How::PROTECTED).errno,
        uffd.protect(memory.at(0), memory.pages(1)).err().and_then(|e| Errno::from_io_error(&e)),
    ] {
        assert!(matches!(errno, Some(Errno::INVAL | Errno::NOENT)), "{errno:?}");
    }
}

/// The page cache is filled by what one mapping gets, and what it has no mapping gets.
pub fn shared_page_cache(kind: Kind, memory: Mapping) {
    let target = Registered::over(memory, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let other = memory.again();
    if kind.is_shared() {
        assert_done(uffd.copy(memory.at(0), &memory.filled(7)), memory.page);
        other.assert_content(0, 7);
        // What the cache has is not missing: it is mapped without a word.
        write(other.at(1), 8);
        assert_eq!(memory.touch(1), 8);
        assert_stopped(uffd.copy(memory.at(1), &memory.filled(9)), 0, Errno::EXIST);
        target.assert_silent();
        // Also where it is there, and not mapped here yet.
        write(other.at(2), 10);
        assert_stopped(uffd.copy(memory.at(2), &memory.filled(11)), 0, Errno::EXIST);
        assert_eq!(memory.touch(2), 10);
    } else {
        // A private page is nobody else's.
        assert_done(uffd.copy(memory.at(0), &memory.filled(7)), memory.page);
        other.assert_content(0, 0);
        // What the cache has is not missing here either.
        write(other.at(1), 8);
        assert_eq!(memory.touch(1), 8);
        target.assert_silent();
        // But it may be covered, as long as it is not mapped.
        write(other.at(2), 10);
        assert_done(uffd.copy(memory.at(2), &memory.filled(11)), memory.page);
        memory.assert_content(2, 11);
        assert_eq!(other.touch(2), 10);
    }
}

/// Write protection of pages that are there: faults, taking it back, arriving protected, the pagemap.
pub fn write_protection(memory: Mapping, features: Features) {
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(memory, features, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);

    // Protected pages are read as ever, and writing waits until it is allowed.
    assert_done(uffd.copy(memory.at(0), &memory.filled(1).repeat(2)), 2 * memory.page);
    assert!(!protected(memory.at(0)));
    uffd.protect(memory.at(0), memory.pages(2)).unwrap();
    assert!(protected(memory.at(0)) && protected(memory.at(1)));
    assert_eq!(memory.touch(0), 1);
    let thread = writer(memory.at(0) + 5, 0xAA);
    let (address, flags) = next_fault(uffd);
    assert_eq!((address, Cause::of(flags)), (memory.at(0), Cause::WriteProtected));
    assert_ne!(flags & uffd::abi::fault::WRITE, 0);
    assert_eq!(memory.touch(0), 1, "not written yet");
    // Not woken if that is wished, and woken by waking.
    uffd.unprotect_with(memory.at(0), memory.pages(1), How::DONT_WAKE).unwrap();
    assert_eq!(waiters(uffd), 1);
    assert!(!protected(memory.at(0)) && protected(memory.at(1)));
    uffd.wake(memory.at(0), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(touch(memory.at(0) + 5), 0xAA);
    // And woken by itself.
    let thread = writer(memory.at(1), 0xBB);
    target.assert_fault(memory.at(1), Cause::WriteProtected);
    uffd.unprotect(memory.at(1), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.touch(1), 0xBB);

    // The kernel's writes are caught too.
    uffd.protect(memory.at(1), memory.pages(1)).unwrap();
    let address = memory.at(1);
    let thread = std::thread::spawn(move || write_in_kernel(address, 0xCC).unwrap());
    target.assert_fault(memory.at(1), Cause::WriteProtected);
    uffd.unprotect(memory.at(1), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.touch(1), 0xCC);

    // A page arrives protected: the write that waits for it is caught at once.
    let thread = writer(memory.at(2), 0xDD);
    target.assert_fault(memory.at(2), Cause::Missing);
    assert_done(uffd.copy_with(memory.at(2), &memory.filled(3), How::PROTECTED), memory.page);
    assert!(protected(memory.at(2)));
    target.assert_fault(memory.at(2), Cause::WriteProtected);
    assert_eq!(memory.touch(2), 3);
    // Protecting what is protected already is nothing new, and so is the opposite.
    uffd.protect(memory.at(2), memory.pages(1)).unwrap();
    assert_eq!(waiters(uffd), 1);
    uffd.unprotect(memory.at(2), memory.pages(1)).unwrap();
    uffd.unprotect(memory.at(2), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.touch(2), 0xDD);
    target.assert_silent();

    // Unregistering takes it back, and wakes.
    uffd.protect(memory.at(0), memory.pages(3)).unwrap();
    let thread = writer(memory.at(1), 0xEE);
    target.assert_fault(memory.at(1), Cause::WriteProtected);
    uffd.unregister(memory.start, memory.bytes()).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.touch(1), 0xEE);
    assert!(!protected(memory.at(0)));
    assert_errno(uffd.protect(memory.at(0), memory.pages(1)), Errno::NOENT);
}

/// What a child sees of its parent's protection: nothing, unless EVENT_FORK was negotiated; of a page that
/// is there, and of one that was. `pinned` has the page copied in the fork itself.
pub fn protection_and_fork(memory: Mapping, with_event: bool, pinned: bool) {
    let features = match with_event {
        true => Features::EVENT_FORK,
        false => Features::NONE,
    };
    write(memory.at(0), 5);
    let target = Registered::with(memory, features, RegisterMode::WP);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let pin = match pinned {
        true => match Pin::of(memory.at(0), memory.pages(1)) {
            None => return,
            pin => pin,
        },
        false => None,
    };
    uffd.protect(memory.at(0), memory.pages(1)).unwrap();
    for zapped in [false, true] {
        if zapped {
            // Out of the page table, where the kernel can: protection stays in its place.
            let file = memory.file.is_some();
            memory.advise(if file { Advice::LinuxDontNeed } else { Advice::LinuxPageOut });
        }
        let thread = forking(|| 0);
        let child_uffd = with_event.then(|| match next_event(uffd) {
            Event::Fork(child) => child,
            other => panic!("{other:?}"),
        });
        let child = thread.join().unwrap();
        let entries = Pagemap::of(child.pid).unwrap().entries(memory.at(0), 1).unwrap();
        assert_eq!(entries[0].write_protected(), with_event, "in the child: {:?}", entries[0]);
        assert!(protected(memory.at(0)), "in the parent");
        drop(child_uffd);
        assert_eq!(child.end(), Ok(0));
    }
    if let Some(pin) = pin {
        pin.end();
    }
    // The parent's write is still caught.
    let thread = writer(memory.at(0), 6);
    target.assert_fault(memory.at(0), Cause::WriteProtected);
    uffd.unprotect(memory.at(0), memory.pages(1)).unwrap();
    thread.join().unwrap();
    assert_eq!(memory.touch(0), 6);
}

/// Minor faults: pages that the cache has, mapped when they are asked for.
pub fn minor(kind: Kind, memory: Mapping, protected_too: bool) {
    let mut mode = RegisterMode::MINOR;
    if protected_too {
        mode = mode | RegisterMode::WP;
    }
    let features = if protected_too { Features::WP_HUGETLBFS_SHMEM } else { Features::NONE };
    let uffd = negotiated(features);
    let operations = uffd.register(memory.start, memory.bytes(), mode).unwrap();
    assert!(operations.contains(Operations::WAKE | Operations::CONTINUE), "{operations:?}");
    assert_eq!(operations.contains(Operations::WRITEPROTECT), protected_too);
    let target = Registered { uffd, memory };
    let (uffd, memory) = (&target.uffd, &target.memory);
    let how = if protected_too { How::PROTECTED } else { How::NONE };

    // Filling the cache through another mapping makes no fault.
    let other = memory.again();
    for at in 0..4 {
        write(other.at(at), at as u8 + 1);
    }
    target.assert_silent();
    for at in 0..3 {
        let thread = toucher(memory.at(at));
        target.assert_fault(memory.at(at), Cause::Minor);
        // What is in the cache may still be changed by who knows.
        write(other.at(at), !(at as u8));
        assert_done(uffd.continue_with(memory.at(at), memory.pages(1), how), memory.page);
        assert_eq!(thread.join().unwrap(), !(at as u8));
        assert_eq!(protected(memory.at(at)), protected_too);
    }
    // Twice is EEXIST, which wakes nobody; DONT_WAKE neither.
    assert_stopped(uffd.continue_(memory.at(0), memory.pages(1)), 0, Errno::EXIST);
    assert_stopped(uffd.continue_(memory.at(2), memory.pages(2)), 0, Errno::EXIST);
    let thread = writer(memory.at(3), 0xF3);
    let (address, flags) = next_fault(uffd);
    assert_eq!((address, Cause::of(flags)), (memory.at(3), Cause::Minor));
    let quiet = how | How::DONT_WAKE;
    assert_done(uffd.continue_with(memory.at(3), memory.pages(1), quiet), memory.page);
    assert_eq!(waiters(uffd), 1);
    uffd.wake(memory.at(3), memory.pages(1)).unwrap();
    if protected_too {
        target.assert_fault(memory.at(3), Cause::WriteProtected);
        assert_eq!(other.touch(3), 4, "not written yet");
        uffd.unprotect(memory.at(3), memory.pages(1)).unwrap();
    }
    thread.join().unwrap();
    assert_eq!(memory.touch(3), 0xF3);
    // One page, two mappings; a private one copies it with the first write.
    assert_eq!(other.touch(3), if kind.is_shared() { 0xF3 } else { 4 });
    // What the cache has not got is no minor fault: it is missing, which was not asked for.
    assert_eq!(memory.touch(4), 0);
    target.assert_silent();
}

/// Registered with both, a page is missing until the cache has it, and minor from then on.
pub fn missing_and_minor(kind: Kind, memory: Mapping) {
    let mode = RegisterMode::MISSING | RegisterMode::MINOR;
    let target = Registered::with(memory, Features::NONE, mode);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let other = memory.again();
    write(other.at(0), 1);
    let thread = toucher(memory.at(0));
    target.assert_fault(memory.at(0), Cause::Minor);
    // A private mapping may have a page of its own instead of the cached one.
    let copied = uffd.copy(memory.at(0), &memory.filled(2));
    let expected = if kind.is_shared() {
        assert_stopped(copied, 0, Errno::EXIST);
        assert_done(uffd.continue_(memory.at(0), memory.pages(1)), memory.page);
        1
    } else {
        assert_done(copied, memory.page);
        2
    };
    assert_eq!(thread.join().unwrap(), expected);
    let thread = toucher(memory.at(1));
    target.assert_fault(memory.at(1), Cause::Missing);
    assert_stopped(uffd.continue_(memory.at(1), memory.pages(1)), 0, Errno::FAULT);
    assert_eq!(waiters(uffd), 1);
    assert_done(uffd.copy(memory.at(1), &memory.filled(3)), memory.page);
    assert_eq!(thread.join().unwrap(), 3);
    assert_eq!(other.touch(1), if kind.is_shared() { 3 } else { 0 });
    target.assert_silent();
}
