//! The server as a program. `pagekit serve` runs it; it needs no Python.
//!
//! Data goes to stdout (one JSON object a line, with `--json`), everything else to stderr. With
//! `--run CMD…` it lives and dies with CMD: exits with CMD's status, and CMD is ended with it.

mod captive;
mod options;
mod recording;
mod signals;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pagekit::delivery::Delivery;
use pagekit::error::{Error, Result};
use pagekit::server::mount::Mount;
use pagekit::server::Server;
use pagekit::template::Template;
use pagekit::working_set::WorkingSet;

use options::{Asked, Options};
use recording::Recording;
use signals::Signals;

fn main() -> ExitCode {
    let options = match options::read() {
        Ok(Asked::Serve(options)) => options,
        Ok(Asked::Text(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&error),
    };
    match serve(&options) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    if let Some(hint) = error.hint() {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(error.exit_code())
}

fn serve(options: &Options) -> Result<ExitCode> {
    // Before any thread starts, so that signals reach nobody but us.
    let signals = signals::Signals::block();
    let delivery = Arc::new(Delivery::probe());
    let template = Template::open(&options.spec, &options.layers, &delivery, options.deadline)?;
    let recording = options.record.clone();
    let recording =
        recording.map(|path| Recording::begin(&template, path, options.ready)).transpose()?;
    if let Some(path) = &options.working_set {
        template.replay(&WorkingSet::load(path)?, options.replay)?;
    }
    let server = Server::start(template, delivery, options.ways())?;
    announce(options, &server);
    let code = match (&options.socket, options.command.is_empty()) {
        (Some(socket), false) => {
            let size = server.template().size();
            captive::run(options, size, socket, &signals, recording.as_ref())?
        }
        _ => {
            wait_for_end(&signals, recording.as_ref());
            ExitCode::SUCCESS
        }
    };
    if !options.command.is_empty() {
        // Its exit reaches the engine by another way than it reached us.
        server.wait_idle(Duration::from_secs(1));
    }
    let left = server.statistics().engine.targets.len();
    if left > 0 {
        eprintln!("pagekit: {left} targets were still attached; they end now");
    }
    if let Err(error) = server.template().audit() {
        eprintln!("error: {error}");
    }
    let saved = recording.map_or(Ok(()), |recording| recording.save());
    let statistics = server.statistics();
    server.stop();
    if options.json {
        println!("{}", serde_json::to_string(&statistics).unwrap_or_default());
    } else {
        eprintln!(
            "pagekit: {} targets, {} faults, {} fetches, {} KiB read",
            statistics.engine.targets_ever,
            statistics.engine.demand_faults,
            statistics.fetches,
            statistics.bytes_read >> 10
        );
    }
    saved.map(|()| code)
}

/// Says where clients come in.
fn announce(options: &Options, server: &Server) {
    if let (Some(socket), Some((backend, reason))) = (server.socket(), server.backend()) {
        eprintln!("pagekit: serving {} at {}", options.spec, socket.display());
        eprintln!("pagekit: backend {backend}: {reason}");
    }
    for socket in server.firecracker() {
        eprintln!("pagekit: serving {} to Firecracker at {}", options.spec, socket.display());
    }
    if let Some(socket) = server.relay() {
        eprintln!("pagekit: second handlers connect to {}", socket.display());
    }
    if let Some(mount) = server.mount() {
        let (plan, reason) = mount.plan();
        eprintln!("pagekit: {} is {}: {plan}: {reason}", mount.path().display(), options.spec);
    }
    if options.json {
        let (backend, reason) = server.backend().unzip();
        let ready = serde_json::json!({
            "ready": true, "socket": server.socket(), "firecracker": server.firecracker(),
            "mount": server.mount().map(Mount::path), "relay": server.relay(), "backend": backend, "reason": reason,
            "size": server.template().size(),
        });
        println!("{ready}");
    } else if let (true, Some(socket)) = (options.command.is_empty(), server.socket()) {
        eprintln!("hint: {}", captive::how_to_attach(options, socket));
    }
}

/// Waits for SIGINT or SIGTERM.
fn wait_for_end(signals: &Signals, recording: Option<&Recording>) {
    loop {
        match (signals.wait(), recording) {
            (libc::SIGINT | libc::SIGTERM, _) => return,
            (libc::SIGUSR1, Some(recording)) => recording.ready(),
            _ => {}
        }
    }
}
