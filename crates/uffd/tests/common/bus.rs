//! SIGBUS, caught in the thread that raised it. The handler resolves what was touched and returns, so
//! that the access is made again; nothing jumps out of it.

use std::cell::Cell;
use std::sync::Once;

use rustix::mm::MapFlags;

use super::memory::READ_WRITE;

/// The siginfo of one signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    pub code: i32,
    pub address: u64,
    /// Of a poisoned page (BUS_MCEERR_AR): how large it is, as the kernel says.
    pub size: u64,
}

/// No page there (BUS_ADRERR).
pub const NO_PAGE: i32 = 2;
/// A poisoned page was touched (BUS_MCEERR_AR).
pub const POISONED: i32 = 4;

struct Plan<'a> {
    resolve: &'a dyn Fn(&Caught),
    caught: Vec<Caught>,
}

thread_local! {
    static PLAN: Cell<*mut ()> = const { Cell::new(std::ptr::null_mut()) };
}

/// Most signals that one access may raise.
const MOST: usize = 64;

/// What an access gives, and the signals it raised. For each of them `resolve` is called, in the
/// handler: it may only make system calls.
pub fn catching<R>(resolve: &dyn Fn(&Caught), access: impl FnOnce() -> R) -> (R, Vec<Caught>) {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handler is one that sigaction takes with SA_SIGINFO, and the structure is
        // initialised with zeros, which is an empty mask.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
        }
    });
    let mut plan = Plan { resolve, caught: Vec::with_capacity(MOST) };
    PLAN.set((&raw mut plan).cast());
    let value = access();
    PLAN.set(std::ptr::null_mut());
    (value, plan.caught)
}

/// Touches a page that raises SIGBUS, which is then replaced by one that can be read: the signal, or
/// what was read if there was none.
pub fn signal_of(address: u64, page: usize) -> Result<Caught, u8> {
    let start = address & !(page as u64 - 1);
    let replace = |_: &Caught| {
        // SAFETY: the page that cannot be touched; what there was is given up.
        let put = unsafe {
            rustix::mm::mmap_anonymous(
                start as *mut _,
                page,
                READ_WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        put.unwrap();
    };
    match catching(&replace, || super::touch(address)) {
        (_, caught) if !caught.is_empty() => Ok(caught[0]),
        (value, _) => Err(value),
    }
}

extern "C" fn handler(signal: i32, info: *const libc::siginfo_t, _context: *const ()) {
    let plan: *mut Plan<'_> = PLAN.get().cast();
    if plan.is_null() {
        // Not ours: as it would have been.
        // SAFETY: sets the default action, by which the access made again ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: `catching` is in the middle of the access, in this very thread, and does not look at its
    // plan meanwhile; the kernel hands a whole siginfo, of which the size is a shift at byte 24.
    unsafe {
        let shift = info.cast::<u8>().add(24).cast::<i16>().read() as u32;
        let size = if (*info).si_code == POISONED { 1 << shift } else { 0 };
        let caught = Caught { code: (*info).si_code, address: (*info).si_addr() as u64, size };
        let room = (*plan).caught.len() < MOST;
        if !room {
            libc::abort();
        }
        (*plan).caught.push(caught);
        ((*plan).resolve)(&caught);
    }
}
