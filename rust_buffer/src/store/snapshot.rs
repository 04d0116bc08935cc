//! Snapshots of the state: what opening reads instead of the records that they cover.

use std::{
    collections::BTreeMap,
    iter::{from_fn, once_with},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, StoreError, is_no_space},
    log::{Frame, Log, Position, Replay},
    state::State,
    state::codec,
    state::group::Group,
    state::placed::Placed,
    state::trajectory::Trajectory,
    wire,
};

/// A snapshot follows when the records after the last one are this many times its size: it adds that share to what is
/// written, and bounds what opening reads.
const RECORDS_PER_SNAPSHOT: u64 = 64;

impl Replay for State {
    fn snapshot(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        *self = wire::decode(bytes)?;
        Ok(())
    }

    fn snapshot_part(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        let Part { groups, trajectories } = wire::decode(bytes)?;
        self.groups.extend(groups);
        self.trajectories.extend(trajectories);
        Ok(())
    }

    fn unknown(&self, kind: u8) -> Option<String> {
        codec::unknown(kind)
    }

    fn record(&mut self, frame: &Frame) -> std::result::Result<(), String> {
        let record = codec::decode(frame.kind(), frame.header())?;
        self.apply(&record, &Placed::from(frame)).map_err(|error| error.to_string())
    }
}

/// Groups and trajectories of one part: about a megabyte.
const MOST_GROUPS: usize = 1 << 12;
const MOST_TRAJECTORIES: usize = 1 << 13;

/// A part of a snapshot after the first, which has all the rest of the state.
#[derive(Default, Serialize, Deserialize)]
struct Part {
    groups: BTreeMap<u64, Group>,
    trajectories: BTreeMap<u64, Trajectory>,
}

/// A state in parts; in one where it is small.
pub(super) fn parts(state: &State) -> (u64, Box<dyn Iterator<Item = Result<Vec<u8>>> + '_>) {
    let (groups, trajectories) = (state.groups.len(), state.trajectories.len());
    if groups <= MOST_GROUPS && trajectories <= MOST_TRAJECTORIES {
        return (1, Box::new(once_with(|| wire::encode(state))));
    }
    let count = 1 + groups.div_ceil(MOST_GROUPS) + trajectories.div_ceil(MOST_TRAJECTORIES);
    let rest = State { groups: OrdMap::new(), trajectories: OrdMap::new(), ..state.clone() };
    let groups = chunks(&state.groups, MOST_GROUPS).map(|groups| Part { groups, ..Part::default() });
    let trajectories =
        chunks(&state.trajectories, MOST_TRAJECTORIES).map(|trajectories| Part { trajectories, ..Part::default() });
    let parts = groups.chain(trajectories).map(|part| wire::encode(&part));
    (count as u64, Box::new(once_with(move || wire::encode(&rest)).chain(parts)))
}

/// The entries of a map, so many at a time.
fn chunks<T: Clone>(map: &OrdMap<u64, T>, most: usize) -> impl Iterator<Item = BTreeMap<u64, T>> + '_ {
    let mut entries = map.iter();
    from_fn(move || {
        let chunk: BTreeMap<u64, T> = entries.by_ref().take(most).map(|(id, value)| (*id, value.clone())).collect();
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// When snapshots are due, and the thread that writes one beside the store.
pub(crate) struct Snapshots {
    /// Held while one is written.
    one: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
    /// Bytes of records since the last one was begun.
    since: u64,
    /// Bytes of records that are no trouble to read again.
    least: u64,
}

impl Snapshots {
    pub(crate) fn new(least: u64) -> Self {
        Self { one: Arc::default(), thread: None, since: 0, least }
    }

    /// Whether one of about `bytes` is due after a record of `len` bytes.
    pub(crate) fn is_due(&mut self, len: u32, bytes: u64) -> bool {
        self.since += u64::from(len);
        self.since >= self.least.max(RECORDS_PER_SNAPSHOT * bytes)
            && self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Writes `state` in a thread of its own. One for which there is no room or no thread is left out: opening reads
    /// more. Another failure poisons the log.
    pub(crate) fn take(&mut self, state: &State, log: &Log) {
        self.since = 0;
        let (task, shared) = (self.task(state, log), log.clone());
        let run = move || match task.write(&shared) {
            Ok(()) | Err(StoreError::Closed) => {}
            Err(StoreError::Io { source, .. }) if is_no_space(&source) => {}
            Err(error) => drop(shared.poison(error)),
        };
        self.thread = std::thread::Builder::new().name("log-snapshot".into()).spawn(run).ok();
    }

    /// The snapshot of `state`, for a caller that need not hold the store while it is written.
    pub(crate) fn task(&self, state: &State, log: &Log) -> Task {
        Task { one: Arc::clone(&self.one), state: state.clone(), position: log.position() }
    }

    /// Waits for the thread.
    pub(crate) fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has nothing to tell that the log does not know.
            let _ = thread.join();
        }
    }
}

/// A snapshot that is yet to be written.
pub(crate) struct Task {
    one: Arc<Mutex<()>>,
    state: State,
    position: Position,
}

impl Task {
    /// Writes it, unless a newer one is.
    ///
    /// # Errors
    /// Those of the log.
    pub(crate) fn write(&self, log: &Log) -> Result<()> {
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        if log.snapshot_position().next >= self.position.next {
            return Ok(());
        }
        let (count, mut parts) = parts(&self.state);
        log.write_snapshot_parts(self.position, count, &mut *parts)
    }
}
