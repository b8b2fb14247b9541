//! The Linux userfaultfd interface, usable alone.
//!
//! A userfaultfd is tied to the address space (mm) of the process that created it, whoever holds
//! the descriptor: every operation below acts on *that* process's memory. So a server may
//! negotiate, resolve and even register on behalf of a target that only created the descriptor and
//! handed it over; that is how an unprivileged target gets `EVENT_FORK` (the right to it is checked
//! on the caller of the handshake).
//!
//! | room | what |
//! |---|---|
//! | [`abi`] | numbers and structures, as the kernel lays them out |
//! | [`FEATURES`] | the one table of what userfaultfd can do; unknown newer bits are kept, never an error |
//! | [`Support`] | which of it this machine has, for this process |
//! | [`Userfaultfd`] | the descriptor: open, handshake, register |
//! | [`Progress`], [`How`] | resolving: copy, zeropage, continue, move, poison, protect, wake |
//! | [`Event`] | what a userfaultfd tells |
//! | [`Pagemap`] | what is true of a process's pages; finding those that were written |
//! | [`passing`] | sending descriptors between processes |
//! | [`Heir`] | what becomes of a process whose handler, another process, ends |
//! | [`stall`] | noticing that a handler waits for a lock of the thread whose fault it should handle |
//!
//! Kernel facts are cited as observed on Linux 6.18; where a manual page says otherwise, the
//! observation is what the code follows.

pub mod abi;
mod bits;
mod descriptor;
mod event;
mod features;
mod heir;
mod pagemap;
pub mod passing;
mod resolve;
pub mod stall;
mod support;
mod threads;

pub use abi::PageRegion;
pub use descriptor::{
    handshake_needed, negotiated, open_device, Access, Opening, Operations, RegisterMode,
    Userfaultfd, DEVICE,
};
pub use event::{Cause, Event, Events, MessageBuffer};
pub use features::{Feature, Features, Probe, FEATURES};
pub use heir::{Heir, Ranges};
pub use pagemap::{Categories, Entry, Pagemap, Scan};
pub use resolve::{How, Progress};
pub use rustix::io::Errno;
pub use support::{filtered, State, Support};
