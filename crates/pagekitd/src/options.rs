//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;
use pagekit::error::{Error, Result};
use pagekit::server::{mount, Address, Policy, Ways};
use pagekit::stack;
use pagekit::template::replay;
use pagekit::working_set::Until;

const HELP: &str = "\
Serve a template's memory, page by page, to VMMs and other programs.

Usage: pagekitd SPEC [ways in] [options] [--run CMD [ARG…]]

SPEC is where the pages come from: file:PATH, zero:SIZE, or python:MODULE:FUNCTION:SIZE, whose
pages are what FUNCTION(offset, length) returns in a helper process (a Python that has pagekit:
python3, or what PAGEKIT_PYTHON names; ,timeout=60s behind it gives a call more time than 30s).

Ways in, one at least:
  --socket PATH     where programs attach that preload the shim
  --firecracker PATH  where Firecracker connects, any number of them (repeatable: one for each, if
                    they must not meet). Pages are copied into each: to share them take --mount

  --mount DIR       a file in this directory, for any program to map privately; of it:
  --mount-name NAME its name (default memory)
  --mount-mode OCTAL  its mode (default 400). Who may write can open it for writing, as QEMU before
                    8.2 does, and spoil it for the others; 600 is for those
  --passthrough WHEN  auto, never, always: let the kernel serve it from a local file by itself
  --readahead SIZE  what the kernel reads around a touched page (default 128K)

Second handlers (programs that answer for a part of the memory, and hear of every event):
  --relay PATH      where they connect. What they claim waits for them, up to the deadline

Who may come in (only this user, unless):
  --owner UID[:GID] give sockets and file to the user (and group) that the programs run as
  --mode OCTAL      mode of the sockets (default 600)
  --allow UID       of those who can connect, let in only these users (repeatable)

Working sets, so that pages are there before they are asked for:
  --record FILE     record the pages demanded; united with FILE if that is there. Saved at the end,
                    and at SIGUSR1, which also says that the sandbox is ready
  --ready WHEN      what is demanded later is not critical: settle=TIME (after a pause that long;
                    default settle=500ms), time=TIME (after the first demand), exit
  --working-set FILE  fetch the critical pages of FILE ahead
  --rest            and the others, into the template only
  --rate RATE       so many bytes a second at most: 100MB/s
  --broadcast WHAT  put a page that one demanded into its siblings, too, where each has copies: off
                    (default), working-set (pages of FILE, critical or not), all

Options:
  --layer LAYER     wrap the source, outermost first: pass, stats, delay=2ms, fail=3 (repeatable)
  --backend NAME    how programs with the shim get the memory: auto (default), share, copy, plain
  --deadline TIME   give a page up when its fetch still fails after this time (default 5s)
  --json            print one JSON object when ready and one with statistics at the end
  --shim PATH       the preloaded library, for --run
  --run CMD…        run CMD with the shim and end with it; {file} in its arguments is the file to map
  --help            this text
  --version         the version

Examples:
  pagekitd file:memory --socket /run/pk.sock
  pagekitd file:memory --firecracker /run/fc.sock --owner 1000 --working-set memory.pkws
  pagekitd file:memory --layer delay=2ms,1GB/s,16 --mount /run/pk
  pagekitd file:memory --socket pk.sock --record memory.pkws
  pagekitd file:memory --layer stats --socket pk.sock --run ./program {file}
";

/// What the command line asks for.
#[derive(Debug)]
pub enum Asked {
    /// To serve.
    Serve(Box<Options>),
    /// To print something.
    Text(String),
}

/// How to serve.
#[derive(Debug)]
pub struct Options {
    pub spec: String,
    pub layers: Vec<String>,
    pub socket: Option<PathBuf>,
    pub firecracker: Vec<PathBuf>,
    pub mount: Option<PathBuf>,
    pub relay: Option<PathBuf>,
    /// The mount's own options; its directory is in `mount`.
    pub mounted: mount::Options,
    pub owner: Option<(u32, Option<u32>)>,
    pub mode: u32,
    pub allow: Vec<u32>,
    pub record: Option<PathBuf>,
    pub ready: Until,
    pub working_set: Option<PathBuf>,
    pub replay: replay::Options,
    pub backend: String,
    pub broadcast: Policy,
    pub deadline: Duration,
    pub json: bool,
    pub shim: Option<PathBuf>,
    pub command: Vec<OsString>,
}

impl Options {
    /// The ways in.
    pub fn ways(&self) -> Ways {
        let address = |path: &PathBuf| Address {
            path: path.clone(),
            owner: self.owner,
            mode: self.mode,
            allow: self.allow.clone(),
        };
        Ways {
            shim: self.socket.as_ref().map(address),
            firecracker: self.firecracker.iter().map(address).collect(),
            mount: self.mount.as_ref().map(|directory| mount::Options {
                directory: directory.clone(),
                owner: self.owner,
                ..self.mounted.clone()
            }),
            relay: self.relay.as_ref().map(address),
            backend: self.backend.clone(),
            broadcast: self.broadcast,
        }
    }
}

/// Reads the command line.
pub fn read() -> Result<Asked> {
    parse(lexopt::Parser::from_env()).map_err(|message| Error::Usage {
        message,
        hint: "pagekitd --help explains every option".to_owned(),
    })
}

fn parse(mut parser: lexopt::Parser) -> Result<Asked, String> {
    let mut spec = None;
    let mut options = Options {
        spec: String::new(),
        layers: Vec::new(),
        socket: None,
        firecracker: Vec::new(),
        mount: None,
        relay: None,
        mounted: mount::Options { mode: 0o400, ..mount::Options::from("") },
        owner: None,
        mode: 0o600,
        allow: Vec::new(),
        record: None,
        ready: Until::Settled(Duration::from_millis(500)),
        working_set: None,
        replay: replay::Options::default(),
        backend: "auto".to_owned(),
        broadcast: Policy::Off,
        deadline: Duration::from_secs(5),
        json: false,
        shim: None,
        command: Vec::new(),
    };
    let text = |error: lexopt::Error| error.to_string();
    while let Some(argument) = parser.next().map_err(text)? {
        let string =
            |parser: &mut lexopt::Parser| parser.value().map_err(text)?.string().map_err(text);
        match argument {
            Long("help") | Short('h') => return Ok(Asked::Text(HELP.to_owned())),
            Long("version") => {
                return Ok(Asked::Text(format!("pagekitd {}\n", env!("CARGO_PKG_VERSION"))))
            }
            Long("socket") => options.socket = Some(parser.value().map_err(text)?.into()),
            Long("firecracker") => options.firecracker.push(parser.value().map_err(text)?.into()),
            Long("owner") => {
                let value = string(&mut parser)?;
                let known = owner(&value);
                options.owner =
                    Some(known.ok_or(format!("{value:?} is no owner: 1000 or 1000:1000"))?);
            }
            Long("mode") => {
                let value = string(&mut parser)?;
                options.mode = mode(&value)?;
            }
            Long("mount") => options.mount = Some(parser.value().map_err(text)?.into()),
            Long("relay") => options.relay = Some(parser.value().map_err(text)?.into()),
            Long("mount-name") => options.mounted.name = string(&mut parser)?,
            Long("mount-mode") => {
                let value = string(&mut parser)?;
                options.mounted.mode = mode(&value)?;
            }
            Long("passthrough") => {
                let value = string(&mut parser)?;
                options.mounted.passthrough =
                    value.parse().map_err(|error: Error| error.to_string())?;
            }
            Long("readahead") => {
                let value = string(&mut parser)?;
                let bytes = stack::size(&value).filter(|bytes| *bytes <= 1 << 30);
                options.mounted.readahead = bytes.ok_or(format!("{value:?} is no size: 128K"))?;
            }
            Long("allow") => {
                let value = string(&mut parser)?;
                options.allow.push(value.parse().map_err(|_| format!("{value:?} is no user id"))?);
            }
            Long("record") => options.record = Some(parser.value().map_err(text)?.into()),
            Long("ready") => {
                let value = string(&mut parser)?;
                let until = ready(&value);
                options.ready = until
                    .ok_or(format!("{value:?} is no moment: settle=500ms, time=10s or exit"))?;
            }
            Long("working-set") => options.working_set = Some(parser.value().map_err(text)?.into()),
            Long("rest") => options.replay.rest = true,
            Long("rate") => {
                let value = string(&mut parser)?;
                let rate = stack::rate(&value);
                options.replay.rate = Some(rate.ok_or(format!("{value:?} is no rate: 100MB/s"))?);
            }
            Long("layer") => options.layers.push(string(&mut parser)?),
            Long("backend") => options.backend = string(&mut parser)?,
            Long("broadcast") => {
                let value = string(&mut parser)?;
                options.broadcast = value.parse().map_err(|error: Error| error.to_string())?;
            }
            Long("json") => options.json = true,
            Long("shim") => options.shim = Some(parser.value().map_err(text)?.into()),
            Long("deadline") => {
                let value = string(&mut parser)?;
                options.deadline =
                    stack::time(&value).ok_or(format!("{value:?} is no time: 5s"))?;
            }
            Long("run") => {
                options.command = parser.raw_args().map_err(text)?.collect();
                if options.command.is_empty() {
                    return Err("--run needs a command".to_owned());
                }
            }
            Value(value) if spec.is_none() => spec = Some(value.string().map_err(text)?),
            other => return Err(other.unexpected().to_string()),
        }
    }
    options.spec = spec.ok_or("SPEC is missing: where do the pages come from?")?;
    if options.socket.is_none() && options.firecracker.is_empty() && options.mount.is_none() {
        return Err("there is no way in: give --socket, --firecracker or --mount".to_owned());
    }
    if !options.command.is_empty() && options.socket.is_none() {
        return Err("--run needs --socket, where the command attaches".to_owned());
    }
    Ok(Asked::Serve(Box::new(options)))
}

/// Octal permissions.
fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or(format!("{text:?} is no mode: 660"))
}

/// `settle=TIME`, `time=TIME` or `exit`.
fn ready(text: &str) -> Option<Until> {
    match text.split_once('=') {
        Some(("settle", time)) => stack::time(time).map(Until::Settled),
        Some(("time", time)) => stack::time(time).map(Until::Time),
        None if text == "exit" => Some(Until::TheEnd),
        _ => None,
    }
}

/// `UID` or `UID:GID`, in numbers.
fn owner(text: &str) -> Option<(u32, Option<u32>)> {
    match text.split_once(':') {
        Some((user, group)) => Some((user.parse().ok()?, Some(group.parse().ok()?))),
        None => Some((text.parse().ok()?, None)),
    }
}
