//! The append-only log: everything the store knows is in it, and what it once called durable never changes silently.
//!
//! # Invariants
//! 1. LSNs are dense: each frame has the LSN of the frame before it plus one, across files; the CRC covers it.
//! 2. `durable_lsn` moves only after an fdatasync that began after the frames were written (level `Os`: after the
//!    write). A failed write or sync poisons the log: nothing is retried and nothing later is reported durable.
//! 3. A file is synced before the first record of the next one is written. That one is made ahead, under another name
//!    and with a header that says LSN 0; its header and name are durable before any record of it is. Sealed files are
//!    immutable and deleted whole, never recycled.
//! 4. The snapshot (of the state, with the position of the first record that it does not cover) is replaced
//!    atomically, and only once every record that it covers is on disk. Opening reads it and the records after it; no
//!    file from its position on is ever deleted.
//! 5. Each frame carries the synced LSN of the moment it was written, and each completed sync of an otherwise idle
//!    log leaves a *mark* (the same LSN, no payload) where the next frame will go. At recovery the first unreadable
//!    frame of the last file is a torn tail if no later frame or mark says that it was on disk, and is zeroed durably;
//!    otherwise bytes that were acknowledged are gone, and opening fails with file and offset. Power loss may lose any
//!    subset of unsynced pages, so a later frame that is whole is by itself no evidence of damage.
//! 6. Bytes below a file's published end are never written again, so maps of them are immutable; whoever reads them
//!    pins the map, also beyond the deletion of the file.
//!
//! The bytes of format 3 are drawn in `rust_buffer/README.md`, together with the hazard that each invariant answers.

mod ahead;
mod directory;
mod disk;
mod files;
mod format;
mod memory;
mod network;
mod reader;
mod recovery;
mod room;
mod snapshot;
mod storage;
mod sync;
mod watermark;
mod writer;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::{
    directory::SNAPSHOT_NAME,
    format::{MARK, SNAPSHOT},
    recovery::{recover, resume},
    room::SnapshotRoom,
    snapshot::write_snapshot,
    sync::Shared,
    writer::Writer,
};
pub use self::{
    disk::Disk,
    format::{Arrays, Entry, FORMAT},
    memory::Memory,
    network::network_name,
    reader::{Frame, Part},
    recovery::Replay,
    room::Room,
    storage::{Bytes, Medium, Storage},
};
use crate::error::{Result, StoreError};

/// Log sequence number: 1 is the first record of a new log.
pub type Lsn = u64;

/// Where a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    /// Number of the log file.
    pub file: u32,
    /// Offset of the frame in bytes.
    pub offset: u64,
    /// Length of the whole frame in bytes.
    pub len: u32,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Number of the log file.
    pub file: u32,
    /// Offset of the frame after it in bytes.
    pub offset: u64,
    /// LSN of the record after it.
    pub next: Lsn,
}

/// When a record counts as durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When the operating system has it: survives the death of the process, not the loss of power.
    Os,
    /// After the next group commit, by the sync thread or by a caller that waits.
    #[default]
    Group,
    /// Before `append` returns.
    Always,
}

/// How a log is kept.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// What an acknowledged record survives.
    pub durability: Durability,
    /// Bytes of records after which a new file is begun, and that are preallocated.
    pub file_bytes: u64,
    /// Longest time between two syncs of a log that is written to and that nobody waits for.
    pub sync_interval: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { durability: Durability::Group, file_bytes: 64 << 20, sync_interval: Duration::from_millis(5) }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The log. Clones share it; it closes with its last clone.
#[derive(Clone)]
pub struct Log(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    snapshot: Mutex<Position>,
    room: SnapshotRoom,
    /// Held while a snapshot is written: the storage is not released meanwhile.
    snapshotting: Mutex<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Whoever wants to know calls `close` first.
        let _ = self.close();
    }
}

impl Log {
    /// Opens or creates the log in `storage`; `replay` gets what is there.
    ///
    /// # Errors
    /// `Locked` by another writer, `Version` of another format, `Corrupt` for damage to what was durable, `Io`.
    pub fn open(storage: Arc<dyn Storage>, options: LogOptions, replay: &mut dyn Replay) -> Result<Self> {
        let guard = storage.lock()?;
        let found = recover(&*storage, replay, true)?;
        let writer = resume(&*storage, &found, options.file_bytes)?;
        let shared = Arc::new(Shared::new(storage, options, writer, found.sealed, Some(guard)));
        let inner = Inner::new(shared, found.snapshot);
        if options.durability == Durability::Group {
            inner.spawn("log-sync", Shared::keep_synced).map_err(|e| StoreError::io(inner.shared.storage.path(), e))?;
        }
        // Where no thread can be had, files are made when they are needed.
        let _ = inner.spawn("log-ahead", Shared::keep_ahead);
        inner.room.renew(&*inner.shared.storage, options.file_bytes);
        Ok(Self(Arc::new(inner)))
    }

    /// Reads what is in `storage` now, beside a writer that may be at work: no lock, no change, and no record after it.
    ///
    /// # Errors
    /// As `open`, but never `Locked`; `Io` also when there is no log.
    pub fn read(storage: Arc<dyn Storage>, replay: &mut dyn Replay) -> Result<Self> {
        let found = recover(&*storage, replay, false)?;
        let missing = || {
            let detail = "there is no store; name the directory of one that was opened to be written";
            StoreError::io(storage.path(), std::io::Error::new(std::io::ErrorKind::NotFound, detail))
        };
        let (number, tail) = found.last.as_ref().ok_or_else(missing)?;
        let writer = Writer::read_only(&*storage, *number, tail)?;
        let shared = Arc::new(Shared::new(storage, LogOptions::default(), writer, found.sealed, None));
        Ok(Self(Arc::new(Inner::new(shared, found.snapshot))))
    }

    /// Appends one record: `header` and `arrays` are the caller's, `kind` is 1 to 254. Level `Always` waits for the
    /// disk; otherwise `wait_durable` or `sync_through` does. A full file is sealed first.
    ///
    /// # Errors
    /// `Closed`, `Poisoned` by an earlier failure, `Io` (which poisons), `Full` beyond 4 GiB or 65,535 arrays.
    pub fn append(&self, kind: u8, header: &[u8], arrays: &Arrays<'_>) -> Result<(Lsn, Location)> {
        let written = self.write(kind, header, arrays, Room::Usual)?;
        self.wake();
        Ok(written)
    }

    /// The same, but an idle log stays idle: the caller calls `sync_through` or `wake` next, also after an error of its
    /// own.
    ///
    /// # Errors
    /// As `append`.
    pub fn write(&self, kind: u8, header: &[u8], arrays: &Arrays<'_>, room: Room) -> Result<(Lsn, Location)> {
        if kind == SNAPSHOT || kind == MARK {
            return Err(StoreError::Conflict(format!("record kind {kind} is the log's own; use 1 to 254")));
        }
        self.0.shared.own_process()?;
        self.0.shared.write(kind, header, arrays, room)
    }

    /// Begins a call of the store: its reads trust nothing that earlier ones found readable.
    ///
    /// # Errors
    /// `Conflict` in a process that inherited the log by a fork.
    pub fn begin(&self) -> Result<()> {
        self.0.shared.storage.look_again();
        self.0.shared.own_process()
    }

    /// Has the sync thread sync what is written.
    pub fn wake(&self) {
        self.0.shared.watermark.wake();
    }

    /// Makes record `lsn` and all before it durable in the caller's thread, which saves two changes of threads; false
    /// when another's sync takes longer than `timeout`. Its own sync takes what the disk takes.
    ///
    /// # Errors
    /// `Poisoned`, or `Io`, which poisons.
    pub fn sync_through(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        self.0.shared.own_process()?;
        self.0.shared.sync_until(lsn, timeout)
    }

    /// Where the next record goes.
    pub fn position(&self) -> Position {
        self.0.shared.position()
    }

    /// Where recovery starts.
    pub fn snapshot_position(&self) -> Position {
        *lock(&self.0.snapshot)
    }

    /// Makes recovery start at `position`, which `position()` gave, with `snapshot`; waits for the disk.
    ///
    /// # Errors
    /// As `append`; after `Io` recovery starts where it did.
    pub fn write_snapshot(&self, position: Position, snapshot: &[u8]) -> Result<()> {
        self.write_snapshot_parts(position, 1, &mut std::iter::once(Ok(snapshot.to_vec())))
    }

    /// The same with a snapshot in `count` parts, of which one is in memory at a time.
    ///
    /// # Errors
    /// As `append`, and those of the parts; recovery then starts where it did.
    pub fn write_snapshot_parts(
        &self, position: Position, count: u64, parts: &mut dyn Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        let shared = &self.0.shared;
        self.0.shared.own_process()?;
        let _one = lock(&self.0.snapshotting);
        shared.accepting()?;
        shared.sync()?;
        shared.settle()?;
        write_snapshot(&*shared.storage, position, count, parts)?;
        *lock(&self.0.snapshot) = position;
        self.0.room.renew(&*shared.storage, shared.options.file_bytes);
        Ok(())
    }

    /// Sees that there is room for a snapshot of `bytes`, which an eviction needs, also where others fill the disk; false
    /// where there is none.
    pub fn has_room(&self, bytes: u64) -> bool {
        // Whoever writes a snapshot now uses the room up, and makes another: the next record asks anew.
        let make =
            || self.0.snapshotting.try_lock().map_or(true, |_one| self.0.room.make(&*self.0.shared.storage, bytes));
        bytes <= self.0.room.bytes() || make()
    }

    /// Path of the snapshot.
    pub fn snapshot_path(&self) -> PathBuf {
        self.0.shared.storage.path_of(SNAPSHOT_NAME)
    }

    /// LSN of the last record written.
    pub fn lsn(&self) -> Lsn {
        self.0.shared.watermark.written()
    }

    /// LSN of the last record that is durable, with all before it.
    pub fn durable_lsn(&self) -> Lsn {
        self.0.shared.watermark.durable()
    }

    /// Waits until record `lsn` and all before it are durable; false when `timeout` passed first.
    ///
    /// # Errors
    /// `Poisoned` when they will never be, `Conflict` when `lsn` is not yet written.
    pub fn wait_durable(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        self.0.shared.watermark.wait(lsn, timeout)
    }

    /// Refuses records from now on, whatever the cause: what is in memory may differ from what is written.
    pub fn poison(&self, error: StoreError) -> StoreError {
        self.0.shared.poison(error)
    }

    /// Syncs what is written and releases the storage; records stay readable. Safe to repeat. In a process that
    /// inherited the log by a fork it does nothing.
    ///
    /// # Errors
    /// `Io` or `Poisoned` when records written are not durable.
    pub fn close(&self) -> Result<()> {
        self.0.close()
    }
}

impl Inner {
    fn new(shared: Arc<Shared>, snapshot: Position) -> Self {
        let (threads, snapshot) = (Mutex::default(), Mutex::new(snapshot));
        Self { shared, threads, snapshot, room: SnapshotRoom::default(), snapshotting: Mutex::default() }
    }

    fn spawn(&self, name: &str, run: fn(&Shared)) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&shared))?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        if self.shared.own_process().is_err() {
            // The other process goes on, and its threads are not here to be joined.
            return Ok(());
        }
        self.shared.refuse_records();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            // A thread's failures are in the state.
            let _ = thread.join();
        }
        let _no_snapshot = lock(&self.snapshotting);
        self.shared.release()
    }
}
