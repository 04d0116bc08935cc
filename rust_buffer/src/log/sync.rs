//! What appenders, the sync thread and waiters share, and when a record is called durable.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Durability, Location, LogOptions, Lsn,
    format::{Stamp, encode, encode_snapshot},
    lock,
    reader::LogFile,
    writer::{Writer, sync_file},
};
use crate::error::{Result, StoreError};

/// Longest time between two syncs of a log that is written to and that nobody waits for.
const COMMIT_INTERVAL: Duration = Duration::from_millis(5);

/// What the appenders, the sync thread and the waiters share.
pub(super) struct State {
    pub(super) log_file: Arc<LogFile>,
    file: Option<Arc<File>>,
    pub(super) written: Lsn,
    pub(super) durable: Lsn,
    /// Highest LSN that somebody waits for.
    wanted: Lsn,
    /// The sync thread waits for work without a deadline.
    idle: bool,
    failed: Option<String>,
    closed: bool,
}

/// Locks are taken in the order sync, writer, then state or files.
pub(super) struct Shared {
    pub(super) dir: Option<PathBuf>,
    pub(super) options: LogOptions,
    /// Held during each sync, so that no two take the error of the same pages.
    sync: Mutex<()>,
    pub(super) writer: Mutex<Writer>,
    pub(super) state: Mutex<State>,
    /// Wakes the sync thread.
    work: Condvar,
    /// Wakes who waits for durability.
    done: Condvar,
    pub(super) files: Mutex<BTreeMap<u32, Arc<LogFile>>>,
    /// The locked file that keeps other writers away; None in memory and once closed.
    lock: Mutex<Option<File>>,
}

impl Shared {
    pub(super) fn new(
        dir: Option<&Path>,
        options: LogOptions,
        writer: Writer,
        sealed: Vec<LogFile>,
        guard: Option<File>,
    ) -> Self {
        let mut files: BTreeMap<_, _> = sealed.into_iter().map(|file| (file.number, Arc::new(file))).collect();
        files.insert(writer.log_file.number, Arc::clone(&writer.log_file));
        let last = writer.next - 1;
        let (log_file, file) = (Arc::clone(&writer.log_file), writer.file.clone());
        let state =
            State { log_file, file, written: last, durable: last, wanted: 0, idle: false, failed: None, closed: false };
        Self {
            dir: dir.map(Path::to_path_buf),
            options,
            sync: Mutex::new(()),
            writer: Mutex::new(writer),
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
            files: Mutex::new(files),
            lock: Mutex::new(guard),
        }
    }

    /// The durable LSN, if the log still takes records.
    pub(super) fn accepting(&self) -> Result<Lsn> {
        let state = lock(&self.state);
        if state.closed { Err(StoreError::Closed) } else { healthy(&state).map(|()| state.durable) }
    }

    /// Records the first failure and wakes everybody; gives the error back.
    fn poison(&self, error: StoreError) -> StoreError {
        lock(&self.state).failed.get_or_insert_with(|| error.to_string());
        self.work.notify_all();
        self.done.notify_all();
        error
    }

    /// Appends one record; level `Always` waits for the disk.
    pub(super) fn append(&self, kind: u8, header: &[u8], arrays: &[&[u8]]) -> Result<(Lsn, Location)> {
        let mut writer = lock(&self.writer);
        let durable = self.accepting()?;
        let lsn = writer.next;
        encode(&mut writer.scratch, Stamp { lsn, durable, kind }, header, arrays)?;
        let location = writer.write().map_err(|e| self.poison(e))?;
        let mut state = lock(&self.state);
        state.written = lsn;
        if self.options.durability == Durability::Os || self.dir.is_none() {
            state.durable = lsn;
        } else if state.idle {
            self.work.notify_one();
        }
        drop((state, writer));
        if self.options.durability == Durability::Always {
            self.sync_until(lsn)?;
        }
        Ok((lsn, location))
    }

    /// Seals the current file and begins a new one with `snapshot`, durably.
    pub(super) fn rotate(&self, snapshot: &[u8]) -> Result<()> {
        let _no_other_sync = lock(&self.sync);
        let mut writer = lock(&self.writer);
        self.accepting()?;
        let lsn = writer.next;
        let number = writer.log_file.number.checked_add(1).ok_or(StoreError::Full {
            what: "the number of log files",
            value: u64::from(u32::MAX) + 1,
            limit: u64::from(u32::MAX),
            remedy: "raise file_bytes in a new store",
        })?;
        let new = if let Some(dir) = &self.dir {
            let frame = encode_snapshot(lsn, snapshot)?;
            writer.next_file(dir, number, &frame, self.options.file_bytes).map_err(|e| self.poison(e))?
        } else {
            Writer::in_memory(number, lsn)
        };
        lock(&self.files).insert(number, Arc::clone(&new.log_file));
        let mut state = lock(&self.state);
        (state.file, state.log_file) = (new.file.clone(), Arc::clone(&new.log_file));
        (state.written, state.durable) = (lsn, lsn);
        *writer = new;
        self.done.notify_all();
        Ok(())
    }

    /// One fdatasync for all that was written before it, unless `lsn` is durable by now. The mark precedes the
    /// acknowledgement, so that damage to acknowledged records is found even when they are the last ones.
    fn sync_until(&self, lsn: Lsn) -> Result<()> {
        let _one_at_a_time = lock(&self.sync);
        let (target, file, log_file) = {
            let state = lock(&self.state);
            if state.durable >= lsn {
                return Ok(());
            }
            healthy(&state)?;
            (state.written, state.file.clone(), Arc::clone(&state.log_file))
        };
        let synced = sync_file(file.as_deref(), &log_file).and_then(|()| {
            let mut writer = lock(&self.writer);
            if writer.next - 1 == target { writer.mark() } else { Ok(()) }
        });
        synced.map_err(|e| self.poison(e))?;
        let mut state = lock(&self.state);
        state.durable = state.durable.max(target);
        self.done.notify_all();
        Ok(())
    }

    /// Makes all that is written durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.sync_until(Lsn::MAX)
    }

    /// The sync thread: at once when the log was idle or somebody waits, else every `COMMIT_INTERVAL`.
    pub(super) fn run(&self) {
        let mut due = Instant::now();
        loop {
            let mut state = lock(&self.state);
            loop {
                if state.closed || state.failed.is_some() {
                    return;
                }
                let wait = due.saturating_duration_since(Instant::now());
                if state.written == state.durable {
                    state.idle = true;
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                    state.idle = false;
                } else if state.wanted > state.durable || wait.is_zero() {
                    break;
                } else {
                    state = self.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
            drop(state);
            due = Instant::now() + COMMIT_INTERVAL;
            if self.sync().is_err() {
                return;
            }
        }
    }

    /// Waits until record `lsn` and all before it are durable; false when `timeout` passed first.
    pub(super) fn wait_durable(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        let mut state = lock(&self.state);
        if lsn > state.written {
            let written = state.written;
            return Err(StoreError::Conflict(format!("LSN {lsn} is not written, the last is {written}; append first")));
        }
        if state.durable < lsn {
            state.wanted = state.wanted.max(lsn);
            self.work.notify_one();
        }
        let pending = |state: &mut State| state.durable < lsn && state.failed.is_none();
        let waited = self.done.wait_timeout_while(state, timeout, pending);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.durable >= lsn { Ok(true) } else { healthy(&state).map(|()| false) }
    }

    /// Ends appending, and with it the sync thread.
    pub(super) fn refuse_records(&self) {
        lock(&self.state).closed = true;
        // Whoever saw it open has the writer until its record is written.
        drop(lock(&self.writer));
        self.work.notify_all();
    }

    /// Syncs what is written and gives the directory back; nothing to do in memory or the second time.
    pub(super) fn release(&self) -> Result<()> {
        let Some(guard) = lock(&self.lock).take() else { return Ok(()) };
        let synced = self.sync();
        drop(guard);
        synced
    }
}

fn healthy(state: &State) -> Result<()> {
    state.failed.clone().map_or(Ok(()), |detail| Err(StoreError::Poisoned { detail }))
}
