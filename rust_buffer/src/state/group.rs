//! Groups: the trajectories of one prompt admission, and when they are ready.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{clock::Micros, log::Location, state::successes::Drawn};

/// Members of a group: each has its place in the index from the admission on.
pub const MAX_GROUP_SIZE: u32 = 1 << 16;

/// What a group is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Held-out evaluation: first in every order, outside budget, ledger and admission.
    Eval,
    /// Training: within all of them.
    Train,
}

impl Kind {
    /// Name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eval => "eval",
            Self::Train => "train",
        }
    }
}

/// When a group is ready without its late members. It biases towards short answers: late members are long ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Straggler {
    /// Members with a verdict, those given up apart, from which on the group waits no longer than `wait`.
    pub members: u32,
    /// Time that it still waits for the others.
    pub wait: Micros,
}

/// Mean rewards between which a group says something to the learner; None is unbounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Signal {
    /// The mean is above this.
    pub above: Option<f64>,
    /// The mean is below this.
    pub below: Option<f64>,
}

impl Signal {
    /// Whether a group with this mean reward has it.
    pub fn is_in(self, mean: f64) -> bool {
        self.above.is_none_or(|above| mean > above) && self.below.is_none_or(|below| mean < below)
    }
}

/// Where a live group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Some member has no verdict yet.
    Partial,
    /// Every member has its verdict, or came too late for it.
    Ready,
    /// In the claim of an iteration.
    Claimed(i64),
}

/// The members of one prompt admission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Group {
    /// Id of the admission, made by the caller.
    pub request_id: String,
    pub kind: Kind,
    pub prompt_id: String,
    /// Frame with the prompt's tokens (array 0) and metadata (array 1); the oldest frame that the group needs.
    pub location: Location,
    /// Prompt tokens.
    pub prompt_len: u32,
    /// Generated tokens that each member may reach.
    pub max_tokens: u32,
    /// First trajectory; members are consecutive.
    pub first: u64,
    /// Members.
    pub size: u32,
    pub cursor: Option<u64>,
    /// Groups of higher priority are started first.
    pub priority: i32,
    pub phase: Phase,
    /// Members that the group waits for.
    pub pending: u32,
    /// Members whose scoring failed for good.
    pub failed: u32,
    /// Members that the group did not wait for.
    pub late: u32,
    /// Generated tokens of the members, without the late ones.
    pub tokens: u64,
    #[serde(default)]
    pub drawn: Option<Drawn>,
    /// Younger groups that claims took while it waited for its own.
    #[serde(default)]
    pub passed: u64,
}

impl Group {
    /// Trajectory ids of the members.
    pub fn members(&self) -> Range<u64> {
        self.first..self.first.saturating_add(u64::from(self.size))
    }

    /// Members with a reward.
    pub fn scored(&self) -> u32 {
        self.size - self.pending - self.failed - self.late
    }

    /// Whether the time runs after which it does not wait for its other members.
    pub fn is_overdue(&self, straggler: Straggler) -> bool {
        self.kind == Kind::Train && self.phase == Phase::Partial && self.scored() >= straggler.members
    }

    /// Phase after one more verdict (`failed`: for a member given up); None: too few members live, evict it.
    pub fn after_verdict(&self, failed: bool, min_group_size: u32) -> Option<Phase> {
        if self.pending > 1 {
            return Some(Phase::Partial);
        }
        let living = self.size - self.failed - u32::from(failed);
        (self.kind == Kind::Eval || living >= min_group_size).then_some(Phase::Ready)
    }
}
