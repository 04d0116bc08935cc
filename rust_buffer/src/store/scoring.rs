//! Scoring: complete trajectories are handed out, and each attempt's outcome is recorded once.

use std::collections::BTreeMap;

use crate::{
    clock::Micros,
    error::Result,
    log::Arrays,
    state::group::{Kind, Phase},
    state::record::{Reason, Record, Score},
    state::trajectory::{Outcome, Trajectory, Verdict},
    store::{Store, conflict},
};

impl Store {
    /// Up to `max_items` complete trajectories without a verdict, which every scorer has seen; each comes again after `ttl`.
    pub fn unscored(&mut self, max_items: usize, ttl: Micros, now: Micros) -> Vec<u64> {
        self.index.take_back(&self.state, now);
        self.index.unscored().hand_out(max_items, now.saturating_add(ttl))
    }

    /// Records the outcome of scoring attempt `attempt`. Of a member that came too late it is ignored, and so is a second
    /// outcome of an attempt, which is counted if it differs: scorers need not agree, and the first one stands.
    ///
    /// # Errors
    /// `Conflict`: not complete, a reward that is not finite, or an attempt that nobody was asked for.
    pub fn score(
        &mut self, id: u64, attempt: u32, outcome: Outcome, reward: f64, components: BTreeMap<String, f64>, now: Micros,
    ) -> Result<()> {
        self.expire(now)?;
        let Some(trajectory) = self.state.trajectories.get(&id) else {
            // Only groups whose verdicts are final leave the store, so this repeats a recorded one.
            return self.state.require_gone(id);
        };
        if trajectory.verdict == Verdict::Late {
            return Ok(());
        }
        let (reward, components) = match outcome {
            Outcome::InfraFailure => (0.0, BTreeMap::new()),
            _ => (reward, components),
        };
        check_finite(id, reward, &components)?;
        if trajectory.is_partial() {
            return conflict(format!("trajectory {id} is not complete and cannot be scored"));
        }
        let repeats = if attempt < trajectory.attempts {
            outcome == Outcome::InfraFailure
        } else {
            matches!(&trajectory.verdict, Verdict::Scored { outcome: o, reward: r, components: c }
                if (*o, *r) == (outcome, reward) && self.state.components(c) == components)
        };
        if repeats {
            return Ok(());
        }
        if attempt > trajectory.attempts {
            return conflict(format!(
                "trajectory {id}: attempt {attempt} was never asked for (next attempt: {})",
                trajectory.attempts
            ));
        }
        if attempt < trajectory.attempts || trajectory.verdict != Verdict::Pending {
            self.scores_ignored += 1;
            return Ok(());
        }
        let failed = outcome == Outcome::InfraFailure && attempt + 1 >= self.settings.max_attempts;
        let (id_of_group, group) = (trajectory.group, self.state.group(trajectory.group)?);
        let phase = if outcome == Outcome::InfraFailure && !failed {
            Some(Phase::Partial)
        } else {
            group.after_verdict(failed, self.settings.min_group_size)
        };
        let score = Score { trajectory: id, outcome, reward, components, failed, phase };
        self.record(&Record::Score(score), &Arrays::default())?;
        self.watch_group(id_of_group, now);
        self.judge(id_of_group)
    }

    /// Judges, once, what was ready when the store was opened: a crash may have come between the last score of a group and
    /// its eviction, and another filter may have been set since.
    pub(crate) fn judge_ready(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.is_judged, true) {
            return Ok(());
        }
        let ready: Vec<u64> = self.index.ready.iter().copied().collect();
        ready.into_iter().try_for_each(|id| self.judge(id))
    }

    /// Evicts a group that has become ready if its rewards say nothing to the learner.
    pub(crate) fn judge(&mut self, id: u64) -> Result<()> {
        let (Some(signal), Some(group)) = (self.settings.signal, self.state.groups.get(&id)) else { return Ok(()) };
        if group.kind != Kind::Train || group.phase != Phase::Ready {
            return Ok(());
        }
        let members = group.members().filter_map(|member| self.state.trajectories.get(&member));
        let rewards: Vec<f64> = members.filter_map(Trajectory::reward).collect();
        if signal.is_in(rewards.iter().sum::<f64>() / rewards.len() as f64) {
            return Ok(());
        }
        let success = self.settings.successes.and_then(|averaging| self.state.success(group, averaging));
        let reason = Reason::NoSignal(success.map(|(_, success)| success));
        self.record(&Record::Evict(vec![id], reason), &Arrays::default())?;
        self.no_signal += 1;
        Ok(())
    }
}

fn check_finite(id: u64, reward: f64, components: &BTreeMap<String, f64>) -> Result<()> {
    if let Some((name, value)) = components.iter().find(|(_, value)| !value.is_finite()) {
        return conflict(format!("trajectory {id}: component {name:?} is {value}; rewards must be finite"));
    }
    if !reward.is_finite() {
        return conflict(format!("trajectory {id}: the reward is {reward}; rewards must be finite"));
    }
    Ok(())
}
