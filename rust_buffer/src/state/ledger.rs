//! The token ledger: every durable generated training token in exactly one place.

use serde::{Deserialize, Serialize};

/// A place of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a trajectory that can still grow.
    Partial,
    /// Complete, without a reward.
    Unscored,
    /// Has a verdict, its group has not.
    WaitingGroup,
    /// In a ready group.
    Ready,
    /// To be trained by a claim.
    Claimed,
    /// Had a gradient, and its claim is published.
    Trained,
    /// Left out of a claim: over-age.
    MaskedOverAge,
    /// Left out of a claim: not of the newest segment.
    MaskedSegment,
    /// Left out by the learner's group filter.
    MaskedFilter,
    /// Left out by the learner's veto.
    MaskedVeto,
    /// Member that its group did not wait for.
    EvictedLate,
    /// Member given up by scoring.
    EvictedFailed,
    /// Group without a token to train.
    EvictedOverAge,
    /// Group with too few members.
    EvictedMinGroupSize,
}

impl Place {
    /// Every place and its key in Python; `Partial` is split into leased and idle there.
    pub const ALL: [(Self, &'static str); 14] = [
        (Self::Partial, "partial"),
        (Self::Unscored, "unscored"),
        (Self::WaitingGroup, "waiting_group"),
        (Self::Ready, "ready"),
        (Self::Claimed, "claimed"),
        (Self::Trained, "trained"),
        (Self::MaskedOverAge, "masked_over_age"),
        (Self::MaskedSegment, "masked_segment"),
        (Self::MaskedFilter, "masked_filter"),
        (Self::MaskedVeto, "masked_veto"),
        (Self::EvictedLate, "evicted_late"),
        (Self::EvictedFailed, "evicted_failed"),
        (Self::EvictedOverAge, "evicted_over_age"),
        (Self::EvictedMinGroupSize, "evicted_min_group_size"),
    ];
}

/// Token counts by place, and the counters outside the sum.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Tokens by `Place`; signed, so that an error of ours shows as a negative number instead of wrapping.
    places: [i64; Place::ALL.len()],
    /// Prompt tokens of admitted training trajectories.
    pub prompt: u64,
    /// Prefix tokens handed out with training leases after the first.
    pub reprefill: u64,
    /// Tokens of training trajectories that the environment made.
    pub observed: u64,
    /// Evaluation tokens.
    pub eval: u64,
    /// Trajectories whose tokens are in `EvictedLate`.
    pub late: u64,
    /// Training tokens that workers appended beyond their grants.
    #[serde(default)]
    pub overdraft: u64,
}

impl Ledger {
    /// Tokens in `place`.
    pub fn get(&self, place: Place) -> i64 {
        self.places[place as usize]
    }

    /// Adds newly generated tokens to `place`.
    pub fn add(&mut self, place: Place, tokens: u64) {
        self.places[place as usize] += signed(tokens);
    }

    /// Moves tokens between places.
    pub fn shift(&mut self, from: Place, to: Place, tokens: u64) {
        self.places[from as usize] -= signed(tokens);
        self.places[to as usize] += signed(tokens);
    }

    /// Sum of all places.
    pub fn generated(&self) -> i64 {
        self.places.iter().sum()
    }
}

/// Tokens as a signed number.
pub fn signed(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}
