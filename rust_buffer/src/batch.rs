//! Claims as packed arrays, and trajectories as arrays, read from the log without holding the store.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::{Result, StoreError},
    log::{Frame, Location, Log},
    record::Record,
    trajectory::{Segment, Version},
    view::ClaimedMember,
    wire,
};

/// The fields of `pmdflow.types.TrainBatch` as little-endian bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packed {
    /// int32 token ids.
    pub tokens: Vec<u8>,
    /// float32 log-probs.
    pub logprobs: Vec<u8>,
    /// int32 versions.
    pub versions: Vec<u8>,
    /// float32 temperatures.
    pub temperatures: Vec<u8>,
    /// Mask flags.
    pub mask: Vec<u8>,
    /// int64 starts.
    pub cu_seqlens: Vec<u8>,
    /// int32.
    pub prompt_lengths: Vec<u8>,
    /// int64.
    pub groups: Vec<u8>,
    /// int64.
    pub trajectories: Vec<u8>,
    /// float64.
    pub rewards: Vec<u8>,
    /// float64 by component.
    pub components: BTreeMap<String, Vec<u8>>,
    /// uint8.
    pub stops: Vec<u8>,
    /// Prompt ids.
    pub prompt_ids: Vec<String>,
}

/// An extra column of one stored run of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extra {
    /// Offset of the run's first token.
    pub offset: u32,
    /// Tokens of the run.
    pub len: u32,
    /// `dtype` of the column.
    pub dtype: String,
    /// The column's bytes.
    pub bytes: Vec<u8>,
}

fn array(frame: &Frame, index: u32) -> Result<&[u8]> {
    let location = frame.location();
    frame.array(index as usize).ok_or_else(|| {
        let path = format!("log file {}", location.file);
        StoreError::corrupt(path, location.offset, format!("the record has no array {index}"))
    })
}

/// One array of a frame.
///
/// # Errors
/// Those of the log.
pub fn read_array(log: &Log, location: Location, index: u32) -> Result<Vec<u8>> {
    array(&log.frame(location)?, index).map(<[u8]>::to_vec)
}

/// Token ids and log-probs of consecutive segments.
///
/// # Errors
/// Those of the log.
pub fn read_segments(log: &Log, segments: &[Segment]) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    for segment in segments {
        let frame = log.frame(segment.location)?;
        tokens.extend_from_slice(array(&frame, segment.array)?);
        logprobs.extend_from_slice(array(&frame, segment.array + 1)?);
    }
    Ok((tokens, logprobs))
}

/// Extra columns by name, one entry for each stored run of tokens that has the column.
///
/// # Errors
/// Those of the log.
pub fn read_extras(log: &Log, segments: &[Segment]) -> Result<BTreeMap<String, Vec<Extra>>> {
    let (mut extras, mut offset) = (BTreeMap::<String, Vec<Extra>>::new(), 0);
    for segment in segments {
        let frame = log.frame(segment.location)?;
        let record: Record = wire::decode(frame.header()).map_err(|detail| {
            StoreError::corrupt(format!("log file {}", segment.location.file), segment.location.offset, detail)
        })?;
        let items = if let Record::Append(items) = record { items } else { Vec::new() };
        let columns = items.into_iter().nth(segment.item as usize).map(|item| item.extra).unwrap_or_default();
        for (index, (name, dtype)) in (segment.array + 2..).zip(columns) {
            let bytes = array(&frame, index)?.to_vec();
            extras.entry(name).or_default().push(Extra { offset, len: segment.len, dtype, bytes });
        }
        offset += segment.len;
    }
    Ok(extras)
}

fn repeat<const N: usize>(out: &mut Vec<u8>, value: [u8; N], count: u32) {
    (0..count).for_each(|_| out.extend_from_slice(&value));
}

/// A version as the int32 of the arrays.
fn narrow(version: Version) -> i32 {
    i32::try_from(version).unwrap_or(i32::MAX)
}

/// Packs the members of a claim.
///
/// # Errors
/// Those of the log.
pub fn pack(log: &Log, members: &[ClaimedMember]) -> Result<Packed> {
    let mut packed = Packed::default();
    let mut start = 0_i64;
    let names: BTreeSet<&String> = members.iter().flat_map(|member| member.components.keys()).collect();
    packed.components = names.into_iter().map(|name| (name.clone(), Vec::new())).collect();
    for member in members {
        let prompt = log.frame(member.prompt)?;
        packed.tokens.extend_from_slice(array(&prompt, 0)?);
        repeat(&mut packed.logprobs, 0_f32.to_le_bytes(), member.prompt_len);
        repeat(&mut packed.versions, (-1_i32).to_le_bytes(), member.prompt_len);
        repeat(&mut packed.temperatures, 1_f32.to_le_bytes(), member.prompt_len);
        repeat(&mut packed.mask, [0], member.prompt_len);
        packed.cu_seqlens.extend_from_slice(&start.to_le_bytes());
        start += i64::from(member.prompt_len);
        for (segment, flags) in &member.segments {
            let frame = log.frame(segment.location)?;
            packed.tokens.extend_from_slice(array(&frame, segment.array)?);
            packed.logprobs.extend_from_slice(array(&frame, segment.array + 1)?);
            repeat(&mut packed.versions, narrow(segment.version).to_le_bytes(), segment.len);
            repeat(&mut packed.temperatures, segment.temperature.to_le_bytes(), segment.len);
            repeat(&mut packed.mask, [*flags], segment.len);
            start += i64::from(segment.len);
        }
        push_scalars(&mut packed, member);
    }
    packed.cu_seqlens.extend_from_slice(&start.to_le_bytes());
    Ok(packed)
}

fn push_scalars(packed: &mut Packed, member: &ClaimedMember) {
    packed.prompt_lengths.extend_from_slice(&member.prompt_len.to_le_bytes());
    packed.groups.extend_from_slice(&member.group.to_le_bytes());
    packed.trajectories.extend_from_slice(&member.trajectory.to_le_bytes());
    packed.rewards.extend_from_slice(&member.reward.to_le_bytes());
    packed.stops.push(member.stop as u8);
    packed.prompt_ids.push(member.prompt_id.clone());
    for (name, values) in &mut packed.components {
        values.extend_from_slice(&member.components.get(name).copied().unwrap_or(0.0).to_le_bytes());
    }
}
