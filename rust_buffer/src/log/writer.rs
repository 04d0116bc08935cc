//! The end of the log: files are made, taken up after recovery, appended to and sealed here.

use std::{io, path::Path, sync::Arc};

use super::{
    Location, Lsn, Room,
    directory::{NEXT_NAME, file_name},
    format::{Arrays, FILE_HEADER, FRAME_HEADER, MARK, Stamp, align, encode, file_header, raised},
    reader::LogFile,
    storage::{Medium, Storage},
};
use crate::error::{Result, StoreError, is_no_space};

/// Bytes by which a file grows beyond its preallocation, and in which recovery rewrites its tail.
const GROWTH: u64 = 1 << 20;

/// The end of the log; the one who holds its lock appends.
pub(super) struct Writer {
    pub(super) file: Arc<LogFile>,
    /// Where the next frame goes.
    tail: u64,
    allocated: u64,
    /// Bytes behind the tail that records without arrays alone may take, the last half of them those that make room.
    reserve: u64,
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

/// Bytes of each file that records without arrays alone may take, so that what is trained is not held up by a full disk.
/// The last half is for those that lead to an eviction, and nothing else can use it up: a full disk can be emptied.
const MOST_RESERVED: u64 = 1 << 20;

fn reserve(file_bytes: u64) -> u64 {
    align(file_bytes.min(MOST_RESERVED))
}

fn room(file_bytes: u64) -> u64 {
    align(FILE_HEADER.saturating_add(file_bytes)).saturating_add(FRAME_HEADER + reserve(file_bytes))
}

/// A file without records: its header has no LSN yet, and whoever finds that at opening takes it for none.
pub(super) struct Prepared {
    pub(super) number: u32,
    allocated: u64,
}

impl Prepared {
    /// Makes the file that will have `number`; smaller than usual where the disk has no room for more.
    pub(super) fn make(storage: &dyn Storage, number: u32, file_bytes: u64) -> Result<Self> {
        let build = || -> io::Result<u64> {
            storage.remove(NEXT_NAME)?;
            let medium = storage.create(NEXT_NAME)?;
            let least = FILE_HEADER + FRAME_HEADER + reserve(file_bytes);
            let allocated = match medium.allocate(0, room(file_bytes)) {
                Err(e) if is_no_space(&e) => medium.allocate(0, least).map(|()| least)?,
                allocated => allocated.map(|()| room(file_bytes))?,
            };
            medium.write(0, &[&file_header(number, 0)])?;
            medium.sync()?;
            Ok(allocated)
        };
        let path = storage.path_of(NEXT_NAME);
        let allocated = build().map_err(|e| {
            let full = is_no_space(&e);
            if full && storage.remove(NEXT_NAME).is_ok() {
                no_space(&path, room(file_bytes))
            } else {
                StoreError::io(&path, e)
            }
        })?;
        Ok(Self { number, allocated })
    }

    /// Gives it its name, for record `first`. Name and header are durable with the first sync.
    fn begin(self, storage: &dyn Storage, first: Lsn, file_bytes: u64) -> Result<Writer> {
        let name = file_name(self.number);
        let path = storage.path_of(&name);
        let build = || -> io::Result<Arc<dyn Medium>> {
            storage.rename(NEXT_NAME, &name)?;
            let medium = storage.open(&name, true)?;
            medium.write(0, &[&file_header(self.number, first)])?;
            Ok(medium)
        };
        let medium = build().map_err(|e| StoreError::io(&path, e))?;
        let file = Arc::new(LogFile::new(self.number, path, medium, FILE_HEADER, false));
        let (tail, allocated, reserve) = (FILE_HEADER, self.allocated, reserve(file_bytes));
        Ok(Writer { file, tail, allocated, reserve, next: first, head: Vec::new() })
    }
}

fn no_space(path: &Path, bytes: u64) -> StoreError {
    StoreError::NoSpace { path: path.to_path_buf(), bytes }
}

impl Writer {
    /// Makes file `number`, durably and ready for record `first`.
    pub(super) fn create(storage: &dyn Storage, number: u32, first: Lsn, file_bytes: u64) -> Result<Self> {
        let new = Prepared::make(storage, number, file_bytes)?.begin(storage, first, file_bytes)?;
        sync_file(storage, &new.file)?;
        Ok(new)
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
            let allocated = match medium.allocate(len, wanted) {
                Err(e) if is_no_space(&e) => len,
                allocated => allocated.map(|()| len.max(wanted))?,
            };
            if let Some(header) = medium.read(0, FILE_HEADER as usize)?.and_then(|header| raised(&header)) {
                // One sector, so old or new: an earlier program is not to read what follows.
                medium.write(0, &[&header])?;
            }
            medium.sync()?;
            // An earlier process may have died before it did: between them the names of this file and of the snapshot.
            storage.sync_names()?;
            Ok((medium, allocated))
        };
        let (medium, allocated) = build().map_err(|e| StoreError::io(&path, e))?;
        let file = Arc::new(LogFile::new(number, path, medium, found.end, true));
        let (tail, reserve) = (found.end, reserve(file_bytes));
        let mut resumed = Self { file, tail, allocated, reserve, next: found.next, head: Vec::new() };
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
        let file = Arc::new(LogFile::new(number, path, medium, found.end, true));
        let (tail, allocated) = (found.end, found.end);
        Ok(Self { file, tail, allocated, reserve: 0, next: found.next, head: Vec::new() })
    }

    /// Appends a frame; `synced` is the newest LSN known to be on disk.
    ///
    /// # Errors
    /// `NoSpace` and `Full` before anything is written, `Io`.
    pub(super) fn write(
        &mut self, kind: u8, synced: Lsn, header: &[u8], arrays: &Arrays<'_>, room: Room,
    ) -> Result<Location> {
        let len = encode(&mut self.head, Stamp { lsn: self.next, durable: synced, kind }, header, arrays)?;
        let end = self.tail + u64::from(len);
        let kept = match room {
            Room::Last => 0,
            Room::Usual if arrays.end() == 0 => self.reserve / 2,
            Room::Usual => self.reserve,
        };
        // Room for the mark too, so that writing one never needs space.
        self.grow(end + FRAME_HEADER + kept)?;
        let mut parts = vec![&self.head[..]];
        parts.extend_from_slice(arrays.bytes());
        self.file.medium.write(self.tail, &parts).map_err(|e| StoreError::io(&self.file.path, e))?;
        let location = Location { file: self.file.number, offset: self.tail, len };
        self.tail = end;
        self.next += 1;
        self.file.publish(end);
        Ok(location)
    }

    /// Has room up to byte `needed` of the file.
    fn grow(&mut self, needed: u64) -> Result<()> {
        if needed <= self.allocated {
            return Ok(());
        }
        for wanted in [needed + GROWTH, needed] {
            match self.file.medium.allocate(self.allocated, wanted) {
                Ok(()) => {
                    self.allocated = wanted;
                    return Ok(());
                }
                Err(e) if is_no_space(&e) => {}
                Err(e) => return Err(StoreError::io(&self.file.path, e)),
            }
        }
        Err(no_space(&self.file.path, needed - self.allocated))
    }

    /// Seals this file and begins the next one; all of this one is synced.
    pub(super) fn next_file(&mut self, storage: &dyn Storage, next: Prepared, file_bytes: u64) -> Result<Self> {
        self.mark()?;
        let new = next.begin(storage, self.next, file_bytes)?;
        let cut = self.file.medium.truncate(self.tail + FRAME_HEADER);
        cut.map_err(|e| StoreError::io(&self.file.path, e)).map(|()| new)
    }

    /// Whether the next file is soon needed.
    pub(super) fn is_half_full(&self, file_bytes: u64) -> bool {
        self.tail - FILE_HEADER >= file_bytes / 2
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

/// Makes what was written to `file` durable, and its name where it is new.
pub(super) fn sync_file(storage: &dyn Storage, file: &LogFile) -> Result<()> {
    file.medium.sync().map_err(|e| StoreError::io(&file.path, e))?;
    if !file.is_named() {
        storage.sync_names().map_err(|e| StoreError::io(&file.path, e))?;
        file.name();
    }
    Ok(())
}

/// `from..to` in pieces: (start, length).
fn pieces(from: u64, to: u64) -> impl Iterator<Item = (u64, usize)> {
    (from..to).step_by(GROWTH as usize).map(move |at| (at, (to - at).min(GROWTH) as usize))
}
