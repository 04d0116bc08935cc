//! Tokens of trajectories, read from the log without holding the store.

use std::collections::BTreeMap;

use imbl::OrdMap;

use crate::{
    error::{Result, StoreError},
    log::{Bytes, Log},
    state::State,
    state::fork::{self, Branch, Fork, Part},
    state::group::Group,
    state::trajectory::Trajectory,
    store::arrays::{ColumnReader, Extra, Extras, check_run, read_prompt_tokens, run_bytes},
    wire::WHOLE,
};

/// Trajectories whose runs and pages are reached for before the first one is copied.
const AHEAD: usize = 64;

const PAGE_BYTES: usize = 4096;

/// A branch of an episode, and the admission that has its prompt.
pub(super) struct Source<'a> {
    pub(super) group: u64,
    pub(super) admission: &'a Group,
    /// The episode.
    pub(super) trajectory: &'a Trajectory,
    pub(super) branch: Branch,
}

impl Source<'_> {
    /// Tokens of the branch, its prompt included.
    pub(super) fn len(&self) -> i64 {
        i64::from(self.admission.prompt_len) + i64::from(self.branch.len())
    }

    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        self.branch.parts(&self.trajectory.runs)
    }
}

/// What a branch consists of, in order.
pub(super) enum Piece<'a> {
    /// Ids of its prompt.
    Prompt(&'a [u8]),
    /// Tokens of a stored run, their ids and log-probs, which are none unless they were generated in the branch.
    Part(Part<'a>, &'a [u8], &'a [u8]),
}

/// Reads a byte of each page.
fn touch(bytes: &Bytes) {
    std::hint::black_box(bytes.iter().step_by(PAGE_BYTES).fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
}

/// Hands the pieces of branches to `take`, with the index of each; checksums of runs are tested if `check`.
///
/// # Errors
/// Those of the log and of `take`.
pub(super) fn walk(
    log: &Log, sources: &[&Source<'_>], check: bool, mut take: impl FnMut(usize, Piece<'_>) -> Result<()>,
) -> Result<()> {
    let mut prompt = (None, Vec::new());
    for (chunk, ahead) in sources.chunks(AHEAD).enumerate() {
        // Each step reaches for many places at once: the processor waits for all of them together.
        let parts = ahead.iter().flat_map(|source| source.parts());
        let bytes: Vec<Bytes> = parts.map(|part| run_bytes(log, part.run)).collect::<Result<_>>()?;
        bytes.iter().for_each(touch);
        let mut bytes = bytes.iter();
        for (index, source) in ahead.iter().enumerate() {
            let index = chunk * AHEAD + index;
            if prompt.0 != Some(source.group) {
                prompt = (Some(source.group), read_prompt_tokens(log, source.admission.location)?);
            }
            take(index, Piece::Prompt(&prompt.1))?;
            for (part, bytes) in source.parts().zip(bytes.by_ref()) {
                if check {
                    check_run(log, part.run, bytes)?;
                }
                let (from, to) = (4 * part.skip as usize, 4 * (part.skip + part.len) as usize);
                let (ids, logprobs) = bytes.split_at(4 * part.run.len as usize);
                let generated = part.own && !part.run.observed;
                take(index, Piece::Part(part, &ids[from..to], if generated { &logprobs[from..to] } else { &[] }))?;
            }
        }
    }
    Ok(())
}

/// Some bytes of a caller's array.
///
/// # Errors
/// `Conflict` when it is shorter.
pub(super) fn part(bytes: &mut [u8], from: usize, to: usize) -> Result<&mut [u8]> {
    let len = bytes.len();
    bytes.get_mut(from..to).ok_or_else(|| {
        StoreError::Conflict(format!("an array of `out` has {len} bytes, at least {to} are needed; make it longer"))
    })
}

/// Puts ids, and as many log-probs, at byte `from` of a caller's arrays; `own` log-probs may be none, then they are 0.
///
/// # Errors
/// `Conflict` when an array is shorter.
pub(super) fn put(ids: &mut [u8], logprobs: &mut [u8], from: usize, own: (&[u8], &[u8])) -> Result<()> {
    let (own_ids, own_logprobs) = own;
    let to = from + own_ids.len();
    part(ids, from, to)?.copy_from_slice(own_ids);
    let stored = part(logprobs, from, to)?;
    if own_logprobs.is_empty() {
        stored.fill(0);
    } else {
        stored.copy_from_slice(own_logprobs);
    }
    Ok(())
}

/// Trajectories, which may be branches of episodes, as they were when they were asked for.
pub struct TokenView {
    ids: Vec<u64>,
    /// Those of which they are branches.
    episodes: Vec<u64>,
    forks: OrdMap<u64, Vec<Fork>>,
    groups: OrdMap<u64, Group>,
    trajectories: OrdMap<u64, Trajectory>,
}

impl TokenView {
    /// The trajectories `ids`, in that order.
    pub fn new(state: &State, ids: Vec<u64>) -> Self {
        let (groups, trajectories, forks) = (state.groups.clone(), state.trajectories.clone(), state.forks.clone());
        let mut later = BTreeMap::new();
        if ids.iter().any(|id| !trajectories.contains_key(id)) {
            let of = |(episode, forks): (&u64, &Vec<Fork>)| -> Vec<_> {
                forks.iter().map(|fork| (fork.branch, *episode)).collect()
            };
            later.extend(forks.iter().flat_map(of));
        }
        let episodes = ids.iter().map(|id| later.get(id).copied().unwrap_or(*id)).collect();
        Self { ids, episodes, forks, groups, trajectories }
    }

    /// One of them that is not in the store any more.
    pub fn gone(&self, state: &State) -> Option<u64> {
        let mut pairs = self.ids.iter().zip(&self.episodes);
        pairs.find(|(_, episode)| !state.trajectories.contains_key(*episode)).map(|(id, _)| *id)
    }

    fn sources(&self) -> Result<Vec<Source<'_>>> {
        let gone = |id: &u64| StoreError::Conflict(format!("trajectory {id} is not in the store"));
        // Branches are one after another as a rule: those of an episode are made once.
        let mut made: (Option<u64>, Vec<Branch>) = (None, Vec::new());
        let mut source = |id: &u64, episode: &u64| {
            let trajectory = self.trajectories.get(episode)?;
            let admission = self.groups.get(&trajectory.group)?;
            if made.0 != Some(*episode) {
                let forks = self.forks.get(episode).map_or(&[][..], Vec::as_slice);
                made = (Some(*episode), fork::branches(*episode, trajectory.len, forks));
            }
            // Ids of branches ascend.
            let at = made.1.binary_search_by_key(id, |branch| branch.id).ok()?;
            Some(Source { group: trajectory.group, admission, trajectory, branch: made.1[at].clone() })
        };
        let pairs = self.ids.iter().zip(&self.episodes);
        pairs.map(|(id, episode)| source(id, episode).ok_or_else(|| gone(id))).collect()
    }

    /// The extra columns of each, by name. Those of a token are in the branch in which it came, those of an episode in
    /// all its branches.
    ///
    /// # Errors
    /// `Conflict` when one of them is not in the store; those of the log.
    pub fn extras(&self, log: &Log) -> Result<Vec<Extras>> {
        let mut reader = ColumnReader::new(log);
        let columns = |source: Source<'_>| {
            let extras = reader.of_trajectory(source.trajectory)?;
            let ((from, to), len) = (source.branch.own(), source.branch.len());
            let own = |mut extra: Extra| {
                if extra.dtype.starts_with(WHOLE) {
                    return Some(extra);
                }
                let (first, last) = (from.max(extra.offset), to.min(extra.offset + extra.len));
                if first >= last {
                    return None;
                }
                let size = extra.bytes.len() / extra.len as usize;
                let [begin, end] = [first, last].map(|at| size * (at - extra.offset) as usize);
                (extra.offset, extra.len) = (first - from + len - (to - from), last - first);
                extra.bytes = extra.bytes[begin..end].to_vec();
                Some(extra)
            };
            let kept = |(name, all): (String, Vec<Extra>)| (name, all.into_iter().filter_map(own).collect());
            Ok(extras.into_iter().map(kept).collect())
        };
        self.sources()?.into_iter().map(columns).collect()
    }

    /// Tokens of each, its prompt included.
    ///
    /// # Errors
    /// `Conflict` when one of them is not in the store.
    pub fn lengths(&self) -> Result<Vec<i64>> {
        Ok(self.sources()?.iter().map(Source::len).collect())
    }

    /// Packs ids (int32) and log-probs (float32, 0 at prompts and observed tokens), little-endian, into arrays that may
    /// be longer; checksums are tested if `check`.
    ///
    /// # Errors
    /// `Conflict` when a trajectory is not in the store or an array is too short; those of the log.
    pub fn pack(&self, log: &Log, ids: &mut [u8], logprobs: &mut [u8], check: bool) -> Result<()> {
        let mut at = 0;
        let sources = self.sources()?;
        walk(log, &sources.iter().collect::<Vec<_>>(), check, |_, piece| {
            let own = match piece {
                Piece::Prompt(ids) => (ids, &[][..]),
                Piece::Part(_, ids, logprobs) => (ids, logprobs),
            };
            put(ids, logprobs, at, own)?;
            at += own.0.len();
            Ok(())
        })
    }
}
