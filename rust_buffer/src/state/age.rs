//! How old a token is: in iterations, not in version numbers, of which a resume skips some.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::state::trajectory::Version;

/// Iterations that the weights of each version have trained. A version's number says it, counted from the newest
/// restored one below it: those are the entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Trained(BTreeMap<Version, i64>);

impl Trained {
    /// Iterations that the weights of `version` have trained.
    pub fn by(&self, version: Version) -> i64 {
        let restored = self.0.range(..=version).next_back();
        restored.map_or(version, |(from, trained)| trained.saturating_add(version - from))
    }

    /// `version` has the weights of an older one.
    pub fn restore(&mut self, version: Version, weights_of: Version) {
        self.0.insert(version, self.by(weights_of));
    }

    /// Iterations from a token to a claim. While undone iterations are trained again, what the lost weights generated
    /// is ahead of the learner, and counts as new.
    pub fn staleness(&self, claim: Version, token: Version) -> i64 {
        self.by(claim).saturating_sub(self.by(token)).max(0)
    }

    /// How many versions were restored.
    pub fn num_restored(&self) -> usize {
        self.0.len()
    }

    /// The restored versions, with the iterations that each had trained.
    pub fn restored(&self) -> Vec<(Version, i64)> {
        self.0.iter().map(|(version, trained)| (*version, *trained)).collect()
    }
}
