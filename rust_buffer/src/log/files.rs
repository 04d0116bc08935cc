//! The log's files as a whole: reading records by their places, what they hold, and their deletion.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Location, Log,
    directory::{file_name, remove},
    format, lock, reader,
    reader::Frame,
    storage::Bytes,
};
use crate::error::{Result, StoreError};

impl Log {
    /// The record at `location`, its checksums checked now.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are damaged or gone, `Io`.
    pub fn frame(&self, location: Location) -> Result<Frame> {
        self.file(location.file, location.offset)?.frame(location)
    }

    /// The record that starts at `offset` of file `file`, its checksums checked now.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are damaged or gone, `Io`.
    pub fn frame_at(&self, file: u32, offset: u64) -> Result<Frame> {
        let log_file = self.file(file, offset)?;
        let len = format::u32_at(&log_file.read(offset, 4)?, 0);
        log_file.frame(Location { file, offset, len })
    }

    /// `len` bytes of file `file` at `offset`, unchecked: an array whose CRC the caller knows.
    ///
    /// # Errors
    /// `Corrupt` when they are gone, `Io`.
    pub fn bytes_at(&self, file: u32, offset: u64, len: usize) -> Result<Bytes> {
        self.file(file, offset)?.read(offset, len)
    }

    /// Has the medium begin to read bytes that are wanted soon, where it can; a file that is gone needs none.
    pub fn will_need(&self, file: u32, from: u64, to: u64) {
        if let Ok(file) = self.file(file, from) {
            file.medium.will_need(from, to);
        }
    }

    /// Damage at `offset` of `file`.
    pub fn corrupt(&self, file: u32, offset: u64, detail: impl Into<String>) -> StoreError {
        StoreError::corrupt(self.0.shared.storage.path_of(&file_name(file)), offset, detail)
    }

    fn file(&self, number: u32, offset: u64) -> Result<Arc<reader::LogFile>> {
        let file = lock(&self.0.shared.files).get(&number).cloned();
        file.ok_or_else(|| self.corrupt(number, offset, "the file is gone, a record in it is wanted"))
    }

    /// Kind of the record that starts at `offset` of file `file`, unchecked.
    ///
    /// # Errors
    /// `Corrupt` when it is gone, `Io`.
    pub fn kind_at(&self, file: u32, offset: u64) -> Result<u8> {
        let head = self.file(file, offset)?.read(offset, format::FRAME_HEADER as usize)?;
        Ok(format::stamp(&head).kind)
    }

    /// Deletes the sealed files numbered below `file` and below the snapshot's position, oldest first; returns how
    /// many. The caller keeps every file that holds live data; what was read stays readable.
    ///
    /// # Errors
    /// As `append`.
    pub fn remove_before(&self, file: u32) -> Result<usize> {
        self.remove_files(|number| number < file)
    }

    /// Deletes those sealed files below the snapshot's position of which nothing is needed, likewise.
    ///
    /// # Errors
    /// As `append`.
    pub fn remove_files(&self, is_dead: impl Fn(u32) -> bool) -> Result<usize> {
        let shared = &self.0.shared;
        shared.own_process()?;
        // The storage is not released meanwhile.
        let _open = lock(&self.0.snapshotting);
        shared.accepting()?;
        let end = self.snapshot_position().file;
        let mut doomed: Vec<_> = lock(&shared.files).range(..end).map(|(&number, _)| number).collect();
        doomed.retain(|number| is_dead(*number));
        if !doomed.is_empty() {
            // The records that say why must be on disk first.
            shared.sync()?;
        }
        for &number in &doomed {
            remove(&*shared.storage, number)?;
            lock(&shared.files).remove(&number);
        }
        Ok(doomed.len())
    }

    /// Bytes of all files, without what is preallocated.
    pub fn bytes(&self) -> u64 {
        lock(&self.0.shared.files).values().map(|file| file.end()).sum()
    }

    /// Bytes of each sealed file.
    pub fn sealed(&self) -> BTreeMap<u32, u64> {
        let files = lock(&self.0.shared.files);
        let newest = files.keys().next_back().copied().unwrap_or(0);
        files.range(..newest).map(|(number, file)| (*number, file.end())).collect()
    }
}
