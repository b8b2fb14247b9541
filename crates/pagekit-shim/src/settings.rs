//! The variables of the environment, read once when the library is loaded.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use pagekit::wire::shim::Wish;

/// What the environment asks for.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) file: PathBuf,
    identity: (u64, u64),
    pub(crate) supply: Supply,
}

/// Where the memory comes from.
#[derive(Debug)]
pub(crate) enum Supply {
    Server { socket: PathBuf, wish: Wish },
    Plain { memory: PathBuf },
}

static SETTINGS: OnceLock<Option<Settings>> = OnceLock::new();

/// None before the library is initialised, and where the environment asks for nothing.
pub(crate) fn get() -> Option<&'static Settings> {
    SETTINGS.get()?.as_ref()
}

impl Settings {
    /// Whether `descriptor` is one of the file.
    pub(crate) fn is_file(&self, descriptor: BorrowedFd<'_>) -> bool {
        rustix::fs::fstat(descriptor).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity)
    }
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

pub(crate) fn read() {
    SETTINGS.get_or_init(|| match from_environment() {
        Ok(settings) => settings,
        // Going on would give the program the stub's zeros.
        Err(text) => crate::end(&text),
    });
    if let Some(owner) = variable("PAGEKIT_OWNER") {
        match owner.to_str().and_then(|text| text.parse().ok()) {
            Some(owner) => crate::watch::owner(owner),
            None => {
                crate::end(&format!("PAGEKIT_OWNER={} is no process id", owner.to_string_lossy()))
            }
        }
    }
}

fn from_environment() -> Result<Option<Settings>, String> {
    let Some(file) = variable("PAGEKIT_FILE").map(PathBuf::from) else { return Ok(None) };
    let Ok(stat) = rustix::fs::stat(&file) else {
        // Gone: a later program of the same environment, which cannot map it either.
        return Ok(None);
    };
    let supply = match (variable("PAGEKIT_SOCKET"), variable("PAGEKIT_PLAIN")) {
        (Some(socket), None) => {
            let wish = match variable("PAGEKIT_BACKEND").as_ref().and_then(|name| name.to_str()) {
                None | Some("auto") => Wish::Auto,
                Some("share") => Wish::Share,
                Some("copy") => Wish::Copy,
                Some(other) => return Err(format!("PAGEKIT_BACKEND={other}: auto, share or copy")),
            };
            Supply::Server { socket: socket.into(), wish }
        }
        (None, Some(memory)) => Supply::Plain { memory: memory.into() },
        _ => return Err("set either PAGEKIT_SOCKET or PAGEKIT_PLAIN with PAGEKIT_FILE".to_owned()),
    };
    Ok(Some(Settings { file, identity: (stat.st_dev, stat.st_ino), supply }))
}
