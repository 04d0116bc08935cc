//! Rollout's side of the store: leases, grants and appends.

use std::collections::BTreeMap;

use crate::{
    error::{Result, StoreError},
    group::Kind,
    lease::Lease,
    log::Location,
    order::Micros,
    record::{Appended, Record},
    store::{Store, conflict},
    trajectory::{End, Segment, Stop, Trajectory, Version},
    wire::Item,
};

/// A lease as it is answered; the arrays are read from the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Granted {
    /// Trajectory.
    pub trajectory: u64,
    /// Group.
    pub group: u64,
    /// Fencing epoch.
    pub epoch: u64,
    /// Training or evaluation.
    pub kind: Kind,
    /// Frame of the prompt.
    pub prompt: Location,
    /// Durable tokens so far.
    pub segments: Vec<Segment>,
    /// Generated tokens that the trajectory may reach.
    pub max_tokens: u32,
    /// Tokens that may be generated now.
    pub grant: u32,
}

/// The answer to one appended item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Trajectory.
    pub trajectory: u64,
    /// The lease was fenced: nothing was written.
    pub stale: bool,
    /// Tokens that may be generated beyond those appended.
    pub grant: u32,
}

/// What is to be done about one item of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// Its lease is fenced.
    Stale,
    /// It repeats the end of a lease.
    Ended,
    /// It repeats something older than the newest tokens.
    Older,
    /// `write` of its tokens are new; the trajectory is complete if `stop` is set; `end` ends the lease.
    Extend { write: bool, stop: Option<Stop>, end: bool },
}

/// A trajectory as the earlier items of the batch leave it.
#[derive(Clone, Copy)]
struct Ahead {
    len: u32,
    last: Option<Version>,
    ended: bool,
}

impl Store {
    /// Ends every lease that is out of time.
    ///
    /// # Errors
    /// An error of ours.
    pub fn expire(&mut self, now: Micros) -> Result<()> {
        while let Some(id) = self.leases.expired(now) {
            self.end_lease(id)?;
        }
        Ok(())
    }

    pub(crate) fn end_lease(&mut self, id: u64) -> Result<()> {
        if self.leases.contains(id) {
            self.index.remove(&self.state, id, true)?;
            self.leases.remove(id);
            self.index.add(&self.state, id, false)?;
        }
        Ok(())
    }

    /// Tokens of `version`'s budget that are neither generated nor granted.
    pub fn budget_left(&self, version: Version) -> u64 {
        let Some(quota) = self.state.quotas.get(&version) else { return 0 };
        let spent = self.state.spent.get(&version).copied().unwrap_or(0);
        quota.tokens.saturating_sub(spent + self.leases.reserved(version))
    }

    /// With lookahead 0, rollout and training alternate.
    fn may_train(&self, version: Version) -> bool {
        self.settings.lookahead > 0 || (version == self.state.version && self.state.open_claim().is_none())
    }

    /// Tokens that may be granted for `id` under `version`, besides its own grant if it has one.
    fn grant(&self, id: u64, version: Version) -> Result<u32> {
        let trajectory = self.state.trajectory(id)?;
        let group = self.state.group(trajectory.group)?;
        if !trajectory.is_partial() || !trajectory.accepts(version) {
            return Ok(0);
        }
        let remaining = group.max_tokens - trajectory.len;
        if group.kind == Kind::Eval {
            return Ok(remaining);
        }
        if !self.may_train(version) {
            return Ok(0);
        }
        let limit = self.state.quotas.get(&version).and_then(|quota| quota.tokens_per_segment).unwrap_or(u32::MAX);
        let segment = limit.saturating_sub(trajectory.tokens_under(version));
        let budget = u32::try_from(self.budget_left(version)).unwrap_or(u32::MAX);
        Ok(self.settings.grant_tokens.min(remaining).min(segment).min(budget))
    }

    /// The trajectory that a worker at `version` would be leased next.
    fn next_leasable(&self, version: Version) -> Option<u64> {
        self.index.next_eval(&self.state, version).or_else(|| self.next_trainable(version))
    }

    /// The training trajectory that a worker at `version` would be leased next.
    pub(crate) fn next_trainable(&self, version: Version) -> Option<u64> {
        let open = self.may_train(version) && self.budget_left(version) > 0;
        if open { self.index.next_train(&self.state, version) } else { None }
    }

    fn hold(&mut self, id: u64, worker: &str, version: Version, deadline: Micros) -> Result<u32> {
        let grant = self.grant(id, version)?;
        let budgeted = self.state.group(self.state.trajectory(id)?.group)?.kind == Kind::Train;
        self.index.remove(&self.state, id, false)?;
        self.leases.insert(id, Lease { worker: worker.to_owned(), version, grant, budgeted, deadline });
        self.index.add(&self.state, id, true)?;
        Ok(grant)
    }

    /// Leases up to `max_leases` trajectories to a worker whose engine holds `version`; empty when there is none.
    ///
    /// # Errors
    /// Those of the log.
    pub fn lease(&mut self, worker: &str, version: Version, max_leases: usize, now: Micros) -> Result<Vec<Granted>> {
        self.expire(now)?;
        let deadline = now.saturating_add(self.settings.lease_ttl);
        let mut held = Vec::new();
        while held.len() < max_leases {
            let Some(id) = self.next_leasable(version) else { break };
            held.push((id, self.hold(id, worker, version, deadline)?));
        }
        if held.is_empty() {
            return Ok(Vec::new());
        }
        if let Err(error) = self.commit(&Record::Lease(held.iter().map(|(id, _)| *id).collect()), &[]) {
            held.iter().try_for_each(|(id, _)| self.end_lease(*id))?;
            return Err(error);
        }
        held.into_iter().map(|(id, grant)| self.granted(id, grant)).collect()
    }

    fn granted(&self, id: u64, grant: u32) -> Result<Granted> {
        let trajectory = self.state.trajectory(id)?;
        let group = self.state.group(trajectory.group)?;
        Ok(Granted {
            trajectory: id,
            group: trajectory.group,
            epoch: trajectory.epoch,
            kind: group.kind,
            prompt: group.location,
            segments: trajectory.segments.clone(),
            max_tokens: group.max_tokens,
            grant,
        })
    }

    /// Appends a batch: all of it, or nothing when an item is refused.
    ///
    /// # Errors
    /// `Conflict`: a gap, other content at the same offset, more than `max_tokens`, or a decreasing version.
    pub fn append(&mut self, batch: &[Item<'_>], now: Micros) -> Result<Vec<Reply>> {
        self.expire(now)?;
        let mut ahead = BTreeMap::new();
        let decisions = batch.iter().map(|item| self.decide(item, &mut ahead)).collect::<Result<Vec<_>>>()?;
        let (mut items, mut arrays) = (Vec::new(), Vec::new());
        for (item, decision) in batch.iter().zip(&decisions) {
            if let Decision::Extend { write, stop, .. } = *decision {
                if write {
                    arrays.extend([item.tokens, item.logprobs]);
                    arrays.extend(item.extra.values().map(|(_, bytes)| &***bytes));
                }
                if write || stop.is_some() {
                    items.push(appended(item, write, stop)?);
                }
            }
        }
        if !items.is_empty() {
            self.commit(&Record::Append(items), &arrays)?;
        }
        let deadline = now.saturating_add(self.settings.lease_ttl);
        batch.iter().zip(decisions).try_for_each(|(item, decision)| self.settle(item, decision, deadline))?;
        let reply = |(item, decision): (&Item<'_>, &Decision)| Reply {
            trajectory: item.trajectory,
            stale: *decision == Decision::Stale,
            grant: match decision {
                Decision::Stale => 0,
                _ => self.leases.get(item.trajectory).map_or(0, |lease| lease.grant),
            },
        };
        let decisions = ahead_free(&ahead, batch);
        let _ = decisions;
        Ok(batch.iter().zip(&[]).map(reply).collect())
    }
}
