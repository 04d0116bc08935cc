//! Names and numbers of Python as values of the core; what cannot be one is a `ValueError` that says what can.

use std::collections::BTreeMap;

use pyo3::{exceptions::PyValueError, prelude::*};

use crate::{
    clock::{Micros, micros},
    state::group::Kind,
    state::record::LeftOut,
    state::trajectory::{Outcome, Stop},
};

/// States of trajectories, then of groups.
const STATES: [&str; 11] =
    ["leased", "idle", "unscored", "scored", "failed", "late", "partial", "ready", "claimed", "trained", "committed"];

/// The one of `known` whose name is `value`.
pub fn choose<T: Copy>(what: &str, value: &str, known: &[(&str, T)]) -> PyResult<T> {
    known.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("{what} is {value:?}; choose one of {}", names.join(", ")))
    })
}

/// A span of time.
pub fn seconds(what: &str, value: f64) -> PyResult<f64> {
    if value.is_nan() || value < 0.0 {
        return Err(PyValueError::new_err(format!("{what} is {value}; it must be a number of seconds >= 0")));
    }
    Ok(value)
}

/// The same as ticks of the store's clock.
pub fn ticks(what: &str, value: f64) -> PyResult<Micros> {
    seconds(what, value).map(micros)
}

pub fn kind(name: &str) -> PyResult<Kind> {
    choose("kind", name, &[("train", Kind::Train), ("eval", Kind::Eval)])
}

pub fn outcome(name: &str) -> PyResult<Outcome> {
    let known = [("scored", Outcome::Scored), ("invalid", Outcome::Invalid), ("infra_failure", Outcome::InfraFailure)];
    choose("outcome", name, &known)
}

/// Whether `name` is that of a trajectory's or group's state.
pub fn state(name: &str) -> PyResult<()> {
    choose("state", name, &STATES.map(|name| (name, ())))
}

/// The `pmdflow.types.Stop` of this number.
pub fn stop(number: u8) -> PyResult<Stop> {
    Stop::numbered(number)
        .map_err(|_| PyValueError::new_err(format!("stop is {number}; choose one of pmdflow.types.Stop")))
}

/// Trajectories by the reason for which the learner left them out.
pub fn left_out(by_reason: &BTreeMap<String, Vec<u64>>) -> PyResult<LeftOut> {
    if let Some(reason) = by_reason.keys().find(|reason| !matches!(reason.as_str(), "filter" | "veto")) {
        return Err(PyValueError::new_err(format!("left_out has the reason {reason:?}; choose one of filter, veto")));
    }
    let ids = |reason| by_reason.get(reason).into_iter().flatten().copied().collect();
    Ok(LeftOut { filter: ids("filter"), veto: ids("veto") })
}
