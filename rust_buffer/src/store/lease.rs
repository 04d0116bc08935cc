//! Leases: soft state with deadlines, and the budget that their grants reserve.

use std::collections::{BTreeMap, BTreeSet};

use crate::{clock::Micros, state::record::Record, state::trajectory::Version};

/// The exclusive right to extend one trajectory.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Lease {
    pub worker: String,
    /// Version that the grant is for.
    pub version: Version,
    /// Tokens granted and not yet appended.
    pub grant: u32,
    /// Whether the grant counts against the version's budget.
    pub budgeted: bool,
    pub deadline: Micros,
}

/// All leases.
#[derive(Debug, Clone, Default)]
pub struct Leases {
    held: BTreeMap<u64, Lease>,
    deadlines: BTreeSet<(Micros, u64)>,
    reserved: BTreeMap<Version, u64>,
    fenced: BTreeSet<String>,
}

impl Leases {
    /// Whether `trajectory` is leased.
    pub fn contains(&self, trajectory: u64) -> bool {
        self.held.contains_key(&trajectory)
    }

    /// The lease of `trajectory`.
    pub fn get(&self, trajectory: u64) -> Option<&Lease> {
        self.held.get(&trajectory)
    }

    /// Every lease with its trajectory.
    pub fn iter(&self) -> impl Iterator<Item = (&u64, &Lease)> {
        self.held.iter()
    }

    /// Adds the lease of `trajectory`.
    pub fn insert(&mut self, trajectory: u64, lease: Lease) {
        self.deadlines.insert((lease.deadline, trajectory));
        if lease.budgeted {
            *self.reserved.entry(lease.version).or_default() += u64::from(lease.grant);
        }
        self.held.insert(trajectory, lease);
    }

    /// Ends the lease of `trajectory` and refunds its grant.
    pub fn remove(&mut self, trajectory: u64) -> Option<Lease> {
        let lease = self.held.remove(&trajectory)?;
        self.deadlines.remove(&(lease.deadline, trajectory));
        if lease.budgeted {
            self.refund(lease.version, lease.grant);
        }
        Some(lease)
    }

    /// Takes tokens that are appended out of the grant of `trajectory`, if it is leased still.
    pub fn spend(&mut self, trajectory: u64, tokens: u32) {
        if let Some(lease) = self.held.get_mut(&trajectory) {
            let spent = tokens.min(lease.grant);
            lease.grant -= spent;
            if lease.budgeted {
                let version = lease.version;
                self.refund(version, spent);
            }
        }
    }

    fn refund(&mut self, version: Version, tokens: u32) {
        if let Some(reserved) = self.reserved.get_mut(&version) {
            *reserved -= u64::from(tokens);
            if *reserved == 0 {
                self.reserved.remove(&version);
            }
        }
    }

    /// Ends the leases of the trajectories that `record` completes.
    pub fn end_complete(&mut self, record: &Record) {
        if let Record::Append(items) = record {
            for item in items.iter().filter(|item| item.stop.is_some()) {
                self.remove(item.trajectory);
            }
        }
    }

    /// Lets `worker` lease nothing any more; returns the trajectories that it holds.
    pub fn fence(&mut self, worker: &str) -> Vec<u64> {
        self.fenced.insert(worker.to_owned());
        self.held.iter().filter(|(_, lease)| lease.worker == worker).map(|(id, _)| *id).collect()
    }

    /// Whether `worker` may lease nothing any more.
    pub fn is_fenced(&self, worker: &str) -> bool {
        self.fenced.contains(worker)
    }

    /// Tokens granted under `version` and not yet appended.
    pub fn reserved(&self, version: Version) -> u64 {
        self.reserved.get(&version).copied().unwrap_or(0)
    }

    /// The trajectory whose lease expires first, if that is not after `now`.
    pub fn expired(&self, now: Micros) -> Option<u64> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, trajectory)| *trajectory)
    }

    /// When the next lease expires.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}
