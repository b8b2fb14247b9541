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
//! | [`Features`] | feature bits by name; unknown newer bits are kept, never an error |
//! | [`Userfaultfd`] | the descriptor: handshake, register, resolve, read events |
//! | [`Progress`] | what a resolve did: bytes done *and* the errno that stopped it |
//! | [`passing`] | sending descriptors between processes |
//!
//! Kernel facts are cited as observed on Linux 6.18; where a manual page says otherwise, the
//! observation is what the code follows.

pub mod abi;
mod descriptor;
mod features;
pub mod passing;

pub use descriptor::{
    handshake_needed, negotiated, open_device, Access, Event, Events, MessageBuffer, Opening,
    Progress, RegisterMode, Userfaultfd, DEVICE,
};
pub use features::Features;
pub use rustix::io::Errno;
