//! Tokens and prompts that are written again, so that the files where they lay can go: what they say stays the same.

use crate::{
    error::{Result, StoreError},
    state::State,
    state::placed::Placed,
    state::record::Appended,
    state::trajectory::Run,
};

impl State {
    /// Replaces the oldest runs of each trajectory by those of `items`, which are as many tokens of the same segments.
    pub(super) fn apply_compact(&mut self, items: &[Appended], place: &Placed) -> Result<()> {
        let runs = place.runs(items)?;
        let mut at = 0;
        for items in items.chunk_by(|a, b| a.trajectory == b.trajectory) {
            let new: Vec<Run> = runs[at..at + items.len()].iter().copied().flatten().collect();
            at += items.len();
            let id = items[0].trajectory;
            let other = || StoreError::Conflict(format!("trajectory {id} has other tokens than those to be moved"));
            let trajectory = self.trajectories.get_mut(&id).ok_or_else(other)?;
            trajectory.replace_oldest(new).then_some(()).ok_or_else(other)?;
        }
        Ok(())
    }

    /// Notes where the prompt of a group is now.
    pub(super) fn apply_move(&mut self, id: u64, place: &Placed) -> Result<()> {
        self.group_mut(id)?.location = place.location;
        Ok(())
    }
}
