//! Compaction: the runs of a complete trajectory are written again as one, and so is what is needed yet of a file of
//! which most is dead. The files where they lay then go whole.
//!
//! Each step is planned while the store is held, read without it, and written as one record: a crash leaves the old
//! places or the new ones, and a file goes only once the record that nothing needs it is on disk.

use imbl::OrdMap;

use crate::{
    error::{Result, StoreError},
    log::{Arrays, Location, Log},
    state::codec,
    state::group::Group,
    state::record::{Annotate, Appended, Record},
    state::trajectory::{Run, Trajectory},
    store::Store,
    store::arrays::{Column, ColumnReader, read_run},
    store::live::Live,
    wire::WHOLE,
};

/// Bytes of one record, unless one trajectory has more: nobody who appends waits for long.
const MOST_BYTES: usize = 256 << 10;

/// Arrays of one record: the log takes no more.
const MOST_ARRAYS: usize = 65_535;

/// Trajectories of one record, and prompts that are written while the store is held.
const MOST_SOURCES: usize = 64;

/// Something to be done.
pub(crate) enum Work {
    /// Trajectories that lie in pieces.
    Gather(Vec<(u64, Vec<Run>)>),
    /// A file to be emptied, and who may be in it.
    Empty(u32, OrdMap<u64, Group>, OrdMap<u64, Trajectory>),
}

/// What is to lie elsewhere, and where it is now.
enum Source {
    /// The oldest runs of a trajectory.
    Tokens(u64, Vec<Run>),
    /// The prompt of a group.
    Prompt(u64, Location),
    /// What a scorer has added to a trajectory.
    Annotation(Location),
}

/// What is written again in one record, or in one for each prompt.
pub(crate) struct Plan(Vec<Source>);

/// The same as it was read.
#[derive(Default)]
pub(crate) struct Copies {
    tokens: Vec<Copied>,
    prompts: Vec<(u64, Location, Vec<Vec<u8>>)>,
    annotations: Vec<(Annotate, Location, Vec<Vec<u8>>)>,
}

struct Copied {
    trajectory: u64,
    runs: Vec<Run>,
    items: Vec<Appended>,
    arrays: Vec<Vec<u8>>,
}

impl Work {
    /// The file that is to be emptied.
    pub(crate) fn file(&self) -> Option<u32> {
        if let Self::Empty(file, ..) = self { Some(*file) } else { None }
    }

    /// What is to be written again, in pieces of a record each.
    pub(crate) fn plans(self) -> Vec<Plan> {
        match self {
            Self::Gather(pieces) => split(pieces.into_iter().map(|(id, runs)| Source::Tokens(id, runs))),
            Self::Empty(file, groups, trajectories) => {
                let within = |(id, trajectory): (&u64, &Trajectory)| {
                    let last = trajectory.runs.iter().rposition(|run| run.file == file)?;
                    Some(Source::Tokens(*id, trajectory.runs[..=last].to_vec()))
                };
                let prompts = groups.iter().filter(|(_, group)| group.location.file == file);
                let prompts = prompts.map(|(id, group)| Source::Prompt(*id, group.location));
                let annotations = trajectories.values().flat_map(|trajectory| {
                    let there = trajectory.annotations.iter().map(|known| known.location);
                    there.filter(|location| location.file == file).map(Source::Annotation)
                });
                split(trajectories.iter().filter_map(within).chain(prompts).chain(annotations))
            }
        }
    }
}

fn split(sources: impl Iterator<Item = Source>) -> Vec<Plan> {
    let (mut plans, mut plan, mut size) = (Vec::new(), Vec::new(), 0);
    for source in sources {
        size += match &source {
            Source::Tokens(_, runs) => runs.iter().map(Run::bytes).sum(),
            Source::Prompt(_, location) | Source::Annotation(location) => location.len as usize,
        };
        plan.push(source);
        if size >= MOST_BYTES || plan.len() == MOST_SOURCES {
            plans.push(Plan(std::mem::take(&mut plan)));
            size = 0;
        }
    }
    plans.push(Plan(plan));
    plans
}

impl Plan {
    /// Reads it. What cannot be read stays where it is: whoever needs it is told.
    pub(crate) fn read(self, log: &Log) -> Copies {
        let (mut copies, mut columns) = (Copies::default(), ColumnReader::new(log));
        for source in self.0 {
            let _ = match source {
                Source::Tokens(id, runs) => {
                    copied(log, &mut columns, id, runs).map(|copied| copies.tokens.push(copied))
                }
                Source::Prompt(id, location) => log.frame(location).map(|frame| {
                    let arrays = frame.arrays().into_iter().map(<[u8]>::to_vec).collect();
                    copies.prompts.push((id, location, arrays));
                }),
                Source::Annotation(location) => log.frame(location).map(|frame| {
                    let arrays = frame.arrays().into_iter().map(<[u8]>::to_vec).collect();
                    if let Ok(Record::Annotate(annotate)) = codec::decode(frame.kind(), frame.header()) {
                        copies.annotations.push((annotate, location, arrays));
                    }
                }),
            };
        }
        copies
    }
}

impl Copies {
    /// Their trajectories.
    pub(crate) fn trajectories(&self) -> impl Iterator<Item = u64> + '_ {
        self.tokens.iter().map(|copied| copied.trajectory)
    }
}

impl Store {
    /// The next thing to be done; None when all is well.
    pub(crate) fn next_work(&mut self) -> Option<Work> {
        let scattered = self.live.take_scattered(&self.state, MOST_BYTES);
        if !scattered.is_empty() {
            return Some(Work::Gather(scattered));
        }
        let file = self.live.sparsest(&self.log.sealed())?;
        Some(Work::Empty(file, self.state.groups.clone(), self.state.trajectories.clone()))
    }

    /// Writes what was read again, but for what is gone or lies elsewhere meanwhile.
    ///
    /// # Errors
    /// Those of the log.
    pub(crate) fn rewrite(&mut self, copies: &Copies) -> Result<()> {
        let (mut items, mut arrays) = (Vec::new(), Vec::new());
        for copied in &copies.tokens {
            let trajectory = self.state.trajectories.get(&copied.trajectory);
            if trajectory.is_some_and(|trajectory| trajectory.runs.starts_with(&copied.runs)) {
                if arrays.len() + copied.arrays.len() > MOST_ARRAYS {
                    self.write_compact(&mut items, &mut arrays)?;
                }
                items.extend_from_slice(&copied.items);
                arrays.extend(copied.arrays.iter().map(Vec::as_slice));
            }
        }
        self.write_compact(&mut items, &mut arrays)?;
        for (group, location, arrays) in &copies.prompts {
            if self.state.groups.get(group).is_some_and(|group| group.location == *location) {
                let arrays: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
                self.record(&Record::Move(*group), &Arrays::of(&arrays))?;
            }
        }
        for (annotate, location, arrays) in &copies.annotations {
            let trajectory = self.state.trajectories.get(&annotate.trajectory);
            if trajectory.is_some_and(|t| t.annotations.iter().any(|known| known.location == *location)) {
                let arrays: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
                self.record(&Record::Annotate(annotate.clone()), &Arrays::of(&arrays))?;
            }
        }
        Ok(())
    }

    fn write_compact(&mut self, items: &mut Vec<Appended>, arrays: &mut Vec<&[u8]>) -> Result<()> {
        if !items.is_empty() {
            self.record(&Record::Compact(std::mem::take(items)), &Arrays::of(arrays))?;
        }
        arrays.clear();
        Ok(())
    }

    /// Does all that there is to be done, at once.
    ///
    /// # Errors
    /// Those of the log.
    pub fn compact(&mut self) -> Result<()> {
        while let Some(work) = self.next_work() {
            let file = work.file();
            for plan in work.plans() {
                self.rewrite(&plan.read(&self.log))?;
            }
            self.emptied(file);
        }
        Ok(())
    }

    /// Notes that a file was to be emptied: what could not be read keeps it.
    pub(crate) fn emptied(&mut self, file: Option<u32>) {
        if let Some(file) = file.filter(|file| !self.is_dead(*file)) {
            self.live.leave(file);
        }
    }

    /// What of the log is needed.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Whether a log file has nothing that is needed.
    pub fn is_dead(&self, file: u32) -> bool {
        !self.live.bytes().contains_key(&file)
    }
}

/// A run that takes in the ones behind it while it can.
struct Joined {
    item: Appended,
    ids: Vec<u8>,
    logprobs: Vec<u8>,
    columns: Vec<Column>,
}

impl Joined {
    /// Whether a run with these columns can be a part of it, so that nothing is told apart that was one, or the reverse.
    fn takes(&self, run: &Run, columns: &[Column]) -> bool {
        if self.columns.iter().any(|column| column.dtype.starts_with(WHOLE)) {
            return false; // values of the trajectory have no place behind one another
        }
        let item = &self.item;
        let width = |column: &Column, tokens: u32| {
            let (bytes, tokens) = (column.bytes.len(), tokens as usize);
            (bytes % tokens == 0).then_some((bytes / tokens, column.name.clone(), column.dtype.clone()))
        };
        let own = self.columns.iter().map(|column| width(column, item.len));
        (item.version, item.observed) == (run.version, run.observed)
            && item.temperature.to_bits() == run.temperature.to_bits()
            && own.clone().all(|width| width.is_some())
            && own.eq(columns.iter().map(|column| width(column, run.len)))
    }
}

fn copied(log: &Log, reader: &mut ColumnReader<'_>, trajectory: u64, runs: Vec<Run>) -> Result<Copied> {
    let mut joined: Vec<Joined> = Vec::new();
    for run in &runs {
        let (bytes, columns) = (read_run(log, run)?, reader.of_run(run)?);
        let (ids, logprobs) = bytes.split_at(4 * run.len as usize);
        if let Some(last) = joined.last_mut().filter(|last| last.takes(run, &columns)) {
            last.item.len += run.len;
            last.ids.extend_from_slice(ids);
            last.logprobs.extend_from_slice(logprobs);
            let both = last.columns.iter_mut().zip(&columns);
            both.for_each(|(column, more)| column.bytes.extend_from_slice(&more.bytes));
        } else {
            let extra = columns.iter().map(|column| (column.name.clone(), column.dtype.clone())).collect();
            let Run { len, version, temperature, observed, .. } = *run;
            let item =
                Appended { trajectory, len, version, temperature, observed, stop: None, extra, over: 0, crc: None };
            joined.push(Joined { item, ids: ids.to_vec(), logprobs: logprobs.to_vec(), columns });
        }
    }
    let mut arrays = Vec::new();
    let mut items = Vec::new();
    for Joined { item, mut ids, logprobs, columns } in joined {
        ids.extend_from_slice(&logprobs);
        arrays.push(ids);
        arrays.extend(columns.into_iter().map(|column| column.bytes));
        items.push(item);
    }
    if arrays.len() > MOST_ARRAYS {
        let detail = format!("trajectory {trajectory} lies in {} arrays, too many for one record", arrays.len());
        return Err(StoreError::Conflict(detail));
    }
    Ok(Copied { trajectory, runs, items, arrays })
}
