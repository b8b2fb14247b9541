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
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    // Not by eprintln!, which shows nothing of a test that passes.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {need}: {why}");
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

#[derive(Debug, Default)]
struct Held {
    users: usize,
    lock: Option<File>,
}

static HELD: Mutex<Held> = Mutex::new(Held { users: 0, lock: None });

impl Pool {
    /// So many pages of the default size, 2 MiB; none, with the reason printed, where it cannot be had.
    pub fn of(pages: usize) -> Option<Pool> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        match Pool::take(&mut held, pages) {
            Ok(()) => {
                held.users += 1;
                Some(Pool { pages })
            }
            Err(why) => {
                if held.users == 0 {
                    held.lock = None;
                }
                drop(held);
                skip("huge pages", &why);
                None
            }
        }
    }

    fn take(held: &mut Held, pages: usize) -> Result<(), String> {
        if meminfo("Hugepagesize:") != super::HUGE / 1024 {
            return Err("this kernel has none, or of another size".to_owned());
        }
        if held.lock.is_none() {
            let file = File::options().read(true).write(true).open(KNOB);
            let file = file.map_err(|error| format!("{KNOB}: {error} (it takes root)"))?;
            flock(file.as_fd(), FlockOperation::LockExclusive)
                .map_err(|error| error.to_string())?;
            held.lock = Some(file);
        }
        change(pages as isize).map_err(|error| format!("{KNOB}: {error} (it takes root)"))?;
        if meminfo("HugePages_Free:").saturating_sub(meminfo("HugePages_Rsvd:")) < pages {
            let _ = change(-(pages as isize));
            return Err(format!("the kernel has no {pages} of them left"));
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        // Pages that are still in use leave the pool when they are free.
        let _ = change(-(self.pages as isize));
        held.users -= 1;
        if held.users == 0 {
            held.lock = None;
        }
    }
}

fn change(by: isize) -> std::io::Result<()> {
    let now: usize = std::fs::read_to_string(KNOB)?.trim().parse().unwrap_or(0);
    std::fs::write(KNOB, now.saturating_add_signed(by).to_string())
}

fn meminfo(name: &str) -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}
