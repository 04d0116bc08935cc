//! The durable records: decided facts, so that replay needs neither settings nor a clock.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    state::group::{Kind, Phase},
    state::successes::Drawn,
    state::trajectory::{Outcome, Stop, Version},
    state::turn::Turn,
};

/// Kind of an append whose items lie in one array.
pub const PACKED: u8 = 21;

/// What rollout may do under one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Most untrained groups.
    pub groups: u64,
    /// Most tokens generated under the version.
    pub tokens: u64,
    /// Most tokens of one trajectory under the version.
    pub tokens_per_segment: Option<u32>,
}

/// Which tokens of a claimed trajectory have a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SegmentLoss {
    /// All that are not over-age.
    All,
    /// Those of the trajectory's newest version.
    CurrentOnly,
}

/// Why groups are dropped before they were trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reason {
    /// No token to train.
    OverAge,
    /// Rewards that say nothing to the learner; the success, where it is kept.
    NoSignal(Option<f64>),
    /// The caller dropped an evaluation.
    Eval,
    /// Somebody wanted it gone, for the reason told.
    Discarded(String),
}

impl Reason {
    /// Name in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::OverAge => "over_age",
            Self::NoSignal(_) => "no_signal",
            Self::Eval => "eval",
            Self::Discarded(_) => "discarded",
        }
    }

    /// The one of this name.
    ///
    /// # Errors
    /// The name is unknown.
    pub fn named(name: &str, detail: Option<String>, success: Option<f64>) -> std::result::Result<Self, String> {
        match name {
            "over_age" => Ok(Self::OverAge),
            "no_signal" => Ok(Self::NoSignal(success)),
            "eval" => Ok(Self::Eval),
            "discarded" => Ok(Self::Discarded(detail.unwrap_or_default())),
            other => Err(format!("groups are evicted for the unknown reason {other:?}")),
        }
    }
}

/// Trajectories of a claim that the learner left out of the gradient.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct LeftOut {
    pub filter: BTreeSet<u64>,
    pub veto: BTreeSet<u64>,
}

/// An admission; arrays: prompt tokens, metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Admit {
    /// Id made by the caller.
    pub request_id: String,
    #[serde(default)]
    pub cursor: Option<u64>,
    pub kind: Kind,
    pub prompt_id: String,
    /// Prompt tokens.
    pub prompt_len: u32,
    /// Members.
    pub size: u32,
    /// Generated tokens that each member may reach.
    pub max_tokens: u32,
    /// Higher ones are started first.
    #[serde(default)]
    pub priority: i32,
    /// None: its success is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn: Option<Drawn>,
}

/// New tokens of one trajectory; arrays: tokens with log-probs, extra columns (none of them when `len` is 0); or one
/// array in which those of all items lie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Appended {
    pub trajectory: u64,
    /// New tokens.
    pub len: u32,
    /// Policy version that generated them.
    pub version: Version,
    pub temperature: f32,
    /// The environment made them.
    pub observed: bool,
    /// Set when the trajectory is complete with them.
    pub stop: Option<Stop>,
    /// Name and dtype of the extra columns.
    pub extra: Vec<(String, String)>,
    /// Those of its tokens that were beyond the lease's grant.
    #[serde(default)]
    pub over: u32,
    /// CRC32C of its tokens, where all items of the record lie in one array.
    #[serde(default)]
    pub crc: Option<u32>,
}

/// The outcome of one scoring attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Score {
    pub trajectory: u64,
    pub outcome: Outcome,
    /// The reward; 0 for an infra failure.
    pub reward: f64,
    pub components: BTreeMap<String, f64>,
    /// The member is given up.
    pub failed: bool,
    /// Phase of the group afterwards; None: evicted with the reason `min_group_size`.
    pub phase: Option<Phase>,
}

/// What a scorer adds to a complete trajectory; arrays: its columns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Annotate {
    pub trajectory: u64,
    /// Its name; each adds once.
    pub scorer: String,
    /// Names and dtypes of the columns.
    pub columns: Vec<(String, String)>,
}

/// How the groups of a claim are dealt to optimizer steps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Plan {
    /// Name of the rule that dealt them.
    pub rule: String,
    /// Of the rule's random numbers.
    #[serde(default)]
    pub seed: Option<i64>,
    pub num_steps: u32,
    /// 0-based step of each group.
    pub steps: BTreeMap<u64, u32>,
}

/// A claim as decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Claimed {
    pub iteration: i64,
    /// Learner version; staleness counts from what it had trained.
    pub version: Version,
    pub max_staleness: Option<u32>,
    pub segment_loss: SegmentLoss,
    /// Groups in claim order.
    pub groups: Vec<u64>,
    /// Version that the caller named, where an undone claim is made again as it was recorded.
    #[serde(default)]
    pub asked: Option<Version>,
    /// The undone claim's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// New rates of success by key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub successes: Vec<(u64, f64)>,
}

/// One durable change; `codec` has its bytes.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// Sets the quota of a version.
    Quota(Version, Quota),
    /// Admits a group.
    Admit(Admit),
    /// Leases trajectories: each one's epoch goes up by one.
    Lease(Vec<u64>),
    /// Appends tokens and completes trajectories.
    Append(Vec<Appended>),
    /// Records a scoring attempt.
    Score(Score),
    /// Makes a version the newest, and an iteration's claim trained.
    Publish(Version, Option<i64>, LeftOut),
    /// Makes the first version the newest; its weights are those of the second, which the learner went back to.
    Restore(Version, Version),
    /// Claims groups.
    Claim(Claimed),
    /// Drops groups that were not trained.
    Evict(Vec<u64>, Reason),
    /// Commits every claim up to an iteration.
    Commit(i64),
    /// Undoes every claim after an iteration.
    Uncommit(i64),
    /// Drops every committed claim up to an iteration with its groups.
    Drop(i64),
    /// Makes groups ready without the members that have no verdict; evicts those.
    Late(Vec<u64>),
    /// Adds the columns of a scorer to a complete trajectory, or gives them another place.
    Annotate(Annotate),
    /// Begins a branch of a trajectory's episode, which keeps so many tokens of the history; its epoch goes up by one.
    Fork(u64, u32),
    /// Notes what is said of a trajectory's episode.
    Turn(u64, Turn),
    /// Deals an iteration's claim to steps.
    Plan(i64, Plan),
    /// Gives the oldest tokens of trajectories another place: these runs, and no others, are theirs from now on.
    Compact(Vec<Appended>),
    /// Gives the prompt of a group another place.
    Move(u64),
}

impl Record {
    /// Whether it leads to an eviction: where the disk is full, nothing else may take the last of the room for it.
    pub fn makes_room(&self) -> bool {
        match self {
            Self::Publish(..)
            | Self::Restore(..)
            | Self::Claim(_)
            | Self::Plan(..)
            | Self::Evict(..)
            | Self::Commit(_)
            | Self::Uncommit(_)
            | Self::Drop(_)
            | Self::Late(_) => true,
            Self::Quota(..)
            | Self::Admit(_)
            | Self::Lease(_)
            | Self::Append(_)
            | Self::Score(_)
            | Self::Annotate(_)
            | Self::Fork(..)
            | Self::Turn(..)
            | Self::Compact(_)
            | Self::Move(_) => false,
        }
    }

    /// Kind byte of the record's frame.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Quota(..) => 1,
            Self::Admit(_) => 2,
            Self::Lease(_) => 3,
            Self::Append(items) if items.iter().any(|item| item.crc.is_some()) => PACKED,
            Self::Append(_) => 4,
            Self::Score(_) => 5,
            Self::Publish(..) => 6,
            Self::Claim(_) => 7,
            Self::Evict(..) => 8,
            Self::Commit(_) => 9,
            Self::Uncommit(_) => 10,
            Self::Drop(_) => 11,
            Self::Late(_) => 12,
            Self::Annotate(_) => 13,
            Self::Fork(..) => 14,
            Self::Turn(..) => 15,
            Self::Restore(..) => 17,
            Self::Plan(..) => 18,
            Self::Compact(_) => 19,
            Self::Move(_) => 20,
        }
    }
}
