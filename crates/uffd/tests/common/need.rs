//! What a test needs of the machine, and what happens where it is not there: the test is skipped, and
//! says on standard error which need and why. With PAGEKIT_STRICT=1 it fails instead, unless it is a
//! feature that came with a later kernel than the one that runs: what a kernel has must not go untested
//! unnoticed.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{flock, FlockOperation};
use uffd::{Feature, State, Support};

pub fn support() -> &'static Support {
    static SUPPORT: OnceLock<Support> = OnceLock::new();
    SUPPORT.get_or_init(Support::probe)
}

/// Says that something is not tested, and why.
pub fn skip(need: &str, why: &str) {
    let strict = std::env::var_os("PAGEKIT_STRICT").is_some_and(|value| value == "1");
    assert!(!strict, "{need} is needed here: {why}");
    say(need, why);
}

fn say(need: &str, why: &str) {
    let thread = std::thread::current();
    let test = match thread.name() {
        // One test at a time: the harness names it.
        None | Some("main") => String::new(),
        Some(name) => format!("{name}: "),
    };
    // Not by eprintln!, which shows nothing of a test that passes; and in one piece.
    let _ = std::io::stderr().write_all(format!("skipped: {test}{need}: {why}\n").as_bytes());
}

/// Whether a feature of the table is there; says so if it is not.
#[must_use]
pub fn need(name: &str) -> bool {
    let (feature, state) = support()
        .rows()
        .iter()
        .find(|(feature, _)| feature.name == name)
        .unwrap_or_else(|| panic!("{name} is not in the table"));
    match state {
        State::Have => return true,
        State::Forbidden => {
            skip(name, &format!("this process may not; it needs {}", feature.needs))
        }
        State::Lacking if running() >= number(feature.since) => {
            skip(
                name,
                &format!("Linux has it since {}, this kernel was built without", feature.since),
            );
        }
        State::Lacking => say(name, &format!("since Linux {}", feature.since)),
    }
    false
}

/// Whether a feature is there, for tests of what happens without.
pub fn lacking(name: &str) -> bool {
    assert!(Feature::named(name).is_some(), "{name} is not in the table");
    !support().has(name)
}

/// Whether the kernel is so new, for mistakes of older ones that no feature tells of; says so if not.
#[must_use]
pub fn need_kernel(since: (u32, u32), what: &str) -> bool {
    let there = running() >= since;
    if !there {
        say(what, &format!("right since Linux {}.{}", since.0, since.1));
    }
    there
}

/// The kernel's release, major and minor.
pub fn running() -> (u32, u32) {
    number(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap())
}

fn number(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse());
    let mut next = || parts.next().and_then(Result::ok).unwrap_or(0);
    (next(), next())
}

/// Whether this process is root; says so if it is not.
#[must_use]
pub fn need_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip("root", "to become other users, or to set kernel knobs");
    }
    root
}

/// Huge pages, taken for as long as this lives. The kernel has one pool for all: whoever has pages of it
/// locks the knob itself, and the pool is as it was before when the last of this process is dropped,
/// which a panic does too. Within a process many can have some at once.
#[derive(Debug)]
pub struct Pool {
    pages: usize,
}

const KNOB: &str = "/proc/sys/vm/nr_hugepages";

/// What children of other tests may keep for a moment after it was given back.
const SPARE: usize = 8;

#[derive(Debug)]
struct Held {
    /// The knob, locked, and what it was.
    knob: Option<(File, usize)>,
    /// Of all users together.
    pages: usize,
}

static HELD: Mutex<Held> = Mutex::new(Held { knob: None, pages: 0 });

impl Pool {
    /// So many pages of the default size, 2 MiB; none, with the reason printed, where it cannot be had.
    pub fn of(pages: usize) -> Option<Pool> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = held.take(pages);
        drop(held);
        match taken {
            Ok(()) => Some(Pool { pages }),
            Err(why) => {
                skip("huge pages", &why);
                None
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.pages);
    }
}

impl Held {
    fn take(&mut self, pages: usize) -> Result<(), String> {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let size = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
        if size.map(str::trim) != Some("2048 kB") {
            return Err("this kernel has none, or of another size".to_owned());
        }
        let explained = |error: std::io::Error| format!("{KNOB}: {error} (it takes root)");
        if self.knob.is_none() {
            let knob = File::options().read(true).write(true).open(KNOB).map_err(explained)?;
            flock(knob.as_fd(), FlockOperation::LockExclusive).map_err(|e| explained(e.into()))?;
            self.knob = Some((knob, value().map_err(explained)?));
        }
        self.pages += pages;
        let outcome = self.set().map_err(explained).and_then(|enough| match enough {
            true => Ok(()),
            false => Err(format!("the kernel has no {} of them left", self.pages)),
        });
        if outcome.is_err() {
            self.give_back(pages);
        }
        outcome
    }

    /// Sets the knob to what is wanted, and says whether the kernel has it.
    fn set(&self) -> std::io::Result<bool> {
        let before = self.knob.as_ref().map_or(0, |(_, before)| *before);
        let wanted = before + self.pages + if self.pages > 0 { SPARE } else { 0 };
        std::fs::write(KNOB, wanted.to_string())?;
        if value()? < wanted {
            // Perhaps there is memory enough, in too small pieces.
            let _ = std::fs::write("/proc/sys/vm/compact_memory", "1");
            std::fs::write(KNOB, wanted.to_string())?;
        }
        Ok(value()? >= wanted)
    }

    /// Pages that are still in use leave the pool when they are free.
    fn give_back(&mut self, pages: usize) {
        self.pages -= pages;
        let _ = self.set();
        if self.pages == 0 {
            self.knob = None;
        }
    }
}

fn value() -> std::io::Result<usize> {
    Ok(std::fs::read_to_string(KNOB)?.trim().parse().unwrap_or(0))
}
