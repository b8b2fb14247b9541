//! The engine of pagekit: a frozen sandbox's memory, served page by page to any number of forks.
//!
//! | room | what | may know |
//! |---|---|---|
//! | [`page`], [`page_set`], [`error`], [`thread`] | pages, runs, sets of pages, errors, threads | nothing of ours |
//! | [`process`] | which process this is, after a fork | error |
//! | [`source`], [`layer`] | where bytes come from; what wraps them | page, error, thread, process |
//! | [`stack`] | spec strings into stacks; names every source and layer | source, layer |
//! | [`working_set`] | pages demanded before "ready": recording, union, file | page, source |
//! | [`delivery`] | what userfaultfd can do for this process | `uffd` |
//! | [`template`] | a stack, its shared page cache, fetches in flight, replay | stack, delivery, working_set |
//! | [`backend`] | how bytes get into a target | template |
//! | [`engine`] | the event loop, targets, regions, outcomes | backend, template |
//! | [`wire`] | messages between client and server, bytes ↔ values | page |
//! | [`door`] | the Unix sockets at which clients come in, and who may | error |
//! | [`client`] | what brings targets: the shim's handshake | engine, wire |
//! | [`map`] | memory of this process that fills itself | engine, delivery, process |
//! | [`relay`] | a second handler in another process gets faults and events | engine, wire, door |
//! | [`server`] | a template, an engine and a socket together | everything above |
//!
//! ARCHITECTURE.md tells the life of one fault; `tests/test_tree.py` checks this table.

pub mod backend;
pub mod client;
pub mod delivery;
pub mod door;
pub mod engine;
pub mod error;
pub mod layer;
pub mod map;
pub mod page;
pub mod page_set;
pub mod process;
pub mod relay;
pub mod server;
pub mod source;
pub mod stack;
pub mod template;
pub mod thread;
pub mod wire;
pub mod working_set;
