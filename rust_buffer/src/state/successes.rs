//! How well prompts are answered: one rate a key, moved by each claim. A prompt is drawn by the rates that one claim
//! left, and its admission names that claim's number, so that the draw can be made again.

use std::collections::BTreeMap;

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::state::{State, group::Group, grown, trajectory::Trajectory};

/// What decided which prompt was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drawn {
    /// What its success is kept by.
    pub key: u64,
    /// Number of the rates that it was drawn by.
    pub number: i64,
}

/// How rates move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Averaging {
    /// Share that the old rate keeps, 0 to 1.
    pub decay: f64,
    /// Least reward of a success.
    pub success_reward: f64,
}

/// The rates, and what will move them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Successes {
    /// Of keys of which a group was trained, or evicted without a signal.
    #[serde(deserialize_with = "grown::<_, BTreeMap<u64, f64>, _>")]
    pub rates: OrdMap<u64, f64>,
    /// Number of these rates: the iteration of the claim that moved them last, or one more than before where an iteration
    /// is claimed anew; 0 before the first.
    pub number: i64,
    /// Number of the rates before them.
    pub previous: i64,
    /// New rates of what that claim moved.
    pub moved: Vec<(u64, f64)>,
    /// Key and success of groups that were evicted since.
    pub evicted: Vec<(u64, f64)>,
}

impl Successes {
    /// Rates after those of number `after`; all of them where more than one claim lies between, or it is None.
    pub fn since(&self, after: Option<i64>) -> Vec<(u64, f64)> {
        match after {
            Some(after) if after == self.number => Vec::new(),
            Some(after) if after == self.previous => self.moved.clone(),
            _ => self.rates.iter().map(|(key, rate)| (*key, *rate)).collect(),
        }
    }

    /// The new rates of the keys that `seen` and what was evicted move.
    pub fn moved_by(&self, seen: impl Iterator<Item = (u64, f64)>, averaging: Averaging) -> Vec<(u64, f64)> {
        let mut moved = BTreeMap::new();
        for (key, success) in self.evicted.iter().copied().chain(seen) {
            let old = moved.get(&key).or_else(|| self.rates.get(&key));
            let rate = old.map_or(success, |old| averaging.decay * old + (1.0 - averaging.decay) * success);
            moved.insert(key, rate);
        }
        moved.into_iter().collect()
    }

    /// A new claim.
    pub(super) fn claim(&mut self, iteration: i64, moved: &[(u64, f64)]) {
        self.previous = self.number;
        self.number = iteration.max(self.number.saturating_add(1));
        self.moved = moved.to_vec();
        self.rates.extend(moved.iter().copied());
        self.evicted.clear();
    }
}

impl State {
    /// Key of a group, and the share of its scored members with a reward of a success; None where it has no key or none
    /// is scored.
    pub fn success(&self, group: &Group, averaging: Averaging) -> Option<(u64, f64)> {
        let key = group.drawn?.key;
        let rewards: Vec<f64> =
            self.members(group).filter_map(|(_, trajectory)| Trajectory::reward(trajectory)).collect();
        let succeeded = rewards.iter().filter(|reward| **reward >= averaging.success_reward).count();
        (!rewards.is_empty()).then(|| (key, succeeded as f64 / rewards.len() as f64))
    }
}
