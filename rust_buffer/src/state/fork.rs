//! Episodes: a trajectory holds the tokens of one episode in the order in which they came, and forks cut them into
//! branches.
//!
//! A branch begins with what it keeps of the history before it, and goes on with the tokens that came after the fork. So
//! each token is stored once: generated in the branch that it belongs to, and observed in later ones that keep it.

use serde::{Deserialize, Serialize};

use crate::{
    error::Result,
    state::{State, trajectory::Run},
};

/// Where a branch begins that is not the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Fork {
    /// Id of the branch: to readers it is a trajectory of its own.
    pub branch: u64,
    /// Tokens of the episode before its own.
    pub start: u32,
    /// Tokens after the prompt that it keeps of the history of the branch before it.
    pub offset: u32,
    /// Fencing epoch that it gave out.
    pub epoch: u64,
}

/// Tokens `from..to` of an episode, as a part of a branch's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Stretch {
    pub from: u32,
    pub to: u32,
    /// Whether they came in this branch.
    pub own: bool,
}

/// A branch of an episode.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Branch {
    pub id: u64,
    /// The branch that it was forked from, and how many tokens of its history are kept; None for the first.
    pub parent: Option<(u64, u32)>,
    /// All that it holds after the prompt.
    pub history: Vec<Stretch>,
}

/// Tokens of a run that are in the history of a branch.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Part<'a> {
    pub run: &'a Run,
    /// Tokens of the run before them.
    pub skip: u32,
    pub len: u32,
    /// Whether they came in this branch.
    pub own: bool,
}

impl Branch {
    /// What it holds after the prompt; `runs` are its episode's.
    pub fn parts<'a>(&'a self, runs: &'a [Run]) -> impl Iterator<Item = Part<'a>> {
        let of = move |stretch: &'a Stretch| {
            let Stretch { from, to, own } = *stretch;
            parts(runs, from, to).map(move |(index, skip, len)| Part { run: &runs[index], skip, len, own })
        };
        self.history.iter().flat_map(of)
    }

    /// Tokens after the prompt.
    pub fn len(&self) -> u32 {
        self.history.iter().map(|stretch| stretch.to - stretch.from).sum()
    }

    /// Whether it has no token after the prompt.
    pub fn is_empty(&self) -> bool {
        self.history.is_empty()
    }

    /// Tokens of the episode that came in it.
    pub fn own(&self) -> (u32, u32) {
        self.history.last().filter(|stretch| stretch.own).map_or((0, 0), |stretch| (stretch.from, stretch.to))
    }

    /// The branch that `fork` begins, with the tokens up to `end`.
    fn fork(&self, fork: &Fork, end: u32) -> Self {
        let (mut left, mut history) = (fork.offset, Vec::new());
        for stretch in &self.history {
            let to = stretch.to.min(stretch.from.saturating_add(left));
            left -= to - stretch.from;
            if to > stretch.from {
                history.push(Stretch { from: stretch.from, to, own: false });
            }
        }
        if end > fork.start {
            history.push(Stretch { from: fork.start, to: end, own: true });
        }
        Self { id: fork.branch, parent: Some((self.id, fork.offset)), history }
    }
}

impl State {
    pub(super) fn apply_fork(&mut self, id: u64, offset: u32) -> Result<()> {
        let branch = self.next_trajectory;
        let (trajectory, _) = self.pair_mut(id)?;
        trajectory.epoch += 1;
        let (start, epoch) = (trajectory.len, trajectory.epoch);
        let forks = self.forks.entry(id).or_default();
        if let Some(last) = forks.last_mut().filter(|last| last.start == start) {
            (last.offset, last.epoch) = (offset, epoch);
        } else {
            forks.push(Fork { branch, start, offset, epoch });
            self.next_trajectory += 1;
        }
        Ok(())
    }
}

/// The fork that began the newest branch of an episode of `len` tokens, if nothing came in that yet.
pub fn bare(len: u32, forks: &[Fork]) -> Option<&Fork> {
    forks.last().filter(|last| last.start == len)
}

/// All branches of the episode `id` of `len` tokens, in the order in which they began; the last one may have no token of
/// its own yet.
pub fn branches(id: u64, len: u32, forks: &[Fork]) -> Vec<Branch> {
    let end = |nth: usize| forks.get(nth).map_or(len, |next| next.start);
    let history = if end(0) > 0 { vec![Stretch { from: 0, to: end(0), own: true }] } else { Vec::new() };
    let mut branches = vec![Branch { id, parent: None, history }];
    for (nth, fork) in forks.iter().enumerate() {
        let next = branches[nth].fork(fork, end(nth + 1));
        branches.push(next);
    }
    branches
}

/// The branches that are trained: without one that nothing came in before the episode ended.
pub fn trained_branches(id: u64, len: u32, forks: &[Fork]) -> Vec<Branch> {
    let mut all = branches(id, len, forks);
    if bare(len, forks).is_some() {
        all.pop();
    }
    all
}

/// The parts of `runs` that hold the tokens `from..to` of the episode: index of the run, tokens of it that come before,
/// and how many are of the part.
pub fn parts(runs: &[Run], from: u32, to: u32) -> impl Iterator<Item = (usize, u32, u32)> {
    let mut start = 0;
    let part = move |(index, run): (usize, &Run)| {
        let (first, last) = (from.max(start), to.min(start + run.len));
        let skip = first.saturating_sub(start);
        start += run.len;
        (first < last).then(|| (index, skip, last - first))
    };
    runs.iter().enumerate().filter_map(part)
}
