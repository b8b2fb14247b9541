//! Threads that wait for sources, so that the event loop never does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::template::Fetch;

/// Threads kept. They sleep in a source or in the kernel, so there may be more of them than cores.
const THREADS: usize = 16;

#[derive(Debug)]
struct Job {
    due: Instant,
    order: u64,
    fetch: Fetch,
}

impl PartialEq for Job {
    fn eq(&self, other: &Job) -> bool {
        (self.due, self.order) == (other.due, other.order)
    }
}
impl Eq for Job {}
impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Job) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Job {
    fn cmp(&self, other: &Job) -> std::cmp::Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

#[derive(Debug, Default)]
struct Queue {
    jobs: BinaryHeap<Reverse<Job>>,
    orders: u64,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// A pool of threads that attend to fetches.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Workers {
    pub(super) fn start() -> std::io::Result<Workers> {
        let shared = Arc::new(Shared::default());
        let threads = (0..THREADS)
            .map(|number| {
                let shared = Arc::clone(&shared);
                crate::thread::spawn(&format!("pk-fetch-{number}"), move || shared.work())
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Workers { shared, threads: Mutex::new(threads) })
    }

    /// Attends to `fetch` on one of the threads.
    pub(super) fn submit(&self, fetch: Fetch) {
        self.shared.submit(fetch, Duration::ZERO);
    }

    /// Gives up what waits (its waiters are told), waits for what runs, ends the threads.
    pub(super) fn stop(&self) {
        let jobs = {
            let mut queue = self.shared.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.jobs)
        };
        self.shared.changed.notify_all();
        drop(jobs);
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A worker catches panics of its jobs; there is nothing left to learn from it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, fetch: Fetch, after: Duration) {
        let mut queue = self.lock();
        if queue.stopped {
            // Dropped outside the lock: its waiters are told then.
            drop(queue);
            drop(fetch);
            return;
        }
        queue.orders += 1;
        let job = Job { due: Instant::now() + after, order: queue.orders, fetch };
        queue.jobs.push(Reverse(job));
        drop(queue);
        self.changed.notify_one();
    }

    fn work(&self) {
        while let Some(fetch) = self.next() {
            // A panic in a source is an outcome: the fetch tells its waiters when it is dropped.
            let outcome = catch_unwind(AssertUnwindSafe(|| fetch.attempt()));
            if let Ok(Some((fetch, after))) = outcome {
                self.submit(fetch, after);
            }
        }
    }

    fn next(&self) -> Option<Fetch> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return None;
            }
            let now = Instant::now();
            let wait = match queue.jobs.peek() {
                Some(Reverse(job)) if job.due <= now => {
                    let job = queue.jobs.pop();
                    if !queue.jobs.is_empty() {
                        // Perhaps nobody but us was waiting for the time of the next one.
                        self.changed.notify_one();
                    }
                    return job.map(|Reverse(job)| job.fetch);
                }
                Some(Reverse(job)) => job.due - now,
                None => Duration::from_secs(3600),
            };
            let waited = self.changed.wait_timeout(queue, wait);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
