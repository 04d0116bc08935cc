//! Msgpack: the snapshots of the log, and the batches of segments that workers send.
//!
//! # A batch of segments, version 1 (little endian)
//! `"PMDB" | version u16 | 0 u16 | header_len u32 | 0 u32 | header | payload`. The header is msgpack, padded with zeros
//! to 8 bytes: an array of items `[trajectory, epoch, offset, count, version, temperature, next_version, stop or nil,
//! observed, [[name, dtype, bytes], ...]]`. The payload holds for each item with a count the token ids (int32), directly
//! followed by the log-probs (float32; none if observed), padded with zeros to 8 bytes; then each extra column, padded
//! likewise. It goes into the log as it is.
//! A dtype is text of which only `pmdflow/store/columns.py` knows what it says: `NumPy`'s, before it the shape of a value
//! (`(2,)<i2`), and before that `trajectory ` where the column is one value of the trajectory.

use std::ops::Range;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Result, StoreError},
    log::Entry,
    state::trajectory::{End, Stop, Version},
};

const MAGIC: &[u8] = b"PMDB";
const VERSION: u16 = 1;
const HEAD: usize = 16;
/// Of a float's bits; without it they are in the order of its size, and what is not finite is above all others.
const SIGN: u32 = 1 << 31;

/// Encodes a snapshot, fields named.
///
/// # Errors
/// `Conflict` when the value cannot be encoded, which is an error of ours.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(value).map_err(|error| StoreError::Conflict(format!("cannot encode a snapshot: {error}")))
}

/// Decodes a snapshot, fields named or, as in format 3, by position.
///
/// # Errors
/// The reason, for the caller to locate.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    rmp_serde::from_slice(bytes).map_err(|error| format!("cannot decode a snapshot: {error}"))
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

/// Before the dtype of a column that is one value of the trajectory.
pub const WHOLE: &str = "trajectory ";

/// Bytes of a column for each token, by `numpy`'s name of its dtype: a number, or a row of them; None for another one.
fn row_bytes(dtype: &str) -> Option<u64> {
    let (shape, number) = dtype.strip_prefix('(').map_or(Some(("", dtype)), |rest| rest.split_once(')'))?;
    let size = match number.strip_prefix(['<', '|'])? {
        "b1" | "i1" | "u1" => 1,
        "i2" | "u2" | "f2" => 2,
        "i4" | "u4" | "f4" => 4,
        "i8" | "u8" | "f8" => 8,
        _ => return None,
    };
    let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
    let mut sides = sides.map(|side| side.parse().ok().filter(|side| *side > 0_u64));
    sides.try_fold(size, |bytes: u64, side| bytes.checked_mul(side?))
}

/// Refuses a column of `tokens` tokens that has not as many `bytes` as its dtype says, or no name.
///
/// # Errors
/// What is wrong with it.
pub fn check_column(name: &str, dtype: &str, bytes: u64, tokens: u32) -> std::result::Result<(), String> {
    if name.is_empty() {
        return Err("a column has no name".to_owned());
    }
    let (count, value) = dtype.strip_prefix(WHOLE).map_or((tokens, dtype), |value| (1, value));
    let Some(row) = row_bytes(value) else {
        return Err(format!("column {name:?} has dtype {dtype:?}; numbers of 1 to 8 bytes, or rows of them, are kept"));
    };
    if row.checked_mul(u64::from(count)) == Some(bytes) && u32::try_from(bytes).is_ok() {
        return Ok(());
    }
    Err(format!("column {name:?} has {bytes} bytes for {count} values of {row} each"))
}

/// The head of an item as it is sent.
#[derive(Deserialize)]
struct Head<'a> {
    trajectory: u64,
    epoch: u64,
    offset: u32,
    count: u32,
    version: Version,
    temperature: f32,
    next_version: Version,
    #[serde(borrow)]
    stop: Option<&'a str>,
    observed: bool,
    #[serde(borrow)]
    extra: Vec<(&'a str, &'a str, u32)>,
}

/// A worker's batch of segments, its arrays' checksums computed.
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Batch<'a> {
    pub items: Vec<Item<'a>>,
    /// What their ranges are of.
    pub payload: &'a [u8],
}

/// One segment of a batch.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Item<'a> {
    pub trajectory: u64,
    /// Fencing epoch of the lease.
    pub epoch: u64,
    /// Tokens of the trajectory before these.
    pub offset: u32,
    /// Tokens.
    pub count: u32,
    pub version: Version,
    pub temperature: f32,
    /// Version of the tokens to come.
    pub next_version: Version,
    /// Why the lease ends.
    pub stop: Option<&'a str>,
    /// The environment made them, not the policy: no log-probs, no budget, no gradient.
    pub observed: bool,
    /// Name and dtype of the extra columns.
    pub extra: Vec<(&'a str, &'a str)>,
    /// Its arrays in the payload, padding included.
    pub range: Range<usize>,
    /// Lengths and checksums of its arrays.
    pub entries: Vec<Entry>,
}

impl<'a> Batch<'a> {
    /// Decodes a batch.
    ///
    /// # Errors
    /// `Conflict` when it is not such a batch.
    pub fn decode(bytes: &'a [u8]) -> Result<Self> {
        let refuse = |detail: String| StoreError::Conflict(format!("not a batch of segments: {detail}"));
        if bytes.len() < HEAD || &bytes[..4] != MAGIC {
            return Err(refuse(format!("{} bytes without the magic number", bytes.len())));
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(refuse(format!("wire version {version}, this program reads {VERSION}")));
        }
        let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
        let header = bytes.get(HEAD..HEAD + len).ok_or_else(|| refuse("it ends within its header".to_owned()))?;
        let payload = bytes.get((HEAD + len).next_multiple_of(8)..).unwrap_or_default();
        let heads: Vec<Head<'_>> = rmp_serde::from_slice(header).map_err(|error| refuse(error.to_string()))?;
        let mut at = 0;
        let items = heads.into_iter().map(|head| head.item(payload, &mut at)).collect::<Result<Vec<_>>>()?;
        if at != payload.len() {
            return Err(refuse(format!("{} bytes of arrays, its header names {at}", payload.len())));
        }
        Ok(Self { items, payload })
    }
}

impl<'a> Head<'a> {
    /// The item whose arrays start at `at` of the payload.
    fn item(self, payload: &[u8], at: &mut usize) -> Result<Item<'a>> {
        let start = *at;
        let main = u64::from(self.count) * if self.observed { 4 } else { 8 };
        let mut lens = vec![main];
        lens.extend(self.extra.iter().map(|(_, _, len)| u64::from(*len)));
        let mut item = Item {
            trajectory: self.trajectory,
            epoch: self.epoch,
            offset: self.offset,
            count: self.count,
            version: self.version,
            temperature: self.temperature,
            next_version: self.next_version,
            stop: self.stop,
            observed: self.observed,
            extra: self.extra.iter().map(|(name, dtype, _)| (*name, *dtype)).collect(),
            range: start..start,
            entries: Vec::new(),
        };
        if self.count == 0 {
            return if self.extra.is_empty() { Ok(item) } else { Err(item.conflict("columns without tokens")) };
        }
        for (nth, len) in lens.into_iter().enumerate() {
            let end = usize::try_from(len).ok().and_then(|len| at.checked_add(len));
            let bytes = end.and_then(|end| payload.get(*at..end));
            let bytes = bytes.filter(|bytes| u32::try_from(bytes.len()).is_ok());
            let bytes = bytes.ok_or_else(|| item.conflict("the batch ends within its arrays"))?;
            match nth.checked_sub(1) {
                None => item.check_numbers(bytes)?,
                Some(column) => item.check_column(column, len)?,
            }
            item.entries.push(Entry::of(bytes));
            *at = (*at + bytes.len()).next_multiple_of(8);
        }
        if *at > payload.len() {
            return Err(item.conflict("the batch ends within its padding"));
        }
        item.range = start..*at;
        Ok(item)
    }
}

impl Item<'_> {
    /// Refuses what no policy can have made: a negative id, or a log-prob that is not finite.
    fn check_numbers(&self, main: &[u8]) -> Result<()> {
        let (ids, logprobs) = main.split_at(4 * self.count as usize);
        // All at once first, without an end in between: nearly always there is nothing to find.
        if words(ids).fold(0, |all, id| all | id) > i32::MAX as u32 {
            let id = words(ids).map(|id| id as i32).find(|id| *id < 0).unwrap_or_default();
            return Err(self.conflict(&format!("token id {id} is outside 0 to {}", i32::MAX)));
        }
        if words(logprobs).map(|bits| bits & !SIGN).fold(0, u32::max) >= f32::INFINITY.to_bits() {
            let value = words(logprobs).map(f32::from_bits).find(|value| !value.is_finite()).unwrap_or_default();
            return Err(self.conflict(&format!("log-prob {value} is not finite; leave that trajectory out")));
        }
        Ok(())
    }

    /// Refuses a column that has not what its dtype says for each token, or whose name does not tell it from the others.
    fn check_column(&self, nth: usize, bytes: u64) -> Result<()> {
        let (name, dtype) = self.extra[nth];
        if self.extra[..nth].iter().any(|(other, _)| *other == name) {
            return Err(self.conflict(&format!("column {name:?} comes twice")));
        }
        check_column(name, dtype, bytes, self.count).map_err(|detail| self.conflict(&detail))
    }

    /// Why the lease ends, None to keep it.
    ///
    /// # Errors
    /// `Conflict` for an unknown name.
    pub fn end(&self) -> Result<Option<End>> {
        Ok(match self.stop {
            None => None,
            Some("stop") => Some(End::Complete(Stop::Stop)),
            Some("length") => Some(End::Complete(Stop::Length)),
            Some("repetition") => Some(End::Complete(Stop::Repetition)),
            Some("budget" | "abort") => Some(End::Release),
            Some(other) => {
                return Err(self.conflict(&format!(
                    "unknown stop {other:?}; the known ones are stop, length, repetition, budget and abort"
                )));
            }
        })
    }

    /// A refusal of this item.
    pub fn conflict(&self, detail: &str) -> StoreError {
        StoreError::Conflict(format!("trajectory {} at offset {}: {detail}", self.trajectory, self.offset))
    }
}
