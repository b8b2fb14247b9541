//! A server: one template, one engine, and the ways in. What `pagekitd` and the Python face both are.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::client::shim::{plan, Listener, Plan};
use crate::delivery::Delivery;
pub use crate::door::Address;
use crate::engine::{self, Engine};
use crate::error::{Error, Result};
use crate::template::{self, Template};

/// The ways in: how clients get at the template. One at least.
#[derive(Debug, Clone, Default)]
pub struct Ways {
    /// Where programs attach that preload the shim.
    pub shim: Option<Address>,
    /// How they get the memory: `auto`, `share`, `copy` or `plain`; empty is `auto`.
    pub backend: String,
}

impl Ways {
    /// The shim's socket alone.
    pub fn shim(address: impl Into<Address>, backend: &str) -> Ways {
        Ways { shim: Some(address.into()), backend: backend.to_owned() }
    }
}

/// A server that runs. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    // Dropped in this order: the clients learn that it is over before nobody serves them.
    shim: Option<(Listener, Plan, String)>,
    engine: Arc<Engine>,
    template: Arc<Template>,
}

/// What a server counts.
#[derive(Debug, serde::Serialize)]
pub struct Statistics {
    /// How programs with the shim get the memory: `plain`, `share` or `copy`.
    pub backend: Option<&'static str>,
    /// Why so.
    pub reason: Option<String>,
    /// Fetches of the template.
    pub fetches: u64,
    /// Bytes that they brought.
    pub bytes_read: u64,
    /// Targets, faults, outcomes.
    #[serde(flatten)]
    pub engine: engine::Statistics,
    /// The template's own.
    pub template: template::Statistics,
}

impl Server {
    /// Serves `template` in these ways.
    ///
    /// # Errors
    /// `Usage` (no way in, unknown backend), `Permission` (no userfaultfd for a served one),
    /// `AddressInUse`, `Kernel`, and what loading the template brings where that is needed.
    pub fn start(template: Arc<Template>, delivery: Arc<Delivery>, ways: Ways) -> Result<Server> {
        if ways.shim.is_none() {
            return Err(Error::usage("there is no way in", "give a socket"));
        }
        let engine = Arc::new(Engine::start()?);
        let mut server =
            Server { shim: None, engine: Arc::clone(&engine), template: Arc::clone(&template) };
        if let Some(address) = ways.shim {
            let backend = if ways.backend.is_empty() { "auto" } else { &ways.backend };
            let (plan, reason) = plan(&template, &delivery, backend)?;
            let listener = Listener::start(address, engine, template, delivery, plan)?;
            server.shim = Some((listener, plan, reason));
        }
        Ok(server)
    }

    /// How programs with the shim get the memory, and why.
    pub fn backend(&self) -> Option<(&'static str, &str)> {
        self.shim.as_ref().map(|(_, plan, reason)| (plan.backend(), &**reason))
    }

    /// Where programs with the shim attach.
    pub fn socket(&self) -> Option<&Path> {
        self.shim.as_ref().map(|(listener, ..)| listener.path())
    }

    /// The template.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// Waits until no target lives, or the time is over; says whether none does.
    pub fn wait_idle(&self, time: Duration) -> bool {
        self.engine.wait_idle(time)
    }

    /// Counters, now.
    pub fn statistics(&self) -> Statistics {
        let template = self.template.statistics();
        Statistics {
            backend: self.backend().map(|(backend, _)| backend),
            reason: self.backend().map(|(_, reason)| reason.to_owned()),
            fetches: template.fetches,
            bytes_read: template.bytes_read,
            engine: self.engine.statistics(),
            template,
        }
    }

    /// Tells the clients that it is over, and ends the threads. Targets that still run end
    /// themselves with a message.
    pub fn stop(&self) {
        if let Some((listener, ..)) = &self.shim {
            listener.stop();
        }
        self.engine.stop();
    }
}
