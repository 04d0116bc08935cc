//! What callers get together with arrays: leases, unscored trajectories, groups, single trajectories.
//!
//! The store says what there is and where the arrays lie; these are read without holding it.

use std::collections::BTreeMap;

use crate::{
    clock::Micros,
    error::Result,
    state::State,
    state::group::Group,
    state::trajectory::{Trajectory, Verdict, Version},
    store::Store,
    store::arrays::{Extra, StoredPrompt, Tokens, read_extras, read_prompt, read_runs},
    store::rollout::Granted,
    store::shared::{Clock, Shared},
};

/// A lease with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct LeaseView {
    pub granted: Granted,
    pub prompt: StoredPrompt,
    /// Durable tokens so far.
    pub prefix: Tokens,
}

/// A complete trajectory that awaits its verdict, with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct UnscoredView {
    pub id: u64,
    pub trajectory: Trajectory,
    pub group: Group,
    pub prompt: StoredPrompt,
    pub tokens: Tokens,
}

/// A group with its prompt.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct GroupView {
    pub id: u64,
    pub group: Group,
    /// Name of its state.
    pub state: &'static str,
    /// The one that claimed it.
    pub iteration: Option<i64>,
    pub prompt: StoredPrompt,
}

/// A trajectory with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct TrajectoryView {
    pub id: u64,
    pub trajectory: Trajectory,
    /// Name of its state.
    pub state: &'static str,
    /// None without one.
    pub reward: Option<f64>,
    /// Of the reward, by name.
    pub components: BTreeMap<String, f64>,
    pub prompt: StoredPrompt,
    pub tokens: Tokens,
    /// Columns by name, one entry for each stored run that has the column.
    pub extras: BTreeMap<String, Vec<Extra>>,
}

impl Shared {
    /// Leases up to `max_leases` trajectories to a worker at `version`; waits for the first one, and gives none after
    /// `timeout_s`.
    ///
    /// # Errors
    /// Those of `Store::lease` and of the log, or `Closed`.
    pub fn lease(
        &self, worker: &str, version: Version, max_leases: usize, timeout_s: f64, clock: Clock,
    ) -> Result<Vec<LeaseView>> {
        let granted =
            self.wait(timeout_s, clock, |store, now| store.lease(worker, version, max_leases, now).map(some))?;
        let read = |granted: Granted| {
            let prompt = read_prompt(self.log(), granted.prompt)?;
            let prefix = read_runs(self.log(), &granted.runs)?;
            Ok(LeaseView { granted, prompt, prefix })
        };
        granted.into_iter().flat_map(|(_, granted)| granted).map(read).collect()
    }

    /// Hands out up to `max_items` complete trajectories without a verdict for `ttl`; waits for the first one, and gives
    /// none after `timeout_s`.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn unscored(&self, max_items: usize, ttl: Micros, timeout_s: f64, clock: Clock) -> Result<Vec<UnscoredView>> {
        let waiting = self.wait(timeout_s, clock, |store, now| {
            let ids = store.unscored(max_items, ttl, now);
            ids.into_iter().map(|id| with_group(store.state(), id)).collect::<Result<_>>().map(some)
        })?;
        let read = |(id, trajectory, group): (u64, Trajectory, Group)| {
            let prompt = read_prompt(self.log(), group.location)?;
            let tokens = read_runs(self.log(), &trajectory.runs)?;
            Ok(UnscoredView { id, trajectory, group, prompt, tokens })
        };
        waiting.into_iter().flat_map(|(_, waiting)| waiting).map(read).collect()
    }

    /// Live groups, those whose state has the name `state` if one is given.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn groups(&self, state: Option<&str>) -> Result<Vec<GroupView>> {
        // All within the query, so that no file with a prompt is deleted meanwhile.
        self.query(|store: &Store| {
            let named = store.state().groups.iter().map(|(id, group)| (*id, group, store.phase_of(group)));
            let wanted = named.filter(|(_, _, (name, _))| state.is_none_or(|state| state == *name));
            let read = wanted.map(|(id, group, (state, iteration))| {
                let prompt = read_prompt(store.log(), group.location)?;
                Ok(GroupView { id, group: group.clone(), state, iteration, prompt })
            });
            read.collect()
        })
    }

    /// One live trajectory.
    ///
    /// # Errors
    /// `Conflict` when it is not there, those of the log, or `Closed`.
    pub fn trajectory(&self, id: u64) -> Result<TrajectoryView> {
        let (trajectory, group, state, (reward, components)) = self.query(|store| {
            let (id, trajectory, group) = with_group(store.state(), id)?;
            let (state, verdict) = (store.state_of(id, &trajectory), verdict(store.state(), &trajectory));
            Ok((trajectory, group, state, verdict))
        })?;
        let prompt = read_prompt(self.log(), group.location)?;
        let tokens = read_runs(self.log(), &trajectory.runs)?;
        let extras = read_extras(self.log(), &trajectory.runs)?;
        Ok(TrajectoryView { id, trajectory, state, reward, components, prompt, tokens, extras })
    }
}

/// An answer to a wait: none while it is empty.
fn some<T>(items: Vec<T>) -> Option<Vec<T>> {
    Some(items).filter(|items| !items.is_empty())
}

fn with_group(state: &State, id: u64) -> Result<(u64, Trajectory, Group)> {
    let trajectory = state.trajectory(id)?.clone();
    let group = state.group(trajectory.group)?.clone();
    Ok((id, trajectory, group))
}

fn verdict(state: &State, trajectory: &Trajectory) -> (Option<f64>, BTreeMap<String, f64>) {
    match &trajectory.verdict {
        Verdict::Scored { reward, components, .. } => (Some(*reward), state.components(components)),
        _ => (None, BTreeMap::new()),
    }
}
