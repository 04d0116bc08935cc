//! Snapshots of the state: what opening reads instead of the records that they cover.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use crate::{
    error::{Result, StoreError, is_no_space},
    log::{Frame, Log, Position, Replay},
    state::State,
    state::apply::Placed,
    state::codec,
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

    fn unknown(&self, kind: u8) -> Option<String> {
        codec::unknown(kind)
    }

    fn record(&mut self, frame: &Frame) -> std::result::Result<(), String> {
        let record = codec::decode(frame.kind(), frame.header())?;
        self.apply(&record, &Placed::from(frame)).map_err(|error| error.to_string())
    }
}

/// When snapshots are due, and the thread that writes one beside the store.
pub(crate) struct Snapshots {
    writer: Arc<Writer>,
    thread: Option<JoinHandle<()>>,
    /// Bytes of records since the last one was begun.
    since: u64,
    /// Bytes of records that are no trouble to read again.
    least: u64,
}

#[derive(Default)]
struct Writer {
    /// Held while one is written.
    one: Mutex<()>,
    /// Bytes of the last one.
    len: AtomicU64,
}

impl Snapshots {
    pub(crate) fn new(least: u64) -> Self {
        Self { writer: Arc::default(), thread: None, since: 0, least }
    }

    /// Whether one is due after a record of `len` bytes.
    pub(crate) fn is_due(&mut self, len: u32) -> bool {
        self.since += u64::from(len);
        self.since >= self.least.max(RECORDS_PER_SNAPSHOT * self.writer.len.load(Ordering::Relaxed))
            && self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Writes `state` in a thread of its own. One for which there is no room or no thread is left out: opening reads
    /// more. Another failure poisons the log.
    pub(crate) fn take(&mut self, state: &State, log: &Log) {
        self.since = 0;
        let (writer, snapshot) =
            (Arc::clone(&self.writer), Snapshot { state: state.clone(), position: log.position() });
        let shared = log.clone();
        let run = move || match writer.write(&snapshot, &shared) {
            Ok(()) | Err(StoreError::Closed) => {}
            Err(StoreError::Io { source, .. }) if is_no_space(&source) => {}
            Err(error) => drop(shared.poison(error)),
        };
        self.thread = std::thread::Builder::new().name("log-snapshot".into()).spawn(run).ok();
    }

    /// Something that writes `state` when it is called, for a caller that need not hold the store.
    pub(crate) fn task(&self, state: &State, log: &Log) -> impl FnOnce(&Log) -> Result<()> + use<> {
        let (writer, snapshot) =
            (Arc::clone(&self.writer), Snapshot { state: state.clone(), position: log.position() });
        move |log| writer.write(&snapshot, log)
    }

    /// Waits for the thread.
    pub(crate) fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has nothing to tell that the log does not know.
            let _ = thread.join();
        }
    }
}

struct Snapshot {
    state: State,
    position: Position,
}

impl Writer {
    fn write(&self, snapshot: &Snapshot, log: &Log) -> Result<()> {
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        if log.snapshot_position().next >= snapshot.position.next {
            return Ok(());
        }
        let bytes = wire::encode(&snapshot.state)?;
        self.len.store(bytes.len() as u64, Ordering::Relaxed);
        log.write_snapshot(snapshot.position, &bytes)
    }
}
