//! Step plans: how the groups of a claim are dealt to optimizer steps, recorded before it is trained.

use crate::{
    error::Result,
    log::Arrays,
    state::ClaimStatus,
    state::record::{Plan, Record},
    store::{Store, conflict},
};

/// Longest name of a rule, in bytes.
const MAX_RULE: usize = 256;

impl Store {
    /// Groups of a claim that have a member to train, in claim order: those that a plan deals to steps.
    fn dealt(&self, iteration: i64) -> Result<Vec<u64>> {
        let mut dealt = Vec::new();
        for id in &self.state.claim(iteration)?.groups {
            if self.state.group(*id)?.scored() > 0 {
                dealt.push(*id);
            }
        }
        Ok(dealt)
    }

    /// Records how `iteration`'s claim is dealt to `num_steps` steps: `steps` has the 0-based step of each group with a
    /// reward, in claim order. Where the claim is undone it is made again with that plan.
    ///
    /// # Errors
    /// `Conflict`: no such claim, one that has another plan or is trained, or numbers that are not of it.
    pub fn record_plan(
        &mut self, iteration: i64, rule: String, seed: Option<i64>, num_steps: u32, steps: &[u32],
    ) -> Result<()> {
        let groups = self.dealt(iteration)?;
        if rule.is_empty() || rule.len() > MAX_RULE || groups.len() != steps.len() {
            let (given, wanted) = (steps.len(), groups.len());
            return conflict(format!(
                "a plan of iteration {iteration} by rule {rule:?} deals {given} groups, the claim has {wanted}; name the \
                 rule in 1 to {MAX_RULE} bytes, and a step for each group"
            ));
        }
        if let Some(step) = steps.iter().find(|step| **step >= num_steps) {
            return conflict(format!("a plan of iteration {iteration} has step {step}, of {num_steps} from 0"));
        }
        let plan = Plan { rule, seed, num_steps, steps: groups.into_iter().zip(steps.iter().copied()).collect() };
        let claim = self.state.claim(iteration)?;
        match &claim.plan {
            Some(recorded) if *recorded == plan => return Ok(()),
            Some(_) => {
                return conflict(format!(
                    "the claim of iteration {iteration} has another plan; it is trained as it was first dealt"
                ));
            }
            None => {}
        }
        if claim.status != ClaimStatus::Claimed {
            return conflict(format!(
                "the claim of iteration {iteration} is trained already; a plan is recorded before that"
            ));
        }
        self.record(&Record::Plan(iteration, plan), &Arrays::default()).map(drop)
    }

    /// The plan of `iteration`'s claim, and the step of each group in claim order; None where none was recorded.
    ///
    /// # Errors
    /// `Conflict` when there is no such claim.
    pub fn plan(&self, iteration: i64) -> Result<Option<(Plan, Vec<u32>)>> {
        let claim = self.state.claim(iteration)?;
        let Some(plan) = &claim.plan else { return Ok(None) };
        let steps = claim.groups.iter().filter_map(|group| plan.steps.get(group).copied()).collect();
        Ok(Some((plan.clone(), steps)))
    }
}
