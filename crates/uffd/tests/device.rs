//! DEVICE: a full userfaultfd for whoever may open a file, or was given it open.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use common::*;
use rustix::net::{socketpair, AddressFamily, SocketFlags, SocketType};
use uffd::{
    handshake_needed, open_device, passing, Access, Errno, Features, Opening, RegisterMode,
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
    assert_eq!(next_fault(uffd), (address, 0));
    assert_done(uffd.copy(address, &page(0x5A)), PAGE);
    assert_eq!(thread.join().unwrap(), 0x5A);
    uffd.unregister(memory.start, memory.bytes()).unwrap();
}

#[test]
fn the_device_gives_full_access() {
    if !need("DEVICE") {
        return;
    }
    let device = open_device().unwrap();
    assert!(handshake_needed(&device).is_err(), "the device itself is no userfaultfd");
    let uffd = Userfaultfd::open(Opening::Device(device.as_fd())).unwrap();
    let probed = Userfaultfd::probe(Opening::Device(device.as_fd())).unwrap();
    let by_call = Userfaultfd::probe(Opening::SystemCall(Access::UserModeOnly)).unwrap();
    assert_eq!(probed, by_call, "the features are the kernel's, however it was opened");
    drop(device);
    uffd.handshake(Features::NONE).unwrap();
    catches_kernel_faults(&uffd);
    let flags = rustix::io::fcntl_getfd(&uffd).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn what_is_no_device_is_refused() {
    let memory = memory_file(1);
    assert_errno(Userfaultfd::open(Opening::Device(memory.as_fd())), Errno::NOTTY);
    let error = handshake_needed(&memory).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    let not_one = Userfaultfd::from(memory);
    assert_errno(not_one.handshake(Features::NONE), Errno::NOTTY);
    assert_errno(not_one.register(0x1000, 0x1000, RegisterMode::MISSING), Errno::NOTTY);
    assert_stopped(not_one.copy(0x1000, &page(1)), 0, Errno::NOTTY);
}

/// A privileged process hands its open device to a process of user 65534, which makes a full
/// userfaultfd from it though it could neither open the device nor make the system call.
#[test]
fn a_device_handed_to_an_unprivileged_process() {
    if !need("DEVICE") || !need_root() {
        return;
    }
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
    // Other tests on this machine turn the knob, which they lock meanwhile, and let users open the device.
    let knob = std::fs::File::open("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    rustix::fs::flock(&knob, rustix::fs::FlockOperation::LockShared).unwrap();
    if std::io::read_to_string(&knob).unwrap().trim() == "0" {
        assert_errno(Userfaultfd::open(Opening::SystemCall(Access::Full)), Errno::PERM);
    }
    drop(knob);
    if let Err(refused) = open_device() {
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::ACCESS));
    }
    Userfaultfd::open(Opening::SystemCall(Access::UserModeOnly)).unwrap();
    let mut buffer = [0; 64];
    let (_, mut descriptors) = passing::receive(&socket, &mut buffer).unwrap();
    let device = descriptors.pop().unwrap();
    let uffd = Userfaultfd::open(Opening::Device(device.as_fd())).unwrap();
    // The right to EVENT_FORK is not in the device.
    assert_errno(uffd.handshake(Features::EVENT_FORK), Errno::PERM);
    uffd.handshake(Features::EVENT_UNMAP).unwrap();
    catches_kernel_faults(&uffd);
    passing::send(&socket, b"done", &[]).unwrap();
}
