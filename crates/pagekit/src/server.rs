//! A server: one template, one engine, and the ways in. What `pagekitd` and the Python face both are.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::client::firecracker;
pub use crate::client::mount;
use crate::client::mount::Mount;
use crate::client::shim::{plan, Listener, Plan};
use crate::delivery::Delivery;
pub use crate::door::Address;
pub use crate::engine::broadcast::Policy;
use crate::engine::{self, Engine, Target};
pub use crate::engine::{Piece, TargetId};
use crate::error::{Error, Result};
use crate::page::Run;
use crate::relay;
use crate::template::replay::{Sink, Taken};
use crate::template::{self, Template};

/// The ways in: how clients get at the template. One at least.
#[derive(Debug, Clone, Default)]
pub struct Ways {
    /// Where programs attach that preload the shim.
    pub shim: Option<Address>,
    /// Where VMMs connect that hand over a userfaultfd of theirs.
    pub firecracker: Vec<Address>,
    /// Where the memory is mounted as a file.
    pub mount: Option<mount::Options>,
    /// Where second handlers connect: no way in, but beside one.
    pub relay: Option<Address>,
    /// How programs with the shim get the memory: `auto`, `share`, `copy` or `plain`; empty is
    /// `auto`.
    pub backend: String,
    /// What is put into all that get copies when one of them demands it.
    pub broadcast: Policy,
}

impl Ways {
    /// The shim's socket alone.
    pub fn shim(address: impl Into<Address>, backend: &str) -> Ways {
        Ways { shim: Some(address.into()), backend: backend.to_owned(), ..Ways::default() }
    }
}

/// A target that gets what is fetched ahead.
#[derive(Debug)]
struct Filled {
    engine: Weak<Engine>,
    target: Weak<Target>,
}

impl Sink for Filled {
    fn put(&self, run: Run) -> Taken {
        match (self.engine.upgrade(), self.target.upgrade()) {
            (Some(engine), Some(target)) => match engine.install_ahead(&target, run).rest.pages {
                0 => Taken::All,
                _ => Taken::NotYet,
            },
            _ => Taken::Over,
        }
    }

    fn is_over(&self) -> bool {
        self.target.strong_count() == 0
    }
}

/// A server that runs. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    // Dropped in this order: the clients learn that it is over before nobody serves them.
    shim: Option<(Listener, Plan, String)>,
    firecracker: Option<firecracker::Listener>,
    mount: Option<Mount>,
    relay: Option<relay::Listener>,
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
    /// The VMMs that came to the sockets for them, if there are any.
    pub firecracker: Option<firecracker::Clients>,
    /// The mount, if there is one.
    pub mount: Option<mount::Statistics>,
    /// The second handlers, if they can come.
    pub relay: Option<relay::Statistics>,
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
        if ways.shim.is_none() && ways.firecracker.is_empty() && ways.mount.is_none() {
            return Err(Error::usage("there is no way in", "give a socket or a mount point"));
        }
        let engine = Arc::new(Engine::start()?);
        engine.broadcast(ways.broadcast);
        let (filler, filled) = (Arc::downgrade(&engine), Arc::downgrade(&template));
        engine.on_target(move |target| {
            if let (true, Some(template)) = (target.can_be_filled(), filled.upgrade()) {
                let (engine, target) = (Weak::clone(&filler), Arc::downgrade(target));
                template.add_sink(Arc::new(Filled { engine, target }));
            }
        });
        let mut server = Server {
            shim: None,
            firecracker: None,
            mount: None,
            relay: None,
            engine: Arc::clone(&engine),
            template: Arc::clone(&template),
        };
        if let Some(address) = ways.relay {
            let served =
                relay::Served { pages: template.whole().pages, deadline: template.deadline() };
            server.relay = Some(relay::Listener::start(address, Arc::clone(&engine), served)?);
        }
        if !ways.firecracker.is_empty() {
            let (engine, template) = (Arc::clone(&engine), Arc::clone(&template));
            let listener = firecracker::Listener::start(ways.firecracker, engine, template)?;
            server.firecracker = Some(listener);
        }
        if let Some(options) = ways.mount {
            let (engine, template) = (Arc::clone(&engine), Arc::clone(&template));
            server.mount = Some(Mount::start(options, engine, template)?);
        }
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

    /// Where VMMs connect that hand over a userfaultfd of theirs.
    pub fn firecracker(&self) -> Vec<&Path> {
        self.firecracker.iter().flat_map(firecracker::Listener::paths).collect()
    }

    /// Where second handlers connect.
    pub fn relay(&self) -> Option<&Path> {
        self.relay.as_ref().map(relay::Listener::path)
    }

    /// The memory as a file.
    pub fn mount(&self) -> Option<&Mount> {
        self.mount.as_ref()
    }

    /// The engine that serves them.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The template.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// What belongs where in a living target, as its events told so far.
    pub fn regions(&self, target: TargetId) -> Option<Vec<Piece>> {
        self.engine.regions(target)
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
            firecracker: self.firecracker.as_ref().map(firecracker::Listener::clients),
            mount: self.mount.as_ref().map(Mount::statistics),
            relay: self.relay.as_ref().map(relay::Listener::statistics),
            engine: self.engine.statistics(),
            template,
        }
    }

    /// Tells the clients that it is over, and ends the threads. Targets that still run end
    /// themselves with a message, VMMs that handed over a userfaultfd are killed.
    pub fn stop(&self) {
        if let Some((listener, ..)) = &self.shim {
            listener.stop();
        }
        if let Some(listener) = &self.firecracker {
            listener.stop();
        }
        if let Some(mount) = &self.mount {
            mount.stop();
        }
        if let Some(relay) = &self.relay {
            relay.stop();
        }
        self.engine.stop();
    }
}
