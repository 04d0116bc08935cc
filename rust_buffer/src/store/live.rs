//! How much of each log file is needed yet, and which trajectories lie in pieces: what the upkeep of the log goes by.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    state::group::{Group, Kind},
    state::placed::Placed,
    state::record::{Appended, Record},
    state::trajectory::{Run, Trajectory, Verdict},
    state::{ClaimStatus, State},
    store::size,
};

/// A file is emptied whatever the others hold, if so many times as much of it is dead or more.
const WORTH: u64 = 16;

/// What is derived from the state, kept up to date with each record.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// Bytes of prompts and tokens by log file.
    bytes: BTreeMap<u32, u64>,
    /// Prompts, runs of tokens and annotations.
    places: u64,
    /// Bytes in a snapshot of what has no greatest size: texts, components of rewards, notes and forks.
    said: u64,
    /// Those of request ids of groups that are gone.
    gone: u64,
    /// Complete trajectories whose tokens came in more than one append, and perhaps some that are gone.
    scattered: BTreeSet<u64>,
    /// Bytes became dead since somebody looked.
    released: bool,
    /// Files of which something could not be read: they stay.
    stuck: BTreeSet<u32>,
}

/// What was taken out for one record.
pub(crate) struct Leaving {
    groups: Vec<u64>,
    trajectories: Vec<u64>,
    /// What the record brings to `said`.
    said: u64,
}

impl Live {
    /// That of a state.
    pub fn of(state: &State) -> Self {
        let (said, gone) = (size::of_names(state), size::of_gone(&state.counted_gone));
        let mut live = Self { released: true, said, gone, ..Self::default() };
        for id in state.groups.keys() {
            live.add_group(state, *id);
        }
        live.scattered = state.trajectories.keys().copied().filter(|id| Self::lies_in_pieces(state, *id)).collect();
        live
    }

    /// Bytes that are needed, by file.
    pub fn bytes(&self) -> &BTreeMap<u32, u64> {
        &self.bytes
    }

    /// Bytes that are needed.
    pub fn total(&self) -> u64 {
        self.bytes.values().sum()
    }

    /// Bytes that a snapshot of the state has at most beside `size::BASE`, also after all that leads to an eviction.
    pub fn snapshot_bytes(&self, state: &State) -> u64 {
        size::snapshot(state, self.places, self.said + self.gone)
    }

    /// Whether there may be something to be done.
    pub fn is_due(&self) -> bool {
        self.released || !self.scattered.is_empty()
    }

    /// Takes the oldest complete trajectories that lie in pieces, about `bytes` of them.
    pub(crate) fn take_scattered(&mut self, state: &State, bytes: usize) -> Vec<(u64, Vec<Run>)> {
        let (mut taken, mut size) = (Vec::new(), 0);
        while size < bytes {
            let Some(id) = self.scattered.pop_first() else { break };
            if let Some(trajectory) = state.trajectories.get(&id).filter(|_| Self::lies_in_pieces(state, id)) {
                size += trajectory.runs.iter().map(Run::bytes).sum::<usize>();
                taken.push((id, trajectory.runs.clone()));
            }
        }
        taken
    }

    /// Gives some of them back, for another time.
    pub(crate) fn give_back(&mut self, trajectories: impl IntoIterator<Item = u64>) {
        self.scattered.extend(trajectories);
    }

    /// Of the sealed files, which have these bytes, the one of which the least is needed: if that is very little, or more
    /// of all files is dead than is needed at all.
    pub(crate) fn sparsest(&mut self, sealed: &BTreeMap<u32, u64>) -> Option<u32> {
        self.released = false;
        // Dead ones go as they are.
        let held = sealed.iter().filter_map(|(file, size)| Some((*file, *size, *self.bytes.get(file)?)));
        let least = if held.clone().map(|(_, size, _)| size).sum::<u64>() > 2 * self.total() { 2 } else { WORTH };
        let sparse = held.filter(|(file, size, needed)| least * needed < *size && !self.stuck.contains(file));
        sparse.min_by_key(|(_, size, needed)| needed.saturating_mul(1 << 20) / size).map(|(file, ..)| file)
    }

    /// Notes that a file must stay.
    pub(crate) fn leave(&mut self, file: u32) {
        self.stuck.insert(file);
    }

    /// Evaluation goes soon, and late members are never read.
    fn lies_in_pieces(state: &State, id: u64) -> bool {
        let Some(trajectory) = state.trajectories.get(&id) else { return false };
        let trained = || state.groups.get(&trajectory.group).is_some_and(|group| group.kind == Kind::Train);
        !trajectory.is_partial() && trajectory.verdict != Verdict::Late && trajectory.is_scattered() && trained()
    }

    fn add(&mut self, file: u32, bytes: u64) {
        if bytes > 0 {
            self.places += 1;
            *self.bytes.entry(file).or_default() += bytes;
        }
    }

    fn subtract(&mut self, file: u32, bytes: u64) {
        self.released = true;
        self.places -= 1;
        if let Some(left) = self.bytes.get_mut(&file) {
            *left -= bytes;
            if *left == 0 {
                self.bytes.remove(&file);
            }
        }
    }

    fn add_group(&mut self, state: &State, id: u64) {
        places(state, id).for_each(|(file, bytes)| self.add(file, bytes));
        self.said += state.groups.get(&id).map_or(0, |group| size::of_group(state, group));
    }

    /// Takes out what `record`, which `state` does not have yet, may move or remove.
    pub(crate) fn take_out(&mut self, state: &State, record: &Record) -> Leaving {
        let (groups, trajectories) = moved_by(state, record);
        for id in &groups {
            places(state, *id).for_each(|(file, bytes)| self.subtract(file, bytes));
            self.said -= state.groups.get(id).map_or(0, |group| size::of_group(state, group));
        }
        for (file, bytes) in trajectories.iter().filter_map(|id| state.trajectories.get(id)).flat_map(places_of) {
            self.subtract(file, bytes);
        }
        Leaving { groups, trajectories, said: size::brought(state, record) }
    }

    /// Puts back what of it is still there, and adds what `record` has brought.
    pub(crate) fn put_back(&mut self, state: &State, record: &Record, placed: &Placed, leaving: &Leaving) {
        leaving.groups.iter().for_each(|id| self.add_group(state, *id));
        self.said += leaving.said;
        if !leaving.groups.is_empty() {
            self.gone = size::of_gone(&state.counted_gone);
        }
        let moved = leaving.trajectories.iter().filter_map(|id| state.trajectories.get(id));
        for (file, bytes) in moved.flat_map(places_of) {
            self.add(file, bytes);
        }
        match record {
            Record::Admit(_) => self.add(placed.location.file, u64::from(placed.location.len)),
            Record::Append(items) => self.add_appended(state, items, placed),
            _ => {}
        }
    }

    fn add_appended(&mut self, state: &State, items: &[Appended], placed: &Placed) {
        for item in items {
            self.add(placed.location.file, u64::from(item.len) * if item.observed { 4 } else { 8 });
            if item.stop.is_some() && Self::lies_in_pieces(state, item.trajectory) {
                self.scattered.insert(item.trajectory);
            }
        }
    }
}

/// Groups and trajectories that `record` may move or remove.
fn moved_by(state: &State, record: &Record) -> (Vec<u64>, Vec<u64>) {
    let mut groups = Vec::new();
    match record {
        Record::Score(score) if score.phase.is_none() => {
            groups.extend(state.trajectories.get(&score.trajectory).map(|trajectory| trajectory.group));
        }
        Record::Evict(evicted, _) => groups.clone_from(evicted),
        Record::Drop(iteration) => {
            let committed = state.claims.range(..=iteration).map(|(_, claim)| claim);
            let committed = committed.filter(|claim| claim.status == ClaimStatus::Committed);
            groups.extend(committed.flat_map(|claim| &claim.groups));
        }
        Record::Move(group) => groups.push(*group),
        Record::Annotate(annotate) => return (groups, vec![annotate.trajectory]),
        Record::Compact(items) => {
            let mut trajectories: Vec<u64> = items.iter().map(|item| item.trajectory).collect();
            trajectories.dedup();
            return (groups, trajectories);
        }
        _ => {}
    }
    (groups, Vec::new())
}

/// Where prompt and tokens of a group lie: file, bytes.
fn places(state: &State, id: u64) -> impl Iterator<Item = (u32, u64)> {
    let group = state.groups.get(&id);
    let prompt = group.map(|group: &Group| (group.location.file, u64::from(group.location.len)));
    let members = group.into_iter().flat_map(|group| state.members(group));
    prompt.into_iter().chain(members.flat_map(|(_, trajectory)| places_of(trajectory)))
}

/// Where tokens and annotations of a trajectory lie.
fn places_of(trajectory: &Trajectory) -> impl Iterator<Item = (u32, u64)> + '_ {
    let runs = trajectory.runs.iter().map(|run: &Run| (run.file, run.bytes() as u64));
    let annotations = trajectory.annotations.iter().map(|known| known.location);
    runs.chain(annotations.map(|location| (location.file, u64::from(location.len))))
}
