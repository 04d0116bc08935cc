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
    /// Group that somebody discarded.
    EvictedDiscarded,
    /// Group whose rewards say nothing to the learner.
    EvictedNoSignal,
}

impl Place {
    /// Every place and its key in Python; `Partial` is split into leased and idle there.
    pub const ALL: [(Self, &'static str); 16] = [
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
        (Self::EvictedDiscarded, "evicted_discarded"),
        (Self::EvictedNoSignal, "evicted_no_signal"),
    ];
}

/// Token counts by place, and the counters outside the sum.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Tokens by `Place`; signed, so that an error of ours shows as a negative number instead of wrapping.
    #[serde(with = "places")]
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

/// Places by name, so that one may be added; a list of the first of them is what format 3 had.
mod places {
    use std::{collections::BTreeMap, fmt};

    use serde::{
        Deserializer, Serializer,
        de::{MapAccess, SeqAccess, Visitor},
    };

    use super::Place;

    type Places = [i64; Place::ALL.len()];

    pub fn serialize<S: Serializer>(places: &Places, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(Place::ALL.iter().map(|(place, name)| (name, places[*place as usize])))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Places, D::Error> {
        from.deserialize_any(Read)
    }

    struct Read;

    impl<'de> Visitor<'de> for Read {
        type Value = Places;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("tokens by place")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Places, A::Error> {
            let mut read: BTreeMap<String, i64> = BTreeMap::new();
            while let Some((name, tokens)) = map.next_entry()? {
                read.insert(name, tokens);
            }
            Ok(Place::ALL.map(|(_, name)| read.get(name).copied().unwrap_or(0)))
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Places, A::Error> {
            let mut places = [0; Place::ALL.len()];
            for place in &mut places {
                let Some(tokens) = seq.next_element()? else { break };
                *place = tokens;
            }
            Ok(places)
        }
    }
}

/// Tokens as a signed number.
pub fn signed(tokens: u64) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}
