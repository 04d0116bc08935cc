//! How each record changes the state: deterministic, without settings or clock, so that replay gives the same state.

use std::collections::VecDeque;

use crate::{
    error::{Result, StoreError},
    log::{Location, Lsn},
    state::fork::Branch,
    state::group::{Group, Kind, MAX_GROUP_SIZE, Phase},
    state::ledger::Place,
    state::mask,
    state::placed::Placed,
    state::record::{Admit, Appended, Claimed, LeftOut, Quota, Reason, Record, Score},
    state::trajectory::{Outcome, Stop, Trajectory, Verdict, Version},
    state::{Claim, ClaimStatus, ClaimSums, KEPT_QUOTAS, Publication, State, Undone, gone},
};

impl State {
    /// Changes the state by one record at `place`.
    ///
    /// # Errors
    /// `Conflict` when the record does not fit the state: an error of ours, or damage in a log.
    pub fn apply(&mut self, record: &Record, place: &Placed) -> Result<()> {
        match record {
            Record::Quota(version, quota) => self.apply_quota(*version, *quota),
            Record::Admit(admit) => self.apply_admit(admit, place.location)?,
            Record::Lease(trajectories) => trajectories.iter().try_for_each(|id| self.apply_lease(*id))?,
            Record::Append(items) => self.apply_append(items, place)?,
            Record::Score(score) => self.apply_score(score)?,
            Record::Publish(version, iteration, left_out) => self.apply_publish(*version, *iteration, left_out)?,
            Record::Restore(version, weights_of) => {
                self.trained.restore(*version, *weights_of);
                self.apply_publish(*version, None, &LeftOut::default())?;
            }
            Record::Claim(claimed) => self.apply_claim(claimed, place.lsn)?,
            Record::Evict(groups, reason) => groups.iter().try_for_each(|id| self.apply_evict(*id, reason))?,
            Record::Commit(iteration) => {
                self.claims.range_mut(..=iteration).for_each(|(_, claim)| claim.status = ClaimStatus::Committed);
            }
            Record::Uncommit(iteration) => self.apply_uncommit(*iteration)?,
            Record::Drop(iteration) => self.apply_drop(*iteration)?,
            Record::Late(groups) => groups.iter().try_for_each(|id| self.apply_late(*id))?,
            Record::Annotate(annotate) => self.apply_annotate(annotate, place.location)?,
            Record::Fork(id, offset) => self.apply_fork(*id, *offset)?,
            Record::Turn(id, turn) => self.apply_turn(*id, turn)?,
            Record::Plan(iteration, plan) => self.apply_plan(*iteration, plan)?,
            Record::Compact(items) => self.apply_compact(items, place)?,
            Record::Move(group) => self.apply_move(*group, place)?,
        }
        Ok(())
    }

    fn apply_quota(&mut self, version: Version, quota: Quota) {
        self.quotas.insert(version, quota);
        self.max_version = self.max_version.max(version);
        while self.quotas.len() > KEPT_QUOTAS {
            self.quotas.pop_first();
        }
        if let Some((oldest, _)) = self.quotas.first_key_value().filter(|_| self.quotas.len() == KEPT_QUOTAS) {
            self.spent = self.spent.split_off(oldest);
        }
    }

    fn apply_admit(&mut self, admit: &Admit, location: Location) -> Result<()> {
        if admit.size == 0 || admit.size > MAX_GROUP_SIZE {
            let (request, size) = (&admit.request_id, admit.size);
            return Err(StoreError::Conflict(format!(
                "request {request:?}: group_size {size}, a group has 1 to {MAX_GROUP_SIZE} members"
            )));
        }
        let (group, first) = (self.next_group, self.next_trajectory);
        self.next_group += 1;
        self.next_trajectory += u64::from(admit.size);
        if let Some(cursor) = admit.cursor {
            self.next_cursor = self.next_cursor.max(cursor.saturating_add(1));
        }
        if admit.kind == Kind::Train {
            self.ledger.prompt += u64::from(admit.prompt_len) * u64::from(admit.size);
        }
        self.groups.insert(
            group,
            Group {
                request_id: admit.request_id.clone(),
                kind: admit.kind,
                prompt_id: admit.prompt_id.clone(),
                location,
                prompt_len: admit.prompt_len,
                max_tokens: admit.max_tokens,
                first,
                size: admit.size,
                cursor: admit.cursor,
                priority: admit.priority,
                phase: Phase::Partial,
                pending: admit.size,
                failed: 0,
                late: 0,
                tokens: 0,
                drawn: admit.drawn,
                passed: 0,
            },
        );
        self.trajectories.extend((first..self.next_trajectory).map(|id| (id, Trajectory::new(group))));
        Ok(())
    }

    fn apply_lease(&mut self, id: u64) -> Result<()> {
        let held = self.branches(id, self.trajectory(id)?).last().map_or(0, Branch::len);
        let (trajectory, group) = self.pair_mut(id)?;
        let reprefilled = if trajectory.epoch > 0 && group.kind == Kind::Train { held } else { 0 };
        trajectory.epoch += 1;
        self.ledger.reprefill += u64::from(reprefilled);
        Ok(())
    }

    fn apply_append(&mut self, items: &[Appended], place: &Placed) -> Result<()> {
        for (item, run) in items.iter().zip(place.runs(items)?) {
            let (trajectory, group) = self.pair_mut(item.trajectory)?;
            let generated = u64::from(if item.observed { 0 } else { item.len });
            let room = group.max_tokens.saturating_sub(trajectory.len);
            if item.len > room || !trajectory.is_partial() {
                let detail = format!("trajectory {}: {} tokens, it has room for {room}", item.trajectory, item.len);
                return Err(StoreError::Conflict(detail));
            }
            if let Some(run) = run {
                trajectory.columns |= !item.extra.is_empty();
                trajectory.push(run);
                group.tokens += generated;
            }
            let all = u64::from(trajectory.generated());
            let kind = group.kind;
            trajectory.stop = item.stop.unwrap_or(Stop::None);
            if item.len > 0 {
                self.max_version = self.max_version.max(item.version);
            }
            if kind == Kind::Eval {
                self.ledger.eval += generated;
                continue;
            }
            self.ledger.add(Place::Partial, generated);
            self.ledger.observed += u64::from(item.len) - generated;
            self.ledger.overdraft += u64::from(item.over);
            if generated > 0 {
                *self.spent.entry(item.version).or_default() += generated;
            }
            if item.stop.is_some() {
                self.ledger.shift(Place::Partial, Place::Unscored, all);
            }
        }
        Ok(())
    }

    fn apply_score(&mut self, score: &Score) -> Result<()> {
        let components = score.components.iter().map(|(name, value)| (self.component(name), *value)).collect();
        let (trajectory, group) = self.pair_mut(score.trajectory)?;
        let (id, len) = (trajectory.group, u64::from(trajectory.generated()));
        if !trajectory.is_unscored() {
            return Err(StoreError::Conflict(format!("trajectory {} does not await a score", score.trajectory)));
        }
        if score.outcome == Outcome::InfraFailure {
            trajectory.attempts += 1;
            if !score.failed {
                return Ok(());
            }
            trajectory.verdict = Verdict::Failed;
            group.failed += 1;
        } else {
            let (outcome, reward) = (score.outcome, score.reward);
            trajectory.verdict = Verdict::Scored { outcome, reward, components };
        }
        group.pending -= 1;
        let (kind, tokens) = (group.kind, group.tokens);
        if let Some(phase) = score.phase {
            group.phase = phase;
        }
        if kind == Kind::Train {
            self.ledger.shift(Place::Unscored, Place::WaitingGroup, len);
            match score.phase {
                Some(Phase::Ready) => self.ledger.shift(Place::WaitingGroup, Place::Ready, tokens),
                None => self.ledger.shift(Place::WaitingGroup, Place::EvictedMinGroupSize, tokens),
                _ => {}
            }
        }
        if score.phase.is_none() {
            self.forget(id)?;
        }
        Ok(())
    }

    fn apply_late(&mut self, id: u64) -> Result<()> {
        for member in self.group(id)?.members() {
            let (trajectory, group) = self.pair_mut(member)?;
            if trajectory.verdict != Verdict::Pending {
                continue;
            }
            let tokens = u64::from(trajectory.generated());
            let place = if trajectory.is_partial() { Place::Partial } else { Place::Unscored };
            trajectory.verdict = Verdict::Late;
            group.pending -= 1;
            group.late += 1;
            group.tokens -= tokens;
            self.ledger.shift(place, Place::EvictedLate, tokens);
            self.ledger.late += 1;
        }
        let group = self.group_mut(id)?;
        group.phase = Phase::Ready;
        let tokens = group.tokens;
        self.ledger.shift(Place::WaitingGroup, Place::Ready, tokens);
        Ok(())
    }

    fn apply_publish(&mut self, version: Version, iteration: Option<i64>, left_out: &LeftOut) -> Result<()> {
        self.version = version;
        self.max_version = self.max_version.max(version);
        self.publications.insert(version, Publication { iteration, left_out: left_out.clone() });
        let Some(iteration) = iteration else { return Ok(()) };
        let mut claim = self.claim(iteration)?.clone();
        claim.status = ClaimStatus::Trained;
        claim.left_out = left_out.clone();
        claim.sums = mask::sums(self, &claim)?;
        self.ledger.shift(Place::Claimed, Place::Trained, claim.sums.trainable);
        self.ledger.shift(Place::Claimed, Place::MaskedFilter, claim.sums.filter);
        self.ledger.shift(Place::Claimed, Place::MaskedVeto, claim.sums.veto);
        self.claims.insert(iteration, claim);
        Ok(())
    }

    fn apply_claim(&mut self, claimed: &Claimed, lsn: Lsn) -> Result<()> {
        let mut claim = Claim {
            version: claimed.version,
            max_staleness: claimed.max_staleness,
            segment_loss: claimed.segment_loss,
            groups: claimed.groups.clone(),
            lsn,
            status: ClaimStatus::Claimed,
            sums: ClaimSums::default(),
            left_out: LeftOut::default(),
            asked: claimed.asked,
            plan: claimed.plan.clone(),
        };
        claim.sums = mask::sums(self, &claim)?;
        for id in &claimed.groups {
            self.group_mut(*id)?.phase = Phase::Claimed(claimed.iteration);
        }
        self.ledger.shift(Place::Ready, Place::Claimed, claim.sums.trainable);
        self.ledger.shift(Place::Ready, Place::MaskedOverAge, claim.sums.over_age);
        self.ledger.shift(Place::Ready, Place::MaskedSegment, claim.sums.segment);
        self.ledger.shift(Place::Ready, Place::EvictedFailed, claim.sums.failed);
        self.claims.insert(claimed.iteration, claim);
        self.pass(&claimed.groups, u64::saturating_add)?;
        if claimed.asked.is_some() {
            let again = self.undone.iter().position(|undone| undone.groups == claimed.groups);
            again.map(|at| self.undone.remove(at));
        } else {
            // Format 3 forgot what it undid; here a new claim comes only after the last undone one.
            self.undone.clear();
            self.successes.claim(claimed.iteration, &claimed.successes);
        }
        Ok(())
    }

    fn apply_uncommit(&mut self, iteration: i64) -> Result<()> {
        let Some(first) = iteration.checked_add(1) else { return Ok(()) };
        // What was published of them does not stand any more: to say it again is no repeat.
        self.publications.retain(|_, made| made.iteration.is_none_or(|trained| trained < first));
        let mut undone = VecDeque::new();
        // Newest first, so that what waited at each of them is what waits when it is undone.
        for claim in self.claims.split_off(&first).into_values().rev() {
            let sums = claim.sums;
            let place = if claim.status == ClaimStatus::Claimed { Place::Claimed } else { Place::Trained };
            self.ledger.shift(place, Place::Ready, sums.trainable);
            self.ledger.shift(Place::MaskedFilter, Place::Ready, sums.filter);
            self.ledger.shift(Place::MaskedVeto, Place::Ready, sums.veto);
            self.ledger.shift(Place::MaskedOverAge, Place::Ready, sums.over_age);
            self.ledger.shift(Place::MaskedSegment, Place::Ready, sums.segment);
            self.ledger.shift(Place::EvictedFailed, Place::Ready, sums.failed);
            debug_assert_eq!(sums.total(), claim.groups.iter().map(|id| self.groups[id].tokens).sum::<u64>());
            self.pass(&claim.groups, u64::saturating_sub)?;
            for id in &claim.groups {
                self.group_mut(*id)?.phase = Phase::Ready;
            }
            let Claim { version, max_staleness, segment_loss, groups, plan, .. } = claim;
            undone.push_front(Undone { version, max_staleness, segment_loss, groups, plan });
        }
        undone.append(&mut self.undone);
        self.undone = undone;
        Ok(())
    }

    fn apply_drop(&mut self, iteration: i64) -> Result<()> {
        let dropped: Vec<i64> = self
            .claims
            .range(..=iteration)
            .filter(|(_, claim)| claim.status == ClaimStatus::Committed)
            .map(|(iteration, _)| *iteration)
            .collect();
        for iteration in dropped {
            for id in self.claims.remove(&iteration).map(|claim| claim.groups).unwrap_or_default() {
                self.forget(id)?;
            }
            self.evicted = self.evicted.max(Some(iteration));
        }
        let newest = self.version;
        self.publications.retain(|version, made| *version == newest || made.iteration > self.evicted);
        Ok(())
    }

    fn apply_evict(&mut self, id: u64, reason: &Reason) -> Result<()> {
        match reason {
            Reason::OverAge => {
                let tokens = self.group(id)?.tokens;
                self.ledger.shift(Place::Ready, Place::EvictedOverAge, tokens);
            }
            Reason::NoSignal(success) => {
                let (tokens, drawn) = self.group(id).map(|group| (group.tokens, group.drawn))?;
                self.successes.evicted.extend(drawn.map(|drawn| drawn.key).zip(*success));
                self.ledger.shift(Place::Ready, Place::EvictedNoSignal, tokens);
            }
            Reason::Eval => {}
            Reason::Discarded(_) => self.move_discarded(id)?,
        }
        self.forget(id)
    }

    /// Moves the tokens of a group that no claim has to their last place.
    fn move_discarded(&mut self, id: u64) -> Result<()> {
        let group = self.group(id)?.clone();
        match group.phase {
            _ if group.kind == Kind::Eval => {}
            Phase::Ready => self.ledger.shift(Place::Ready, Place::EvictedDiscarded, group.tokens),
            Phase::Claimed(_) => {
                return Err(StoreError::Conflict(format!("group {id} is in a claim and cannot be discarded")));
            }
            Phase::Partial => {
                for member in group.members() {
                    let trajectory = self.trajectory(member)?;
                    let place = match trajectory.verdict {
                        Verdict::Late => continue,
                        Verdict::Pending if trajectory.is_partial() => Place::Partial,
                        Verdict::Pending => Place::Unscored,
                        _ => Place::WaitingGroup,
                    };
                    let tokens = u64::from(trajectory.generated());
                    self.ledger.shift(place, Place::EvictedDiscarded, tokens);
                }
            }
        }
        Ok(())
    }

    /// Drops a group and its trajectories, also out of the claims to be made again.
    fn forget(&mut self, id: u64) -> Result<()> {
        for undone in &mut self.undone {
            undone.groups.retain(|group| *group != id);
            undone.plan.as_mut().map(|plan| plan.steps.remove(&id));
        }
        self.undone.retain(|undone| !undone.groups.is_empty());
        for member in self.group(id)?.members() {
            self.trajectories.remove(&member);
            self.forks.remove(&member);
            self.turns.remove(&member);
        }
        if let Some(group) = self.groups.remove(&id).filter(|group| group.kind == Kind::Train) {
            gone::insert(&mut self.gone, &mut self.counted_gone, &group.request_id);
        }
        Ok(())
    }

    /// Index of a reward component's name.
    fn component(&mut self, name: &str) -> u32 {
        let known = self.components.iter().position(|known| known == name);
        known.unwrap_or_else(|| {
            self.components.push(name.to_owned());
            self.components.len() - 1
        }) as u32
    }

    pub(super) fn group_mut(&mut self, id: u64) -> Result<&mut Group> {
        self.groups.get_mut(&id).ok_or_else(|| StoreError::Conflict(format!("group {id} is not in the store")))
    }

    pub(super) fn pair_mut(&mut self, id: u64) -> Result<(&mut Trajectory, &mut Group)> {
        let missing = || StoreError::Conflict(format!("trajectory {id} is not in the store"));
        let trajectory = self.trajectories.get_mut(&id).ok_or_else(missing)?;
        let group = self.groups.get_mut(&trajectory.group).ok_or_else(missing)?;
        Ok((trajectory, group))
    }
}
