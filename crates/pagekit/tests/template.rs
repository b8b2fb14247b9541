//! Templates: one fetch for everybody, publication that nobody sees half done, and damage noticed.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use pagekit::delivery::Delivery;
use pagekit::error::Error;
use pagekit::page::{Run, PAGE};
use pagekit::template::{Template, Waiter, Want, USUAL_REQUEST};
use uffd::{Features, RegisterMode};

/// Reads a page of the template's file through a mapping that is not registered, as no client may.
fn read_hole(template: &Template, page: u64) {
    let mapping = Mapping::of(template, template.whole());
    assert_eq!(touch(mapping.at(page)), 0);
}

fn waiter_into(sender: std::sync::mpsc::Sender<bool>) -> Waiter {
    Box::new(move |outcome| sender.send(outcome.is_ok()).unwrap())
}

#[test]
fn many_waiters_share_one_fetch() {
    let template = template(16, &["stats", "delay=50ms"]);
    together(8, |number| {
        let page = number as u64 % 16;
        assert_eq!(read_page(&template, page).unwrap(), content(page));
    });
    assert_eq!(counted(&template, "stats.reads"), 1);
    let statistics = template.statistics();
    assert_eq!((statistics.fetches, statistics.bytes_read), (1, 16 * PAGE));
    assert_eq!(statistics.present_pages, 16);
}

#[test]
fn a_failure_that_passes_is_retried() {
    let template = template(4, &["fail=3"]);
    assert_eq!(read_page(&template, 2).unwrap(), content(2));
    assert_eq!(template.statistics().failures, 3);
    assert_eq!(template.statistics().fetches, 1);
}

#[test]
fn a_failure_that_lasts_is_told_to_every_waiter_at_the_deadline() {
    let file = template_file(4, &[]);
    let deadline = Duration::from_millis(60);
    let template = open(&spec(&file), &["fail=always"], deadline);
    let began = Instant::now();
    together(6, |_| {
        let error = read_page(&template, 1).unwrap_err();
        assert!(matches!(*error, Error::Unavailable { .. }), "{error}");
    });
    assert!(began.elapsed() < deadline * 20, "{:?}", began.elapsed());
    // It was tried more than once, and a later wish tries again.
    let failures = template.statistics().failures;
    assert!(failures > 1, "{failures}");
    assert!(read_page(&template, 1).is_err());
    assert!(template.statistics().failures > failures);
    assert_eq!(template.statistics().present_pages, 0);
}

#[test]
fn a_failure_for_good_is_not_retried() {
    let template = template(4, &["fail=page:2"]);
    let error = read_page(&template, 2).unwrap_err();
    assert!(matches!(*error, Error::Integrity { .. }), "{error}");
    assert!(template.check().is_ok(), "the template itself is sound");
}

/// A page that cannot be had must not take its neighbours along.
#[test]
fn only_the_page_that_fails_fails() {
    let template = template(32, &["fail=page:5"]);
    for page in (0..32).filter(|page| *page != 5) {
        assert_eq!(read_page(&template, page).unwrap(), content(page), "page {page}");
    }
    assert!(read_page(&template, 5).is_err());
    assert!(template.load(USUAL_REQUEST, None).is_err());
    template.audit().unwrap();
}

#[test]
fn a_fetch_that_is_dropped_tells_its_waiters_and_may_be_made_again() {
    let template = template(4, &[]);
    let (sender, receiver) = channel();
    let first = template.want(1, 4, || waiter_into(sender.clone()));
    let Want::Fetch(fetch) = first else { panic!("{first:?}") };
    let second = template.want(2, 4, || waiter_into(sender.clone()));
    assert!(matches!(second, Want::Waiting), "{second:?}");
    drop(fetch);
    assert_eq!([receiver.recv(), receiver.recv()], [Ok(false), Ok(false)]);
    assert_eq!(read_page(&template, 1).unwrap(), content(1));
    let here = template.want(1, 4, || unreachable!("it is here"));
    assert!(matches!(here, Want::Here), "{here:?}");
}

#[test]
fn windows_stay_inside_the_template_and_skip_what_is_there() {
    let template = template(21, &["stats"]);
    // The window 16..32 reaches beyond the end.
    assert_eq!(read_into_window(&template, 20, 16), Run::between(16, 21));
    assert_eq!(read_into_window(&template, 3, 4), Run::between(0, 4));
    // What is left of 0..16 is behind the first part.
    assert_eq!(read_into_window(&template, 9, 16), Run::between(4, 16));
    assert_eq!(template.statistics().present_pages, 21);
    assert_eq!(counted(&template, "stats.bytes"), 21 * PAGE);
}

/// Fetches what a wish for `page` covers and says which pages became present.
fn read_into_window(template: &Arc<Template>, page: u64, window: u64) -> Run {
    let present = |page| template.present_from(Run { start: page, pages: 1 }).pages == 1;
    let before: Vec<bool> = (0..template.whole().pages).map(present).collect();
    let (sender, receiver) = channel();
    let want = template.want(page, window, || waiter_into(sender));
    let Want::Fetch(fetch) = want else { panic!("{want:?}") };
    assert!(fetch.attempt().is_none());
    assert!(receiver.recv().unwrap());
    let new: Vec<u64> =
        (0..template.whole().pages).filter(|at| present(*at) && !before[*at as usize]).collect();
    Run::between(new[0], new[new.len() - 1] + 1)
}

#[test]
fn zero_runs_are_not_fetched() {
    // Holes of 40 and 20 pages, with borders at no multiple of any window, and one that is too
    // short to be worth a run of its own.
    let holes = [Run::between(3, 43), Run::between(45, 48), Run::between(61, 81)];
    let file = template_file(90, &holes);
    let template = open(&spec(&file), &["stats"], DEADLINE);
    assert_eq!(template.zero_runs(), [holes[0], holes[2]]);
    template.load(USUAL_REQUEST, None).unwrap();
    for page in 0..90 {
        let hole = holes.iter().any(|hole| hole.contains(page));
        let expected = if hole { vec![0; PAGE as usize] } else { content(page) };
        assert_eq!(read_page(&template, page).unwrap(), expected, "page {page}");
    }
    assert_eq!(counted(&template, "stats.bytes"), 30 * PAGE);
    assert_eq!(template.statistics().zero_pages, 60);
    template.audit().unwrap();
}

#[test]
fn a_source_that_answers_zero_without_bytes() {
    // Too short for a zero run, so it is fetched like data.
    let template = open("zero:32K", &["stats"], DEADLINE);
    assert_eq!(read_page(&template, 7).unwrap(), vec![0; PAGE as usize]);
    assert_eq!(template.statistics().present_pages, 8);
    assert_eq!(template.statistics().bytes_read, 0);
    template.audit().unwrap();
}

#[test]
fn reads_begin_and_end_anywhere() {
    let template = template(8, &[]);
    let whole: Vec<u8> = (0..8).flat_map(content).collect();
    for (offset, length) in [(0, 1), (4095, 2), (1, 8 * 4096 - 2), (8191, 8194), (32767, 1), (5, 0)]
    {
        let mut buffer = vec![0; length];
        template.read(offset, &mut buffer).unwrap();
        assert!(buffer == whole[offset as usize..offset as usize + length], "{offset} {length}");
    }
    template.read(8 * PAGE, &mut []).unwrap();
    for (offset, length) in [(8 * PAGE, 1), (8 * PAGE - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 9)] {
        let error = template.read(offset, &mut vec![0; length]).unwrap_err();
        assert!(matches!(*error, Error::Usage { .. }), "{offset} {length}: {error}");
    }
}

/// Whoever maps the file privately sees a page whole or not at all, while it is being published.
#[test]
fn publication_is_atomic_to_every_mapping() {
    let template = template(2048, &[]);
    let memory = Mapping::of(&template, template.whole());
    // Absent pages are an error, in kernel mode EFAULT: so one can look without waiting.
    let watcher = negotiated(Features::SIGBUS);
    watcher.register(memory.start, memory.bytes, RegisterMode::MISSING).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (memory, over) = (&memory, &over);
            scope.spawn(move || {
                let mut seed = thread;
                while !over.load(SeqCst) {
                    seed = mix(seed);
                    let page = seed % 2048;
                    if let Some(seen) = look(memory.at(page)) {
                        assert!(seen == content(page), "page {page} was seen half published");
                    }
                }
            });
        }
        let mut page = 1;
        // In an order of its own, in windows of several sizes.
        for step in 0.. {
            page = (page + 37 * (1 + step % 3)) % 2048;
            if step > 4000 {
                break;
            }
            let window = 1 << (step % 7);
            if let Want::Fetch(fetch) = template.want(page, window, || Box::new(|_| ())) {
                assert!(fetch.attempt().is_none());
            }
        }
        template.load(USUAL_REQUEST, None).unwrap();
        over.store(true, SeqCst);
    });
    for page in 0..2048 {
        assert!(look(memory.at(page)).unwrap() == content(page));
    }
    template.audit().unwrap();
}

/// A page of this process as the kernel reads it, if it is there.
fn look(address: u64) -> Option<Vec<u8>> {
    let mut buffer = vec![0; PAGE as usize];
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: buffer.len() };
    // SAFETY: the local buffer is ours; the kernel checks the other address.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    match read {
        4096 => Some(buffer),
        -1 => None,
        other => panic!("{other} bytes of a page"),
    }
}

#[test]
fn an_audit_notices_a_strangers_read_and_nothing_is_served_any_more() {
    let template = template(64, &["stats"]);
    assert_eq!(read_page(&template, 0).unwrap(), content(0));
    template.audit().unwrap();
    // A present page may be read by anybody.
    let mapping = Mapping::of(&template, template.whole());
    assert_eq!(touch(mapping.at(0)), first_byte(0));
    template.audit().unwrap();
    drop(mapping);
    let absent = 64;
    assert_eq!(template.statistics().present_pages, absent, "one window");
    let template = self::template(600, &[]);
    read_page(&template, 0).unwrap();
    read_hole(&template, 500);
    let error = template.audit().unwrap_err();
    assert!(error.to_string().contains("page 500"), "{error}");
    assert_damaged(&template);
}

#[test]
fn a_publication_notices_a_strangers_read_and_the_present_map_stays_true() {
    let template = template(64, &[]);
    read_hole(&template, 5);
    let error = read_page(&template, 9).unwrap_err();
    assert!(error.to_string().contains("page 5 "), "{error}");
    // What was published before the strange page is there, and marked.
    assert_eq!(template.statistics().present_pages, 5);
    assert_eq!(template.present_from(template.whole()), Run::between(0, 5));
    assert_damaged(&template);
}

fn assert_damaged(template: &Arc<Template>) {
    let error = template.check().unwrap_err();
    assert!(matches!(*error, Error::Integrity { .. }), "{error}");
    assert!(!error.retryable());
    for page in [0, template.whole().pages - 1] {
        assert!(read_page(template, page).is_err(), "present or not, nothing is served");
    }
    assert!(template.load(USUAL_REQUEST, None).is_err());
    assert!(template.audit().is_err());
    assert!(template.statistics().damaged.is_some());
}

/// Reading a hole that is zero by the map makes a zero page: what belongs there.
#[test]
fn a_strangers_read_of_a_zero_run_does_no_harm() {
    let file = template_file(64, &[Run::between(0, 32)]);
    let template = open(&spec(&file), &[], DEADLINE);
    read_hole(&template, 7);
    template.audit().unwrap();
    assert_eq!(read_page(&template, 40).unwrap(), content(40));
    assert_eq!(read_page(&template, 7).unwrap(), vec![0; PAGE as usize]);
}

#[test]
fn a_file_that_shrinks_while_served_is_an_error_never_zeros() {
    let file = template_file(64, &[]);
    let template = open(&spec(&file), &[], DEADLINE);
    file.as_file().set_len(20 * PAGE).unwrap();
    let error = read_page(&template, 40).unwrap_err();
    assert!(matches!(*error, Error::Integrity { .. }), "{error}");
    assert!(error.to_string().contains("has 81920 bytes now"), "{error}");
    // Nor when it has its old size again, or other content.
    file.as_file().set_len(64 * PAGE).unwrap();
    let error = read_page(&template, 40).unwrap_err();
    assert!(matches!(*error, Error::Integrity { .. }), "{error}");
}

#[test]
fn a_file_that_is_rewritten_while_served_is_an_error() {
    let file = template_file(600, &[]);
    let template = open(&spec(&file), &[], DEADLINE);
    assert_eq!(read_page(&template, 0).unwrap(), content(0));
    let rewritten = vec![0xDD; PAGE as usize];
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), &rewritten, 500 * PAGE).unwrap();
    let error = read_page(&template, 500).unwrap_err();
    assert!(matches!(*error, Error::Integrity { .. }), "{error}");
    assert_eq!(read_page(&template, 0).unwrap(), content(0), "what is here stays");
}

#[test]
fn a_file_that_is_replaced_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    std::fs::copy(template_file(4, &[]).path(), &path).unwrap();
    let template = open(&format!("file:{}", path.display()), &[], DEADLINE);
    let other = directory.path().join("other");
    std::fs::write(&other, vec![0xDD; 4 * PAGE as usize]).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(read_page(&template, 3).unwrap(), content(3));
}

#[test]
fn without_userfaultfd_a_template_can_still_be_loaded() {
    let file = template_file(300, &[Run::between(100, 200)]);
    let delivery = Delivery::without("for a test");
    let template = Template::open::<&str>(&spec(&file), &[], &delivery, DEADLINE).unwrap();
    template.load(USUAL_REQUEST, None).unwrap();
    let plain = Mapping::of(&template, template.whole());
    for page in 0..300 {
        let expected = if (100..200).contains(&page) { 0 } else { first_byte(page) };
        assert_eq!(touch(plain.at(page)), expected);
    }
    // Reading the holes of a loaded file is what its clients do.
    template.audit().unwrap();
}

#[test]
fn templates_leave_no_descriptor_behind() {
    if !playing("templates_leave_no_descriptor_behind") {
        let status = play("templates_leave_no_descriptor_behind", std::process::Stdio::inherit());
        assert!(status.success());
        return;
    }
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..10 {
        let template = template(64, &[]);
        read_page(&template, 1).unwrap();
        drop(template);
        if round == 0 {
            before = count();
        }
    }
    assert_eq!(count(), before);
}
