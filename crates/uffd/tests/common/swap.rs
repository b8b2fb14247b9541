//! Swap space, and a memory limit that makes the kernel use it. Both are gone when what made them is
//! dropped, which a panic does too.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file that the kernel swaps to.
#[derive(Debug)]
pub struct Swap(PathBuf);

impl Swap {
    /// So many bytes of swap space.
    ///
    /// # Errors
    /// Why there can be none: it takes root, and a file system that can be swapped to.
    pub fn on(bytes: usize) -> Result<Swap, String> {
        const PAGE: usize = 4096;
        let name = format!("pagekit-swap-{}-{:?}", std::process::id(), std::thread::current().id());
        let swap = Swap(std::env::temp_dir().join(name));
        // What mkswap(8) writes: from byte 1024 on the version, the number of the last page, and how many
        // are bad; at the end of the page what it is.
        let mut head = vec![0; PAGE];
        head[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        head[1028..1032].copy_from_slice(&((bytes / PAGE - 1) as u32).to_ne_bytes());
        head[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        let write = || -> io::Result<()> {
            let mut file =
                File::options().write(true).create_new(true).mode(0o600).open(&swap.0)?;
            file.write_all(&head)?;
            // Without holes: the kernel swaps to its blocks.
            file.write_all(&vec![0; bytes - PAGE])?;
            file.sync_all()
        };
        write().map_err(|error| format!("{}: {error}", swap.0.display()))?;
        let path = swap.path();
        // SAFETY: a path that ends with zero.
        match unsafe { libc::swapon(path.as_ptr().cast(), 0) } {
            0 => Ok(swap),
            _ => Err(format!("swapon {}: {}", swap.0.display(), io::Error::last_os_error())),
        }
    }

    fn path(&self) -> Vec<u8> {
        [self.0.as_os_str().as_bytes(), b"\0"].concat()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let path = self.path();
        // SAFETY: a path that ends with zero. It fails if it was never switched on.
        unsafe { libc::swapoff(path.as_ptr().cast()) };
        let _ = fs::remove_file(&self.0);
    }
}

/// A control group with a memory limit.
#[derive(Debug)]
pub struct Limit(PathBuf);

impl Limit {
    /// Of either version of control groups, whichever has the memory here.
    ///
    /// # Errors
    /// Why there can be none.
    pub fn of(bytes: usize) -> Result<Limit, String> {
        let (root, knob) = match Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        let limit = Limit(Path::new(root).join(format!("pagekit-test-{}", std::process::id())));
        let failed = |error: io::Error| format!("{}: {error}", limit.0.display());
        fs::create_dir(&limit.0).map_err(failed)?;
        fs::write(limit.0.join(knob), bytes.to_string()).map_err(failed)?;
        Ok(limit)
    }

    /// Runs a test of this program once more, alone, in the group; `under_limit` tells it so.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, test: &str) {
        let group = self.0.join("cgroup.procs");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(UNDER_LIMIT, "1");
        // SAFETY: it opens and writes a file; nothing is held by another thread that it would need.
        unsafe { command.pre_exec(move || fs::write(&group, "0")) };
        assert!(command.status().unwrap().success(), "{test} failed under the limit");
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // Its process has ended, and what it has left goes to the parent group.
        let _ = fs::remove_dir(&self.0);
    }
}

const UNDER_LIMIT: &str = "PAGEKIT_TEST_UNDER_LIMIT";

/// Whether this is the process that [`Limit::run`] started.
pub fn under_limit() -> bool {
    std::env::var_os(UNDER_LIMIT).is_some()
}

/// Bytes of this process's own memory that are swapped out.
pub fn swapped_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSwap:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Bytes of all swap spaces that are used.
pub fn used_bytes() -> usize {
    let text = fs::read_to_string("/proc/swaps").unwrap();
    let used = |line: &str| line.split_whitespace().nth(3)?.parse::<usize>().ok();
    text.lines().skip(1).filter_map(used).sum::<usize>() * 1024
}
