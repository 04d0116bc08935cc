//! The log at work: appending, rotation and syncs. `watermark` says when a record is called durable.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{
    Durability, Location, LogOptions, Lsn, Position, Room, Storage,
    ahead::Ahead,
    directory::{NEXT_NAME, file_name},
    format::Arrays,
    lock,
    reader::LogFile,
    watermark::{Access, Turn, Watermark},
    writer::{Prepared, Writer, sync_file},
};
use crate::error::{Result, StoreError};

/// Bytes of a record that the disk begins to write while the caller applies it; smaller ones share their sync.
const LARGE_BYTES: u32 = 128 << 10;

/// Locks are taken in the order sync, writer, then watermark or files.
pub(super) struct Shared {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) options: LogOptions,
    /// The file that is written; held during each sync, so that no two take the error of the same pages.
    current: Mutex<Arc<LogFile>>,
    pub(super) writer: Mutex<Writer>,
    pub(super) watermark: Watermark,
    ahead: Ahead,
    pub(super) files: Mutex<BTreeMap<u32, Arc<LogFile>>>,
    /// Keeps other writers away; None once closed, and for a reader.
    guard: Mutex<Option<Box<dyn Send>>>,
    /// The process that writes; None for a reader.
    pid: Option<u32>,
}

impl Shared {
    pub(super) fn new(
        storage: Arc<dyn Storage>, options: LogOptions, writer: Writer, mut files: BTreeMap<u32, Arc<LogFile>>,
        guard: Option<Box<dyn Send>>,
    ) -> Self {
        let file = Arc::clone(&writer.file);
        files.insert(file.number, Arc::clone(&file));
        let access = if guard.is_some() { Access::Open } else { Access::ReadOnly };
        let pid = guard.is_some().then(std::process::id);
        Self {
            pid,
            storage,
            options,
            current: Mutex::new(file),
            ahead: Ahead::new(),
            watermark: Watermark::new(writer.next - 1, access),
            writer: Mutex::new(writer),
            files: Mutex::new(files),
            guard: Mutex::new(guard),
        }
    }

    /// Refuses a process that inherited the log by a fork: its threads are not there, locks may be held by nobody, and
    /// what it wrote would lie where the other one writes too. To be asked before any lock is taken.
    pub(super) fn own_process(&self) -> Result<()> {
        match self.pid {
            Some(pid) if pid != std::process::id() => Err(StoreError::Conflict(format!(
                "{} was opened before a fork, by process {pid}, and this is process {}; use it there, or open it here \
                 for reading (`read`), or for writing once it is closed there",
                self.storage.path().display(),
                std::process::id(),
            ))),
            _ => Ok(()),
        }
    }

    /// The synced LSN, if the log still takes records.
    pub(super) fn accepting(&self) -> Result<Lsn> {
        match self.watermark.access() {
            (Access::Open, synced) => synced,
            (Access::Closed, _) => Err(StoreError::Closed),
            (Access::ReadOnly, _) => Err(StoreError::ReadOnly { path: self.storage.path().to_path_buf() }),
        }
    }

    /// Records the first failure and wakes everybody; gives the error back.
    pub(super) fn poison(&self, error: StoreError) -> StoreError {
        self.watermark.fail(&error);
        error
    }

    /// Writes one record; level `Always` waits for the disk, otherwise nobody is told.
    pub(super) fn write(&self, kind: u8, header: &[u8], arrays: &Arrays<'_>, room: Room) -> Result<(Lsn, Location)> {
        let mut writer = lock(&self.writer);
        while writer.is_full(self.options.file_bytes) {
            drop(writer);
            let begun = self.rotate()?;
            writer = lock(&self.writer);
            if !begun {
                // The disk is full: the record goes on in this file, where it has room.
                break;
            }
        }
        let synced = self.accepting()?;
        let lsn = writer.next;
        let location = match writer.write(kind, synced, header, arrays, room) {
            Err(error @ (StoreError::Full { .. } | StoreError::NoSpace { .. })) => return Err(error),
            written => written.map_err(|e| self.poison(e))?,
        };
        self.watermark.wrote(lsn, self.options.durability == Durability::Os);
        let file = Arc::clone(&writer.file);
        if writer.is_half_full(self.options.file_bytes) {
            self.ahead.want(file.number.saturating_add(1));
        }
        drop(writer);
        if location.len >= LARGE_BYTES && self.options.durability != Durability::Os {
            file.medium.hasten(location.offset, location.offset + u64::from(location.len));
        }
        if self.options.durability == Durability::Always {
            self.sync_until(lsn, Duration::MAX)?;
        }
        Ok((lsn, location))
    }

    /// Seals the current file, if it is full, and begins a new one; false where the disk has no room for it.
    fn rotate(&self) -> Result<bool> {
        let mut current = lock(&self.current);
        let mut writer = lock(&self.writer);
        let synced = self.accepting()?;
        if !writer.is_full(self.options.file_bytes) {
            return Ok(true);
        }
        let number = writer.file.number.checked_add(1).ok_or(StoreError::Full {
            what: "the number of log files",
            value: u64::from(u32::MAX) + 1,
            limit: u64::from(u32::MAX),
            remedy: "raise file_bytes in a new store",
        })?;
        let make = || Prepared::make(&*self.storage, number, self.options.file_bytes);
        let next = match self.ahead.take(number, true).map_or_else(make, Ok) {
            Err(StoreError::NoSpace { .. }) => return Ok(false),
            next => next.map_err(|e| self.poison(e))?,
        };
        if synced < writer.next - 1 || !writer.file.is_named() {
            sync_file(&*self.storage, &writer.file).map_err(|e| self.poison(e))?;
        }
        self.switch(&mut current, &mut writer, next).map_err(|e| self.poison(e))?;
        Ok(true)
    }

    /// Goes on in the next file; all of the current one is on disk.
    fn switch(&self, current: &mut Arc<LogFile>, writer: &mut Writer, next: Prepared) -> Result<()> {
        let new = writer.next_file(&*self.storage, next, self.options.file_bytes)?;
        let sealed = self.reopen(writer.file.number, writer.tail())?;
        let mut files = lock(&self.files);
        files.insert(sealed.number, sealed);
        files.insert(new.file.number, Arc::clone(&new.file));
        drop(files);
        *current = Arc::clone(&new.file);
        self.watermark.synced(new.next - 1);
        *writer = new;
        Ok(())
    }

    /// A sealed file for its readers alone, which hold no descriptor of it.
    fn reopen(&self, number: u32, end: u64) -> Result<Arc<LogFile>> {
        let name = file_name(number);
        let path = self.storage.path_of(&name);
        let medium = self.storage.open(&name, false).map_err(|e| StoreError::io(&path, e))?;
        Ok(Arc::new(LogFile::new(number, path, medium, end, true)))
    }

    /// One fdatasync for all that was written before it, unless another's brings `lsn` to disk; false when that takes
    /// longer than `timeout`. The mark precedes the acknowledgement, so that damage to acknowledged records is found
    /// even when they are the last ones.
    pub(super) fn sync_until(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        let target = match self.watermark.begin_sync(lsn, timeout)? {
            Turn::Ours(target) => target,
            Turn::Done => return Ok(true),
            Turn::TimedOut => return Ok(false),
        };
        let mut current = lock(&self.current);
        // The sync of a rotation may have failed since: it took the error away, and this one would be told of none.
        let healthy = self.watermark.access().1;
        let synced = healthy.and_then(|_| sync_file(&*self.storage, &current)).and_then(|()| {
            let mut writer = lock(&self.writer);
            if writer.next - 1 != target {
                return Ok(());
            }
            // A full file is sealed here, where nobody who appends waits for it.
            let number = writer.file.number.checked_add(1).filter(|_| writer.is_full(self.options.file_bytes));
            match number.and_then(|number| self.ahead.take(number, false)) {
                Some(next) => self.switch(&mut current, &mut writer, next),
                None => writer.mark(),
            }
        });
        synced.map_err(|e| self.poison(e))?;
        self.watermark.end_sync(target);
        Ok(true)
    }

    /// Makes all that is written durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.sync_until(Lsn::MAX, Duration::MAX).map(drop)
    }

    /// Brings the current file's header and name to disk: all before it is, and a snapshot may now name it.
    pub(super) fn settle(&self) -> Result<()> {
        let current = lock(&self.current);
        self.watermark.access().1?;
        if current.is_named() { Ok(()) } else { sync_file(&*self.storage, &current).map_err(|e| self.poison(e)) }
    }

    /// The thread that makes files ahead.
    pub(super) fn keep_ahead(&self) {
        let make = |number| Prepared::make(&*self.storage, number, self.options.file_bytes);
        self.ahead.run(make);
    }

    /// The sync thread.
    pub(super) fn keep_synced(&self) {
        self.watermark.keep_synced(self.options.sync_interval, || self.sync());
    }

    /// Where the next record goes.
    pub(super) fn position(&self) -> Position {
        let writer = lock(&self.writer);
        Position { file: writer.file.number, offset: writer.tail(), next: writer.next }
    }

    /// Ends appending, and with it the sync thread.
    pub(super) fn refuse_records(&self) {
        self.watermark.close();
        // Whoever saw it open has the writer until its record is written.
        drop(lock(&self.writer));
        self.ahead.close();
    }

    /// Syncs what is written and gives the storage back; nothing to do the second time.
    pub(super) fn release(&self) -> Result<()> {
        let Some(guard) = lock(&self.guard).take() else { return Ok(()) };
        let synced = self.sync();
        // Nobody needs it, and who opens the log makes another one.
        let _ = self.storage.remove(NEXT_NAME);
        drop(guard);
        synced
    }
}
