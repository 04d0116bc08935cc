//! What waits to be looked at by somebody, and what is handed out until a time.

use std::collections::{BTreeMap, BTreeSet};

use crate::{clock::Micros, state::State, state::group::Kind};

/// Trajectories that wait for their rewards, or for one scorer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Queue {
    /// Those that nobody looks at: evaluation first.
    waiting: BTreeSet<(Kind, u64)>,
    /// Those handed out, until the time given.
    handed: BTreeMap<u64, Micros>,
    deadlines: BTreeSet<(Micros, u64)>,
}

impl Queue {
    /// Adds one that waits.
    pub fn add(&mut self, kind: Kind, id: u64) {
        self.waiting.insert((kind, id));
    }

    /// Removes one, handed out or not; whether it was there.
    pub fn remove(&mut self, kind: Kind, id: u64) -> bool {
        let waited = self.waiting.remove(&(kind, id));
        let Some(deadline) = self.handed.remove(&id) else { return waited };
        self.deadlines.remove(&(deadline, id))
    }

    /// Those that can be handed out.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Hands out up to `max_items` until `deadline`.
    pub fn hand_out(&mut self, max_items: usize, deadline: Micros) -> Vec<u64> {
        let mut ids = Vec::new();
        while ids.len() < max_items {
            let Some((_, id)) = self.waiting.pop_first() else { break };
            self.handed.insert(id, deadline);
            self.deadlines.insert((deadline, id));
            ids.push(id);
        }
        ids
    }

    /// Takes back what was handed out until `now`.
    pub fn take_back(&mut self, state: &State, now: Micros) {
        while let Some((_, id)) = self.deadlines.first().copied().filter(|(deadline, _)| *deadline <= now) {
            self.deadlines.pop_first();
            self.handed.remove(&id);
            if let Some(group) = state.trajectories.get(&id).and_then(|t| state.groups.get(&t.group)) {
                self.waiting.insert((group.kind, id));
            }
        }
    }

    /// When the next one comes back.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}
