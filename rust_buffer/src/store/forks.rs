//! Forks: an agent that rewrote its history goes on in a new branch of the same episode.

use crate::{
    clock::Micros,
    error::Result,
    log::Arrays,
    state::fork::{self, Branch},
    state::record::Record,
    state::trajectory::Verdict,
    store::{Store, conflict},
    wire::Batch,
};

/// Branches of one episode: each is a sequence of its own to the learner.
const MAX_BRANCHES: usize = 1 << 10;

/// The answer to a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forked {
    /// The lease was fenced: nothing was written.
    pub stale: bool,
    /// Id of the new branch.
    pub branch: u64,
    /// Fencing epoch of what is appended to it.
    pub epoch: u64,
}

const STALE: Forked = Forked { stale: true, branch: 0, epoch: 0 };

impl Store {
    /// Begins a new branch of a leased episode, which keeps `offset` tokens of the history of its newest one: the rest
    /// is rewritten. The next append has that offset, and the epoch that is answered; what was sent under the old one is
    /// stale. A branch that nothing came in yet is begun anew. A repeat is answered as the first time. Renews the lease.
    ///
    /// # Errors
    /// `Conflict`: an epoch that was never given out, an offset beyond the history, an episode that nothing came in yet, a
    /// repeat with another offset, or too many branches.
    pub fn fork(&mut self, id: u64, epoch: u64, offset: u32, now: Micros) -> Result<Forked> {
        self.expire(now)?;
        let Some(trajectory) = self.state.trajectories.get(&id) else {
            return self.state.require_gone(id).map(|()| STALE);
        };
        if epoch > trajectory.epoch {
            let newest = trajectory.epoch;
            return conflict(format!("trajectory {id}: epoch {epoch} was never given out (newest: {newest})"));
        }
        let forks = self.state.forks(id);
        if let Some(last) = forks.last().filter(|last| last.epoch == trajectory.epoch && last.epoch == epoch + 1) {
            if last.offset != offset {
                let kept = last.offset;
                return conflict(format!("trajectory {id} was forked with offset {kept}, not {offset}"));
            }
            return Ok(Forked { stale: false, branch: last.branch, epoch: last.epoch });
        }
        if epoch < trajectory.epoch || !self.leases.contains(id) {
            return Ok(STALE);
        }
        if trajectory.len == 0 {
            return conflict(format!("trajectory {id} has no token yet; append to it"));
        }
        let bare = fork::bare(trajectory.len, forks);
        let branches = self.state.branches(id, trajectory);
        let len = branches.last().map_or(0, Branch::len);
        if offset > len || (bare.is_none() && branches.len() >= MAX_BRANCHES) {
            let count = branches.len();
            return conflict(format!(
                "trajectory {id}: a fork at offset {offset} of a history of {len} tokens, the episode has {count} \
                 branches; fork within the history, at most {MAX_BRANCHES} times"
            ));
        }
        let (branch, epoch) = (bare.map_or(self.state.next_trajectory, |last| last.branch), trajectory.epoch + 1);
        self.record(&Record::Fork(id, offset), &Arrays::default())?;
        self.renew(id, None, now.saturating_add(self.settings.lease_ttl))?;
        Ok(Forked { stale: false, branch, epoch })
    }

    /// The batch with offsets into episodes in place of those into the histories of branches; None where they are equal.
    ///
    /// # Errors
    /// `Conflict` for tokens that a branch keeps of the one before it.
    pub(super) fn in_episodes<'a>(&self, batch: &Batch<'a>) -> Result<Option<Batch<'a>>> {
        if self.state.forks.is_empty() {
            return Ok(None);
        }
        let mut items = batch.items.clone();
        for item in &mut items {
            let Some(last) = self.state.forks(item.trajectory).last() else { continue };
            let episode = self.state.trajectory(item.trajectory)?;
            if item.epoch != episode.epoch || episode.verdict == Verdict::Late {
                // It is stale, whatever its offset.
                continue;
            }
            let Some(own) = item.offset.checked_sub(last.offset) else {
                return Err(item.conflict(&format!("the branch keeps {} tokens of the one before it", last.offset)));
            };
            item.offset = own.saturating_add(last.start);
        }
        Ok(Some(Batch { items, payload: batch.payload }))
    }
}
