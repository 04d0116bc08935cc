//! The append-only log: everything the store knows is in it, and what it once called durable never changes silently.
//!
//! # Invariants
//! 1. LSNs are dense: each frame has the LSN of the frame before it plus one, across files; the CRC covers it.
//! 2. `durable_lsn` moves only after an fdatasync that began after the frames were written (level `Os`: after the
//!    write). A failed write or sync poisons the log: nothing is retried and nothing later is reported durable.
//! 3. Every file begins with a snapshot frame that was durable before the file's second frame was written, so opening
//!    reads only the newest file. Sealed files are immutable and deleted whole, oldest first, never recycled.
//! 4. Each frame carries the durable LSN of the moment it was written, and each completed sync of an otherwise idle
//!    log leaves a *mark* (the same LSN, no payload) where the next frame will go. At recovery the first unreadable
//!    frame is a torn tail if no later frame or mark says that it was durable, and is zeroed durably; otherwise
//!    bytes that were acknowledged are gone, and opening fails with file and offset. Power loss may lose any subset
//!    of unsynced pages, so a later frame that is whole is by itself no evidence of damage.
//! 5. Bytes below a file's published end are never written again, so maps of them are immutable; each [`Frame`] pins
//!    its map, also beyond the deletion of the file.
//!
//! # Format (little endian, everything 8-byte aligned)
//! File `NNNNNNNNNN.log`: `magic [u8; 8] | format u32 | crc32c u32 | number u32 | 0 u32 | first lsn u64`, frames,
//! zeros. Frame: `len u32 | crc32c u32 | lsn u64 | durable lsn u64 | kind u8 | narrays u8 | 0 u16 | header_len u32 |
//! array lengths [u32] | header | arrays`, each part padded with zeros to 8 bytes; `len` counts the whole frame and the
//! CRC covers all but itself. Kind 0 is a snapshot, 255 a mark, the rest is the caller's. The file header's layout and
//! the place of the format number stay the same in every later format.

mod directory;
mod format;
mod reader;
mod recovery;
mod sync;
mod writer;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::{
    directory::{file_path, lock_dir, remove_file},
    format::{MARK, SNAPSHOT},
    recovery::recover,
    sync::Shared,
    writer::Writer,
};
pub use self::{reader::Frame, recovery::Recovery};
use crate::error::{Result, StoreError};

/// Log sequence number: 1 is the first snapshot of a new log.
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

/// When a record counts as durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When the operating system has it: survives the death of the process, not the loss of power.
    Os,
    /// After the next group commit of the sync thread.
    #[default]
    Group,
    /// Before `append` returns.
    Always,
}

/// How a log is kept.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// When a record counts as durable.
    pub durability: Durability,
    /// Bytes of records after which a file should be rotated, and that are preallocated.
    pub file_bytes: u64,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { durability: Durability::Group, file_bytes: 64 << 20 }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The log. Clones share it; it closes with its last clone.
#[derive(Clone)]
pub struct Log(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Whoever wants to know calls `close` first.
        let _ = self.close();
    }
}

impl Log {
    /// Opens or creates the log in directory `dir`; None keeps it in memory.
    ///
    /// # Errors
    /// `Locked` by another writer, `Version` of a newer format, `Corrupt` for damage to what was durable, `Io`.
    pub fn open(dir: Option<&Path>, options: LogOptions) -> Result<(Self, Recovery)> {
        let Some(dir) = dir else {
            let shared = Shared::new(None, options, Writer::in_memory(1, 1), Vec::new(), None);
            return Ok((Self::start(shared)?, Recovery::nothing()));
        };
        let guard = lock_dir(dir)?;
        let (writer, sealed, recovery) = recover(dir, options.file_bytes)?;
        Ok((Self::start(Shared::new(Some(dir), options, writer, sealed, Some(guard)))?, recovery))
    }

    fn start(shared: Shared) -> Result<Self> {
        let shared = Arc::new(shared);
        let thread = match (&shared.dir, shared.options.durability) {
            (Some(dir), Durability::Group) => {
                let shared = Arc::clone(&shared);
                let spawned = std::thread::Builder::new().name("log-sync".into()).spawn(move || shared.run());
                Some(spawned.map_err(|e| StoreError::io(dir, e))?)
            }
            _ => None,
        };
        Ok(Self(Arc::new(Inner { shared, thread: Mutex::new(thread) })))
    }

    /// Appends one record: `header` and `arrays` are the caller's, `kind` is 1 to 254. Level `Always` waits for the
    /// disk; otherwise `wait_durable` does.
    ///
    /// # Errors
    /// `Closed`, `Poisoned` by an earlier failure, `Io` (which poisons), `Full` beyond 4 GiB or 255 arrays.
    pub fn append(&self, kind: u8, header: &[u8], arrays: &[&[u8]]) -> Result<(Lsn, Location)> {
        if kind == SNAPSHOT || kind == MARK {
            return Err(StoreError::Conflict(format!("record kind {kind} is the log's own; use 1 to 254")));
        }
        self.0.shared.append(kind, header, arrays)
    }

    /// Whether the current file has its share: `file_bytes` of records, and no fewer than its snapshot.
    pub fn should_rotate(&self) -> bool {
        let shared = &self.0.shared;
        lock(&shared.writer).is_full(shared.options.file_bytes)
    }

    /// Seals the current file and begins a new one with `snapshot`, durably; recovery starts there. Takes one LSN.
    ///
    /// # Errors
    /// As `append`. A failure while the files change hands poisons the log.
    pub fn rotate(&self, snapshot: &[u8]) -> Result<()> {
        self.0.shared.rotate(snapshot)
    }

    /// The record at `location`, its checksum checked now.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are damaged or gone, `Io`.
    pub fn frame(&self, location: Location) -> Result<Frame> {
        let shared = &self.0.shared;
        let file = lock(&shared.files).get(&location.file).cloned().ok_or_else(|| {
            let path = file_path(shared.dir.as_deref().unwrap_or(Path::new("memory")), location.file);
            StoreError::corrupt(path, location.offset, "the file is gone, a record in it is wanted")
        })?;
        file.frame(location)
    }

    /// LSN of the last record written.
    pub fn lsn(&self) -> Lsn {
        lock(&self.0.shared.state).written
    }

    /// LSN of the last record that is durable, with all before it.
    pub fn durable_lsn(&self) -> Lsn {
        lock(&self.0.shared.state).durable
    }

    /// Waits until record `lsn` and all before it are durable; false when `timeout` passed first.
    ///
    /// # Errors
    /// `Poisoned` when they will never be, `Conflict` when `lsn` is not yet written.
    pub fn wait_durable(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        self.0.shared.wait_durable(lsn, timeout)
    }

    /// Deletes the sealed files numbered below `file`, oldest first, after syncing the records that say why; returns
    /// how many. The caller keeps every file that holds live data; frames already read stay readable.
    ///
    /// # Errors
    /// As `append`.
    pub fn remove_before(&self, file: u32) -> Result<usize> {
        let shared = &self.0.shared;
        shared.accepting()?;
        let end = file.min(self.current_file());
        let doomed: Vec<_> = lock(&shared.files).range(..end).map(|(&number, _)| number).collect();
        if !doomed.is_empty() && shared.dir.is_some() {
            shared.sync()?;
        }
        for &number in &doomed {
            if let Some(dir) = &shared.dir {
                remove_file(&file_path(dir, number))?;
            }
            lock(&shared.files).remove(&number);
        }
        Ok(doomed.len())
    }

    /// Number of the file that takes records.
    pub fn current_file(&self) -> u32 {
        lock(&self.0.shared.state).log_file.number
    }

    /// Bytes of all files, without what is preallocated.
    pub fn bytes(&self) -> u64 {
        lock(&self.0.shared.files).values().map(|file| file.end()).sum()
    }

    /// Syncs what is written and releases the directory; records stay readable. Safe to repeat.
    ///
    /// # Errors
    /// `Io` or `Poisoned` when records written are not durable.
    pub fn close(&self) -> Result<()> {
        self.0.close()
    }
}

impl Inner {
    fn close(&self) -> Result<()> {
        self.shared.refuse_records();
        if let Some(thread) = lock(&self.thread).take() {
            // The thread's failures are in the state.
            let _ = thread.join();
        }
        self.shared.release()
    }
}
