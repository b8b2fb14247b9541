//! A server: one template, one engine, one socket. What `pagekitd` and the Python face both are.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use crate::client::shim::Address;
use crate::client::shim::{plan, Listener, Plan};
use crate::delivery::Delivery;
use crate::engine::{self, Engine};
use crate::error::Result;
use crate::template::{self, Template};

/// A server that runs. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    // Dropped in this order: the clients learn that it is over before nobody serves them.
    listener: Listener,
    engine: Arc<Engine>,
    template: Arc<Template>,
    plan: Plan,
    reason: String,
}

/// What a server counts.
#[derive(Debug, serde::Serialize)]
pub struct Statistics {
    /// How clients get the memory: `plain`, `share` or `copy`.
    pub backend: &'static str,
    /// Why so.
    pub reason: String,
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
    /// Serves `template` at `socket` (a path, or an [`Address`]); `backend` is `auto`, `share`, `copy` or `plain`.
    ///
    /// # Errors
    /// `Usage` (unknown backend), `Permission` (no userfaultfd for a served one), `AddressInUse`,
    /// `Kernel`, and what loading the template brings where that is needed.
    pub fn start(
        template: Arc<Template>,
        delivery: Arc<Delivery>,
        socket: impl Into<Address>,
        backend: &str,
    ) -> Result<Server> {
        let (plan, reason) = plan(&template, &delivery, backend)?;
        let engine = Arc::new(Engine::start()?);
        let listener =
            Listener::start(socket, Arc::clone(&engine), Arc::clone(&template), delivery, plan)?;
        Ok(Server { listener, engine, template, plan, reason })
    }

    /// How clients get the memory, and why.
    pub fn backend(&self) -> (&'static str, &str) {
        (self.plan.backend(), &self.reason)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        self.listener.path()
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
            backend: self.plan.backend(),
            reason: self.reason.clone(),
            fetches: template.fetches,
            bytes_read: template.bytes_read,
            engine: self.engine.statistics(),
            template,
        }
    }

    /// Tells the clients that it is over, and ends the threads. Targets that still run end
    /// themselves with a message.
    pub fn stop(&self) {
        self.listener.stop();
        self.engine.stop();
    }
}
