//! The end of the log: files are made, taken up after recovery, appended to and sealed here.

use std::{io, sync::Arc};

use super::{
    Location, Lsn,
    directory::file_name,
    format::{Arrays, FILE_HEADER, FRAME_HEADER, MARK, Stamp, align, encode, file_header, raised},
    reader::LogFile,
    storage::{Medium, Storage},
};
use crate::error::{Result, StoreError};

/// Bytes by which a file grows beyond its preallocation, and in which recovery rewrites its tail.
const GROWTH: u64 = 1 << 20;

/// The end of the log; the one who holds its lock appends.
pub(super) struct Writer {
    pub(super) file: Arc<LogFile>,
    /// Where the next frame goes.
    tail: u64,
    allocated: u64,
    /// LSN that the next frame gets.
    pub(super) next: Lsn,
    /// The head of the frame to write.
    head: Vec<u8>,
}

/// What of a scanned file is to be taken up.
pub(super) struct Tail {
    /// LSN that the next frame gets.
    pub(super) next: Lsn,
    /// Where the next frame goes.
    pub(super) end: u64,
    /// Up to where the file was ever written: the torn tail is before it, and what looks like zeros may be other
    /// bytes on the disk if an earlier process failed to sync them.
    pub(super) written: u64,
    /// Where the first frame starts that nothing proves durable.
    pub(super) unproven: u64,
}

fn room(file_bytes: u64) -> u64 {
    align(FILE_HEADER.saturating_add(file_bytes)).saturating_add(FRAME_HEADER)
}

impl Writer {
    /// Makes file `number`, durably and ready for record `first`.
    pub(super) fn create(storage: &dyn Storage, number: u32, first: Lsn, file_bytes: u64) -> Result<Self> {
        let (name, allocated) = (file_name(number), room(file_bytes));
        let build = || -> io::Result<Arc<dyn Medium>> {
            let medium = storage.create(&name)?;
            medium.allocate(0, allocated)?;
            medium.write(0, &[&file_header(number, first)])?;
            medium.sync()?;
            storage.sync_names()?;
            Ok(medium)
        };
        let path = storage.path_of(&name);
        let medium = build().map_err(|e| StoreError::io(&path, e))?;
        let file = Arc::new(LogFile::new(number, path, medium, FILE_HEADER));
        Ok(Self { file, tail: FILE_HEADER, allocated, next: first, head: Vec::new() })
    }

    /// Takes up a scanned file: its torn tail is zeroed, what nothing proves durable is written again (the page
    /// cache may call pages clean whose sync failed in an earlier process), and all of it is synced.
    pub(super) fn resume(storage: &dyn Storage, number: u32, found: &Tail, file_bytes: u64) -> Result<Self> {
        let name = file_name(number);
        let path = storage.path_of(&name);
        let build = || -> io::Result<(Arc<dyn Medium>, u64)> {
            let medium = storage.open(&name, true)?;
            let len = medium.len()?;
            for (at, len) in pieces(found.unproven, found.end) {
                let bytes = medium.read(at, len)?.ok_or(io::ErrorKind::UnexpectedEof)?.to_vec();
                medium.write(at, &[&bytes])?;
            }
            let zeros = vec![0; found.written.saturating_sub(found.end).min(GROWTH) as usize];
            for (at, len) in pieces(found.end, found.written) {
                medium.write(at, &[&zeros[..len]])?;
            }
            let wanted = room(file_bytes).max(found.end + FRAME_HEADER);
            medium.allocate(len, wanted)?;
            if let Some(header) = medium.read(0, FILE_HEADER as usize)?.and_then(|header| raised(&header)) {
                // One sector, so old or new: an earlier program is not to read what follows.
                medium.write(0, &[&header])?;
            }
            medium.sync()?;
            // An earlier process may have died before it did: between them the names of this file and of the snapshot.
            storage.sync_names()?;
            Ok((medium, len.max(wanted)))
        };
        let (medium, allocated) = build().map_err(|e| StoreError::io(&path, e))?;
        let file = Arc::new(LogFile::new(number, path, medium, found.end));
        let mut resumed = Self { file, tail: found.end, allocated, next: found.next, head: Vec::new() };
        resumed.mark()?;
        Ok(resumed)
    }

    /// The end of a scanned file for readers.
    pub(super) fn read_only(storage: &dyn Storage, number: u32, found: &Tail) -> Result<Self> {
        let name = file_name(number);
        let path = storage.path_of(&name);
        let open = || {
            let medium = storage.open(&name, false)?;
            // Mapped now, as the sealed ones are.
            medium.read(0, 1).map(|_| medium)
        };
        let medium = open().map_err(|e| StoreError::io(&path, e))?;
        let file = Arc::new(LogFile::new(number, path, medium, found.end));
        Ok(Self { file, tail: found.end, allocated: found.end, next: found.next, head: Vec::new() })
    }

    /// Appends a frame; `synced` is the newest LSN known to be on disk.
    pub(super) fn write(&mut self, kind: u8, synced: Lsn, header: &[u8], arrays: &Arrays<'_>) -> Result<Location> {
        let len = encode(&mut self.head, Stamp { lsn: self.next, durable: synced, kind }, header, arrays)?;
        let end = self.tail + u64::from(len);
        // Room for the mark too, so that writing one never needs space.
        let needed = end + FRAME_HEADER;
        let wanted = if needed > self.allocated { needed + GROWTH } else { self.allocated };
        let mut parts = vec![&self.head[..]];
        parts.extend_from_slice(arrays.bytes());
        let medium = &self.file.medium;
        medium
            .allocate(self.allocated, wanted)
            .and_then(|()| medium.write(self.tail, &parts))
            .map_err(|e| StoreError::io(&self.file.path, e))?;
        let location = Location { file: self.file.number, offset: self.tail, len };
        (self.tail, self.allocated) = (end, wanted);
        self.next += 1;
        self.file.publish(end);
        Ok(location)
    }

    /// Seals this file and begins the next one.
    pub(super) fn next_file(&mut self, storage: &dyn Storage, number: u32, file_bytes: u64) -> Result<Self> {
        sync_file(&self.file)?;
        self.mark()?;
        let new = Self::create(storage, number, self.next, file_bytes)?;
        let cut = self.file.medium.truncate(self.tail + FRAME_HEADER);
        cut.map_err(|e| StoreError::io(&self.file.path, e)).map(|()| new)
    }

    /// Whether the file has its share of records.
    pub(super) fn is_full(&self, file_bytes: u64) -> bool {
        self.tail > FILE_HEADER && self.tail - FILE_HEADER >= file_bytes
    }

    /// Where the next frame goes.
    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    /// Notes behind the last frame that all of them are on disk; the next frame overwrites it.
    pub(super) fn mark(&mut self) -> Result<()> {
        let lsn = self.next - 1;
        encode(&mut self.head, Stamp { lsn, durable: lsn, kind: MARK }, &[], &Arrays::default())?;
        self.file.medium.write(self.tail, &[&self.head]).map_err(|e| StoreError::io(&self.file.path, e))
    }
}

/// Makes what was written to `file` durable.
pub(super) fn sync_file(file: &LogFile) -> Result<()> {
    file.medium.sync().map_err(|e| StoreError::io(&file.path, e))
}

/// `from..to` in pieces: (start, length).
fn pieces(from: u64, to: u64) -> impl Iterator<Item = (u64, usize)> {
    (from..to).step_by(GROWTH as usize).map(move |at| (at, (to - at).min(GROWTH) as usize))
}
