//! The functions of libc that are replaced.
//!
//! What is not ours passes on after one or two comparisons: anonymous mappings, and everything else
//! about memory in a process without a region. A file mapping costs an `fstat` more.
//!
//! The next definition of each function is looked up, so other preloaded libraries keep working.
//! glibc's own allocator does not come through here: it calls its internal functions.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use libc::{off_t, size_t};

use crate::{region, settings};

/// Runs when the dynamic loader has initialised libc, before `main`.
#[used]
#[link_section = ".init_array"]
static INITIALISE: extern "C" fn() = {
    extern "C" fn initialise() {
        settings::read();
        if settings::get().is_some() {
            crate::fork::install();
        }
    }
    initialise
};

/// The next definition of a libc function, looked up at its first use.
struct Real {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Real {
    const fn new(name: &'static CStr) -> Real {
        Real { name, address: AtomicPtr::new(std::ptr::null_mut()) }
    }

    fn get(&self) -> *mut c_void {
        let known = self.address.load(Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: dlsym with a valid name; RTLD_NEXT is meant for this.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr().cast::<c_char>()) };
        if found.is_null() {
            crate::end(&format!("libc lacks {}", self.name.to_string_lossy()));
        }
        self.address.store(found, Relaxed);
        found
    }
}

type Mmap = unsafe extern "C" fn(*mut c_void, size_t, c_int, c_int, c_int, off_t) -> *mut c_void;
type Munmap = unsafe extern "C" fn(*mut c_void, size_t) -> c_int;
type Mremap = unsafe extern "C" fn(*mut c_void, size_t, size_t, c_int, *mut c_void) -> *mut c_void;
type Madvise = unsafe extern "C" fn(*mut c_void, size_t, c_int) -> c_int;
type Fallocate = unsafe extern "C" fn(c_int, c_int, off_t, off_t) -> c_int;

static MMAP: Real = Real::new(c"mmap");
static MUNMAP: Real = Real::new(c"munmap");
static MREMAP: Real = Real::new(c"mremap");
static MADVISE: Real = Real::new(c"madvise");
static FALLOCATE: Real = Real::new(c"fallocate");

/// libc's `mmap`.
///
/// # Safety
/// As `mmap(2)`.
pub(crate) unsafe fn real_mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the symbol has this type, and the caller answers for the arguments.
    unsafe {
        let real: Mmap = std::mem::transmute(MMAP.get());
        real(address, length, protection, flags, descriptor, offset)
    }
}

/// libc's `madvise`.
///
/// # Safety
/// As `madvise(2)`.
pub(crate) unsafe fn real_madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    // SAFETY: as above.
    unsafe {
        let real: Madvise = std::mem::transmute(MADVISE.get());
        real(address, length, advice)
    }
}

/// Whether a mapping asked for is one of our file.
fn ours(flags: c_int, descriptor: c_int) -> Option<&'static settings::Settings> {
    if descriptor < 0 || flags & libc::MAP_ANONYMOUS != 0 {
        return None;
    }
    let settings = settings::get()?;
    // SAFETY: borrowed for one fstat; a number that is no descriptor gives EBADF, so "not ours".
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    settings.is_file(descriptor).then_some(settings)
}

fn fail(errno: c_int) {
    // SAFETY: errno's location is valid for the calling thread.
    unsafe { *libc::__errno_location() = errno };
}

/// Replaces libc's.
///
/// # Safety
/// As `mmap(2)`.
#[no_mangle]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: off_t,
) -> *mut c_void {
    let Some(settings) = ours(flags, descriptor) else {
        // SAFETY: the caller's own call.
        let pass_on =
            || unsafe { real_mmap(address, length, protection, flags, descriptor, offset) };
        if flags & libc::MAP_FIXED == 0 || !region::any() {
            return pass_on();
        }
        let mut mapped = libc::MAP_FAILED;
        region::replacing(address as u64, length as u64, || {
            mapped = pass_on();
            mapped != libc::MAP_FAILED
        });
        return mapped;
    };
    let wanted = region::Wanted { address, length, protection, flags, offset: offset as u64 };
    match region::map(settings, &wanted) {
        Ok(mapped) => mapped,
        Err(refusal) => {
            crate::say(&format!("{} cannot be mapped: {}", settings.file.display(), refusal.text));
            fail(refusal.errno);
            libc::MAP_FAILED
        }
    }
}

/// The same under its other name: `off_t` has 64 bits on every system that is served.
///
/// # Safety
/// As `mmap(2)`.
#[no_mangle]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's own call.
    unsafe { mmap(address, length, protection, flags, descriptor, offset) }
}

/// Replaces libc's.
///
/// # Safety
/// As `munmap(2)`.
#[no_mangle]
pub unsafe extern "C" fn munmap(address: *mut c_void, length: size_t) -> c_int {
    // SAFETY: the symbol has this type; the caller's own call.
    let pass_on = || unsafe {
        let real: Munmap = std::mem::transmute(MUNMAP.get());
        real(address, length)
    };
    if !region::any() {
        return pass_on();
    }
    let mut outcome = -1;
    region::replacing(address as u64, length as u64, || {
        outcome = pass_on();
        outcome == 0
    });
    outcome
}

/// Replaces libc's, whose last argument is there with MREMAP_FIXED only; read without, it is any
/// value, and passed on as such.
///
/// # Safety
/// As `mremap(2)`.
#[no_mangle]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    old_length: size_t,
    new_length: size_t,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    // SAFETY: the symbol has this type as far as registers go; the caller's own call.
    let pass_on = || unsafe {
        let real: Mremap = std::mem::transmute(MREMAP.get());
        real(address, old_length, new_length, flags, new_address)
    };
    if !region::any() {
        return pass_on();
    }
    let wanted = region::Move {
        from: address as u64,
        old_length: old_length as u64,
        new_length: new_length as u64,
        flags,
    };
    let mut moved = libc::MAP_FAILED;
    let outcome = region::moving(&wanted, || {
        moved = pass_on();
        (moved != libc::MAP_FAILED).then_some(moved as u64)
    });
    if let Err(errno) = outcome {
        fail(errno);
    }
    moved
}

/// Replaces libc's.
///
/// # Safety
/// As `madvise(2)`.
#[no_mangle]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    if region::any() {
        match region::advise(address as u64, length as u64, advice) {
            region::Advised::PassOn => {}
            region::Advised::Done => return 0,
            region::Advised::Refused(errno) => {
                fail(errno);
                return -1;
            }
        }
    }
    // SAFETY: the caller's own call.
    unsafe { real_madvise(address, length, advice) }
}

/// Replaces libc's: notes holes that the program punches into its file.
///
/// # Safety
/// As `fallocate(2)`.
#[no_mangle]
pub unsafe extern "C" fn fallocate(
    descriptor: c_int,
    mode: c_int,
    offset: off_t,
    length: off_t,
) -> c_int {
    // SAFETY: the symbol has this type; the caller's own call.
    let outcome = unsafe {
        let real: Fallocate = std::mem::transmute(FALLOCATE.get());
        real(descriptor, mode, offset, length)
    };
    let punched = outcome == 0 && mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
    if punched && region::any() && ours(0, descriptor).is_some() {
        region::punched(offset as u64, length as u64);
    }
    outcome
}

/// The same under its other name.
///
/// # Safety
/// As `fallocate(2)`.
#[no_mangle]
pub unsafe extern "C" fn fallocate64(
    descriptor: c_int,
    mode: c_int,
    offset: off_t,
    length: off_t,
) -> c_int {
    // SAFETY: the caller's own call.
    unsafe { fallocate(descriptor, mode, offset, length) }
}
