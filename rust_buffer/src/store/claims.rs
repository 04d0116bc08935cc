//! The learner's side of the store: claims, publications, commits and eviction; and evaluation results.

use std::{
    collections::BTreeSet,
    ops::Bound::{Excluded, Unbounded},
};

use crate::{
    clock::Micros,
    error::Result,
    log::{Arrays, Lsn},
    state::group::{Kind, Phase},
    state::mask,
    state::record::{Claimed, LeftOut, Reason, Record},
    state::trajectory::{MAX_VERSION, Stop, Version},
    state::{ClaimStatus, Publication, Undone},
    store::{Store, conflict},
};

/// The answer to `claim`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClaimAnswer {
    /// The iteration's groups, and the record that claims them.
    Claimed(Vec<u64>, Lsn),
    /// Too few groups can be trained, and waiting would not help.
    Starved(Starvation),
}

/// Why a claim starves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starvation {
    /// Rollout is closed and no group is ready.
    Closed,
    /// Ready groups had nothing left to train and were evicted: others may be admitted in their place.
    OverAge,
    /// Groups were evicted since the last call because their rewards say nothing: others may be admitted in their place.
    NoSignal,
}

impl Starvation {
    /// Name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::OverAge => "over_age",
            Self::NoSignal => "no_signal",
        }
    }
}

/// Result of one evaluation trajectory.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct EvalResult {
    pub request_id: String,
    pub prompt_id: String,
    /// Reward; None when scoring failed for good.
    pub reward: Option<f64>,
    /// Generated tokens.
    pub len: u32,
    pub stop: Stop,
    /// Version of its first token; None when empty.
    pub first_version: Option<Version>,
    /// Version of its last token; None when empty.
    pub last_version: Option<Version>,
}

impl Store {
    /// Whether no group can become ready any more under the newest version and what is admitted.
    fn is_closed(&self) -> bool {
        let may_come = self.index.leased > 0 || self.index.unscored_train > 0 || self.has_draining();
        !may_come && self.next_trainable(self.state.version).is_none()
    }

    /// Claims `iteration`'s groups for a learner at `version`; None while it has to wait. Undone claims come first: the
    /// oldest of them is made again as it was, groups, order, version, masks and plan.
    ///
    /// # Errors
    /// `Conflict`: another claim is untrained, the iteration is not above every earlier one, the version was never
    /// published, or a repeat names another.
    pub fn claim(&mut self, iteration: i64, version: Version, now: Micros) -> Result<Option<ClaimAnswer>> {
        self.expire(now)?;
        if let Some(claim) = self.state.claims.get(&iteration) {
            if claim.asked() != version {
                return conflict(format!(
                    "iteration {iteration} is claimed by a learner at version {}, not {version}; repeat it with that",
                    claim.asked()
                ));
            }
            return Ok(Some(ClaimAnswer::Claimed(claim.groups.clone(), claim.lsn)));
        }
        if iteration < 0 || version < 0 || version > self.state.version {
            let newest = self.state.version;
            return conflict(format!(
                "iteration {iteration} (>= 0) cannot be claimed at version {version}: the newest published is {newest}"
            ));
        }
        if let Some(open) = self.state.open_claim() {
            return conflict(format!(
                "the claim of iteration {open} is untrained; publish it or undo it before claiming {iteration}"
            ));
        }
        let newest = self.state.claims.last_key_value().map(|(newest, _)| *newest).max(self.state.evicted);
        if newest.is_some_and(|newest| iteration <= newest) {
            return conflict(format!("iteration {iteration} is not above the newest claim's, {newest:?}"));
        }
        if let Some(undone) = self.state.undone.front() {
            let Undone { version: recorded, max_staleness, segment_loss, groups, plan } = undone.clone();
            let (version, asked) = (recorded, Some(version));
            let successes = Vec::new(); // told when they were claimed first
            let again = Claimed { iteration, version, max_staleness, segment_loss, groups, asked, plan, successes };
            return self.make_claim(again).map(Some);
        }
        self.judge_ready()?;
        if self.no_signal > std::mem::replace(&mut self.no_signal_told, self.no_signal) {
            return Ok(Some(ClaimAnswer::Starved(Starvation::NoSignal)));
        }
        let wanted = self.settings.groups_per_iteration;
        if self.index.ready.len() < wanted && !self.is_closed() {
            return Ok(None);
        }
        let (groups, over_age) = self.pick(wanted, version)?;
        let closed = self.is_closed();
        if groups.len() == wanted || (closed && !groups.is_empty()) {
            let (max_staleness, segment_loss) = (self.settings.max_staleness, self.settings.segment_loss);
            let (asked, plan, successes) = (None, None, self.successes_of(&groups));
            let new = Claimed { iteration, version, max_staleness, segment_loss, groups, asked, plan, successes };
            return self.make_claim(new).map(Some);
        }
        let why = if over_age > 0 { Some(Starvation::OverAge) } else { closed.then_some(Starvation::Closed) };
        Ok(why.map(ClaimAnswer::Starved))
    }

    /// Rates that a claim of these groups moves.
    fn successes_of(&self, groups: &[u64]) -> Vec<(u64, f64)> {
        let Some(averaging) = self.settings.successes else { return Vec::new() };
        let groups = groups.iter().filter_map(|id| self.state.groups.get(id));
        let seen = groups.filter_map(|group| self.state.success(group, averaging));
        self.state.successes.moved_by(seen, averaging)
    }

    fn make_claim(&mut self, claimed: Claimed) -> Result<ClaimAnswer> {
        let groups = claimed.groups.clone();
        for id in &groups {
            let phase = self.state.group(*id)?.phase;
            if phase != Phase::Ready {
                return conflict(format!("group {id} cannot be claimed: it is not ready, but {phase:?}"));
            }
        }
        let (lsn, _) = self.record(&Record::Claim(claimed), &Arrays::default())?;
        Ok(ClaimAnswer::Claimed(groups, lsn))
    }

    /// The first `wanted` ready groups of the window that have a token to train; those before them that have none are
    /// evicted, and counted.
    fn pick(&mut self, wanted: usize, version: Version) -> Result<(Vec<u64>, usize)> {
        let (mut groups, mut over_age) = (Vec::new(), Vec::new());
        let end = self.window_end()?;
        for id in &self.index.ready {
            let group = self.state.group(*id)?;
            if groups.len() == wanted || end.is_some_and(|end| *id >= end) {
                break;
            }
            let trainable = mask::is_trainable(&self.state, group, version, self.settings.max_staleness);
            if trainable { groups.push(*id) } else { over_age.push(*id) }
        }
        let evicted = over_age.len();
        if evicted > 0 {
            self.record(&Record::Evict(over_age, Reason::OverAge), &Arrays::default())?;
        }
        Ok((groups, evicted))
    }

    /// The first group behind the window; None where it takes in all.
    ///
    /// It is anchored at the oldest group that is not ready, the *anchor*, and has W places: the anchor's, those of the
    /// groups that have passed it, and those of the next untrained ones. A group that is evicted has no place. With P
    /// groups a claim and lookahead L it bounds: no group is passed by more than W - 1 younger ones, and while claims are
    /// full, what they train is at most L + ceil((W - 1) / P) iterations old, and as much more as the weights of its
    /// worker were behind.
    ///
    /// Proof. That a claim passes g is that it takes a younger group and leaves g. If it leaves a g that is older than the
    /// anchor, g is ready, and as claims take what is ready oldest first, nothing younger is taken. Otherwise g is not
    /// older than the anchor a: whatever passed g while it waited has passed a, which waited too and is older (`passed`
    /// is that count), p(g) <= p(a). The claim takes at most W - 1 - p(a) groups that are younger than g, and afterwards
    /// g is passed by at most W - 1.
    ///
    /// If claim j (from 1, each of P groups) takes g, before whose admission i claims were trained, the (j - 1 - i)P groups
    /// of those between are older ones, which were untrained at the admission, fewer than P(L + 1) of them
    /// (`pmdflow.config.window`), and at most W - 1 that passed g: (j - 1 - i)P <= P(L + 1) - 1 + W - 1, so j - 1 - i <= L +
    /// ceil((W - 1) / P), and nothing of g was generated before i iterations were trained. An eviction makes the older
    /// ones fewer, and whoever is admitted in its place is younger.
    fn window_end(&self) -> Result<Option<u64>> {
        let Some(window) = self.settings.window else { return Ok(None) };
        let Some(anchor) = self.index.untrained.difference(&self.index.ready).next() else { return Ok(None) };
        let left = window.saturating_sub(1).saturating_sub(self.state.group(*anchor)?.passed);
        let behind = self.index.untrained.range((Excluded(*anchor), Unbounded));
        Ok(behind.copied().nth(usize::try_from(left).unwrap_or(usize::MAX)))
    }

    /// Makes `version` the newest and `iteration`'s claim trained, but for what the learner left out of it.
    ///
    /// # Errors
    /// `Conflict`: not above every earlier version and no repeat, no such claim, or something left out that is not in it.
    pub fn publish(&mut self, version: Version, iteration: Option<i64>, left_out: LeftOut) -> Result<()> {
        let publication = Publication { iteration, left_out };
        if self.state.publications.get(&version) == Some(&publication) {
            return Ok(());
        }
        self.require_newer(version)?;
        if let Some(iteration) = iteration {
            let claim = self.state.claim(iteration)?;
            if claim.status != ClaimStatus::Claimed {
                return conflict(format!("the claim of iteration {iteration} is trained already"));
            }
        }
        self.check_left_out(&publication)?;
        let Publication { iteration, left_out } = publication;
        self.record(&Record::Publish(version, iteration, left_out), &Arrays::default()).map(drop)
    }

    /// Makes `version` the newest, whose weights are those of the older `weights_of`: its tokens are as old as theirs.
    ///
    /// # Errors
    /// `Conflict`: not above every earlier version and no repeat, or `weights_of` was never published.
    pub fn restore(&mut self, version: Version, weights_of: Version) -> Result<()> {
        let trained = &self.state.trained;
        if version == self.state.version && weights_of < version && trained.by(version) == trained.by(weights_of) {
            return Ok(());
        }
        self.require_newer(version)?;
        if !(0..=self.state.version).contains(&weights_of) {
            return conflict(format!(
                "version {version} cannot have the weights of {weights_of}: the newest published is {}",
                self.state.version
            ));
        }
        self.record(&Record::Restore(version, weights_of), &Arrays::default()).map(drop)
    }

    fn require_newer(&self, version: Version) -> Result<()> {
        if version > MAX_VERSION || version <= self.state.version {
            return conflict(format!(
                "version {version} is not above the newest, {}; publish {} or higher, at most {MAX_VERSION}",
                self.state.version,
                self.state.max_version.saturating_add(1)
            ));
        }
        Ok(())
    }

    /// Whether what is left out, each for one reason, is in the claim.
    fn check_left_out(&self, publication: &Publication) -> Result<()> {
        let LeftOut { filter, veto } = &publication.left_out;
        if let Some(id) = filter.intersection(veto).next() {
            return conflict(format!("trajectory {id} is left out by filter and by veto; name one reason"));
        }
        if filter.is_empty() && veto.is_empty() {
            return Ok(());
        }
        let mut claimed = BTreeSet::new();
        for group in
            publication.iteration.map_or(Ok(&[][..]), |i| self.state.claim(i).map(|claim| &claim.groups[..]))?
        {
            let scored = self.state.members(self.state.group(*group)?).filter(|(_, t)| t.reward().is_some());
            claimed.extend(scored.flat_map(|(id, episode)| self.state.branches(id, episode)).map(|branch| branch.id));
        }
        for id in filter.union(veto) {
            if !claimed.contains(id) {
                return conflict(format!(
                    "trajectory {id}, which the learner left out, is not in the claim that is published (iteration {:?})",
                    publication.iteration
                ));
            }
        }
        Ok(())
    }

    /// Commits every claim up to `iteration`.
    ///
    /// # Errors
    /// `Conflict` when one of them is untrained, or `iteration` has none: what a checkpoint covers is not in the store.
    pub fn commit_claims(&mut self, iteration: i64) -> Result<()> {
        let newest =
            self.state.claims.range(..=iteration).next_back().map(|(newest, _)| *newest).max(self.state.evicted);
        if iteration > 0 && newest.is_none_or(|newest| newest < iteration) {
            let first = newest.map_or(1, |newest| newest.saturating_add(1));
            return conflict(format!(
                "iterations {first} to {iteration} have no claim in the store and cannot be committed; the store is older \
                 than the checkpoint that covers them: restore both from one time"
            ));
        }
        let mut claims = self.state.claims.range(..=iteration);
        if let Some((open, _)) = claims.clone().find(|(_, claim)| claim.status == ClaimStatus::Claimed) {
            return conflict(format!(
                "the claim of iteration {open} is untrained and cannot be committed; publish it first"
            ));
        }
        if claims.any(|(_, claim)| claim.status == ClaimStatus::Trained) {
            self.record(&Record::Commit(iteration), &Arrays::default())?;
        }
        Ok(())
    }

    /// Undoes every claim after `iteration`; returns their iterations.
    ///
    /// # Errors
    /// `Conflict` when one of them is evicted.
    pub fn uncommit(&mut self, iteration: i64) -> Result<Vec<i64>> {
        if let Some(evicted) = self.state.evicted.filter(|evicted| *evicted > iteration) {
            return conflict(format!(
                "claims up to iteration {evicted} are evicted; resume from a checkpoint of it or later"
            ));
        }
        let undone: Vec<i64> =
            self.state.claims.range((Excluded(iteration), Unbounded)).map(|(iteration, _)| *iteration).collect();
        if !undone.is_empty() {
            self.record(&Record::Uncommit(iteration), &Arrays::default())?;
        }
        Ok(undone)
    }

    /// Drops the groups of every committed claim up to `iteration`; returns how many.
    ///
    /// The caller then deletes the log files of which nothing is needed, once the record is durable.
    ///
    /// # Errors
    /// Those of the log.
    pub fn evict(&mut self, iteration: i64) -> Result<usize> {
        let committed = self.state.claims.range(..=iteration).map(|(_, claim)| claim);
        let committed: Vec<_> = committed.filter(|claim| claim.status == ClaimStatus::Committed).collect();
        let groups = committed.iter().map(|claim| claim.groups.len()).sum();
        if !committed.is_empty() {
            self.record(&Record::Drop(iteration), &Arrays::default())?;
        }
        Ok(groups)
    }

    fn eval_groups(&self, prefix: &str) -> Vec<u64> {
        let matching = self.index.requests.range(prefix.to_owned()..).take_while(|(id, _)| id.starts_with(prefix));
        let mut groups: Vec<u64> = matching.map(|(_, group)| *group).collect();
        groups.retain(|id| self.state.groups.get(id).is_some_and(|group| group.kind == Kind::Eval));
        groups.sort_unstable();
        groups
    }

    /// Results of the evaluation groups whose request ids start with `prefix`; None while one awaits its verdict.
    ///
    /// # Errors
    /// An error of ours.
    pub fn eval_results(&self, prefix: &str) -> Result<Option<Vec<EvalResult>>> {
        let mut results = Vec::new();
        for id in self.eval_groups(prefix) {
            let group = self.state.group(id)?;
            if group.phase == Phase::Partial {
                return Ok(None);
            }
            for member in group.members() {
                let trajectory = self.state.trajectory(member)?;
                results.push(EvalResult {
                    request_id: group.request_id.clone(),
                    prompt_id: group.prompt_id.clone(),
                    reward: trajectory.reward(),
                    len: trajectory.generated(),
                    stop: trajectory.stop,
                    first_version: trajectory.runs.first().map(|run| run.version),
                    last_version: trajectory.last_version(),
                });
            }
        }
        Ok(Some(results))
    }

    /// Evicts the evaluation groups whose request ids start with `prefix`; returns how many.
    ///
    /// # Errors
    /// Those of the log.
    pub fn drop_eval(&mut self, prefix: &str) -> Result<usize> {
        let groups = self.eval_groups(prefix);
        for id in &groups {
            self.state.group(*id)?.members().try_for_each(|member| self.end_lease(member))?;
        }
        if !groups.is_empty() {
            self.record(&Record::Evict(groups.clone(), Reason::Eval), &Arrays::default())?;
        }
        Ok(groups.len())
    }
}
