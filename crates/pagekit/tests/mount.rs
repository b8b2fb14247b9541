//! The mount: programs that map its file, well and badly behaved; and what becomes of them and of the
//! mount point when somebody dies.
//!
//! Clients are processes of their own. A process that maps what it serves itself can wait for itself.

mod common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use pagekit::error::Error;
use pagekit::page::{Run, PAGE};
use pagekit::server::mount::{Options, Passthrough, Statistics};
use pagekit::server::{Server, Ways};
use pagekit::template::{replay, Template};
use pagekit::working_set::{Until, WorkingSet};
use rustix::mm::{mmap, MapFlags, ProtFlags};
use rustix::mount::{unmount, UnmountFlags};

/// A directory for a mount.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        Place(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn options(&self) -> Options {
        Options { passthrough: Passthrough::Never, ..Options::from(self.path()) }
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(self.path()).unwrap().next().is_none()
    }
}

/// A server with a mount. The server goes before its directory.
struct Mounted {
    server: Server,
    place: Place,
}

fn serve(template: &Arc<Template>, options: Options) -> Result<Server, Error> {
    let ways = Ways { mount: Some(options), ..Ways::default() };
    Server::start(Arc::clone(template), Arc::new(delivery()), ways)
}

fn mounted_with(template: &Arc<Template>, change: impl FnOnce(&mut Options)) -> Mounted {
    let place = Place::new();
    let mut options = place.options();
    change(&mut options);
    Mounted { server: serve(template, options).unwrap(), place }
}

fn mounted(template: &Arc<Template>) -> Mounted {
    mounted_with(template, |_| {})
}

impl Mounted {
    fn path(&self) -> &Path {
        self.server.mount().unwrap().path()
    }

    fn statistics(&self) -> Statistics {
        self.server.mount().unwrap().statistics()
    }

    fn reports(&self) -> String {
        self.server.statistics().engine.reports.join("\n")
    }
}

/// A process that maps the file and does what it is told.
struct Client {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn of(path: &Path) -> Client {
        let mut child = actor("a_client")
            .env("FILE", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut client = Client { child, orders, answers: BufReader::new(answers) };
        assert_eq!(client.hear(), "mapped");
        client
    }

    fn say(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the client is gone");
            // The rest is what the test's harness says.
            if let Some(answer) = line.trim_end().split_once("> ") {
                return answer.1.to_owned();
            }
        }
    }

    fn ask(&mut self, order: &str) -> String {
        self.say(order);
        self.hear()
    }

    #[track_caller]
    fn touches(&mut self, page: u64) {
        assert_eq!(self.ask(&format!("touch {page}")), first_byte(page).to_string(), "page {page}");
    }

    #[track_caller]
    fn is_refused(&mut self, page: u64) {
        assert_eq!(self.ask(&format!("touch {page}")), "refused", "page {page}");
    }

    #[track_caller]
    fn is_right(&mut self, pages: Run) {
        assert_eq!(self.ask(&format!("compare {} {}", pages.start, pages.end())), "right");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn map(file: &File, flags: MapFlags, bytes: u64) -> io::Result<Mapping> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe { mmap(std::ptr::null_mut(), bytes as usize, protection, flags, file, 0) }?;
    Ok(Mapping { start: start as u64, bytes })
}

/// What a [`Client`] runs. Every access is made in kernel mode, so that a page that would raise
/// SIGBUS is an answer.
#[test]
fn a_client() {
    if !playing("a_client") {
        return;
    }
    let path = std::env::var_os("FILE").unwrap();
    let writable = OpenOptions::new().read(true).write(true).open(&path);
    let file = writable.or_else(|_| File::open(&path)).unwrap();
    let bytes = file.metadata().unwrap().size();
    let memory = map(&file, MapFlags::PRIVATE, bytes).unwrap();
    let mut out = io::stdout();
    let mut answer = |text: &str| {
        writeln!(out, "> {text}").unwrap();
        out.flush().unwrap();
    };
    answer("mapped");
    for order in io::stdin().lines() {
        let order = order.unwrap();
        let words: Vec<&str> = order.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        match words[0] {
            "touch" => match touch_in_kernel(memory.at(number(1))) {
                Ok(byte) => answer(&byte.to_string()),
                Err(_) => answer("refused"),
            },
            "put" => {
                put(memory.at(number(1)), number(2) as u8);
                answer("done");
            }
            "hugely" => {
                // SAFETY: the whole mapping, which the advice does not change.
                let advised = unsafe {
                    libc::madvise(memory.start as *mut _, bytes as usize, libc::MADV_HUGEPAGE)
                };
                assert_eq!(advised, 0);
                answer("done");
            }
            "compare" => {
                let wrong = (number(1)..number(2)).find(|page| {
                    let start = memory.at(*page);
                    (0..PAGE).zip(content(*page)).any(|(at, byte)| touch(start + at) != byte)
                });
                answer(&wrong.map_or("right".to_owned(), |page| format!("page {page}")));
            }
            _ => unreachable!("{order}"),
        }
    }
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    numbers.into_iter().collect()
}

fn recorded(set: &WorkingSet) -> BTreeSet<u64> {
    let all = set.critical().iter().chain(set.rest()).flatten();
    all.flat_map(|run| run.start..run.end()).collect()
}

// Content

#[test]
fn clients_read_what_the_template_has() {
    let template = template(2048, &["stats"]);
    let mount = mounted(&template);
    let mut clients = [Client::of(mount.path()), Client::of(mount.path())];
    for at in 0..600 {
        let page = mix(at) % 1024;
        clients[(at % 2) as usize].touches(page);
    }
    for client in &mut clients {
        client.say("compare 0 2048");
    }
    for client in &mut clients {
        assert_eq!(client.hear(), "right");
    }
    // By read(2), cached and not, and at places that are no pages' borders.
    let file = File::open(mount.path()).unwrap();
    let direct =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mount.path()).unwrap();
    for (offset, bytes) in [(0, 1), (4000, 200), (5 * PAGE, 300_000), (2047 * PAGE + 7, 4089)] {
        let run = Run::between(offset / PAGE, (offset + bytes).div_ceil(PAGE));
        let expected: Vec<u8> = (run.start..run.end()).flat_map(content).collect();
        let inside = (offset % PAGE) as usize..(offset % PAGE + bytes) as usize;
        for file in [&file, &direct] {
            let mut buffer = vec![0xEE; bytes as usize];
            file.read_exact_at(&mut buffer, offset).unwrap();
            assert_eq!(buffer, &expected[inside.clone()], "{bytes} bytes at {offset}");
        }
    }
    assert_eq!(file.read_at(&mut [0; 10], 2048 * PAGE).unwrap(), 0, "there the file ends");
    template.audit().unwrap();
    assert_eq!(template.statistics().bytes_read, 2048 * PAGE, "each page was fetched once");
    assert_eq!(mount.statistics().errors, 0);
}

#[test]
fn zero_runs_are_zeros_that_nobody_fetches() {
    let holes = [Run::between(8, 64), Run::between(70, 500)];
    let file = template_file(512, &holes);
    let template = open(&spec(&file), &["stats"], DEADLINE);
    let mount = mounted(&template);
    let mut read = Vec::new();
    io::Read::read_to_end(&mut File::open(mount.path()).unwrap(), &mut read).unwrap();
    for (page, bytes) in read.chunks(PAGE as usize).enumerate() {
        match holes.iter().any(|hole| hole.contains(page as u64)) {
            true => assert!(bytes.iter().all(|byte| *byte == 0), "page {page}"),
            false => assert_eq!(bytes, content(page as u64), "page {page}"),
        }
    }
    assert_eq!(read.len() as u64, 512 * PAGE);
    assert_eq!(template.statistics().bytes_read, 26 * PAGE);
    template.audit().unwrap();
}

#[test]
fn many_readers_share_one_fetch() {
    let template = template(16, &["stats", "delay=100ms"]);
    let mount = mounted(&template);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::of(mount.path())).collect();
    for (page, client) in clients.iter_mut().enumerate() {
        client.say(&format!("touch {}", 3 * page));
    }
    for (page, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.hear(), first_byte(3 * page as u64).to_string());
    }
    assert_eq!(counted(&template, "stats.reads"), 1);
}

#[test]
fn a_single_page_brings_its_neighbours_into_the_template() {
    let template = template(1024, &["stats", "pass"]);
    let mount = mounted_with(&template, |options| options.readahead = 0);
    let mut client = Client::of(mount.path());
    client.ask("hugely");
    client.touches(100);
    let statistics = mount.statistics();
    assert_eq!((statistics.reads - statistics.refused_guesses, statistics.bytes), (1, PAGE));
    assert_eq!(template.present_from(Run::between(96, 1024)), Run::between(96, 112));
    // Reading on where it left off brings more and more.
    for page in 101..400 {
        client.touches(page);
    }
    let fetches = counted(&template, "stats.reads");
    assert!(fetches < 8, "{fetches}");
}

// Writing

#[test]
fn private_writes_stay_private() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    let (mut one, mut other) = (Client::of(mount.path()), Client::of(mount.path()));
    one.touches(5);
    assert_eq!(one.ask(&format!("put 5 {}", !first_byte(5))), "done");
    assert_eq!(one.ask("put 6 77"), "done");
    assert_eq!(one.ask("touch 6"), "77");
    other.is_right(Run::between(0, 64));
    Client::of(mount.path()).is_right(Run::between(0, 64));
    template.audit().unwrap();
}

#[test]
fn a_file_that_is_open_for_writing_takes_no_writes() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    let mut reader = Client::of(mount.path());
    reader.is_right(Run::between(0, 64));
    let path = mount.path();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let direct = libc::O_DIRECT;
    let uncached =
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(path).unwrap();
    let garbage = vec![0xAB; PAGE as usize];
    let punch = |mode| {
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, 8 * PAGE as i64) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    for (what, outcome) in [
        ("write", file.write_all_at(&garbage, 5 * PAGE)),
        ("part of a page", file.write_all_at(b"xyz", 6 * PAGE + 10)),
        ("uncached", uncached.write_all_at(&garbage, 7 * PAGE)),
        ("beyond the end", file.write_all_at(&garbage, 64 * PAGE)),
        ("shorter", file.set_len(PAGE)),
        ("longer", file.set_len(100 * PAGE)),
        ("punch", punch(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)),
        ("zero", punch(libc::FALLOC_FL_ZERO_RANGE)),
        ("allocate", punch(0)),
        ("truncate", OpenOptions::new().write(true).truncate(true).open(path).map(drop)),
        ("mode", fs::set_permissions(path, fs::Permissions::from_mode(0o777))),
        ("remove", fs::remove_file(path)),
        ("create", File::create(path.with_file_name("other")).map(drop)),
        ("directory", fs::create_dir(path.with_file_name("other"))),
    ] {
        let errno = outcome.expect_err(what).raw_os_error();
        assert_eq!(errno, Some(libc::EROFS), "{what}");
    }
    // Not even for those who had the pages mapped all the time.
    reader.is_right(Run::between(0, 64));
    Client::of(path).is_right(Run::between(0, 64));
    assert_eq!(mount.statistics().damaged, None);
    assert_eq!(fs::metadata(path).unwrap().size(), 64 * PAGE);
}

#[test]
fn without_write_bits_nobody_opens_it_for_writing() {
    let template = template(16, &[]);
    let mount = mounted_with(&template, |options| options.mode = 0o444);
    let opened = OpenOptions::new().read(true).write(true).open(mount.path());
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EROFS));
    let file = File::open(mount.path()).unwrap();
    let shared = map(&file, MapFlags::SHARED, 16 * PAGE).unwrap_err();
    assert_eq!(shared.raw_os_error(), Some(libc::EACCES));
    Client::of(mount.path()).is_right(Run::between(0, 16));
}

#[test]
fn a_page_that_was_changed_under_us_ends_the_mount_loudly() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    let mut client = Client::of(mount.path());
    client.touches(9);
    let file = OpenOptions::new().read(true).write(true).open(mount.path()).unwrap();
    {
        let shared = map(&file, MapFlags::SHARED, 64 * PAGE).unwrap();
        put(shared.at(3), !first_byte(3));
    }
    // The kernel sends it at once when asked to.
    let _ = file.sync_all();
    until("it is reported", || mount.reports().contains("page 3 of"));
    assert!(mount.statistics().damaged.is_some());
    for page in [9, 20] {
        until("it is forgotten", || client.ask(&format!("touch {page}")) == "refused");
    }
    let read = File::open(mount.path()).unwrap().read_at(&mut [0; 1], 3 * PAGE);
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
    // The template itself is sound.
    assert_eq!(read_page(&template, 3).unwrap(), content(3));
    template.audit().unwrap();
}

#[test]
fn owner_and_mode_say_who_may_read() {
    let template = template(16, &[]);
    let nobody = 65534;
    let cat = |mount: &Mounted, user| {
        let mut command = Command::new("cat");
        command.arg(mount.path()).stdout(Stdio::null()).stderr(Stdio::null());
        command.uid(user).gid(user).status().unwrap().success()
    };
    let private = mounted(&template);
    assert!(cat(&private, 0) && !cat(&private, nobody));
    let public = mounted_with(&template, |options| options.mode = 0o644);
    assert!(cat(&public, 0) && cat(&public, nobody));
    let given = mounted_with(&template, |options| {
        options.owner = Some((nobody, Some(4711)));
        options.name = "ram".to_owned();
    });
    assert!(cat(&given, nobody) && !cat(&given, 1));
    assert_eq!(given.path(), given.place.path().join("ram"));
    let metadata = fs::metadata(given.path()).unwrap();
    let (uid, gid, mode) = (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777);
    assert_eq!((uid, gid, mode), (nobody, 4711, 0o600));
    let names: Vec<_> =
        fs::read_dir(given.place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [OsStr::new("ram")]);
}

// Failures

#[test]
fn a_page_that_cannot_be_had_is_an_error_for_who_needs_it() {
    let template = template(64, &["fail=page:20"]);
    let mount = mounted(&template);
    let (mut one, mut other) = (Client::of(mount.path()), Client::of(mount.path()));
    one.is_refused(20);
    other.is_right(Run::between(0, 20));
    other.is_right(Run::between(21, 64));
    other.is_refused(20);
    one.touches(21);
    assert!(mount.statistics().errors > 0);
    assert!(mount.reports().contains("page 20"), "{}", mount.reports());
    template.audit().unwrap();
}

#[test]
fn a_page_that_comes_late_comes() {
    let template = template(64, &["fail=3"]);
    let mount = mounted(&template);
    Client::of(mount.path()).is_right(Run::between(0, 64));
    assert_eq!(mount.statistics().errors, 0);
}

#[test]
fn a_damaged_template_is_never_served() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    let mut client = Client::of(mount.path());
    client.touches(5);
    // A stranger reads a hole.
    assert_eq!(touch(Mapping::of(&template, template.whole()).at(40)), 0);
    assert!(template.audit().is_err());
    let mut later = Client::of(mount.path());
    later.is_refused(63);
    assert!(mount.statistics().errors > 0);
}

// Fetched ahead, and recorded

/// The kernel had `pages` of what was read, but for the few that it may drop at any time.
#[track_caller]
fn assert_cached(statistics: &Statistics, pages: u64) {
    assert!(statistics.bytes <= pages / 10 * PAGE, "{statistics:?}");
}

#[test]
fn who_reads_what_was_pushed_asks_nobody() {
    let template = template(700, &[]);
    template.load(1 << 20, None).unwrap();
    let mount = mounted(&template);
    let mut client = Client::of(mount.path());
    mount.server.mount().unwrap().push(template.whole());
    client.is_right(template.whole());
    let statistics = mount.statistics();
    assert_eq!(statistics.pushed_pages, 700);
    assert_cached(&statistics, 700);
}

#[test]
fn absent_pages_are_not_pushed() {
    let template = template(64, &[]);
    read_page(&template, 40).unwrap();
    let present =
        (0..64).filter(|page| template.present_from(Run { start: *page, pages: 1 }).pages == 1);
    let present = present.count() as u64;
    let mount = mounted(&template);
    mount.server.mount().unwrap().push(template.whole());
    assert_eq!(mount.statistics().pushed_pages, present);
    Client::of(mount.path()).is_right(template.whole());
}

/// Touches pages while they are recorded, also in memory where the kernel reads 4 MiB for a page.
#[test]
fn exactly_what_was_touched_is_recorded() {
    for hugely in [false, true] {
        let template = template(2048, &["stats"]);
        let mount = mounted(&template);
        // Somebody was here before, and the kernel has pages.
        Client::of(mount.path()).is_right(Run::between(0, 300));
        let recorder = template.record().unwrap();
        let touched = [7, 8, 250, 1030, 1500, 1501, 1502, 2047];
        let mut client = Client::of(mount.path());
        if hugely {
            client.ask("hugely");
        }
        touched.iter().for_each(|page| client.touches(*page));
        let set = recorder.working_set(Until::TheEnd);
        assert_eq!(recorded(&set), pages(touched), "hugely: {hugely}");
        template.stop_recording();
        // What was refused meanwhile is no worse to read.
        let mut after = Client::of(mount.path());
        let before = mount.statistics().reads;
        after.is_right(template.whole());
        let reads = mount.statistics().reads - before;
        assert!(reads < 200, "{reads} requests for 2048 pages");
        assert_eq!(mount.statistics().errors, 0);
    }
}

#[test]
fn a_replay_fills_the_mount_too() {
    let template = template(4096, &["stats", "delay=1ms"]);
    let touched = [(0, 40), (500, 3), (3000, 100)];
    let touched = pages(touched.into_iter().flat_map(|(start, n)| start..start + n));
    let recorder = template.record().unwrap();
    touched.iter().for_each(|page| template.demanded(*page));
    let set = recorder.working_set(Until::TheEnd);
    template.stop_recording();

    let mount = mounted(&template);
    let replay = template.replay(&set, replay::Options::default()).unwrap();
    assert!(replay.wait(PATIENCE).unwrap());
    until("all of it is pushed", || mount.statistics().pushed_pages >= touched.len() as u64);
    let mut client = Client::of(mount.path());
    client.ask("hugely");
    touched.iter().for_each(|page| client.touches(*page));
    assert_cached(&mount.statistics(), touched.len() as u64);
    // What it lacks is fetched when it is demanded, without the 4 MiB around it.
    client.touches(2000);
    assert!(mount.statistics().refused_guesses > 0);
    let brought = template.statistics().present_pages;
    assert!(brought <= touched.len() as u64 + 64, "{brought}");
    client.is_right(Run::between(1024, 2048));
}

// Passing through

/// Whether the kernel can do it, as a mount finds out; says so if it cannot.
fn need_passthrough() -> bool {
    let file = template_file(1, &[]);
    let template = open(&spec(&file), &[], DEADLINE);
    let mount = mounted_with(&template, |options| {
        options.passthrough = Passthrough::Auto;
        options.mode = 0o444;
    });
    let found = mount.statistics();
    if found.plan != "passthrough" {
        assert!(running() < (6, 9), "{}", found.reason);
        skip("passthrough", "since Linux 6.9");
    }
    found.plan == "passthrough"
}

#[test]
fn a_local_file_is_passed_through() {
    if !need_passthrough() {
        return;
    }
    let file = template_file(64, &[]);
    let template = open(&spec(&file), &[], DEADLINE);
    let mount = mounted_with(&template, |options| {
        options.passthrough = Passthrough::Auto;
        options.mode = 0o444;
    });
    assert_eq!(mount.statistics().plan, "passthrough", "{}", mount.statistics().reason);
    Client::of(mount.path()).is_right(template.whole());
    assert_eq!(mount.statistics().reads, 0);
    let opened = OpenOptions::new().read(true).write(true).open(mount.path());
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(template.statistics().fetches, 0);
}

#[test]
fn what_passes_through_is_decided_when_mounting() {
    if !need_passthrough() {
        return;
    }
    let file = template_file(64, &[]);
    let alone = open(&spec(&file), &[], DEADLINE);
    let through_layer = open(&spec(&file), &["pass"], DEADLINE);
    let plan = |template: &Arc<Template>, passthrough, mode| {
        let place = Place::new();
        let options = Options { passthrough, mode, ..place.options() };
        let server = serve(template, options)?;
        let plan = server.mount().unwrap().statistics().plan;
        drop(server);
        assert!(place.is_empty());
        Ok::<_, Error>(plan)
    };
    assert_eq!(plan(&alone, Passthrough::Never, 0o444).unwrap(), "cached");
    assert_eq!(plan(&alone, Passthrough::Auto, 0o600).unwrap(), "cached");
    assert_eq!(plan(&alone, Passthrough::Always, 0o444).unwrap(), "passthrough");
    let writable = plan(&alone, Passthrough::Always, 0o600).unwrap_err();
    assert!(matches!(writable, Error::Usage { .. }), "{writable}");
    assert_eq!(plan(&through_layer, Passthrough::Auto, 0o444).unwrap(), "cached");
    let absent = plan(&through_layer, Passthrough::Always, 0o444).unwrap_err();
    assert!(matches!(absent, Error::Unsupported { .. }), "{absent}");
    through_layer.load(1 << 20, None).unwrap();
    assert_eq!(plan(&through_layer, Passthrough::Auto, 0o444).unwrap(), "passthrough");
    let recorder = alone.record().unwrap();
    assert_eq!(plan(&alone, Passthrough::Auto, 0o444).unwrap(), "cached");
    drop(recorder);
}

// The mount point

#[test]
fn a_place_that_is_taken_or_none_is_refused() {
    let template = template(16, &[]);
    let mount = mounted(&template);
    let refused = |options: Options| serve(&template, options).map(drop).unwrap_err();
    let at = |path: &Path| Options::from(path);

    let busy = refused(at(mount.place.path()));
    assert!(matches!(busy, Error::AddressInUse { .. }), "{busy}");
    let missing = refused(at(&mount.place.path().join("missing")));
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    let other = refused(at(Path::new("/proc")));
    assert!(other.to_string().contains("is a mount point already (proc of proc)"), "{other}");

    let place = Place::new();
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    let no_directory = refused(at(&file));
    assert!(no_directory.to_string().contains("is no directory"), "{no_directory}");
    let full = refused(at(place.path()));
    assert!(full.to_string().contains("is not empty"), "{full}");
    for name in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        let empty = Place::new();
        let nameless = refused(Options { name: name.to_owned(), ..empty.options() });
        assert!(matches!(nameless, Error::Usage { .. }), "{nameless}");
    }
    // Nobody was disturbed.
    Client::of(mount.path()).is_right(Run::between(0, 16));
}

#[test]
fn stopping_ends_everything_at_once_also_under_load() {
    let template = open(&spec(&template_file(1024, &[])), &["delay=30s"], DEADLINE);
    let Mounted { server, place } = mounted(&template);
    let path = server.mount().unwrap().path().to_owned();
    // Pages that need no source.
    let present = Run::between(500, 503);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::of(&path)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.say(&format!("touch {}", 100 * number));
    }
    until("all of them wait", || server.mount().unwrap().statistics().reads >= 4);
    let began = Instant::now();
    server.mount().unwrap().stop();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    for client in &mut clients {
        assert_eq!(client.hear(), "refused", "nobody waits for ever, nobody reads zeros");
        client.is_refused(present.start);
    }
    assert!(place.is_empty(), "and the directory is what it was");
    let opened = File::open(&path);
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::NotFound);
    // The fetches are still under way, for 30 seconds: nobody waits for them.
    std::mem::forget(server);
}

#[test]
fn what_the_kernel_has_stays_readable_afterwards() {
    let template = template(64, &[]);
    let Mounted { server, place } = mounted_with(&template, |options| options.readahead = 0);
    let mut client = Client::of(server.mount().unwrap().path());
    client.touches(5);
    drop(server);
    client.touches(5);
    client.is_refused(6);
    assert!(place.is_empty());
}

/// A server that mounts, says so, and waits to be killed.
#[test]
fn a_server() {
    if !playing("a_server") {
        return;
    }
    let template = template(64, &[]);
    let directory = PathBuf::from(std::env::var_os("DIRECTORY").unwrap());
    let server = serve(&template, Options::from(&directory)).unwrap();
    println!("> mounted");
    io::stdin().lines().for_each(drop);
    drop(server);
}

#[test]
fn the_mount_of_a_server_that_was_killed_is_replaced() {
    let place = Place::new();
    let mut child = actor("a_server")
        .env("DIRECTORY", place.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    said.find(|line| line.as_ref().unwrap().contains("> mounted")).unwrap().unwrap();
    let mut client = Client::of(&place.path().join("memory"));
    client.touches(3);

    let template = template(64, &[]);
    let busy = serve(&template, place.options()).unwrap_err();
    assert!(matches!(busy, Error::AddressInUse { .. }), "{busy}");
    // Stopped it does not answer, but it is not gone.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let busy = serve(&template, place.options()).unwrap_err();
    assert!(matches!(busy, Error::AddressInUse { .. }), "{busy}");

    child.kill().unwrap();
    child.wait().unwrap();
    client.is_refused(60);
    let gone = fs::read_dir(place.path()).unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(libc::ENOTCONN), "it left its mount");
    let server = serve(&template, place.options()).unwrap();
    Client::of(server.mount().unwrap().path()).is_right(Run::between(0, 64));
    client.is_refused(61);
    drop(server);
    assert!(place.is_empty());
}

#[test]
fn who_unmounts_it_under_us_is_noticed_and_clients_live_on() {
    let template = template(64, &[]);
    let mount = mounted_with(&template, |options| options.readahead = 0);
    let mut client = Client::of(mount.path());
    client.touches(1);
    assert!(mount.statistics().mounted);
    unmount(mount.place.path(), UnmountFlags::DETACH).unwrap();
    until("it is reported", || mount.reports().contains("unmounted"));
    assert!(mount.reports().contains("is served on"), "{}", mount.reports());
    assert!(!mount.statistics().mounted);
    client.touches(40);

    // Somebody else's mount at the same place is left alone.
    let other = serve(&template, mount.place.options()).unwrap();
    mount.server.stop();
    assert!(other.mount().unwrap().statistics().mounted);
    Client::of(other.mount().unwrap().path()).is_right(Run::between(0, 64));
    client.is_refused(41);
}

#[test]
fn unmounted_without_clients_it_is_over() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    File::open(mount.path()).unwrap().read_at(&mut [0; 1], 0).unwrap();
    until("nobody has it open", || mount.statistics().clients == 0);
    unmount(mount.place.path(), UnmountFlags::empty()).unwrap();
    until("it is reported", || mount.reports().contains("cannot be opened any more"));
    assert!(mount.place.is_empty());
    mount.server.stop();
}

/// As an administrator does by the control file system.
#[test]
fn a_connection_that_somebody_ended_leaves_no_mount() {
    let template = template(64, &[]);
    let mount = mounted(&template);
    let mut client = Client::of(mount.path());
    client.touches(1);
    // With the flag alone the connection ends, and the mount stays.
    let flags = UnmountFlags::FORCE;
    assert_eq!(unmount(mount.place.path(), flags).unwrap_err(), rustix::io::Errno::BUSY);
    until("it is reported", || mount.reports().contains("cannot be opened any more"));
    client.is_refused(60);
    until("the mount is gone", || fs::read_dir(mount.place.path()).is_ok());
    assert!(mount.place.is_empty());
}

/// Counts descriptors and threads of a process that does nothing else.
#[test]
fn mounts_come_and_go() {
    if !playing("mounts_come_and_go") {
        assert!(play("mounts_come_and_go", Stdio::inherit()).success());
        return;
    }
    let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let template = template(64, &[]);
    let place = Place::new();
    let once = || {
        let server = serve(&template, place.options()).unwrap();
        Client::of(server.mount().unwrap().path()).is_right(Run::between(0, 64));
        server.mount().unwrap().push(Run::between(0, 64));
        assert!(serve(&template, place.options()).is_err());
    };
    once();
    let before = (count("fd"), count("task"));
    for _ in 0..10 {
        once();
    }
    // A thread that ended is listed for a moment longer.
    until("all are gone", || (count("fd"), count("task")) == before);
}
