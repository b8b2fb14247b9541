//! `python:MODULE:FUNCTION:SIZE[,timeout=TIME]`: pages that a Python function makes.
//!
//! `FUNCTION(offset, length)` gets multiples of the page size and returns exactly `length` bytes (any
//! object with a buffer), or None for zeros. It must give the same bytes for the same place, always.
//!
//! What is known, and what follows:
//! - A thread that touches an absent page of ours may hold the GIL, and sleeps with it. A callback in
//!   the same interpreter would wait for that GIL for ever. So it runs in a process of its own, the
//!   *helper*: a fresh interpreter that runs `pagekit.callback`. Nothing there can wait for us.
//! - `fork` runs the handlers of everybody in this process, and they may wait for a thread that waits
//!   for a page. `posix_spawn`, which the standard library takes as long as nothing is to be run in the
//!   child before exec, runs none. So what a helper needs beyond that it does for itself.
//! - A process can ask the kernel for a signal when its parent ends (PR_SET_PDEATHSIG), even while its
//!   callback never returns. But the parent is the *thread* that made it: so helpers are started by a
//!   thread of the source that lives as long as they do.
//! - Ctrl-C at a terminal reaches the whole foreground group, and whoever handles it may need pages to
//!   do so: the helper ignores SIGINT. It stays in the group, so that who kills that leaves nothing.
//!   Our threads block all signals, and so does what they start: none comes before it is ready.
//! - A process id may be somebody else's by the time it is used, wherever a program waits for all its
//!   children: the helper is signalled and waited for by a pidfd.
//! - A forked copy of our process has a copy of the socket: two who ask would get each other's
//!   answers. Only the process that opened the source may read it.
//!
//! The helper has one end of a socket pair as standard input. It says once what it has loaded, then
//! answers one request after another, and ends at end-of-file. Numbers are little-endian.
//!
//! | request | bytes | what |
//! |---|---|---|
//! | offset | 8 | of the first byte |
//! | length | 8 | bytes |
//!
//! | answer | bytes | what |
//! |---|---|---|
//! | kind | 8 | see below |
//! | length | 8 | of the body |
//! | body | length | by kind |
//!
//! | kind | body |
//! |---|---|
//! | 1 ready | the file of the module that was loaded; first answer, unasked |
//! | 2 refused | why the function cannot be had, UTF-8; first answer, unasked |
//! | 3 bytes | what was asked for, as long as that |
//! | 4 zeros | empty |
//! | 5 failed | 8 bytes length of a summary, 8 bytes length of a traceback, both in UTF-8, then the exception as pickled by Python, or nothing |
//!
//! One helper answers one request at a time: a callback need not be safe for threads, and one that
//! wants to use more processors, or wait for several things at once, knows best how.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{channel, sync_channel, Receiver, Sender, SyncSender};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{recv, send, RecvFlags, SendFlags};
use rustix::process::{pidfd_open, pidfd_send_signal, waitid};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::{Capabilities, Content, Identity, Source};
use crate::error::{Error, Result};
use crate::page::{Run, PAGE};
use crate::process::Ours;
use crate::thread;

/// How long a callback may take where nothing else is said.
pub const USUAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to start one, which a processor with much to do makes longer, too.
const LOADING: Duration = Duration::from_secs(30);

/// What a helper runs. The module path of this process, where it is known, follows the arguments that
/// `main` takes: so the helper finds what we would find, `pagekit` first of all.
const PROGRAM: &str = "import sys; sys.path[:] = sys.argv[3:] or sys.path; \
                       from pagekit.callback import main; main()";
/// The name of the thread that starts helpers.
const THREAD: &str = "pagekit-python";
/// Names of the callbacks that a helper, and those it was started by, serve.
const SERVING: &str = "PAGEKIT_CALLBACKS";
/// How long a helper has to end by itself: what its module does at exit.
const GRACE: Duration = Duration::from_secs(1);
/// A longer body than this is no answer.
const LONGEST: u64 = 1 << 30;

const READY: u64 = 1;
const REFUSED: u64 = 2;
const BYTES: u64 = 3;
const ZEROS: u64 = 4;
const FAILED: u64 = 5;

/// A Python, and where it looks for modules (its own usual places if empty).
#[derive(Debug, Clone)]
struct Interpreter {
    program: PathBuf,
    path: Vec<PathBuf>,
}

static INTERPRETER: RwLock<Option<Interpreter>> = RwLock::new(None);

/// Sources that are opened from now on run their callbacks in `program`, which looks for modules in
/// `path`. Where nobody says so it is what the environment calls `PAGEKIT_PYTHON`, else `python3`.
pub fn set_interpreter(program: PathBuf, path: Vec<PathBuf>) {
    // What is relative would be something else after a change of directory.
    let here = std::env::current_dir().unwrap_or_default();
    let path = path.into_iter().map(|entry| here.join(entry)).collect();
    *INTERPRETER.write().unwrap_or_else(PoisonError::into_inner) =
        Some(Interpreter { program, path });
}

fn interpreter() -> Interpreter {
    let set = INTERPRETER.read().unwrap_or_else(PoisonError::into_inner).clone();
    set.unwrap_or_else(|| {
        let program = std::env::var_os("PAGEKIT_PYTHON").unwrap_or_else(|| "python3".into());
        Interpreter { program: program.into(), path: Vec::new() }
    })
}

/// Pages that a Python function makes.
#[derive(Debug)]
pub struct Python {
    /// `MODULE:FUNCTION`
    function: String,
    size: u64,
    timeout: Duration,
    /// The file of the module, hashed.
    module: blake3::Hash,
    running: Ours<Running>,
    counters: Counters,
}

/// What a forked copy of our process has no part in.
#[derive(Debug)]
struct Running {
    // Dropped before the starter: the helper would not outlive its thread.
    state: Mutex<State>,
    starter: Starter,
}

#[derive(Debug)]
struct State {
    helper: Option<Helper>,
    /// Helpers that died since one answered.
    deaths: u32,
    /// Pages that ended a helper, or never came, when they were asked for alone. Their neighbours are
    /// asked for without them: else each of those would have to wait for them again.
    fatal: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    microseconds: AtomicU64,
    restarts: AtomicU64,
}

impl Python {
    /// Starts a helper, which loads `MODULE:FUNCTION`. `size` is a multiple of the page size
    /// ([`crate::stack`] checks it).
    ///
    /// # Errors
    /// `Usage`: there is no such function, no Python, or none that has pagekit; or this process is
    /// the helper of that very function. `Callback`: the module raises. `Timeout`: it does not load
    /// in time. `Kernel`: a thread or a process cannot be made.
    pub fn open(function: &str, size: u64, timeout: Duration) -> Result<Python> {
        let serving = std::env::var(SERVING).unwrap_or_default();
        if serving.split(' ').any(|served| served == function) {
            return Err(Error::usage(
                format!(
                    "callback {function} opens the source that it serves: it would wait for itself"
                ),
                "let it make its pages from something else",
            ));
        }
        let starter = Starter::new(function, &serving)?;
        let (helper, module) = first_words(starter.start()?, function, LOADING)?;
        let state = State { helper: Some(helper), deaths: 0, fatal: BTreeSet::new() };
        Ok(Python {
            function: function.to_owned(),
            size,
            timeout,
            module,
            running: Ours::new(Running { state: Mutex::new(state), starter }),
            counters: Counters::default(),
        })
    }

    /// Another helper in place of one that died.
    fn start_again(&self, starter: &Starter) -> Result<Helper> {
        self.counters.restarts.fetch_add(1, Relaxed);
        match first_words(starter.start()?, &self.function, LOADING) {
            Ok((helper, module)) if module == self.module => Ok(helper),
            Ok(_) => Err(Error::Integrity {
                message: format!(
                    "the module of callback {} was changed while it was served",
                    self.function
                ),
            }),
            // It was there at first: that is not for the one who opened it to mend.
            Err(Error::Usage { message, .. }) => Err(failed(message)),
            Err(error) => Err(error),
        }
    }
}

/// What a helper says when it has started.
fn first_words(
    helper: Helper,
    function: &str,
    timeout: Duration,
) -> Result<(Helper, blake3::Hash)> {
    match helper.answer(&mut [], Instant::now() + timeout) {
        Ok(Answer::Ready(module)) => Ok((helper, blake3::hash(&module))),
        Ok(Answer::Refused(why)) => Err(Error::usage(
            format!("python:{function}: {why}"),
            "name a function of a module that can be imported where this program runs, \
             as python:MODULE:FUNCTION:SIZE",
        )),
        Ok(Answer::Failed(failure)) => {
            Err(failure.of(&format!("the module of callback {function} cannot be loaded")))
        }
        Err(Trouble::Late) => {
            helper.kill();
            Err(Error::Timeout {
                message: format!("the module of callback {function} was not loaded in {timeout:?}"),
                hint: "what is slow must wait for the first call".to_owned(),
            })
        }
        Ok(Answer::Bytes | Answer::Zeros) | Err(Trouble::Dead) => Err(Error::usage(
            format!(
                "the helper process of callback {function} {} before it had loaded it",
                helper.death()
            ),
            "see what it wrote; it needs a Python that can import pagekit, and PAGEKIT_PYTHON names one",
        )),
    }
}

/// A failure of a callback that is no exception.
fn failed(message: String) -> Error {
    Error::Callback { message, traceback: String::new(), pickled: Vec::new() }
}

impl Source for Python {
    fn name(&self) -> String {
        format!("python:{}:{}", self.function, self.size)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { size: self.size, concurrency: 1, immediate: false }
    }

    fn identity(&self) -> Result<Identity> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.name().as_bytes()).update(self.module.as_bytes());
        Ok(Identity(hasher.finalize().into()))
    }

    fn zero_runs(&self) -> Result<Vec<Run>> {
        Ok(Vec::new())
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Content> {
        let run = Run::between(offset / PAGE, (offset + buffer.len() as u64) / PAGE);
        let what = || match run.pages {
            1 => format!("callback {} for page {}", self.function, run.start),
            _ => {
                format!("callback {} for pages {} to {}", self.function, run.start, run.end() - 1)
            }
        };
        let Running { state, starter } = self.running.get()?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = run.pages == 1;
        if let Some(page) = state.fatal.range(run.start..run.end()).next().filter(|_| !alone) {
            return Err(failed(format!("{}: page {page} must be asked for alone", what())));
        }
        let helper = match state.helper.take() {
            Some(helper) => helper,
            None => self.start_again(starter)?,
        };
        let asked = Instant::now();
        let answer = helper.ask(offset, buffer, asked + self.timeout);
        self.counters.calls.fetch_add(1, Relaxed);
        self.counters.microseconds.fetch_add(asked.elapsed().as_micros() as u64, Relaxed);
        let known_as_fatal = alone
            && match answer {
                Err(_) => !state.fatal.insert(run.start),
                Ok(_) => state.fatal.remove(&run.start),
            };
        let content = match answer {
            Ok(Answer::Bytes) => Ok(Content::Bytes),
            Ok(Answer::Zeros) => Ok(Content::Zero),
            Ok(Answer::Failed(failure)) => Err(failure.of(&what())),
            Err(Trouble::Late) => {
                helper.kill();
                return Err(Error::Timeout {
                    message: format!("{} did not return in {:?}", what(), self.timeout),
                    hint: "give it more time, as in python:MODULE:FUNCTION:SIZE,timeout=60s".into(),
                });
            }
            Ok(Answer::Ready(_) | Answer::Refused(_)) | Err(Trouble::Dead) => {
                let how = format!("its helper process {}", helper.death());
                state.deaths += 1;
                // Whoever ended it may have meant that one; the second time it is the callback's doing.
                return Err(match state.deaths {
                    1 if !known_as_fatal => {
                        Error::Unavailable { what: what(), error: io::Error::other(how) }
                    }
                    _ => failed(format!("{}: {how}, as did the one before", what())),
                });
            }
        };
        (state.helper, state.deaths) = (Some(helper), 0);
        content
    }

    fn try_read(&self, _offset: u64, _buffer: &mut [u8]) -> Result<Option<Content>> {
        Ok(None)
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        let Counters { calls, microseconds, restarts } = &self.counters;
        [("calls", calls), ("microseconds", microseconds), ("restarts", restarts)]
            .map(|(name, counter)| (format!("python.{name}"), counter.load(Relaxed)))
            .into()
    }
}

/// The thread that starts helpers, and that they do not outlive.
#[derive(Debug)]
struct Starter {
    program: PathBuf,
    wishes: Option<Sender<SyncSender<io::Result<Helper>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    fn new(function: &str, serving: &str) -> Result<Starter> {
        let Interpreter { program, path } = interpreter();
        let mut arguments: Vec<OsString> = vec!["-u".into(), "-c".into(), PROGRAM.into()];
        arguments.extend([function.into(), std::process::id().to_string().into()]);
        arguments.extend(path.into_iter().map(PathBuf::into_os_string));
        let serving = format!("{serving} {function}").trim_start().to_owned();
        let (wishes, wished) = channel();
        let named = program.clone();
        let thread = thread::spawn(THREAD, move || start(&named, &arguments, &serving, &wished))
            .map_err(|error| Error::kernel("cannot start a thread", error))?;
        Ok(Starter { program, wishes: Some(wishes), thread: Some(thread) })
    }

    fn start(&self) -> Result<Helper> {
        let (wish, granted) = sync_channel(1);
        let sent = self.wishes.as_ref().and_then(|wishes| wishes.send(wish).ok());
        let helper = sent.and_then(|()| granted.recv().ok());
        helper.unwrap_or_else(|| Err(io::ErrorKind::BrokenPipe.into())).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Error::usage(
                format!("cannot run callbacks in {}: {error}", self.program.display()),
                "install python3, or name a Python that has pagekit in PAGEKIT_PYTHON",
            ),
            _ => Error::kernel(format!("cannot run {}", self.program.display()), error),
        })
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.wishes = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: what it runs is below, and does not.
            let _ = thread.join();
        }
    }
}

/// The thread's life: a helper for each wish.
fn start(
    program: &Path,
    arguments: &[OsString],
    serving: &str,
    wished: &Receiver<SyncSender<io::Result<Helper>>>,
) {
    for wish in wished {
        // Who wished waits for it.
        let _ = wish.send(Helper::start(program, arguments, serving));
    }
}

/// A process that runs callbacks. It ends when this is dropped.
#[derive(Debug)]
struct Helper {
    socket: UnixStream,
    process: OwnedFd,
}

enum Answer {
    Ready(Vec<u8>),
    Refused(String),
    Bytes,
    Zeros,
    Failed(Failure),
}

/// An exception, or something else that a callback must not do.
struct Failure {
    summary: String,
    traceback: String,
    pickled: Vec<u8>,
}

/// Why there is no answer.
enum Trouble {
    Late,
    /// It ended, or what it sends makes no sense.
    Dead,
}

impl Failure {
    fn parse(body: &[u8]) -> Option<Failure> {
        let (summary, rest) = body.get(..8).zip(body.get(8..))?;
        let (traceback, rest) = rest.get(..8).zip(rest.get(8..))?;
        let number = |bytes: &[u8]| bytes.try_into().ok().map(u64::from_le_bytes);
        let (summary, rest) = rest.split_at_checked(usize::try_from(number(summary)?).ok()?)?;
        let (traceback, pickled) =
            rest.split_at_checked(usize::try_from(number(traceback)?).ok()?)?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Some(Failure {
            summary: text(summary),
            traceback: text(traceback),
            pickled: pickled.to_vec(),
        })
    }

    fn of(self, what: &str) -> Error {
        let Failure { summary, traceback, pickled } = self;
        Error::Callback { message: format!("{what}: {summary}"), traceback, pickled }
    }
}

impl Helper {
    /// Must be called by a thread that outlives it.
    fn start(program: &Path, arguments: &[OsString], serving: &str) -> io::Result<Helper> {
        let (socket, its) = UnixStream::pair()?;
        // What it prints must not get between what we print for programs to read.
        let output = match io::stderr().as_fd().try_clone_to_owned() {
            Ok(stderr) => Stdio::from(stderr),
            Err(_) => Stdio::null(),
        };
        let mut command = Command::new(program);
        command.args(arguments).env(SERVING, serving);
        command.stdin(Stdio::from(OwnedFd::from(its))).stdout(output);
        let mut child = command.spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(process) => Ok(Helper { socket, process }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    /// Asks for `buffer.len()` bytes at `offset`.
    fn ask(&self, offset: u64, buffer: &mut [u8], until: Instant) -> Result<Answer, Trouble> {
        let mut request = [0; 16];
        request[..8].copy_from_slice(&offset.to_le_bytes());
        request[8..].copy_from_slice(&(buffer.len() as u64).to_le_bytes());
        // Nothing else is on its way there, so it fits.
        match send(&self.socket, &request, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(16) => self.answer(buffer, until),
            _ => Err(Trouble::Dead),
        }
    }

    /// Waits for an answer; bytes must fill `buffer`.
    fn answer(&self, buffer: &mut [u8], until: Instant) -> Result<Answer, Trouble> {
        let mut header = [0; 16];
        self.receive(&mut header, until)?;
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let (kind, length) = (number(&header[..8]), number(&header[8..]));
        match kind {
            BYTES if length == buffer.len() as u64 => {
                self.receive(buffer, until)?;
                Ok(Answer::Bytes)
            }
            ZEROS if length == 0 => Ok(Answer::Zeros),
            READY | REFUSED | FAILED if length <= LONGEST => {
                let mut body = vec![0; length as usize];
                self.receive(&mut body, until)?;
                match kind {
                    READY => Ok(Answer::Ready(body)),
                    REFUSED => Ok(Answer::Refused(String::from_utf8_lossy(&body).into_owned())),
                    _ => Failure::parse(&body).map(Answer::Failed).ok_or(Trouble::Dead),
                }
            }
            _ => Err(Trouble::Dead),
        }
    }

    fn receive(&self, mut buffer: &mut [u8], until: Instant) -> Result<(), Trouble> {
        while !buffer.is_empty() {
            match recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Trouble::Dead),
                Ok((received, _)) => buffer = &mut std::mem::take(&mut buffer)[received..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !ready(&self.socket, until) => return Err(Trouble::Late),
                Err(Errno::AGAIN) => {}
                Err(_) => return Err(Trouble::Dead),
            }
        }
        Ok(())
    }

    fn kill(&self) {
        // It may be gone already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Ends it, and says how it ended: by our hand only if it would not by itself.
    fn death(&self) -> String {
        // Nothing comes from it any more, nor will anything go to it.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if !ready(&self.process, Instant::now() + GRACE) {
            self.kill();
        }
        match waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => format!("ended with status {status}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            },
            // Somebody else waits for all children of this process.
            _ => "ended".to_owned(),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.death();
    }
}

/// Waits until something can be read, or the end; false if it is `until` before.
fn ready(what: impl AsFd, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let time = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&what, PollFlags::IN)], time.as_ref()) {
            Ok(0) => return false,
            Err(Errno::INTR) => {}
            _ => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;
    use crate::source::conformance::{self, pattern};

    const MODULE: &str = "
import os, struct, time

CONTENT = struct.pack('<16384Q', *((n * 0x9E3779B97F4A7C15 & 2**64 - 1) | 1 for n in range(16384)))

def part(offset, length):
    return memoryview(CONTENT)[offset:offset + length]

def zeros(offset, length):
    return None

def number(offset, length):
    if offset == 4096:
        raise KeyError('one')
    if offset == 2 * 4096:
        return b'x' * (length - 1)
    if offset == 3 * 4096:
        time.sleep(3600)
    if offset == 4 * 4096:
        os._exit(3)
    if offset == 5 * 4096:
        for fd in range(3, 20):
            if os.path.realpath(f'/proc/self/fd/{fd}').find('socket') >= 0:
                os.write(fd, b'nonsense' * 2)
    if offset == 6 * 4096:
        os.kill(os.getpid(), 9)
    return struct.pack('<Q', os.getpid()) * (length // 8)
";

    /// The directory of modules, which the interpreter finds.
    fn modules() -> &'static Path {
        static MODULES: OnceLock<tempfile::TempDir> = OnceLock::new();
        let directory = MODULES.get_or_init(|| {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("made_here.py"), MODULE).unwrap();
            let print = "import sys; print(*sys.path[1:], sep='\\n')";
            let asked = Command::new("python3").args(["-c", print]).output().unwrap();
            let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python");
            let mut path = vec![ours, directory.path().to_owned()];
            path.extend(String::from_utf8(asked.stdout).unwrap().lines().map(PathBuf::from));
            set_interpreter("python3".into(), path);
            directory
        });
        directory.path()
    }

    fn open(function: &str, pages: u64, timeout: Duration) -> Result<Python> {
        modules();
        Python::open(function, pages * PAGE, timeout)
    }

    fn read(source: &Python, page: u64) -> Result<Vec<u8>> {
        let mut buffer = vec![0; PAGE as usize];
        source.read(page * PAGE, &mut buffer).map(|_| buffer)
    }

    #[test]
    fn conforms() {
        let source = open("made_here:part", 32, USUAL_TIMEOUT).unwrap();
        conformance::check(&source, &pattern(32));
        assert_eq!(source.name(), "python:made_here:part:131072");
        let source = open("made_here:zeros", 32, USUAL_TIMEOUT).unwrap();
        conformance::check(&source, &vec![0; 32 * PAGE as usize]);
    }

    #[test]
    fn what_it_is_depends_on_name_size_and_module() {
        let copy = modules().join("made_there.py");
        std::fs::write(&copy, format!("{MODULE}# another")).unwrap();
        let mut seen = std::collections::HashSet::new();
        for (function, pages) in [
            ("made_here:part", 4),
            ("made_here:part", 8),
            ("made_here:zeros", 4),
            ("made_there:part", 4),
        ] {
            let identity = || open(function, pages, USUAL_TIMEOUT).unwrap().identity().unwrap();
            assert_eq!(identity(), identity());
            assert!(seen.insert(identity()), "{function} {pages}");
        }
        let before = open("made_there:part", 4, USUAL_TIMEOUT).unwrap().identity().unwrap();
        std::fs::write(&copy, format!("{MODULE}# yet another")).unwrap();
        let after = open("made_there:part", 4, USUAL_TIMEOUT).unwrap().identity().unwrap();
        assert_ne!(before, after);
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_a_hint() {
        for (function, expected) in [
            ("no_such_module:f", "there is no module no_such_module"),
            ("made_here:nothing", "module made_here has no nothing"),
            ("made_here:part.more", "module made_here has no part.more"),
            ("made_here:CONTENT", "is a bytes, no function"),
        ] {
            let error = open(function, 4, USUAL_TIMEOUT).unwrap_err();
            assert!(matches!(error, Error::Usage { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn a_failure_leaves_the_helper_where_it_is() {
        let source = open("made_here:number", 16, USUAL_TIMEOUT).unwrap();
        let helper = read(&source, 0).unwrap();
        let Err(Error::Callback { message, traceback, pickled }) = read(&source, 1) else {
            panic!()
        };
        assert_eq!(message, "callback made_here:number for page 1: it raised KeyError('one')");
        assert!(traceback.contains("raise KeyError('one')") && !pickled.is_empty(), "{traceback}");
        let error = read(&source, 2).unwrap_err();
        assert!(error.to_string().contains("too few bytes: 4095 instead of 4096"), "{error}");
        assert!(!error.retryable());
        assert_eq!(read(&source, 0).unwrap(), helper);
    }

    #[test]
    fn one_that_hangs_is_ended_and_another_started() {
        let source = open("made_here:number", 16, Duration::from_secs(1)).unwrap();
        let helper = read(&source, 0).unwrap();
        let error = read(&source, 3).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(error.to_string().ends_with("for page 3 did not return in 1s"), "{error}");
        assert!(!error.retryable() && error.hint().is_some());
        let pid = u64::from_le_bytes(helper[..8].try_into().unwrap());
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it is gone, and no zombie");
        // Its neighbours need not wait for it again.
        let error = source.read(2 * PAGE, &mut vec![0; 4 * PAGE as usize]).unwrap_err();
        assert!(error.to_string().contains("page 3 must be asked for alone"), "{error}");
        assert_ne!(read(&source, 0).unwrap(), helper);
        assert_eq!(source.statistics()[2], ("python.restarts".to_owned(), 1));
    }

    #[test]
    fn one_that_dies_is_started_again_once() {
        let source = open("made_here:number", 16, USUAL_TIMEOUT).unwrap();
        let ways =
            [(4, "ended with status 3"), (5, "ended with status 0"), (6, "was killed by signal 9")];
        for (page, how) in ways {
            let error = read(&source, page).unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }) && error.retryable(), "{error}");
            assert!(error.to_string().contains(how), "{error}");
            let error = read(&source, page).unwrap_err();
            assert!(matches!(error, Error::Callback { .. }) && !error.retryable(), "{error}");
            assert!(error.to_string().contains("as did the one before"), "{error}");
            read(&source, 0).unwrap();
            // It is known by now.
            assert!(matches!(read(&source, page), Err(Error::Callback { .. })));
            read(&source, 0).unwrap();
        }
    }

    #[test]
    fn a_module_that_changes_while_it_is_served_is_an_error() {
        let path = modules().join("made_to_change.py");
        std::fs::write(&path, MODULE).unwrap();
        let source = open("made_to_change:number", 16, USUAL_TIMEOUT).unwrap();
        std::fs::write(&path, format!("{MODULE}# changed")).unwrap();
        read(&source, 0).unwrap();
        assert!(read(&source, 4).is_err());
        let error = read(&source, 0).unwrap_err();
        assert!(matches!(error, Error::Integrity { .. }), "{error}");
    }

    #[test]
    fn a_module_that_does_not_come_to_an_end() {
        let text = "import threading; threading.Event().wait()";
        std::fs::write(modules().join("made_to_hang.py"), text).unwrap();
        let starter = Starter::new("made_to_hang:function", "").unwrap();
        let helper = starter.start().unwrap();
        let short = Duration::from_millis(300);
        let error = first_words(helper, "made_to_hang:function", short).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }) && error.hint().is_some(), "{error}");
        assert!(error.to_string().contains("made_to_hang:function was not loaded in 300ms"));
    }

    #[test]
    fn no_handler_of_a_fork_runs_for_a_helper() {
        static RAN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
        extern "C" fn handler() {
            if std::thread::current().name() == Some(THREAD) {
                RAN.store(true, Relaxed);
            }
        }
        // SAFETY: a function that does next to nothing.
        unsafe { libc::pthread_atfork(Some(handler), None, None) };
        drop(open("made_here:number", 16, USUAL_TIMEOUT).unwrap());
        assert!(!RAN.load(Relaxed));
        let forking = thread::spawn(THREAD, || {
            // SAFETY: the child ends at once.
            unsafe {
                match libc::fork() {
                    0 => libc::_exit(0),
                    child => libc::waitpid(child, std::ptr::null_mut(), 0),
                }
            };
        });
        forking.unwrap().join().unwrap();
        assert!(RAN.load(Relaxed), "this would have been noticed");
    }

    #[test]
    fn it_ends_with_its_source() {
        let source = open("made_here:number", 16, USUAL_TIMEOUT).unwrap();
        let pid = u64::from_le_bytes(read(&source, 0).unwrap()[..8].try_into().unwrap());
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(source);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn failures_of_any_shape_are_read() {
        let length = |n: u64| n.to_le_bytes();
        let whole = [&length(1)[..], &length(3), b"stp"].concat();
        assert!(Failure::parse(&whole).is_none());
        let whole = [&length(1)[..], &length(1), b"stp"].concat();
        let failure = Failure::parse(&whole).unwrap();
        assert_eq!(
            (&*failure.summary, &*failure.traceback, &*failure.pickled),
            ("s", "t", &b"p"[..])
        );
        for cut in 0..18 {
            assert!(Failure::parse(&whole[..cut]).is_none(), "{cut}");
        }
        assert!(Failure::parse(&[0xFF; 32]).is_none());
    }
}
