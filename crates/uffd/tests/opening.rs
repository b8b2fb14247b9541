//! Ways to a userfaultfd, and which faults each of them delivers.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use common::*;
use rustix::net::{socketpair, AddressFamily, SocketFlags, SocketType};
use uffd::{
    handshake_needed, open_device, passing, Access, Errno, Event, Features, Opening, RegisterMode,
    Userfaultfd,
};

/// Set for the copy of this program that plays the unprivileged process.
const ROLE: &str = "PAGEKIT_TEST_ROLE";

/// Registers a page of this process and shows that a fault in kernel mode is delivered.
fn catches_kernel_faults(uffd: &Userfaultfd) {
    let memory = Mapping::anonymous(1);
    uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    let address = memory.start;
    let thread = std::thread::spawn(move || touch_in_kernel(address).unwrap());
    match next_event(uffd) {
        Event::Fault { address: at, flags, .. } => assert_eq!((at, flags), (address, 0)),
        other => panic!("{other:?}"),
    }
    assert_done(uffd.copy(address, &page(0x5A)), PAGE);
    assert_eq!(thread.join().unwrap(), 0x5A);
    uffd.unregister(memory.start, memory.bytes()).unwrap();
}

#[test]
fn the_system_call_with_full_access() {
    let uffd = open();
    assert!(handshake_needed(&uffd).unwrap());
    uffd.handshake(Features::NONE).unwrap();
    assert!(!handshake_needed(&uffd).unwrap());
    catches_kernel_faults(&uffd);
}

#[test]
fn the_device() {
    let device = open_device().expect("the right to open /dev/userfaultfd");
    let uffd = Userfaultfd::open(Opening::Device(device.as_fd())).unwrap();
    drop(device);
    uffd.handshake(Features::NONE).unwrap();
    catches_kernel_faults(&uffd);
    let flags = rustix::io::fcntl_getfd(&uffd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn user_mode_only_delivers_no_faults_of_the_kernel() {
    let uffd = Userfaultfd::open(Opening::SystemCall(Access::UserModeOnly)).unwrap();
    uffd.handshake(Features::NONE).unwrap();
    let memory = Mapping::anonymous(2);
    uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    assert_errno(touch_in_kernel(memory.at(0)), Errno::FAULT);
    assert_eq!(waiters(&uffd), 0, "nobody waits, and there is nothing to read");
    let thread = toucher(memory.at(1));
    assert!(matches!(next_event(&uffd), Event::Fault { address, .. } if address == memory.at(1)));
    assert_done(uffd.copy(memory.at(1), &page(7)), PAGE);
    assert_eq!(thread.join().unwrap(), 7);
    drop(uffd);
}

#[test]
fn probing_tells_the_features_and_leaves_nothing_behind() {
    let features = Userfaultfd::probe(Opening::SystemCall(Access::Full)).unwrap();
    // Since 4.14 at the latest.
    assert!(features.contains(EVENTS | Features::SIGBUS | Features::MISSING_SHMEM));
    let uffd = open();
    uffd.handshake(features.without(Features::SIGBUS)).unwrap();
}

#[test]
fn what_is_no_userfaultfd_is_told_apart() {
    let error = handshake_needed(memory_file(1)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    let device = open_device().unwrap();
    assert!(handshake_needed(&device).is_err(), "the device itself is none");
    let memory = memory_file(1);
    assert_errno(Userfaultfd::open(Opening::Device(memory.as_fd())), Errno::NOTTY);
    let not_one = Userfaultfd::from(memory);
    assert_errno(not_one.handshake(Features::NONE), Errno::NOTTY);
}

/// A privileged process hands its open device to a process of user 65534, which makes a full
/// userfaultfd from it though it could neither open the device nor make the system call.
#[test]
fn a_device_handed_to_an_unprivileged_process() {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "unprivileged_role", "--nocapture"])
        .env(ROLE, "unprivileged")
        .stdin(Stdio::from(theirs))
        .spawn()
        .unwrap();
    let device = open_device().unwrap();
    passing::send(&ours, b"device", &[device.as_fd()]).unwrap();
    drop(device);
    wait_readable(&ours);
    let mut buffer = [0; 64];
    let (length, descriptors) = passing::receive(&ours, &mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"done", "the other process failed; see its output");
    assert!(descriptors.is_empty());
    assert!(child.wait().unwrap().success());
}

/// The other side of the test above; does nothing unless it was started by it.
#[test]
fn unprivileged_role() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let socket: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    // SAFETY: plain calls; each of them changes all threads of this process.
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
        assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
    }
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if sysctl.trim() == "0" {
        assert_errno(Userfaultfd::open(Opening::SystemCall(Access::Full)), Errno::PERM);
    }
    let mut buffer = [0; 64];
    wait_readable(&socket);
    let (_, mut descriptors) = passing::receive(&socket, &mut buffer).unwrap();
    let device = descriptors.pop().unwrap();
    let uffd = Userfaultfd::open(Opening::Device(device.as_fd())).unwrap();
    // The right to EVENT_FORK is not in the device.
    assert_errno(uffd.handshake(Features::EVENT_FORK), Errno::PERM);
    uffd.handshake(Features::EVENT_UNMAP).unwrap();
    catches_kernel_faults(&uffd);
    passing::send(&socket, b"done", &[]).unwrap();
}
