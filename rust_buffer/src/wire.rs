//! Msgpack: the records and snapshots of the log, and the batches of segments that workers send.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_bytes::Bytes;

use crate::{
    error::{Result, StoreError},
    trajectory::{End, Stop, Version},
};

/// Encodes a record or snapshot.
///
/// # Errors
/// `Conflict` when the value cannot be encoded, which is an error of ours.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec(value).map_err(|error| StoreError::Conflict(format!("cannot encode a record: {error}")))
}

/// Decodes a record or snapshot.
///
/// # Errors
/// The reason, for the caller to locate.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    rmp_serde::from_slice(bytes).map_err(|error| format!("cannot decode a record: {error}"))
}

/// One segment of a worker's batch, as `pmdflow.store.encode_segments` writes it.
#[derive(Debug, Clone, Deserialize)]
pub struct Item<'a> {
    /// Trajectory.
    #[serde(rename = "t")]
    pub trajectory: u64,
    /// Fencing epoch of the lease.
    #[serde(rename = "e")]
    pub epoch: u64,
    /// Generated tokens before these.
    #[serde(rename = "o")]
    pub offset: u32,
    /// Policy version of the tokens.
    #[serde(rename = "v")]
    pub version: Version,
    /// Sampling temperature.
    #[serde(rename = "temp")]
    pub temperature: f32,
    /// Token ids, int32 little-endian.
    #[serde(rename = "tok", borrow, with = "serde_bytes")]
    pub tokens: &'a [u8],
    /// Log-probs, float32 little-endian.
    #[serde(rename = "lp", borrow, with = "serde_bytes")]
    pub logprobs: &'a [u8],
    /// Version of the tokens to come.
    #[serde(rename = "next")]
    pub next_version: Version,
    /// Why the lease ends.
    pub stop: Option<&'a str>,
    /// Extra columns: name to dtype and bytes.
    #[serde(default, borrow)]
    pub extra: BTreeMap<&'a str, (&'a str, &'a Bytes)>,
}

impl<'a> Item<'a> {
    /// Decodes a batch.
    ///
    /// # Errors
    /// `Conflict` when it is not such a batch.
    pub fn decode_batch(batch: &'a [u8]) -> Result<Vec<Self>> {
        rmp_serde::from_slice(batch).map_err(|error| StoreError::Conflict(format!("not a batch of segments: {error}")))
    }

    /// Number of tokens.
    ///
    /// # Errors
    /// `Conflict` when the arrays do not fit each other.
    pub fn count(&self) -> Result<u32> {
        if self.tokens.len() % 4 != 0 || self.tokens.len() != self.logprobs.len() {
            return Err(self.conflict(&format!(
                "{} bytes of tokens and {} of log-probs; both are 4 bytes for each token",
                self.tokens.len(),
                self.logprobs.len()
            )));
        }
        u32::try_from(self.tokens.len() / 4).map_err(|_| self.conflict("a segment must have fewer than 2^32 tokens"))
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
