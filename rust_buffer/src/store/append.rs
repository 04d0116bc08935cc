//! Appends: each item of a batch is new, a repeat, or too late; what is new is one record.

use std::{collections::BTreeMap, ops::Range};

use crate::{
    clock::Micros,
    error::Result,
    log::{Arrays, Entry},
    state::group::Kind,
    state::record::{Appended, Record},
    state::trajectory::{End, Stop, Trajectory, Verdict, Version},
    store::Store,
    store::arrays::ColumnReader,
    store::repeats::tail,
    wire::{Batch, Item},
};

/// Tokens of an item, on average, below which a record has one array for all.
const SHORT_TOKENS: u64 = 64;

/// The answer to one appended item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// That of the item.
    pub trajectory: u64,
    /// The lease was fenced: nothing was written.
    pub stale: bool,
    /// Tokens that may be generated beyond those appended.
    pub grant: u32,
}

/// What is to be done about one item of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// Its lease is fenced.
    Stale,
    /// It repeats the end of a lease.
    Ended,
    /// It repeats something older than the newest tokens.
    Older,
    /// Its last `new` tokens are new, `over` of them beyond the grant; the trajectory is complete if `stop` is set; `end`
    /// ends the lease.
    Extend { new: u32, over: u32, stop: Option<Stop>, end: bool },
}

/// A trajectory as the earlier items of the batch leave it.
#[derive(Clone)]
struct Ahead<'a> {
    len: u32,
    last: Option<Version>,
    ended: bool,
    stop: Option<Stop>,
    /// Tokens granted and not yet used.
    grant: u32,
    /// Items that brought tokens.
    items: Vec<&'a Item<'a>>,
}

impl Store {
    /// Appends a batch: all of it, or nothing when an item is refused. What an item repeats is compared, and the rest
    /// taken. Tokens beyond the grant are taken too, and counted: work that is admitted is never refused.
    ///
    /// # Errors
    /// `Conflict`: a gap, other content at the same offset, more than `max_tokens`, a version that decreases or was never
    /// published, or a temperature that cannot be.
    pub fn append(&mut self, batch: &Batch<'_>, now: Micros) -> Result<Vec<Reply>> {
        self.expire(now)?;
        let in_episodes = self.in_episodes(batch)?;
        let batch = in_episodes.as_ref().unwrap_or(batch);
        let (mut ahead, mut columns) = (BTreeMap::new(), ColumnReader::new(&self.log));
        let decide = |item| self.decide(item, (batch.payload, &mut columns), &mut ahead);
        let decisions = batch.items.iter().map(decide).collect::<Result<Vec<_>>>()?;
        self.write(batch, &decisions)?;
        // All of them first: what one has used is not to be missing in the grant of another.
        for (item, decision) in batch.items.iter().zip(&decisions) {
            if let (Decision::Extend { new, over, .. }, false) = (*decision, item.observed) {
                self.leases.spend(item.trajectory, new - over);
            }
        }
        let deadline = now.saturating_add(self.settings.lease_ttl);
        for (item, decision) in batch.items.iter().zip(&decisions) {
            match *decision {
                Decision::Stale | Decision::Ended => {}
                Decision::Older => self.renew(item.trajectory, None, deadline)?,
                Decision::Extend { end: true, .. } => self.end_lease(item.trajectory)?,
                Decision::Extend { .. } => self.renew(item.trajectory, Some(item.next_version), deadline)?,
            }
        }
        let reply = |(item, decision): (&Item<'_>, &Decision)| {
            let stale = *decision == Decision::Stale;
            let lease = self.leases.get(item.trajectory).filter(|_| !stale);
            Reply { trajectory: item.trajectory, stale, grant: lease.map_or(0, |lease| lease.grant) }
        };
        Ok(batch.items.iter().zip(&decisions).map(reply).collect())
    }

    fn write(&mut self, batch: &Batch<'_>, decisions: &[Decision]) -> Result<()> {
        let (mut items, mut written) = (Vec::new(), Written::default());
        for (item, decision) in batch.items.iter().zip(decisions) {
            let Decision::Extend { new, over, stop, .. } = *decision else { continue };
            if new == 0 && stop.is_none() {
                continue;
            }
            let columns = if new > 0 { &item.extra[..] } else { &[] };
            items.push(Appended {
                trajectory: item.trajectory,
                len: new,
                version: item.version,
                temperature: item.temperature,
                observed: item.observed,
                stop,
                extra: columns.iter().map(|(name, dtype)| ((*name).to_owned(), (*dtype).to_owned())).collect(),
                over,
                crc: None,
            });
            if new > 0 {
                written.add(item, batch.payload, new)?;
            }
        }
        if items.is_empty() {
            return Ok(());
        }
        let packed = written.pack(&mut items);
        let arrays = if packed { written.joined(batch.payload) } else { written.arrays(batch.payload) };
        self.record(&Record::Append(items), &arrays).map(drop)
    }

    fn decide<'a>(
        &self, item: &'a Item<'a>, (payload, columns): (&[u8], &mut ColumnReader<'_>),
        ahead: &mut BTreeMap<u64, Ahead<'a>>,
    ) -> Result<Decision> {
        let (count, end) = (item.count, item.end()?);
        let Some(trajectory) = self.state.trajectories.get(&item.trajectory) else {
            let gone = item.trajectory < self.state.next_trajectory;
            return if gone { Ok(Decision::Stale) } else { Err(item.conflict("it was never admitted")) };
        };
        let Some(until) = item.offset.checked_add(count).filter(|_| item.epoch <= trajectory.epoch) else {
            let epoch = trajectory.epoch;
            return Err(
                item.conflict(&format!("epoch {} or its length was never given out (newest: {epoch})", item.epoch))
            );
        };
        if item.epoch < trajectory.epoch || trajectory.verdict == Verdict::Late {
            return Ok(Decision::Stale);
        }
        let before = ahead.entry(item.trajectory).or_insert_with(|| self.before(item.trajectory, trajectory));
        let group = self.state.group(trajectory.group)?;
        let known = until.min(before.len);
        let same = item.offset >= known || self.holds(trajectory, &before.items, item, known, (payload, columns))?;
        if before.ended {
            return Ok(if same && before.repeats(until, count, end, group.max_tokens) {
                Decision::Ended
            } else {
                Decision::Stale
            });
        }
        if item.offset > before.len {
            return Err(item.conflict(&format!("a gap; the next offset is {}", before.len)));
        }
        if !same {
            return Err(item.conflict("other content is durable there"));
        }
        if until < before.len {
            let refused = item.conflict(&format!("it ends the lease before its {} tokens", before.len));
            return if end.is_none() { Ok(Decision::Older) } else { Err(refused) };
        }
        let (new, stop) = (until - before.len, End::stop(end, until, group.max_tokens));
        let mut over = 0;
        if new > 0 {
            self.check_new(item, before, until, (group.max_tokens, group.kind))?;
            let budgeted = if item.observed { 0 } else { new };
            over = budgeted.saturating_sub(before.grant);
            before.grant -= budgeted - over;
            before.items.push(item);
            (before.len, before.last) = (until, Some(item.version));
        }
        before.ended = stop.is_some() || end.is_some();
        before.stop = before.stop.or(stop);
        Ok(Decision::Extend { new, over, stop, end: before.ended })
    }

    /// The trajectory before the batch.
    fn before<'a>(&self, id: u64, trajectory: &Trajectory) -> Ahead<'a> {
        let lease = self.leases.get(id);
        Ahead {
            len: trajectory.len,
            last: trajectory.last_version(),
            ended: lease.is_none(),
            stop: (!trajectory.is_partial()).then_some(trajectory.stop),
            grant: lease.map_or(0, |lease| lease.grant),
            items: Vec::new(),
        }
    }

    fn check_new(&self, item: &Item<'_>, before: &Ahead<'_>, until: u32, (max, kind): (u32, Kind)) -> Result<()> {
        if until > max {
            return Err(item.conflict(&format!("{until} tokens, the trajectory's limit is {max}")));
        }
        if item.version < 0 || before.last.is_some_and(|last| item.version < last) {
            return Err(
                item.conflict(&format!("version {} after {:?}; versions never decrease", item.version, before.last))
            );
        }
        if item.version > self.state.version {
            let newest = self.state.version;
            return Err(item.conflict(&format!(
                "version {} was never published, the newest is {newest}; publish it first",
                item.version
            )));
        }
        // Evaluation may be greedy; what is trained on is divided by its temperature.
        let least = if kind == Kind::Eval || item.observed { 0.0 } else { f32::MIN_POSITIVE };
        if !item.temperature.is_finite() || item.temperature < least {
            return Err(item.conflict(&format!("temperature {} is not a finite number > 0", item.temperature)));
        }
        Ok(())
    }
}

impl Ahead<'_> {
    /// Whether an item of known tokens up to `until` repeats what ended the lease or lies before it: without a lease
    /// everything else came too late.
    fn repeats(&self, until: u32, count: u32, end: Option<End>, max: u32) -> bool {
        match end {
            _ if until > self.len => false,
            _ if until < self.len => count > 0 && end.is_none(),
            Some(End::Release) => true,
            end => self.stop.is_some() && End::stop(end, until, max) == self.stop,
        }
    }
}

/// The arrays of a record: as they were sent, neighbours together, or copied where an item is new in part.
enum Part {
    Sent(Range<usize>),
    Copied(Vec<u8>),
}

#[derive(Default)]
struct Written(Vec<(Vec<Entry>, Part)>);

impl Written {
    fn add(&mut self, item: &Item<'_>, payload: &[u8], new: u32) -> Result<()> {
        if new < item.count {
            let (entries, arrays) = tail(item, payload, new)?;
            self.0.push((entries, Part::Copied(arrays)));
            return Ok(());
        }
        if let Some((entries, Part::Sent(span))) = self.0.last_mut() {
            if span.end == item.range.start {
                entries.extend_from_slice(&item.entries);
                span.end = item.range.end;
                return Ok(());
            }
        }
        self.0.push((item.entries.clone(), Part::Sent(item.range.clone())));
        Ok(())
    }

    /// Has items that are short and have no columns lie in one array: an entry for each in the table of arrays would be
    /// a good part of the record. False if they are not such items.
    fn pack(&self, items: &mut [Appended]) -> bool {
        let tokens: u64 = items.iter().map(|item| u64::from(item.len)).sum();
        let entries = || self.0.iter().flat_map(|(entries, _)| entries);
        let short = tokens < entries().count() as u64 * SHORT_TOKENS;
        if !short || items.iter().any(|item| !item.extra.is_empty()) {
            return false;
        }
        for (item, entry) in items.iter_mut().filter(|item| item.len > 0).zip(entries()) {
            item.crc = Some(entry.crc);
        }
        true
    }

    fn joined<'a>(&'a self, payload: &'a [u8]) -> Arrays<'a> {
        Arrays::joined(self.parts(payload).map(|(_, bytes)| bytes).collect())
    }

    fn arrays<'a>(&'a self, payload: &'a [u8]) -> Arrays<'a> {
        let mut arrays = Arrays::default();
        self.parts(payload).for_each(|(entries, bytes)| arrays.extend(entries, bytes));
        arrays
    }

    fn parts<'a>(&'a self, payload: &'a [u8]) -> impl Iterator<Item = (&'a [Entry], &'a [u8])> {
        self.0.iter().map(|(entries, part)| match part {
            Part::Sent(range) => (&entries[..], &payload[range.clone()]),
            Part::Copied(bytes) => (&entries[..], &bytes[..]),
        })
    }
}
