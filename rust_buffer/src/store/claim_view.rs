//! Claims as packed arrays, read from the log without holding the store.

use std::collections::BTreeMap;

use imbl::OrdMap;

use crate::{
    error::{Result, StoreError},
    log::{Bytes, Log},
    state::fork::{Branch, Fork, Stretch, parts, trained_branches},
    state::group::Group,
    state::mask::{self, GENERATED},
    state::trajectory::{Run, Trajectory, Verdict, Version},
    state::{Claim, State},
    store::arrays::{check_run, read_prompt_tokens, run_bytes},
};

/// Members of a claim whose runs and pages are reached for before the first one is copied.
const MEMBERS_AHEAD: usize = 64;

const PAGE_BYTES: usize = 4096;

/// A claim and all that it refers to, as it was when it was asked for.
pub struct ClaimView {
    claim: Claim,
    groups: OrdMap<u64, Group>,
    trajectories: OrdMap<u64, Trajectory>,
    forks: OrdMap<u64, Vec<Fork>>,
    components: Vec<String>,
}

/// One member of a claim.
struct Member<'a> {
    group: u64,
    id: u64,
    admission: &'a Group,
    trajectory: &'a Trajectory,
    reward: f64,
    components: &'a [(u32, f64)],
}

/// The per-token arrays of `pmdflow.types.TrainBatch`, little-endian, to be filled; they may be longer than needed.
pub struct Columns<'a> {
    /// int32 token ids.
    pub tokens: &'a mut [u8],
    /// float32 log-probs.
    pub logprobs: &'a mut [u8],
    /// int32 versions.
    pub versions: &'a mut [u8],
    /// float32 temperatures.
    pub temperatures: &'a mut [u8],
    /// uint8 mask flags.
    pub mask: &'a mut [u8],
}

/// The per-trajectory arrays of `pmdflow.types.TrainBatch`.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Rows {
    /// Starts of the trajectories, and the end.
    pub cu_seqlens: Vec<i64>,
    /// Prompt tokens.
    pub prompt_lengths: Vec<i32>,
    pub groups: Vec<i64>,
    /// Branches of episodes.
    pub trajectories: Vec<i64>,
    pub episodes: Vec<i64>,
    /// Branch that each was forked from; -1 for the first of an episode.
    pub parents: Vec<i64>,
    /// Tokens after the prompt that each keeps of that one.
    pub fork_offsets: Vec<i32>,
    pub rewards: Vec<f64>,
    /// NaN where a member has no such component.
    pub components: BTreeMap<String, Vec<f64>>,
    pub stops: Vec<u8>,
    /// Prompt ids, each with the number of neighbours that have it.
    pub prompt_ids: Vec<(String, usize)>,
}

/// Reads a byte of each page.
fn touch(bytes: &Bytes) {
    std::hint::black_box(bytes.iter().step_by(PAGE_BYTES).fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
}

impl ClaimView {
    /// The claim of `iteration`.
    ///
    /// # Errors
    /// `Conflict` when it has none.
    pub fn new(state: &State, iteration: i64) -> Result<Self> {
        Ok(Self {
            claim: state.claim(iteration)?.clone(),
            groups: state.groups.clone(),
            trajectories: state.trajectories.clone(),
            forks: state.forks.clone(),
            components: state.components.clone(),
        })
    }

    /// Learner version of the claim.
    pub fn version(&self) -> Version {
        self.claim.version
    }

    /// Members in claim order, without those given up by scoring.
    fn members(&self) -> Result<Vec<Member<'_>>> {
        let mut members = Vec::new();
        for group in &self.claim.groups {
            let gone = || StoreError::Conflict(format!("group {group} is not in the store"));
            let admission = self.groups.get(group).ok_or_else(gone)?;
            for (id, trajectory) in self.trajectories.range(admission.members()) {
                if let Verdict::Scored { reward, components, .. } = &trajectory.verdict {
                    members.push(Member { group: *group, id: *id, admission, trajectory, reward: *reward, components });
                }
            }
        }
        Ok(members)
    }

    /// The branches of a member's episode.
    fn branches(&self, member: &Member<'_>) -> Vec<Branch> {
        let forks = self.forks.get(&member.id).map_or(&[][..], Vec::as_slice);
        trained_branches(member.id, member.trajectory.len, forks)
    }

    /// Tokens of all members, prompts included.
    ///
    /// # Errors
    /// An error of ours.
    pub fn num_tokens(&self) -> Result<usize> {
        let branch = |member: &Member<'_>, branch: &Branch| (member.admission.prompt_len + branch.len()) as usize;
        let tokens = |member: &Member<'_>| -> usize { self.branches(member).iter().map(|b| branch(member, b)).sum() };
        Ok(self.members()?.iter().map(tokens).sum())
    }

    /// Packs the claim; checksums of tokens are tested if `check`.
    ///
    /// # Errors
    /// Those of the log, or `Conflict` when the columns are too short.
    pub fn pack(&self, log: &Log, columns: &mut Columns<'_>, check: bool) -> Result<Rows> {
        let (members, mut rows) = (self.members()?, Rows::default());
        let used = members.iter().flat_map(|member| member.components);
        let mut components: BTreeMap<u32, Vec<f64>> = used.map(|(name, _)| (*name, Vec::new())).collect();
        let mut packer = Packer { columns, at: 0 };
        let mut prompt = (None, Vec::new());
        for ahead in members.chunks(MEMBERS_AHEAD) {
            // Each step reaches for many places at once: the processor waits for all of them together.
            let runs: Vec<Run> = ahead.iter().flat_map(|m| &m.trajectory.runs).copied().collect();
            let sources: Vec<Bytes> = runs.iter().map(|s| run_bytes(log, s)).collect::<Result<_>>()?;
            sources.iter().for_each(touch);
            let mut sources = sources.iter();
            for member in ahead {
                if prompt.0 != Some(member.group) {
                    prompt = (Some(member.group), read_prompt_tokens(log, member.admission.location)?);
                    rows.prompt_ids.push((member.admission.prompt_id.clone(), 0));
                }
                let runs = &member.trajectory.runs;
                let sources: Vec<&Bytes> = sources.by_ref().take(runs.len()).collect();
                if check {
                    runs.iter().zip(&sources).try_for_each(|(run, bytes)| check_run(log, run, bytes))?;
                }
                for branch in self.branches(member) {
                    rows.cu_seqlens.push(packer.at as i64);
                    packer.push(&prompt.1, &[], (-1, 1.0, 0))?;
                    for Stretch { from, to, own } in &branch.history {
                        for (index, skip, count) in parts(runs, *from, *to) {
                            let flags = if *own {
                                mask::mask(&runs[index], branch.id, member.trajectory, &self.claim)
                            } else {
                                0
                            };
                            packer.push_part(&runs[index], sources[index], (skip, count), flags)?;
                        }
                    }
                    push_row(&mut rows, &mut components, member, &branch);
                }
            }
        }
        rows.cu_seqlens.push(packer.at as i64);
        rows.components = self.named(components);
        Ok(rows)
    }

    fn named(&self, components: BTreeMap<u32, Vec<f64>>) -> BTreeMap<String, Vec<f64>> {
        let name = |index: u32| self.components.get(index as usize).cloned().unwrap_or_default();
        components.into_iter().map(|(index, values)| (name(index), values)).collect()
    }
}

fn push_row(rows: &mut Rows, components: &mut BTreeMap<u32, Vec<f64>>, member: &Member<'_>, branch: &Branch) {
    rows.prompt_lengths.push(member.admission.prompt_len as i32);
    rows.groups.push(member.group as i64);
    rows.trajectories.push(branch.id as i64);
    rows.episodes.push(member.id as i64);
    rows.parents.push(branch.parent.map_or(-1, |(parent, _)| parent as i64));
    rows.fork_offsets.push(branch.parent.map_or(0, |(_, offset)| offset as i32));
    rows.rewards.push(member.reward);
    rows.stops.push(member.trajectory.stop as u8);
    if let Some((_, count)) = rows.prompt_ids.last_mut() {
        *count += 1;
    }
    for (name, values) in components {
        let own = member.components.iter().find(|(own, _)| own == name);
        values.push(own.map_or(f64::NAN, |(_, value)| *value));
    }
}

struct Packer<'a, 'b> {
    columns: &'a mut Columns<'b>,
    at: usize,
}

impl Packer<'_, '_> {
    /// Adds `count` tokens of a run, without log-probs where they were not generated.
    fn push_part(&mut self, run: &Run, bytes: &[u8], (skip, count): (u32, u32), flags: u8) -> Result<()> {
        let (skip, len) = (4 * skip as usize, 4 * run.len as usize);
        let end = skip + 4 * count as usize;
        let generated = flags & GENERATED != 0;
        let version = if generated { i32::try_from(run.version).unwrap_or(i32::MAX) } else { -1 };
        let logprobs = if generated { &bytes[len + skip..len + end] } else { &[] };
        self.push(&bytes[skip..end], logprobs, (version, run.temperature, flags))
    }

    /// Adds tokens; `logprobs` may be empty, then they are 0. `fill`: version, temperature and mask flags.
    fn push(&mut self, ids: &[u8], logprobs: &[u8], fill: (i32, f32, u8)) -> Result<()> {
        let count = ids.len() / 4;
        let (from, to) = (4 * self.at, 4 * (self.at + count));
        let columns = &mut *self.columns;
        column(columns.tokens, from, to)?.copy_from_slice(ids);
        let stored = column(columns.logprobs, from, to)?;
        if logprobs.is_empty() {
            stored.fill(0);
        } else {
            stored.copy_from_slice(logprobs);
        }
        repeat(column(columns.versions, from, to)?, fill.0.to_le_bytes());
        repeat(column(columns.temperatures, from, to)?, fill.1.to_le_bytes());
        column(columns.mask, self.at, self.at + count)?.fill(fill.2);
        self.at += count;
        Ok(())
    }
}

fn column(bytes: &mut [u8], from: usize, to: usize) -> Result<&mut [u8]> {
    let len = bytes.len();
    bytes.get_mut(from..to).ok_or_else(|| {
        StoreError::Conflict(format!(
            "a column of `out` has {len} bytes, the claim needs at least {to}; make it longer"
        ))
    })
}

fn repeat(bytes: &mut [u8], value: [u8; 4]) {
    match bytemuck::try_cast_slice_mut::<u8, u32>(bytes) {
        Ok(words) => words.fill(u32::from_ne_bytes(value)),
        Err(_) => bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&value)),
    }
}
