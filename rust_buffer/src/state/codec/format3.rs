//! Records as format 3 had them: `{name: fields}`, the fields by position.

use serde::Deserialize;

use crate::{
    state::record::{Admit, Appended, Claimed, LeftOut, Quota, Reason, Record, Score},
    state::trajectory::Version,
};

/// The names and their contents; never to be changed.
#[derive(Deserialize)]
enum Named {
    Quota(Version, Quota),
    Admit(Admit),
    Lease(Vec<u64>),
    Append(Vec<Appended>),
    Score(Score),
    Publish(Version, Option<i64>, LeftOut),
    Claim(Claimed),
    Evict(Vec<u64>, Reason),
    Commit(i64),
    Uncommit(i64),
    Drop(i64),
    Late(Vec<u64>),
}

/// Whether a header is of format 3: a map of one entry whose key is a name; those of fields are in lower case.
pub fn is(header: &[u8]) -> bool {
    header.first() == Some(&0x81) && header.get(2).is_some_and(u8::is_ascii_uppercase)
}

/// The record.
pub fn decode(header: &[u8]) -> Result<Record, String> {
    let named: Named = rmp_serde::from_slice(header).map_err(|error| format!("cannot decode a record: {error}"))?;
    Ok(match named {
        Named::Quota(version, quota) => Record::Quota(version, quota),
        Named::Admit(admit) => Record::Admit(admit),
        Named::Lease(trajectories) => Record::Lease(trajectories),
        Named::Append(items) => Record::Append(items),
        Named::Score(score) => Record::Score(score),
        Named::Publish(version, iteration, left_out) => Record::Publish(version, iteration, left_out),
        Named::Claim(claimed) => Record::Claim(claimed),
        Named::Evict(groups, reason) => Record::Evict(groups, reason),
        Named::Commit(iteration) => Record::Commit(iteration),
        Named::Uncommit(iteration) => Record::Uncommit(iteration),
        Named::Drop(iteration) => Record::Drop(iteration),
        Named::Late(groups) => Record::Late(groups),
    })
}
