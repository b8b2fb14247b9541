//! What `pagekit.uffd` needs of the crate `uffd`. Refusals of the kernel go up as errno; the typed errors
//! are made in Python.
//!
//! Every call that enters the kernel gives up the GIL. What handlers call says so to [`uffd::stall`]
//! while it waits to get it back: the thread that has it may wait in a page fault that only we can end.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyOSError, PyValueError};
use pyo3::prelude::*;
use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use uffd::{
    Access, Cause, Event, Features, Heir, How, MessageBuffer, Opening, Pagemap, Progress, Ranges,
    RegisterMode, Scan, State, Support, FEATURES,
};

/// Registers what this file has.
pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Userfaultfd>()?;
    module.add_class::<HandlersHeir>()?;
    module.add_function(wrap_pyfunction!(uffd_table, module)?)?;
    module.add_function(wrap_pyfunction!(uffd_kernel, module)?)?;
    module.add_function(wrap_pyfunction!(address_of, module)?)?;
    module.add_function(wrap_pyfunction!(pagemap_entries, module)?)?;
    module.add_function(wrap_pyfunction!(pagemap_scan, module)?)?;
    Ok(())
}

/// Name, bit, since, commit, title, gives, needs, without.
type Row = (
    &'static str,
    Option<u32>,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

/// The feature table.
#[pyfunction]
fn uffd_table() -> Vec<Row> {
    let row = |row: &uffd::Feature| {
        let uffd::Feature { name, since, commit, title, gives, needs, without, .. } = *row;
        (name, row.bit(), since, commit, title, gives, needs, without)
    };
    FEATURES.iter().map(row).collect()
}

/// For each row of the table `yes`, `not permitted` or `no`; and names of bits that are in no row.
#[pyfunction]
fn uffd_kernel(py: Python<'_>) -> (Vec<&'static str>, Vec<String>) {
    let support = py.detach(Support::probe);
    let word = |state: &State| match state {
        State::Have => "yes",
        State::Forbidden => "not permitted",
        State::Lacking => "no",
    };
    let states = support.rows().iter().map(|(_, state)| word(state)).collect();
    (states, support.unknown().names())
}

/// Address, bytes, and whether it may only be read, of a contiguous buffer. The caller keeps it alive.
#[pyfunction]
fn address_of(buffer: &Bound<'_, PyAny>) -> PyResult<(usize, usize, bool)> {
    let buffer = PyUntypedBuffer::get(buffer)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer is not contiguous"));
    }
    Ok((buffer.buf_ptr() as usize, buffer.len_bytes(), buffer.readonly()))
}

/// As `OSError` with its errno, by which the class is chosen (PyO3 keeps the words alone).
fn refusal(error: impl Into<io::Error>) -> PyErr {
    let error = error.into();
    let words = error.to_string();
    let words = words.split(" (os error").next().unwrap_or_default().to_owned();
    match error.raw_os_error() {
        Some(errno) => PyOSError::new_err((errno, words)),
        None => PyOSError::new_err(words),
    }
}

/// Gives up the GIL for `work`, which a handler does.
fn detached<T: Send>(py: Python<'_>, open: &Open, work: impl FnOnce(&Open) -> T + Send) -> T {
    let (outcome, waiting) = py.detach(|| {
        let outcome = work(open);
        (outcome, uffd::stall::Waiting::now(&open.uffd))
    });
    drop(waiting);
    outcome
}

/// Bytes done, and the errno that stopped it; 0: none.
type Done = (usize, i32);

fn done(progress: Progress) -> Done {
    (progress.done, progress.errno.map_or(0, Errno::raw_os_error))
}

fn closed() -> PyErr {
    Python::attach(|py| {
        let class = py.import("pagekit.errors").and_then(|errors| errors.getattr("UsageError"));
        let error = class.and_then(|class| class.call1(("the userfaultfd is closed",)));
        error.map_or_else(|failure| failure, PyErr::from_value)
    })
}

struct Open {
    uffd: uffd::Userfaultfd,
    /// An eventfd: readable when it is closed, for those who wait.
    closed: OwnedFd,
    /// What is registered, for an heir.
    ranges: Ranges,
}

#[pyclass(frozen, module = "pagekit._core")]
struct Userfaultfd(Mutex<Option<Arc<Open>>>);

impl Userfaultfd {
    fn new(uffd: uffd::Userfaultfd) -> io::Result<Userfaultfd> {
        let closed = eventfd(0, EventfdFlags::CLOEXEC)?;
        let open = Open { uffd, closed, ranges: Ranges::default() };
        Ok(Userfaultfd(Mutex::new(Some(Arc::new(open)))))
    }

    /// Kept by whoever uses it: the descriptor's number is free again only when all are done.
    fn get(&self) -> PyResult<Arc<Open>> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.clone().ok_or_else(closed)
    }

    fn resolve(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&uffd::Userfaultfd) -> Progress + Send,
    ) -> PyResult<Done> {
        let open = self.get()?;
        Ok(done(detached(py, &open, |open| work(&open.uffd))))
    }

    fn change(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&uffd::Userfaultfd) -> io::Result<()> + Send,
    ) -> PyResult<()> {
        let open = self.get()?;
        detached(py, &open, |open| work(&open.uffd)).map_err(refusal)
    }
}

/// What happened, three numbers that say more, and the userfaultfd of a child.
type Told = (String, u64, u64, u64, Option<Userfaultfd>);

fn told(event: Event) -> io::Result<Told> {
    let plain = |kind: &str, a, b, c| (kind.to_owned(), a, b, c, None);
    Ok(match event {
        Event::Fault { address, flags, thread } => {
            let cause = match Cause::of(flags) {
                Cause::Missing => "missing",
                Cause::WriteProtected => "write-protected",
                Cause::Minor => "minor",
                Cause::Protected => "protected",
            };
            plain(cause, address, flags & uffd::abi::fault::WRITE, thread.into())
        }
        Event::Fork(child) => ("fork".to_owned(), 0, 0, 0, Some(Userfaultfd::new(child)?)),
        Event::Remap { from, to, len } => plain("remap", from, to, len),
        Event::Remove { start, end } => plain("remove", start, end, 0),
        Event::Unmap { start, end } => plain("unmap", start, end, 0),
        Event::Unknown(code) => plain("unknown", code.into(), 0, 0),
    })
}

/// What waiting for events came to.
enum Outcome {
    Events(Vec<Told>),
    Interrupted,
    Late,
    Closed,
}

impl Open {
    fn read(&self, until: Option<Instant>, most: usize) -> io::Result<Outcome> {
        let mut buffer = MessageBuffer::new(most);
        loop {
            let mut polled =
                [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(&self.closed, PollFlags::IN)];
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let time = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut polled, time.as_ref()) {
                Err(Errno::INTR) => return Ok(Outcome::Interrupted),
                outcome => outcome?,
            };
            if !polled[1].revents().is_empty() {
                return Ok(Outcome::Closed);
            }
            if polled[0].revents().contains(PollFlags::ERR) {
                return Err(Errno::INVAL.into());
            }
            // Another reader may have been quicker: then there are none.
            let events: Vec<Told> =
                self.uffd.read_events(&mut buffer)?.map(told).collect::<io::Result<_>>()?;
            match (events.is_empty(), left) {
                (false, _) => return Ok(Outcome::Events(events)),
                (true, Some(Duration::ZERO)) => return Ok(Outcome::Late),
                (true, _) => {}
            }
        }
    }

    /// Keeps the list of what is registered.
    fn cover(&self, start: u64, len: u64, registered: bool) {
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| *range != (start, len));
        if registered {
            ranges.push((start, len));
        }
    }
}

#[pymethods]
impl Userfaultfd {
    /// `device`: a descriptor of the device, or none for the system call.
    #[staticmethod]
    fn open(py: Python<'_>, device: Option<RawFd>, user_mode_only: bool) -> PyResult<Userfaultfd> {
        let access = if user_mode_only { Access::UserModeOnly } else { Access::Full };
        let opening = match device {
            Some(device) if device >= 0 => {
                // SAFETY: -1 is no descriptor; of others the caller keeps it open, and for one that
                // is none the kernel answers EBADF.
                Opening::Device(unsafe { BorrowedFd::borrow_raw(device) })
            }
            Some(_) => return Err(refusal(Errno::BADF)),
            None => Opening::SystemCall(access),
        };
        let opened = py.detach(|| uffd::Userfaultfd::open(opening)).map_err(refusal)?;
        Userfaultfd::new(opened).map_err(refusal)
    }

    /// Takes over a descriptor that is a userfaultfd; leaves others alone.
    #[staticmethod]
    fn adopt(descriptor: RawFd) -> PyResult<Userfaultfd> {
        if descriptor < 0 {
            return Err(refusal(Errno::BADF));
        }
        // SAFETY: no -1, and only looked at while the caller has it.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        if uffd::negotiated(borrowed).map_err(refusal)?.is_none() {
            return Err(PyOSError::new_err("it is not negotiated"));
        }
        let flags = rustix::fs::fcntl_getfl(borrowed).map_err(refusal)?;
        rustix::fs::fcntl_setfl(borrowed, flags | rustix::fs::OFlags::NONBLOCK)
            .and_then(|()| rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC))
            .map_err(refusal)?;
        // SAFETY: the caller gives it to us, and it is a descriptor.
        let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
        Userfaultfd::new(owned.into()).map_err(refusal)
    }

    fn handshake(&self, py: Python<'_>, features: u64) -> PyResult<()> {
        let open = self.get()?;
        py.detach(|| open.uffd.handshake(Features(features))).map_err(refusal)
    }

    /// Names of what it was negotiated with; none: not yet.
    fn negotiated(&self) -> PyResult<Option<Vec<String>>> {
        let features = uffd::negotiated(&self.get()?.uffd).map_err(refusal)?;
        Ok(features.map(Features::names))
    }

    fn fileno(&self) -> PyResult<RawFd> {
        use std::os::fd::AsFd as _;
        Ok(self.get()?.uffd.as_fd().as_raw_fd())
    }

    fn register(&self, py: Python<'_>, start: u64, len: u64, mode: u64) -> PyResult<Vec<String>> {
        let open = self.get()?;
        let operations = py.detach(|| {
            let operations = open.uffd.register(start, len, RegisterMode(mode))?;
            open.cover(start, len, true);
            io::Result::Ok(operations)
        });
        operations.map(uffd::Operations::names).map_err(refusal)
    }

    fn unregister(&self, py: Python<'_>, start: u64, len: u64) -> PyResult<()> {
        let open = self.get()?;
        let work = || {
            open.cover(start, len, false);
            open.uffd.unregister(start, len)
        };
        py.detach(work).map_err(refusal)
    }

    fn copy(
        &self,
        py: Python<'_>,
        destination: u64,
        source: &Bound<'_, PyAny>,
        how: u64,
    ) -> PyResult<Done> {
        // Held, and so neither freed nor resized, until the kernel has read it.
        let source = PyUntypedBuffer::get(source)?;
        if !source.is_c_contiguous() {
            return Err(PyBufferError::new_err("the bytes are not contiguous"));
        }
        let (address, len) = (source.buf_ptr() as usize, source.len_bytes());
        self.resolve(py, move |uffd| {
            // SAFETY: initialised memory of a buffer that is held; another thread may write to it
            // meanwhile, which concerns the kernel's copy only.
            unsafe { uffd.copy_from(destination, address as *const u8, len, How(how)) }
        })
    }

    fn zeropage(&self, py: Python<'_>, start: u64, len: u64, how: u64) -> PyResult<Done> {
        self.resolve(py, move |uffd| uffd.zeropage_with(start, len, How(how)))
    }

    fn continue_(&self, py: Python<'_>, start: u64, len: u64, how: u64) -> PyResult<Done> {
        self.resolve(py, move |uffd| uffd.continue_with(start, len, How(how)))
    }

    fn poison(&self, py: Python<'_>, start: u64, len: u64, how: u64) -> PyResult<Done> {
        self.resolve(py, move |uffd| uffd.poison_with(start, len, How(how)))
    }

    fn move_(
        &self,
        py: Python<'_>,
        destination: u64,
        source: u64,
        len: u64,
        how: u64,
    ) -> PyResult<Done> {
        self.resolve(py, move |uffd| uffd.move_with(destination, source, len, How(how)))
    }

    fn protect(&self, py: Python<'_>, start: u64, len: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.protect(start, len))
    }

    fn unprotect(&self, py: Python<'_>, start: u64, len: u64, how: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.unprotect_with(start, len, How(how)))
    }

    fn protect_against_access(&self, py: Python<'_>, start: u64, len: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.protect_against_access(start, len))
    }

    fn allow_access(&self, py: Python<'_>, start: u64, len: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.allow_access(start, len))
    }

    fn set_mode(&self, py: Python<'_>, enable: u64, disable: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.set_mode(Features(enable), Features(disable)))
    }

    fn wake(&self, py: Python<'_>, start: u64, len: u64) -> PyResult<()> {
        self.change(py, move |uffd| uffd.wake(start, len))
    }

    fn is_alive(&self, py: Python<'_>, address: u64) -> PyResult<bool> {
        let open = self.get()?;
        Ok(py.detach(|| open.uffd.is_alive(address)))
    }

    /// At most `most` events; an empty list when the time is over, none when it is closed.
    fn read(
        &self,
        py: Python<'_>,
        seconds: Option<f64>,
        most: usize,
    ) -> PyResult<Option<Vec<Told>>> {
        let until = match seconds.map(Duration::try_from_secs_f64) {
            None => None,
            Some(Ok(time)) => Instant::now().checked_add(time),
            Some(Err(error)) => return Err(PyValueError::new_err(format!("timeout: {error}"))),
        };
        let Ok(open) = self.get() else { return Ok(None) };
        loop {
            match detached(py, &open, |open| open.read(until, most)).map_err(refusal)? {
                Outcome::Events(events) => return Ok(Some(events)),
                Outcome::Late => return Ok(Some(Vec::new())),
                Outcome::Closed => return Ok(None),
                Outcome::Interrupted => py.check_signals()?,
            }
        }
    }

    /// Ends the wait of those who read, for good, and nothing else.
    fn finish(&self) -> PyResult<()> {
        rustix::io::write(&self.get()?.closed, &1_u64.to_ne_bytes()).map_err(refusal)?;
        Ok(())
    }

    /// Ends the wait of those who read. Calls that are under way are finished first, each by whoever
    /// makes it.
    fn close(&self, py: Python<'_>) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(open) = open {
            let _ = rustix::io::write(&open.closed, &1_u64.to_ne_bytes());
            py.detach(|| drop(open));
        }
    }
}

/// See [`uffd::Heir`].
#[pyclass(frozen, module = "pagekit._core", name = "Heir")]
struct HandlersHeir(Heir);

#[pymethods]
impl HandlersHeir {
    /// `process`: a pidfd, which stays the caller's.
    #[new]
    fn new(uffd: &Userfaultfd, process: RawFd) -> PyResult<HandlersHeir> {
        if process < 0 {
            return Err(refusal(Errno::BADF));
        }
        let open = uffd.get()?;
        // SAFETY: no -1; the caller keeps it open meanwhile.
        let process = unsafe { BorrowedFd::borrow_raw(process) };
        let start = || {
            let (process, closed) = (process.try_clone_to_owned()?, open.closed.try_clone()?);
            Heir::start(&open.uffd, process, closed, Arc::clone(&open.ranges))
        };
        start().map(HandlersHeir).map_err(refusal)
    }

    fn retire(&self) {
        self.0.retire();
    }
}

fn pagemap(pid: Option<u32>) -> io::Result<Pagemap> {
    pid.map_or_else(Pagemap::of_self, Pagemap::of)
}

/// One number for each page, as `/proc/PID/pagemap` has them.
#[pyfunction]
fn pagemap_entries(
    py: Python<'_>,
    start: u64,
    pages: usize,
    pid: Option<u32>,
) -> PyResult<Vec<u64>> {
    let entries = py.detach(|| pagemap(pid)?.entries(start, pages)).map_err(refusal)?;
    Ok(entries.into_iter().map(|entry| entry.0).collect())
}

/// A dictionary of what [`Scan`] has.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Wanted {
    all_of: u64,
    any_of: u64,
    inverted: u64,
    reported: u64,
    protect: bool,
    only_tracked: bool,
    most_pages: u64,
}

/// Runs of pages: start, end, and their categories.
#[pyfunction]
fn pagemap_scan(
    py: Python<'_>,
    start: u64,
    end: u64,
    wanted: Wanted,
    pid: Option<u32>,
) -> PyResult<Vec<(u64, u64, u64)>> {
    use uffd::Categories;
    let scan = Scan {
        all_of: Categories(wanted.all_of),
        any_of: Categories(wanted.any_of),
        inverted: Categories(wanted.inverted),
        reported: Categories(wanted.reported),
        protect: wanted.protect,
        only_tracked: wanted.only_tracked,
        most_pages: wanted.most_pages,
    };
    let regions = py.detach(|| pagemap(pid)?.scan(start, end, &scan)).map_err(refusal)?;
    Ok(regions.into_iter().map(|region| (region.start, region.end, region.categories)).collect())
}
