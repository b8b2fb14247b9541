//! What cannot be had, and why, where everybody can read it who needs to know.
//!
//! - A thread that touches a lost page gets SIGBUS, and its handler wants to say why. It may take no
//!   lock and no memory, so the last reasons stand in a page of fixed records, read as a sequence lock
//!   is: a record that was written meanwhile is no record.
//! - The process that serves knows the reason; its children meet the page too. So that page is shared
//!   memory, which children inherit.
//! - Reading through [`super::Map`] asks the source again. When the page comes then, what was put in
//!   its place has to go: that needs a full list, which only the process that serves keeps.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{fence, AtomicU64, AtomicU8, AtomicUsize, Ordering::*};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{mmap_anonymous, munmap, MapFlags, ProtFlags};

use crate::error::{Error, Result};
use crate::page::PAGE;

/// Bytes of a reason that are kept.
pub(super) const LONGEST: usize = 246;

/// A page and why it cannot be had.
#[repr(C)]
struct Record {
    /// The page's number and 1; 0 while there is none.
    page: AtomicU64,
    class: AtomicU8,
    length: AtomicU8,
    text: [AtomicU8; LONGEST],
}

const RECORDS: usize = PAGE as usize / size_of::<Record>();
const _: () = assert!(size_of::<Record>() == 256);

/// What a reason was, before it was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Unavailable,
    Missing,
    Integrity,
    Kernel,
    Callback,
    Timeout,
}

impl Class {
    const ALL: [Class; 6] = [
        Class::Unavailable,
        Class::Missing,
        Class::Integrity,
        Class::Kernel,
        Class::Callback,
        Class::Timeout,
    ];

    fn of(error: &Error) -> Class {
        match error {
            Error::Missing { .. } => Class::Missing,
            Error::Integrity { .. } => Class::Integrity,
            Error::Kernel { .. } => Class::Kernel,
            Error::Callback { .. } => Class::Callback,
            Error::Timeout { .. } => Class::Timeout,
            _ => Class::Unavailable,
        }
    }
}

/// A reason, as it was written down.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reason {
    class: Class,
    length: usize,
    bytes: [u8; LONGEST],
}

impl Reason {
    pub(super) fn text(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// The error again, of `page`.
    pub(super) fn error(&self, page: u64) -> Error {
        let text = String::from_utf8_lossy(self.text()).into_owned();
        let what = format!("page {page} cannot be had");
        match self.class {
            Class::Unavailable => Error::Unavailable { what, error: std::io::Error::other(text) },
            Class::Missing => Error::Missing { what, error: std::io::Error::other(text) },
            Class::Integrity => Error::Integrity { message: format!("{what}: {text}") },
            Class::Callback => Error::Callback {
                message: format!("{what}: {text}"),
                traceback: String::new(),
                pickled: Vec::new(),
            },
            Class::Timeout => {
                Error::Timeout { message: format!("{what}: {text}"), hint: String::new() }
            }
            Class::Kernel => Error::Kernel { what, error: std::io::Error::other(text) },
        }
    }
}

/// What stands in the place of a lost page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stand {
    /// A mark of the kernel.
    Poison,
    /// A mapping of nothing.
    Nothing,
}

/// What cannot be had of one map.
pub(super) struct Losses {
    records: NonNull<Record>,
    next: AtomicUsize,
    /// Lost in the process that serves.
    lost: Mutex<BTreeMap<u64, Stand>>,
    ever: AtomicU64,
}

impl std::fmt::Debug for Losses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Losses({:?})", self.lock())
    }
}

// SAFETY: the records are a shared mapping of atomics that this value owns.
unsafe impl Send for Losses {}
// SAFETY: as above.
unsafe impl Sync for Losses {}

impl Losses {
    pub(super) fn new() -> Result<Losses> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), PAGE as usize, protection, MapFlags::SHARED)
        };
        let page = page.map_err(|errno| Error::kernel("no page for a map's losses", errno))?;
        let records = NonNull::new(page.cast()).expect("the kernel maps nothing at address 0");
        Ok(Losses {
            records,
            next: AtomicUsize::new(0),
            lost: Mutex::default(),
            ever: AtomicU64::new(0),
        })
    }

    fn records(&self) -> &[Record] {
        // SAFETY: mapped for as long as self, initialised to zero, and nothing but atomics.
        unsafe { std::slice::from_raw_parts(self.records.as_ptr(), RECORDS) }
    }

    /// Writes down why `page` cannot be had; then `put` puts something in its place, if it does.
    pub(super) fn lose(&self, page: u64, error: &Error, put: impl FnOnce() -> Option<Stand>) {
        // Held until it is known what stands there: who mends must not come in between. And one writes
        // at a time; readers of a record that is overwritten meanwhile find out.
        let mut lost = self.lock();
        self.note(page, error);
        if let Some(stand) = put() {
            lost.insert(page, stand);
        }
    }

    fn note(&self, page: u64, error: &Error) {
        self.ever.fetch_add(1, Relaxed);
        let record = &self.records()[self.next.fetch_add(1, Relaxed) % RECORDS];
        let text = error.to_string();
        let bytes = &text.as_bytes()[..text.len().min(LONGEST)];
        record.page.store(0, Relaxed);
        fence(Release);
        record.class.store(Class::of(error) as u8, Relaxed);
        record.length.store(bytes.len() as u8, Relaxed);
        record.text.iter().zip(bytes).for_each(|(to, byte)| to.store(*byte, Relaxed));
        record.page.store(page + 1, Release);
    }

    /// Why `page` cannot be had, if that is still known. Takes neither locks nor memory.
    pub(super) fn reason(&self, page: u64) -> Option<Reason> {
        // The latest of several.
        let next = self.next.load(Relaxed);
        (1..=RECORDS)
            .map(|back| &self.records()[next.wrapping_sub(back) % RECORDS])
            .find_map(|record| record.read(page))
    }

    /// How many pages are lost now.
    pub(super) fn len(&self) -> usize {
        self.lock().len()
    }

    /// How often something could not be had.
    pub(super) fn ever(&self) -> u64 {
        self.ever.load(Relaxed)
    }

    /// Gives back the pages from `start` to `end` that can be had again: `mend` removes what stands in
    /// the place of one.
    pub(super) fn mend(
        &self,
        start: u64,
        end: u64,
        mut mend: impl FnMut(u64, Stand) -> Result<()>,
    ) -> Result<()> {
        // Held meanwhile: who mends a page twice would throw away what was written to it in between.
        let mut lost = self.lock();
        let pages: Vec<(u64, Stand)> =
            lost.range(start..end).map(|(page, stand)| (*page, *stand)).collect();
        for (page, stand) in pages {
            mend(page, stand)?;
            lost.remove(&page);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Stand>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Record {
    fn read(&self, page: u64) -> Option<Reason> {
        if self.page.load(Acquire) != page + 1 {
            return None;
        }
        let class = *Class::ALL.get(usize::from(self.class.load(Relaxed)))?;
        let length = usize::from(self.length.load(Relaxed)).min(LONGEST);
        let bytes = std::array::from_fn(|at| self.text[at].load(Relaxed));
        fence(Acquire);
        (self.page.load(Relaxed) == page + 1).then_some(Reason { class, length, bytes })
    }
}

impl Drop for Losses {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and borrowed by nobody any more. (Children never drop theirs.)
        let _ = unsafe { munmap(self.records.as_ptr().cast(), PAGE as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_reasons_are_kept_and_keep_their_class() {
        let losses = Losses::new().unwrap();
        assert!(losses.reason(0).is_none());
        for page in 0..RECORDS as u64 + 1 {
            losses.lose(page, &Error::Integrity { message: format!("damage {page}") }, || None);
        }
        assert!(losses.reason(0).is_none(), "the oldest made room");
        assert_eq!(losses.reason(1).unwrap().text(), b"damage 1");
        let what = "x".repeat(300);
        let error = Error::Unavailable { what, error: std::io::Error::other("") };
        losses.lose(7, &error, || None);
        let reason = losses.reason(7).unwrap();
        assert_eq!(reason.text(), [b'x'; LONGEST]);
        assert!(
            matches!(reason.error(7), Error::Unavailable { what, .. } if what.contains("page 7"))
        );
        assert!(matches!(losses.reason(8).unwrap().error(8), Error::Integrity { .. }));
        assert_eq!(losses.ever(), RECORDS as u64 + 2);
    }

    #[test]
    fn what_is_mended_is_lost_no_more() {
        let losses = Losses::new().unwrap();
        let error = Error::Integrity { message: "gone".to_owned() };
        losses.lose(3, &error, || Some(Stand::Poison));
        losses.lose(9, &error, || Some(Stand::Nothing));
        losses.lose(4, &error, || None);
        let mut mended = Vec::new();
        let mut mend = |page, stand| {
            mended.push((page, stand));
            Ok(())
        };
        losses.mend(0, 5, &mut mend).unwrap();
        losses.mend(0, 5, &mut mend).unwrap();
        assert_eq!(mended, [(3, Stand::Poison)]);
        assert_eq!(losses.len(), 1);
    }
}
