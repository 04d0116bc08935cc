//! Tokens of trajectories, read from the log without holding the store.

use imbl::OrdMap;

use crate::{
    error::{Result, StoreError},
    log::{Bytes, Log},
    state::State,
    state::group::Group,
    state::trajectory::{Run, Trajectory},
    store::arrays::{Extras, check_run, read_extras, read_prompt_tokens, run_bytes},
};

/// Trajectories whose runs and pages are reached for before the first one is copied.
const AHEAD: usize = 64;

const PAGE_BYTES: usize = 4096;

/// A trajectory, and the admission that has its prompt.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) group: u64,
    pub(super) admission: &'a Group,
    pub(super) trajectory: &'a Trajectory,
}

/// What a trajectory consists of, in order.
pub(super) enum Piece<'a> {
    /// Ids of its prompt.
    Prompt(&'a [u8]),
    /// A stored run, its ids and its log-probs, which are none if it is observed.
    Run(&'a Run, &'a [u8], &'a [u8]),
}

/// Reads a byte of each page.
fn touch(bytes: &Bytes) {
    std::hint::black_box(bytes.iter().step_by(PAGE_BYTES).fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
}

/// Hands the pieces of trajectories to `take`, with the index of each; checksums of runs are tested if `check`.
///
/// # Errors
/// Those of the log and of `take`.
pub(super) fn walk(
    log: &Log, sources: &[Source<'_>], check: bool, mut take: impl FnMut(usize, Piece<'_>) -> Result<()>,
) -> Result<()> {
    let mut prompt = (None, Vec::new());
    for (chunk, ahead) in sources.chunks(AHEAD).enumerate() {
        // Each step reaches for many places at once: the processor waits for all of them together.
        let runs = ahead.iter().flat_map(|source| &source.trajectory.runs);
        let bytes: Vec<Bytes> = runs.map(|run| run_bytes(log, run)).collect::<Result<_>>()?;
        bytes.iter().for_each(touch);
        let mut bytes = bytes.iter();
        for (index, source) in ahead.iter().enumerate() {
            let index = chunk * AHEAD + index;
            if prompt.0 != Some(source.group) {
                prompt = (Some(source.group), read_prompt_tokens(log, source.admission.location)?);
            }
            take(index, Piece::Prompt(&prompt.1))?;
            for (run, bytes) in source.trajectory.runs.iter().zip(bytes.by_ref()) {
                if check {
                    check_run(log, run, bytes)?;
                }
                let (ids, logprobs) = bytes.split_at(4 * run.len as usize);
                take(index, Piece::Run(run, ids, logprobs))?;
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

/// Trajectories as they were when they were asked for.
pub struct TokenView {
    pub(super) ids: Vec<u64>,
    groups: OrdMap<u64, Group>,
    trajectories: OrdMap<u64, Trajectory>,
}

impl TokenView {
    /// The trajectories `ids`, in that order.
    pub fn new(state: &State, ids: Vec<u64>) -> Self {
        Self { ids, groups: state.groups.clone(), trajectories: state.trajectories.clone() }
    }

    fn sources(&self) -> Result<Vec<Source<'_>>> {
        let gone = |id: &u64| StoreError::Conflict(format!("trajectory {id} is not in the store"));
        let source = |id: &u64| {
            let trajectory = self.trajectories.get(id)?;
            let admission = self.groups.get(&trajectory.group)?;
            Some(Source { group: trajectory.group, admission, trajectory })
        };
        self.ids.iter().map(|id| source(id).ok_or_else(|| gone(id))).collect()
    }

    /// The extra columns of each, by name.
    ///
    /// # Errors
    /// `Conflict` when one of them is not in the store; those of the log.
    pub fn extras(&self, log: &Log) -> Result<Vec<Extras>> {
        let columns = |source: Source<'_>| {
            let Trajectory { columns, runs, .. } = source.trajectory;
            if *columns { read_extras(log, runs) } else { Ok(Extras::new()) }
        };
        self.sources()?.into_iter().map(columns).collect()
    }

    /// Tokens of each, its prompt included.
    ///
    /// # Errors
    /// `Conflict` when one of them is not in the store.
    pub fn lengths(&self) -> Result<Vec<i64>> {
        let length = |source: Source<'_>| i64::from(source.admission.prompt_len) + i64::from(source.trajectory.len);
        Ok(self.sources()?.into_iter().map(length).collect())
    }

    /// Packs ids (int32) and log-probs (float32, 0 at prompts and observed tokens), little-endian, into arrays that may
    /// be longer; checksums are tested if `check`.
    ///
    /// # Errors
    /// `Conflict` when a trajectory is not in the store or an array is too short; those of the log.
    pub fn pack(&self, log: &Log, ids: &mut [u8], logprobs: &mut [u8], check: bool) -> Result<()> {
        let mut at = 0;
        walk(log, &self.sources()?, check, |_, piece| {
            let (own_ids, own_logprobs) = match piece {
                Piece::Prompt(ids) => (ids, &[][..]),
                Piece::Run(_, ids, logprobs) => (ids, logprobs),
            };
            let to = at + own_ids.len();
            part(ids, at, to)?.copy_from_slice(own_ids);
            let given = part(logprobs, at, to)?;
            if own_logprobs.is_empty() {
                given.fill(0);
            } else {
                given.copy_from_slice(own_logprobs);
            }
            at = to;
            Ok(())
        })
    }
}
