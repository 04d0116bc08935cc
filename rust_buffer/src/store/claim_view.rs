//! Claims as packed arrays, read from the log without holding the store.

use std::collections::BTreeMap;

use imbl::OrdMap;

use crate::{
    error::{Result, StoreError},
    log::Log,
    state::age::Trained,
    state::fork::{Fork, Part, trained_branches},
    state::group::Group,
    state::mask::{self, GENERATED},
    state::trajectory::{Trajectory, Verdict, Version},
    state::turn::Turn,
    state::{Claim, State},
    store::token_view::{Piece, Source, part, put, walk},
};

/// A claim and all that it refers to, as it was when it was asked for.
pub struct ClaimView {
    claim: Claim,
    groups: OrdMap<u64, Group>,
    trajectories: OrdMap<u64, Trajectory>,
    forks: OrdMap<u64, Vec<Fork>>,
    turns: OrdMap<u64, Vec<Turn>>,
    components: Vec<String>,
    trained: Trained,
}

/// One branch of a member of a claim.
struct Member<'a> {
    /// Of the episode.
    id: u64,
    source: Source<'a>,
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
    /// Whether a trajectory has extra columns.
    pub columns: bool,
    /// What was said of episodes, each note with the row of its episode's first branch.
    pub turns: Vec<(i64, Turn)>,
    /// Restored versions, with the iterations that the weights of each had trained.
    pub restored: Vec<(Version, i64)>,
}

/// The segments of which the trajectories of a claim consist: runs of tokens with equal version, temperature and mask.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Segments {
    /// First segment of each trajectory, and the end.
    pub offsets: Vec<i64>,
    /// Tokens.
    pub lengths: Vec<i64>,
    pub versions: Vec<i32>,
    pub temperatures: Vec<f32>,
    pub masks: Vec<u8>,
}

/// Version, temperature and mask flags of tokens.
type Fill = (i32, f32, u8);

/// Those of a prompt.
const PROMPT: Fill = (-1, 1.0, 0);

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
            turns: state.turns.clone(),
            components: state.components.clone(),
            trained: state.trained.clone(),
        })
    }

    /// Learner version of the claim.
    pub fn version(&self) -> Version {
        self.claim.version
    }

    /// Branches of the members in claim order, without those given up by scoring.
    fn members(&self) -> Result<Vec<Member<'_>>> {
        let mut members = Vec::new();
        for group in &self.claim.groups {
            let gone = || StoreError::Conflict(format!("group {group} is not in the store"));
            let admission = self.groups.get(group).ok_or_else(gone)?;
            for (id, trajectory) in self.trajectories.range(admission.members()) {
                if let Verdict::Scored { reward, components, .. } = &trajectory.verdict {
                    let forks = self.forks.get(id).map_or(&[][..], Vec::as_slice);
                    for branch in trained_branches(*id, trajectory.len, forks) {
                        let source = Source { group: *group, admission, trajectory, branch };
                        members.push(Member { id: *id, source, reward: *reward, components });
                    }
                }
            }
        }
        Ok(members)
    }

    /// Tokens of all members, prompts included.
    ///
    /// # Errors
    /// An error of ours.
    pub fn num_tokens(&self) -> Result<usize> {
        Ok(self.members()?.iter().map(|member| member.source.len() as usize).sum())
    }

    /// The claim without its tokens: no byte of the log is read.
    ///
    /// # Errors
    /// An error of ours.
    pub fn rows(&self) -> Result<(Rows, Segments)> {
        let (members, mut rows, mut segments) = (self.members()?, Rows::default(), Segments::default());
        let (mut components, mut at) = (components_of(&members), 0);
        for member in &members {
            push_row(&mut rows, &mut components, member, at);
            segments.offsets.push(segments.lengths.len() as i64);
            segments.push(i64::from(member.source.admission.prompt_len), PROMPT, true);
            for (index, part) in member.source.branch.parts(&member.source.trajectory.runs).enumerate() {
                segments.push(i64::from(part.len), self.fill(part, member), index == 0);
            }
            at += member.source.len();
        }
        rows.cu_seqlens.push(at);
        segments.offsets.push(segments.lengths.len() as i64);
        rows.components = self.named(components);
        rows.restored = self.trained.restored();
        rows.turns = self.said(&rows);
        Ok((rows, segments))
    }

    /// Packs the claim; checksums of tokens are tested if `check`.
    ///
    /// # Errors
    /// Those of the log, or `Conflict` when the columns are too short.
    pub fn pack(&self, log: &Log, columns: &mut Columns<'_>, check: bool) -> Result<Rows> {
        let (members, mut rows) = (self.members()?, Rows::default());
        let mut components = components_of(&members);
        let mut packer = Packer { columns, at: 0 };
        let sources: Vec<&Source<'_>> = members.iter().map(|member| &member.source).collect();
        walk(log, &sources, check, |index, piece| match piece {
            Piece::Prompt(ids) => {
                let member = &members[index];
                push_row(&mut rows, &mut components, member, packer.at as i64);
                packer.push(ids, &[], PROMPT)
            }
            Piece::Part(part, ids, logprobs) => packer.push(ids, logprobs, self.fill(part, &members[index])),
        })?;
        rows.cu_seqlens.push(packer.at as i64);
        rows.components = self.named(components);
        rows.restored = self.trained.restored();
        rows.turns = self.said(&rows);
        Ok(rows)
    }

    /// Version, temperature and mask flags of tokens of a run.
    fn fill(&self, Part { run, own, .. }: Part<'_>, member: &Member<'_>) -> Fill {
        let Source { trajectory, branch, .. } = &member.source;
        let flags = if own { mask::mask(run, branch.id, trajectory, &self.claim, &self.trained) } else { 0 };
        let version = if flags & GENERATED == 0 { -1 } else { i32::try_from(run.version).unwrap_or(i32::MAX) };
        (version, run.temperature, flags)
    }

    fn said(&self, rows: &Rows) -> Vec<(i64, Turn)> {
        let first = rows.episodes.iter().zip(&rows.parents).enumerate().filter(|(_, (_, parent))| **parent < 0);
        let own = |(row, (id, _)): (usize, (&i64, &i64))| {
            let turns = self.turns.get(&(*id as u64)).into_iter().flatten();
            turns.map(move |turn| (row as i64, turn.clone())).collect::<Vec<_>>()
        };
        first.flat_map(own).collect()
    }

    fn named(&self, components: BTreeMap<u32, Vec<f64>>) -> BTreeMap<String, Vec<f64>> {
        let name = |index: u32| self.components.get(index as usize).cloned().unwrap_or_default();
        components.into_iter().map(|(index, values)| (name(index), values)).collect()
    }
}

fn components_of(members: &[Member<'_>]) -> BTreeMap<u32, Vec<f64>> {
    let used = members.iter().flat_map(|member| member.components);
    used.map(|(name, _)| (*name, Vec::new())).collect()
}

impl Segments {
    /// Adds tokens of one kind; `begins`: what is before them is of another trajectory, or its prompt.
    fn push(&mut self, len: i64, fill: Fill, begins: bool) {
        let (version, temperature, flags) = fill;
        let last = (self.versions.last(), self.temperatures.last().map(|t| t.to_bits()), self.masks.last());
        if !begins && last == (Some(&version), Some(temperature.to_bits()), Some(&flags)) {
            if let Some(length) = self.lengths.last_mut() {
                *length += len;
            }
            return;
        }
        self.lengths.push(len);
        self.versions.push(version);
        self.temperatures.push(temperature);
        self.masks.push(flags);
    }
}

/// Adds a branch whose tokens begin `at`.
fn push_row(rows: &mut Rows, components: &mut BTreeMap<u32, Vec<f64>>, member: &Member<'_>, at: i64) {
    let Source { group, admission, trajectory, branch } = &member.source;
    rows.cu_seqlens.push(at);
    if rows.groups.last() != Some(&(*group as i64)) {
        rows.prompt_ids.push((admission.prompt_id.clone(), 0));
    }
    rows.prompt_lengths.push(admission.prompt_len as i32);
    rows.groups.push(*group as i64);
    rows.trajectories.push(branch.id as i64);
    rows.episodes.push(member.id as i64);
    rows.parents.push(branch.parent.map_or(-1, |(parent, _)| parent as i64));
    rows.fork_offsets.push(branch.parent.map_or(0, |(_, offset)| offset as i32));
    rows.rewards.push(member.reward);
    rows.stops.push(trajectory.stop as u8);
    rows.columns |= trajectory.columns;
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
    /// Adds tokens; `logprobs` may be empty, then they are 0. `fill`: version, temperature and mask flags.
    fn push(&mut self, ids: &[u8], logprobs: &[u8], fill: Fill) -> Result<()> {
        let count = ids.len() / 4;
        let (from, to) = (4 * self.at, 4 * (self.at + count));
        let columns = &mut *self.columns;
        put(columns.tokens, columns.logprobs, from, (ids, logprobs))?;
        repeat(part(columns.versions, from, to)?, fill.0.to_le_bytes());
        repeat(part(columns.temperatures, from, to)?, fill.1.to_le_bytes());
        part(columns.mask, self.at, self.at + count)?.fill(fill.2);
        self.at += count;
        Ok(())
    }
}

fn repeat(bytes: &mut [u8], value: [u8; 4]) {
    match bytemuck::try_cast_slice_mut::<u8, u32>(bytes) {
        Ok(words) => words.fill(u32::from_ne_bytes(value)),
        Err(_) => bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&value)),
    }
}
