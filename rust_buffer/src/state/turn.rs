//! What is said of an episode while it goes on: by its environment after a step, or by its program.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{error::Result, state::State};

/// One note, made after so many tokens of the episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Turn {
    /// Tokens of the episode before it, of all branches.
    pub offset: u32,
    /// By name; finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rewards: BTreeMap<String, f64>,
    /// Identity of the state that the episode is in: two episodes in one state have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl State {
    pub(super) fn apply_turn(&mut self, id: u64, turn: &Turn) -> Result<()> {
        self.trajectory(id)?;
        self.turns.entry(id).or_default().push(turn.clone());
        Ok(())
    }

    /// What was said of a trajectory's episode, in order.
    pub fn turns(&self, id: u64) -> &[Turn] {
        self.turns.get(&id).map_or(&[], Vec::as_slice)
    }
}
