//! The trajectory store of pmdflow: the life of a trajectory on an append-only, CRC-framed log.
//!
//! The core is pure: it takes its clock as an argument and knows nothing of Python, which `python` alone names.

mod apply;
pub mod batch;
pub mod check;
pub mod claims;
pub mod error;
pub mod group;
pub mod late;
pub mod lease;
pub mod ledger;
pub mod log;
pub mod order;
pub mod pack;
#[cfg(feature = "extension-module")]
mod python;
pub mod query;
pub mod record;
pub mod rollout;
pub mod shared;
mod snapshot;
pub mod state;
pub mod store;
pub mod trajectory;
pub mod view;
pub mod wire;
