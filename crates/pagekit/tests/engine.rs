//! The engine against the real kernel, with targets in this process.

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use pagekit::engine::region::RegionMap;
use pagekit::engine::{Engine, NewTarget, Outcome};
use pagekit::page::{Run, PAGE};
use pagekit::template::Template;
use rustix::mm::{madvise, mprotect, mremap, munmap, Advice, MprotectFlags, MremapFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags};
use uffd::{Access, Opening, RegisterMode, Support, Userfaultfd};

fn engine() -> Arc<Engine> {
    Arc::new(Engine::start().unwrap())
}

/// An engine and a target that has all of the template.
fn serve(template: &Arc<Template>, name: &str) -> (Arc<Engine>, Served) {
    let engine = engine();
    let served = Served::new(&engine, template, name);
    (engine, served)
}

fn done_as(name: &str) -> Outcome {
    match name {
        "copy" => Outcome::Copied,
        _ => Outcome::Shared,
    }
}

fn discard(address: u64, pages: u64) {
    // SAFETY: memory of the test, which expects it to be dropped.
    unsafe {
        madvise(address as *mut _, (pages * PAGE) as usize, Advice::LinuxDontNeed).unwrap();
    }
}

#[test]
fn every_page_of_every_target_has_the_templates_content() {
    // From a source at hand, and from one that makes everybody wait.
    let near = all_pages_of_all_targets(&[]);
    let far = all_pages_of_all_targets(&["delay=100us"]);
    assert_eq!(far.bytes_read, far.size, "each page was read once");
    assert_eq!(far.present_pages, far.pages);
    assert!(near.present_pages <= near.pages);
}

fn all_pages_of_all_targets(layers: &[&str]) -> pagekit::template::Statistics {
    const PAGES: u64 = 512;
    let template = template(PAGES, layers);
    let engine = engine();
    let targets: Vec<Served> =
        BOTH.iter().cycle().take(4).map(|name| Served::new(&engine, &template, name)).collect();
    together(8, |thread| {
        let target = &targets[thread / 2];
        for step in 0..PAGES {
            let page = match thread % 2 {
                0 => step,
                _ => mix(step + thread as u64) % PAGES,
            };
            let byte = match step % 3 {
                0 => touch_in_kernel(target.at(page)).unwrap(),
                _ => target.touch(page),
            };
            assert_eq!(byte, first_byte(page), "target {thread} page {page}");
        }
    });
    for target in &targets {
        for page in 0..PAGES {
            assert!(target.page(page) == content(page), "page {page}");
        }
    }
    assert_all_counted(&engine);
    let statistics = engine.statistics();
    assert!(statistics.demand_faults > 0 && statistics.reports.is_empty(), "{statistics:?}");
    let faults: u64 = statistics.targets.iter().map(|target| target.faults).sum();
    assert_eq!(faults, statistics.demand_faults);
    template.audit().unwrap();
    template.statistics()
}

#[test]
fn a_later_fork_of_share_never_traps_where_another_one_was() {
    let template = template(64, &[]);
    let engine = engine();
    let first = Served::new(&engine, &template, "share");
    (0..64).for_each(|page| assert_eq!(first.touch(page), first_byte(page)));
    let faults = engine.statistics().demand_faults;
    let second = Served::new(&engine, &template, "share");
    (0..64).for_each(|page| assert_eq!(second.touch(page), first_byte(page)));
    assert_eq!(engine.statistics().demand_faults, faults);
}

#[test]
fn writes_stay_with_their_target() {
    for name in BOTH {
        let template = template(32, &[]);
        let engine = engine();
        let (one, other) =
            (Served::new(&engine, &template, name), Served::new(&engine, &template, name));
        // The first touch of a page is a write.
        put(one.at(3) + 1, 0x77);
        let mut expected = content(3);
        assert_eq!(other.page(3), expected);
        expected[1] = 0x77;
        assert_eq!(one.page(3), expected);
        assert_eq!(read_page(&template, 3).unwrap(), content(3));
    }
}

#[test]
fn many_waiters_across_targets_are_one_fetch() {
    let template = template(16, &["stats", "delay=80ms"]);
    let engine = engine();
    let targets: Vec<Served> =
        BOTH.iter().cycle().take(4).map(|name| Served::new(&engine, &template, name)).collect();
    together(12, |thread| {
        let page = thread as u64 % 3;
        assert_eq!(targets[thread % 4].touch(page), first_byte(page));
    });
    assert_eq!(counted(&template, "stats.reads"), 1);
    assert_all_counted(&engine);
}

#[test]
fn a_part_of_a_template_ends_where_it_ends() {
    for name in BOTH {
        let template = template(50, &[]);
        let engine = engine();
        let run = Run::between(17, 41);
        let target = Served::part(&engine, &template, name, run, EVENTS);
        for page in (0..run.pages).rev() {
            assert_eq!(target.page(page), content(run.start + page));
        }
        assert_all_counted(&engine);
    }
}

#[test]
fn zero_runs_are_zero_and_cost_no_fetch() {
    for name in BOTH {
        let file = template_file(100, &[Run::between(10, 90)]);
        let template = open(&spec(&file), &["stats"], DEADLINE);
        let (engine, target) = serve(&template, name);
        for page in 0..100 {
            let expected = if (10..90).contains(&page) { 0 } else { first_byte(page) };
            assert_eq!(target.touch(page), expected, "page {page}");
        }
        assert_eq!(counted(&template, "stats.bytes"), 20 * PAGE);
        assert!(outcomes(&engine, Outcome::Zeroed) > 0);
        assert_all_counted(&engine);
        template.audit().unwrap();
    }
}

#[test]
fn removed_pages_read_zero_whether_they_were_there_or_not() {
    let template = template(64, &[]);
    let (engine, target) = serve(&template, "copy");
    assert_eq!(target.touch(5), first_byte(5));
    discard(target.at(4), 8);
    for page in 4..12 {
        assert_eq!(target.touch(page), 0, "page {page}");
    }
    assert_eq!(target.touch(3), first_byte(3));
    assert_eq!(target.touch(12), first_byte(12));
    put(target.at(6), 9);
    assert_eq!(target.touch(6), 9);
    assert_all_counted(&engine);
}

/// The page is fetched for one thread while another gives it back: what the fetch brings must not
/// come back to life.
#[test]
fn a_removed_page_is_not_resurrected_by_a_fetch_under_way() {
    let template = template(16, &["stats", "delay=50ms"]);
    let (engine, target) = serve(&template, "copy");
    let address = target.at(2);
    let waiting = std::thread::spawn(move || touch(address));
    until("the fault was read", || engine.statistics().demand_faults == 1);
    // The fetch takes its time; the removal does not wait for it.
    discard(target.at(0), 4);
    assert_eq!(waiting.join().unwrap(), 0);
    assert_eq!(counted(&template, "stats.reads"), 1);
    for page in 0..4 {
        assert_eq!(target.touch(page), 0);
    }
    assert_eq!(target.touch(4), first_byte(4));
    assert_all_counted(&engine);
}

/// Removals and faults in a wild mixture: the kernel refuses fills again and again (EAGAIN), and
/// every fault is still served, and never with what was removed.
#[test]
fn faults_that_the_kernel_refuses_are_served_later() {
    const PAGES: u64 = 1024;
    let template = template(PAGES, &["pass"]);
    let (engine, target) = serve(&template, "copy");
    let half = PAGES / 2;
    together(3, |thread| match thread {
        0 => (0..400).for_each(|step| {
            let page = half + mix(step) % half;
            discard(target.at(page), 1);
            assert_eq!(target.touch(page), 0, "page {page} was removed");
        }),
        1 => (0..half).for_each(|page| assert_eq!(target.touch(page), first_byte(page))),
        _ => (0..half).for_each(|step| {
            let page = half + mix(step + 5) % half;
            let byte = touch_in_kernel(target.at(page)).unwrap();
            assert!(byte == 0 || byte == first_byte(page), "page {page}");
        }),
    });
    assert_all_counted(&engine);
    assert!(engine.statistics().reports.is_empty());
}

#[test]
fn unmapped_memory_is_forgotten_and_the_rest_is_served() {
    for name in BOTH {
        let template = template(64, &[]);
        let (engine, target) = serve(&template, name);
        assert_eq!(target.touch(40), first_byte(40));
        // SAFETY: pages of the test, which it does not touch again.
        unsafe { munmap(target.at(16) as *mut _, 8 * PAGE as usize).unwrap() };
        assert_eq!(target.touch(15), first_byte(15));
        assert_eq!(target.touch(24), first_byte(24));
        assert_all_counted(&engine);
    }
}

#[test]
fn moved_memory_is_served_at_its_new_place() {
    for name in BOTH {
        let template = template(128, &[]);
        let (engine, target) = serve(&template, name);
        assert_eq!(target.touch(33), first_byte(33));
        let room = Mapping::anonymous(32);
        // SAFETY: both ranges are the test's own.
        let moved = unsafe {
            let (from, len) = (target.at(32) as *mut _, 32 * PAGE as usize);
            rustix::mm::mremap_fixed(from, len, len, MremapFlags::MAYMOVE, room.start as *mut _)
        };
        assert_eq!(moved.unwrap() as u64, room.start);
        for page in 0..32 {
            assert_eq!(touch(room.at(page)), first_byte(32 + page), "{name} page {page}");
        }
        assert_eq!(target.touch(31), first_byte(31));
        assert_eq!(target.touch(64), first_byte(64));
        assert_all_counted(&engine);
        drop(target);
    }
}

/// The page that somebody waits for is moved away, and another region comes to lie there, while it is
/// fetched: what was to come along with it has nothing to do with that.
#[test]
fn a_fault_whose_page_was_moved_away_brings_nothing_into_other_regions() {
    let template = template(1024, &["delay=200ms"]);
    // What could come along with page 252, from 254 on: each to a place of its own.
    template.read(252 * PAGE, &mut vec![0; 4 * PAGE as usize]).unwrap();
    let (engine, target) = serve(&template, "copy");
    assert_eq!(target.touch(253), first_byte(253));
    let (address, from) = (target.at(600), target.at(252));
    let waiting = std::thread::spawn(move || touch(address));
    until("the fault was read", || engine.statistics().demand_faults == 2);
    // SAFETY: both ranges are the test's own.
    unsafe {
        let (from, len) = (from as *mut _, 2 * PAGE as usize);
        rustix::mm::mremap_fixed(from, len, len, MremapFlags::MAYMOVE, address as *mut _).unwrap();
    }
    assert_eq!(waiting.join().unwrap(), first_byte(252));
    for page in 601..610 {
        let belongs = if page == 601 { 253 } else { page };
        assert_eq!(target.page(page), content(belongs), "page {page}");
    }
    assert_all_counted(&engine);
}

/// Memory of which nobody ever said what belongs there: in anonymous memory it is zeros.
#[test]
fn memory_that_grew_or_was_left_behind_by_a_move_is_zeros() {
    let template = template(16, &[]);
    let (engine, target) = serve(&template, "copy");
    assert_eq!(target.touch(0), first_byte(0));
    // SAFETY: the test's own range; where it goes is the kernel's choice.
    let grown = unsafe {
        let (from, len) = (target.at(0) as *mut _, target.memory.bytes as usize);
        mremap(from, len, 64 * len, MremapFlags::MAYMOVE).unwrap() as u64
    };
    assert_eq!(touch(grown + PAGE), first_byte(1));
    assert_eq!(touch_in_kernel(grown + 20 * PAGE).unwrap(), 0);
    assert_eq!(touch(grown + 17 * PAGE), 0);
    // A move that leaves the old range mapped and registered.
    // SAFETY: the test's own range; where it goes is the kernel's choice.
    let moved = unsafe {
        let (from, len) = (grown as *mut _, 8 * PAGE as usize);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        libc::mremap(from, len, len, flags, std::ptr::null_mut::<u8>()) as u64
    };
    assert_ne!(moved, u64::MAX, "{}", std::io::Error::last_os_error());
    assert_eq!(touch(moved + 3 * PAGE), first_byte(3));
    assert_eq!(touch_in_kernel(grown + 3 * PAGE).unwrap(), 0);
    assert_eq!(touch(grown + 8 * PAGE), first_byte(8));
    assert_eq!(outcomes(&engine, Outcome::Poisoned), 0);
    assert_all_counted(&engine);
    assert!(engine.statistics().demand_faults < 20, "{:?}", engine.statistics());
}

#[test]
fn a_run_across_a_protection_border_is_served_page_by_page() {
    for name in BOTH {
        let template = template(64, &[]);
        let (engine, target) = serve(&template, name);
        // Every other page becomes a mapping of its own.
        for page in (0..64).step_by(2) {
            // SAFETY: a page of the test, which it only reads.
            unsafe {
                mprotect(target.at(page) as *mut _, PAGE as usize, MprotectFlags::READ).unwrap();
            }
        }
        for page in 0..64 {
            assert_eq!(target.touch(page), first_byte(page));
        }
        assert_all_counted(&engine);
    }
}

#[test]
fn a_page_that_cannot_be_had_is_poisoned_and_the_others_are_served() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    for name in BOTH {
        let template = template(64, &["fail=page:20"]);
        let (engine, target) = serve(&template, name);
        assert_poisoned(target.at(20));
        for page in (0..64).filter(|page| *page != 20) {
            assert_eq!(target.touch(page), first_byte(page), "{name} page {page}");
        }
        assert_poisoned(target.at(20));
        assert_all_counted(&engine);
        assert_eq!(outcomes(&engine, Outcome::Poisoned), 1);
        let reports = engine.statistics().reports;
        assert!(
            reports[0].contains("fail=page:20") && reports[0].contains("SIGBUS"),
            "{reports:?}"
        );
    }
}

#[test]
fn a_source_that_is_out_of_reach_ends_at_the_deadline_for_every_waiter() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let file = template_file(16, &[]);
    let template = open(&spec(&file), &["fail=always"], Duration::from_millis(50));
    let engine = engine();
    let targets: Vec<Served> =
        BOTH.iter().map(|name| Served::new(&engine, &template, name)).collect();
    together(4, |thread| assert_poisoned(targets[thread % 2].at(thread as u64 / 2)));
    assert_all_counted(&engine);
    assert_eq!(outcomes(&engine, Outcome::Poisoned), 4);
}

#[test]
fn a_failure_that_passes_is_not_seen_by_the_target() {
    for name in BOTH {
        let template = template(16, &["fail=3"]);
        let (engine, target) = serve(&template, name);
        assert_eq!(target.page(7), content(7));
        assert_eq!(outcomes(&engine, Outcome::Poisoned), 0);
        assert_eq!(template.statistics().failures, 3);
    }
}

/// The other end of the socket that a process that plays a target has as its standard input.
fn served_process(role: &str, template: &Arc<Template>) -> (ExitStatus, Arc<Engine>) {
    let (ours, its) = UnixStream::pair().unwrap();
    let mut child = actor(role).stdin(OwnedFd::from(its)).spawn().unwrap();
    let mut start = [0; 8];
    let (_, descriptors) = uffd::passing::receive(&ours, &mut start).unwrap();
    let uffd = Userfaultfd::from(descriptors.into_iter().next().expect("a userfaultfd"));
    let start = u64::from_ne_bytes(start);
    uffd.handshake(EVENTS).unwrap();
    uffd.register(start, template.whole().bytes(), RegisterMode::MISSING).unwrap();
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let engine = engine();
    let new = NewTarget {
        uffd,
        process: Some((pid.as_raw_nonzero().get(), pidfd)),
        template: Arc::clone(template),
        backend: backend("copy"),
        regions: RegionMap::new(start, template.whole()),
        beacon: None,
        page_size: PAGE,
        owner: None,
        connection: None,
    };
    engine.add(new).unwrap();
    (&ours).write_all(b"go").unwrap();
    (child.wait().unwrap(), engine)
}

/// What it does: memory of `pages`, which is served when this returns.
fn be_served(pages: u64) -> Mapping {
    let memory = Mapping::anonymous(pages);
    let uffd = Userfaultfd::open(Opening::SystemCall(Access::Full)).unwrap();
    uffd::passing::send(std::io::stdin(), &memory.start.to_ne_bytes(), &[uffd.as_fd()]).unwrap();
    std::io::stdin().read_exact(&mut [0; 2]).unwrap();
    memory
}

#[test]
fn a_process_that_touches_a_page_that_cannot_be_had_gets_sigbus_or_is_killed() {
    const ROLE: &str = "a_process_that_touches_a_page_that_cannot_be_had_gets_sigbus_or_is_killed";
    if playing(ROLE) {
        // SAFETY: the runtime's handler of this signal is for stack overflows; the default is asked for.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        let memory = be_served(16);
        assert_eq!(touch(memory.at(2)), first_byte(2));
        touch(memory.at(3));
        panic!("it read a page that cannot be had");
    }
    let template = template(16, &["fail=page:3"]);
    let (status, engine) = served_process(ROLE, &template);
    let (signal, outcome, said) = match Support::probe().has("POISON") {
        true => (libc::SIGBUS, Outcome::Poisoned, "SIGBUS"),
        false => (libc::SIGKILL, Outcome::Killed, "the process was killed"),
    };
    assert_eq!(status.signal(), Some(signal), "{status}");
    assert_all_counted(&engine);
    assert_eq!(outcomes(&engine, outcome), 1);
    let reports = engine.statistics().reports;
    assert!(reports[0].contains("fail=page:3") && reports[0].contains(said), "{reports:?}");
}

#[test]
fn a_damaged_template_poisons_and_never_gives_zeros() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    for name in BOTH {
        let template = template(600, &[]);
        let (engine, target) = serve(&template, name);
        assert_eq!(target.touch(0), first_byte(0));
        let stranger = Mapping::of(&template, template.whole());
        assert_eq!(touch(stranger.at(500)), 0);
        assert!(template.audit().is_err());
        // Pages that this target has stay; everything else is an error, present or not.
        assert_eq!(target.touch(0), first_byte(0));
        assert_poisoned(target.at(400));
        assert_all_counted(&engine);
    }
}

/// What is on stderr is nobody's business here: a pipe that nobody reads must not end the loop.
#[test]
fn a_report_to_nobody_does_not_end_the_engine() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    const ROLE: &str = "a_report_to_nobody_does_not_end_the_engine";
    if !playing(ROLE) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(read);
        assert!(play(ROLE, Stdio::from(write)).success());
        return;
    }
    let template = template(64, &["fail=page:3"]);
    let (engine, target) = serve(&template, "copy");
    assert!(std::io::stderr().write_all(b"x").is_err(), "nobody reads it");
    assert_poisoned(target.at(3));
    assert_eq!(target.touch(40), first_byte(40));
    assert_all_counted(&engine);
}

#[test]
fn stopping_while_faults_wait_ends_the_threads_and_hangs_nobody() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let template = template(64, &["delay=100ms"]);
    let (engine, target) = serve(&template, "copy");
    // Held, so that the memory does not turn into zeros when the engine lets go.
    let _held = target.target.as_ref().unwrap().dup_uffd().unwrap();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = [3, 40]
            .map(|page| target.at(page))
            .into_iter()
            .map(|address| scope.spawn(move || touch_in_kernel(address)))
            .collect();
        until("both faults were read", || engine.statistics().demand_faults == 2);
        let began = Instant::now();
        engine.stop();
        assert!(began.elapsed() < PATIENCE);
        for (page, waiting) in [3, 40].into_iter().zip(waiting) {
            match waiting.join().unwrap() {
                Ok(byte) => assert_eq!(byte, first_byte(page)),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT)),
            }
        }
    });
    assert_eq!(engine.targets(), 0);
    engine.stop();
}

/// A fetch that belongs to an engine which stops is of use to others too.
#[test]
fn stopping_one_engine_disturbs_no_target_of_another() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    // One is under way when its engine stops, the other is between two tries.
    for layer in ["delay=100ms", "fail=8"] {
        let template = template(64, &[layer]);
        let (first, second) = (engine(), engine());
        let mine = Served::new(&first, &template, "copy");
        let yours = Served::new(&second, &template, "copy");
        let _held = mine.target.as_ref().unwrap().dup_uffd().unwrap();
        std::thread::scope(|scope| {
            let address = mine.at(1);
            let stopped = scope.spawn(move || touch_in_kernel(address));
            until("one began", || first.statistics().demand_faults == 1);
            let address = yours.at(2);
            let other = scope.spawn(move || touch_in_kernel(address));
            until("the other waits", || second.statistics().demand_faults == 1);
            first.stop();
            assert_eq!(other.join().unwrap().unwrap(), first_byte(2), "{layer}");
            let _ = stopped.join();
        });
    }
}

#[test]
fn outcomes_tell_how_long_a_fault_took() {
    for name in BOTH {
        let template = template(16, &["delay=20ms"]);
        let (engine, target) = serve(&template, name);
        assert_eq!(target.touch(1), first_byte(1));
        assert_all_counted(&engine);
        assert_eq!(outcomes(&engine, done_as(name)), 1);
        let json = serde_json::to_value(engine.statistics()).unwrap();
        let row = &json["outcomes"][done_as(name).name()];
        assert_eq!(row["count"], 1);
        let p50 = row["p50_us"].as_f64().unwrap();
        assert!((20_000.0..5_000_000.0).contains(&p50), "{p50} µs");
        assert_eq!(row["p50_us"], row["p99_us"]);
        assert_eq!(json["demand_faults"], 1);
        assert_eq!(json["targets"][0]["backend"], name);
        assert_eq!(json["outcomes"].as_object().unwrap().len(), 1, "only what happened");
    }
}

/// A fetch that waits for its next try is not forgotten while others are under way.
#[test]
fn retries_are_made_in_time_while_other_fetches_take_long() {
    let slow = template(16, &["delay=300ms"]);
    let failing = template(16, &["fail=4"]);
    let engine = engine();
    let targets = [Served::new(&engine, &slow, "copy"), Served::new(&engine, &failing, "copy")];
    together(2, |thread| {
        let began = Instant::now();
        assert_eq!(targets[thread].touch(1), first_byte(1));
        // 1 + 2 + 4 + 8 ms of pauses.
        assert!(thread == 0 || began.elapsed() < Duration::from_millis(250));
    });
}

#[test]
fn an_idle_engine_costs_nothing() {
    const ROLE: &str = "an_idle_engine_costs_nothing";
    if !playing(ROLE) {
        assert!(play(ROLE, Stdio::inherit()).success());
        return;
    }
    let template = template(4096, &[]);
    let engine = engine();
    let targets: Vec<Served> = (0..8).map(|_| Served::new(&engine, &template, "copy")).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..4096 {
                targets[page as usize % 8].touch(page);
            }
            stop.store(true, SeqCst);
        });
    });
    // The promise: quiet from 100 ms after the last fault on.
    std::thread::sleep(Duration::from_millis(100));
    let before = engine_cpu();
    std::thread::sleep(Duration::from_secs(1));
    let used = engine_cpu() - before;
    assert!(used <= Duration::from_millis(10), "{used:?} in an idle second");
}

/// Processor time of the engine's threads, from schedstat: exact, where stat counts ticks.
fn engine_cpu() -> Duration {
    let mut total = 0;
    let mut threads = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap();
        if name.starts_with("pk-") {
            let text = std::fs::read_to_string(path.join("schedstat")).unwrap();
            total += text.split(' ').next().unwrap().parse::<u64>().unwrap();
            threads += 1;
        }
    }
    assert!(threads > 1, "the engine's threads are named");
    Duration::from_nanos(total)
}

#[test]
fn targets_come_and_go_and_leave_nothing_behind() {
    const ROLE: &str = "targets_come_and_go_and_leave_nothing_behind";
    if !playing(ROLE) {
        assert!(play(ROLE, Stdio::inherit()).success());
        return;
    }
    let template = template(16, &[]);
    let engine = engine();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for round in 0..200 {
        let target = Served::new(&engine, &template, BOTH[round % 2]);
        assert_eq!(target.touch(round as u64 % 16), first_byte(round as u64 % 16));
    }
    until("all descriptors are closed", || descriptors() == before);
    assert_eq!(engine.targets(), 0);
    assert!(engine.wait_idle(Duration::ZERO));
    assert_eq!(engine.statistics().targets_ever, 200);
    assert_all_counted(&engine);
}

#[test]
fn large_writes_from_a_target_fault_in_the_kernel_page_by_page() {
    for name in BOTH {
        let template = template(256, &[]);
        let (_engine, target) = serve(&template, name);
        let file = tempfile::tempfile().unwrap();
        let bytes = 256 * PAGE as usize;
        let mut done = 0;
        while done < bytes {
            // SAFETY: reads the target's memory, which is mapped.
            let written = unsafe {
                let from = (target.at(0) as usize + done) as *const libc::c_void;
                libc::write(file.as_raw_fd(), from, bytes - done)
            };
            assert!(written > 0, "{}", std::io::Error::last_os_error());
            done += written as usize;
        }
        for page in 0..256 {
            let mut read = vec![0; PAGE as usize];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut read, page * PAGE).unwrap();
            assert!(read == content(page), "{name} page {page}");
        }
    }
}
