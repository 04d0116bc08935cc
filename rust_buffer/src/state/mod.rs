//! The durable state: everything but the tokens themselves. `apply` says how each record changes it; a snapshot of it
//! and the records after that are what recovery reads.

pub mod age;
pub mod annotation;
pub mod apply;
pub mod codec;
mod compact;
pub mod fork;
pub mod gone;
pub mod group;
pub mod ledger;
pub mod mask;
pub mod placed;
pub mod record;
pub mod successes;
pub mod trajectory;
pub mod turn;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    error::{Result, StoreError},
    log::Lsn,
    state::age::Trained,
    state::fork::{Branch, Fork, Stretch},
    state::gone::Counted,
    state::group::{Group, Kind, Phase},
    state::ledger::Ledger,
    state::record::{LeftOut, Plan, Quota, SegmentLoss},
    state::successes::Successes,
    state::trajectory::{Trajectory, Version},
    state::turn::Turn,
};

/// Quotas that are kept; a version below the oldest of them has no budget any more.
pub(crate) const KEPT_QUOTAS: usize = 32;

/// What has become of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClaimStatus {
    /// Handed to the learner.
    Claimed,
    /// Trained and published.
    Trained,
    /// Covered by a checkpoint.
    Committed,
}

impl ClaimStatus {
    /// Name in Python, also of the state of a claimed group.
    pub fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Trained => "trained",
            Self::Committed => "committed",
        }
    }
}

/// Tokens of a claim by what the claim makes of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimSums {
    /// Have a gradient.
    pub trainable: u64,
    /// Too old.
    pub over_age: u64,
    /// Not of the newest segment.
    pub segment: u64,
    /// Left out by the learner's group filter.
    pub filter: u64,
    /// Left out by the learner's veto.
    pub veto: u64,
    /// Of members given up by scoring.
    pub failed: u64,
}

impl ClaimSums {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.trainable + self.over_age + self.segment + self.filter + self.veto + self.failed
    }
}

/// A claim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Claim {
    /// Learner version; staleness counts from what it had trained.
    pub version: Version,
    pub max_staleness: Option<u32>,
    pub segment_loss: SegmentLoss,
    /// Groups in claim order.
    pub groups: Vec<u64>,
    /// Record of the claim.
    pub lsn: Lsn,
    pub status: ClaimStatus,
    pub sums: ClaimSums,
    pub left_out: LeftOut,
    /// Version that the caller named, if it is another than the claim's.
    #[serde(default)]
    pub asked: Option<Version>,
    /// How its groups are dealt to steps; None until that is recorded.
    #[serde(default)]
    pub plan: Option<Plan>,
}

impl Claim {
    /// Version that a repeat names.
    pub fn asked(&self) -> Version {
        self.asked.unwrap_or(self.version)
    }
}

/// A claim that was undone: what it was, to be made again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Undone {
    pub version: Version,
    pub max_staleness: Option<u32>,
    pub segment_loss: SegmentLoss,
    /// Groups in claim order.
    pub groups: Vec<u64>,
    #[serde(default)]
    pub plan: Option<Plan>,
}

/// What a publication said, to answer its repeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Iteration whose claim it trained.
    pub iteration: Option<i64>,
    /// What of it had no gradient.
    pub left_out: LeftOut,
}

/// The whole state of the store. The maps that grow with it are persistent, so that a snapshot is a cheap clone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct State {
    /// Live groups by id; ids follow the order of admission.
    #[serde(deserialize_with = "grown::<_, BTreeMap<u64, Group>, _>")]
    pub groups: OrdMap<u64, Group>,
    /// Their trajectories by id.
    #[serde(deserialize_with = "grown::<_, BTreeMap<u64, Trajectory>, _>")]
    pub trajectories: OrdMap<u64, Trajectory>,
    /// Claims that are not evicted, by iteration.
    pub claims: BTreeMap<i64, Claim>,
    /// Newest evicted iteration.
    pub evicted: Option<i64>,
    /// Quotas by version.
    pub quotas: BTreeMap<Version, Quota>,
    /// Durable training tokens by version.
    pub spent: BTreeMap<Version, u64>,
    /// Publications by version.
    pub publications: BTreeMap<Version, Publication>,
    /// Hashes of the request ids of training groups that are gone, where they are not among `counted_gone`.
    #[serde(deserialize_with = "grown::<_, BTreeSet<u64>, _>")]
    pub gone: OrdSet<u64>,
    /// Names of reward components.
    pub components: Vec<String>,
    pub ledger: Ledger,
    pub next_group: u64,
    pub next_trajectory: u64,
    /// First prompt cursor position that was never admitted.
    pub next_cursor: u64,
    /// Newest published version; -1 before the first.
    pub version: Version,
    /// Newest version ever seen; -1 before the first.
    pub max_version: Version,
    /// Undone claims: they are made again, as they were and in this order, before any new one.
    #[serde(default, deserialize_with = "in_order")]
    pub undone: VecDeque<Undone>,
    /// Request ids that end in a number, of training groups that are gone.
    #[serde(default)]
    pub counted_gone: Counted,
    /// Forks of the live trajectories that have some, in order.
    #[serde(default, deserialize_with = "grown::<_, BTreeMap<u64, Vec<Fork>>, _>")]
    pub forks: OrdMap<u64, Vec<Fork>>,
    /// What was said of the live trajectories of which something was, in order.
    #[serde(default, deserialize_with = "grown::<_, BTreeMap<u64, Vec<Turn>>, _>")]
    pub turns: OrdMap<u64, Vec<Turn>>,
    #[serde(default)]
    pub successes: Successes,
    #[serde(default)]
    pub trained: Trained,
}

/// Decodes a persistent collection by way of one of the standard library, which makes room as items come: the other
/// believes the length that the bytes claim.
fn grown<'de, D, Standard, Persistent>(from: D) -> std::result::Result<Persistent, D::Error>
where
    D: Deserializer<'de>,
    Standard: Deserialize<'de> + IntoIterator,
    Persistent: FromIterator<Standard::Item>,
{
    Ok(Standard::deserialize(from)?.into_iter().collect())
}

/// Undone claims as a list, or by iteration as they once were.
fn in_order<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<VecDeque<Undone>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Kept {
        List(VecDeque<Undone>),
        ByIteration(BTreeMap<i64, Undone>),
    }
    Ok(match Kept::deserialize(from)? {
        Kept::List(undone) => undone,
        Kept::ByIteration(undone) => undone.into_values().collect(),
    })
}

impl Default for State {
    fn default() -> Self {
        Self {
            groups: OrdMap::new(),
            trajectories: OrdMap::new(),
            claims: BTreeMap::new(),
            evicted: None,
            quotas: BTreeMap::new(),
            spent: BTreeMap::new(),
            publications: BTreeMap::new(),
            gone: OrdSet::new(),
            components: Vec::new(),
            ledger: Ledger::default(),
            next_group: 0,
            next_trajectory: 0,
            next_cursor: 0,
            version: -1,
            max_version: -1,
            undone: VecDeque::new(),
            counted_gone: Counted::default(),
            forks: OrdMap::new(),
            turns: OrdMap::new(),
            successes: Successes::default(),
            trained: Trained::default(),
        }
    }
}

impl State {
    /// Whether a training group was admitted by this request and is gone.
    pub fn is_gone(&self, request_id: &str) -> bool {
        gone::contains(&self.gone, &self.counted_gone, request_id)
    }

    /// A live group.
    ///
    /// # Errors
    /// `Conflict` when there is none.
    pub fn group(&self, id: u64) -> Result<&Group> {
        self.groups.get(&id).ok_or_else(|| StoreError::Conflict(format!("group {id} is not in the store")))
    }

    /// A live trajectory.
    ///
    /// # Errors
    /// `Conflict` when there is none.
    pub fn trajectory(&self, id: u64) -> Result<&Trajectory> {
        self.trajectories.get(&id).ok_or_else(|| StoreError::Conflict(format!("trajectory {id} is not in the store")))
    }

    /// That `id`, which is not live, once was.
    ///
    /// # Errors
    /// `Conflict` when it is a branch of a live episode, or was never there.
    pub fn require_gone(&self, id: u64) -> Result<()> {
        let is_of = |forks: &[Fork]| forks.iter().any(|fork| fork.branch == id);
        if let Some((episode, _)) = self.forks.iter().find(|(_, forks)| is_of(forks)) {
            let detail = format!("trajectory {id} is a branch of the episode {episode}: give the episode's id");
            return Err(StoreError::Conflict(detail));
        }
        if id < self.next_trajectory { Ok(()) } else { self.trajectory(id).map(drop) }
    }

    /// Forks of a trajectory, in order.
    pub fn forks(&self, id: u64) -> &[Fork] {
        self.forks.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The branches of a trajectory's episode.
    pub fn branches(&self, id: u64, trajectory: &Trajectory) -> Vec<Branch> {
        fork::branches(id, trajectory.len, self.forks(id))
    }

    /// What the newest branch of a trajectory's episode holds.
    pub fn history(&self, id: u64, trajectory: &Trajectory) -> Vec<Stretch> {
        self.branches(id, trajectory).pop().map_or_else(Vec::new, |newest| newest.history)
    }

    /// Reward components by name.
    pub fn components(&self, stored: &[(u32, f64)]) -> BTreeMap<String, f64> {
        let name = |index: u32| self.components.get(index as usize).cloned().unwrap_or_default();
        stored.iter().map(|(index, value)| (name(*index), *value)).collect()
    }

    /// The members of a group with their ids: one descent for all of them.
    pub fn members(&self, group: &Group) -> impl Iterator<Item = (u64, &Trajectory)> {
        self.trajectories.range(group.members()).map(|(id, trajectory)| (*id, trajectory))
    }

    /// A claim that is not evicted.
    ///
    /// # Errors
    /// `Conflict` when there is none.
    pub fn claim(&self, iteration: i64) -> Result<&Claim> {
        self.claims
            .get(&iteration)
            .ok_or_else(|| StoreError::Conflict(format!("iteration {iteration} has no claim in the store")))
    }

    fn apply_plan(&mut self, iteration: i64, plan: &Plan) -> Result<()> {
        self.claim(iteration)?;
        self.claims.entry(iteration).and_modify(|claim| claim.plan = Some(plan.clone()));
        Ok(())
    }

    /// Counts in the groups that wait how many of a claim's are younger, or takes the count back.
    fn pass(&mut self, claimed: &[u64], count: fn(u64, u64) -> u64) -> Result<()> {
        let mut claimed = claimed.to_vec();
        claimed.sort_unstable();
        let older = self.groups.range(..claimed.last().copied().unwrap_or(0));
        let waits = |group: &Group| group.kind == Kind::Train && !matches!(group.phase, Phase::Claimed(_));
        for id in older.filter(|(_, group)| waits(group)).map(|(id, _)| *id).collect::<Vec<_>>() {
            let younger = claimed.len() - claimed.partition_point(|other| *other < id);
            let group = self.group_mut(id)?;
            group.passed = count(group.passed, younger as u64);
        }
        Ok(())
    }

    /// Iteration of the claim that is not trained yet; there is at most one, the newest.
    pub fn open_claim(&self) -> Option<i64> {
        self.claims.last_key_value().filter(|(_, claim)| claim.status == ClaimStatus::Claimed).map(|(i, _)| *i)
    }

    /// Whether the books of `version` are closed: enough newer versions have a quota.
    pub fn is_closed(&self, version: Version) -> bool {
        self.quotas.len() >= KEPT_QUOTAS && self.quotas.first_key_value().is_some_and(|(oldest, _)| version < *oldest)
    }

    /// Whether a group counts against the quota of groups.
    pub fn is_untrained(&self, group: &Group) -> bool {
        group.kind == Kind::Train
            && match group.phase {
                Phase::Claimed(iteration) => {
                    self.claims.get(&iteration).is_none_or(|claim| claim.status == ClaimStatus::Claimed)
                }
                _ => true,
            }
    }
}
