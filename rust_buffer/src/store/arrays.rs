//! The arrays of records as they lie in the log: admissions' prompts, and stored runs of tokens with their columns.

use std::collections::{BTreeMap, btree_map::Entry};

use crate::{
    error::Result,
    log::{Bytes, Location, Log, Part},
    state::annotation::Annotation,
    state::codec,
    state::fork::Stretch,
    state::record::{PACKED, Record},
    state::trajectory::{Run, Trajectory},
};

/// What an admission kept of its prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPrompt {
    /// int32 token ids, little-endian.
    pub tokens: Vec<u8>,
    /// Opaque bytes.
    pub metadata: Vec<u8>,
    /// None: recorded before texts were kept.
    pub text: Option<String>,
}

/// An extra column of one stored run of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Extra {
    /// Offset of the run's first token.
    pub offset: u32,
    /// Tokens of the run.
    pub len: u32,
    pub dtype: String,
    pub bytes: Vec<u8>,
}

/// Extra columns by name, one entry for each stored run of tokens that has the column.
pub type Extras = BTreeMap<String, Vec<Extra>>;

/// Tokens after the prompt, as little-endian bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// int32 ids.
    pub ids: Vec<u8>,
    /// float32 log-probs; 0 where observed.
    pub logprobs: Vec<u8>,
    /// 1 where the environment made the token.
    pub observed: Vec<u8>,
}

/// The prompt of the admission at `location`.
///
/// # Errors
/// Those of the log; `Corrupt` also for a record of another kind.
pub fn read_prompt(log: &Log, location: Location) -> Result<StoredPrompt> {
    let frame = log.frame(location)?;
    let damaged = |detail: &str| log.corrupt(location.file, location.offset, detail);
    let array = |index: usize| frame.array(index).map(<[u8]>::to_vec);
    let [tokens, metadata] = [0, 1].map(|index| array(index).ok_or_else(|| damaged("the record has no prompt")));
    let text = array(2).map(|text| String::from_utf8(text).map_err(|_| damaged("a prompt's text is not UTF-8")));
    Ok(StoredPrompt { tokens: tokens?, metadata: metadata?, text: text.transpose()? })
}

/// The token ids of the prompt of the admission at `location`.
///
/// # Errors
/// As `read_prompt`.
pub fn read_prompt_tokens(log: &Log, location: Location) -> Result<Vec<u8>> {
    let frame = log.frame(location)?;
    let tokens = frame.array(0).map(<[u8]>::to_vec);
    tokens.ok_or_else(|| log.corrupt(location.file, location.offset, "the record has no prompt"))
}

/// The array of a run: tokens, then log-probs unless observed.
///
/// # Errors
/// Those of the log.
pub fn read_run(log: &Log, run: &Run) -> Result<Bytes> {
    let bytes = run_bytes(log, run)?;
    check_run(log, run, &bytes)?;
    Ok(bytes)
}

/// The same, unchecked.
pub(crate) fn run_bytes(log: &Log, run: &Run) -> Result<Bytes> {
    log.bytes_at(run.file, run.offset(), run.bytes())
}

/// Whether `bytes` are those that were written as `run`.
pub(crate) fn check_run(log: &Log, run: &Run, bytes: &[u8]) -> Result<()> {
    if crc32c::crc32c(bytes) == run.crc {
        return Ok(());
    }
    Err(log.corrupt(run.file, run.offset(), "the checksum of an array does not match"))
}

/// Tokens of consecutive runs.
///
/// # Errors
/// Those of the log.
pub fn read_runs(log: &Log, runs: &[Run]) -> Result<Tokens> {
    let mut tokens = Tokens::default();
    for run in runs {
        let bytes = read_run(log, run)?;
        let (ids, logprobs) = bytes.split_at(4 * run.len as usize);
        tokens.ids.extend_from_slice(ids);
        tokens.logprobs.extend_from_slice(logprobs);
        tokens.logprobs.resize(tokens.ids.len(), 0);
        tokens.observed.resize(tokens.ids.len() / 4, u8::from(run.observed));
    }
    Ok(tokens)
}

/// A column of a run, and what it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Column {
    pub name: String,
    pub dtype: String,
    pub bytes: Vec<u8>,
}

/// Columns of a frame's runs, by the offset of each run in it: name, dtype, bytes.
type Named = BTreeMap<u32, Vec<(String, String, Bytes)>>;

/// Reads extra columns. A frame is read and decoded once, however many runs lie in it: whoever reads more than one run
/// does so by one reader.
pub struct ColumnReader<'a> {
    log: &'a Log,
    frames: BTreeMap<(u32, u64), Named>,
}

impl<'a> ColumnReader<'a> {
    /// One that has read nothing yet.
    pub fn new(log: &'a Log) -> Self {
        Self { log, frames: BTreeMap::new() }
    }

    /// The extra columns of a run.
    ///
    /// # Errors
    /// Those of the log.
    pub fn of_run(&mut self, run: &Run) -> Result<Vec<Column>> {
        let named = match self.frames.entry((run.file, run.frame)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(columns_of(self.log, run)?),
        };
        let column = |(name, dtype, bytes): &(String, String, Bytes)| Column {
            name: name.clone(),
            dtype: dtype.clone(),
            bytes: bytes.to_vec(),
        };
        Ok(named.get(&run.at).into_iter().flatten().map(column).collect())
    }

    /// The extra columns of consecutive runs.
    ///
    /// # Errors
    /// Those of the log.
    pub fn of_runs(&mut self, runs: &[Run]) -> Result<Extras> {
        let (mut extras, mut offset) = (Extras::new(), 0);
        for run in runs {
            for Column { name, dtype, bytes } in self.of_run(run)? {
                extras.entry(name).or_default().push(Extra { offset, len: run.len, dtype, bytes });
            }
            offset += run.len;
        }
        Ok(extras)
    }

    /// The extra columns of a trajectory: those of its runs, and those that scorers have added.
    ///
    /// # Errors
    /// Those of the log; `Corrupt` also for an annotation that is none.
    pub fn of_trajectory(&mut self, trajectory: &Trajectory) -> Result<Extras> {
        if !trajectory.columns {
            return Ok(Extras::new());
        }
        let (log, mut extras) = (self.log, self.of_runs(&trajectory.runs)?);
        for Annotation { location, .. } in &trajectory.annotations {
            let frame = log.frame(*location)?;
            let damaged = |detail: String| log.corrupt(location.file, location.offset, detail);
            let record = codec::decode(frame.kind(), frame.header()).map_err(damaged)?;
            let Record::Annotate(annotate) = record else {
                return Err(damaged("the record is no annotation".to_owned()));
            };
            for ((name, dtype), part) in annotate.columns.into_iter().zip(frame.parts()) {
                let extra = Extra { offset: 0, len: trajectory.len, dtype, bytes: part.bytes.to_vec() };
                extras.entry(name).or_default().push(extra);
            }
        }
        Ok(extras)
    }
}

/// The columns of the frame in which `run` lies.
fn columns_of(log: &Log, run: &Run) -> Result<Named> {
    let mut named = Named::new();
    if log.kind_at(run.file, run.frame)? == PACKED {
        return Ok(named);
    }
    let frame = log.frame_at(run.file, run.frame)?;
    let damaged = |detail| log.corrupt(run.file, run.frame, detail);
    let record = codec::decode(frame.kind(), frame.header()).map_err(damaged)?;
    let (Record::Append(items) | Record::Compact(items)) = record else { return Ok(named) };
    let mut arrays = frame.parts();
    for item in items.into_iter().filter(|item| item.len > 0) {
        let main = arrays.next();
        let columns: Vec<_> = item.extra.into_iter().zip(arrays.by_ref()).collect();
        if let Some(main) = main.filter(|_| !columns.is_empty()) {
            let column = |((name, dtype), part): ((String, String), Part<'_>)| (name, dtype, frame.bytes_of(&part));
            named.insert(main.at, columns.into_iter().map(column).collect());
        }
    }
    Ok(named)
}

/// Tokens of the history of a branch whose episode has these runs.
///
/// # Errors
/// Those of the log.
pub fn read_history(log: &Log, runs: &[Run], history: &[Stretch]) -> Result<Tokens> {
    let (all, mut tokens) = (read_runs(log, runs)?, Tokens::default());
    if matches!(history, [Stretch { from: 0, to, .. }] if 4 * *to as usize == all.ids.len()) {
        return Ok(all);
    }
    for &Stretch { from, to, .. } in history {
        let (from, to) = (from as usize, to as usize);
        tokens.ids.extend_from_slice(&all.ids[4 * from..4 * to]);
        tokens.logprobs.extend_from_slice(&all.logprobs[4 * from..4 * to]);
        tokens.observed.extend_from_slice(&all.observed[from..to]);
    }
    Ok(tokens)
}
