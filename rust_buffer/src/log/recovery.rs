//! Opening what an earlier process left: the snapshot, and every record after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Location, Lsn, Position,
    directory::{file_name, list, remove},
    format::{
        FILE_HEADER, FRAME_HEADER, Head, MARK, SNAPSHOT, checksummed, narrays, parse, parse_head, read_file_header,
        stamp, u32_at,
    },
    reader::{Frame, LogFile},
    snapshot::read_snapshot,
    storage::{Bytes, Medium, Storage},
    writer::{Tail, Writer},
};
use crate::error::{Result, StoreError};

/// Bytes read for checksums behind a torn record, in lengths of the file: hostile bytes could look like a record at every
/// place, and each look may cost the whole file. Honest ones stay far below.
const MOST_READ: u64 = 64;

/// Takes in what opening finds: first the snapshot, if there is one, then each record after it. An error is the
/// reason why the bytes make no sense.
pub trait Replay {
    /// The bytes given to the last `write_snapshot`, or the first part of them.
    ///
    /// # Errors
    /// They make no sense.
    fn snapshot(&mut self, bytes: &[u8]) -> std::result::Result<(), String>;

    /// The next part.
    ///
    /// # Errors
    /// They make no sense, or nothing here is in parts.
    fn snapshot_part(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        Err(format!("it has a part of {} bytes that nothing here can read", bytes.len()))
    }

    /// What a record of this kind is, if nothing here can read it: a newer program wrote it.
    fn unknown(&self, kind: u8) -> Option<String> {
        let _ = kind;
        None
    }

    /// The next record; its arrays are checked when they are read.
    ///
    /// # Errors
    /// It makes no sense.
    fn record(&mut self, frame: &Frame) -> std::result::Result<(), String>;
}

/// What opening found.
pub(super) struct Found {
    /// Files before the last one.
    pub(super) sealed: BTreeMap<u32, Arc<LogFile>>,
    /// The last one; None when there is no file.
    pub(super) last: Option<(u32, Tail)>,
    /// Where the snapshot stands.
    pub(super) snapshot: Position,
}

/// Reads the log in `storage`: nothing is changed but the remains of a file's torn creation, and these only if `repair`.
pub(super) fn recover(storage: &dyn Storage, replay: &mut dyn Replay, repair: bool) -> Result<Found> {
    let (mut numbers, has_snapshot) = list(storage)?;
    let mut snapshot = Position { file: 1, offset: FILE_HEADER, next: 1 };
    if has_snapshot {
        snapshot = read_snapshot(storage, replay)?;
    }
    refuse_gaps(storage, &numbers, snapshot.file, has_snapshot)?;
    let Some(last) = take_last(storage, &mut numbers, has_snapshot.then_some(snapshot.file), repair)? else {
        return Ok(Found { sealed: BTreeMap::new(), last: None, snapshot });
    };
    let mut sealed = BTreeMap::new();
    let mut at = snapshot;
    for number in numbers.into_iter().filter(|number| *number < last.number) {
        let file = LogFile::new(number, storage.path_of(&file_name(number)), open(storage, number)?, u64::MAX, true);
        if number >= snapshot.file {
            let image = Image::of(storage, number)?.ok_or_else(|| missing_header(&file.path))?;
            at = image.replay_sealed(at, image_first(storage, number + 1, &last)?, replay)?;
        }
        let end = file.medium.len().map_err(|e| StoreError::io(&file.path, e))?;
        if !repair {
            // Mapped now: the writer may delete it while it is still read here.
            file.medium.read(0, 1).map_err(|e| StoreError::io(&file.path, e))?;
        }
        file.publish(end);
        sealed.insert(number, Arc::new(file));
    }
    if at.file == last.number && at.offset > last.bytes.len() as u64 {
        let detail = format!("the file ends before LSN {}, which the snapshot calls durable", at.next - 1);
        return Err(StoreError::corrupt(&last.path, last.bytes.len() as u64, detail));
    }
    let tail = last.replay_last(at, replay)?;
    Ok(Found { sealed, last: Some((last.number, tail)), snapshot })
}

/// Takes up the last file, or makes the first.
pub(super) fn resume(storage: &dyn Storage, found: &Found, file_bytes: u64) -> Result<Writer> {
    match &found.last {
        Some((number, tail)) => Writer::resume(storage, *number, tail, file_bytes),
        None => Writer::create(storage, 1, 1, file_bytes),
    }
}

fn open(storage: &dyn Storage, number: u32) -> Result<Arc<dyn Medium>> {
    let name = file_name(number);
    storage.open(&name, false).map_err(|e| StoreError::io(storage.path_of(&name), e))
}

fn missing_header(path: &Path) -> StoreError {
    StoreError::corrupt(path, 0, "the file's header is not readable, and later files are there")
}

/// First LSN of file `number`.
fn image_first(storage: &dyn Storage, number: u32, last: &Image) -> Result<Lsn> {
    if number == last.number {
        return Ok(last.first);
    }
    Image::of(storage, number)?
        .map(|image| image.first)
        .ok_or_else(|| missing_header(&storage.path_of(&file_name(number))))
}

/// From file `first` on no file may be missing.
fn refuse_gaps(storage: &dyn Storage, numbers: &BTreeSet<u32>, first: u32, has_snapshot: bool) -> Result<()> {
    let mut expected = first;
    for &number in numbers.range(first..) {
        if number != expected {
            break;
        }
        expected = number.saturating_add(1);
    }
    let complete = numbers.range(expected..).next().is_none() && (expected > first || !has_snapshot);
    if complete {
        return Ok(());
    }
    let detail = if has_snapshot { "the file is missing" } else { "the file or the snapshot (`index`) is missing" };
    Err(StoreError::corrupt(storage.path_of(&file_name(expected)), 0, detail))
}

/// The last file whose creation was not torn. Nothing was ever acknowledged in a torn one.
fn take_last(
    storage: &dyn Storage, numbers: &mut BTreeSet<u32>, snapshot_file: Option<u32>, repair: bool,
) -> Result<Option<Image>> {
    // Without the lock a writer may be at work in it.
    let image = |number| if repair { Image::of(storage, number) } else { Image::live(storage, number) };
    while let Some(&number) = numbers.last() {
        if let Some(found) = image(number)? {
            return Ok(Some(found));
        }
        if snapshot_file.is_some_and(|file| number <= file) {
            let detail = "the file's header is not readable, but the snapshot names records in it";
            return Err(StoreError::corrupt(storage.path_of(&file_name(number)), 0, detail));
        }
        if repair {
            remove(storage, number)?;
            storage.sync_names().map_err(|e| StoreError::io(storage.path(), e))?;
        }
        numbers.remove(&number);
    }
    Ok(None)
}

/// A log file before recovery: nothing in it is trusted.
struct Image {
    path: PathBuf,
    number: u32,
    first: Lsn,
    /// Up to where it was ever written.
    bytes: Bytes,
}

impl Image {
    /// File `number`; None when its creation was torn: no whole header and no sign that it was ever used.
    fn of(storage: &dyn Storage, number: u32) -> Result<Option<Self>> {
        Self::read(storage, number, |medium| medium.read(0, medium.data_end()? as usize))
    }

    /// The same of a file that may be written, and cut when it is sealed: all that it takes is copied.
    fn live(storage: &dyn Storage, number: u32) -> Result<Option<Self>> {
        Self::read(storage, number, |medium| medium.copy(medium.data_end()?).map(Some))
    }

    fn read(
        storage: &dyn Storage, number: u32, bytes: impl FnOnce(&dyn Medium) -> std::io::Result<Option<Bytes>>,
    ) -> Result<Option<Self>> {
        let (path, medium) = (storage.path_of(&file_name(number)), open(storage, number)?);
        let bytes = match medium.is_empty() {
            Ok(true) => return Ok(None),
            Ok(false) => bytes(&*medium),
            Err(e) => Err(e),
        };
        let Some(bytes) = bytes.map_err(|e| StoreError::io(&path, e))? else { return Ok(None) };
        let first = read_file_header(&path, &bytes, number)?;
        if first == Some(0) {
            // Of what was written to it nothing was ever synced: that would have brought the header's LSN to the disk.
            return Ok(None);
        }
        let image = Self { path, number, first: first.unwrap_or(0), bytes };
        if first.is_some() {
            return Ok(Some(image));
        }
        // Its first LSN is not known; but preallocated zeros are all that a torn creation leaves.
        image.refuse_if_used(0, 8, 1, |_| Lsn::MAX, "the file's header is not readable").map(|()| None)
    }

    fn corrupt(&self, at: u64, detail: impl Into<String>) -> StoreError {
        StoreError::corrupt(&self.path, at, detail)
    }

    /// Where replay of this file begins.
    fn start(&self, at: Position) -> Result<Position> {
        if at.file == self.number {
            return Ok(at);
        }
        if self.first == at.next {
            return Ok(Position { file: self.number, offset: FILE_HEADER, next: at.next });
        }
        Err(self.corrupt(24, format!("the first LSN is {}, {} belongs here", self.first, at.next)))
    }

    fn take(&self, at: Position, head: &Head, replay: &mut dyn Replay) -> Result<Position> {
        let (found, len) = (head.stamp, head.len as u32);
        if found.kind == MARK || found.kind == SNAPSHOT || found.lsn != at.next || found.durable >= at.next {
            let detail = format!("found LSN {} of kind {} where LSN {} belongs", found.lsn, found.kind, at.next);
            return Err(self.corrupt(at.offset, detail));
        }
        let location = Location { file: self.number, offset: at.offset, len };
        let frame = Frame::new(self.bytes.slice(at.offset as usize, head.len), location);
        if let Some(detail) = replay.unknown(found.kind) {
            return Err(StoreError::Newer { path: self.path.clone(), offset: at.offset, detail });
        }
        replay.record(&frame).map_err(|detail| {
            self.corrupt(at.offset, format!("record {} does not fit what is before it: {detail}", at.next))
        })?;
        Ok(Position { offset: at.offset + u64::from(len), next: at.next + 1, ..at })
    }

    /// Walks a file before the last one up to record `end`: all of it was synced before the next file was made, so
    /// whatever is unreadable is damage. Arrays are checked when they are read.
    fn replay_sealed(&self, at: Position, end: Lsn, replay: &mut dyn Replay) -> Result<Position> {
        let mut at = self.start(at)?;
        while at.next < end {
            let rest = self.bytes.get(at.offset as usize..).unwrap_or_default();
            let head = parse_head(rest).and_then(|head| {
                if head.len <= rest.len() { Ok(head) } else { Err("the file ends within the record") }
            });
            let head =
                head.map_err(|detail| self.corrupt(at.offset, format!("{detail}, and a later file is there")))?;
            at = self.take(at, &head, replay)?;
        }
        Ok(at)
    }

    /// Walks the last file up to its tail.
    fn replay_last(&self, at: Position, replay: &mut dyn Replay) -> Result<Tail> {
        let mut at = self.start(at)?;
        // The file's creation and what the snapshot names were durable.
        let (start, mut proven, mut offsets) = (at.next, at.next - 1, Vec::new());
        let end = loop {
            match parse(self.bytes.get(at.offset as usize..).unwrap_or_default()) {
                Ok(head) if head.stamp.kind == MARK && head.stamp.lsn == at.next - 1 => {
                    proven = proven.max(head.stamp.lsn);
                    break "a mark stands in place of the record";
                }
                Ok(head) if head.stamp.kind == MARK && head.stamp.durable >= at.next => {
                    let detail = format!("LSN {} was durable, but LSN {} is not here", head.stamp.durable, at.next);
                    return Err(self.corrupt(at.offset, detail));
                }
                Ok(head) => {
                    proven = proven.max(head.stamp.durable);
                    offsets.push(at.offset);
                    at = self.take(at, &head, replay)?;
                }
                Err(detail) => break detail,
            }
        };
        // LSNs are dense, so between the unreadable record and a later one lies a frame for each LSN between theirs.
        let newest = |later| at.next + (later - at.offset) / FRAME_HEADER;
        self.refuse_if_used(at.offset, self.payload_end(at), at.next, newest, end)?;
        let unproven = offsets.get((proven + 1 - start) as usize).copied().unwrap_or(at.offset);
        Ok(Tail { next: at.next, end: at.offset, written: self.bytes.len() as u64, unproven })
    }

    /// Where something else than the unreadable record at `at` can begin: behind its payload, if its head is whole.
    fn payload_end(&self, at: Position) -> u64 {
        let head = parse_head(self.bytes.get(at.offset as usize..).unwrap_or_default()).ok();
        let head = head.filter(|head| head.stamp.lsn == at.next && head.stamp.kind != MARK);
        at.offset + head.map_or(8, |head| head.len as u64)
    }

    /// Fails if anything from `from` on says that the unreadable record `lsn` at `at`, before it, was durable. What lies
    /// there may be the record's own payload, any numbers at all: `newest` is the highest LSN that a frame at a place can
    /// have.
    fn refuse_if_used(&self, at: u64, from: u64, lsn: Lsn, newest: impl Fn(u64) -> Lsn, detail: &str) -> Result<()> {
        let mut left = MOST_READ * self.bytes.len() as u64;
        for later in (from as usize..self.bytes.len()).step_by(8) {
            let rest = &self.bytes[later..];
            if rest.len() < FRAME_HEADER as usize {
                break;
            }
            let (len, found) = (u32_at(rest, 0) as usize, stamp(rest));
            let sane = len >= FRAME_HEADER as usize && len <= rest.len() && rest[25] == 0 && found.kind != SNAPSHOT;
            if !sane || found.durable < lsn || found.durable > found.lsn || found.lsn > newest(later as u64) {
                continue;
            }
            let read = 8 * narrays(rest) as u64 + checksummed(rest).unwrap_or(0);
            if read > left {
                let detail =
                    format!("{detail}, and whether LSN {lsn} was durable cannot be told from what is behind it");
                return Err(self.corrupt(at, detail));
            }
            left -= read;
            if parse_head(rest).is_ok() {
                let detail = format!("{detail}, but LSN {lsn} was durable according to the record at byte {later}");
                return Err(self.corrupt(at, detail));
            }
        }
        Ok(())
    }
}
