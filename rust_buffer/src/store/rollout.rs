//! Rollout's side of the store: leases, grants and appends.

use std::collections::BTreeMap;

use crate::{
    clock::Micros,
    error::Result,
    log::{Arrays, Location},
    state::group::Kind,
    state::record::{Appended, Record},
    state::trajectory::{End, Run, Stop, Trajectory, Verdict, Version},
    store::Store,
    store::arrays::read_run,
    store::lease::Lease,
    wire::{Batch, Item},
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
    /// Durable tokens so far.
    pub runs: Vec<Run>,
    /// Generated tokens that the trajectory may reach.
    pub max_tokens: u32,
    /// Tokens that may be generated now.
    pub grant: u32,
}

/// The answer to one appended item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// That of the item.
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
        if self.leases.is_fenced(worker) {
            return Ok(Vec::new());
        }
        let deadline = now.saturating_add(self.settings.lease_ttl);
        let mut held = Vec::new();
        while held.len() < max_leases {
            let Some(id) = self.next_leasable(version) else { break };
            held.push((id, self.hold(id, worker, version, deadline)?));
        }
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
            max_tokens: group.max_tokens,
            grant,
        })
    }

    /// Appends a batch: all of it, or nothing when an item is refused.
    ///
    /// # Errors
    /// `Conflict`: a gap, other content at the same offset, more than `max_tokens`, or a decreasing version.
    pub fn append(&mut self, batch: &Batch<'_>, now: Micros) -> Result<Vec<Reply>> {
        self.expire(now)?;
        let mut ahead = BTreeMap::new();
        let decide = |item| self.decide(item, batch.payload, &mut ahead);
        let decisions = batch.items.iter().map(decide).collect::<Result<Vec<_>>>()?;
        self.write(batch, &decisions)?;
        let deadline = now.saturating_add(self.settings.lease_ttl);
        for (item, decision) in batch.items.iter().zip(&decisions) {
            match *decision {
                Decision::Stale | Decision::Ended => {}
                Decision::Older => self.renew(item.trajectory, None, deadline)?,
                Decision::Extend { end: true, .. } => self.end_lease(item.trajectory)?,
                Decision::Extend { .. } => self.renew(item.trajectory, Some(item.next_version), deadline)?,
            }
        }
        let reply = |(item, decision): (&Item<'_>, &Decision)| {
            let stale = *decision == Decision::Stale;
            let lease = self.leases.get(item.trajectory).filter(|_| !stale);
            Reply { trajectory: item.trajectory, stale, grant: lease.map_or(0, |lease| lease.grant) }
        };
        Ok(batch.items.iter().zip(&decisions).map(reply).collect())
    }

    fn write(&mut self, batch: &Batch<'_>, decisions: &[Decision]) -> Result<()> {
        let (mut items, mut arrays) = (Vec::new(), Arrays::default());
        // Neighbours in the batch are one write.
        let (mut span, mut entries) = (0..0, Vec::new());
        for (item, decision) in batch.items.iter().zip(decisions) {
            let Decision::Extend { write, stop, .. } = *decision else { continue };
            if !write && stop.is_none() {
                continue;
            }
            let mut appended = Appended {
                trajectory: item.trajectory,
                len: 0,
                version: item.version,
                temperature: item.temperature,
                observed: item.observed,
                stop,
                extra: Vec::new(),
            };
            if write {
                appended.len = item.count;
                appended.extra = item.extra.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
                if span.end != item.range.start {
                    arrays.extend(&std::mem::take(&mut entries), &batch.payload[span]);
                    span = item.range.start..item.range.start;
                }
                span.end = item.range.end;
                entries.extend_from_slice(&item.entries);
            }
            items.push(appended);
        }
        arrays.extend(&entries, &batch.payload[span]);
        if items.is_empty() { Ok(()) } else { self.record(&Record::Append(items), &arrays).map(drop) }
    }

    fn renew(&mut self, id: u64, version: Option<Version>, deadline: Micros) -> Result<()> {
        if let Some(mut lease) = self.leases.remove(id) {
            if let Some(version) = version {
                lease.grant = self.grant(id, version)?;
                lease.version = version;
            }
            lease.deadline = deadline;
            self.leases.insert(id, lease);
        }
        Ok(())
    }

    fn decide(&self, item: &Item<'_>, payload: &[u8], ahead: &mut BTreeMap<u64, Ahead>) -> Result<Decision> {
        let (count, end) = (item.count, item.end()?);
        let Some(trajectory) = self.state.trajectories.get(&item.trajectory) else {
            let gone = item.trajectory < self.state.next_trajectory;
            return if gone { Ok(Decision::Stale) } else { Err(item.conflict("it was never admitted")) };
        };
        let Some(until) = item.offset.checked_add(count).filter(|_| item.epoch <= trajectory.epoch) else {
            let epoch = trajectory.epoch;
            return Err(
                item.conflict(&format!("epoch {} or its length was never given out (newest: {epoch})", item.epoch))
            );
        };
        if item.epoch < trajectory.epoch || trajectory.verdict == Verdict::Late {
            return Ok(Decision::Stale);
        }
        let ended = !self.leases.contains(item.trajectory);
        let before = Ahead { len: trajectory.len, last: trajectory.last_version(), ended };
        let before = ahead.get(&item.trajectory).copied().unwrap_or(before);
        let max = self.state.group(trajectory.group)?.max_tokens;
        if before.ended {
            return self.decide_ended(item, payload, trajectory, end);
        }
        let write = count > 0 && item.offset == before.len;
        let mut after = before;
        if write {
            check_new(item, before, until, max)?;
            after = Ahead { len: until, last: Some(item.version), ended: false };
        } else if item.offset > before.len {
            return Err(item.conflict(&format!("a gap; the next offset is {}", before.len)));
        } else if count > 0 && !self.holds(trajectory, item, payload)? {
            return Err(item.conflict("other content is durable there"));
        }
        if until < before.len {
            let refused = item.conflict(&format!("it ends the lease before its {} tokens", before.len));
            return if end.is_none() { Ok(Decision::Older) } else { Err(refused) };
        }
        let stop = End::stop(end, until, max);
        after.ended = stop.is_some() || end.is_some();
        ahead.insert(item.trajectory, after);
        Ok(Decision::Extend { write, stop, end: after.ended })
    }

    /// Without a lease only repeats are answered; everything else came too late.
    fn decide_ended(
        &self, item: &Item<'_>, payload: &[u8], trajectory: &Trajectory, end: Option<End>,
    ) -> Result<Decision> {
        let max = self.state.group(trajectory.group)?.max_tokens;
        let (count, until) = (item.count, item.offset + item.count);
        if until > trajectory.len || (count > 0 && !self.holds(trajectory, item, payload)?) {
            return Ok(Decision::Stale);
        }
        let repeats = match end {
            _ if until < trajectory.len => count > 0 && end.is_none(),
            Some(End::Release) => true,
            end => !trajectory.is_partial() && End::stop(end, until, max) == Some(trajectory.stop),
        };
        Ok(if repeats { Decision::Ended } else { Decision::Stale })
    }

    /// Whether exactly these tokens are durable at the item's offset.
    fn holds(&self, trajectory: &Trajectory, item: &Item<'_>, payload: &[u8]) -> Result<bool> {
        let (start, end) = (item.offset, item.offset + item.count);
        let sent = payload.get(item.range.clone()).unwrap_or_default();
        let mut position = 0;
        for run in &trajectory.runs {
            let (first, last) = (position.max(start), (position + run.len).min(end));
            if first < last {
                let stored = read_run(&self.log, run)?;
                let same = |stored_at: u32, sent_at: u32| {
                    let range = |at: u32, from: u32| 4 * (at + first - from) as usize..4 * (at + last - from) as usize;
                    stored.get(range(stored_at, position)) == sent.get(range(sent_at, start))
                };
                if run.version != item.version
                    || run.temperature.to_bits() != item.temperature.to_bits()
                    || run.observed != item.observed
                    || !same(0, 0)
                    || !(item.observed || same(run.len, item.count))
                {
                    return Ok(false);
                }
            }
            position += run.len;
        }
        Ok(position >= end)
    }
}

fn check_new(item: &Item<'_>, before: Ahead, until: u32, max: u32) -> Result<()> {
    if until > max {
        return Err(item.conflict(&format!("{until} tokens, the trajectory's limit is {max}")));
    }
    if item.version < 0 || item.version > i64::from(i32::MAX) || before.last.is_some_and(|last| item.version < last) {
        return Err(
            item.conflict(&format!("version {} after {:?}; versions never decrease", item.version, before.last))
        );
    }
    if !item.temperature.is_finite() {
        return Err(item.conflict(&format!("temperature {} is not finite", item.temperature)));
    }
    Ok(())
}
