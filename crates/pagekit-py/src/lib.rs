//! `pagekit._core`: the engine for Python. Registration and conversion only.
//!
//! Every call that can wait gives up the GIL; the engine's threads never take it.

mod map;
mod relay;
mod uffd;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pagekit::delivery::Delivery;
use pagekit::error::Error;
use pagekit::process::Ours;
use pagekit::template::replay;
use pagekit::{server, template, working_set};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Userfaultfd as this process has it, found out once.
fn delivery() -> Arc<Delivery> {
    static DELIVERY: OnceLock<Arc<Delivery>> = OnceLock::new();
    Arc::clone(DELIVERY.get_or_init(|| Arc::new(Delivery::probe())))
}

/// An error as the exception of `pagekit.errors` that stands for it.
fn raised(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Usage { .. } => "UsageError",
        Error::Unsupported { .. } => "Unsupported",
        Error::Permission { .. } => "PermissionDenied",
        Error::Kernel { .. } => "KernelError",
        Error::Missing { .. } => "Missing",
        Error::Unavailable { .. } => "Unavailable",
        Error::Callback { .. } => "CallbackError",
        Error::Timeout { .. } => "SourceTimeout",
        Error::Integrity { .. } => "IntegrityError",
        Error::AddressInUse { .. } => "AddressInUse",
    };
    let build = || -> PyResult<PyErr> {
        let class = py.import("pagekit.errors")?.getattr(class)?;
        let arguments = pyo3::types::PyDict::new(py);
        arguments.set_item("hint", error.hint())?;
        let mut cause = None;
        if let Error::Callback { message, traceback, pickled } = error {
            arguments.set_item("traceback", traceback)?;
            if !traceback.is_empty() {
                let original = py.import("pagekit.callback")?.getattr("original")?;
                cause = Some(original.call1((PyBytes::new(py, pickled), message))?);
            }
        }
        let raised = PyErr::from_value(class.call((error.to_string(),), Some(&arguments))?);
        raised.set_cause(py, cause.map(PyErr::from_value));
        Ok(raised)
    };
    build().unwrap_or_else(|failure| failure)
}

/// Callbacks run in the Python that we run in, and find the modules that can be found here.
fn use_this_interpreter(py: Python<'_>) -> PyResult<()> {
    let sys = py.import("sys")?;
    // None, or empty, where Python is part of another program.
    let executable: Option<PathBuf> = sys.getattr("executable")?.extract()?;
    if let Some(executable) = executable.filter(|path| !path.as_os_str().is_empty()) {
        // A path with strange entries is passed on without them: who needs none must not fail.
        let entries: Vec<Bound<'_, PyAny>> = sys.getattr("path")?.extract()?;
        let path = entries.iter().filter_map(|entry| entry.extract().ok()).collect();
        pagekit::stack::set_interpreter(executable, path);
    }
    Ok(())
}

fn closed() -> PyErr {
    PyValueError::new_err("it is closed")
}

/// Something that can be closed, and works in the process that made it only: a child of a fork has
/// neither its threads nor its memory.
struct Open<T>(Ours<Mutex<Option<Arc<T>>>>);

impl<T> Open<T> {
    fn new(value: Arc<T>) -> Open<T> {
        Open(Ours::new(Mutex::new(Some(value))))
    }

    fn get(&self) -> PyResult<Arc<T>> {
        let here = self.0.get().map_err(|error| Python::attach(|py| raised(py, &error)))?;
        here.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)
    }

    /// Takes it away, in the process that made it.
    fn close(&self) -> Option<Arc<T>> {
        self.0.get().ok()?.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[pyclass(frozen, module = "pagekit._core")]
struct Template(Open<template::Template>);

impl Template {
    fn get(&self) -> PyResult<Arc<template::Template>> {
        self.0.get()
    }
}

#[pymethods]
impl Template {
    #[new]
    fn new(py: Python<'_>, spec: &str, layers: Vec<String>, deadline: f64) -> PyResult<Template> {
        let deadline = Duration::try_from_secs_f64(deadline)
            .map_err(|error| PyValueError::new_err(format!("deadline: {error}")))?;
        use_this_interpreter(py)?;
        let opened = py.detach(|| template::Template::open(spec, &layers, &delivery(), deadline));
        let template = opened.map_err(|error| raised(py, &error))?;
        Ok(Template(Open::new(template)))
    }

    fn size(&self) -> PyResult<u64> {
        Ok(self.get()?.size())
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let template = self.get()?;
        let fits = offset.checked_add(length as u64).is_some_and(|end| end <= template.size());
        // Checked before a buffer of that length is made.
        let mut buffer = vec![0; if fits { length } else { 0 }];
        let outcome = py.detach(|| match fits {
            true => template.read(offset, &mut buffer),
            false => template.read(u64::MAX, &mut [0]),
        });
        outcome.map_err(|error| raised(py, &error))?;
        Ok(PyBytes::new(py, &buffer))
    }

    fn load(&self, py: Python<'_>, request: u64, parallel: Option<usize>) -> PyResult<()> {
        let template = self.get()?;
        py.detach(|| template.load(request, parallel)).map_err(|error| raised(py, &error))
    }

    fn audit(&self, py: Python<'_>) -> PyResult<()> {
        let template = self.get()?;
        py.detach(|| template.audit()).map_err(|error| raised(py, &error))
    }

    fn statistics(&self) -> PyResult<String> {
        Ok(serde_json::to_string(&self.get()?.statistics()).unwrap_or_default())
    }

    fn record(&self, py: Python<'_>) -> PyResult<Recording> {
        let template = self.get()?;
        let recorder = py.detach(|| template.record()).map_err(|error| raised(py, &error))?;
        Ok(Recording { template: Open::new(template), recorder })
    }

    fn check(&self, py: Python<'_>, set: &WorkingSet) -> PyResult<()> {
        let template = self.get()?;
        let check = || set.0.check(template.identity()?, template.whole().pages);
        py.detach(check).map_err(|error| raised(py, &error))
    }

    fn replay(
        &self,
        py: Python<'_>,
        set: &WorkingSet,
        rest: bool,
        rate: Option<u64>,
        parallel: Option<usize>,
    ) -> PyResult<Replay> {
        let template = self.get()?;
        let options = replay::Options { rest, rate, parallel };
        let replay = py.detach(|| template.replay(&set.0, options));
        replay.map(|replay| Replay(Open::new(replay))).map_err(|error| raised(py, &error))
    }

    fn close(&self, py: Python<'_>) {
        let template = self.0.close();
        py.detach(|| {
            if let Some(replay) = template.as_ref().and_then(|template| template.current_replay()) {
                replay.cancel();
            }
            drop(template);
        });
    }
}

/// Runs as (first page, pages), phase by phase.
type Phases = Vec<Vec<(u64, u64)>>;

#[pyclass(frozen, module = "pagekit._core")]
struct WorkingSet(working_set::WorkingSet);

#[pymethods]
impl WorkingSet {
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<WorkingSet> {
        let set = py.detach(|| working_set::WorkingSet::load(&path));
        set.map(WorkingSet).map_err(|error| raised(py, &error))
    }

    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.save(&path)).map_err(|error| raised(py, &error))
    }

    fn union(&self, py: Python<'_>, other: &WorkingSet) -> PyResult<WorkingSet> {
        self.0.union(&other.0).map(WorkingSet).map_err(|error| raised(py, &error))
    }

    fn equals(&self, other: &WorkingSet) -> bool {
        self.0 == other.0
    }

    /// Identity, recordings, critical pages, pages.
    fn described(&self) -> (String, u32, u64, u64) {
        let set = &self.0;
        (set.identity().to_string(), set.recordings(), set.critical_pages(), set.pages())
    }

    /// Critical phases, and others.
    fn phases(&self) -> (Phases, Phases) {
        let plain = |phases: &[Vec<pagekit::page::Run>]| {
            let runs = phases.iter().map(|runs| runs.iter().map(|run| (run.start, run.pages)));
            runs.map(Iterator::collect).collect()
        };
        (plain(self.0.critical()), plain(self.0.rest()))
    }
}

#[pyclass(frozen, module = "pagekit._core")]
struct Recording {
    template: Open<template::Template>,
    recorder: Arc<working_set::Recorder>,
}

#[pymethods]
impl Recording {
    fn ready(&self) {
        self.recorder.ready();
    }

    fn stop(&self) -> PyResult<()> {
        self.template.get()?.stop_recording();
        Ok(())
    }

    fn working_set(&self, settle: Option<f64>, time: Option<f64>) -> PyResult<WorkingSet> {
        let duration = |seconds| {
            Duration::try_from_secs_f64(seconds)
                .map_err(|error| PyValueError::new_err(error.to_string()))
        };
        let until = match (settle, time) {
            (Some(settle), _) => working_set::Until::Settled(duration(settle)?),
            (None, Some(time)) => working_set::Until::Time(duration(time)?),
            (None, None) => working_set::Until::TheEnd,
        };
        Ok(WorkingSet(self.recorder.working_set(until)))
    }
}

#[pyclass(frozen, module = "pagekit._core")]
struct Replay(Open<replay::Replay>);

#[pymethods]
impl Replay {
    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let time = Duration::try_from_secs_f64(seconds)
            .map_err(|error| PyValueError::new_err(format!("timeout: {error}")))?;
        let replay = self.0.get()?;
        py.detach(|| replay.wait(time)).map_err(|error| raised(py, &error))
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let replay = self.0.get()?;
        py.detach(|| replay.cancel());
        Ok(())
    }

    fn statistics(&self) -> PyResult<String> {
        Ok(serde_json::to_string(&self.0.get()?.statistics()).unwrap_or_default())
    }
}

/// A dictionary of what [`server::Ways`] has.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Ways {
    socket: Option<PathBuf>,
    firecracker: Vec<PathBuf>,
    backend: String,
    owner: Option<(u32, Option<u32>)>,
    mode: u32,
    allow: Vec<u32>,
    mount: Option<MountPoint>,
    relay: Option<PathBuf>,
    broadcast: String,
}

/// A dictionary of what [`server::mount::Options`] has.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct MountPoint {
    directory: PathBuf,
    name: String,
    mode: u32,
    passthrough: String,
    readahead: u64,
}

impl MountPoint {
    fn options(
        self,
        owner: Option<(u32, Option<u32>)>,
    ) -> pagekit::error::Result<server::mount::Options> {
        let MountPoint { directory, name, mode, passthrough, readahead } = self;
        let passthrough = passthrough.parse()?;
        Ok(server::mount::Options { directory, name, owner, mode, passthrough, readahead })
    }
}

#[pyclass(frozen, module = "pagekit._core")]
struct Server(Open<server::Server>);

impl Server {
    fn get(&self) -> PyResult<Arc<server::Server>> {
        self.0.get()
    }
}

#[pymethods]
impl Server {
    #[new]
    fn new(py: Python<'_>, template: &Template, ways: Ways) -> PyResult<Server> {
        let template = template.get()?;
        let Ways { socket, firecracker, backend, owner, mode, allow, mount, relay, broadcast } =
            ways;
        let broadcast = broadcast.parse().map_err(|error| raised(py, &error))?;
        let mount = mount.map(|mount| mount.options(owner)).transpose();
        let mount = mount.map_err(|error| raised(py, &error))?;
        let address = |path| server::Address { path, owner, mode, allow: allow.clone() };
        let ways = server::Ways {
            shim: socket.map(address),
            firecracker: firecracker.into_iter().map(address).collect(),
            mount,
            relay: relay.map(address),
            backend,
            broadcast,
        };
        let server = py
            .detach(|| server::Server::start(template, delivery(), ways))
            .map_err(|error| raised(py, &error))?;
        Ok(Server(Open::new(Arc::new(server))))
    }

    fn backend(&self) -> PyResult<Option<(&'static str, String)>> {
        let server = self.get()?;
        Ok(server.backend().map(|(backend, reason)| (backend, reason.to_owned())))
    }

    /// The file, and `cached` or `passthrough`.
    fn mount(&self) -> PyResult<Option<(PathBuf, &'static str)>> {
        let server = self.get()?;
        Ok(server.mount().map(|mount| (mount.path().to_owned(), mount.plan().0)))
    }

    fn statistics(&self) -> PyResult<String> {
        Ok(serde_json::to_string(&self.get()?.statistics()).unwrap_or_default())
    }

    fn regions(&self, py: Python<'_>, target: u64) -> PyResult<Option<Vec<server::Piece>>> {
        let server = self.get()?;
        Ok(py.detach(|| server.regions(target)))
    }

    fn wait_idle(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let time = Duration::try_from_secs_f64(seconds)
            .map_err(|error| PyValueError::new_err(format!("timeout: {error}")))?;
        let server = self.get()?;
        Ok(py.detach(|| server.wait_idle(time)))
    }

    fn close(&self, py: Python<'_>) {
        let server = self.0.close();
        py.detach(|| {
            if let Some(server) = server {
                server.stop();
            }
        });
    }
}

/// What userfaultfd can do here: (way or None, feature names, fork events, reason, hint).
#[pyfunction]
fn probe() -> (Option<&'static str>, Vec<String>, bool, Option<String>, Option<String>) {
    let delivery = Delivery::probe();
    let refusal = delivery.check().err();
    (
        delivery.way(),
        delivery.features().names(),
        delivery.fork_events(),
        refusal.as_ref().map(ToString::to_string),
        refusal.as_ref().and_then(|error| error.hint().map(str::to_owned)),
    )
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Template>()?;
    module.add_class::<Server>()?;
    module.add_class::<WorkingSet>()?;
    module.add_class::<Recording>()?;
    module.add_class::<Replay>()?;
    module.add_class::<map::Map>()?;
    module.add_class::<relay::Relay>()?;
    module.add_function(wrap_pyfunction!(probe, module)?)?;
    uffd::add_to(module)?;
    Ok(())
}
