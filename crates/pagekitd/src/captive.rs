//! `--run CMD`: a command that is served, and that the server lives and dies with.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use pagekit::error::{Error, Result};

use crate::options::Options;
use crate::recording::Recording;
use crate::signals::{unblock_all, Signals};

/// A sparse file of the template's size, for the command to map; removed when dropped.
struct Stub(PathBuf);

impl Stub {
    fn create(path: PathBuf, size: u64) -> io::Result<Stub> {
        File::options().write(true).create_new(true).open(&path)?.set_len(size)?;
        Ok(Stub(path))
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // Somebody removed it before us: that is what we wanted.
        let _ = fs::remove_file(&self.0);
    }
}

/// The command that attaches a program by hand.
pub fn how_to_attach(options: &Options, socket: &Path) -> String {
    format!(
        "truncate -s SIZE stub; LD_PRELOAD={} PAGEKIT_FILE=stub PAGEKIT_SOCKET={} ./program stub",
        shim(options).display(),
        socket.display()
    )
}

/// Runs the command to its end, with a file of `size` bytes to map, and gives its status. Signals are
/// passed on to it, but for the one that is meant for a recording.
pub fn run(
    options: &Options,
    size: u64,
    socket: &Path,
    signals: &Signals,
    recording: Option<&Recording>,
) -> Result<ExitCode> {
    let failed = |what: &str, error| Error::Kernel { what: what.to_owned(), error };
    let mut path = socket.as_os_str().to_owned();
    path.push(".stub");
    let stub = Stub::create(path.into(), size)
        .map_err(|error| failed("cannot make the file for the command to map", error))?;
    let mut child = start(options, socket, &stub.0)?;
    loop {
        match signals.wait() {
            libc::SIGCHLD => {
                let status = child
                    .try_wait()
                    .map_err(|error| failed("cannot wait for the command", error))?;
                if let Some(status) = status {
                    // As a shell says it: 128 and the signal.
                    let code = status.code().or(status.signal().map(|signal| 128 + signal));
                    return Ok(ExitCode::from(code.unwrap_or(1) as u8));
                }
            }
            libc::SIGUSR1 if recording.is_some() => {
                recording.into_iter().for_each(Recording::ready);
            }
            // SAFETY: kill(2) with the pid of a child that was not waited for yet.
            signal => unsafe {
                libc::kill(child.id() as i32, signal);
            },
        }
    }
}

fn start(options: &Options, socket: &Path, stub: &Path) -> Result<Child> {
    let (program, arguments) = options
        .command
        .split_first()
        .ok_or(Error::Usage { message: "--run needs a command".to_owned(), hint: String::new() })?;
    let name = stub.to_string_lossy();
    let mut command = Command::new(program);
    for argument in arguments {
        match argument.to_str() {
            Some(text) => command.arg(text.replace("{file}", &name)),
            None => command.arg(argument),
        };
    }
    command
        .env("LD_PRELOAD", shim(options))
        .env("PAGEKIT_FILE", stub)
        .env("PAGEKIT_SOCKET", socket)
        .env("PAGEKIT_OWNER", std::process::id().to_string());
    // SAFETY: only calls that are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            unblock_all();
            Ok(())
        })
    };
    command.spawn().map_err(|error| Error::Missing {
        what: format!("cannot run {}", program.to_string_lossy()),
        error,
    })
}

/// The shim: named, or beside this program.
fn shim(options: &Options) -> PathBuf {
    let beside = || {
        let program = std::env::current_exe().ok()?;
        Some(program.with_file_name("libpagekit_shim.so"))
    };
    options.shim.clone().or_else(beside).unwrap_or_else(|| PathBuf::from("libpagekit_shim.so"))
}
