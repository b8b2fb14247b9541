//! KERNEL_FAULTS: faults that the kernel itself runs into, in a system call, are told and resolved as any.

mod common;

use common::*;
use uffd::{handshake_needed, Access, Cause, Errno, Features, Opening, Userfaultfd};

#[test]
fn system_calls_wait_for_missing_pages_of_every_kind() {
    if !need("KERNEL_FAULTS") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let target = Registered::over(memory, Features::NONE);
        let (uffd, memory) = (&target.uffd, &target.memory);
        let (first, second) = (memory.at(0), memory.at(1));
        let thread = std::thread::spawn(move || touch_in_kernel(first).unwrap());
        assert_eq!(next_fault(uffd), (first, 0));
        assert_done(uffd.copy(first, &memory.filled(0x5A)), memory.page);
        assert_eq!(thread.join().unwrap(), 0x5A);
        let thread = std::thread::spawn(move || write_in_kernel(second, 7).unwrap());
        assert_eq!(next_fault(uffd), (second, uffd::abi::fault::WRITE));
        assert_done(uffd.copy(second, &memory.filled(0x5B)), memory.page);
        thread.join().unwrap();
        assert_eq!(memory.content(1)[..2], [7, 0x5B]);
    });
}

/// Another process that reads the memory waits too, and so does who pins it.
#[test]
fn other_processes_and_pins_wait() {
    if !need("KERNEL_FAULTS") {
        return;
    }
    let target = Registered::anonymous(2, Features::NONE);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let (pid, address) = (std::process::id(), memory.at(0));
    let thread = std::thread::spawn(move || {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: address as *mut _, iov_len: 1 };
        // SAFETY: one byte of this process, copied by the kernel.
        assert_eq!(unsafe { libc::process_vm_readv(pid as i32, &local, 1, &remote, 1, 0) }, 1);
        byte
    });
    target.assert_fault(memory.at(0), Cause::Missing);
    assert_done(uffd.copy(memory.at(0), &page(3)), PAGE);
    assert_eq!(thread.join().unwrap(), 3);
    let address = memory.at(1);
    let thread = std::thread::spawn(move || Pin::of(address, PAGE as u64));
    until("it waits, or there is no io_uring", || thread.is_finished() || waiters(uffd) == 1);
    if waiters(uffd) == 1 {
        target.assert_fault(memory.at(1), Cause::Missing);
        assert_done(uffd.copy(memory.at(1), &page(4)), PAGE);
        thread.join().unwrap().unwrap().end();
    }
}

#[test]
fn the_system_call_gives_it_with_full_access() {
    if !need("KERNEL_FAULTS") {
        return;
    }
    let uffd = Userfaultfd::open(Opening::SystemCall(Access::Full)).unwrap();
    assert!(handshake_needed(&uffd).unwrap());
    uffd.handshake(Features::NONE).unwrap();
    assert!(!handshake_needed(&uffd).unwrap());
    let flags = rustix::io::fcntl_getfd(&uffd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let flags = rustix::fs::fcntl_getfl(&uffd).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
}

/// A reader of /proc/PID/mem does not wait: it gets an error where nothing is.
#[test]
fn a_debugger_does_not_wait() {
    if !need("KERNEL_FAULTS") {
        return;
    }
    use std::os::unix::fs::FileExt;
    let target = Registered::anonymous(1, Features::NONE);
    let (uffd, address) = (&target.uffd, target.memory.start);
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    assert_errno(memory.read_exact_at(&mut [0; 1], address), Errno::IO);
    target.assert_silent();
    assert_done(uffd.copy(address, &page(9)), PAGE);
    let mut byte = [0];
    memory.read_exact_at(&mut byte, address).unwrap();
    assert_eq!(byte, [9]);
}
