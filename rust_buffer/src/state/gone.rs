//! Request ids of groups that are gone, so that none is admitted twice. Callers count their requests, `train-0`,
//! `train-1` and so on: of these only the ends of runs are kept, of other ids a hash.

use std::collections::BTreeMap;

use imbl::OrdSet;
use serde::{Deserialize, Serialize};

/// Digits that fit a number.
const MAX_DIGITS: usize = 18;

/// Runs of numbers by what stands before them: first to last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted(BTreeMap<String, BTreeMap<u64, u64>>);

impl Counted {
    fn insert(&mut self, prefix: &str, number: u64) {
        let runs = self.0.entry(prefix.to_owned()).or_default();
        let (mut first, mut last) = (number, number);
        if let Some((start, end)) = runs.range(..=number).next_back().map(|(start, end)| (*start, *end)) {
            if end >= number {
                return;
            }
            if end + 1 == number {
                first = start;
            }
        }
        if let Some(end) = runs.remove(&(number + 1)) {
            last = end;
        }
        runs.insert(first, last);
    }

    fn contains(&self, prefix: &str, number: u64) -> bool {
        let run = self.0.get(prefix).and_then(|runs| runs.range(..=number).next_back());
        run.is_some_and(|(_, last)| number <= *last)
    }

    /// What stands before numbers, and how many runs of these are kept.
    pub fn prefixes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.0.iter().map(|(prefix, runs)| (&**prefix, runs.len()))
    }

    /// Runs that are kept.
    pub fn num_runs(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }
}

/// What is before the number, with a dash at its end, and the number; None for an id of another form.
fn counted(request_id: &str) -> Option<(&str, u64)> {
    let at = request_id.rfind('-')? + 1;
    let (prefix, digits) = request_id.split_at(at);
    let plain = digits.len() <= MAX_DIGITS && digits.bytes().all(|digit| digit.is_ascii_digit());
    let number = digits.parse().ok().filter(|_| plain && (digits == "0" || !digits.starts_with('0')))?;
    Some((prefix, number))
}

/// Hash of a request id that is the same in every build (64-bit FNV-1a).
fn hash(request_id: &str) -> u64 {
    request_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Notes that the group of a request is gone.
pub fn insert(hashes: &mut OrdSet<u64>, runs: &mut Counted, request_id: &str) {
    match counted(request_id) {
        Some((prefix, number)) => runs.insert(prefix, number),
        None => drop(hashes.insert(hash(request_id))),
    }
}

/// Whether the group of a request is gone. Format 3 hashed all of them.
pub fn contains(hashes: &OrdSet<u64>, runs: &Counted, request_id: &str) -> bool {
    hashes.contains(&hash(request_id))
        || counted(request_id).is_some_and(|(prefix, number)| runs.contains(prefix, number))
}
