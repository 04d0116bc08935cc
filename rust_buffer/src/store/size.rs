//! How large a snapshot of the state can be: the room that is kept for it.
//!
//! Each part of the state is counted with the most bytes that its numbers can take and with its texts as they are, and
//! with what it comes to on its way to an eviction: nothing of that can be refused any more. So a group has the bytes of
//! a claim, a plan and a publication of its own, and a trajectory those of a usual reward and of being left out.

use crate::{
    state::State,
    state::fork,
    state::gone::Counted,
    state::group::Group,
    state::record::{Record, Score},
    state::successes::Successes,
    state::trajectory::{Outcome, Trajectory, Verdict},
    state::turn::Turn,
};

/// What every snapshot has: file header, frames, ledger and other numbers, and as many quotas as are kept.
pub(crate) const BASE: u64 = 4096;

const GROUP: u64 = 1024;

const TRAJECTORY: u64 = 288;

/// Components of a reward that are among the bytes of its trajectory, and the bytes of one more.
const USUAL_COMPONENTS: usize = 4;
const COMPONENT: u64 = 16;

/// A run of tokens; a prompt and an annotation have as many bytes too.
const PLACE: u64 = 46;

/// An annotation beside its place and the name of its scorer.
const ANNOTATION: u64 = 32;

const FORK: u64 = 88;

/// A note on an episode, and one of its rewards, beside name and key.
const TURN: u64 = 52;
const REWARD: u64 = 14;

const PUBLICATION: u64 = 64;

/// Two numbers, as those of a rate of success, or the head of a text.
const PAIR: u64 = 20;

/// Bytes of the rest of a snapshot; `places` are prompts, runs and annotations, `said` has the bytes of texts and the like.
pub(crate) fn snapshot(state: &State, places: u64, said: u64) -> u64 {
    let Successes { rates, moved, evicted, .. } = &state.successes;
    // What was evicted moves a rate yet.
    let successes = rates.len() + moved.len() + 2 * evicted.len();
    let pairs = successes + state.gone.len() + state.spent.len() + state.trained.num_restored();
    let (groups, trajectories) = (state.groups.len() as u64, state.trajectories.len() as u64);
    let publications = PUBLICATION * state.publications.len() as u64;
    fixed(groups, trajectories, places) + publications + PAIR * pairs as u64 + said
}

fn fixed(groups: u64, trajectories: u64, places: u64) -> u64 {
    GROUP * groups + TRAJECTORY * trajectories + PLACE * places
}

/// By how much a snapshot may grow with a record that can be refused.
pub(crate) fn growth(state: &State, record: &Record) -> u64 {
    let fixed = match record {
        Record::Admit(admit) => fixed(1, u64::from(admit.size), 1),
        Record::Append(items) => (PLACE + PAIR) * items.len() as u64,
        Record::Annotate(_) => fixed(0, 0, 1),
        _ => 0,
    };
    fixed + brought(state, record)
}

/// What `record`, which the state does not have yet, brings of texts and the like.
pub(crate) fn brought(state: &State, record: &Record) -> u64 {
    match record {
        Record::Admit(admit) => (admit.request_id.len() + admit.prompt_id.len()) as u64,
        Record::Score(score) => of_score(state, score),
        Record::Fork(id, _) => {
            let bare = state.trajectories.get(id).and_then(|known| fork::bare(known.len, state.forks(*id)));
            if bare.is_none() { FORK } else { 0 }
        }
        Record::Turn(_, turn) => of_turn(turn),
        Record::Annotate(annotate) => {
            let known = state.trajectories.get(&annotate.trajectory);
            let again = known.is_some_and(|trajectory| trajectory.is_annotated(&annotate.scorer));
            if again { 0 } else { ANNOTATION + annotate.scorer.len() as u64 }
        }
        _ => 0,
    }
}

fn of_score(state: &State, score: &Score) -> u64 {
    let new = score.components.keys().filter(|name| !state.components.contains(name));
    let names: u64 = new.map(|name| of_name(name)).sum();
    let stored = score.outcome != Outcome::InfraFailure && score.phase.is_some();
    names + if stored { of_components(score.components.len()) } else { 0 }
}

fn of_components(count: usize) -> u64 {
    COMPONENT * count.saturating_sub(USUAL_COMPONENTS) as u64
}

fn of_name(name: &str) -> u64 {
    PAIR + name.len() as u64
}

fn of_turn(turn: &Turn) -> u64 {
    let rewards: u64 = turn.rewards.keys().map(|name| REWARD + name.len() as u64).sum();
    TURN + rewards + turn.key.as_ref().map_or(0, |key| key.len() as u64)
}

/// What a group has of texts and the like.
pub(crate) fn of_group(state: &State, group: &Group) -> u64 {
    let members = state.members(group).map(|(id, trajectory)| of_member(state, id, trajectory));
    (group.request_id.len() + group.prompt_id.len()) as u64 + members.sum::<u64>()
}

fn of_member(state: &State, id: u64, trajectory: &Trajectory) -> u64 {
    let components = if let Verdict::Scored { components, .. } = &trajectory.verdict { components.len() } else { 0 };
    let annotations = trajectory.annotations.iter().map(|known| ANNOTATION + known.scorer.len() as u64);
    let turns = state.turns(id).iter().map(of_turn);
    of_components(components) + FORK * state.forks(id).len() as u64 + annotations.chain(turns).sum::<u64>()
}

/// Names of reward components.
pub(crate) fn of_names(state: &State) -> u64 {
    state.components.iter().map(|name| of_name(name)).sum()
}

/// Request ids of groups that are gone.
pub(crate) fn of_gone(gone: &Counted) -> u64 {
    gone.prefixes().map(|(prefix, runs)| of_name(prefix) + PAIR * runs as u64).sum()
}
