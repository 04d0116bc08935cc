//! Notes on a leased episode, each durable before whoever made it goes on.

use std::collections::BTreeMap;

use crate::{
    clock::Micros,
    error::Result,
    log::Arrays,
    state::record::Record,
    state::turn::Turn,
    store::{Store, conflict},
};

impl Store {
    /// Notes what is said of a leased episode where it stands; `number` counts its notes. Renews the lease; a repeat of
    /// the last note changes nothing. Returns whether the lease was fenced: nothing is noted then.
    ///
    /// # Errors
    /// `Conflict`: an epoch that was never given out, a reward that is not finite, or a number that is not the next.
    pub fn turn(
        &mut self, id: u64, epoch: u64, number: usize, rewards: BTreeMap<String, f64>, key: Option<String>, now: Micros,
    ) -> Result<bool> {
        self.expire(now)?;
        let Some(trajectory) = self.state.trajectories.get(&id) else {
            return self.state.require_gone(id).map(|()| true);
        };
        if epoch > trajectory.epoch {
            let newest = trajectory.epoch;
            return conflict(format!("trajectory {id}: epoch {epoch} was never given out (newest: {newest})"));
        }
        if let Some((name, value)) = rewards.iter().find(|(_, value)| !value.is_finite()) {
            return conflict(format!("trajectory {id}: reward {name:?} is {value}; rewards must be finite"));
        }
        if epoch < trajectory.epoch || !self.leases.contains(id) {
            return Ok(true);
        }
        let (turn, known) = (Turn { offset: trajectory.len, rewards, key }, self.state.turns(id));
        if known.len().checked_sub(1) == Some(number) && known.last() == Some(&turn) {
            return Ok(false);
        }
        if known.len() != number {
            let count = known.len();
            return conflict(format!("trajectory {id} has {count} notes; this one is given as number {number}"));
        }
        self.record(&Record::Turn(id, turn), &Arrays::default())?;
        self.renew(id, None, now.saturating_add(self.settings.lease_ttl))?;
        Ok(false)
    }
}
