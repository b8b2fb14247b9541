//! Spec strings into stacks: the one module that names every source and every layer.
//!
//! A stack is one source and any number of layers around it. The first layer given is the outermost.
//!
//! | spec | piece |
//! |---|---|
//! | `file:PATH` | [`crate::source::file`] |
//! | `zero:SIZE` | [`crate::source::zero`] |
//! | `python:MODULE:FUNCTION:SIZE[,timeout=TIME]` | [`crate::source::python`] |
//!
//! | layer | piece |
//! |---|---|
//! | `pass` | [`crate::layer::pass`] |
//! | `stats` | [`crate::layer::stats`] |
//! | `delay=TIME[,RATE][,N]` | [`crate::layer::delay`] |
//! | `fail=N`, `fail=always`, `fail=page:P` | [`crate::layer::fail`] |
//!
//! Sizes take the suffixes K, M, G (powers of 1024), times `us`, `ms`, `s`, rates `B/s`, `kB/s`, `MB/s`,
//! `GB/s` (powers of 1000).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::layer::{delay, fail, pass, stats, Next};
use crate::page::PAGE;
use crate::source::{file, python, zero, Source};

pub use crate::source::python::set_interpreter;

const SOURCES: &str = "file:PATH, zero:SIZE, python:MODULE:FUNCTION:SIZE[,timeout=TIME]";
const LAYERS: &str = "pass, stats, delay=TIME[,RATE][,N], fail=N, fail=always, fail=page:P";

/// Builds the stack that `spec` and `layers` (outermost first) describe.
///
/// # Errors
/// `Usage` for a spec that means nothing, and whatever opening the source brings.
pub fn open<L: AsRef<str>>(spec: &str, layers: &[L]) -> Result<Arc<dyn Source>> {
    let mut stack = source(spec)?;
    for layer in layers.iter().rev() {
        stack = wrap(layer.as_ref(), stack)?;
    }
    Ok(stack)
}

fn source(spec: &str) -> Result<Arc<dyn Source>> {
    match spec.split_once(':') {
        Some(("file", path)) => Ok(Arc::new(file::File::open(Path::new(path))?)),
        Some(("zero", text)) => match size(text) {
            Some(bytes) if bytes > 0 && bytes % PAGE == 0 => Ok(Arc::new(zero::Zero::new(bytes))),
            _ => Err(Error::usage(
                format!("{spec:?}: {text:?} is no size of whole {PAGE}-byte pages"),
                "for example zero:64M",
            )),
        },
        Some(("python", text)) => match callback(text) {
            Some((function, size, timeout)) => {
                Ok(Arc::new(python::Python::open(function, size, timeout)?))
            }
            None => Err(Error::usage(
                format!("{spec:?} is not MODULE:FUNCTION and a size of whole {PAGE}-byte pages"),
                "for example python:tiles:render:1G or python:tiles:render:1G,timeout=60s",
            )),
        },
        _ => Err(Error::usage(
            format!("{spec:?} names no source"),
            format!("sources are {SOURCES}; a plain file is file:{spec}"),
        )),
    }
}

fn wrap(layer: &str, next: Next) -> Result<Arc<dyn Source>> {
    let (name, argument) = match layer.split_once('=') {
        Some((name, argument)) => (name, Some(argument)),
        None => (layer, None),
    };
    let wrong = |example: &str| {
        Err(Error::usage(
            format!("layer {layer:?} is not understood"),
            format!("for example {example}"),
        ))
    };
    match (name, argument) {
        ("pass", None) => Ok(Arc::new(pass::Pass::new(next))),
        ("stats", None) => Ok(Arc::new(stats::Stats::new(next))),
        ("delay", argument) => match argument.and_then(model) {
            Some(model) => Ok(Arc::new(delay::Delay::new(next, model))),
            None => wrong("delay=2ms or delay=2ms,1GB/s,16"),
        },
        ("fail", argument) => match argument.and_then(rule) {
            Some(rule) => Ok(Arc::new(fail::Fail::new(next, rule))),
            None => wrong("fail=3, fail=always or fail=page:17"),
        },
        _ => Err(Error::usage(format!("{layer:?} names no layer"), format!("layers are {LAYERS}"))),
    }
}

/// `MODULE:FUNCTION:SIZE[,timeout=TIME]`
fn callback(text: &str) -> Option<(&str, u64, Duration)> {
    let (text, timeout) = match text.split_once(",timeout=") {
        Some((text, timeout)) => (text, time(timeout)?),
        None => (text, python::USUAL_TIMEOUT),
    };
    let (function, bytes) = text.rsplit_once(':')?;
    let bytes = size(bytes).filter(|bytes| *bytes > 0 && bytes % PAGE == 0)?;
    let (module, name) = function.split_once(':')?;
    let is_path = |path: &str| {
        let mut parts = path.split('.');
        parts.all(|part| !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_'))
    };
    let fine = is_path(module) && is_path(name) && !timeout.is_zero();
    fine.then_some((function, bytes, timeout))
}

fn rule(text: &str) -> Option<fail::Rule> {
    if text == "always" {
        return Some(fail::Rule::Always);
    }
    match text.strip_prefix("page:") {
        Some(page) => page.parse().ok().map(fail::Rule::Page),
        None => text.parse().ok().map(fail::Rule::First),
    }
}

/// `TIME[,RATE][,N]`
fn model(text: &str) -> Option<delay::Model> {
    let mut parts = text.split(',').peekable();
    let latency = time(parts.next()?)?;
    let rate = match parts.peek() {
        Some(part) if part.ends_with("B/s") => Some(rate(parts.next()?)?),
        _ => None,
    };
    let in_flight = match parts.next() {
        Some(part) => Some(part.parse().ok().filter(|most| *most > 0)?),
        None => None,
    };
    parts.next().is_none().then_some(delay::Model { latency, rate, in_flight })
}

/// Bytes a second: `800kB/s`, `100MB/s`, `1.5GB/s`. Never 0.
pub fn rate(text: &str) -> Option<u64> {
    let digits = text.strip_suffix("B/s")?;
    let (digits, unit) = match digits.as_bytes().last()? {
        b'k' => (&digits[..digits.len() - 1], 1e3),
        b'M' => (&digits[..digits.len() - 1], 1e6),
        b'G' => (&digits[..digits.len() - 1], 1e9),
        _ => (digits, 1.0),
    };
    let rate = digits.parse::<f64>().ok()? * unit;
    (1.0..1e15).contains(&rate).then_some(rate as u64)
}

/// Bytes: `4096`, `64K`, `2M`, `1G`.
pub fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A time: `250us`, `2ms`, `1.5s`.
pub fn time(text: &str) -> Option<Duration> {
    let (digits, unit) = if let Some(digits) = text.strip_suffix("us") {
        (digits, 1e-6)
    } else if let Some(digits) = text.strip_suffix("ms") {
        (digits, 1e-3)
    } else {
        (text.strip_suffix('s')?, 1.0)
    };
    Duration::try_from_secs_f64(digits.parse::<f64>().ok()? * unit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_wrap_outermost_first() {
        let stack = open("zero:64K", &["stats", "delay=1ms", "pass"]).unwrap();
        assert_eq!(stack.name(), "stats");
        assert_eq!(stack.capabilities().size, 65536);
        assert!(!stack.capabilities().immediate, "the most restrictive piece decides");
        assert!(open("zero:64K", &["stats", "pass"]).unwrap().capabilities().immediate);
    }

    #[test]
    fn what_means_nothing_is_refused_with_a_hint() {
        let none: &[&str] = &[];
        for (spec, layers) in [
            ("mem", none),
            ("zero:12", none),
            ("zero:", none),
            ("zero:0", none),
            ("zero:99999999999G", none),
            ("python:module:4K", none),
            ("python:module:function", none),
            ("python:module:function:5", none),
            ("python:module:function:0", none),
            ("python:module:func tion:4K", none),
            ("python:module::4K", none),
            ("python:.module:function:4K", none),
            ("python:a:b:c:4K", none),
            ("python:module:function:4K,timeout=5", none),
            ("python:module:function:4K,timeout=0s", none),
            ("python:module:function:4K,workers=2", none),
            ("zero:4K", &["delay"]),
            ("zero:4K", &["delay=-1ms"]),
            ("zero:4K", &["delay=1ms,1GB"]),
            ("zero:4K", &["delay=1ms,0"]),
            ("zero:4K", &["delay=1ms,0B/s"]),
            ("zero:4K", &["delay=1ms,16,1GB/s"]),
            ("zero:4K", &["delay=1ms,1GB/s,16,"]),
            ("zero:4K", &["fail=maybe"]),
            ("zero:4K", &["pass=1"]),
            ("zero:4K", &["cache"]),
        ] {
            let error = open(spec, layers).unwrap_err();
            assert!(matches!(error, Error::Usage { .. }), "{spec} {layers:?}: {error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn callbacks() {
        let usual = python::USUAL_TIMEOUT;
        assert_eq!(callback("a.b:C.d_2:2M"), Some(("a.b:C.d_2", 2 << 20, usual)));
        let timeout = Duration::from_millis(1500);
        assert_eq!(callback("a:b:4K,timeout=1.5s"), Some(("a:b", 4096, timeout)));
    }

    #[test]
    fn sizes_times_and_rates() {
        assert_eq!(size("2M"), Some(2 << 20));
        assert_eq!(size(""), None);
        assert_eq!(time("250us"), Some(Duration::from_micros(250)));
        assert_eq!(time("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(time("5"), None);
        assert_eq!(rate("1.5GB/s"), Some(1_500_000_000));
        assert_eq!(rate("100B/s"), Some(100));
        for wrong in ["1G/s", "B/s", "-1kB/s", "NaNB/s", "infB/s", "1e99GB/s"] {
            assert_eq!(rate(wrong), None, "{wrong}");
        }
        let far = model("2ms,1GB/s,16").unwrap();
        assert_eq!((far.rate, far.in_flight), (Some(1_000_000_000), Some(16)));
        assert_eq!(model("2ms,16").unwrap().rate, None);
    }
}
