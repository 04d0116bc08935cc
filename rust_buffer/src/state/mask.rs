//! What becomes of each token of a claim: trained, or masked and why.

use crate::{
    error::Result,
    state::{
        Claim, ClaimSums, State,
        age::Trained,
        fork::parts,
        group::Group,
        record::SegmentLoss,
        trajectory::{Run, Trajectory, Verdict, Version},
    },
};

/// Mask flag: the policy generated the token.
pub const GENERATED: u8 = 1;
/// Mask flag: the token has a gradient.
pub const TRAINED: u8 = 2;
/// Mask flag: left out for its age.
pub const OVER_AGE: u8 = 4;
/// Mask flag: left out because it is not of the newest segment.
pub const SEGMENT: u8 = 8;
/// Mask flag: left out by the learner's group filter.
pub const FILTER: u8 = 16;
/// Mask flag: left out by the learner's veto.
pub const VETO: u8 = 32;

/// Mask flags of the tokens of a run in the branch `id` of the episode `trajectory` in `claim`, where they came.
pub fn mask(run: &Run, id: u64, trajectory: &Trajectory, claim: &Claim, trained: &Trained) -> u8 {
    let over_age = |limit| trained.staleness(claim.version, run.version) > i64::from(limit);
    let current_only = claim.segment_loss == SegmentLoss::CurrentOnly;
    if run.observed {
        0
    } else if claim.max_staleness.is_some_and(over_age) {
        GENERATED | OVER_AGE
    } else if current_only && Some(run.version) != trajectory.newest_generated() {
        GENERATED | SEGMENT
    } else if claim.left_out.filter.contains(&id) {
        GENERATED | FILTER
    } else if claim.left_out.veto.contains(&id) {
        GENERATED | VETO
    } else {
        GENERATED | TRAINED
    }
}

/// The tokens of `claim` by what becomes of them.
///
/// # Errors
/// `Conflict` when one of its groups is not in the store.
pub fn sums(state: &State, claim: &Claim) -> Result<ClaimSums> {
    let mut sums = ClaimSums::default();
    for group in &claim.groups {
        add_sums(&mut sums, state, state.group(*group)?, claim);
    }
    Ok(sums)
}

/// The generated tokens of an episode: their run, the branch in which they came, and how many.
fn generated<'a>(state: &State, id: u64, episode: &'a Trajectory) -> Vec<(&'a Run, u64, u32)> {
    let mut all = Vec::new();
    for branch in state.branches(id, episode) {
        let (from, to) = branch.own();
        for (index, _, tokens) in parts(&episode.runs, from, to) {
            all.push((&episode.runs[index], branch.id, tokens));
        }
    }
    all.retain(|(run, _, _)| !run.observed);
    all
}

fn add_sums(sums: &mut ClaimSums, state: &State, group: &Group, claim: &Claim) {
    for (id, trajectory) in state.members(group) {
        match trajectory.verdict {
            Verdict::Late => continue,
            Verdict::Failed => {
                sums.failed += u64::from(trajectory.generated());
                continue;
            }
            _ => {}
        }
        for (run, id, tokens) in generated(state, id, trajectory) {
            let sum = match mask(run, id, trajectory, claim, &state.trained) & !GENERATED {
                OVER_AGE => &mut sums.over_age,
                SEGMENT => &mut sums.segment,
                FILTER => &mut sums.filter,
                VETO => &mut sums.veto,
                _ => &mut sums.trainable,
            };
            *sum += u64::from(tokens);
        }
    }
}

/// Whether a group has a token to train at a claim of learner version `version`.
///
/// A trajectory's newest token is the last to become over-age, and is of the newest segment.
pub fn is_trainable(state: &State, group: &Group, version: Version, max_staleness: Option<u32>) -> bool {
    state.members(group).any(|(_, trajectory)| {
        let newest = trajectory.newest_generated();
        let within = |v| max_staleness.is_none_or(|limit| state.trained.staleness(version, v) <= i64::from(limit));
        let fresh = newest.is_some_and(within);
        fresh && !matches!(trajectory.verdict, Verdict::Failed | Verdict::Late)
    })
}
