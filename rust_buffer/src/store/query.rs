//! Queries over stored trajectories: ids and scalars, page by page.

use crate::{
    state::group::{Group, Kind},
    state::trajectory::{Stop, Trajectory, Version},
    store::Store,
};

/// Trajectories or groups that one page looks at, so that a query never holds the store for long.
const SCANNED: usize = 2048;

/// Inclusive bounds; None is unbounded.
pub type Bounds<T> = (Option<T>, Option<T>);

/// What a query selects: everything that is set must hold.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Filter {
    /// Claimed by this iteration.
    pub iteration: Option<i64>,
    /// Some token is of a policy version within the bounds.
    pub version: Bounds<Version>,
    /// Scored, with a reward within the bounds.
    pub reward: Bounds<f64>,
    /// Generated tokens.
    pub length: Bounds<u32>,
    /// Why it ended; `Stop::None`: it did not.
    pub stop: Option<Stop>,
    pub prompt_id: Option<String>,
    pub group: Option<u64>,
    pub kind: Option<Kind>,
    /// Name of its own state or of its group's; the two sets of names are disjoint.
    pub state: Option<String>,
}

/// One selected trajectory.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Selected {
    pub trajectory: u64,
    pub group: u64,
    pub prompt_id: String,
    pub kind: Kind,
    /// Name of its state.
    pub state: &'static str,
    /// Name of its group's state.
    pub group_state: &'static str,
    /// Iteration that claimed its group.
    pub iteration: Option<i64>,
    pub reward: Option<f64>,
    /// Generated tokens.
    pub len: u32,
    pub stop: Stop,
    /// Version of its first token; None when empty.
    pub first_version: Option<Version>,
    /// Version of its last token; None when empty.
    pub last_version: Option<Version>,
}

/// A group, the name of its state, and the iteration of its claim.
pub type Phased = (u64, Group, &'static str, Option<i64>);

fn is_bounded<T>(bounds: &Bounds<T>) -> bool {
    bounds.0.is_some() || bounds.1.is_some()
}

fn holds<T: PartialOrd>(bounds: &Bounds<T>, value: &T) -> bool {
    bounds.0.as_ref().is_none_or(|low| low <= value) && bounds.1.as_ref().is_none_or(|high| value <= high)
}

fn is<T: PartialEq>(wanted: Option<&T>, value: &T) -> bool {
    wanted.is_none_or(|wanted| wanted == value)
}

impl Filter {
    /// Whether it selects the trajectory `id`, which is in `store`.
    pub fn selects(&self, store: &Store, id: u64, trajectory: &Trajectory, group: &Group) -> bool {
        let (group_state, iteration) = store.phase_of(group);
        (self.iteration.is_none() || self.iteration == iteration)
            && is(self.group.as_ref(), &trajectory.group)
            && is(self.prompt_id.as_ref(), &group.prompt_id)
            && is(self.kind.as_ref(), &group.kind)
            && is(self.stop.as_ref(), &trajectory.stop)
            && self.state.as_ref().is_none_or(|state| state == group_state || state == store.state_of(id, trajectory))
            && holds(&self.length, &trajectory.generated())
            && (!is_bounded(&self.reward) || trajectory.reward().is_some_and(|reward| holds(&self.reward, &reward)))
            && (!is_bounded(&self.version) || trajectory.runs.iter().any(|s| holds(&self.version, &s.version)))
    }
}

impl Store {
    /// Up to `limit` trajectories that `filter` selects, in the order of their ids, which are above `after`; and the
    /// `after` of the next page, None when there is none.
    pub fn select(&self, filter: &Filter, after: Option<u64>, limit: usize) -> (Vec<Selected>, Option<u64>) {
        let (mut page, mut last) = (Vec::new(), after);
        for (scanned, id) in self.candidates(filter, after).enumerate() {
            if page.len() == limit || scanned == SCANNED {
                return (page, last);
            }
            last = Some(id);
            let Some(trajectory) = self.state.trajectories.get(&id) else { continue };
            let Some(group) = self.state.groups.get(&trajectory.group) else { continue };
            if filter.selects(self, id, trajectory, group) {
                page.push(self.selected(id, trajectory, group));
            }
        }
        (page, None)
    }

    /// Up to `limit` live groups in the order of their ids, which are above `after`, each with the name of its state and
    /// the iteration of its claim, those of the state with the name `state` if one is given; and the `after` of the next
    /// page, None when there is none.
    pub fn groups(&self, state: Option<&str>, after: Option<u64>, limit: usize) -> (Vec<Phased>, Option<u64>) {
        let (mut page, mut last) = (Vec::new(), after);
        let first = after.map_or(0, |after| after.saturating_add(1));
        for (scanned, (id, group)) in self.state.groups.range(first..).enumerate() {
            if page.len() == limit || scanned == SCANNED {
                return (page, last);
            }
            last = Some(*id);
            let (name, iteration) = self.phase_of(group);
            if state.is_none_or(|state| state == name) {
                page.push((*id, group.clone(), name, iteration));
            }
        }
        (page, None)
    }

    /// Ids above `after` that may be selected, ascending.
    fn candidates(&self, filter: &Filter, after: Option<u64>) -> Box<dyn Iterator<Item = u64> + '_> {
        let first = after.map_or(0, |after| after.saturating_add(1));
        let mut groups = match (filter.group, filter.iteration) {
            (Some(group), _) => vec![group],
            (None, Some(iteration)) => self.state.claims.get(&iteration).map_or(Vec::new(), |c| c.groups.clone()),
            (None, None) => return Box::new(self.state.trajectories.range(first..).map(|(id, _)| *id)),
        };
        groups.sort_unstable();
        let members = groups.into_iter().filter_map(|id| self.state.groups.get(&id)).flat_map(Group::members);
        Box::new(members.filter(move |id| *id >= first))
    }

    fn selected(&self, id: u64, trajectory: &Trajectory, group: &Group) -> Selected {
        let (group_state, iteration) = self.phase_of(group);
        Selected {
            trajectory: id,
            group: trajectory.group,
            prompt_id: group.prompt_id.clone(),
            kind: group.kind,
            state: self.state_of(id, trajectory),
            group_state,
            iteration,
            reward: trajectory.reward(),
            len: trajectory.generated(),
            stop: trajectory.stop,
            first_version: trajectory.runs.first().map(|run| run.version),
            last_version: trajectory.last_version(),
        }
    }
}
