//! Descriptors over Unix sockets.

mod common;

use std::io::{ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use common::*;
use rustix::net::{
    sendmsg, socketpair, AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};
use uffd::passing::{receive, receive_some, send, MOST_DESCRIPTORS};

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

#[test]
fn descriptors_arrive_close_on_exec_and_are_the_same_files() {
    let _alone = alone();
    let (here, there) = pair();
    let file = memory_file(3);
    let many = vec![file.as_fd(); MOST_DESCRIPTORS];
    send(&here, b"hello", &many).unwrap();
    let mut buffer = [0; 16];
    let (length, received) = receive(&there, &mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"hello");
    assert_eq!(received.len(), MOST_DESCRIPTORS);
    for descriptor in &received {
        let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(rustix::fs::fstat(descriptor).unwrap().st_size, 3 * PAGE as i64);
    }
    drop(here);
    assert_eq!(receive(&there, &mut buffer).unwrap().0, 0, "the end of the connection");
}

#[test]
fn too_many_are_refused_before_anything_is_sent() {
    let _alone = alone();
    let (here, there) = pair();
    let file = memory_file(1);
    let error = send(&here, b"x", &[file.as_fd(); MOST_DESCRIPTORS + 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("17"), "{error}");
    rustix::io::ioctl_fionbio(&there, true).unwrap();
    let error = receive(&there, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_message_that_does_not_fit_is_an_error_and_its_descriptors_are_closed() {
    let _alone = alone();
    let (here, there) = pair();
    let file = memory_file(1);
    let before = descriptors_open();
    send(&here, &[7; 100], &[file.as_fd()]).unwrap();
    let error = receive(&there, &mut [0; 99]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    // More descriptors than there is room for, from a sender that is not us.
    let many: Vec<BorrowedFd<'_>> = vec![file.as_fd(); MOST_DESCRIPTORS + 5];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    sendmsg(&here, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    let error = receive(&there, &mut [0; 99]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(descriptors_open(), before, "nothing received was kept open");
    // The connection is still good.
    send(&here, b"fine", &[]).unwrap();
    assert_eq!(receive(&there, &mut [0; 99]).unwrap().0, 4);
}

#[test]
fn who_wants_to_know_is_told_that_something_did_not_fit() {
    let _alone = alone();
    let (here, there) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let file = memory_file(1);
    let before = descriptors_open();
    send(&here, b"one two", &[file.as_fd()]).unwrap();
    // What does not fit of a stream comes next.
    let first = receive_some(&there, &mut [0; 4]).unwrap();
    assert_eq!((first.bytes, first.descriptors.len(), first.cut), (4, 1, false));
    let second = receive_some(&there, &mut [0; 4]).unwrap();
    assert_eq!((second.bytes, second.descriptors.len(), second.cut), (3, 0, false));
    let many: Vec<BorrowedFd<'_>> = vec![file.as_fd(); MOST_DESCRIPTORS + 5];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    sendmsg(&here, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    assert!(receive_some(&there, &mut [0; 4]).unwrap().cut);
    drop((first, second, here));
    assert_eq!(receive_some(&there, &mut [0; 4]).unwrap().bytes, 0, "the end of the connection");
    // Less one end of the connection.
    assert_eq!(descriptors_open(), before - 1);
}

#[test]
fn sending_to_nobody_is_an_error_not_a_signal() {
    let _alone = alone();
    let (here, there) = pair();
    drop(there);
    assert_eq!(send(&here, b"x", &[]).unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_userfaultfd_works_through_a_passed_descriptor() {
    let _alone = alone();
    let (here, there) = pair();
    let target = Registered::anonymous(1, uffd::Features::NONE);
    send(&here, b"u", &[target.uffd.as_fd()]).unwrap();
    let (_, mut received) = receive(&there, &mut [0; 8]).unwrap();
    let passed = uffd::Userfaultfd::from(received.pop().unwrap());
    assert_ne!(passed.as_fd().as_raw_fd(), target.uffd.as_fd().as_raw_fd());
    assert_done(passed.copy(target.memory.start, &page(3)), PAGE);
    assert_eq!(target.memory.touch(0), 3);
}
