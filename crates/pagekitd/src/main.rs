//! The server as a program. `pagekit serve` runs it; it needs no Python.
//!
//! Data goes to stdout (one JSON object a line, with `--json`), everything else to stderr. With
//! `--run CMD…` it lives and dies with CMD: exits with CMD's status, and CMD is ended with it.

mod captive;
mod options;
mod signals;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pagekit::delivery::Delivery;
use pagekit::error::{Error, Result};
use pagekit::server::{Address, Server, Ways};
use pagekit::template::Template;

use options::{Asked, Options};

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
    let address = Address {
        path: options.socket.clone(),
        owner: options.owner,
        mode: options.mode,
        allow: vec![],
    };
    let server = Server::start(
        template,
        delivery,
        Ways { shim: Some(address), backend: options.backend.clone(), ..Ways::default() },
    )?;
    let (backend, reason) = server.backend().unwrap_or_default();
    eprintln!("pagekit: serving {} at {}", options.spec, options.socket.display());
    eprintln!("pagekit: backend {backend}: {reason}");
    if options.json {
        let ready = serde_json::json!({
            "ready": true, "socket": options.socket, "backend": backend, "reason": reason,
            "size": server.template().size(),
        });
        println!("{ready}");
    } else if options.command.is_empty() {
        eprintln!("hint: {}", captive::how_to_attach(options));
    }

    let code = match options.command.is_empty() {
        true => {
            signals.wait_for_end();
            ExitCode::SUCCESS
        }
        false => captive::run(options, &signals)?,
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
    Ok(code)
}
