//! The end of the log: files are made, taken up after recovery, appended to and sealed here.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::{
    Location, Lsn,
    directory::{file_path, sync_dir},
    format::{FILE_HEADER, FRAME_HEADER, MARK, Stamp, align, encode, file_header},
    reader::LogFile,
    recovery::Scan,
};
use crate::error::{Result, StoreError};

/// Bytes by which a file grows beyond its preallocation, and in which recovery rewrites its tail.
const GROWTH: u64 = 1 << 20;

/// Gives `file` room from `from` to `to`, on disk where the file system can, else by its length alone.
fn allocate(file: &File, from: u64, to: u64) -> io::Result<()> {
    if to <= from {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), from, to - from) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(to),
        Err(e) => Err(e.into()),
    }
}

/// The end of the log; the one who holds its lock appends.
pub(super) struct Writer {
    pub(super) log_file: Arc<LogFile>,
    /// None in memory.
    pub(super) file: Option<Arc<File>>,
    /// Where the snapshot ends.
    data_start: u64,
    /// Where the next frame goes.
    tail: u64,
    allocated: u64,
    /// LSN that the next frame gets.
    pub(super) next: Lsn,
    /// The frame to write.
    pub(super) scratch: Vec<u8>,
}

impl Writer {
    /// File `number` in memory, as after its snapshot `first`, which nobody will read.
    pub(super) fn in_memory(number: u32, first: Lsn) -> Self {
        let (log_file, start) = (Arc::new(LogFile::memory(number)), FILE_HEADER);
        let next = first + 1;
        Self { log_file, file: None, data_start: start, tail: start, allocated: 0, next, scratch: Vec::new() }
    }

    /// Makes file `number` with `snapshot` (an encoded frame) durable and ready for the frame after it.
    pub(super) fn create(dir: &Path, number: u32, first: Lsn, snapshot: &[u8], file_bytes: u64) -> Result<Self> {
        let path = file_path(dir, number);
        let data_start = FILE_HEADER + snapshot.len() as u64;
        let allocated = align(data_start.saturating_add(file_bytes)).saturating_add(FRAME_HEADER);
        let build = || -> io::Result<File> {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            allocate(&file, 0, allocated)?;
            file.write_all_at(&file_header(number, first), 0)?;
            file.write_all_at(snapshot, FILE_HEADER)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = Some(Arc::new(build().map_err(|e| StoreError::io(&path, e))?));
        sync_dir(dir)?;
        let log_file = Arc::new(LogFile::disk(number, path, data_start));
        let next = first + 1;
        let mut new = Self { log_file, file, data_start, tail: data_start, allocated, next, scratch: Vec::new() };
        new.mark()?;
        Ok(new)
    }

    /// Takes up a scanned file: its torn tail is zeroed, what nothing proves durable is written again (the page
    /// cache may call pages clean whose sync failed in an earlier process), and all of it is synced.
    pub(super) fn resume(path: PathBuf, number: u32, scan: &Scan, file_bytes: u64) -> Result<Self> {
        let build = || -> io::Result<(File, u64)> {
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            let len = file.metadata()?.len();
            copy_over(scan.unproven, scan.tail, |buffer, at| {
                file.read_exact_at(buffer, at)?;
                file.write_all_at(buffer, at)
            })?;
            copy_over(scan.tail, scan.dirty_end, |buffer, at| file.write_all_at(buffer, at))?;
            let wanted = align(scan.data_start.saturating_add(file_bytes)).max(scan.tail).saturating_add(FRAME_HEADER);
            allocate(&file, len, wanted)?;
            file.sync_all()?;
            Ok((file, len.max(wanted)))
        };
        let (file, allocated) = build().map_err(|e| StoreError::io(&path, e))?;
        let log_file = Arc::new(LogFile::disk(number, path, scan.tail));
        let (data_start, tail, next) = (scan.data_start, scan.tail, scan.next);
        let file = Some(Arc::new(file));
        let mut resumed = Self { log_file, file, data_start, tail, allocated, next, scratch: Vec::new() };
        resumed.mark()?;
        Ok(resumed)
    }

    /// Appends the frame that `encode` left in `scratch`.
    pub(super) fn write(&mut self) -> Result<Location> {
        let len = self.scratch.len() as u32;
        let end = self.tail + u64::from(len);
        if let Some(file) = &self.file {
            // Room for the mark too, so that writing one never needs space.
            let needed = end + FRAME_HEADER;
            let wanted = if needed > self.allocated { needed + GROWTH } else { self.allocated };
            allocate(file, self.allocated, wanted)
                .and_then(|()| file.write_all_at(&self.scratch, self.tail))
                .map_err(|e| StoreError::io(&self.log_file.path, e))?;
            self.allocated = wanted;
        } else {
            self.log_file.keep(self.tail, &self.scratch);
        }
        let location = Location { file: self.log_file.number, offset: self.tail, len };
        self.tail = end;
        self.next += 1;
        self.log_file.publish(end);
        self.scratch.clear();
        self.scratch.shrink_to(GROWTH as usize);
        Ok(location)
    }

    /// Seals this file and begins the next one with `snapshot` (an encoded frame).
    pub(super) fn next_file(&mut self, dir: &Path, number: u32, snapshot: &[u8], file_bytes: u64) -> Result<Self> {
        sync_file(self.file.as_deref(), &self.log_file)?;
        self.mark()?;
        let new = Self::create(dir, number, self.next, snapshot, file_bytes)?;
        // A mark of the new file's snapshot in the old one: opening never falls back behind a file that was whole.
        self.next += 1;
        self.mark()?;
        if let Some(old) = &self.file {
            old.set_len(self.tail + FRAME_HEADER).map_err(|e| StoreError::io(&self.log_file.path, e))?;
        }
        Ok(new)
    }

    /// Whether the file has its share: `file_bytes` of records, and no fewer than its snapshot.
    pub(super) fn is_full(&self, file_bytes: u64) -> bool {
        self.tail - self.data_start >= file_bytes.max(self.data_start)
    }

    /// Notes behind the last frame that all of them are durable; the next frame overwrites it.
    pub(super) fn mark(&mut self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let durable = self.next - 1;
        encode(&mut self.scratch, Stamp { lsn: durable, durable, kind: MARK }, &[], &[])?;
        file.write_all_at(&self.scratch, self.tail).map_err(|e| StoreError::io(&self.log_file.path, e))
    }
}

/// Makes what was written to `file` durable; None is in memory.
pub(super) fn sync_file(file: Option<&File>, log_file: &LogFile) -> Result<()> {
    file.map_or(Ok(()), File::sync_data).map_err(|e| StoreError::io(&log_file.path, e))
}

/// Calls `step` with a buffer, zeroed at first, for each piece of `from..to`.
fn copy_over(from: u64, to: u64, mut step: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; to.saturating_sub(from).min(GROWTH) as usize];
    let mut at = from;
    while at < to {
        let piece = (to - at).min(GROWTH) as usize;
        step(&mut buffer[..piece], at)?;
        at += piece as u64;
    }
    Ok(())
}
