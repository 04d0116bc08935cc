//! Leases and grants: who may extend which trajectory, and by how much; `append` takes what they generate.

use crate::{
    clock::Micros,
    error::Result,
    log::{Arrays, Location},
    state::fork::Stretch,
    state::group::Kind,
    state::record::Record,
    state::trajectory::{Run, Version},
    store::Store,
    store::lease::Lease,
};

/// A lease as it is answered; the arrays are read from the log.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Granted {
    pub trajectory: u64,
    pub group: u64,
    /// Fencing epoch.
    pub epoch: u64,
    pub kind: Kind,
    /// Frame of the prompt.
    pub prompt: Location,
    /// Durable tokens of the episode so far, and which of them are the history of its newest branch.
    pub runs: Vec<Run>,
    pub history: Vec<Stretch>,
    /// Generated tokens that the trajectory may reach.
    pub max_tokens: u32,
    /// Tokens that may be generated now.
    pub grant: u32,
}

impl Store {
    /// Does what the passing of time alone does: ends leases, hands trajectories out for scoring again, and makes
    /// groups ready without their late members.
    ///
    /// # Errors
    /// Those of the log.
    pub fn expire(&mut self, now: Micros) -> Result<()> {
        while let Some(id) = self.leases.expired(now) {
            self.end_lease(id)?;
        }
        self.index.take_back(&self.state, now);
        self.expire_groups(now)
    }

    pub(crate) fn end_lease(&mut self, id: u64) -> Result<()> {
        if self.leases.contains(id) {
            self.index.remove(&self.state, id, true)?;
            self.leases.remove(id);
            self.index.add(&self.state, id, false)?;
        }
        Ok(())
    }

    /// Ends every lease of `worker`, which is dead or given up, and leases nothing to it again, not even by a call that
    /// it left waiting; returns how many it held. What it appends from now on is stale. Forgotten at reopening, like
    /// leases.
    ///
    /// # Errors
    /// `Conflict`; an error of ours.
    pub fn fence(&mut self, worker: &str) -> Result<usize> {
        let held = self.leases.fence(worker);
        held.iter().try_for_each(|id| self.end_lease(*id))?;
        Ok(held.len())
    }

    /// Tokens of `version`'s budget that are neither generated nor granted.
    pub fn budget_left(&self, version: Version) -> u64 {
        if self.drains(version) {
            return u64::MAX;
        }
        let Some(quota) = self.state.quotas.get(&version) else { return 0 };
        let spent = self.state.spent.get(&version).copied().unwrap_or(0);
        quota.tokens.saturating_sub(spent + self.leases.reserved(version))
    }

    /// With lookahead 0, rollout and training alternate.
    fn may_train(&self, version: Version) -> bool {
        self.settings.lookahead > 0 || (version == self.state.version && self.state.open_claim().is_none())
    }

    /// Tokens that may be granted for `id`, leased for `held` or not yet, under `version`, besides its own grant.
    fn grant(&self, id: u64, held: Option<Version>, version: Version) -> Result<u32> {
        let trajectory = self.state.trajectory(id)?;
        let group = self.state.group(trajectory.group)?;
        if !trajectory.is_partial() || !self.may_extend(group.kind, trajectory, held, version) {
            return Ok(0);
        }
        let remaining = group.max_tokens.saturating_sub(trajectory.len);
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

    /// The trajectory that a worker at `version` would be leased next; an evaluation that is asked for alone is of one
    /// version, so what another has begun is not for it.
    fn next_leasable(&self, kind: Option<Kind>, version: Version) -> Option<u64> {
        match kind {
            None => self.index.next_eval(self.reach(version)).or_else(|| self.next_trainable(version)),
            Some(Kind::Train) => self.next_trainable(version),
            Some(Kind::Eval) => self.index.next_eval_of(version),
        }
    }

    /// The training trajectory that a worker at `version` would be leased next.
    pub(crate) fn next_trainable(&self, version: Version) -> Option<u64> {
        let limit = self.state.quotas.get(&version).and_then(|quota| quota.tokens_per_segment);
        let open = self.may_train(version) && self.budget_left(version) > 0;
        if open { self.index.next_train(self.reach(version), limit) } else { None }
    }

    fn hold(&mut self, id: u64, worker: &str, version: Version, deadline: Micros) -> Result<u32> {
        let grant = self.grant(id, None, version)?;
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
        self.lease_kind(worker, version, max_leases, None, now)
    }

    /// The same of one kind alone; None: of both.
    ///
    /// # Errors
    /// Those of the log.
    pub fn lease_kind(
        &mut self, worker: &str, version: Version, max_leases: usize, kind: Option<Kind>, now: Micros,
    ) -> Result<Vec<Granted>> {
        self.expire(now)?;
        if self.leases.is_fenced(worker) {
            return Ok(Vec::new());
        }
        let deadline = now.saturating_add(self.settings.lease_ttl);
        let mut held = Vec::new();
        while held.len() < max_leases {
            let Some(id) = self.next_leasable(kind, version) else { break };
            held.push((id, self.hold(id, worker, version, deadline)?));
        }
        self.record_leases(held)
    }

    /// Leases those members of a group that can still grow and that nobody holds, whole and outside every budget: for a
    /// caller that has generated them already.
    ///
    /// # Errors
    /// `Conflict` when there is no such group; those of the log.
    pub fn lease_group(&mut self, worker: &str, group: u64, now: Micros) -> Result<Vec<Granted>> {
        self.expire(now)?;
        let admission = self.state.group(group)?.clone();
        let (version, deadline) = (self.state.version, now.saturating_add(self.settings.lease_ttl));
        let mut held = Vec::new();
        for id in admission.members() {
            let trajectory = self.state.trajectory(id)?;
            if trajectory.is_partial() && !self.leases.contains(id) {
                let grant = admission.max_tokens.saturating_sub(trajectory.len);
                let worker = worker.to_owned();
                self.index.remove(&self.state, id, false)?;
                self.leases.insert(id, Lease { worker, version, grant, budgeted: false, deadline });
                self.index.add(&self.state, id, true)?;
                held.push((id, grant));
            }
        }
        self.record_leases(held)
    }

    fn record_leases(&mut self, held: Vec<(u64, u32)>) -> Result<Vec<Granted>> {
        if held.is_empty() {
            return Ok(Vec::new());
        }
        let leased = Record::Lease(held.iter().map(|(id, _)| *id).collect());
        if let Err(error) = self.record(&leased, &Arrays::default()) {
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
            runs: trajectory.runs.clone(),
            history: self.state.history(id, trajectory),
            max_tokens: group.max_tokens,
            grant,
        })
    }

    pub(super) fn renew(&mut self, id: u64, version: Option<Version>, deadline: Micros) -> Result<()> {
        if let Some(mut lease) = self.leases.remove(id) {
            if let Some(version) = version {
                self.lease_moves += u64::from(lease.version != version);
                lease.grant = self.grant(id, Some(lease.version), version)?;
                lease.version = version;
            }
            lease.deadline = deadline;
            self.leases.insert(id, lease);
        }
        Ok(())
    }
}
