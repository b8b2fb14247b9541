//! Pages that one target demanded, and its siblings.

mod common;

use std::sync::Arc;

use common::*;
use pagekit::engine::broadcast::Policy;
use pagekit::engine::{Engine, Outcome};
use pagekit::template::{replay, Template};
use pagekit::working_set::Until;
use rustix::mm::{madvise, Advice};

const PAGES: u64 = 512;

fn engine(policy: Policy) -> Arc<Engine> {
    let engine = Arc::new(Engine::start().unwrap());
    engine.broadcast(policy);
    engine
}

fn targets(engine: &Arc<Engine>, template: &Arc<Template>, number: usize) -> Vec<Served> {
    (0..number).map(|_| Served::new(engine, template, "copy")).collect()
}

/// Waits until so many pages came by broadcast.
fn came(engine: &Engine, pages: u64) {
    until("pages come by broadcast", || engine.statistics().broadcast_pages >= pages);
}

fn faults(engine: &Engine) -> u64 {
    engine.statistics().demand_faults
}

/// Whoever waits for a page gets it when it is there, with or without a broadcast: all of them by the end
/// of one fetch.
#[test]
fn who_waits_is_served_by_one_fetch() {
    const TARGETS: usize = 8;
    let template = template(PAGES, &["delay=20ms"]);
    let engine = engine(Policy::Off);
    let targets = targets(&engine, &template, TARGETS);
    together(TARGETS, |at| {
        for page in [7, 100, 300] {
            assert_eq!(targets[at].touch(page), first_byte(page));
        }
    });
    assert_eq!(template.statistics().fetches, 3);
    assert_all_counted(&engine);
    assert_eq!(outcomes(&engine, Outcome::Copied), 3 * TARGETS as u64);
}

#[test]
fn what_one_demanded_the_others_have() {
    let template = template(PAGES, &[]);
    let engine = engine(Policy::All);
    let targets = targets(&engine, &template, 4);
    let shared = Served::new(&engine, &template, "share");
    // Single pages of blocks, and a block.
    let touched = [7, 100, 103, 300, 511];
    for page in touched {
        assert_eq!(targets[0].touch(page), first_byte(page));
    }
    // 103 brought the rest of its block.
    came(&engine, 3 * (3 + 16));
    let before = faults(&engine);
    for target in &targets[1..] {
        for page in touched.into_iter().chain(96..112) {
            assert!(target.page(page) == content(page), "page {page}");
        }
    }
    assert_eq!(faults(&engine), before);
    assert_eq!(engine.statistics().broadcast_pages, 3 * (3 + 16));
    assert_eq!(shared.touch(200), first_byte(200));
    assert_eq!(targets[1].touch(201), first_byte(201), "what `share` demands is not broadcast");
    assert_eq!(faults(&engine), before + 2);
}

#[test]
fn what_was_given_back_does_not_come_back() {
    let template = template(PAGES, &[]);
    let engine = engine(Policy::All);
    let targets = targets(&engine, &template, 2);
    // SAFETY: memory of this test.
    unsafe {
        let pages = 8 * pagekit::page::PAGE as usize;
        madvise(targets[1].at(96) as *mut _, pages, Advice::LinuxDontNeed).unwrap();
    }
    for page in [96, 97, 110] {
        assert_eq!(targets[0].touch(page), first_byte(page));
    }
    came(&engine, 8);
    for page in 96..112 {
        let expected = if page < 104 { 0 } else { first_byte(page) };
        assert_eq!(targets[1].touch(page), expected, "page {page}");
    }
}

#[test]
fn of_a_working_set_only_what_it_has() {
    let template = template(PAGES, &[]);
    let recorder = template.record().unwrap();
    recorder.ready();
    (10..20).for_each(|page| template.demanded(page));
    let set = recorder.working_set(Until::TheEnd);
    assert_eq!((set.critical_pages(), set.pages()), (0, 10));
    let engine = engine(Policy::WorkingSet);
    let targets = targets(&engine, &template, 2);
    assert_eq!(targets[0].touch(12), first_byte(12), "nothing comes along while it is recorded");
    template.stop_recording();
    assert_eq!(targets[0].touch(13), first_byte(13), "nor without a set");
    template.replay(&set, replay::Options::default()).unwrap();
    assert_eq!(targets[0].touch(100), first_byte(100));
    for page in [30, 31, 18, 19] {
        assert_eq!(targets[0].touch(page), first_byte(page));
    }
    came(&engine, 4);
    let before = faults(&engine);
    // 18 brought its block, of which 16 to 19 are of the set.
    assert_eq!(targets[1].touch(19), first_byte(19));
    assert_eq!(faults(&engine), before);
    assert_eq!(targets[1].touch(100), first_byte(100));
    assert_eq!(faults(&engine), before + 1);
}

#[test]
fn names_of_policies() {
    for (name, policy) in
        [("off", Policy::Off), ("working-set", Policy::WorkingSet), ("all", Policy::All)]
    {
        assert_eq!(name.parse::<Policy>().unwrap(), policy);
    }
    assert!("ALL".parse::<Policy>().unwrap_err().to_string().contains("no way to broadcast"));
}
