//! The orders of leases, scoring and claims, with the indexes that keep them cheap.
//!
//! Leases: evaluation first; then training trajectories that hold tokens, oldest group first; then those not started,
//! highest priority first, then oldest group. Claims: a first-in first-out queue of groups with a window: of the ready
//! ones the oldest, however many older ones are still being generated, until one of those has been passed by as many as
//! `Settings::window` allows (the quota of untrained groups bounds it too).

mod queue;
mod tails;
mod upkeep;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use crate::{
    clock::Micros,
    error::Result,
    state::State,
    state::group::{Kind, Phase},
    state::trajectory::{Trajectory, Verdict, Version},
    store::index::queue::Queue,
    store::index::tails::Tails,
    store::versions::Reach,
};

/// By the version of the newest token, -1 without one: a worker may extend those up to its own version, and finds the
/// oldest at once, however many are newer. Ids follow the order of admission.
type ByVersion = BTreeMap<Version, Tails>;

/// What is derived from state and leases, kept up to date with each change.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Index {
    /// Groups by request id.
    pub requests: BTreeMap<String, u64>,
    /// Ready training groups.
    pub ready: BTreeSet<u64>,
    /// Training groups that count against the quota.
    pub untrained: BTreeSet<u64>,
    /// Idle evaluation trajectories.
    eval: ByVersion,
    /// Idle training trajectories with tokens. Those that have used up the segment budget of their newest version are
    /// leasable at newer ones only.
    partial: ByVersion,
    /// Idle training trajectories without tokens, highest priority first.
    fresh: BTreeSet<(Reverse<i32>, u64)>,
    /// Complete trajectories without a verdict that every scorer has seen.
    unscored: Queue,
    /// By scorer, those for training that it has not.
    unannotated: BTreeMap<String, Queue>,
    /// Complete training trajectories without a verdict.
    pub unscored_train: u64,
    /// Evaluation trajectories without a verdict.
    pub eval_pending: u64,
    /// Leased training trajectories.
    pub leased: u64,
    /// Their generated tokens.
    pub leased_tokens: u64,
    /// Tokens that all live trajectories may still generate.
    pub outstanding_tokens: u64,
}

impl Index {
    /// The index of a state without leases.
    ///
    /// # Errors
    /// `Conflict` when the state contradicts itself.
    pub fn of(state: &State) -> Result<Self> {
        Self::expecting(state, [])
    }

    /// The same, where these scorers are expected to add their columns before rewards are given.
    ///
    /// # Errors
    /// As `of`.
    pub fn expecting(state: &State, scorers: impl IntoIterator<Item = String>) -> Result<Self> {
        let unannotated = scorers.into_iter().map(|scorer| (scorer, Queue::default())).collect();
        let mut index = Self { unannotated, ..Self::default() };
        for (id, group) in &state.groups {
            index.requests.insert(group.request_id.clone(), *id);
            index.add_group(state, *id);
        }
        state.trajectories.keys().try_for_each(|id| index.add(state, *id, false))?;
        Ok(index)
    }

    /// Adds a group to what its phase decides; nothing when there is none.
    pub fn add_group(&mut self, state: &State, id: u64) {
        let Some(group) = state.groups.get(&id) else { return };
        if state.is_untrained(group) {
            self.untrained.insert(id);
        }
        if group.kind == Kind::Train && group.phase == Phase::Ready {
            self.ready.insert(id);
        }
    }

    /// Removes a group from what its phase decides.
    pub fn remove_group(&mut self, id: u64) {
        self.untrained.remove(&id);
        self.ready.remove(&id);
    }

    /// Adds a trajectory; nothing when there is none.
    ///
    /// # Errors
    /// `Conflict` when its group is missing.
    pub fn add(&mut self, state: &State, id: u64, leased: bool) -> Result<()> {
        let Some(trajectory) = state.trajectories.get(&id) else { return Ok(()) };
        let group = state.group(trajectory.group)?;
        self.eval_pending += u64::from(group.kind == Kind::Eval && trajectory.verdict == Verdict::Pending);
        if trajectory.is_unscored() {
            self.unscored_train += u64::from(group.kind == Kind::Train);
            self.add_unscored(trajectory, group.kind, id);
        } else if trajectory.is_partial() {
            self.outstanding_tokens += u64::from(group.max_tokens.saturating_sub(trajectory.len));
            if leased {
                self.leased += u64::from(group.kind == Kind::Train);
                self.leased_tokens += if group.kind == Kind::Train { u64::from(trajectory.generated()) } else { 0 };
            } else {
                let (tail, version) = (trajectory.tail, trajectory.last_version());
                match (group.kind, version) {
                    (Kind::Eval, _) => self.eval.entry(version.unwrap_or(-1)).or_default().insert(id, tail),
                    (Kind::Train, Some(version)) => self.partial.entry(version).or_default().insert(id, tail),
                    (Kind::Train, None) => _ = self.fresh.insert((Reverse(group.priority), id)),
                }
            }
        }
        Ok(())
    }

    /// Removes a trajectory as it is in `state`; the inverse of `add`.
    ///
    /// # Errors
    /// `Conflict` when its group is missing.
    pub fn remove(&mut self, state: &State, id: u64, leased: bool) -> Result<()> {
        let Some(trajectory) = state.trajectories.get(&id) else { return Ok(()) };
        let group = state.group(trajectory.group)?;
        self.eval_pending -= u64::from(group.kind == Kind::Eval && trajectory.verdict == Verdict::Pending);
        if trajectory.is_unscored() {
            self.unscored_train -= u64::from(group.kind == Kind::Train);
            self.unscored.remove(group.kind, id);
            for queue in self.unannotated.values_mut() {
                queue.remove(group.kind, id);
            }
        } else if trajectory.is_partial() {
            self.outstanding_tokens -= u64::from(group.max_tokens.saturating_sub(trajectory.len));
            if leased {
                self.leased -= u64::from(group.kind == Kind::Train);
                self.leased_tokens -= if group.kind == Kind::Train { u64::from(trajectory.generated()) } else { 0 };
            } else {
                let version = trajectory.last_version();
                match (group.kind, version) {
                    (Kind::Eval, _) => remove(&mut self.eval, version.unwrap_or(-1), id),
                    (Kind::Train, Some(version)) => remove(&mut self.partial, version, id),
                    (Kind::Train, None) => _ = self.fresh.remove(&(Reverse(group.priority), id)),
                }
            }
        }
        Ok(())
    }

    /// The first idle evaluation trajectory that a worker of this reach may extend.
    pub fn next_eval(&self, reach: Reach) -> Option<u64> {
        first(self.eval.range(..reach.below).chain(self.eval.get_key_value(&reach.own)))
    }

    /// The first idle evaluation trajectory that is not begun, or that `version` has begun.
    pub fn next_eval_of(&self, version: Version) -> Option<u64> {
        first(self.eval.get_key_value(&-1).into_iter().chain(self.eval.get_key_value(&version)))
    }

    /// The first idle training trajectory that a worker of this reach, whose version allows `tokens_per_segment`, may
    /// extend, if its version's budget lasts.
    pub fn next_train(&self, reach: Reach, tokens_per_segment: Option<u32>) -> Option<u64> {
        let own = self.partial.get(&reach.own).and_then(|tails| tails.first_below(tokens_per_segment));
        let partial = first(self.partial.range(..reach.below)).into_iter().chain(own).min();
        let fresh = || self.fresh.first().filter(|_| reach.fresh).map(|(_, id)| *id);
        partial.or_else(fresh)
    }

    /// Whether an idle training trajectory's newest token is of one of these versions.
    pub fn has_partial(&self, versions: Range<Version>) -> bool {
        !versions.is_empty() && self.partial.range(versions).next().is_some()
    }

    /// Idle trajectories by the version of their newest token, -1 without one; a version may come more than once.
    pub fn idle_by_version(&self) -> impl Iterator<Item = (Version, u64)> + '_ {
        let begun = [&self.eval, &self.partial].into_iter().flatten();
        let begun = begun.map(|(version, tails)| (*version, tails.len() as u64));
        begun.chain((!self.fresh.is_empty()).then_some((-1, self.fresh.len() as u64)))
    }

    /// Idle training trajectories, and how many of them hold tokens.
    pub fn idle(&self) -> (usize, usize) {
        let partial = count(&self.partial);
        (partial + self.fresh.len(), partial)
    }

    /// Idle trajectories, evaluation too.
    pub fn num_idle(&self) -> usize {
        self.idle().0 + count(&self.eval)
    }

    /// Puts a complete trajectory before the scorers that have not seen it, or before whoever gives rewards.
    fn add_unscored(&mut self, trajectory: &Trajectory, kind: Kind, id: u64) {
        let mut waits = false;
        for (scorer, queue) in self.unannotated.iter_mut().filter(|_| kind == Kind::Train) {
            if !trajectory.is_annotated(scorer) {
                queue.add(kind, id);
                waits = true;
            }
        }
        if !waits {
            self.unscored.add(kind, id);
        }
    }

    /// Follows an annotation by `scorer`; what other scorers hold of the trajectory stays theirs. One that is logged again
    /// by compaction changes nothing: whoever gives rewards may have the trajectory already.
    pub fn annotated(&mut self, state: &State, id: u64, scorer: &str) {
        let Some(trajectory) = state.trajectories.get(&id).filter(|trajectory| trajectory.is_unscored()) else {
            return;
        };
        if let Some(queue) = self.unannotated.get_mut(scorer) {
            if queue.remove(Kind::Train, id) && self.unannotated.keys().all(|scorer| trajectory.is_annotated(scorer)) {
                self.unscored.add(Kind::Train, id);
            }
        }
    }

    /// The scorers that are expected.
    pub fn scorers(&self) -> impl Iterator<Item = &String> {
        self.unannotated.keys()
    }

    /// Those that wait for a reward.
    pub fn unscored(&mut self) -> &mut Queue {
        &mut self.unscored
    }

    /// Those that wait for a scorer; None if it is not expected.
    pub fn unannotated(&mut self, scorer: &str) -> Option<&mut Queue> {
        self.unannotated.get_mut(scorer)
    }

    /// Complete trajectories that can be handed out, to scorers or for their rewards.
    pub fn num_unscored(&self) -> usize {
        self.queues().map(Queue::len).sum()
    }

    /// Takes back what was handed out until `now`.
    pub fn take_back(&mut self, state: &State, now: Micros) {
        self.unscored.take_back(state, now);
        self.unannotated.values_mut().for_each(|queue| queue.take_back(state, now));
    }

    /// When the next handed-out trajectory comes back.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.queues().filter_map(Queue::next_deadline).min()
    }

    fn queues(&self) -> impl Iterator<Item = &Queue> {
        std::iter::once(&self.unscored).chain(self.unannotated.values())
    }
}

/// The oldest of several versions.
fn first<'a>(versions: impl Iterator<Item = (&'a Version, &'a Tails)>) -> Option<u64> {
    versions.filter_map(|(_, tails)| tails.first_below(None)).min()
}

fn count(versions: &ByVersion) -> usize {
    versions.values().map(Tails::len).sum()
}

fn remove(versions: &mut ByVersion, version: Version, id: u64) {
    let Some(tails) = versions.get_mut(&version) else { return };
    tails.remove(id);
    if tails.len() == 0 {
        versions.remove(&version);
    }
}
