//! The trajectory store of pmdflow: the life of a trajectory on an append-only, CRC-framed log.
//!
//! The core is pure: it takes its clock as an argument and knows nothing of Python, which `python` alone names.

pub mod clock;
pub mod error;
pub mod log;
pub mod pack;
#[cfg(feature = "extension-module")]
mod python;
pub mod state;
pub mod store;
pub mod wire;
