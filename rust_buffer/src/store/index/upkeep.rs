//! How the index follows a record: what it changes is taken out as it was, and put back as it is afterwards.

use std::{
    collections::BTreeSet,
    ops::Bound::{Excluded, Unbounded},
};

use super::Index;
use crate::{error::Result, state::State, state::group::Group, state::record::Record, store::lease::Leases};

/// What was taken out of the index for one record.
pub(crate) struct TakenOut {
    trajectories: BTreeSet<u64>,
    groups: BTreeSet<u64>,
    /// Request ids of the groups that the record may remove.
    leaving: Vec<(String, u64)>,
    /// First ids of what the record may admit.
    next_group: u64,
    next_trajectory: u64,
}

impl Index {
    /// Takes out what `record`, which `state` does not have yet, changes.
    ///
    /// # Errors
    /// `Conflict` when the state contradicts itself.
    pub(crate) fn take_out(&mut self, state: &State, leases: &Leases, record: &Record) -> Result<TakenOut> {
        let (trajectories, groups) = touched(state, record);
        for id in &trajectories {
            self.remove(state, *id, leases.contains(*id))?;
        }
        for id in &groups {
            self.remove_group(*id);
        }
        // Most records remove no group, and claims of many groups should not look up their names.
        let leaving = match record {
            Record::Score(_) | Record::Evict(..) | Record::Drop(_) => requests_of(state, groups.iter().copied()),
            _ => Vec::new(),
        };
        let (next_group, next_trajectory) = (state.next_group, state.next_trajectory);
        Ok(TakenOut { trajectories, groups, leaving, next_group, next_trajectory })
    }

    /// Puts back what `take_out` took, and what the record admitted, as `state` has it now.
    ///
    /// # Errors
    /// `Conflict` when the state contradicts itself.
    pub(crate) fn put_back(&mut self, state: &State, leases: &Leases, taken: TakenOut) -> Result<()> {
        for (request, id) in &taken.leaving {
            if !state.groups.contains_key(id) {
                self.requests.remove(request);
            }
        }
        let admitted = taken.next_group..state.next_group;
        self.requests.extend(requests_of(state, admitted.clone()));
        for id in taken.groups.into_iter().chain(admitted) {
            self.add_group(state, id);
        }
        let admitted = taken.next_trajectory..state.next_trajectory;
        taken.trajectories.into_iter().chain(admitted).try_for_each(|id| self.add(state, id, leases.contains(id)))
    }
}

/// The trajectories and groups whose places `record` changes.
fn touched(state: &State, record: &Record) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let members = |ids: &BTreeSet<u64>| -> BTreeSet<u64> {
        ids.iter().filter_map(|id| state.groups.get(id)).flat_map(Group::members).collect()
    };
    let claimed = |iterations: &mut dyn Iterator<Item = &i64>| -> BTreeSet<u64> {
        iterations.filter_map(|i| state.claims.get(i)).flat_map(|claim| claim.groups.clone()).collect()
    };
    let none = BTreeSet::new();
    match record {
        // What lies elsewhere has its places as before.
        Record::Quota(..)
        | Record::Admit(_)
        | Record::Commit(_)
        | Record::Lease(_)
        | Record::Restore(..)
        // An annotation is followed by `Index::annotated`.
        | Record::Annotate(_)
        | Record::Fork(..)
        | Record::Turn(..)
        | Record::Plan(..)
        | Record::Compact(_)
        | Record::Move(_) => (none.clone(), none),
        Record::Append(items) => (items.iter().map(|item| item.trajectory).collect(), none),
        Record::Score(score) => {
            let group = state.trajectories.get(&score.trajectory).map(|trajectory| trajectory.group);
            (BTreeSet::from([score.trajectory]), group.into_iter().collect())
        }
        Record::Publish(_, iteration, _) => (none, claimed(&mut iteration.iter())),
        Record::Claim(claim) => (none, claim.groups.iter().copied().collect()),
        Record::Evict(groups, _) | Record::Late(groups) => {
            let groups: BTreeSet<u64> = groups.iter().copied().collect();
            (members(&groups), groups)
        }
        Record::Uncommit(iteration) => {
            (none, claimed(&mut state.claims.range((Excluded(*iteration), Unbounded)).map(|(iteration, _)| iteration)))
        }
        Record::Drop(iteration) => {
            (none, claimed(&mut state.claims.range(..=iteration).map(|(iteration, _)| iteration)))
        }
    }
}

/// Request ids of those of `groups` that there are.
fn requests_of(state: &State, groups: impl IntoIterator<Item = u64>) -> Vec<(String, u64)> {
    let named = |id| state.groups.get(&id).map(|group| (group.request_id.clone(), id));
    groups.into_iter().filter_map(named).collect()
}
