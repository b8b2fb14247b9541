//! Memory of this process that fills itself. What of it only Python has, its tests have: views, the
//! children of `os.fork` and `multiprocessing`, other users.

mod common;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

use common::*;
use pagekit::delivery::Delivery;
use pagekit::error::Error;
use pagekit::map::{Faults, Map, Options};
use pagekit::page::{Run, PAGE};
use pagekit::template::Template;
use rustix::pipe::pipe;

fn mapped(template: &Arc<Template>, options: Options) -> Arc<Map> {
    Map::new(Arc::clone(template), &Arc::new(delivery()), options).unwrap()
}

fn by(faults: Faults) -> Options {
    Options { faults, ..Options::default() }
}

const WRITABLE: Options = Options { writable: true, faults: Faults::Auto, page_size: PAGE };

/// A touch behind the map's back.
fn touch(map: &Map, page: u64) -> u8 {
    // SAFETY: inside the map, which lives.
    unsafe { std::ptr::read_volatile(map.address().add((page * PAGE) as usize)) }
}

fn page_of(map: &Map, page: u64) -> Vec<u8> {
    let mut found = vec![0xEE; PAGE as usize];
    // SAFETY: inside the map, which lives.
    unsafe {
        let from = map.address().add((page * PAGE) as usize);
        std::ptr::copy_nonoverlapping(from, found.as_mut_ptr(), found.len());
    }
    found
}

fn shuffled(pages: u64) -> impl Iterator<Item = u64> {
    // 389 is prime, and no divisor of any size here.
    (0..pages).map(move |at| at * 389 % pages)
}

#[test]
fn touched_pages_arrive_however_they_are_served() {
    for faults in [Faults::Thread, Faults::Signal] {
        for layers in [&["stats"][..], &["stats", "delay=200us"]] {
            let file = template_file(500, &[Run::between(100, 140), Run::between(490, 500)]);
            let template = open(&spec(&file), layers, DEADLINE);
            let map = mapped(&template, by(faults));
            let zero = |page: u64| (100..140).contains(&page) || page >= 490;
            for page in shuffled(500) {
                let expected = if zero(page) { vec![0; PAGE as usize] } else { content(page) };
                assert_eq!(page_of(&map, page), expected, "page {page}, {faults:?}");
            }
            let statistics = map.statistics();
            assert_eq!(statistics.failures, 0);
            assert!((1..=450).contains(&statistics.demand_faults), "{statistics:?}");
            assert!(counted(&template, "stats.bytes") <= 460 * PAGE);
            template.audit().unwrap();
        }
    }
}

#[test]
fn two_maps_share_pages_and_no_writes() {
    let template = template(64, &["stats"]);
    let (one, two) = (mapped(&template, WRITABLE), mapped(&template, WRITABLE));
    // SAFETY: inside maps that live, and are writable.
    unsafe {
        one.address().add(5).write_volatile(1);
        two.address().add(6).write_volatile(2);
    }
    let (mut first, mut second) = (content(0), content(0));
    first[5] = 1;
    second[6] = 2;
    assert_eq!(page_of(&one, 0), first);
    assert_eq!(page_of(&two, 0), second);
    assert_eq!(read_page(&template, 0).unwrap(), content(0));
    for page in 1..64 {
        assert_eq!(page_of(&one, page), page_of(&two, page));
    }
    assert_eq!(counted(&template, "stats.bytes"), 64 * PAGE, "each page was fetched once");
    template.audit().unwrap();
}

#[test]
fn many_threads_touch_one_map() {
    for faults in [Faults::Thread, Faults::Signal] {
        let template = template(1024, &["delay=100us"]);
        let map = mapped(&template, by(faults));
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let map = &map;
                scope.spawn(move || {
                    for page in shuffled(1024) {
                        let page = (page + thread * 128) % 1024;
                        assert_eq!(touch(map, page), first_byte(page));
                    }
                });
            }
        });
    }
}

#[test]
fn what_is_asked_through_the_map_fails_with_an_error() {
    for faults in [Faults::Thread, Faults::Signal] {
        let file = template_file(64, &[]);
        let template = open(&spec(&file), &["fail=page:17"], std::time::Duration::ZERO);
        let map = mapped(&template, by(faults));
        let mut page = vec![0; PAGE as usize];
        let outcome = map.read(17 * PAGE, &mut page);
        let integrity = |error: &Arc<Error>| matches!(**error, Error::Integrity { .. });
        assert!(outcome.as_ref().is_err_and(integrity), "{outcome:?}");
        map.read(18 * PAGE, &mut page).unwrap();
        assert_eq!(page, content(18));
        assert!(map.populate().is_err());
        assert!(map.find(b"nowhere in it", 0, map.size()).is_err());
        assert_eq!(map.find(&content(3)[..9], 0, 17 * PAGE).unwrap(), Some(3 * PAGE));
    }
}

#[test]
fn a_page_that_was_lost_can_be_had_again() {
    // The fault fails, and what asks later does not.
    let file = template_file(64, &[]);
    let template = open(&spec(&file), &["fail=2"], std::time::Duration::ZERO);
    let map = mapped(&template, WRITABLE);
    // A system call meets it, and so finds out without a signal: the fetch of all fails, then that of
    // the one page.
    assert_eq!(write_from(&map, 9).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    assert_eq!((map.statistics().lost_pages, map.statistics().failures), (1, 1));
    assert_eq!(write_from(&map, 9).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    map.bring(9 * PAGE, 1).unwrap();
    assert_eq!(map.statistics().lost_pages, 0);
    assert_eq!(page_of(&map, 9), content(9));
    assert_eq!(write_from(&map, 9).unwrap(), PAGE as usize);
}

/// Writes a page of the map into nothing: the kernel touches it.
fn write_from(map: &Map, page: u64) -> io::Result<usize> {
    let (reader, writer) = pipe()?;
    // SAFETY: the kernel checks the address, which is inside the map.
    let written = unsafe {
        let at = map.address().add((page * PAGE) as usize);
        libc::write(writer.as_raw_fd(), at.cast(), PAGE as usize)
    };
    drop(reader);
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

#[test]
fn system_calls_meet_missing_pages_with_a_thread_and_not_with_signals() {
    let template = template(64, &["delay=200us"]);
    let map = mapped(&template, by(Faults::Thread));
    assert!(map.statistics().kernel_faults);
    assert_eq!(write_from(&map, 3).unwrap(), PAGE as usize);
    let map = mapped(&template, by(Faults::Signal));
    assert!(!map.statistics().kernel_faults);
    assert_eq!(write_from(&map, 40).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    map.populate().unwrap();
    assert_eq!(write_from(&map, 40).unwrap(), PAGE as usize);
}

#[test]
fn without_userfaultfd_everything_is_loaded_first() {
    let nothing = Arc::new(Delivery::without("tested"));
    let file = template_file(64, &[Run::between(10, 30)]);
    let template = Template::open(&spec(&file), &["stats"], &nothing, DEADLINE).unwrap();
    let map = Map::new(Arc::clone(&template), &nothing, WRITABLE).unwrap();
    let statistics = map.statistics();
    assert_eq!(statistics.faults, "loaded");
    assert!(statistics.reason.is_some_and(|reason| reason.contains("tested")));
    assert_eq!(counted(&template, "stats.bytes"), 44 * PAGE);
    for page in shuffled(64).filter(|page| !(10..30).contains(page)) {
        assert_eq!(page_of(&map, page), content(page));
    }
    let refused = Map::new(template, &nothing, by(Faults::Signal));
    assert!(refused.is_err_and(|error| matches!(*error, Error::Permission { .. })));
}

#[test]
fn fetching_ahead_waits_for_nothing_and_brings_what_is_asked_for() {
    let template = template(1000, &["stats", "delay=1ms"]);
    let map = mapped(&template, Options::default());
    map.will_need(100 * PAGE + 1, 300 * PAGE).unwrap();
    // Whoever asks joins.
    map.bring(100 * PAGE, 301 * PAGE).unwrap();
    assert_eq!(counted(&template, "stats.bytes"), 301 * PAGE);
    assert_eq!(map.statistics().demand_faults, 0);
    assert!(map.will_need(0, map.size() + 1).is_err());
    assert!(map.will_need(u64::MAX, 2).is_err());
    map.will_need(map.size(), 0).unwrap();
}

#[test]
fn what_fits_nothing_is_refused() {
    let template = template(64, &[]);
    let delivery = Arc::new(delivery());
    for options in [
        Options { page_size: 8192, ..Options::default() },
        Options { page_size: 2 << 20, ..Options::default() },
        Options { page_size: 2 << 20, ..by(Faults::Signal) },
    ] {
        let refused = Map::new(Arc::clone(&template), &delivery, options);
        assert!(refused.is_err_and(|error| matches!(*error, Error::Usage { .. })));
    }
    assert!("sometimes".parse::<Faults>().is_err());
    let map = mapped(&template, Options::default());
    assert!(map.bring(63 * PAGE, PAGE + 1).is_err());
    assert!(map.find(b"x", 0, map.size() + 1).is_err());
    assert_eq!(map.find(b"", 7, 7).unwrap(), Some(7));
    assert_eq!(map.find(b"", 8, 7).unwrap(), None);
}

#[test]
fn what_is_found_may_lie_across_pieces() {
    let template = template(1024, &[]);
    let map = mapped(&template, WRITABLE);
    let border = 1 << 20;
    // SAFETY: inside the map, which lives and is writable.
    unsafe { map.address().add(border - 3).cast::<[u8; 6]>().write(*b"needle") };
    assert_eq!(map.find(b"needle", 0, map.size()).unwrap(), Some(border as u64 - 3));
    assert_eq!(map.find(b"needle", border as u64 - 2, map.size()).unwrap(), None);
    assert_eq!(map.find(b"needle", 0, border as u64 + 2).unwrap(), None);
}

#[test]
fn maps_come_and_go_while_pages_arrive() {
    let template = template(256, &["delay=50us"]);
    let touched = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (template, touched) = (&template, &touched);
            scope.spawn(move || {
                for round in 0..25 {
                    let faults = [Faults::Thread, Faults::Signal][(round + thread) % 2];
                    let map = mapped(template, Options { writable: true, ..by(faults) });
                    map.will_need(0, map.size()).unwrap();
                    for page in shuffled(256).skip(round * 7).take(20) {
                        assert_eq!(touch(&map, page), first_byte(page));
                        touched.fetch_add(1, Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(touched.load(Relaxed), 4 * 25 * 20);
    template.audit().unwrap();
}

/// Runs `body` in a forked child: its exit status says whether all went well.
fn child(body: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child has what `fork` leaves of a process, uses no lock of the test harness, and ends
    // without running anything else of it.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let well = body();
            libc::_exit(i32::from(!well));
        }
        let mut status = -1;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        status
    }
}

#[test]
fn children_and_theirs_are_served_and_keep_what_was_written() {
    for faults in [Faults::Thread, Faults::Signal] {
        let file = template_file(300, &[Run::between(50, 90)]);
        let template = open(&spec(&file), &["delay=100us"], DEADLINE);
        let map = mapped(&template, Options { writable: true, ..by(faults) });
        // SAFETY: inside the map, which lives and is writable.
        unsafe { map.address().add(60 * PAGE as usize).write_volatile(61) };
        // SAFETY: as above.
        unsafe { map.address().add(PAGE as usize).write_volatile(7) };
        let status = child(|| {
            let mut well = touch(&map, 1) == 7 && touch(&map, 60) == 61 && touch(&map, 61) == 0;
            well &= (100..200).all(|page| page_of(&map, page) == content(page));
            // SAFETY: as above, in the child.
            unsafe { map.address().add(2 * PAGE as usize).write_volatile(8) };
            let status = child(|| {
                let mine = touch(&map, 2) == 8 && touch(&map, 1) == 7;
                mine && (200..300).all(|page| page_of(&map, page) == content(page))
            });
            well &= map.statistics().faults == "parent" && map.check().is_ok();
            well && status == 0 && map.read(250 * PAGE, &mut [0; 99]).is_ok()
        });
        assert_eq!(status, 0);
        assert_eq!(touch(&map, 2), first_byte(2), "what a child writes is its own");
        // All that the children read came through the template, and nothing else did.
        template.audit().unwrap();
    }
}

#[test]
fn a_child_drops_what_is_its_own_and_nothing_else() {
    let template = template(64, &[]);
    let map = mapped(&template, WRITABLE);
    let copy = Arc::clone(&map);
    let status = child(move || {
        let start = map.address();
        drop((map, copy, template));
        // The addresses are free: somebody else may have them.
        // SAFETY: a fresh mapping.
        let again = unsafe {
            libc::mmap(
                start.cast(),
                4096,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        again == start.cast()
    });
    assert_eq!(status, 0);
}

#[test]
fn threads_fork_while_maps_come_and_go() {
    let template = template(128, &["delay=20us"]);
    let map = mapped(&template, WRITABLE);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for page in 0..15 {
                    assert_eq!(touch(&mapped(&template, WRITABLE), page), first_byte(page));
                }
            });
            scope.spawn(|| {
                for round in 0..8 {
                    let all = || {
                        map.check().unwrap();
                        shuffled(128).all(|page| touch(&map, page) == first_byte(page))
                    };
                    assert_eq!(child(all), 0, "round {round}");
                }
            });
        }
    });
    template.audit().unwrap();
}

/// Waits until nothing comes from a pipe any more.
fn drained(pipe: impl Into<OwnedFd>) -> Vec<u8> {
    let mut all = Vec::new();
    let mut file = std::fs::File::from(pipe.into());
    io::Read::read_to_end(&mut file, &mut all).unwrap();
    all
}

#[test]
fn an_orphans_missing_pages_raise_sigbus_and_others_stay() {
    let file = template_file(200, &[Run::between(150, 170)]);
    let (reader, writer) = pipe().unwrap();
    let (gone, going) = pipe().unwrap();
    // A child makes the map, its child survives it.
    let status = child(|| {
        let template = open(&spec(&file), &[], DEADLINE);
        let map = mapped(&template, WRITABLE);
        let present = [3, 4, 100];
        assert!(present.iter().all(|page| touch(&map, *page) == first_byte(*page)));
        // SAFETY: as in `child`; this one is not waited for.
        if unsafe { libc::fork() } == 0 {
            // SAFETY: a descriptor that this process does not use otherwise.
            unsafe { libc::close(going.as_raw_fd()) };
            // Until the process that serves is gone, which closes its end.
            drained(gone.try_clone().unwrap());
            let survivor = present.iter().all(|page| touch(&map, *page) == first_byte(*page))
                && touch(&map, 151) == 0;
            // Whoever asks through the map gets an error, once it is known.
            let mut byte = [0];
            let deadline = std::time::Instant::now() + PATIENCE;
            let lost = loop {
                match map.read(180 * PAGE, &mut byte) {
                    Err(_) => break true,
                    Ok(()) if std::time::Instant::now() > deadline => break false,
                    Ok(()) => {}
                }
            };
            let bare = child(|| touch(&map, 181) != 0);
            // Something stands in for it where the kernel cannot poison.
            let ended = libc::WIFSIGNALED(bare) && libc::WTERMSIG(bare) == libc::SIGBUS;
            let well = survivor && lost && ended;
            // SAFETY: a descriptor that is open here.
            unsafe { libc::write(writer.as_raw_fd(), [u8::from(well)].as_ptr().cast(), 1) };
            // SAFETY: ends this process.
            unsafe { libc::_exit(0) };
        }
        true
    });
    drop((writer, going));
    assert_eq!(status, 0);
    assert_eq!(drained(reader), [1]);
}

#[test]
fn a_bare_clone_does_not_have_it() {
    let template = template(64, &[]);
    let map = mapped(&template, WRITABLE);
    assert_eq!(touch(&map, 0), first_byte(0));
    // SAFETY: a fork without the handlers of libc; the child does nothing but touch, and end.
    let status = unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as i32;
        if pid == 0 {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            let well = map.check().is_err();
            if well {
                touch(&map, 0);
            }
            libc::_exit(1);
        }
        let mut status = -1;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        status
    };
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
    template.audit().unwrap();
}

/// Runs `body` in a child whose stderr is a pipe: its status, and what it said.
fn heard(body: impl FnOnce()) -> (i32, String) {
    let (reader, writer) = pipe().unwrap();
    let status = child(|| {
        // SAFETY: both are open; the child's own stderr.
        unsafe {
            libc::dup2(writer.as_raw_fd(), 2);
            libc::close(reader.as_raw_fd());
        }
        body();
        false
    });
    drop(writer);
    (status, String::from_utf8(drained(reader)).unwrap())
}

#[test]
fn a_touch_of_what_cannot_be_had_ends_the_process_with_a_word() {
    for faults in [Faults::Thread, Faults::Signal] {
        let file = template_file(64, &[]);
        let (status, said) = heard(|| {
            let template = open(&spec(&file), &["fail=page:17"], std::time::Duration::ZERO);
            let map = mapped(&template, by(faults));
            assert_eq!(touch(&map, 18), first_byte(18));
            touch(&map, 17);
        });
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{said}");
        assert!(said.contains(": page 17 (at 0x") && said.contains("cannot be had"), "{said}");
        assert!(said.ends_with('\n') && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn what_children_lose_is_told_there() {
    // Without it, a child that touches such a page is killed.
    if !need("POISON") {
        return;
    }
    let file = template_file(64, &[]);
    let template = open(&spec(&file), &["fail=page:17"], std::time::Duration::ZERO);
    let map = mapped(&template, Options::default());
    let (status, said) = heard(|| {
        touch(&map, 17);
    });
    if !need("POISON") {
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
            "{status:#x}"
        );
        return;
    }
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "{said}");
    assert!(said.contains("page 17 (at 0x") && said.contains("layer fail=page:17"), "{said}");
    let status = child(|| {
        let outcome = map.read(17 * PAGE, &mut [0; 8]);
        outcome.is_err_and(|error| {
            matches!(&*error, Error::Integrity { message } if message.contains("layer fail=page:17"))
        }) && map.read(18 * PAGE, &mut [0; 8]).is_ok()
    });
    assert_eq!(status, 0);
}
