//! Working sets: what is recorded is what was demanded, and what is replayed is there in time.

mod common;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use pagekit::engine::Engine;
use pagekit::error::Error;
use pagekit::page::{coalesce, Run, PAGE};
use pagekit::template::replay::{Options, Replay, Sink, Taken};
use pagekit::template::Template;
use pagekit::working_set::{Until, WorkingSet};

/// Demands `pages` of a template like `template`, in this order, and gives the recorded set.
fn recorded(template: &Arc<Template>, critical: &[u64], rest: &[u64]) -> WorkingSet {
    let recorder = template.record().unwrap();
    critical.iter().for_each(|page| template.demanded(*page));
    if !rest.is_empty() {
        recorder.ready();
        rest.iter().for_each(|page| template.demanded(*page));
    }
    template.stop_recording();
    recorder.working_set(Until::TheEnd)
}

fn replay(template: &Arc<Template>, set: &WorkingSet, options: Options) -> Arc<Replay> {
    template.replay(set, options).unwrap()
}

fn pages_there(template: &Template) -> Vec<Run> {
    let there = |page: &u64| template.present_from(Run { start: *page, pages: 1 }).pages == 1;
    coalesce((0..template.whole().end()).filter(there))
}

#[test]
fn only_demanded_pages_are_recorded_and_each_of_them() {
    for backend in BOTH {
        let template = template(256, &[]);
        let engine = Arc::new(Engine::start().unwrap());
        let recorder = template.record().unwrap();
        let target = Served::new(&engine, &template, backend);
        let order = [40, 41, 200, 3, 42, 17];
        for page in order {
            assert_eq!(target.touch(page), first_byte(page));
        }
        recorder.ready();
        target.touch(99);
        let set = recorder.working_set(Until::TheEnd);
        let critical = [3, 17, 40, 41, 42, 200];
        assert_eq!(set.critical(), [coalesce(critical)], "{backend}");
        assert_eq!(set.rest(), [coalesce([99])], "{backend}");
        // From now on pages come in windows again.
        template.stop_recording();
        let before = engine.statistics().demand_faults;
        (128..144).for_each(|page| {
            target.touch(page);
        });
        assert!(engine.statistics().demand_faults <= before + 2, "{backend}");
    }
}

#[test]
fn a_replay_brings_the_set_and_little_else_in_few_requests() {
    let file = template_file(4096, &[Run::between(2000, 2100)]);
    let template = open(&spec(&file), &["stats"], DEADLINE);
    // Two regions with holes in them, a page on its own, and pages that are zero.
    let pages: Vec<u64> = (100..500)
        .filter(|page| page % 10 != 3)
        .chain(1000..1200)
        .chain([3000])
        .chain(1990..2010)
        .collect();
    let set = recorded(&template, &pages, &[]);
    assert_eq!(set.critical_pages(), 360 + 200 + 1 + 20);
    let replay = replay(&template, &set, Options::default());
    assert!(replay.wait(PATIENCE).unwrap());
    for page in pages.iter().filter(|page| !(2000..2100).contains(*page)) {
        assert_eq!(template.present_from(Run { start: *page, pages: 1 }).pages, 1, "page {page}");
    }
    let statistics = replay.statistics();
    assert_eq!(statistics.planned_pages, 400 + 200 + 1 + 10, "single gaps are bridged");
    assert_eq!(statistics.fetched_pages, statistics.planned_pages);
    assert_eq!(statistics.requests, 4 + 2 + 1 + 1);
    assert_eq!(counted(&template, "stats.reads"), statistics.requests);
    assert!(statistics.done && statistics.failure.is_none());
    // What is there already is not fetched again.
    assert!(self::replay(&template, &set, Options::default()).wait(PATIENCE).unwrap());
    assert_eq!(counted(&template, "stats.reads"), statistics.requests);
}

#[test]
fn what_is_not_critical_is_fetched_only_on_request() {
    for rest in [false, true] {
        let template = template(1024, &[]);
        let set = recorded(&template, &[1, 2, 3], &[500, 501]);
        let replay = replay(&template, &set, Options { rest, ..Options::default() });
        assert!(replay.wait(PATIENCE).unwrap());
        let mut expected = vec![Run::between(1, 4)];
        expected.extend(rest.then_some(Run::between(500, 502)));
        assert_eq!(pages_there(&template), expected);
        assert_eq!(replay.statistics().critical_pages, 3);
    }
}

#[test]
fn a_set_of_another_template_is_refused() {
    let (one, other) = (template(64, &[]), template(65, &[]));
    let set = recorded(&other, &[1], &[]);
    let error = one.replay(&set, Options::default()).unwrap_err();
    assert!(matches!(error, Error::Integrity { .. }), "{error}");
    let file = template_file(64, &[Run::between(0, 1)]);
    let other = open(&spec(&file), &[], DEADLINE);
    let error = one.replay(&recorded(&other, &[1], &[]), Options::default()).unwrap_err();
    assert!(error.to_string().contains("another template"), "{error}");
    // A copy of the same content is the same template.
    assert!(one.replay(&recorded(&template(64, &["pass"]), &[1], &[]), Options::default()).is_ok());
}

#[test]
fn demand_joins_what_is_on_its_way_and_does_not_wait_for_the_rest() {
    let template = template(2048, &["delay=30ms,16"]);
    let set = recorded(&template, &(0..2048).collect::<Vec<_>>(), &[]);
    let one = Options { parallel: Some(1), ..Options::default() };
    let replay = replay(&template, &set, one);
    // The last page would come after 16 requests.
    let began = Instant::now();
    assert_eq!(read_page(&template, 2047).unwrap(), content(2047));
    assert!(began.elapsed() < Duration::from_millis(16 * 30), "{:?}", began.elapsed());
    together(4, |number| {
        let page = number as u64 * 500;
        assert_eq!(read_page(&template, page).unwrap(), content(page));
    });
    assert!(replay.wait(PATIENCE).unwrap());
    let statistics = template.statistics();
    assert_eq!(statistics.present_pages, 2048);
    assert_eq!(statistics.bytes_read, 2048 * PAGE, "nothing was fetched twice");
}

#[test]
fn the_rate_is_kept() {
    let template = template(1024, &[]);
    let set = recorded(&template, &(0..1024).collect::<Vec<_>>(), &[]);
    let rate = Some(20 << 20);
    let began = Instant::now();
    let replay = replay(&template, &set, Options { rate, ..Options::default() });
    assert!(replay.wait(PATIENCE).unwrap());
    // 4 MiB at 20 MiB a second, but the last extent is free to end later.
    assert!(began.elapsed() >= Duration::from_millis(170), "{:?}", began.elapsed());
}

#[test]
fn a_replay_can_be_cancelled_and_replaced() {
    let template = template(4096, &["delay=20ms,2"]);
    let set = recorded(&template, &(0..4096).collect::<Vec<_>>(), &[]);
    let first = replay(&template, &set, Options::default());
    let second = replay(&template, &recorded(&template, &[7], &[]), Options::default());
    assert!(second.wait(PATIENCE).unwrap());
    assert!(first.wait(PATIENCE).unwrap(), "it ended when it was replaced");
    assert!(first.statistics().fetched_pages < 4096);
    second.cancel();
    assert_eq!(read_page(&template, 4000).unwrap(), content(4000));
}

#[test]
fn a_failing_source_ends_the_replay_and_nothing_else() {
    let file = template_file(1024, &[]);
    let deadline = Duration::from_millis(50);
    let template = open(&spec(&file), &["fail=page:700"], deadline);
    let set = recorded(&template, &(0..1024).collect::<Vec<_>>(), &[]);
    let replay = replay(&template, &set, Options { parallel: Some(1), ..Options::default() });
    let error = replay.wait(PATIENCE).unwrap_err();
    assert!(error.to_string().contains("page:700"), "{error}");
    assert!(replay.statistics().failure.is_some());
    assert_eq!(replay.statistics().fetched_pages, 700, "those that are there, and no others");
    assert_eq!(read_page(&template, 699).unwrap(), content(699));
    assert_eq!(read_page(&template, 1000).unwrap(), content(1000));
    assert!(read_page(&template, 700).is_err());
    assert!(template.load(1 << 20, None).is_err());
}

#[test]
fn a_passing_failure_is_no_failure() {
    let template = template(512, &["fail=3"]);
    let set = recorded(&template, &(0..512).collect::<Vec<_>>(), &[]);
    assert!(replay(&template, &set, Options::default()).wait(PATIENCE).unwrap());
    assert_eq!(template.statistics().present_pages, 512);
}

#[test]
fn loading_reads_everything_in_requests_of_one_size() {
    for (request, requests) in [(64 << 10, 64), (1 << 20, 4), (1, 1024)] {
        let file = template_file(2048, &[Run::between(1024, 2048)]);
        let template = open(&spec(&file), &["stats"], DEADLINE);
        template.load(request, Some(3)).unwrap();
        assert_eq!(template.statistics().present_pages, 1024);
        assert_eq!(counted(&template, "stats.reads"), requests);
    }
}

/// Takes runs, and refuses each the first time.
#[derive(Debug, Default)]
struct Hesitant {
    taken: Mutex<Vec<Run>>,
    asked: AtomicU64,
}

impl Sink for Hesitant {
    fn put(&self, run: Run) -> Taken {
        if self.asked.fetch_add(1, SeqCst) % 2 == 0 {
            return Taken::NotYet;
        }
        self.taken.lock().unwrap().push(run);
        Taken::All
    }

    fn is_over(&self) -> bool {
        false
    }
}

#[test]
fn sinks_get_every_critical_page_whenever_they_come() {
    let template = template(2048, &["delay=2ms"]);
    let critical: Vec<u64> = (0..1000).collect();
    let set = recorded(&template, &critical, &[1500, 1501]);
    let early = Arc::new(Hesitant::default());
    template.add_sink(Arc::clone(&early) as _);
    let replay = replay(&template, &set, Options { rest: true, ..Options::default() });
    assert!(replay.wait(PATIENCE).unwrap());
    let late = Arc::new(Hesitant::default());
    template.add_sink(Arc::clone(&late) as _);
    for sink in [early, late] {
        let pages = || sink.taken.lock().unwrap().iter().map(|run| run.pages).sum::<u64>();
        until("all critical pages were taken", || pages() == 1000);
        let mut taken = sink.taken.lock().unwrap().clone();
        taken.sort_by_key(|run| run.start);
        assert_eq!(taken.first().unwrap().start, 0);
        assert!(taken.windows(2).all(|pair| pair[0].end() == pair[1].start), "each once");
    }
}

#[test]
fn a_template_goes_although_a_replay_is_under_way() {
    let template = template(4096, &["delay=20ms,2"]);
    let set = recorded(&template, &(0..4096).collect::<Vec<_>>(), &[]);
    let replay = replay(&template, &set, Options::default());
    drop(template);
    assert!(replay.wait(PATIENCE).unwrap());
    assert!(replay.statistics().fetched_pages < 4096);
}
