//! Repeats: a worker that lost an answer sends again what is durable, alone or with new tokens behind it.

use crate::{
    error::Result,
    log::Entry,
    state::trajectory::{Trajectory, Version},
    store::Store,
    store::arrays::read_run,
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
}

impl<'a> Piece<'a> {
    fn sent(item: &Item<'_>, payload: &'a [u8]) -> Self {
        Self {
            start: item.offset,
            len: item.count,
            version: item.version,
            temperature: item.temperature,
            observed: item.observed,
            bytes: payload.get(item.range.clone()).unwrap_or_default(),
        }
    }

    fn end(&self) -> u32 {
        self.start + self.len
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
                && (self.observed || equal(1)))
    }
}

impl Store {
    /// Whether the tokens of `item` before `until` are those of the trajectory: durable ones, and those of `earlier`
    /// items of the same batch.
    pub(super) fn holds(
        &self, trajectory: &Trajectory, earlier: &[&Item<'_>], item: &Item<'_>, payload: &[u8], until: u32,
    ) -> Result<bool> {
        let sent = Piece::sent(item, payload);
        let mut start = 0;
        for run in &trajectory.runs {
            if start < until.min(sent.end()) && start + run.len > sent.start {
                let (bytes, len, version) = (read_run(&self.log, run)?, run.len, run.version);
                let (temperature, observed) = (run.temperature, run.observed);
                let stored = Piece { start, len, version, temperature, observed, bytes: &bytes };
                if !stored.agrees(&sent, until) {
                    return Ok(false);
                }
            }
            start += run.len;
        }
        Ok(earlier.iter().all(|earlier| Piece::sent(earlier, payload).agrees(&sent, until)))
    }
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
