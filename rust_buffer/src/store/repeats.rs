//! Repeats: a worker that lost an answer sends again what is durable, alone or with new tokens behind it.

use std::collections::BTreeMap;

use crate::{
    error::Result,
    log::Entry,
    state::trajectory::{Trajectory, Version},
    store::Store,
    store::arrays::{ColumnReader, Extra, Extras, read_run},
    wire::Item,
};

/// Tokens that lie one behind the other, as their array: ids, then log-probs unless observed.
struct Piece<'a> {
    start: u32,
    len: u32,
    version: Version,
    temperature: f32,
    observed: bool,
    bytes: &'a [u8],
    columns: Vec<Column<'a>>,
}

/// A row of an extra column for each of some tokens that lie one behind the other.
struct Column<'a> {
    name: &'a str,
    dtype: &'a str,
    start: u32,
    len: u32,
    bytes: &'a [u8],
}

impl<'a> Piece<'a> {
    fn sent(item: &Item<'a>, payload: &'a [u8]) -> Self {
        Self {
            start: item.offset,
            len: item.count,
            version: item.version,
            temperature: item.temperature,
            observed: item.observed,
            bytes: payload.get(item.range.clone()).unwrap_or_default(),
            columns: columns_sent(item, payload),
        }
    }

    fn end(&self) -> u32 {
        self.start + self.len
    }

    /// Columns of the tokens `from` to `to`: the row of each by name, dtype and token.
    fn rows(&self, from: u32, to: u32) -> BTreeMap<(&str, &str, u32), &[u8]> {
        let mut rows = BTreeMap::new();
        for Column { name, dtype, start, len, bytes } in &self.columns {
            let row = bytes.len() / *len as usize;
            for token in from.max(*start)..to.min(start + len) {
                let at = row * (token - start) as usize;
                rows.insert((*name, *dtype, token), &bytes[at..at + row]);
            }
        }
        rows
    }

    /// Ids, or log-probs if `nth` is 1, of the tokens `from` to `to`.
    fn tokens(&self, nth: u32, from: u32, to: u32) -> Option<&[u8]> {
        let at = |token: u32| 4 * (nth * self.len + token - self.start) as usize;
        self.bytes.get(at(from)..at(to))
    }

    /// Whether both have the same tokens where they overlap before `until`.
    fn agrees(&self, other: &Self, until: u32) -> bool {
        let (from, to) = (self.start.max(other.start), self.end().min(other.end()).min(until));
        let equal = |nth| {
            let own = self.tokens(nth, from, to);
            own.is_some() && own == other.tokens(nth, from, to)
        };
        from >= to
            || (self.version == other.version
                && self.temperature.to_bits() == other.temperature.to_bits()
                && self.observed == other.observed
                && equal(0)
                && (self.observed || equal(1))
                && self.rows(from, to) == other.rows(from, to))
    }
}

impl Store {
    /// Whether the tokens of `item` before `until` are those of the trajectory: durable ones, and those of `earlier`
    /// items of the same batch.
    pub(super) fn holds(
        &self, trajectory: &Trajectory, earlier: &[&Item<'_>], item: &Item<'_>, until: u32,
        (payload, columns): (&[u8], &mut ColumnReader<'_>),
    ) -> Result<bool> {
        let sent = Piece::sent(item, payload);
        let mut start = 0;
        for run in &trajectory.runs {
            if start < until.min(sent.end()) && start + run.len > sent.start {
                let (bytes, len, version) = (read_run(&self.log, run)?, run.len, run.version);
                let (temperature, observed) = (run.temperature, run.observed);
                let one = std::slice::from_ref(run);
                let extras = if trajectory.columns { columns.of_runs(one)? } else { Extras::new() };
                let columns = columns_stored(&extras, start);
                let stored = Piece { start, len, version, temperature, observed, bytes: &bytes, columns };
                if !stored.agrees(&sent, until) {
                    return Ok(false);
                }
            }
            start += run.len;
        }
        Ok(earlier.iter().all(|earlier| Piece::sent(earlier, payload).agrees(&sent, until)))
    }
}

fn columns_sent<'a>(item: &Item<'a>, payload: &'a [u8]) -> Vec<Column<'a>> {
    let (start, len, mut at) = (item.offset, item.count, item.range.start);
    let mut arrays = item.entries.iter().map(|entry| {
        let bytes = payload.get(at..at + entry.len as usize).unwrap_or_default();
        at = (at + bytes.len()).next_multiple_of(8);
        bytes
    });
    let _tokens = arrays.next();
    item.extra.iter().zip(arrays).map(|((name, dtype), bytes)| Column { name, dtype, start, len, bytes }).collect()
}

/// Columns of a stored run whose first token is `start`.
fn columns_stored(extras: &BTreeMap<String, Vec<Extra>>, start: u32) -> Vec<Column<'_>> {
    let mut columns = Vec::new();
    for (name, pieces) in extras {
        for Extra { offset, len, dtype, bytes } in pieces {
            columns.push(Column { name, dtype, start: start + offset, len: *len, bytes });
        }
    }
    columns
}

/// The arrays of an item's last `new` tokens, laid out as those of an item are.
///
/// # Errors
/// `Conflict` for a column that has not equally many bytes for each token.
pub(super) fn tail(item: &Item<'_>, payload: &[u8], new: u32) -> Result<(Vec<Entry>, Vec<u8>)> {
    let (skip, count) = ((item.count - new) as usize, item.count as usize);
    let (mut entries, mut arrays, mut at) = (Vec::new(), Vec::new(), item.range.start);
    for (nth, entry) in item.entries.iter().enumerate() {
        let bytes = payload.get(at..at + entry.len as usize).unwrap_or_default();
        // The main array holds ids and, behind all of these, log-probs.
        let parts = if nth == 0 && !item.observed { 2 } else { 1 };
        let row = bytes.len() / parts / count;
        if row * parts * count != bytes.len() {
            return Err(item.conflict("part of it is durable, and a column cannot be cut there"));
        }
        let start = arrays.len();
        bytes.chunks_exact(row * count).for_each(|part| arrays.extend_from_slice(&part[row * skip..]));
        entries.push(Entry::of(&arrays[start..]));
        arrays.resize(arrays.len().next_multiple_of(8), 0);
        at = (at + bytes.len()).next_multiple_of(8);
    }
    Ok((entries, arrays))
}
