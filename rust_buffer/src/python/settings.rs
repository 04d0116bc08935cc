//! The settings of a store as Python gives them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use pyo3::{exceptions::PyValueError, prelude::*};

use super::parse::{choose, seconds, ticks};
use crate::{
    error::Result,
    log::{Disk, Durability, Memory, Storage},
    state::group::{Signal, Straggler},
    state::record::SegmentLoss,
    state::successes::Averaging,
    store::shared::Shared,
    store::{Settings, Store},
};

/// Longest interval between two syncs.
const MAX_SYNC_INTERVAL_S: f64 = 3600.0;

/// Longest log file.
const MAX_FILE_BYTES: u64 = 1 << 40;

/// The keyword arguments of `TrajectoryStore`; `pmdflow/store/settings.py` documents them.
pub struct Given<'a> {
    pub groups_per_iteration: usize,
    pub lookahead: u32,
    pub max_staleness: Option<u32>,
    pub segment_loss: &'a str,
    pub window: Option<u64>,
    /// Open interval of mean rewards.
    pub signal: Option<(Option<f64>, Option<f64>)>,
    /// Decay, and least reward of a success.
    pub successes: Option<(f64, f64)>,
    pub min_group_size: u32,
    pub one_version: bool,
    /// Members, and seconds to wait for the others.
    pub straggler: Option<(u32, f64)>,
    pub max_attempts: u32,
    pub lease_ttl_s: f64,
    pub grant_tokens: u32,
    pub durability: &'a str,
    pub max_bytes: Option<u64>,
    pub file_bytes: u64,
    pub sync_interval_s: f64,
}

impl TryFrom<Given<'_>> for Settings {
    type Error = PyErr;

    fn try_from(given: Given<'_>) -> PyResult<Self> {
        if given.groups_per_iteration == 0 || given.max_attempts == 0 || given.grant_tokens == 0 {
            return Err(PyValueError::new_err("groups_per_iteration, max_attempts and grant_tokens must be >= 1"));
        }
        if !(1..=MAX_FILE_BYTES).contains(&given.file_bytes) {
            let detail = format!("file_bytes is {}; give 1 to {MAX_FILE_BYTES}", given.file_bytes);
            return Err(PyValueError::new_err(detail));
        }
        if let Some(window) = given.window.filter(|window| *window < given.groups_per_iteration as u64) {
            return Err(PyValueError::new_err(format!(
                "window is {window}, below groups_per_iteration ({}): no claim could be whole",
                given.groups_per_iteration
            )));
        }
        let losses = [("all", SegmentLoss::All), ("current_only", SegmentLoss::CurrentOnly)];
        let levels = [("os", Durability::Os), ("group", Durability::Group), ("always", Durability::Always)];
        let sync_interval_s = seconds("sync_interval_s", given.sync_interval_s)?.min(MAX_SYNC_INTERVAL_S);
        Ok(Self {
            groups_per_iteration: given.groups_per_iteration,
            lookahead: given.lookahead,
            max_staleness: given.max_staleness,
            segment_loss: choose("segment_loss", given.segment_loss, &losses)?,
            window: given.window,
            signal: given.signal.map(|(above, below)| Signal { above, below }),
            successes: given.successes.map(averaging).transpose()?,
            min_group_size: given.min_group_size,
            one_version: given.one_version,
            straggler: given.straggler.map(|rule| straggler(rule, given.min_group_size)).transpose()?,
            max_attempts: given.max_attempts,
            lease_ttl: ticks("lease_ttl_s", given.lease_ttl_s)?,
            grant_tokens: given.grant_tokens,
            durability: choose("durability", given.durability, &levels)?,
            max_bytes: given.max_bytes,
            file_bytes: given.file_bytes,
            sync_interval: Duration::from_secs_f64(sync_interval_s),
        })
    }
}

fn straggler((members, wait_s): (u32, f64), min_group_size: u32) -> PyResult<Straggler> {
    if members < min_group_size.max(1) {
        return Err(PyValueError::new_err(format!(
            "straggler has {members} members, min_group_size is {min_group_size}; wait for at least these"
        )));
    }
    Ok(Straggler { members, wait: ticks("the wait of straggler", wait_s)? })
}

fn averaging((decay, success_reward): (f64, f64)) -> PyResult<Averaging> {
    if !(0.0..1.0).contains(&decay) || !success_reward.is_finite() {
        return Err(PyValueError::new_err(format!(
            "successes is ({decay}, {success_reward}): the decay is at least 0 and below 1, the reward finite"
        )));
    }
    Ok(Averaging { decay, success_reward })
}

/// Opens a store: on disk, or in memory without a path.
pub fn open(path: Option<PathBuf>, settings: Settings, read_only: bool, scorers: Vec<String>) -> Result<Arc<Shared>> {
    let on_disk = path.is_some();
    let storage: Arc<dyn Storage> = match path {
        Some(path) if read_only => Arc::new(Disk::existing(&path)),
        Some(path) => Arc::new(Disk::new(&path)?),
        None => Arc::new(Memory::default()),
    };
    let mut store = if read_only { Store::read(&storage, settings)? } else { Store::open(storage, settings)? };
    store.expect(scorers)?;
    let shared = Arc::new(Shared::new(store));
    if on_disk && !read_only {
        shared.keep_compact();
    }
    Ok(shared)
}
