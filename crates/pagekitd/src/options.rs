//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::*;
use pagekit::error::{Error, Result};
use pagekit::stack;

const HELP: &str = "\
Serve a template's memory, page by page, to processes that preload the pagekit shim.

Usage: pagekitd SPEC --socket PATH [options] [--run CMD [ARG…]]

SPEC is where the pages come from: file:PATH or zero:SIZE.

Options:
  --socket PATH     where programs attach; only this user can, unless:
  --owner UID[:GID] give the socket to the user (and group) that the programs run as
  --mode OCTAL      mode of the socket (default 600)
  --layer LAYER     wrap the source, outermost first: pass, stats, delay=2ms, fail=3 (repeatable)
  --backend NAME    auto (default), share, copy, plain
  --deadline TIME   give a page up when its fetch still fails after this time (default 5s)
  --json            print one JSON object when ready and one with statistics at the end
  --shim PATH       the preloaded library, for --run
  --run CMD…        run CMD with the shim and end with it; {file} in its arguments is the file to map
  --help            this text
  --version         the version

Examples:
  pagekitd file:memory --socket /run/pk.sock
  pagekitd file:memory --layer delay=2ms --socket pk.sock --run ./program {file}
";

/// What the command line asks for.
#[derive(Debug)]
pub enum Asked {
    /// To serve.
    Serve(Options),
    /// To print something.
    Text(String),
}

/// How to serve.
#[derive(Debug)]
pub struct Options {
    pub spec: String,
    pub layers: Vec<String>,
    pub socket: PathBuf,
    pub owner: Option<(u32, Option<u32>)>,
    pub mode: u32,
    pub backend: String,
    pub deadline: Duration,
    pub json: bool,
    pub shim: Option<PathBuf>,
    pub command: Vec<OsString>,
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
    let mut socket = None;
    let mut options = Options {
        spec: String::new(),
        layers: Vec::new(),
        socket: PathBuf::new(),
        owner: None,
        mode: 0o600,
        backend: "auto".to_owned(),
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
            Long("socket") => socket = Some(PathBuf::from(parser.value().map_err(text)?)),
            Long("owner") => {
                let value = string(&mut parser)?;
                let known = owner(&value);
                options.owner =
                    Some(known.ok_or(format!("{value:?} is no owner: 1000 or 1000:1000"))?);
            }
            Long("mode") => {
                let value = string(&mut parser)?;
                let mode = u32::from_str_radix(&value, 8).ok().filter(|mode| *mode <= 0o777);
                options.mode = mode.ok_or(format!("{value:?} is no mode: 660"))?;
            }
            Long("layer") => options.layers.push(string(&mut parser)?),
            Long("backend") => options.backend = string(&mut parser)?,
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
    options.socket = socket.ok_or("--socket is missing: where do programs attach?")?;
    Ok(Asked::Serve(options))
}

/// `UID` or `UID:GID`, in numbers.
fn owner(text: &str) -> Option<(u32, Option<u32>)> {
    match text.split_once(':') {
        Some((user, group)) => Some((user.parse().ok()?, Some(group.parse().ok()?))),
        None => Some((text.parse().ok()?, None)),
    }
}
