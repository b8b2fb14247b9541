//! Children.
//!
//! Facts about the kernel, and what follows:
//! - Without fork events a child inherits the mapping but not the registration: it would read holes
//!   as zeros, and in `share` make them zeros for every other fork. There the memory is kept out of
//!   children (MADV_DONTFORK): a child that touches it gets SIGSEGV.
//! - With fork events the server gets a userfaultfd of the child before `fork` returns, and is its
//!   only holder: the server's death would make the child's missing pages zeros. So the child asks
//!   for a descriptor of it before it runs a line of the program, and watches the server as its
//!   parent does. (The parent's descriptors that it inherited are of the parent's memory.)
//! - The event does not say which process the child is. The child reads its target's number from the
//!   beacon: a page that it drops first, so that it is missing.
//! - `vfork` and `posix_spawn` run in the parent's memory until exec: nothing to do. Exec closes
//!   everything; a new program of the same environment attaches anew.

use std::cell::UnsafeCell;
use std::sync::MutexGuard;

use pagekit::page::PAGE;
use pagekit::wire::shim::Message;
use uffd::Userfaultfd;

use crate::attach::Connection;
use crate::hooks::real_madvise;
use crate::region::{self, Region};
use crate::settings::{self, Supply};

/// The regions' lock, held by the forking thread from before the fork until after it, so that the
/// child finds it free.
struct Held(UnsafeCell<Option<MutexGuard<'static, Vec<Region>>>>);

// SAFETY: only the thread that holds the lock, or its copy in the child, touches the content.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

/// Registers the handlers.
pub(crate) fn install() {
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

extern "C" fn before() {
    let guard = region::all();
    // SAFETY: we hold the lock now.
    unsafe { *HELD.0.get() = Some(guard) };
}

extern "C" fn in_parent() {
    // SAFETY: we still hold the lock; taking the guard out gives it back.
    drop(unsafe { (*HELD.0.get()).take() });
}

extern "C" fn in_child() {
    // SAFETY: the child has one thread, the copy of the one that took the lock.
    let Some(mut regions) = (unsafe { (*HELD.0.get()).take() }) else { return };
    regions.retain_mut(|region| {
        let Some(served) = &mut region.served else { return true };
        let Some(beacon) = served.beacon else {
            // Not part of this process.
            return false;
        };
        match introduce(beacon) {
            Ok((target, uffd)) => {
                served.target = target;
                served.uffd = uffd.into();
                true
            }
            Err(text) => {
                crate::end(&format!("a child of a served process cannot be served: {text}"))
            }
        }
    });
}

/// Tells the server which of its targets this process is.
fn introduce(beacon: u64) -> Result<(u64, Userfaultfd), String> {
    let Some(Supply::Server { socket, .. }) = settings::get().map(|settings| &settings.supply)
    else {
        return Err("it has no server".to_owned());
    };
    // The parent's number is there if somebody touched the page in it: the parent itself after its
    // own birth, or `mlockall`. (A child's memory is never locked, so this does not fail.)
    // SAFETY: our own page.
    unsafe { real_madvise(beacon as _, PAGE as usize, libc::MADV_DONTNEED) };
    // SAFETY: the beacon is mapped and readable; the server answers the fault with our number.
    let target = unsafe { std::ptr::read_volatile(beacon as *const u64) };
    let connection = Connection::open(socket)?;
    let (answer, mut descriptors) = connection.ask(&Message::Child { target }, None)?;
    match (answer, descriptors.pop()) {
        (Message::Holder, Some(descriptor)) => {
            let held = descriptor.try_clone().map_err(|error| error.to_string())?;
            crate::watch::server(connection, held)?;
            Ok((target, Userfaultfd::from(descriptor)))
        }
        (other, _) => Err(format!("the server answered {other:?}")),
    }
}
