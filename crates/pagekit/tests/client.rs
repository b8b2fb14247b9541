//! The socket at which shims attach: clients that misbehave disturb nobody else.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use common::*;
use pagekit::error::Error;
use pagekit::page::PAGE;
use pagekit::server::{Server, Ways};
use pagekit::wire::shim::{Mapping as Way, Message, Wish, LARGEST};
use rustix::net::{connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use uffd::{passing, Access, Features, Opening, RegisterMode, Userfaultfd};

struct Service {
    server: Server,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn service(pages: u64, backend: &str) -> Service {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let template = template(pages, &["pass"]);
    let server =
        Server::start(template, Arc::new(delivery()), Ways::shim(path.as_path(), backend)).unwrap();
    Service { server, path, _directory: directory }
}

impl Service {
    fn connect(&self) -> OwnedFd {
        let kind = SocketType::SEQPACKET;
        let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            Some(PATIENCE),
        )
        .unwrap();
        socket
    }

    fn pages(&self) -> u64 {
        self.server.template().whole().pages
    }

    fn attach(&self) -> Message {
        Message::Attach { wish: Wish::Auto, offset: 0, length: self.pages() * PAGE }
    }
}

fn say(socket: &OwnedFd, message: &Message, descriptors: &[&OwnedFd]) {
    let descriptors: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
    passing::send(socket, &message.encode(), &descriptors).unwrap();
}

fn hear(socket: &OwnedFd) -> Option<(Message, Vec<OwnedFd>)> {
    let mut buffer = vec![0; LARGEST];
    let (length, descriptors) = passing::receive(socket, &mut buffer).unwrap();
    (length > 0).then(|| (Message::decode(&buffer[..length]).unwrap(), descriptors))
}

#[track_caller]
fn assert_refused(socket: &OwnedFd, why: &str) {
    match hear(socket) {
        Some((Message::Refusal { text }, _)) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(hear(socket).is_none(), "and that was all");
}

fn raw_userfaultfd(blocking: bool) -> OwnedFd {
    let uffd = Userfaultfd::open(Opening::SystemCall(Access::Full)).unwrap();
    let descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
    rustix::io::ioctl_fionbio(&descriptor, !blocking).unwrap();
    descriptor
}

/// A client of this process that did everything right.
struct Client {
    uffd: Userfaultfd,
    memory: Mapping,
    _socket: OwnedFd,
}

fn client(service: &Service, uffd: OwnedFd) -> Client {
    let socket = service.connect();
    say(&socket, &service.attach(), &[]);
    let (offer, _files) = hear(&socket).unwrap();
    let Message::Offer { mapping, .. } = offer else { panic!("{offer:?}") };
    let memory = match mapping {
        Way::Copy => Mapping::anonymous(service.pages()),
        _ => Mapping::of(service.server.template(), service.server.template().whole()),
    };
    say(&socket, &Message::Region { start: memory.start, beacon: None }, &[&uffd]);
    let (ready, _) = hear(&socket).unwrap();
    assert!(matches!(ready, Message::Ready { .. }), "{ready:?}");
    let uffd = Userfaultfd::from(uffd);
    uffd.register(memory.start, memory.bytes, RegisterMode::MISSING).unwrap();
    Client { uffd, memory, _socket: socket }
}

fn is_served(service: &Service) {
    let client = client(service, raw_userfaultfd(false));
    for page in [0, service.pages() - 1, 7] {
        assert_eq!(touch(client.memory.at(page)), first_byte(page));
    }
    leave(service, client);
}

/// Ends a client of this very process in an order in which unmapping waits for nobody.
fn leave(service: &Service, client: Client) {
    let Client { uffd, memory, .. } = client;
    uffd.unregister(memory.start, memory.bytes).unwrap();
    drop(uffd);
    drop(memory);
    let _ = service;
}

#[test]
fn clients_are_served() {
    for backend in BOTH {
        let service = service(64, backend);
        is_served(&service);
        is_served(&service);
        assert_eq!(service.server.statistics().backend, Some(backend));
    }
}

#[test]
fn a_client_that_takes_no_answers_keeps_nobody_waiting() {
    let service = service(64, "copy");
    let greedy = service.connect();
    rustix::io::ioctl_fionbio(&greedy, true).unwrap();
    // Until the server ends it: it asks, and never reads.
    until("it is thrown out", || {
        passing::send(&greedy, &service.attach().encode(), &[])
            .is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
    });
    is_served(&service);
}

#[test]
fn a_client_that_says_nothing_keeps_nobody_waiting() {
    let service = service(64, "share");
    let silent: Vec<OwnedFd> = (0..50).map(|_| service.connect()).collect();
    is_served(&service);
    drop(silent);
    is_served(&service);
}

#[test]
fn a_blocking_userfaultfd_does_not_stop_the_loop() {
    let service = service(64, "copy");
    let blocking = client(&service, raw_userfaultfd(true));
    assert_eq!(touch(blocking.memory.at(3)), first_byte(3));
    is_served(&service);
    leave(&service, blocking);
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let service = service(64, "copy");
    let descriptor = raw_userfaultfd(false);
    for start in [1, 0xFFFF_FFFF_FFFF_F000, u64::MAX - 4095 - 8 * PAGE, u64::MAX] {
        let socket = service.connect();
        say(&socket, &service.attach(), &[]);
        hear(&socket).unwrap();
        say(&socket, &Message::Region { start, beacon: None }, &[&descriptor]);
        assert_refused(&socket, "no region can be at");
    }
    let size = 64 * PAGE;
    for (offset, length) in [(0, 0), (1, PAGE), (0, size + 1), (size, PAGE), (PAGE, u64::MAX)] {
        let socket = service.connect();
        say(&socket, &Message::Attach { wish: Wish::Auto, offset, length }, &[]);
        assert_refused(&socket, "no part of the template");
    }
    is_served(&service);
}

#[test]
fn descriptors_that_are_not_what_they_should_be_are_refused() {
    let service = service(64, "copy");
    let negotiated = raw_userfaultfd(false);
    Userfaultfd::from(negotiated.try_clone().unwrap()).handshake(Features::NONE).unwrap();
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let fresh = raw_userfaultfd(false);
    for (descriptors, why) in [
        (vec![&negotiated], "negotiated already"),
        (vec![&file], "no userfaultfd"),
        (vec![], "exactly one"),
        (vec![&fresh, &fresh], "exactly one"),
    ] {
        let socket = service.connect();
        say(&socket, &service.attach(), &[]);
        hear(&socket).unwrap();
        say(&socket, &Message::Region { start: 0x7000_0000_0000, beacon: None }, &descriptors);
        assert_refused(&socket, why);
    }
    let socket = service.connect();
    say(&socket, &Message::Region { start: 0x7000_0000_0000, beacon: None }, &[&fresh]);
    assert_refused(&socket, "before its attach");
    let socket = service.connect();
    say(&socket, &Message::Child { target: 99 }, &[]);
    assert_refused(&socket, "no forked target 99");
    let socket = service.connect();
    passing::send(&socket, b"GET / HTTP/1.1", &[]).unwrap();
    assert_refused(&socket, "does not speak");
    is_served(&service);
}

#[test]
fn a_second_server_on_the_socket_is_refused_and_a_dead_ones_socket_replaced() {
    let service = service(16, "copy");
    let again = || {
        let path = service.path.as_path();
        Server::start(template(16, &["pass"]), Arc::new(delivery()), Ways::shim(path, "copy"))
    };
    let error = again().unwrap_err();
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    is_served(&service);
    service.server.stop();
    assert!(!service.path.exists());
    // A socket file without a server, as a killed one leaves it.
    let dead = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::bind(&dead, &SocketAddrUnix::new(&service.path).unwrap()).unwrap();
    drop(dead);
    assert!(service.path.exists());
    drop(again().unwrap());
}
