//! The handler of SIGBUS: it says why a page cannot be had, and in maps that are served by signals it
//! brings the page.
//!
//! Facts, and why this is sound:
//! - The signal is *synchronous*: the kernel raises it in the thread that touches the page, at the
//!   instruction that does. So what the handler may do depends on what that code holds, not on what
//!   the process is doing. Nothing touches a map's memory while it holds a lock that the handler needs:
//!   not ours (no code of ours does), and not the allocator's (which touches only what it has given out
//!   itself). The handler does not use stdio, whose locks a program may well hold there.
//! - Therefore the handler may take locks, allocate, wait for a fetch and panic within limits, as any
//!   function may that is called there. What is sent by `kill` is not ours, whatever else it says.
//! - While it runs, SIGBUS is blocked: a second one, in the source, ends the process.
//! - It runs on the thread's own stack: an alternative one, made for a handler of a few lines, could be
//!   too small for reading a source.
//! - `errno` is the interrupted code's.
//! - What is not ours goes to the handler that was there before: Python's `faulthandler`, for one. One
//!   that is installed later, and hands on what is not its own, goes before us.

use std::cell::UnsafeCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

use libc::{c_int, c_void, sigaction, siginfo_t};
use uffd::Errno;

use super::losses::LONGEST;
use super::space::put_zeros;
use super::{table, How, Map, FORGOTTEN, ORPHANED};
use crate::error::{Error, Result};
use crate::page::PAGE;
use crate::template::LONGEST_WINDOW;

/// Pages that come along with one that is touched, until the thread reads on where it left off.
const SHORTEST_WINDOW: u64 = 16;

/// What was installed before.
struct Before(UnsafeCell<sigaction>);

// SAFETY: written before the handler is installed, only read afterwards.
unsafe impl Sync for Before {}
// SAFETY: plain data.
unsafe impl Send for Before {}

static BEFORE: OnceLock<Before> = OnceLock::new();

/// Installs the handler, once a process.
pub(super) fn install() -> Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: the structures are plain data, valid for the calls, and the handler is a function of
    // this library, which is never unloaded.
    unsafe {
        let mut before: sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
            return Err(Error::kernel("no handler for SIGBUS", std::io::Error::last_os_error()));
        }
        if BEFORE.set(Before(UnsafeCell::new(before))).is_err() {
            return Ok(());
        }
        let mut ours: sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_sigbus as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut ours.sa_mask);
        if libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) != 0 {
            return Err(Error::kernel("no handler for SIGBUS", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: errno is the thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the kernel passes a valid structure.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    // Not above 0: somebody sent it.
    let map = if code > 0 { table::find(address) } else { None };
    // SAFETY: its memory is being touched, so somebody holds it: see `table`.
    let resolved = map.is_some_and(|map| unsafe { &*map }.on_sigbus(address));
    // SAFETY: as above.
    unsafe { *errno = saved };
    if !resolved {
        pass_on(signal, info, context);
        if map.is_some() {
            // Whoever was there before is back, and cannot have brought the page: the next try at it
            // ends the process, instead of coming here again and again.
            restore_default(signal);
        }
    }
}

impl Map {
    /// Brings the page at `address`, if that is to be done here. Else says why it cannot be had.
    fn on_sigbus(&self, address: u64) -> bool {
        let page = (address - self.space.start) / PAGE;
        if self.how() == How::Signal {
            match catch_unwind(AssertUnwindSafe(|| self.serve(page))) {
                Ok(Ok(())) => return true,
                Ok(Err(error)) => self.supply.copied().losses.lose(page, &error, || None),
                Err(_) => {
                    let message = "the source panicked".to_owned();
                    let error = Error::Integrity { message };
                    self.supply.copied().losses.lose(page, &error, || None);
                }
            }
        }
        self.explain(page, address);
        false
    }

    fn serve(&self, page: u64) -> Result<(), Arc<Error>> {
        self.signals.fetch_add(1, Relaxed);
        let supply = self.supply.get()?;
        supply.template.demanded(page);
        // Where the thread reads on, the window doubles. (Two threads only confuse the guess.)
        let window = match self.next.load(Relaxed) == page {
            true => (self.window.load(Relaxed) * 2).clamp(SHORTEST_WINDOW, LONGEST_WINDOW),
            false => SHORTEST_WINDOW,
        };
        let window = if supply.template.recording() { 1 } else { window };
        if supply.template.bring(page, window)?.is_some() {
            if let Some(service) = self.service.get()? {
                put_zeros(&service.uffd, self.at(page), PAGE);
            }
        }
        self.window.store(window, Relaxed);
        self.next.store(page - page % window + window, Relaxed);
        Ok(())
    }

    /// One line on stderr, with one system call.
    fn explain(&self, page: u64, address: u64) {
        let supply = self.supply.copied();
        let mut line = Line::new();
        line.add(b"pagekit: map of ");
        line.add(supply.template.spec().as_bytes());
        line.add(b": page ");
        line.number(page, 10);
        line.add(b" (at 0x");
        line.number(address, 16);
        line.add(b") cannot be had: ");
        match supply.losses.reason(page) {
            _ if self.ward().is_some_and(|ward| ward.orphaned()) => {
                line.add(ORPHANED.as_bytes());
            }
            Some(reason) => line.add(reason.text()),
            None => line.add(FORGOTTEN.as_bytes()),
        }
        line.add(b"\n");
        line.write();
    }
}

/// Text put together without taking memory.
struct Line {
    bytes: [u8; 256 + LONGEST],
    length: usize,
}

impl Line {
    fn new() -> Line {
        Line { bytes: [0; 256 + LONGEST], length: 0 }
    }

    /// Adds what fits, and leaves room for the end of the line.
    fn add(&mut self, text: &[u8]) {
        let room = self.bytes.len() - 1 - self.length + usize::from(text == b"\n");
        let text = &text[..text.len().min(room)];
        self.bytes[self.length..self.length + text.len()].copy_from_slice(text);
        self.length += text.len();
    }

    fn number(&mut self, number: u64, base: u64) {
        let mut digits = [0; 20];
        let mut rest = number;
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(rest % base) as usize];
            rest /= base;
            if rest == 0 {
                break;
            }
        }
        self.add(&digits[at..]);
    }

    fn write(&self) {
        let mut rest = &self.bytes[..self.length];
        while !rest.is_empty() {
            match rustix::io::write(rustix::stdio::stderr(), rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
    }
}

/// Does what would have been done without us.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(before) = BEFORE.get() else { return };
    // SAFETY: only read since it was made.
    let before = unsafe { &*before.0.get() };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: as above.
            if unsafe { (*info).si_code } <= 0 && before.sa_sigaction == libc::SIG_IGN {
                return;
            }
            // The default it is: nobody can ignore a touch of nothing. The instruction is tried again
            // when this returns; what was sent is sent again.
            restore_default(signal);
            // SAFETY: takes no pointer.
            unsafe { libc::raise(signal) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: installed as a function of this type.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: installed as a function of this type.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

fn restore_default(signal: c_int) {
    // SAFETY: plain data, valid for the call.
    unsafe {
        let mut default: sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &default, std::ptr::null_mut());
    }
}
