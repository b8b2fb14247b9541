//! The mount: a file system with the template's memory as one file, for any program that maps it
//! privately. No preloaded library, no userfaultfd, and nothing private for a page that is only read.
//!
//! Facts about the kernel (FUSE, all observed on 6.18), and what follows:
//!
//! *Sharing.*
//! - What the kernel has read of the file it keeps for everybody who maps it, over all openings
//!   (`FOPEN_KEEP_CACHE`), in pages of 4 KiB: there are no large folios. A later fork costs what it
//!   costs on tmpfs. A hole of the template is nobody's to read but ours, so clients need not trust
//!   each other.
//! - A page is in memory twice: in the template's file, charged to the server, and in the kernel's
//!   cache of the mounted one, charged to the client that touched it first.
//!
//! *Writing.*
//! - A `write` that we refuse has changed the cached page already, and everybody sees it. But before
//!   each write, and before `fallocate`, the kernel asks for the attribute `security.capability` and
//!   removes it; if that fails, so does the write, with nothing changed. So the file claims to have
//!   that attribute (an empty one), and nobody can remove it.
//! - A shared mapping of a file that is open for writing changes cached pages without asking, and
//!   nothing prevents it (`FOPEN_DIRECT_IO` would, but then each private mapping empties the cache for
//!   all). QEMU before 8.2 opens for writing even for a private mapping. So the write bits of the
//!   mode say who may *open* for writing; without any nobody may, not even root. If somebody does
//!   change a page, the kernel sends it to us sooner or later: nothing is served any more then.
//! - QEMU punches holes where its guest gives memory back (balloon, free page reporting). That is
//!   refused (EROFS), so QEMU says so on stderr and gives nothing back: the guest never finds content
//!   of the template where it expects what it left there.
//!
//! *Reading ahead.*
//! - How much the kernel reads around a fault is taken from the device's setting when the file is
//!   *opened*: with 0 exactly the page touched. It does not give up after any number of misses.
//! - In memory under `MADV_HUGEPAGE`, which is all of QEMU's, each fault reads 4 MiB, whatever the
//!   setting. A fork that needed 6.5 MiB got 80.
//! - Such *guesses* can be refused: the kernel asks for the page that it really needs then, alone.
//!   Refused pages stay in the cache, empty, and are asked for one by one.
//! - So: without a working set guesses are served, with the kernel's usual 128 KiB (on a store 2 ms
//!   away that QEMU starts in 0.4 s with them, and in 1.2 s without). While demands are recorded
//!   guesses are refused, and each opening makes the kernel forget what it has. When a working set is
//!   replayed on a store that must be waited for, guesses are served only if their pages are here
//!   (0.2 s, and 6 MiB moved); so they are with a readahead of 0.
//! - On later kernels a page alone may be part of a large folio, which is asked for as a whole: no
//!   guess is refused twice.
//! - `FUSE_NOTIFY_STORE` puts pages into the cache for 1.2 µs each, of any length, whatever the
//!   setting, and no request comes of it. Reading our own file ahead (`POSIX_FADV_WILLNEED`) is as
//!   fast, but takes 128 KiB at most, and comes back to us as requests. A store waits for requests
//!   under way that concern its pages: it is made by a thread that none of them waits for.
//!
//! *Passing through* (Linux ≥ 6.9): the kernel can serve the file from another one without asking us.
//! - It opens that file with the client's flags, and checks nothing: who may open for writing could
//!   write it. Its view is through a mount that is read-only, and it is done only if the mode has no
//!   write bits.
//! - Cached and passed through at once is an I/O error: it is decided when mounting.
//!
//! *The server itself* must not map the file: a fault may hold what its threads need to answer.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuser::{BackingId, Config, Session, SessionACL};
use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};
use rustix::process::{getegid, geteuid};

use crate::engine::{Engine, Histogram};
use crate::error::{Error, Result};
use crate::page::Run;
use crate::template::cache_file::Protection;
use crate::template::replay::{Sink, Taken};
use crate::template::Template;
use file::{readonly_view, OneFile, Shared};
use place::{Mounted, Place};

mod file;
mod place;

/// What the kernel reads ahead if nothing else is asked for, in bytes.
pub const USUAL_READAHEAD: u64 = 128 << 10;
/// The name of the file if nothing else is asked for.
pub const USUAL_NAME: &str = "memory";
/// Threads that read requests at most. They copy, and wait for nothing; on two processors one is as
/// good as four.
const MOST_THREADS: usize = 4;
/// How long the end of a connection is waited for, which comes at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where and how to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// An empty directory.
    pub directory: PathBuf,
    /// Name of the file in it.
    pub name: String,
    /// User and group that the file belongs to; this process's if none.
    pub owner: Option<(u32, Option<u32>)>,
    /// Mode of the file, of which only read and write bits count. Who may write can *open* it for
    /// writing, which QEMU before 8.2 does even for a private mapping; no write ever succeeds.
    pub mode: u32,
    /// Whether the kernel may serve it from another file, without asking us.
    pub passthrough: Passthrough,
    /// Bytes that the kernel reads around a page that was touched. With 0 none but the template's own
    /// window is fetched with it, also for programs that ask the kernel for more.
    pub readahead: u64,
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Options {
    /// `memory` in this directory, for this user alone.
    fn from(directory: &P) -> Options {
        Options {
            directory: directory.as_ref().to_owned(),
            name: USUAL_NAME.to_owned(),
            owner: None,
            mode: 0o600,
            passthrough: Passthrough::Auto,
            readahead: USUAL_READAHEAD,
        }
    }
}

/// Whether the kernel serves the file from another one, if that can be: from the source, if that is
/// nothing but a local file, or from the template's file, if that is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passthrough {
    /// Where it is possible.
    Auto,
    /// Every page comes from us.
    Never,
    /// Or there is no mount.
    Always,
}

impl std::str::FromStr for Passthrough {
    type Err = Error;

    fn from_str(text: &str) -> Result<Passthrough> {
        match text {
            "auto" => Ok(Passthrough::Auto),
            "never" => Ok(Passthrough::Never),
            "always" => Ok(Passthrough::Always),
            _ => Err(Error::usage(
                format!("{text:?} says nothing about passthrough"),
                "say auto, never or always",
            )),
        }
    }
}

/// What is counted; read by [`Mount::statistics`].
#[derive(Debug, Default)]
struct Counters {
    opens: AtomicU64,
    reads: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    refused_guesses: AtomicU64,
    latency: Histogram,
    pushes: AtomicU64,
    pushed_pages: AtomicU64,
}

/// What a mount counts.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Statistics {
    /// The file.
    pub path: PathBuf,
    /// `cached` or `passthrough`.
    pub plan: &'static str,
    /// Why so.
    pub reason: String,
    /// Whether it is where it was mounted.
    pub mounted: bool,
    /// Openings that there are.
    pub clients: usize,
    /// Openings that there have been.
    pub opens: u64,
    /// Requests of the kernel for pages.
    pub reads: u64,
    /// Bytes that they were answered with.
    pub bytes: u64,
    /// Requests that were refused because a page could not be had.
    pub errors: u64,
    /// Requests that were refused because nobody had demanded their pages.
    pub refused_guesses: u64,
    /// From the moment a request was read until it was answered, microseconds: median.
    pub p50_us: f64,
    /// The time that 99 in 100 stay below.
    pub p99_us: f64,
    /// Runs handed to the kernel before anybody asked.
    pub pushes: u64,
    /// Pages of them.
    pub pushed_pages: u64,
    /// Why nothing is served any more, if so.
    pub damaged: Option<String>,
}

/// A file system of ours, mounted. Dropping it takes it away.
#[derive(Debug)]
pub struct Mount {
    shared: Arc<Shared>,
    mounted: Arc<Mounted>,
    plan: &'static str,
    reason: String,
    life: Arc<Life>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Whether the kernel still asks.
#[derive(Debug)]
struct Life {
    ended: Mutex<bool>,
    changed: Condvar,
    /// Wakes the thread that watches the place.
    wake: OwnedFd,
    stopping: AtomicBool,
}

impl Mount {
    /// Mounts the template.
    ///
    /// # Errors
    /// `Usage` (no directory, not empty, something else is mounted there, no name of a file,
    /// passthrough demanded where it would be harmful), `AddressInUse` if another server answers
    /// there (the mount of one that is gone is replaced), `Missing`, `Unsupported` (no FUSE, no
    /// `fusermount3`, no passthrough), `Permission`, `Kernel`.
    pub fn start(
        options: impl Into<Options>,
        engine: Arc<Engine>,
        template: Arc<Template>,
    ) -> Result<Mount> {
        let options = options.into();
        check_name(&options.name)?;
        let place = Place::take(&options.directory)?;
        let ourselves = (geteuid().as_raw(), getegid().as_raw());
        let owner = match options.owner {
            Some((user, group)) => (user, group.unwrap_or(ourselves.1)),
            None => ourselves,
        };
        let mode = options.mode & 0o666;
        let candidate = candidate(&options, &template)?;
        let path = place.directory().join(&options.name);
        let shared = Arc::new(Shared::new(&options, path, template, engine));
        let backing = Arc::new(OnceLock::new());
        let files = OneFile {
            shared: Arc::clone(&shared),
            name: options.name.clone(),
            owner,
            mode: mode as u16,
            made: SystemTime::now(),
            passthrough: candidate.is_ok(),
            backing: Arc::clone(&backing),
            backing_id: OnceLock::new(),
        };
        let failed = |error: std::io::Error| {
            Error::kernel(format!("cannot mount on {}", options.directory.display()), error)
        };
        let for_others = mode & 0o077 != 0 || owner.0 != ourselves.0 || ourselves.0 == 0;
        let (new, device) = place.mount(for_others)?;
        let mut config = Config::default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        config.n_threads = Some(processors.min(MOST_THREADS));
        config.clone_fd = true;
        let session = Session::from_fd(files, device, SessionACL::All, config).map_err(failed)?;
        let (plan, reason) = match candidate.and_then(|(file, why)| {
            let number = BackingId::create_raw(&session, &file)
                .map_err(|error| format!("the kernel refuses passthrough: {error}"))?;
            Ok((number, why))
        }) {
            Ok((number, why)) => {
                let _ = backing.set(number);
                ("passthrough", why)
            }
            Err(why) if options.passthrough == Passthrough::Always => {
                return Err(Error::Unsupported {
                    message: format!("no passthrough: {why}"),
                    hint: "without it the pages come from the server".to_owned(),
                })
            }
            Err(why) => ("cached", why),
        };
        let life = Arc::new(Life {
            ended: Mutex::new(false),
            changed: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?,
            stopping: AtomicBool::new(false),
        });
        let mounted = Arc::new(new.put()?);
        if plan == "cached" {
            shared.mounted(mounted.readahead_setting(), session.notifier());
            shared.template.add_sink(Arc::new(Pushed(Arc::downgrade(&shared))));
        }
        let mount = Mount { shared, mounted, plan, reason, life, threads: Mutex::default() };
        mount.run(session).map_err(failed)?;
        Ok(mount)
    }

    fn run(&self, session: Session<OneFile>) -> std::io::Result<()> {
        let mut threads = self.lock_threads();
        let life = Arc::clone(&self.life);
        threads.push(crate::thread::spawn("pk-mount", move || {
            // It ends when the connection does; that alone is of interest.
            let _ = session.run();
            *life.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
            life.changed.notify_all();
            life.wake();
        })?);
        let life = Arc::clone(&self.life);
        let (shared, mounted) = (Arc::clone(&self.shared), Arc::clone(&self.mounted));
        threads.push(crate::thread::spawn("pk-mounted", move || life.watch(&shared, &mounted))?);
        Ok(())
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// `cached` or `passthrough`, and why.
    pub fn plan(&self) -> (&'static str, &str) {
        (self.plan, &self.reason)
    }

    /// Hands present pages of `run` to the kernel before anybody asks for them: nobody demanded them,
    /// and nobody will ask us. Waits for requests under way that concern them. A template does this
    /// by itself with what it fetches ahead.
    pub fn push(&self, run: Run) {
        self.shared.push(run);
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let counters = &self.shared.counters;
        Statistics {
            path: self.path().to_owned(),
            plan: self.plan,
            reason: self.reason.clone(),
            mounted: !self.life.has_ended(Duration::ZERO) && self.mounted.is_there(),
            clients: self.shared.clients(),
            opens: counters.opens.load(Relaxed),
            reads: counters.reads.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            refused_guesses: counters.refused_guesses.load(Relaxed),
            p50_us: counters.latency.quantile_us(0.5),
            p99_us: counters.latency.quantile_us(0.99),
            pushes: counters.pushes.load(Relaxed),
            pushed_pages: counters.pushed_pages.load(Relaxed),
            damaged: self.shared.damage(),
        }
    }

    /// Takes the file system away. Who has the file mapped keeps the pages that the kernel has cached
    /// of it, and gets SIGBUS for every other, at once.
    pub fn stop(&self) {
        if self.life.stopping.swap(true, Relaxed) {
            return;
        }
        self.shared.stopped.store(true, Relaxed);
        let ended = self.life.has_ended(Duration::ZERO);
        if ended {
            self.mounted.clear();
        }
        let ends = ended || self.mounted.leave();
        self.life.wake();
        if self.life.has_ended(if ends { PATIENCE } else { Duration::ZERO }) {
            for thread in self.lock_threads().drain(..) {
                // They catch nothing and own nothing that others wait for.
                let _ = thread.join();
            }
        }
        // Else it cannot be ended by us as long as somebody has the file open: its threads stay so
        // long, and refuse everything.
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Life {
    /// Whether the kernel asks no more; waits for that so long.
    fn has_ended(&self, time: Duration) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(ended, time, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn wake(&self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Says so when somebody else takes the file system away.
    fn watch(&self, shared: &Shared, mounted: &Mounted) {
        let Ok(table) = std::fs::File::open("/proc/self/mountinfo") else { return };
        loop {
            let ended = self.has_ended(Duration::ZERO);
            if self.stopping.load(Relaxed) {
                return;
            }
            if ended || !mounted.is_there() {
                shared.engine.report(&format!(
                    "somebody unmounted {}: {} cannot be opened any more{}",
                    mounted.directory().display(),
                    shared.path.display(),
                    if ended { "" } else { "; who has it open is served on" },
                ));
                if ended {
                    mounted.clear();
                }
                return;
            }
            let mut watched =
                [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(&table, PollFlags::PRI)];
            // An error (EINTR) is an early look, nothing else.
            let _ = poll(&mut watched, None);
        }
    }
}

/// Where pages go that are fetched ahead: into the kernel's cache of the file.
#[derive(Debug)]
struct Pushed(Weak<Shared>);

impl Sink for Pushed {
    fn put(&self, run: Run) -> Taken {
        self.0.upgrade().map_or(Taken::Over, |shared| shared.push(run))
    }

    fn is_over(&self) -> bool {
        self.0.upgrade().is_none_or(|shared| shared.stopped.load(Relaxed))
    }
}

fn check_name(name: &str) -> Result<()> {
    match name {
        "" | "." | ".." => {}
        name if name.len() > 255 || name.contains(['/', '\0']) => {}
        _ => return Ok(()),
    }
    Err(Error::usage(format!("{name:?} is no name of a file"), "such as memory"))
}

/// The file to pass through, and why it is that one; or why there is none.
fn candidate(
    options: &Options,
    template: &Template,
) -> Result<std::result::Result<(OwnedFd, String), String>> {
    let complete = || {
        let counted = template.statistics();
        counted.present_pages + counted.zero_pages == counted.pages
            && template.cache().protection() == Protection::ReadOnlyMount
    };
    let found = if options.passthrough == Passthrough::Never {
        Err("asked for".to_owned())
    } else if options.mode & 0o222 != 0 {
        let why = "a client that may open for writing would write the very file".to_owned();
        if options.passthrough == Passthrough::Always {
            return Err(Error::usage(why, "give a mode without write bits: 444"));
        }
        Err(why)
    } else if template.recording() {
        Err("what is passed through cannot be recorded".to_owned())
    } else if let Some(source) = template.mappable() {
        readonly_view(source)
            .map(|file| (file, "the source is a local file".to_owned()))
            .map_err(|error| format!("the source cannot be made safe to pass on: {error}"))
    } else if complete() {
        template
            .cache()
            .readonly()
            .try_clone_to_owned()
            .map(|file| (file, "the template is complete".to_owned()))
            .map_err(|error| error.to_string())
    } else {
        Err("pages have to be fetched".to_owned())
    };
    Ok(found)
}
