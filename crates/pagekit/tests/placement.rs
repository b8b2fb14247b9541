//! Where the loop's thread runs: near a thread that faults all the time, and nowhere it may not.
//!
//! One test at a time: each looks for the loop of its engine among the threads of this process.

mod common;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::*;
use pagekit::engine::region::RegionMap;
use pagekit::engine::{Engine, NewTarget, Target};
use pagekit::page::PAGE;
use pagekit::template::Template;
use rustix::mm::{madvise, Advice};
use rustix::process::{getpid, pidfd_open, PidfdFlags};
use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet, Pid};
use uffd::{Features, RegisterMode};

const PAGES: u64 = 1024;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn engine() -> Arc<Engine> {
    Arc::new(Engine::start().unwrap())
}

/// The loop's thread of the one engine that there is.
fn loop_thread() -> Pid {
    let name = |place: &std::path::Path| std::fs::read_to_string(place.join("comm"));
    let find = || {
        let mut threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        threads.find(|thread| name(&thread.path()).is_ok_and(|name| name == "pk-loop\n"))
    };
    until("the loop's thread has its name", || find().is_some());
    Pid::from_raw(find().unwrap().file_name().to_str().unwrap().parse().unwrap()).unwrap()
}

fn is_ordinary(thread: Pid) -> bool {
    // SAFETY: takes a number and answers one.
    (unsafe { libc::sched_getscheduler(thread.as_raw_nonzero().get()) }) == libc::SCHED_OTHER
}

fn processors(set: &CpuSet) -> Vec<usize> {
    (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor)).collect()
}

fn only(processor: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(processor);
    set
}

/// Memory of this process that an engine serves by copying, and a thread that can fault on it for ever:
/// what it gives back is not announced, and comes again.
struct Hot {
    target: Option<Arc<Target>>,
    memory: Mapping,
    engine: Arc<Engine>,
    /// Pages touched.
    touched: AtomicU64,
    enough: AtomicBool,
}

impl Hot {
    fn new(engine: &Arc<Engine>, template: &Arc<Template>) -> Hot {
        let memory = Mapping::anonymous(PAGES);
        let uffd = negotiated(Features::default());
        uffd.register(memory.start, memory.bytes, RegisterMode::MISSING).unwrap();
        let pidfd: OwnedFd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
        let new = NewTarget {
            uffd,
            process: Some((getpid().as_raw_nonzero().get(), pidfd)),
            template: Arc::clone(template),
            backend: backend("copy"),
            regions: RegionMap::new(memory.start, template.whole()),
            beacon: None,
            page_size: PAGE,
            owner: None,
            connection: None,
        };
        let target = Some(engine.add(new).unwrap());
        let (engine, touched, enough) =
            (Arc::clone(engine), AtomicU64::new(0), AtomicBool::new(false));
        Hot { target, memory, engine, touched, enough }
    }

    /// Faults until that is enough, and looks at what came.
    fn fault(&self) {
        self.fault_and(|page, found| assert_eq!(found, first_byte(page)));
    }

    fn fault_and(&self, look: impl Fn(u64, u8)) {
        while !self.enough.load(Relaxed) {
            for page in (0..PAGES).map(|page| page * 389 % PAGES) {
                look(page, touch(self.memory.at(page)));
                self.touched.fetch_add(1, Relaxed);
                if self.enough.load(Relaxed) {
                    break;
                }
            }
            // SAFETY: memory of the test, which expects to fault on it again.
            unsafe {
                let bytes = self.memory.bytes as usize;
                madvise(self.memory.start as *mut _, bytes, Advice::LinuxDontNeed).unwrap();
            }
        }
    }
}

impl Drop for Hot {
    fn drop(&mut self) {
        if let Some(target) = self.target.take() {
            self.engine.forget(target.id);
        }
    }
}

#[test]
fn the_loop_goes_near_who_faults_all_the_time_and_is_what_it_was_afterwards() {
    let _alone = alone();
    let template = template(PAGES, &[]);
    let engine = engine();
    let (thread, before) = (loop_thread(), sched_getaffinity(None).unwrap());
    let hot = Hot::new(&engine, &template);
    std::thread::scope(|scope| {
        scope.spawn(|| hot.fault());
        until("the loop goes near", || engine.statistics().stays > 0);
        hot.enough.store(true, Relaxed);
    });
    until("the loop is what it was", || {
        is_ordinary(thread) && sched_getaffinity(Some(thread)).unwrap() == before
    });
    drop(hot);
    assert_all_counted(&engine);
}

/// The target computes where the loop stays, and never faults again: the loop must be free to serve
/// others, and not wait until nobody else wants that processor.
#[test]
fn a_loop_that_gets_to_do_nothing_is_taken_back() {
    let _alone = alone();
    let template = template(PAGES, &[]);
    let engine = engine();
    let (thread, before) = (loop_thread(), sched_getaffinity(None).unwrap());
    let (hot, other) = (Hot::new(&engine, &template), Hot::new(&engine, &template));
    let computing = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            hot.fault();
            while computing.load(Relaxed) {
                std::hint::spin_loop();
            }
        });
        until("the loop goes near", || engine.statistics().stays > 0);
        hot.enough.store(true, Relaxed);
        assert_eq!(touch(other.memory.at(7)), first_byte(7));
        until("the loop is what it was", || {
            is_ordinary(thread) && sched_getaffinity(Some(thread)).unwrap() == before
        });
        computing.store(false, Relaxed);
    });
}

#[test]
fn the_loop_stays_where_it_may() {
    let _alone = alone();
    let allowed = processors(&sched_getaffinity(None).unwrap());
    let [here, there, ..] = allowed[..] else {
        eprintln!("skipped: this machine has one processor");
        return;
    };
    let template = template(PAGES, &[]);
    let engine = engine();
    let thread = loop_thread();
    sched_setaffinity(Some(thread), &only(here)).unwrap();
    let hot = Hot::new(&engine, &template);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sched_setaffinity(None, &only(there)).unwrap();
            hot.fault();
        });
        until("it was hot for a while", || hot.touched.load(Relaxed) > PAGES);
        hot.enough.store(true, Relaxed);
    });
    assert_eq!(engine.statistics().stays, 0);
    assert_eq!(processors(&sched_getaffinity(Some(thread)).unwrap()), [here]);
}

#[test]
fn hot_targets_are_served_side_by_side() {
    let _alone = alone();
    let template = template(PAGES, &[]);
    let engine = engine();
    let hot: Vec<Hot> = (0..3).map(|_| Hot::new(&engine, &template)).collect();
    std::thread::scope(|scope| {
        for hot in &hot {
            scope.spawn(|| hot.fault());
        }
        until("all were served", || hot.iter().all(|hot| hot.touched.load(Relaxed) > 2 * PAGES));
        hot.iter().for_each(|hot| hot.enough.store(true, Relaxed));
    });
    drop(hot);
    assert_all_counted(&engine);
}

#[test]
fn an_engine_stops_while_its_loop_stays_somewhere() {
    let _alone = alone();
    let template = template(PAGES, &[]);
    let engine = engine();
    let mut hot = Hot::new(&engine, &template);
    let target = hot.target.take();
    std::thread::scope(|scope| {
        scope.spawn(|| hot.fault_and(|_, _| ()));
        until("the loop goes near", || engine.statistics().stays > 0);
        engine.stop();
        hot.enough.store(true, Relaxed);
        // Nobody serves any more. With the last descriptor of the userfaultfd its memory is ordinary.
        drop(target);
    });
}
