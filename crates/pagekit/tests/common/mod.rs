//! What the tests of the engine share: template files with known content, targets in this process,
//! and children that play a role of their own. Nothing here sleeps to wait for a state.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use pagekit::backend::{copy::Copy, share::Share, Backend};
use pagekit::delivery::Delivery;
use pagekit::engine::region::RegionMap;
use pagekit::engine::{Engine, NewTarget, Outcome, Target};
use pagekit::page::{Run, PAGE};
use pagekit::template::Template;
use rustix::mm::{mmap, mmap_anonymous, munmap, MapFlags, ProtFlags};
use uffd::{Features, Opening, RegisterMode, State, Support, Userfaultfd};

/// Whether a feature of the binding's table is there; says so if it is not. With PAGEKIT_STRICT=1 one
/// that this kernel should have must be there.
#[must_use]
pub fn need(name: &str) -> bool {
    static SUPPORT: OnceLock<Support> = OnceLock::new();
    let support = SUPPORT.get_or_init(Support::probe);
    let rows = support.rows();
    let (feature, state) = rows.iter().find(|(feature, _)| feature.name == name).unwrap();
    if *state != State::Have {
        let strict = std::env::var_os("PAGEKIT_STRICT").is_some_and(|value| value == "1");
        let newer = number(feature.since) > running();
        assert!(!strict || newer, "{name} is needed here, and it is {state:?}");
        skip(name, &format!("since Linux {}", feature.since));
    }
    *state == State::Have
}

/// Says that something is not tested. Not by eprintln!, which shows nothing of a test that passes.
pub fn skip(need: &str, why: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(io::stderr(), "skipped: {test}: {need}: {why}");
}

/// The kernel's release, major and minor.
pub fn running() -> (u32, u32) {
    number(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap())
}

fn number(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse());
    let mut next = || parts.next().and_then(Result::ok).unwrap_or(0);
    (next(), next())
}

/// Longer than anything here takes: only a failing test waits so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long a template retries in tests where nothing fails.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// What targets announce, forks apart: those concern every target of a process.
pub const EVENTS: Features =
    Features(Features::EVENT_REMAP.0 | Features::EVENT_REMOVE.0 | Features::EVENT_UNMAP.0);
pub const BOTH: [&str; 2] = ["copy", "share"];

/// The content of a page of every template file: never zero, different on every page.
pub fn content(page: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAGE as usize);
    for at in 0..PAGE / 8 {
        bytes.extend_from_slice(&word(page, at));
    }
    bytes
}

fn word(page: u64, at: u64) -> [u8; 8] {
    ((page * 512 + at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).to_ne_bytes()
}

pub fn first_byte(page: u64) -> u8 {
    word(page, 0)[0]
}

/// A template file of `pages` pages, of which those of `holes` were never written.
pub fn template_file(pages: u64, holes: &[Run]) -> tempfile::NamedTempFile {
    watch();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(pages * PAGE).unwrap();
    for page in (0..pages).filter(|page| !holes.iter().any(|hole| hole.contains(*page))) {
        file.as_file().write_all_at(&content(page), page * PAGE).unwrap();
    }
    file
}

pub fn spec(file: &tempfile::NamedTempFile) -> String {
    format!("file:{}", file.path().display())
}

/// A full way to userfaultfd, which these tests need: as root, or with the rights that the message
/// names.
pub fn delivery() -> Delivery {
    let delivery = Delivery::probe();
    if let Err(error) = delivery.check() {
        panic!("{error}; hint: {}", error.hint().unwrap_or("none"));
    }
    delivery
}

pub fn open(spec: &str, layers: &[&str], deadline: Duration) -> Arc<Template> {
    watch();
    Template::open(spec, layers, &delivery(), deadline).unwrap()
}

/// A template of `pages` pages of known content.
pub fn template(pages: u64, layers: &[&str]) -> Arc<Template> {
    // The source holds the file open, so its name may go.
    open(&spec(&template_file(pages, &[])), layers, DEADLINE)
}

/// A counter of the template's stack.
pub fn counted(template: &Template, name: &str) -> u64 {
    let all = template.statistics().stack;
    all.iter().find(|(known, _)| known == name).expect("the layer is there").1
}

pub fn read_page(
    template: &Arc<Template>,
    page: u64,
) -> Result<Vec<u8>, Arc<pagekit::error::Error>> {
    let mut buffer = vec![0xEE; PAGE as usize];
    template.read(page * PAGE, &mut buffer).map(|()| buffer)
}

/// Address space of a test.
#[derive(Debug)]
pub struct Mapping {
    pub start: u64,
    pub bytes: u64,
}

impl Mapping {
    pub fn anonymous(pages: u64) -> Mapping {
        let bytes = pages * PAGE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes as usize, protection, MapFlags::PRIVATE)
        };
        Mapping { start: start.unwrap() as u64, bytes }
    }

    /// A private mapping of pages of a template's file, as a client of `share` makes it.
    pub fn of(template: &Template, run: Run) -> Mapping {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                run.bytes() as usize,
                protection,
                MapFlags::PRIVATE,
                template.cache().readonly(),
                run.offset(),
            )
        };
        Mapping { start: start.unwrap() as u64, bytes: run.bytes() }
    }

    pub fn at(&self, page: u64) -> u64 {
        self.start + page * PAGE
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by this value; no test touches it after the value is gone.
        let _ = unsafe { munmap(self.start as *mut _, self.bytes as usize) };
    }
}

/// A userfaultfd of this process, negotiated.
pub fn negotiated(features: Features) -> Userfaultfd {
    let delivery = delivery();
    let opening = match delivery.device() {
        Some(device) => Opening::Device(device),
        None => Opening::SystemCall(uffd::Access::Full),
    };
    let uffd = Userfaultfd::open(opening).unwrap();
    uffd.handshake(features).unwrap();
    uffd
}

pub fn backend(name: &str) -> Arc<dyn Backend> {
    match name {
        "copy" => Arc::new(Copy),
        _ => Arc::new(Share),
    }
}

/// A target in this process: memory that an engine serves.
#[derive(Debug)]
pub struct Served {
    pub target: Option<Arc<Target>>,
    pub memory: Mapping,
    engine: Arc<Engine>,
}

impl Served {
    pub fn new(engine: &Arc<Engine>, template: &Arc<Template>, name: &str) -> Served {
        Served::part(engine, template, name, template.whole(), EVENTS)
    }

    pub fn part(
        engine: &Arc<Engine>,
        template: &Arc<Template>,
        name: &str,
        run: Run,
        features: Features,
    ) -> Served {
        let memory = match name {
            "copy" => Mapping::anonymous(run.pages),
            _ => Mapping::of(template, run),
        };
        let uffd = negotiated(features);
        uffd.register(memory.start, memory.bytes, RegisterMode::MISSING).unwrap();
        let new = NewTarget {
            uffd,
            process: None,
            template: Arc::clone(template),
            backend: backend(name),
            regions: RegionMap::new(memory.start, run),
            beacon: None,
            page_size: PAGE,
            owner: None,
            connection: None,
        };
        let target = engine.add(new).unwrap();
        Served { target: Some(target), memory, engine: Arc::clone(engine) }
    }

    pub fn at(&self, page: u64) -> u64 {
        self.memory.at(page)
    }

    /// The first byte of a page, read by this thread.
    pub fn touch(&self, page: u64) -> u8 {
        touch(self.at(page))
    }

    /// The whole page, read by this thread.
    pub fn page(&self, page: u64) -> Vec<u8> {
        touch_all(self.at(page))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The userfaultfd goes before the mapping: unmapping would wait for a reader of its event.
        if let Some(target) = self.target.take() {
            self.engine.forget(target.id);
        }
    }
}

pub fn touch(address: u64) -> u8 {
    // SAFETY: the test maps the address; the read may wait for a fault to be served.
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

/// The page at an address, read by this thread.
pub fn touch_all(address: u64) -> Vec<u8> {
    // SAFETY: the test maps the whole page; the read may wait for its fault.
    unsafe { std::ptr::read_volatile(address as *const [u8; PAGE as usize]) }.to_vec()
}

pub fn put(address: u64, value: u8) {
    // SAFETY: the test maps the address writable and holds no reference to it.
    unsafe { std::ptr::write_volatile(address as *mut u8, value) }
}

/// Reads one byte in kernel mode, by write(2) from the address: a page that would raise SIGBUS in
/// user mode is an error here.
pub fn touch_in_kernel(address: u64) -> io::Result<u8> {
    let (read, write) = rustix::pipe::pipe()?;
    // SAFETY: the kernel reads one byte of the address and answers EFAULT where it cannot.
    let written = unsafe { libc::write(write.as_raw_fd(), address as *const _, 1) };
    if written != 1 {
        return Err(io::Error::last_os_error());
    }
    let mut byte = [0];
    rustix::io::read(&read, &mut byte[..])?;
    Ok(byte[0])
}

pub fn assert_poisoned(address: u64) {
    let outcome = touch_in_kernel(address);
    assert_eq!(outcome.as_ref().err().and_then(io::Error::raw_os_error), Some(libc::EFAULT));
}

/// Looks again and again until it is so; for conditions that announce themselves in no way.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let patience = Instant::now() + allowed(PATIENCE);
    while !condition() {
        assert!(Instant::now() < patience, "never: {what}");
        std::thread::yield_now();
    }
}

/// Every fault that was read has ended in exactly one outcome.
pub fn assert_all_counted(engine: &Engine) {
    until("each fault has its outcome", || {
        let statistics = engine.statistics();
        statistics.outcomes.len() == statistics.demand_faults
    });
}

pub fn outcomes(engine: &Engine, outcome: Outcome) -> u64 {
    engine.statistics().outcomes.of(outcome)
}

/// A number that looks random, the same in every run.
pub fn mix(seed: u64) -> u64 {
    let mut value = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

const ROLE: &str = "PAGEKIT_TEST_ROLE";

/// Runs the test `role` of this program in a process of its own, where [`playing`] is true.
pub fn play(role: &str, stderr: Stdio) -> ExitStatus {
    actor(role).stderr(stderr).status().unwrap()
}

/// The test `role` of this program, to be run in a process of its own.
pub fn actor(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", role, "--nocapture"]).env(ROLE, role).stdout(Stdio::null());
    command
}

/// Whether this process was started to play `role`; in any other a test of that name does nothing.
pub fn playing(role: &str) -> bool {
    std::env::var_os(ROLE).is_some_and(|playing| playing == role)
}

/// What PAGEKIT_TEST_SECONDS says: how long this program may take on a machine that is slow.
fn given_time() -> Option<Duration> {
    let given = std::env::var("PAGEKIT_TEST_SECONDS").ok()?;
    given.parse().ok().map(Duration::from_secs)
}

/// So many repetitions, or the tenth of it where instructions are emulated.
pub fn repetitions(usual: u64) -> u64 {
    match given_time() {
        Some(_) => usual / 10,
        None => usual,
    }
}

/// What may take so long, and longer where instructions are emulated.
pub fn allowed(usual: Duration) -> Duration {
    match given_time() {
        Some(_) => 20 * usual,
        None => usual,
    }
}

/// A hanging test must not hang the whole run: the process ends itself, loudly.
fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit = given_time().unwrap_or(3 * PATIENCE);
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            let _ = writeln!(io::stderr(), "a test hangs: giving up");
            std::process::abort();
        });
    });
}

/// Lets threads start together.
pub fn together(threads: usize, body: impl Fn(usize) + Sync) {
    let waiting = AtomicUsize::new(threads);
    std::thread::scope(|scope| {
        for number in 0..threads {
            let (waiting, body) = (&waiting, &body);
            scope.spawn(move || {
                waiting.fetch_sub(1, SeqCst);
                while waiting.load(SeqCst) > 0 {
                    std::thread::yield_now();
                }
                body(number);
            });
        }
    });
}
