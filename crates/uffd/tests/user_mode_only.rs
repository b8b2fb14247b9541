//! USER_MODE_ONLY: for everybody, but faults of the kernel fail with EFAULT instead of being told.

mod common;

use common::*;
use uffd::{Access, Cause, Errno, Features, How, Opening, RegisterMode, Userfaultfd};

fn user_mode_only(features: Features) -> Userfaultfd {
    let uffd = Userfaultfd::open(Opening::SystemCall(Access::UserModeOnly)).unwrap();
    uffd.handshake(features).unwrap();
    uffd
}

#[test]
fn missing_pages_are_told_to_programs_and_refused_to_the_kernel() {
    if !need("USER_MODE_ONLY") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let uffd = user_mode_only(Features::NONE);
        uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
        let target = Registered { uffd, memory };
        let (uffd, memory) = (&target.uffd, &target.memory);
        assert_errno(touch_in_kernel(memory.at(0)), Errno::FAULT);
        assert_errno(write_in_kernel(memory.at(0), 1), Errno::FAULT);
        target.assert_silent();
        let thread = toucher(memory.at(1));
        target.assert_fault(memory.at(1), Cause::Missing);
        assert_done(uffd.copy(memory.at(1), &memory.filled(7)), memory.page);
        assert_eq!(thread.join().unwrap(), 7);
        assert_eq!(touch_in_kernel(memory.at(1)).unwrap(), 7, "what is there is there");
    });
}

#[test]
fn so_are_protected_and_cached_ones() {
    if !need("USER_MODE_ONLY") || !need("WP_HUGETLBFS_SHMEM") {
        return;
    }
    on_each(Kind::ALL, 1, |_, memory| {
        let uffd = user_mode_only(Features::WP_HUGETLBFS_SHMEM);
        let mode = RegisterMode::MISSING | RegisterMode::WP;
        uffd.register(memory.start, memory.bytes(), mode).unwrap();
        let content = memory.filled(7);
        assert_done(uffd.copy_with(memory.start, &content, How::PROTECTED), memory.page);
        assert_eq!(touch_in_kernel(memory.start).unwrap(), 7);
        assert_errno(write_in_kernel(memory.start, 1), Errno::FAULT);
        assert_eq!(memory.touch(0), 7);
        let target = Registered { uffd, memory };
        target.assert_silent();
    });
    if !need("MINOR_SHMEM") || !need("MINOR_HUGETLBFS") {
        return;
    }
    on_each(Kind::SHARED, 1, |_, memory| {
        let uffd = user_mode_only(Features::NONE);
        uffd.register(memory.start, memory.bytes(), RegisterMode::MINOR).unwrap();
        let other = memory.again();
        write(other.start, 1);
        assert_errno(touch_in_kernel(memory.start), Errno::FAULT);
        let target = Registered { uffd, memory };
        target.assert_silent();
    });
}
