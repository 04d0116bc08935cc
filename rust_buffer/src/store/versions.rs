//! Which version may extend which trajectory: any that is not older, or with `Settings::one_version` its own alone.
//!
//! Then a version that is not the newest only drains: it begins nothing, and what it began has no token budget but its
//! own length, or an exhausted one would leave it unfinished for ever. Versions below `Store::oldest` are lost, nobody
//! has their weights any more: what they began goes on under the newest.

use std::collections::BTreeMap;

use crate::{
    error::Result,
    state::group::Kind,
    state::trajectory::{Trajectory, Version},
    store::Store,
};

/// What a worker may be leased, by the version of a trajectory's newest token.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    /// Every version below it.
    pub below: Version,
    /// That of the worker.
    pub own: Version,
    /// Trajectories without a token too.
    pub fresh: bool,
}

impl Store {
    /// What a worker at `version` may be leased.
    pub(crate) fn reach(&self, version: Version) -> Reach {
        let is_newest = version >= self.state.version;
        match (self.settings.one_version, is_newest) {
            (false, _) => Reach { below: version, own: version, fresh: true },
            (true, true) => Reach { below: self.oldest.min(version), own: version, fresh: true },
            (true, false) => Reach { below: Version::MIN, own: version, fresh: false },
        }
    }

    /// The version that alone may extend `trajectory`, which is leased for `held`; None: the newest.
    fn own_version(&self, trajectory: &Trajectory, held: Option<Version>) -> Option<Version> {
        trajectory.last_version().filter(|version| *version >= self.oldest).or(held)
    }

    /// Whether a worker at `version` may go on with `trajectory`, which is leased for `held` or not at all. What nobody
    /// has begun of an evaluation is begun by any version that it is asked for by.
    pub(crate) fn may_extend(
        &self, kind: Kind, trajectory: &Trajectory, held: Option<Version>, version: Version,
    ) -> bool {
        if !self.settings.one_version {
            return trajectory.accepts(version);
        }
        if kind == Kind::Eval && trajectory.last_version().or(held).is_none_or(|own| own == version) {
            return true;
        }
        let is_free = trajectory.last_version().is_none_or(|last| last < self.oldest);
        self.own_version(trajectory, held) == Some(version) || (is_free && version == self.state.version)
    }

    /// Whether `version` only finishes what it began.
    pub(crate) fn drains(&self, version: Version) -> bool {
        self.settings.one_version && (self.oldest..self.state.version).contains(&version)
    }

    /// Whether an idle training trajectory waits for a worker at a version that drains.
    pub(crate) fn has_draining(&self) -> bool {
        self.settings.one_version && self.index.has_partial(self.oldest..self.state.version)
    }

    /// Trajectories that are not complete, by the version that may extend them: one without a token counts for the
    /// newest, or for that of its lease.
    ///
    /// # Errors
    /// An error of ours.
    pub fn in_flight(&self) -> Result<BTreeMap<Version, u64>> {
        let newest = self.state.version;
        let mut counts = BTreeMap::new();
        for (version, number) in self.index.idle_by_version() {
            *counts.entry(if version >= self.oldest { version } else { newest }).or_default() += number;
        }
        for (id, lease) in self.leases.iter() {
            let own = self.own_version(self.state.trajectory(*id)?, Some(lease.version));
            *counts.entry(own.unwrap_or(newest)).or_default() += 1;
        }
        Ok(counts)
    }

    /// Whether nothing below `version` is in flight.
    ///
    /// # Errors
    /// An error of ours.
    pub fn has_drained(&self, version: Version) -> Result<bool> {
        Ok(self.in_flight()?.keys().next().is_none_or(|oldest| *oldest >= version))
    }

    /// Gives up the weights of every version below `version`. Forgotten at reopening, like leases; never lowered.
    pub fn set_oldest(&mut self, version: Version) {
        if version > self.oldest {
            self.oldest = version;
            self.quota_changes += 1;
        }
    }
}
