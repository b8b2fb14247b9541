//! Negotiating, and the names of features.

mod common;

use common::*;
use rustix::event::{poll, PollFd, PollFlags};
use uffd::{
    Access, Errno, Features, MessageBuffer, Opening, RegisterMode, State, Support, Userfaultfd,
    FEATURES,
};

#[test]
fn an_unknown_bit_is_refused_and_leaves_the_descriptor_usable() {
    let uffd = open();
    assert_errno(uffd.handshake(Features(1 << 62)), Errno::INVAL);
    uffd.handshake(Features::NONE).unwrap();
}

#[test]
fn a_second_handshake_is_refused_even_after_an_empty_one() {
    for first in [Features::NONE, EVENTS] {
        let uffd = negotiated(first);
        assert_errno(uffd.handshake(first), Errno::INVAL);
        assert_errno(uffd.handshake(Features::NONE), Errno::INVAL);
        // And it works as before.
        let memory = Mapping::anonymous(1);
        uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
        assert_done(uffd.zeropage(memory.start, memory.bytes()), PAGE);
        drop(uffd);
    }
}

#[test]
fn what_was_negotiated_can_be_told_from_the_descriptor() {
    let uffd = open();
    assert_eq!(uffd::negotiated(&uffd).unwrap(), None);
    assert!(uffd::handshake_needed(&uffd).unwrap());
    uffd.handshake(Features::NONE).unwrap();
    assert_eq!(uffd::negotiated(&uffd).unwrap(), Some(Features::NONE));
    assert!(!uffd::handshake_needed(&uffd).unwrap());
    let wanted = Features::EVENT_REMOVE | Features::THREAD_ID;
    assert_eq!(uffd::negotiated(negotiated(wanted)).unwrap(), Some(wanted));
    let error = uffd::negotiated(memory_file(1)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn nothing_works_before_the_handshake() {
    let uffd = open();
    let memory = Mapping::anonymous(1);
    let (start, len) = (memory.start, memory.bytes());
    assert_errno(uffd.register(start, len, RegisterMode::MISSING), Errno::INVAL);
    assert_errno(uffd.unregister(start, len), Errno::INVAL);
    assert_errno(uffd.wake(start, len), Errno::INVAL);
    assert_stopped(uffd.copy(start, &page(1)), 0, Errno::INVAL);
    assert_stopped(uffd.zeropage(start, len), 0, Errno::INVAL);
    assert_stopped(uffd.continue_(start, len), 0, Errno::INVAL);
    assert_stopped(uffd.poison(start, len), 0, Errno::INVAL);
    assert_errno(uffd.read_events(&mut MessageBuffer::new(1)).map(|_| ()), Errno::INVAL);
    let mut watched = [PollFd::new(&uffd, PollFlags::IN)];
    poll(&mut watched, Some(&Default::default())).unwrap();
    assert_eq!(watched[0].revents(), PollFlags::ERR);
}

#[test]
fn an_empty_queue_gives_no_event_and_a_buffer_without_room_an_error() {
    let uffd = negotiated(Features::NONE);
    let mut buffer = MessageBuffer::new(4);
    assert_eq!(uffd.read_events(&mut buffer).unwrap().count(), 0);
    let mut none = MessageBuffer::new(0);
    assert_errno(uffd.read_events(&mut none).map(|_| ()), Errno::INVAL);
}

#[test]
fn features_have_names_and_unknown_ones_are_kept() {
    let features = Features::EVENT_FORK | Features::MOVE | Features(1 << 40);
    assert_eq!(features.names(), ["EVENT_FORK", "MOVE", "bit 40"]);
    assert_eq!(format!("{features:?}"), "Features(EVENT_FORK | MOVE | bit 40)");
    assert!(features.contains(Features::MOVE) && !features.contains(Features::SIGBUS));
    assert!(features.contains(Features::NONE));
    assert_eq!(features.without(Features::MOVE | Features(1 << 40)), Features::EVENT_FORK);
    assert_eq!((features & Features(1 << 40)).names(), ["bit 40"]);
    assert!(Features::NONE.names().is_empty());
    assert_eq!(Features(u64::MAX).names().len(), 64);
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
fn a_descriptor_that_blocks_cannot_be_waited_for() {
    let uffd = negotiated(Features::NONE);
    assert!(!uffd.wait(Some(std::time::Duration::ZERO)).unwrap(), "nothing to read");
    rustix::io::ioctl_fionbio(&uffd, false).unwrap();
    let error = uffd.wait(Some(std::time::Duration::ZERO)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    rustix::io::ioctl_fionbio(&uffd, true).unwrap();
    assert!(!uffd.wait(Some(std::time::Duration::ZERO)).unwrap());
    let error = open().wait(Some(std::time::Duration::ZERO)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "not negotiated yet");
}

#[test]
fn what_this_machine_has_is_looked_up_in_the_table() {
    let found = Support::probe();
    assert_eq!(found.rows().len(), FEATURES.len());
    for ((feature, state), row) in found.rows().iter().zip(FEATURES) {
        assert_eq!(*feature, row);
        assert_eq!(found.has(row.name), *state == State::Have);
        // A bit that the kernel does not report is lacking, whoever asks.
        if let Some(bit) = row.bit() {
            assert_eq!(
                found.reported().0 >> bit & 1 == 0,
                *state == State::Lacking,
                "{}",
                row.name
            );
        }
    }
    assert!(!found.has("NONSENSE") && !found.has("move"));
    assert_eq!(found.reported() & found.unknown(), found.unknown());
    assert!(found.unknown().names().iter().all(|name| name.starts_with("bit ")));
}
