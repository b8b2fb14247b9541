//! `pagekit._core.Map`: memory that fills itself, as a buffer.
//!
//! Each view holds the map that it is of, through [`ffi::Py_buffer::internal`]: closing takes the
//! map from the object, and the last view unmaps it.

use std::ffi::c_int;
use std::sync::{Arc, Mutex, PoisonError};

use pagekit::error::Error;
use pagekit::map;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::{delivery, raised, Template};

#[pyclass(frozen, subclass, module = "pagekit._core")]
pub(crate) struct Map {
    map: Mutex<Option<Arc<map::Map>>>,
    size: u64,
}

impl Map {
    fn get(&self, py: Python<'_>) -> PyResult<Arc<map::Map>> {
        // Held for moments, and only with the GIL: a child of a fork finds it free.
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let closed = || Error::Usage { message: "the map is closed".into(), hint: String::new() };
        let map = map.ok_or_else(|| raised(py, &closed()))?;
        map.check().map_err(|error| raised(py, &error))?;
        Ok(map)
    }
}

#[pymethods]
impl Map {
    #[new]
    fn new(
        py: Python<'_>,
        template: &Template,
        writable: bool,
        faults: &str,
        page_size: u64,
    ) -> PyResult<Map> {
        let template = template.get()?;
        let faults = faults.parse().map_err(|error| raised(py, &error))?;
        let options = map::Options { writable, faults, page_size };
        let map = py.detach(|| map::Map::new(template, &delivery(), options));
        let map = map.map_err(|error| raised(py, &error))?;
        Ok(Map { size: map.size(), map: Mutex::new(Some(map)) })
    }

    #[pyo3(name = "_size")]
    fn size(&self) -> u64 {
        self.size
    }

    #[pyo3(name = "_closed")]
    fn closed(&self) -> bool {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    #[pyo3(name = "_bring")]
    fn bring(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        let map = self.get(py)?;
        py.detach(|| map.bring(offset, length)).map_err(|error| raised(py, &error))
    }

    #[pyo3(name = "_search")]
    fn search(&self, py: Python<'_>, needle: &[u8], start: u64, end: u64) -> PyResult<Option<u64>> {
        let map = self.get(py)?;
        py.detach(|| map.find(needle, start, end)).map_err(|error| raised(py, &error))
    }

    #[pyo3(name = "_fetch_ahead")]
    fn fetch_ahead(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        let map = self.get(py)?;
        py.detach(|| map.will_need(offset, length)).map_err(|error| raised(py, &error))
    }

    #[pyo3(name = "_load")]
    fn load(&self, py: Python<'_>) -> PyResult<()> {
        let map = self.get(py)?;
        py.detach(|| map.populate()).map_err(|error| raised(py, &error))
    }

    #[pyo3(name = "_counters")]
    fn counters(&self, py: Python<'_>) -> PyResult<String> {
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let closed = || Error::Usage { message: "the map is closed".into(), hint: String::new() };
        let map = map.ok_or_else(|| raised(py, &closed()))?;
        Ok(serde_json::to_string(&map.statistics()).unwrap_or_default())
    }

    #[pyo3(name = "_close")]
    fn shut(&self, py: Python<'_>) {
        let map = self.map.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Perhaps the last: then it is unmapped now.
        py.detach(|| drop(map));
    }

    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let map = slf.get().get(slf.py())?;
        if flags & ffi::PyBUF_WRITABLE != 0 && !map.writable() {
            return Err(PyBufferError::new_err("the map is read-only"));
        }
        let (at, length) = (map.address().cast(), map.size() as ffi::Py_ssize_t);
        let readonly = c_int::from(!map.writable());
        // SAFETY: Python passes a structure to be filled, and the object that it is of; the memory is
        // mapped as long as the view holds the map, which is from now on.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), at, length, readonly, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        // SAFETY: filled just now.
        unsafe { (*view).internal = Arc::into_raw(map).cast_mut().cast() };
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: put there by `__getbuffer__`, and released once.
        drop(unsafe { Arc::from_raw((*view).internal.cast::<map::Map>()) });
    }
}
