//! The socket for VMMs that hand over a userfaultfd, with clients that follow the protocol exactly, and
//! clients that do not.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use pagekit::client::firecracker::Clients;
use pagekit::engine::{Ahead, Engine, Outcome};
use pagekit::page::{Run, PAGE};
use pagekit::server::{Address, Server, Ways};
use pagekit::template::Template;
use rustix::fs::{flock, FlockOperation};
use rustix::mm::{madvise, mmap_anonymous, mprotect, Advice, MapFlags, MprotectFlags, ProtFlags};
use uffd::{passing, Features, RegisterMode, Userfaultfd};

const HUGE: u64 = 2 << 20;

struct Service {
    server: Server,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn service(template: Arc<Template>) -> Service {
    service_for(template, &[])
}

fn service_for(template: Arc<Template>, users: &[u32]) -> Service {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = Address { allow: users.to_vec(), ..Address::from(path.as_path()) };
    let ways = Ways { firecracker: vec![address], ..Ways::default() };
    let server = Server::start(template, Arc::new(delivery()), ways).unwrap();
    Service { server, path, _directory: directory }
}

impl Service {
    fn engine(&self) -> &Arc<Engine> {
        self.server.engine()
    }

    fn clients(&self) -> Clients {
        self.server.statistics().firecracker.unwrap()
    }

    /// Counters are last: what is counted may be seen before.
    fn clients_are(&self, served: u64, refused: u64, killed: u64, not_allowed: u64) {
        let expected = Clients { served, refused, killed, not_allowed };
        until("the clients are counted", || self.clients() == expected);
    }

    fn reports(&self) -> Vec<String> {
        self.server.statistics().engine.reports
    }

    fn connect(&self) -> UnixStream {
        connect(&self.path)
    }

    /// Somebody else is served, whatever anybody did.
    fn is_served(&self) {
        let vmm = Vmm::new(self);
        let last = self.server.template().whole().end() - 1;
        for page in [0, last, last / 2] {
            assert_eq!(vmm.touch(page), first_byte(page));
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends bytes and descriptors, in as many pieces as the socket wants.
fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    passing::send(socket, &bytes[..1], descriptors).unwrap();
    // Who sends what cannot be may be cut short.
    if let Err(error) = (&*socket).write_all(&bytes[1..]) {
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

/// Waits for the other end to close.
#[track_caller]
fn assert_disconnected(socket: &UnixStream) {
    let end = (&*socket).read(&mut [0; 1]);
    let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    assert!(matches!(&end, Ok(0)) || end.as_ref().is_err_and(reset), "{end:?}");
}

/// A region of a VMM, in bytes.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    size: u64,
    offset: u64,
}

fn message(regions: &[Region], page_size: u64) -> Vec<u8> {
    let objects: Vec<_> = regions
        .iter()
        .map(|region| {
            serde_json::json!({
                "base_host_virt_addr": region.start,
                "size": region.size,
                "offset": region.offset,
                "page_size": page_size,
                "page_size_kib": page_size,
            })
        })
        .collect();
    serde_json::to_vec(&objects).unwrap()
}

/// What a VMM has before it connects: memory, registered with a userfaultfd as the stock one makes it.
struct Memory {
    regions: Vec<Region>,
    uffd: Userfaultfd,
    page_size: u64,
    _mapping: Mapping,
}

impl Memory {
    /// All of a template of so many pages.
    fn of(pages: u64) -> Memory {
        Memory::in_regions(pages, &[pages])
    }

    /// A template's pages in regions of these sizes, at addresses in another order, with gaps.
    fn in_regions(pages: u64, sizes: &[u64]) -> Memory {
        assert_eq!(sizes.iter().sum::<u64>(), pages);
        let mapping = Mapping::anonymous(pages + 2 * sizes.len() as u64);
        let uffd = negotiated(Features::EVENT_REMOVE);
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|at| mix(*at as u64));
        let offset_of = |at: usize| sizes[..at].iter().sum::<u64>() * PAGE;
        let mut start = mapping.start + PAGE;
        let mut regions = Vec::new();
        for at in order {
            let region = Region { start, size: sizes[at] * PAGE, offset: offset_of(at) };
            uffd.register(region.start, region.size, RegisterMode::MISSING).unwrap();
            start += region.size + 2 * PAGE;
            regions.push(region);
        }
        regions.sort_by_key(|region| mix(region.start));
        Memory { regions, uffd, page_size: PAGE, _mapping: mapping }
    }

    fn message(&self) -> Vec<u8> {
        message(&self.regions, self.page_size)
    }

    fn at(&self, page: u64) -> u64 {
        let offset = page * PAGE;
        let inside =
            |region: &&Region| (region.offset..region.offset + region.size).contains(&offset);
        let region = self.regions.iter().find(inside).unwrap();
        region.start + offset - region.offset
    }

    fn give_back(&self, page: u64, pages: u64) {
        // SAFETY: memory of the test, which expects it to be dropped.
        unsafe {
            let bytes = (pages * PAGE) as usize;
            madvise(self.at(page) as *mut _, bytes, Advice::LinuxDontNeed).unwrap();
        }
    }
}

/// A client of this process that did everything right.
struct Vmm {
    memory: Memory,
    socket: UnixStream,
    engine: Arc<Engine>,
}

impl Vmm {
    fn new(service: &Service) -> Vmm {
        Vmm::with(service, Memory::of(service.server.template().whole().pages))
    }

    fn with(service: &Service, memory: Memory) -> Vmm {
        let socket = service.connect();
        send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
        Vmm { memory, socket, engine: Arc::clone(service.engine()) }
    }

    fn at(&self, page: u64) -> u64 {
        self.memory.at(page)
    }

    fn touch(&self, page: u64) -> u8 {
        touch(self.at(page))
    }

    fn page(&self, page: u64) -> Vec<u8> {
        touch_all(self.at(page))
    }

    /// Its target, once the server has it.
    fn target(&self) -> Arc<pagekit::engine::Target> {
        until("the client is a target", || self.engine.targets() > 0);
        self.engine.living().pop().unwrap()
    }
}

#[test]
fn vmms_are_served_whatever_the_order_of_their_regions() {
    const PAGES: u64 = 600;
    let service = service(template(PAGES, &["delay=100us"]));
    let sizes = [1, 199, 7, 250, 16, 3, 124];
    let vmms: Vec<Vmm> =
        (0..4).map(|_| Vmm::with(&service, Memory::in_regions(PAGES, &sizes))).collect();
    together(8, |thread| {
        let vmm = &vmms[thread / 2];
        for step in 0..PAGES {
            let page = if thread % 2 == 0 { step } else { mix(step) % PAGES };
            let byte = match step % 3 {
                0 => touch_in_kernel(vmm.at(page)).unwrap(),
                _ => vmm.touch(page),
            };
            assert_eq!(byte, first_byte(page), "page {page}");
        }
    });
    for vmm in &vmms {
        (0..PAGES).for_each(|page| assert!(vmm.page(page) == content(page), "page {page}"));
    }
    assert_all_counted(service.engine());
    let statistics = service.server.statistics();
    assert_eq!(statistics.fetches, statistics.template.fetches);
    assert_eq!(statistics.bytes_read, PAGES * PAGE, "each page was read once");
    service.clients_are(4, 0, 0, 0);
    assert_eq!(statistics.engine.reports, [""; 0]);
}

#[test]
fn one_server_has_several_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["one", "two"].map(|name| directory.path().join(name));
    let firecracker = paths.iter().map(Address::from).collect();
    let ways = Ways { firecracker, ..Ways::default() };
    let server = Server::start(template(32, &[]), Arc::new(delivery()), ways).unwrap();
    assert_eq!(server.firecracker(), [&paths[0], &paths[1]]);
    for path in &paths {
        let memory = Memory::of(32);
        let socket = connect(path);
        send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
        assert_eq!(touch(memory.at(20)), first_byte(20));
    }
    server.stop();
    assert!(paths.iter().all(|path| !path.exists()));
}

#[test]
fn message_and_descriptor_may_arrive_in_pieces_and_apart() {
    let service = service(template(64, &[]));
    let memory = || Memory::in_regions(64, &[16; 4]);
    let tiny = |socket: &UnixStream, bytes: &[u8]| {
        bytes.iter().for_each(|byte| (&*socket).write_all(&[*byte]).unwrap());
    };
    // Byte by byte, the descriptor with the first, with one in the middle, and with the last.
    for at in [0, 100, usize::MAX] {
        let (memory, socket) = (memory(), service.connect());
        let bytes = memory.message();
        let at = at.min(bytes.len() - 1);
        tiny(&socket, &bytes[..at]);
        passing::send(&socket, &bytes[at..=at], &[memory.uffd.as_fd()]).unwrap();
        tiny(&socket, &bytes[at + 1..]);
        assert_eq!(touch(memory.at(63)), first_byte(63));
    }
    // The descriptor behind it, with a byte of its own. Nothing that comes later matters, nor its end.
    let (memory, mut socket) = (memory(), service.connect());
    socket.write_all(&memory.message()).unwrap();
    passing::send(&socket, b"\0", &[memory.uffd.as_fd()]).unwrap();
    assert_eq!(touch(memory.at(1)), first_byte(1));
    socket.write_all(b"and so on").unwrap();
    socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(touch(memory.at(40)), first_byte(40));
    service.clients_are(4, 0, 0, 0);
}

#[test]
fn the_connection_is_open_as_long_as_the_target_lives() {
    let service = service(template(16, &[]));
    let vmm = Vmm::new(&service);
    assert_eq!(vmm.touch(3), first_byte(3));
    vmm.socket.set_nonblocking(true).unwrap();
    let open = (&vmm.socket).read(&mut [0; 1]).unwrap_err();
    assert_eq!(open.kind(), std::io::ErrorKind::WouldBlock);
    let target = vmm.target();
    assert_eq!(target.pid(), Some(std::process::id() as i32));
    service.engine().forget(target.id);
    drop(target);
    vmm.socket.set_nonblocking(false).unwrap();
    assert_disconnected(&vmm.socket);
}

/// Handshakes that cannot be, with a userfaultfd. This process is not killed for them, but another one
/// would be: see the next test.
#[test]
fn handshakes_that_cannot_be_are_refused_by_name() {
    let service = service(template(64, &[]));
    let memory = Memory::of(64);
    let good = memory.regions[0];
    let unregistered = Mapping::anonymous(8);
    let plain = tempfile::tempfile().unwrap();
    let fresh = Userfaultfd::open(uffd::Opening::SystemCall(uffd::Access::Full)).unwrap();
    let silent = negotiated(Features::SIGBUS);
    let part = |start, pages| message(&[Region { start, size: pages * PAGE, offset: 0 }], PAGE);
    let ours = memory.uffd.as_fd();
    for (bytes, descriptors, why) in [
        (b"GET /".to_vec(), vec![ours], "does not begin with an array"),
        (b"[}".to_vec(), vec![ours], "no array of regions"),
        (vec![b'['; 100], vec![ours], "deeper than 16"),
        (message(&[], PAGE), vec![ours], "no regions"),
        (message(&[Region { offset: PAGE, ..good }], PAGE), vec![ours], "no part of the template"),
        (message(&[good, good], PAGE), vec![ours], "overlap"),
        (part(good.start + 1, 8), vec![ours], "no multiple of the page size"),
        (part(unregistered.start, 8), vec![ours], "is not registered"),
        // The page before the region's first, and the one behind its last.
        (part(good.start - PAGE, 8), vec![ours], "is not registered"),
        (part(good.start + 60 * PAGE, 5), vec![ours], "is not registered"),
        (part(0x10_0000_0000, 8), vec![ours], "is not registered"),
        (part(u64::MAX - 16 * PAGE + 1, 8), vec![ours], "is in no address space"),
        (memory.message(), vec![plain.as_fd()], "no userfaultfd"),
        (memory.message(), vec![fresh.as_fd()], "was not negotiated"),
        (memory.message(), vec![silent.as_fd()], "SIGBUS"),
        (memory.message(), vec![ours, ours], "2 descriptors instead of one"),
        (memory.message(), vec![ours; 16], "16 descriptors instead of one"),
    ] {
        let before = service.reports().len();
        let socket = service.connect();
        send(&socket, &bytes, &descriptors);
        assert_disconnected(&socket);
        until("it is reported", || service.reports().len() == before + 1);
        let report = service.reports().pop().unwrap();
        assert!(report.contains(why), "{why}: {report}");
        assert!(report.contains(&format!("pid {}", std::process::id())), "{report}");
        let is_userfaultfd = why != "no userfaultfd";
        assert_eq!(report.contains("this very process"), is_userfaultfd, "{report}");
    }
    service.clients_are(0, 17, 0, 0);
    service.is_served();
}

#[test]
fn more_descriptors_than_can_be_received_are_refused() {
    let service = service(template(16, &[]));
    let memory = Memory::of(16);
    let socket = service.connect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let many = [memory.uffd.as_fd(); 100];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
    let bytes = [std::io::IoSlice::new(b"[")];
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(&socket, &bytes, &mut control, flags).unwrap();
    assert_disconnected(&socket);
    until("it is counted", || service.clients().refused == 1);
    assert!(service.reports()[0].contains("not all descriptors"), "{:?}", service.reports());
    service.is_served();
}

#[test]
fn who_says_too_little_is_turned_away_in_the_end() {
    let service = service(template(16, &[]));
    let memory = Memory::of(16);
    let bytes = memory.message();
    // Only looks whether somebody is there, as another server does.
    drop(service.connect());
    let silent = service.connect();
    let no_end = service.connect();
    send(&no_end, &bytes[..bytes.len() - 1], &[memory.uffd.as_fd()]);
    let no_descriptor = service.connect();
    (&no_descriptor).write_all(&bytes).unwrap();
    // Who hangs up without is not waited for.
    let gone = service.connect();
    (&gone).write_all(&bytes).unwrap();
    drop(gone);
    until("it was noticed", || service.clients().refused == 1);
    assert!(service.reports()[0].contains("sent no userfaultfd"));
    service.is_served();
    for socket in [&silent, &no_end, &no_descriptor] {
        assert_disconnected(socket);
    }
    until("all are counted", || service.clients().refused == 4);
    let mut reports = service.reports().join("\n");
    for why in [
        "neither all of its regions nor its userfaultfd within 10 s; it was disconnected",
        "did not send all of its regions within 10 s; and it could not be killed: it is this very",
        "it sent no userfaultfd within 10 s; it was disconnected",
    ] {
        assert!(reports.contains(why), "{reports}");
        reports = reports.replacen(why, "", 1);
    }
    service.is_served();
}

#[test]
fn who_is_not_on_the_list_is_turned_away_and_lives() {
    const ROLE: &str = "who_is_not_on_the_list_is_turned_away_and_lives";
    if playing(ROLE) {
        let memory = Memory::of(16);
        let socket = connect(&socket_of_actor());
        // It may be gone before all is said.
        let _ = passing::send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
        assert_disconnected(&socket);
        return;
    }
    let me = rustix::process::getuid().as_raw();
    let service = service_for(template(16, &[]), &[me + 1]);
    assert!(vmm(ROLE, &service.path, "").wait().unwrap().success());
    service.clients_are(0, 0, 0, 1);
    let report = &service.reports()[0];
    assert!(report.contains(&format!("user {me} ")) && report.contains("not allowed"), "{report}");
    let both = service_for(template(16, &[]), &[me + 1, me]);
    both.is_served();
}

const SOCKET: &str = "PAGEKIT_TEST_SOCKET";
const STEP: &str = "PAGEKIT_TEST_STEP";

/// A client in a process of its own, which plays `role` as far as `step`.
fn vmm(role: &str, path: &Path, step: &str) -> Child {
    let mut command = actor(role);
    command.env(SOCKET, path).env(STEP, step).stderr(Stdio::null()).spawn().unwrap()
}

fn socket_of_actor() -> PathBuf {
    std::env::var_os(SOCKET).unwrap().into()
}

/// Waits for ever: somebody else ends it.
fn wait_for_the_end() -> ! {
    loop {
        std::thread::park();
    }
}

#[test]
fn a_vmm_that_would_wait_for_ever_is_killed() {
    const ROLE: &str = "a_vmm_that_would_wait_for_ever_is_killed";
    if playing(ROLE) {
        let memory = Memory::of(16);
        let socket = connect(&socket_of_actor());
        let mut bytes = memory.message();
        let mut descriptors = vec![memory.uffd.as_fd()];
        match &*std::env::var(STEP).unwrap() {
            "bad regions" => bytes = b"[1]".to_vec(),
            "hung up" => bytes.truncate(40),
            "too many" => descriptors.push(memory.uffd.as_fd()),
            step => panic!("{step}"),
        }
        send(&socket, &bytes, &descriptors);
        if bytes.len() == 40 {
            socket.shutdown(std::net::Shutdown::Write).unwrap();
        }
        touch(memory.at(3));
        return;
    }
    let service = service(template(16, &[]));
    for (at, step) in ["bad regions", "hung up", "too many"].into_iter().enumerate() {
        let status = vmm(ROLE, &service.path, step).wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{step}: {status}");
        until("it is reported", || service.reports().len() == at + 1);
        let report = service.reports().pop().unwrap();
        assert!(report.contains("it was killed"), "{report}");
    }
    service.clients_are(0, 3, 3, 0);
    service.is_served();
}

#[test]
fn vmms_that_live_when_the_server_ends_are_killed() {
    const ROLE: &str = "vmms_that_live_when_the_server_ends_are_killed";
    if playing(ROLE) {
        let memory = Memory::of(16);
        let socket = connect(&socket_of_actor());
        send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
        assert_eq!(touch(memory.at(3)), first_byte(3));
        wait_for_the_end();
    }
    let service = service(template(16, &[]));
    let mut child = vmm(ROLE, &service.path, "");
    until("it is served", || !service.engine().statistics().outcomes.is_empty());
    service.server.stop();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    let report = service.reports().pop().unwrap();
    assert!(report.contains("was killed: the server ends"), "{report}");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Nobody else is disturbed, and nothing is left behind.
#[test]
fn a_vmm_may_die_at_every_step() {
    const ROLE: &str = "a_vmm_may_die_at_every_step";
    const STEPS: [&str; 6] = ["connected", "half", "no descriptor", "all", "touching", "served"];
    if playing(ROLE) {
        let memory = Memory::of(64);
        let socket = connect(&socket_of_actor());
        let bytes = memory.message();
        let step = std::env::var(STEP).unwrap();
        match &*step {
            "connected" => {}
            "half" => send(&socket, &bytes[..60], &[memory.uffd.as_fd()]),
            "no descriptor" => (&socket).write_all(&bytes).unwrap(),
            _ => send(&socket, &bytes, &[memory.uffd.as_fd()]),
        }
        if step == "served" {
            assert_eq!(touch(memory.at(3)), first_byte(3));
        }
        if step == "touching" {
            for page in [3, 30, 60] {
                let address = memory.at(page);
                std::thread::spawn(move || touch(address));
            }
        }
        std::process::abort();
    }
    const ALONE: &str = "PAGEKIT_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        // Counts the descriptors of its process, where no other test runs.
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", ROLE, "--nocapture"]).env(ALONE, "1").stdout(Stdio::null());
        assert!(command.status().unwrap().success());
        return;
    }
    let service = service(template(64, &["delay=5ms"]));
    let steady = Vmm::new(&service);
    assert_eq!(steady.touch(0), first_byte(0));
    let before = descriptors();
    for round in 0..4 {
        let mut children: Vec<Child> =
            STEPS.iter().map(|step| vmm(ROLE, &service.path, step)).collect();
        assert_eq!(steady.touch(16 * round + 5), first_byte(16 * round + 5));
        for child in &mut children {
            assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGABRT));
        }
        drop(children);
        until("they are forgotten", || service.engine().targets() == 1);
        until("all descriptors are closed", || descriptors() == before);
    }
    assert_all_counted(service.engine());
    (0..64).for_each(|page| assert!(steady.page(page) == content(page)));
    assert_eq!(service.clients().killed, 0);
    service.is_served();
}

#[test]
fn fifty_thousand_regions_are_no_trouble() {
    let count = repetitions(50_000);
    let service = service(open("zero:400M", &["pass"], DEADLINE));
    // One mapping, in regions of a page or two, in wild order.
    let uffd = negotiated(Features::EVENT_REMOVE);
    let mapping = Mapping::anonymous(2 * count);
    uffd.register(mapping.start, mapping.bytes, RegisterMode::MISSING).unwrap();
    let mut regions: Vec<Region> = (0..count)
        .map(|at| {
            let size = (1 + mix(at) % 2) * PAGE;
            Region { start: mapping.at(2 * at), size, offset: 2 * PAGE * (count - 1 - at) }
        })
        .collect();
    regions.sort_by_key(|region| mix(region.start));
    let bytes = message(&regions, PAGE);
    let began = Instant::now();
    let socket = service.connect();
    let sender = std::thread::spawn({
        let uffd = uffd.try_clone().unwrap();
        move || {
            send(&socket, &bytes, &[uffd.as_fd()]);
            socket
        }
    });
    until("it is a target", || service.engine().targets() == 1);
    let taken = began.elapsed();
    assert!(taken < allowed(Duration::from_secs(8)), "{taken:?}");
    for region in regions.iter().step_by(997) {
        assert_eq!(touch(region.start), 0);
    }
    // One too few is registered.
    let _socket = sender.join().unwrap();
    uffd.unregister(mapping.at(2 * count - 2), PAGE).unwrap();
    let socket = service.connect();
    send(&socket, &message(&regions, PAGE), &[uffd.as_fd()]);
    assert_disconnected(&socket);
    until("it is refused", || service.clients().refused == 1);
    assert!(service.reports()[0].contains("is not registered"), "{:?}", service.reports());
}

#[test]
fn a_region_may_be_several_mappings() {
    let service = service(template(64, &[]));
    let memory = Memory::of(64);
    for page in [3, 4, 40] {
        // SAFETY: a page of the test, which it only reads.
        unsafe {
            mprotect(memory.at(page) as *mut _, PAGE as usize, MprotectFlags::READ).unwrap();
        }
    }
    let vmm = Vmm::with(&service, memory);
    (0..64).for_each(|page| assert_eq!(vmm.touch(page), first_byte(page)));
}

#[test]
fn who_does_not_announce_what_it_gives_back_is_mentioned() {
    let service = service(template(16, &[]));
    let mapping = Mapping::anonymous(16);
    let uffd = negotiated(Features::NONE);
    uffd.register(mapping.start, mapping.bytes, RegisterMode::MISSING).unwrap();
    let socket = service.connect();
    let region = Region { start: mapping.start, size: mapping.bytes, offset: 0 };
    send(&socket, &message(&[region], PAGE), &[uffd.as_fd()]);
    assert_eq!(touch(mapping.at(2)), first_byte(2));
    // Said before it is served.
    assert!(service.reports()[0].contains("EVENT_REMOVE"));
}

#[test]
fn what_was_given_back_before_the_handshake_is_zero_too() {
    let service = service(template(16, &[]));
    let memory = Arc::new(Memory::of(16));
    // Waits until somebody reads the event, which is the server.
    let giver = std::thread::spawn({
        let memory = Arc::clone(&memory);
        move || memory.give_back(4, 4)
    });
    until("the event is pending", || pending_events(&memory.uffd));
    let socket = service.connect();
    send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
    giver.join().unwrap();
    for page in 0..16 {
        let expected = if (4..8).contains(&page) { 0 } else { first_byte(page) };
        assert_eq!(touch(memory.at(page)), expected, "page {page}");
    }
    service.clients_are(1, 0, 0, 0);
}

fn pending_events(uffd: &Userfaultfd) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut watched = [rustix::event::PollFd::new(uffd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut watched, Some(&now)).unwrap() == 1
}

/// What may be read from a page, with threads that give it back meanwhile.
struct Truth(Vec<AtomicU8>);

const CONTENT: u8 = 0;
const IN_BETWEEN: u8 = 1;
const ZERO: u8 = 2;

impl Truth {
    fn new(pages: u64) -> Truth {
        Truth((0..pages).map(|_| AtomicU8::new(CONTENT)).collect())
    }

    fn give_back(&self, memory: &Memory, page: u64, pages: u64) {
        let these = || self.0[page as usize..(page + pages) as usize].iter();
        for state in these() {
            let _ = state.compare_exchange(CONTENT, IN_BETWEEN, SeqCst, SeqCst);
        }
        memory.give_back(page, pages);
        these().for_each(|state| state.store(ZERO, SeqCst));
    }

    #[track_caller]
    fn check(&self, page: u64, read: impl Fn() -> Vec<u8>) {
        let state = &self.0[page as usize];
        let before = state.load(SeqCst);
        let bytes = read();
        let after = state.load(SeqCst);
        let expected = content(page);
        for (at, byte) in bytes.iter().enumerate() {
            let right = match (before, after) {
                (ZERO, _) => *byte == 0,
                (_, CONTENT) => *byte == expected[at],
                _ => *byte == 0 || *byte == expected[at],
            };
            assert!(right, "page {page} byte {at} is {byte:#x} ({before} to {after})");
        }
    }
}

/// Reads a page of the memory in kernel mode, all of it.
fn page_in_kernel(address: u64) -> Vec<u8> {
    use std::os::fd::AsRawFd;
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the kernel reads a page of the test's memory; a pipe has room for sixteen.
    let written = unsafe { libc::write(write.as_raw_fd(), address as *const _, PAGE as usize) };
    assert_eq!(written, PAGE as isize, "{}", std::io::Error::last_os_error());
    let mut bytes = vec![0; PAGE as usize];
    std::fs::File::from(read).read_exact(&mut bytes).unwrap();
    bytes
}

/// Seconds of the test under load; many more in a soak.
fn soak_time() -> Duration {
    let seconds = std::env::var("PAGEKIT_SOAK_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(3))
}

/// Threads that read in user and kernel mode, balloons that give back pages at random, and filling
/// ahead, of several VMMs of one template, in shuffled regions: every byte is what it must be.
#[test]
fn every_byte_is_right_under_load() {
    const PAGES: u64 = 4096;
    const VMMS: usize = 3;
    let end = Instant::now() + soak_time();
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        let file = template_file(PAGES, &[]);
        // Half of the rounds with a source that makes everybody wait.
        let layers: &[&str] = if round % 2 == 0 { &["delay=1ms"] } else { &[] };
        let service = service(open(&spec(&file), layers, DEADLINE));
        let sizes = [700, 1, 1500, 300, 1595];
        let vmms: Vec<Vmm> =
            (0..VMMS).map(|_| Vmm::with(&service, Memory::in_regions(PAGES, &sizes))).collect();
        until("all are served", || service.engine().targets() == VMMS);
        let truths: Vec<Truth> = (0..VMMS).map(|_| Truth::new(PAGES)).collect();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (service, over) = (&service, &over);
            scope.spawn(move || {
                let targets = service.engine().living();
                let mut at = 0;
                while !over.load(SeqCst) {
                    at = mix(at + round);
                    let run = Run { start: at % (PAGES - 300), pages: 1 + at % 300 };
                    service.engine().install_ahead(&targets[at as usize % VMMS], run);
                }
            });
            let workers: Vec<_> = (0..3 * VMMS)
                .map(|thread| {
                    let (vmm, truth) = (&vmms[thread / 3], &truths[thread / 3]);
                    scope.spawn(move || {
                        for step in 0..repetitions(600) {
                            let dice = mix(step << 8 | thread as u64) ^ mix(round);
                            let page = dice % PAGES;
                            match thread % 3 {
                                0 => truth.check(page, || vmm.page(page)),
                                1 => truth.check(page, || page_in_kernel(vmm.at(page))),
                                _ => {
                                    let left = room_behind(&sizes, page);
                                    let pages = (1 + (dice >> 32) % 8).min(left);
                                    truth.give_back(&vmm.memory, page, pages);
                                }
                            }
                        }
                    })
                })
                .collect();
            for worker in workers {
                worker.join().unwrap();
            }
            over.store(true, SeqCst);
        });
        for (vmm, truth) in vmms.iter().zip(&truths) {
            for page in (0..PAGES).step_by(7) {
                truth.check(page, || vmm.page(page));
            }
        }
        assert_all_counted(service.engine());
        assert_eq!(service.reports(), [""; 0]);
    }
}

/// How many pages of the region of `page` come from there on.
fn room_behind(sizes: &[u64], page: u64) -> u64 {
    let mut end = 0;
    for size in sizes {
        end += size;
        if page < end {
            break;
        }
    }
    end - page
}

// Recording and filling ahead

#[test]
fn a_recording_demands_each_page_though_more_are_fetched() {
    let template = template(256, &["stats", "delay=100us"]);
    let service = service(Arc::clone(&template));
    let recorder = template.record().unwrap();
    let vmm = Vmm::new(&service);
    let touched = [0, 1, 2, 3, 40, 39, 100];
    for page in touched {
        assert_eq!(vmm.touch(page), first_byte(page));
    }
    let set = recorder.working_set(pagekit::working_set::Until::TheEnd);
    assert_eq!(set.pages(), touched.len() as u64, "{set:?}");
    assert_eq!(service.engine().statistics().demand_faults, touched.len() as u64);
    assert_eq!(counted(&template, "stats.reads"), 3, "neighbours came along");
    template.stop_recording();
    // Nothing is recorded: the rest of a block comes with the second page of it.
    [20, 24].iter().for_each(|page| assert_eq!(vmm.touch(*page), first_byte(*page)));
    let faults = service.engine().statistics().demand_faults;
    (16..32).for_each(|page| assert_eq!(vmm.touch(page), first_byte(page)));
    assert_eq!(service.engine().statistics().demand_faults, faults);
}

fn load(template: &Arc<Template>, run: Run) {
    (run.start..run.end()).for_each(|page| drop(read_page(template, page).unwrap()));
}

#[test]
fn pages_that_came_ahead_are_there_and_no_others() {
    let file = template_file(512, &[Run::between(200, 300)]);
    let template = open(&spec(&file), &["delay=100us"], DEADLINE);
    let service = service(Arc::clone(&template));
    let vmm = Vmm::with(&service, Memory::in_regions(512, &[100, 56, 300, 56]));
    let (engine, target) = (service.engine(), vmm.target());
    assert!(target.can_be_filled());
    // Nothing is in the template, so nothing goes anywhere, zeros apart.
    let nothing = engine.install_ahead(&target, Run::between(0, 200));
    assert_eq!(nothing, Ahead { installed: 0, rest: Run::between(200, 200) });
    load(&template, Run::between(0, 160));
    // In the way: pages that are there, and pages that were given back.
    [3, 50, 51, 120].iter().for_each(|page| assert_eq!(vmm.touch(*page), first_byte(*page)));
    vmm.memory.give_back(60, 10);
    let there = |run: Run| (run.start..run.end()).filter(|page| is_mapped(vmm.at(*page))).count();
    let before = there(Run::between(0, 512)) as u64;
    let ahead = engine.install_ahead(&target, Run::between(0, 512));
    assert_eq!(ahead.rest.pages, 0);
    // What the template has, without what was given back, and what is zero by the map.
    let present = template.statistics().present_pages;
    assert_eq!(before + ahead.installed, present - 10 + 100);
    let faults = engine.statistics().demand_faults;
    for page in (0..60).chain(70..160) {
        assert!(vmm.page(page) == content(page), "page {page}");
    }
    (200..300).for_each(|page| assert_eq!(vmm.page(page), [0; PAGE as usize]));
    assert_eq!(engine.statistics().demand_faults, faults, "nothing trapped");
    (60..70).for_each(|page| assert_eq!(vmm.page(page), [0; PAGE as usize], "page {page}"));
    let statistics = engine.statistics();
    assert_eq!(statistics.ahead_pages, ahead.installed);
    assert_eq!(statistics.targets[0].ahead_pages, ahead.installed);
    assert_eq!(engine.install_ahead(&target, Run::between(0, 512)).installed, 0, "twice is once");
}

/// Whether a page of this process has memory behind it, from pagemap.
fn is_mapped(address: u64) -> bool {
    use std::os::unix::fs::FileExt;
    let mut entry = [0; 8];
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
    u64::from_ne_bytes(entry) >> 63 == 1
}

#[test]
fn pages_go_wherever_they_belong() {
    let template = template(64, &[]);
    load(&template, template.whole());
    let service = service(template);
    // The same pages in two regions.
    let (one, other) = (Mapping::anonymous(64), Mapping::anonymous(32));
    let uffd = negotiated(Features::EVENT_REMOVE);
    for memory in [&one, &other] {
        uffd.register(memory.start, memory.bytes, RegisterMode::MISSING).unwrap();
    }
    let regions = [
        Region { start: one.start, size: one.bytes, offset: 0 },
        Region { start: other.start, size: other.bytes, offset: 16 * PAGE },
    ];
    let socket = service.connect();
    send(&socket, &message(&regions, PAGE), &[uffd.as_fd()]);
    until("it is a target", || service.engine().targets() == 1);
    let target = service.engine().living().pop().unwrap();
    let ahead = service.engine().install_ahead(&target, Run::between(20, 64));
    assert_eq!((ahead.installed, ahead.rest.pages), (44 + 28, 0));
    assert_eq!(touch(one.at(63)), first_byte(63));
    assert_eq!(touch(other.at(31)), first_byte(47));
    assert_eq!(service.engine().statistics().demand_faults, 0);
}

/// While an event is pending the kernel refuses every fill: filling ahead says how far it came, and
/// does not wait.
#[test]
fn filling_ahead_stops_where_the_kernel_refuses() {
    let template = template(64, &[]);
    load(&template, template.whole());
    let engine = Arc::new(Engine::start().unwrap());
    let served = Served::part(&engine, &template, "copy", template.whole(), EVENTS);
    let target = Arc::clone(served.target.as_ref().unwrap());
    // With the engine's loop ended, nobody reads the event.
    engine.stop();
    let address = served.at(8);
    let giver = std::thread::spawn(move || {
        // SAFETY: a page of the test, which it does not look at again.
        unsafe { madvise(address as *mut _, PAGE as usize, Advice::LinuxDontNeed).unwrap() };
    });
    let uffd = target.dup_uffd().unwrap();
    until("the event is pending", || pending_events(&uffd));
    let ahead = engine.install_ahead(&target, Run::between(3, 30));
    assert_eq!(ahead, Ahead { installed: 0, rest: Run::between(3, 30) });
    let mut buffer = uffd::MessageBuffer::new(4);
    assert_eq!(uffd.read_events(&mut buffer).unwrap().count(), 1);
    giver.join().unwrap();
    let ahead = engine.install_ahead(&target, ahead.rest);
    assert_eq!((ahead.installed, ahead.rest.pages), (27, 0));
}

#[test]
fn who_fills_ahead_is_told_of_new_targets() {
    let template = template(64, &[]);
    load(&template, template.whole());
    let service = service(Arc::clone(&template));
    let engine = Arc::clone(service.engine());
    let told = Arc::new(Mutex::new(Vec::new()));
    service.engine().on_target({
        let (told, engine) = (Arc::clone(&told), Arc::downgrade(&engine));
        move |target| {
            let engine = engine.upgrade().unwrap();
            assert_eq!(engine.living().last().unwrap().id, target.id);
            told.lock().unwrap().push(engine.install_ahead(target, template.whole()).installed);
        }
    });
    let vmms = [Vmm::new(&service), Vmm::new(&service)];
    until("both came", || told.lock().unwrap().len() == 2);
    assert_eq!(*told.lock().unwrap(), [64, 64]);
    assert_eq!(vmms[0].touch(30), first_byte(30));
    assert_eq!(engine.statistics().demand_faults, 0);
}

/// A balloon of single pages at random: the map of the target does not get slow.
#[test]
fn a_hundred_thousand_pieces_are_no_trouble() {
    const PAGES: u64 = 1 << 18;
    let service = service(open("zero:1G", &["pass"], DEADLINE));
    let vmm = Vmm::with(&service, Memory::of(PAGES));
    let began = Instant::now();
    let mut page = 1;
    for _ in 0..repetitions(100_000) {
        vmm.memory.give_back(page, 1);
        page = (page + 2 * 77_773) % PAGES;
    }
    let given_back = began.elapsed();
    for step in 0..1000 {
        assert_eq!(vmm.touch(mix(step) % PAGES), 0);
    }
    let all = began.elapsed();
    assert!(all < allowed(Duration::from_secs(30)), "{given_back:?}, {all:?}");
    assert_all_counted(service.engine());
}

// Huge pages

/// Huge pages that the kernel keeps ready for this test, beside those that it kept anyway.
struct Pool {
    pages: u64,
    /// Locks the pool: there is one for all tests that run on this machine.
    _knob: std::fs::File,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

fn pool() -> std::io::Result<u64> {
    Ok(std::fs::read_to_string(POOL)?.trim().parse().unwrap())
}

impl Pool {
    /// None, with a word on why, where there cannot be so many.
    fn of(pages: u64) -> Option<Pool> {
        let skip = |why: String| {
            let _ = writeln!(std::io::stderr(), "skipped: huge pages: {why}");
            assert!(std::env::var_os("PAGEKIT_STRICT").is_none_or(|value| value != "1"), "{why}");
            None
        };
        let knob = std::fs::File::open(POOL).and_then(|knob| {
            flock(&knob, FlockOperation::LockExclusive)?;
            pool().and_then(|now| std::fs::write(POOL, (now + pages).to_string()))?;
            Ok(knob)
        });
        let pool = match knob {
            Ok(knob) => Pool { pages, _knob: knob },
            Err(error) => return skip(format!("{POOL}: {error} (they take root)")),
        };
        let free = std::fs::read_to_string("/proc/meminfo").unwrap();
        let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).unwrap();
        match free.trim().parse::<u64>().unwrap() {
            free if free >= pages => Some(pool),
            free => skip(format!("there is room for {free} of {pages}")),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let left = pool().unwrap().saturating_sub(self.pages);
        std::fs::write(POOL, left.to_string()).unwrap();
    }
}

/// Memory in huge pages of the kernel's default size, which is 2 MiB here.
fn huge_memory(huge_pages: u64) -> Memory {
    let bytes = huge_pages * HUGE;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB;
        mmap_anonymous(std::ptr::null_mut(), bytes as usize, protection, flags)
    };
    let mapping = Mapping { start: start.unwrap() as u64, bytes };
    let uffd = negotiated(Features::EVENT_REMOVE);
    uffd.register(mapping.start, bytes, RegisterMode::MISSING).unwrap();
    let regions = vec![Region { start: mapping.start, size: bytes, offset: 0 }];
    Memory { regions, uffd, page_size: HUGE, _mapping: mapping }
}

#[test]
fn huge_pages_are_served_whole() {
    let Some(_pool) = Pool::of(8) else { return };
    const PAGES: u64 = 4 * 512;
    // The second huge page is zero in part, the third one wholly.
    let zeros = [Run::between(700, 800), Run::between(1000, 1536)];
    let file = template_file(PAGES, &zeros);
    for layers in [&[][..], &["delay=2ms"]] {
        let template = open(&spec(&file), layers, DEADLINE);
        let service = service(template);
        let vmm = Vmm::with(&service, huge_memory(4));
        together(4, |thread| {
            for step in 0..200 {
                let page = mix(step << 3 | thread as u64) % PAGES;
                let zero = zeros.iter().any(|run| run.contains(page));
                let expected = if zero { 0 } else { first_byte(page) };
                let byte = match thread % 2 {
                    0 => vmm.touch(page),
                    _ => touch_in_kernel(vmm.at(page)).unwrap(),
                };
                assert_eq!(byte, expected, "page {page}");
            }
        });
        for page in (0..PAGES).step_by(13) {
            let zero = zeros.iter().any(|run| run.contains(page));
            let expected = if zero { vec![0; PAGE as usize] } else { content(page) };
            assert!(vmm.page(page) == expected, "page {page}");
        }
        assert_all_counted(service.engine());
        let statistics = service.engine().statistics();
        assert_eq!(statistics.targets[0].page_size, HUGE);
        assert_eq!(statistics.reports, [""; 0]);
        assert_eq!(
            (statistics.outcomes.of(Outcome::Copied), statistics.outcomes.of(Outcome::Zeroed)),
            (3, 1)
        );
    }
}

#[test]
fn huge_pages_that_were_given_back_are_zero() {
    let Some(_pool) = Pool::of(8) else { return };
    const PAGES: u64 = 4 * 512;
    let service = service(template(PAGES, &[]));
    let vmm = Vmm::with(&service, huge_memory(4));
    assert_eq!(vmm.touch(600), first_byte(600));
    vmm.memory.give_back(512, 1024);
    for page in [512, 600, 1023, 1024, 1535] {
        assert_eq!(vmm.page(page), [0; PAGE as usize]);
    }
    put(vmm.at(600), 9);
    assert_eq!(vmm.touch(600), 9);
    for page in [0, 511, 1536, 2047] {
        assert!(vmm.page(page) == content(page));
    }
    // Balloon and touches at once.
    let truth = Truth::new(PAGES);
    vmm.memory.give_back(0, PAGES);
    truth.0.iter().for_each(|state| state.store(ZERO, SeqCst));
    together(4, |thread| {
        for step in 0..100 {
            let page = mix(step << 2 | thread as u64) % PAGES;
            match thread {
                0 => vmm.memory.give_back(page / 512 * 512, 512),
                _ => truth.check(page, || vmm.page(page)),
            }
        }
    });
    assert_all_counted(service.engine());
}

#[test]
fn huge_pages_come_ahead_whole_or_not_at_all() {
    let Some(_pool) = Pool::of(8) else { return };
    const PAGES: u64 = 4 * 512;
    let file = template_file(PAGES, &[Run::between(512, 612)]);
    let template = open(&spec(&file), &["delay=100us"], DEADLINE);
    let service = service(Arc::clone(&template));
    let vmm = Vmm::with(&service, huge_memory(4));
    let (engine, target) = (service.engine(), vmm.target());
    // The first is here in part, the second wholly, zeros and all, the third was given back.
    load(&template, Run::between(0, 256));
    load(&template, Run::between(512, 1536));
    vmm.memory.give_back(1024, 512);
    let ahead = engine.install_ahead(&target, Run::between(10, 2000));
    assert_eq!(ahead, Ahead { installed: 512, rest: Run::between(2048, 2048) });
    assert!(vmm.page(700) == content(700));
    assert_eq!(vmm.page(600), [0; PAGE as usize]);
    assert_eq!(engine.statistics().demand_faults, 0);
    assert_eq!(vmm.touch(1030), 0);
    assert!(vmm.page(1600) == content(1600));
    assert!(vmm.page(300) == content(300));
}

#[test]
fn a_huge_page_that_cannot_be_had_is_poisoned() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let Some(_pool) = Pool::of(4) else { return };
    let service = service(template(1024, &["fail=page:20"]));
    let vmm = Vmm::with(&service, huge_memory(2));
    assert_poisoned(vmm.at(300));
    assert_eq!(vmm.touch(600), first_byte(600));
    assert_all_counted(service.engine());
    assert_eq!(outcomes(service.engine(), Outcome::Poisoned), 1);
}

#[test]
fn memory_in_pages_of_another_size_than_it_says_is_refused() {
    let Some(_pool) = Pool::of(4) else { return };
    let service = service(template(1024, &[]));
    // No small pages of a huge region either: the question takes none.
    let huge = Memory { page_size: PAGE, ..huge_memory(2) };
    let mapping = Mapping::anonymous(2048);
    let start = mapping.start.next_multiple_of(HUGE);
    let uffd = negotiated(Features::EVENT_REMOVE);
    uffd.register(start, 2 * HUGE, RegisterMode::MISSING).unwrap();
    let regions = vec![Region { start, size: 2 * HUGE, offset: 0 }];
    let small = Memory { regions, uffd, page_size: HUGE, _mapping: mapping };
    for (memory, why) in [
        (huge, "has huge pages, not pages of 4096 bytes"),
        (small, "has pages of 4096 bytes, not huge pages"),
    ] {
        let before = service.reports().len();
        let socket = service.connect();
        send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
        assert_disconnected(&socket);
        until("it is reported", || service.reports().len() > before);
        assert!(service.reports().pop().unwrap().contains(why));
    }
    // Registered in part.
    let memory = huge_memory(2);
    memory.uffd.unregister(memory.at(512), HUGE).unwrap();
    let socket = service.connect();
    send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
    assert_disconnected(&socket);
    until("it is refused", || service.clients().refused == 3);
    assert!(service.reports().pop().unwrap().contains("is not registered"));
}

#[test]
fn a_vmm_needs_no_rights_of_the_server() {
    // Without userfaultfd of its own the server fills pages all the same: the VMM brings one.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let delivery = pagekit::delivery::Delivery::without("this test");
    let file = template_file(64, &[]);
    let template = Template::open(&spec(&file), &["pass"], &delivery, DEADLINE).unwrap();
    let firecracker = vec![Address::from(path.as_path())];
    let ways = Ways { firecracker, ..Ways::default() };
    let server = Server::start(template, Arc::new(delivery), ways).unwrap();
    let memory = Memory::of(64);
    let socket = connect(&path);
    send(&socket, &memory.message(), &[memory.uffd.as_fd()]);
    (0..64).for_each(|page| assert_eq!(touch(memory.at(page)), first_byte(page)));
    until("it is counted", || server.statistics().firecracker.unwrap().served == 1);
    let _: OwnedFd = socket.into();
}
