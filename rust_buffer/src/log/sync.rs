//! What appenders, the sync thread and waiters share, and when a record is called durable.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Durability, Location, LogOptions, Lsn, Position, Storage,
    directory::file_name,
    format::Arrays,
    lock,
    reader::LogFile,
    writer::{Writer, sync_file},
};
use crate::error::{Result, StoreError};

/// What the appenders, the sync thread and the waiters share.
pub(super) struct State {
    pub(super) file: Arc<LogFile>,
    pub(super) written: Lsn,
    /// Newest LSN that is as durable as the level promises.
    pub(super) durable: Lsn,
    /// Newest LSN known to be on disk.
    synced: Lsn,
    /// Highest LSN that somebody waits for.
    wanted: Lsn,
    /// The sync thread waits for work without a deadline.
    idle: bool,
    failed: Option<String>,
    access: Access,
}

/// Whether records are taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    Closed,
    ReadOnly,
}

/// Locks are taken in the order sync, writer, then state or files.
pub(super) struct Shared {
    pub(super) storage: Arc<dyn Storage>,
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
    /// Keeps other writers away; None once closed, and for a reader.
    guard: Mutex<Option<Box<dyn Send>>>,
}

impl Shared {
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        options: LogOptions,
        writer: Writer,
        mut files: BTreeMap<u32, Arc<LogFile>>,
        guard: Option<Box<dyn Send>>,
    ) -> Self {
        let file = Arc::clone(&writer.file);
        files.insert(file.number, Arc::clone(&file));
        let last = writer.next - 1;
        let state = State {
            file,
            written: last,
            durable: last,
            synced: last,
            wanted: 0,
            idle: false,
            failed: None,
            access: if guard.is_some() { Access::Open } else { Access::ReadOnly },
        };
        Self {
            storage,
            options,
            sync: Mutex::new(()),
            writer: Mutex::new(writer),
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
            files: Mutex::new(files),
            guard: Mutex::new(guard),
        }
    }

    /// The synced LSN, if the log still takes records.
    pub(super) fn accepting(&self) -> Result<Lsn> {
        let state = lock(&self.state);
        match state.access {
            Access::Open => healthy(&state).map(|()| state.synced),
            Access::Closed => Err(StoreError::Closed),
            Access::ReadOnly => Err(StoreError::ReadOnly { path: self.storage.path().to_path_buf() }),
        }
    }

    /// Records the first failure and wakes everybody; gives the error back.
    pub(super) fn poison(&self, error: StoreError) -> StoreError {
        lock(&self.state).failed.get_or_insert_with(|| error.to_string());
        self.work.notify_all();
        self.done.notify_all();
        error
    }

    /// Appends one record; level `Always` waits for the disk.
    pub(super) fn append(&self, kind: u8, header: &[u8], arrays: &Arrays<'_>) -> Result<(Lsn, Location)> {
        let mut writer = lock(&self.writer);
        while writer.is_full(self.options.file_bytes) {
            drop(writer);
            self.rotate()?;
            writer = lock(&self.writer);
        }
        let synced = self.accepting()?;
        let lsn = writer.next;
        let location = match writer.write(kind, synced, header, arrays) {
            Err(error @ StoreError::Full { .. }) => return Err(error),
            written => written.map_err(|e| self.poison(e))?,
        };
        let mut state = lock(&self.state);
        state.written = lsn;
        if self.options.durability == Durability::Os {
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

    /// Seals the current file, if it is full, and begins a new one.
    fn rotate(&self) -> Result<()> {
        let _no_other_sync = lock(&self.sync);
        let mut writer = lock(&self.writer);
        self.accepting()?;
        if !writer.is_full(self.options.file_bytes) {
            return Ok(());
        }
        let sealed = writer.file.number;
        let number = sealed.checked_add(1).ok_or(StoreError::Full {
            what: "the number of log files",
            value: u64::from(u32::MAX) + 1,
            limit: u64::from(u32::MAX),
            remedy: "raise file_bytes in a new store",
        })?;
        let new = writer.next_file(&*self.storage, number, self.options.file_bytes).map_err(|e| self.poison(e))?;
        let reopened = self.reopen(sealed, writer.tail()).map_err(|e| self.poison(e))?;
        let mut files = lock(&self.files);
        files.insert(sealed, reopened);
        files.insert(number, Arc::clone(&new.file));
        drop(files);
        let mut state = lock(&self.state);
        state.file = Arc::clone(&new.file);
        (state.durable, state.synced) = (state.written, state.written);
        *writer = new;
        self.done.notify_all();
        Ok(())
    }

    /// A sealed file for its readers alone, which hold no descriptor of it.
    fn reopen(&self, number: u32, end: u64) -> Result<Arc<LogFile>> {
        let name = file_name(number);
        let path = self.storage.path_of(&name);
        let medium = self.storage.open(&name, false).map_err(|e| StoreError::io(&path, e))?;
        Ok(Arc::new(LogFile::new(number, path, medium, end)))
    }

    /// One fdatasync for all that was written before it, unless `lsn` is on disk by now. The mark precedes the
    /// acknowledgement, so that damage to acknowledged records is found even when they are the last ones.
    fn sync_until(&self, lsn: Lsn) -> Result<()> {
        let _one_at_a_time = lock(&self.sync);
        let (target, file) = {
            let state = lock(&self.state);
            if state.synced >= lsn.min(state.written) {
                return Ok(());
            }
            healthy(&state)?;
            (state.written, Arc::clone(&state.file))
        };
        let synced = sync_file(&file).and_then(|()| {
            let mut writer = lock(&self.writer);
            if writer.next - 1 == target { writer.mark() } else { Ok(()) }
        });
        synced.map_err(|e| self.poison(e))?;
        let mut state = lock(&self.state);
        state.synced = state.synced.max(target);
        state.durable = state.durable.max(target);
        self.done.notify_all();
        Ok(())
    }

    /// Makes all that is written durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.sync_until(Lsn::MAX)
    }

    /// The sync thread: at once when the log was idle or somebody waits, else every `commit_interval`.
    pub(super) fn run(&self) {
        let mut due = Instant::now();
        loop {
            let mut state = lock(&self.state);
            loop {
                if state.access != Access::Open || state.failed.is_some() {
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
            due = Instant::now() + self.options.commit_interval;
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

    /// Where the next record goes.
    pub(super) fn position(&self) -> Position {
        let writer = lock(&self.writer);
        Position { file: writer.file.number, offset: writer.tail(), next: writer.next }
    }

    /// Ends appending, and with it the sync thread.
    pub(super) fn refuse_records(&self) {
        lock(&self.state).access = Access::Closed;
        // Whoever saw it open has the writer until its record is written.
        drop(lock(&self.writer));
        self.work.notify_all();
    }

    /// Syncs what is written and gives the storage back; nothing to do the second time.
    pub(super) fn release(&self) -> Result<()> {
        let Some(guard) = lock(&self.guard).take() else { return Ok(()) };
        let synced = self.sync();
        drop(guard);
        synced
    }
}

fn healthy(state: &State) -> Result<()> {
    state.failed.clone().map_or(Ok(()), |detail| Err(StoreError::Poisoned { detail }))
}
