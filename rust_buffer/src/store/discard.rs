//! Discarding: the way past a group that nobody can train on.

use crate::{
    error::Result,
    log::Arrays,
    state::group::Phase,
    state::record::{Reason, Record},
    store::{Store, conflict},
};

/// Longest reason, in bytes: it is for people.
const MAX_REASON: usize = 4096;

impl Store {
    /// Drops a group that no claim has, whatever state its members are in: leases end, what workers append is stale,
    /// scores are ignored, and an undone claim is made again without it. False when it is gone already.
    ///
    /// # Errors
    /// `Conflict`: no such group was ever admitted, a claim has it, or the reason is empty or long.
    pub fn discard(&mut self, id: u64, reason: &str) -> Result<bool> {
        if reason.trim().is_empty() || reason.len() > MAX_REASON {
            let len = reason.len();
            return conflict(format!(
                "the reason has {len} bytes; say in 1 to {MAX_REASON} why group {id} is discarded"
            ));
        }
        if id < self.state.next_group && !self.state.groups.contains_key(&id) {
            return Ok(false);
        }
        let group = self.state.group(id)?;
        if let (Phase::Claimed(iteration), (status, _)) = (group.phase, self.phase_of(group)) {
            return conflict(format!(
                "group {id} is {status} by iteration {iteration} and cannot be discarded; undo that claim first, as a \
                 resumed run does with those that no checkpoint covers"
            ));
        }
        group.members().try_for_each(|member| self.end_lease(member))?;
        self.record(&Record::Evict(vec![id], Reason::Discarded(reason.to_owned())), &Arrays::default())?;
        self.forget_overdue(id);
        Ok(true)
    }
}
