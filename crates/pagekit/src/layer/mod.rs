//! Layers: sources that wrap the `next` one. One file each.
//!
//! A layer forwards what it does not change. [`pass`] changes nothing: start a new layer from it.
//!
//! | piece | what |
//! |---|---|
//! | [`pass`] | nothing: the do-nothing example |
//! | [`stats`] | counts reads, bytes and time |
//! | [`delay`] | takes as long as a store far away |
//! | [`fail`] | makes reads fail on purpose |

use std::sync::Arc;

use crate::source::Source;

pub mod delay;
pub mod fail;
pub mod pass;
pub mod stats;

/// The piece below a layer.
pub type Next = Arc<dyn Source>;
