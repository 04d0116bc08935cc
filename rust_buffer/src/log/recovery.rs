//! Opening what an earlier process left: the newest file is read, judged and taken up.

use std::{fs::File, path::Path, sync::Arc};

use memmap2::MmapRaw;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use super::{
    Location, Lsn,
    directory::{file_path, list_files, remove_file, sync_dir},
    format::{
        FILE_HEADER, FRAME_HEADER, MARK, SNAPSHOT, Stamp, encode_snapshot, parse, read_file_header, stamp, u32_at,
    },
    reader::{Frame, LogFile, Mapped, map_file},
    writer::Writer,
};
use crate::error::{Result, StoreError};

/// What opening found: the newest snapshot and every record after it.
pub struct Recovery {
    snapshot: Option<Frame>,
    map: Option<Arc<MmapRaw>>,
    frames: Vec<Location>,
}

impl Recovery {
    /// What there is to find in a new log.
    pub(super) fn nothing() -> Self {
        Self { snapshot: None, map: None, frames: Vec::new() }
    }

    /// The bytes given to the last `rotate`; empty for a log that has never rotated.
    pub fn snapshot(&self) -> &[u8] {
        self.snapshot.as_ref().and_then(|frame| frame.array(0)).unwrap_or_default()
    }

    /// Every record after the snapshot, in order, its checksum already checked.
    pub fn frames(&self) -> impl Iterator<Item = Frame> + '_ {
        self.map.iter().flat_map(|map| self.frames.iter().map(|&location| Frame::mapped(map, location)))
    }
}

/// Takes up the log in `dir`, which is locked; a missing one is created. Returns its writer and its sealed files too.
pub(super) fn recover(dir: &Path, file_bytes: u64) -> Result<(Writer, Vec<LogFile>, Recovery)> {
    let mut files = list_files(dir)?;
    let mut torn = None;
    let (writer, recovery) = loop {
        let Some((number, _)) = files.pop_last() else {
            if let Some(torn @ 2..) = torn {
                let detail = "its snapshot was never completed and the file before it is missing";
                return Err(StoreError::corrupt(file_path(dir, torn), 0, detail));
            }
            remove_torn(dir, torn)?;
            break (Writer::create(dir, 1, 1, &encode_snapshot(1, &[])?, file_bytes)?, Recovery::nothing());
        };
        let path = file_path(dir, number);
        match (scan(&path, number)?, torn) {
            (Some(scan), _) => {
                remove_torn(dir, torn)?;
                break (Writer::resume(path, number, &scan, file_bytes)?, scan.recovery);
            }
            (None, None) => torn = Some(number),
            (None, Some(_)) => return Err(StoreError::corrupt(path, 0, "the sealed file has no whole snapshot")),
        }
    };
    let sealed = files.into_iter().map(|(n, len)| LogFile::disk(n, file_path(dir, n), len)).collect();
    Ok((writer, sealed, recovery))
}

fn remove_torn(dir: &Path, torn: Option<u32>) -> Result<()> {
    let Some(number) = torn else { return Ok(()) };
    remove_file(&file_path(dir, number))?;
    sync_dir(dir)
}

/// What a scan of the newest file found.
pub(super) struct Scan {
    recovery: Recovery,
    /// LSN that the next frame gets.
    pub(super) next: Lsn,
    /// Where the snapshot ends.
    pub(super) data_start: u64,
    /// Where the next frame goes.
    pub(super) tail: u64,
    /// End of the last byte that is not zero: the torn tail is `tail..dirty_end`.
    pub(super) dirty_end: u64,
    /// Where the first frame starts that nothing proves durable.
    pub(super) unproven: u64,
}

/// Reads file `number`; None when its creation was torn: no whole snapshot and no sign that it was ever used.
fn scan(path: &Path, number: u32) -> Result<Option<Scan>> {
    let file = File::open(path).map_err(|e| StoreError::io(path, e))?;
    let len = file.metadata().map_err(|e| StoreError::io(path, e))?.len();
    if len < FILE_HEADER + FRAME_HEADER {
        return Ok(None);
    }
    let map = map_file(&file, path)?;
    let whole = Mapped::whole(&map);
    let image = Image { path, number, bytes: whole.bytes(), data_end: data_end(&file, len) };
    let Some((snapshot_len, head)) = image.snapshot()? else { return Ok(None) };
    let first = head.lsn;
    let data_start = FILE_HEADER + snapshot_len as u64;
    let location = Location { file: number, offset: FILE_HEADER, len: snapshot_len as u32 };
    let snapshot = Some(Frame::mapped(&map, location));
    let (frames, proven) = image.replay(data_start, head)?;
    let tail = frames.last().map_or(data_start, |last| last.offset + u64::from(last.len));
    let next = first + 1 + frames.len() as u64;
    let dirty_end = image.dirty_end(tail);
    let unproven = match proven.checked_sub(first) {
        None => 0,
        Some(durable) => frames.get(durable as usize).map_or(tail, |location| location.offset),
    };
    let recovery = Recovery { snapshot, map: Some(map), frames };
    Ok(Some(Scan { recovery, next, data_start, tail, dirty_end, unproven }))
}

/// A log file before recovery: nothing in it is trusted.
struct Image<'a> {
    path: &'a Path,
    number: u32,
    bytes: &'a [u8],
    data_end: usize,
}

impl Image<'_> {
    /// Length and stamp of the snapshot; None when the file's creation was torn.
    fn snapshot(&self) -> Result<Option<(usize, Stamp)>> {
        let Some(first) = read_file_header(self.path, self.bytes, self.number)? else {
            self.refuse_if_used(0, 1, "the file's header is not readable")?;
            return Ok(None);
        };
        let (len, head) = match parse(&self.bytes[FILE_HEADER as usize..]) {
            Ok(found) => found,
            Err(detail) => {
                self.refuse_if_used(FILE_HEADER, first, detail)?;
                return Ok(None);
            }
        };
        if head.kind != SNAPSHOT || head.lsn != first {
            let detail = format!("the first record is not the snapshot {first}");
            return Err(StoreError::corrupt(self.path, FILE_HEADER, detail));
        }
        Ok(Some((len, head)))
    }

    /// Walks the frames after the snapshot up to the tail; returns them and the highest LSN proven durable.
    fn replay(&self, start: u64, head: Stamp) -> Result<(Vec<Location>, Lsn)> {
        let (mut at, mut next, mut proven) = (start, head.lsn + 1, head.durable);
        let mut frames = Vec::new();
        loop {
            let (len, found) = match parse(&self.bytes[at as usize..]) {
                Ok(found) => found,
                Err(detail) => {
                    self.refuse_if_used(at, next, detail)?;
                    return Ok((frames, proven));
                }
            };
            if found.kind == MARK && found.lsn + 1 == next && found.durable == found.lsn {
                self.refuse_if_used(at, next, "a mark stands in place of the record")?;
                return Ok((frames, found.lsn));
            }
            if found.kind == MARK && found.durable >= next {
                let detail = format!("LSN {} was durable, but LSN {next} is not here", found.durable);
                return Err(StoreError::corrupt(self.path, at, detail));
            }
            if found.kind == MARK || found.kind == SNAPSHOT || found.lsn != next || found.durable >= next {
                let detail = format!("found LSN {} of kind {} where LSN {next} belongs", found.lsn, found.kind);
                return Err(StoreError::corrupt(self.path, at, detail));
            }
            frames.push(Location { file: self.number, offset: at, len: len as u32 });
            proven = proven.max(found.durable);
            at += len as u64;
            next += 1;
        }
    }

    /// Fails if anything behind the unreadable record `lsn` at `at` says that the record was durable.
    fn refuse_if_used(&self, at: u64, lsn: Lsn, detail: &str) -> Result<()> {
        // Hostile bytes could look like a frame everywhere; each look costs a CRC, so the total is bounded.
        let mut budget = 4 * self.bytes.len() as u64;
        for later in (at as usize + 8..self.data_end).step_by(8) {
            let rest = &self.bytes[later..];
            if rest.len() < FRAME_HEADER as usize {
                break;
            }
            let len = u64::from(u32_at(rest, 0));
            if len == 0 {
                continue;
            }
            let found = stamp(rest);
            let sane = len <= rest.len() as u64 && rest[26..28] == [0, 0] && found.kind != SNAPSHOT;
            if !sane || found.durable < lsn || found.durable > found.lsn {
                continue;
            }
            let spent = budget < len;
            budget = budget.saturating_sub(len);
            if spent || parse(rest).is_ok() {
                let detail = format!("{detail}, but LSN {lsn} was durable according to the record at byte {later}");
                return Err(StoreError::corrupt(self.path, at, detail));
            }
        }
        Ok(())
    }

    /// End of the last byte at or after `from` that is not zero.
    fn dirty_end(&self, from: u64) -> u64 {
        let tail = self.bytes.get(from as usize..self.data_end).unwrap_or_default();
        from + tail.iter().rposition(|&byte| byte != 0).map_or(0, |last| last as u64 + 1)
    }
}

/// Where the last data of `file` ends: behind it are only blocks that were never written, which read as zeros.
fn data_end(file: &File, len: u64) -> usize {
    let (mut at, mut end) = (0, 0);
    loop {
        match seek(file, SeekFrom::Data(at)).and_then(|start| seek(file, SeekFrom::Hole(start))) {
            Ok(hole) if hole > at => (at, end) = (hole, hole),
            Err(Errno::NXIO) => return end as usize,
            _ => return len as usize,
        }
    }
}
