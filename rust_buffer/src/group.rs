//! Groups: the trajectories of one prompt admission, and when they are ready.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::log::Location;

/// What a group is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Held-out evaluation: first in every order, outside budget, ledger and admission.
    Eval,
    /// Training.
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

/// Where a live group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Some member has no verdict yet.
    Partial,
    /// Every member has its verdict.
    Ready,
    /// In the claim of an iteration.
    Claimed(i64),
}

/// The members of one prompt admission.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Id of the admission, made by the caller.
    pub request_id: String,
    /// What it is for.
    pub kind: Kind,
    /// Id of the prompt.
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
    /// Prompt cursor position.
    pub cursor: Option<u64>,
    /// Where it is.
    pub phase: Phase,
    /// Members without a verdict.
    pub pending: u32,
    /// Members whose scoring failed for good.
    pub failed: u32,
    /// Generated tokens of all members.
    pub tokens: u64,
}

impl Group {
    /// Trajectory ids of the members.
    pub fn members(&self) -> Range<u64> {
        self.first..self.first + u64::from(self.size)
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
