//! The bytes of records. Format 4: the frame's kind says which record it is, its header is a msgpack map of named
//! fields. Fields that this program does not know are ignored, missing ones have their defaults. Format 3 named the
//! record and listed its fields by position; it is read for good, and told apart by its first bytes.

mod columns;
mod format3;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    error::{Result, StoreError},
    state::record::{Claimed, LeftOut, PACKED, Plan, Quota, Reason, Record},
    state::trajectory::Version,
    state::turn::Turn,
};
use columns::Columns;

#[derive(Serialize, Deserialize)]
struct QuotaFields {
    version: Version,
    groups: u64,
    tokens: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens_per_segment: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct Trajectories {
    trajectories: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct PublishFields {
    version: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iteration: Option<i64>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    filter: BTreeSet<u64>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    veto: BTreeSet<u64>,
}

#[derive(Serialize, Deserialize)]
struct RestoreFields {
    version: Version,
    weights_of: Version,
}

#[derive(Serialize, Deserialize)]
struct EvictFields {
    groups: Vec<u64>,
    reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    success: Option<f64>,
}

#[derive(Serialize, Deserialize)]
struct Iteration {
    iteration: i64,
}

#[derive(Serialize, Deserialize)]
struct Groups {
    groups: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct ForkFields {
    trajectory: u64,
    offset: u32,
}

#[derive(Serialize, Deserialize)]
struct TurnFields {
    trajectory: u64,
    offset: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rewards: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct PlanFields {
    iteration: i64,
    plan: Plan,
}

#[derive(Serialize, Deserialize)]
struct Group {
    group: u64,
}

/// The header of a record.
///
/// # Errors
/// `Conflict` when it cannot be encoded, which is an error of ours.
pub fn encode(record: &Record) -> Result<Vec<u8>> {
    match record {
        Record::Quota(version, Quota { groups, tokens, tokens_per_segment }) => {
            let (version, groups, tokens) = (*version, *groups, *tokens);
            named(&QuotaFields { version, groups, tokens, tokens_per_segment: *tokens_per_segment })
        }
        Record::Admit(admit) => named(admit),
        Record::Lease(trajectories) => named(&Trajectories { trajectories: trajectories.clone() }),
        Record::Append(items) | Record::Compact(items) => named(&Columns::of(items)),
        Record::Score(score) => named(score),
        Record::Publish(version, iteration, LeftOut { filter, veto }) => {
            let (filter, veto) = (filter.clone(), veto.clone());
            named(&PublishFields { version: *version, iteration: *iteration, filter, veto })
        }
        Record::Restore(version, weights_of) => named(&RestoreFields { version: *version, weights_of: *weights_of }),
        Record::Claim(claimed) => named(claimed),
        Record::Evict(groups, reason) => {
            let detail = if let Reason::Discarded(why) = reason { Some(why.clone()) } else { None };
            let success = if let Reason::NoSignal(success) = reason { *success } else { None };
            named(&EvictFields { groups: groups.clone(), reason: reason.name().to_owned(), detail, success })
        }
        Record::Commit(iteration) | Record::Uncommit(iteration) | Record::Drop(iteration) => {
            named(&Iteration { iteration: *iteration })
        }
        Record::Late(groups) => named(&Groups { groups: groups.clone() }),
        Record::Annotate(annotate) => named(annotate),
        Record::Fork(trajectory, offset) => named(&ForkFields { trajectory: *trajectory, offset: *offset }),
        Record::Turn(trajectory, Turn { offset, rewards, key }) => {
            let (trajectory, offset, rewards, key) = (*trajectory, *offset, rewards.clone(), key.clone());
            named(&TurnFields { trajectory, offset, rewards, key })
        }
        Record::Plan(iteration, plan) => named(&PlanFields { iteration: *iteration, plan: plan.clone() }),
        Record::Move(group) => named(&Group { group: *group }),
    }
}

/// The record of a frame.
///
/// # Errors
/// The reason, for the caller to locate.
pub fn decode(kind: u8, header: &[u8]) -> std::result::Result<Record, String> {
    if format3::is(header) {
        return format3::decode(header);
    }
    Ok(match kind {
        1 => {
            let QuotaFields { version, groups, tokens, tokens_per_segment } = fields(header)?;
            Record::Quota(version, Quota { groups, tokens, tokens_per_segment })
        }
        2 => Record::Admit(fields(header)?),
        3 => Record::Lease(fields::<Trajectories>(header)?.trajectories),
        4 | PACKED => Record::Append(fields::<Columns>(header)?.items()?),
        5 => Record::Score(fields(header)?),
        6 => {
            let PublishFields { version, iteration, filter, veto } = fields(header)?;
            Record::Publish(version, iteration, LeftOut { filter, veto })
        }
        7 => Record::Claim(fields::<Claimed>(header)?),
        8 => {
            let EvictFields { groups, reason, detail, success } = fields(header)?;
            Record::Evict(groups, Reason::named(&reason, detail, success)?)
        }
        9 => Record::Commit(fields::<Iteration>(header)?.iteration),
        10 => Record::Uncommit(fields::<Iteration>(header)?.iteration),
        11 => Record::Drop(fields::<Iteration>(header)?.iteration),
        12 => Record::Late(fields::<Groups>(header)?.groups),
        13 => Record::Annotate(fields(header)?),
        14 => {
            let ForkFields { trajectory, offset } = fields(header)?;
            Record::Fork(trajectory, offset)
        }
        15 => {
            let TurnFields { trajectory, offset, rewards, key } = fields(header)?;
            Record::Turn(trajectory, Turn { offset, rewards, key })
        }
        17 => {
            let RestoreFields { version, weights_of } = fields(header)?;
            Record::Restore(version, weights_of)
        }
        18 => {
            let PlanFields { iteration, plan } = fields(header)?;
            Record::Plan(iteration, plan)
        }
        19 => Record::Compact(fields::<Columns>(header)?.items()?),
        20 => Record::Move(fields::<Group>(header)?.group),
        other => return Err(unknown(other).unwrap_or_default()),
    })
}

/// What a record of this kind is, if this program does not know it: a newer one wrote it.
pub fn unknown(kind: u8) -> Option<String> {
    if matches!(kind, 1..=15 | 17..=PACKED) {
        return None;
    }
    Some(format!(
        "a record of kind {kind} (unknown here), which this version of pmdflow, {}, cannot read",
        env!("CARGO_PKG_VERSION")
    ))
}

fn named<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    rmp_serde::to_vec_named(value).map_err(|error| StoreError::Conflict(format!("cannot encode a record: {error}")))
}

fn fields<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, String> {
    rmp_serde::from_slice(bytes).map_err(|error| format!("cannot decode a record: {error}"))
}
