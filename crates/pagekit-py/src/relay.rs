//! `pagekit._core.Relay`: the deputy's side of a relay. What it hears comes as tuples, which
//! `pagekit.relay` makes classes of.

use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use pagekit::page::{Run, PAGE};
use pagekit::relay::{Client, Failure, Heard, News};
use pagekit::wire::relay::{Answer, Claim, Why};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// What went wrong, as a tuple that begins with `refused`, or an exception.
fn refused<'py>(py: Python<'py>, failure: Failure) -> PyResult<Bound<'py, PyTuple>> {
    match failure {
        Failure::Refused(why) => ("refused", why).into_pyobject(py),
        other => Err(raised(other)),
    }
}

fn raised(failure: Failure) -> PyErr {
    match failure {
        Failure::System(error) => error.into(),
        Failure::Gone(target) => PyValueError::new_err(format!("target {target} has left")),
        other => PyOSError::new_err(other.to_string()),
    }
}

#[pyclass(frozen, module = "pagekit._core")]
pub struct Relay(Client);

#[pymethods]
impl Relay {
    /// A relay, or why the server does not want it.
    #[staticmethod]
    fn connect<'py>(
        py: Python<'py>,
        path: PathBuf,
        runs: Vec<(u64, u64)>,
        declined: bool,
        pid: u32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let runs = runs.into_iter().map(|(start, pages)| Run { start, pages }).collect();
        let claim = Claim { runs, declined, pid };
        match py.detach(|| Client::connect(&path, claim)) {
            Ok(client) => Ok(Relay(client).into_pyobject(py)?.into_any()),
            Err(failure) => Ok(refused(py, failure)?.into_any()),
        }
    }

    /// Bytes of the template, and seconds that an answer may take.
    fn told(&self) -> (u64, f64) {
        (self.0.pages() * PAGE, self.0.deadline().as_secs_f64())
    }

    /// What happens next, as a tuple that begins with its name: `nothing` in `seconds`, or the `end`.
    fn next<'py>(&self, py: Python<'py>, seconds: Option<f64>) -> PyResult<Bound<'py, PyTuple>> {
        let time = seconds
            .map(Duration::try_from_secs_f64)
            .transpose()
            .map_err(|error| PyValueError::new_err(format!("timeout: {error}")))?;
        let heard = loop {
            match py.detach(|| self.0.next(time)) {
                Ok(heard) => break heard,
                Err(Failure::Interrupted) => py.check_signals()?,
                Err(failure) => return refused(py, failure),
            }
        };
        let news = match heard {
            Heard::News(news) => news,
            Heard::Nothing => return ("nothing",).into_pyobject(py),
            Heard::End => return ("end",).into_pyobject(py),
        };
        match news {
            News::Joined(joined, regions) => {
                let regions: Vec<(u64, u64, Option<u64>)> = regions
                    .iter()
                    .map(|region| (region.start, region.bytes, region.page.map(|page| page * PAGE)))
                    .collect();
                let names = pagekit::relay::feature_names(joined.features);
                let head = (joined.target, joined.parent, joined.pid, joined.page_size);
                ("joined", head, names, joined.claims, regions).into_pyobject(py)
            }
            News::Fault { fault, target, address, page, why } => {
                let why = match why {
                    Why::Claimed => "claimed",
                    Why::Declined => "declined",
                    Why::Protected => "protected",
                };
                ("fault", fault, target, address, page * PAGE, why).into_pyobject(py)
            }
            News::Fork(target, child) => ("fork", target, child).into_pyobject(py),
            News::Remap(target, from, to, bytes) => {
                ("remap", target, from, to, bytes).into_pyobject(py)
            }
            News::Remove(target, start, end) => ("remove", target, start, end).into_pyobject(py),
            News::Unmap(target, start, end) => ("unmap", target, start, end).into_pyobject(py),
            News::Left(target) => ("left", target).into_pyobject(py),
        }
    }

    /// `done`, `zero`, `poison` or `decline`.
    fn answer(&self, py: Python<'_>, fault: u64, answer: &str) -> PyResult<()> {
        let answer = match answer {
            "done" => Answer::Done,
            "zero" => Answer::Zero,
            "poison" => Answer::Poison,
            "decline" => Answer::Decline,
            other => return Err(PyValueError::new_err(format!("{other:?} is no answer"))),
        };
        py.detach(|| self.0.answer(fault, answer)).map_err(raised)
    }

    /// Bytes for the whole page: by the server, or, where a message has no room for a page, by this
    /// process itself.
    fn fill(
        &self,
        py: Python<'_>,
        fault: u64,
        target: u64,
        address: u64,
        bytes: &[u8],
    ) -> PyResult<()> {
        py.detach(|| self.0.fill(fault, target, address, bytes)).map_err(raised)
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.release()).map_err(raised)
    }

    /// The number of the descriptor of a target's userfaultfd, which is the relay's.
    fn userfaultfd(&self, target: u64) -> PyResult<i32> {
        self.0.userfaultfd(target).map(|uffd| uffd.as_fd().as_raw_fd()).map_err(raised)
    }

    fn fileno(&self) -> i32 {
        self.0.as_fd().as_raw_fd()
    }

    fn close(&self) {
        self.0.close();
    }
}
