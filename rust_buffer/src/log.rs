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
//! File `NNNNNNNNNN.log`: `magic [u8; 8] | format u32 | crc32c u32 | number u32 | 0 u32 | first lsn u64`, frames, zeros.
//! Frame: `len u32 | crc32c u32 | lsn u64 | durable lsn u64 | kind u8 | narrays u8 | 0 u16 | header_len u32 |
//! array lengths [u32] | header | arrays`, each part padded with zeros to 8 bytes; `len` counts the whole frame and the
//! CRC covers all but itself. Kind 0 is a snapshot, 255 a mark, the rest is the caller's. The file header's layout and
//! the place of the format number stay the same in every later format.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use memmap2::{MmapOptions, MmapRaw};
use rustix::{
    fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::error::{Result, StoreError};

/// Log sequence number: 1 is the first snapshot of a new log.
pub type Lsn = u64;

const MAGIC: [u8; 8] = *b"PMDFLOW\0";
const FORMAT: u32 = 1;
const FILE_HEADER: u64 = 32;
const FRAME_HEADER: u64 = 32;
const SNAPSHOT: u8 = 0;
const MARK: u8 = 255;
/// Longest time between two syncs of a log that is written to and that nobody waits for.
const COMMIT_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes by which a file grows beyond its preallocation, and in which recovery rewrites its tail.
const GROWTH: u64 = 1 << 20;

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

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

const fn align(len: u64) -> u64 {
    len.next_multiple_of(8)
}

// ---------------------------------------------------------------------------------------------------- format

/// CRC of a frame: its length, then everything after the CRC.
fn frame_crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..])
}

fn file_header(number: u32, first: Lsn) -> [u8; FILE_HEADER as usize] {
    let mut out = [0; FILE_HEADER as usize];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    out[16..20].copy_from_slice(&number.to_le_bytes());
    out[24..].copy_from_slice(&first.to_le_bytes());
    let crc = file_header_crc(&out);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out
}

fn file_header_crc(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..FILE_HEADER as usize])
}

/// Checks the header of file `number`; its first LSN, or None when it is not whole.
fn read_file_header(path: &Path, bytes: &[u8], number: u32) -> Result<Option<Lsn>> {
    if bytes.len() < FILE_HEADER as usize || bytes[..8] != MAGIC || u32_at(bytes, 12) != file_header_crc(bytes) {
        return Ok(None);
    }
    let (found, stored) = (u32_at(bytes, 8), u32_at(bytes, 16));
    if found != FORMAT {
        return Err(StoreError::Version { path: path.to_path_buf(), found, supported: FORMAT });
    }
    if stored != number {
        return Err(StoreError::corrupt(path, 16, format!("the header says file {stored}, the name says {number}")));
    }
    let first = u64_at(bytes, 24);
    if first == 0 || first > u64::MAX / 2 {
        return Err(StoreError::corrupt(path, 24, format!("the first LSN {first} is out of range")));
    }
    Ok(Some(first))
}

/// The fixed fields of a frame.
#[derive(Clone, Copy)]
struct Stamp {
    lsn: Lsn,
    durable: Lsn,
    kind: u8,
}

/// Writes one frame into `out`, replacing what it held; returns its length.
fn encode(out: &mut Vec<u8>, stamp: Stamp, header: &[u8], arrays: &[&[u8]]) -> Result<u32> {
    let narrays = u8::try_from(arrays.len()).map_err(|_| StoreError::Full {
        what: "the number of arrays of one record",
        value: arrays.len() as u64,
        limit: u64::from(u8::MAX),
        remedy: "split the record",
    })?;
    let parts = arrays.iter().map(|a| align(a.len() as u64)).sum::<u64>() + align(header.len() as u64);
    let total = FRAME_HEADER + align(4 * u64::from(narrays)) + parts;
    let len = u32::try_from(total).map_err(|_| StoreError::Full {
        what: "the bytes of one record",
        value: total,
        limit: u64::from(u32::MAX),
        remedy: "split the record",
    })?;
    out.clear();
    out.reserve(total as usize);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&stamp.lsn.to_le_bytes());
    out.extend_from_slice(&stamp.durable.to_le_bytes());
    out.extend_from_slice(&[stamp.kind, narrays, 0, 0]);
    out.extend_from_slice(&(header.len() as u32).to_le_bytes());
    for array in arrays {
        out.extend_from_slice(&(array.len() as u32).to_le_bytes());
    }
    pad(out);
    for part in std::iter::once(&header).chain(arrays) {
        out.extend_from_slice(part);
        pad(out);
    }
    let crc = frame_crc(out);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    Ok(len)
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Checks the frame at the start of `bytes` (which may go on) without trusting any of it; returns length and stamp.
fn parse(bytes: &[u8]) -> std::result::Result<(usize, Stamp), &'static str> {
    if bytes.len() < FRAME_HEADER as usize {
        return Err("the file ends within the record's head");
    }
    let len = u32_at(bytes, 0) as usize;
    if len < FRAME_HEADER as usize || len % 8 != 0 {
        return Err("the record's length is impossible");
    }
    let frame = bytes.get(..len).ok_or("the file ends within the record")?;
    if u32_at(frame, 4) != frame_crc(frame) {
        return Err("the checksum does not match");
    }
    let (narrays, header_len) = (usize::from(frame[25]), u64::from(u32_at(frame, 28)));
    let table = frame.get(FRAME_HEADER as usize..FRAME_HEADER as usize + 4 * narrays).ok_or("the parts do not fit")?;
    let arrays = table.chunks_exact(4).map(|word| align(u64::from(u32_at(word, 0)))).sum::<u64>();
    if FRAME_HEADER + align(4 * narrays as u64) + align(header_len) + arrays != len as u64 {
        return Err("the parts do not fit the record's length");
    }
    Ok((len, stamp(frame)))
}

fn stamp(frame: &[u8]) -> Stamp {
    Stamp { lsn: u64_at(frame, 8), durable: u64_at(frame, 16), kind: frame[24] }
}

// ----------------------------------------------------------------------------------------------------- reading

/// A range of a map, below the published end of its file.
#[derive(Clone)]
struct Mapped {
    map: Arc<MmapRaw>,
    offset: usize,
    len: usize,
}

impl Mapped {
    #[allow(unsafe_code)]
    fn bytes(&self) -> &[u8] {
        // SAFETY: whoever makes a `Mapped` has checked that the range lies within the map and below the published
        // end of the file (recovery: no writer exists yet), where bytes are never written again (invariant 5). The map
        // lives as long as self. Other processes are kept from writing by the lock on the directory; that nobody
        // truncates the file from outside is the same assumption that every reader of a mapped file makes.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.offset), self.len) }
    }
}

/// A frame in memory, aligned like one in a file.
struct Aligned {
    buffer: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(frame: &[u8]) -> Self {
        let mut buffer: Vec<u8> = Vec::with_capacity(frame.len() + 8);
        let start = buffer.as_ptr().align_offset(8).min(8);
        buffer.resize(start, 0);
        buffer.extend_from_slice(frame);
        Self { buffer, start }
    }
}

#[derive(Clone)]
enum Bytes {
    Mapped(Mapped),
    Memory(Arc<Aligned>),
}

/// One record. It pins the bytes it reads: they stay readable when the file is deleted. Clone is cheap.
#[derive(Clone)]
pub struct Frame {
    bytes: Bytes,
    location: Location,
}

impl Frame {
    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(mapped) => mapped.bytes(),
            Bytes::Memory(aligned) => &aligned.buffer[aligned.start..],
        }
    }

    /// The record's sequence number.
    pub fn lsn(&self) -> Lsn {
        stamp(self.bytes()).lsn
    }

    /// The caller's kind.
    pub fn kind(&self) -> u8 {
        stamp(self.bytes()).kind
    }

    /// Where the record is.
    pub fn location(&self) -> Location {
        self.location
    }

    /// The caller's header.
    pub fn header(&self) -> &[u8] {
        let (bytes, at) = (self.bytes(), self.header_offset());
        &bytes[at..at + u32_at(bytes, 28) as usize]
    }

    /// Number of arrays.
    pub fn num_arrays(&self) -> usize {
        usize::from(self.bytes()[25])
    }

    /// Array `index`, 8-byte aligned; None when there is none.
    pub fn array(&self, index: usize) -> Option<&[u8]> {
        self.parts().nth(index)
    }

    /// All arrays, each 8-byte aligned.
    pub fn arrays(&self) -> Vec<&[u8]> {
        self.parts().collect()
    }

    fn header_offset(&self) -> usize {
        (FRAME_HEADER + align(4 * self.num_arrays() as u64)) as usize
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let bytes = self.bytes();
        let mut at = self.header_offset() + align(u64::from(u32_at(bytes, 28))) as usize;
        (0..self.num_arrays()).map(move |i| {
            let len = u32_at(bytes, FRAME_HEADER as usize + 4 * i) as usize;
            let part = &bytes[at..at + len];
            at += len.next_multiple_of(8);
            part
        })
    }
}

enum Body {
    /// Mapped at the first read, and again when a read lies beyond the map.
    Disk(Mutex<Option<Arc<MmapRaw>>>),
    Memory(Mutex<HashMap<u64, Arc<Aligned>>>),
}

/// One file as its readers see it.
struct LogFile {
    number: u32,
    path: PathBuf,
    /// Published end: all below is written whole and immutable.
    end: AtomicU64,
    body: Body,
}

impl LogFile {
    fn disk(number: u32, path: PathBuf, end: u64) -> Self {
        Self { number, path, end: AtomicU64::new(end), body: Body::Disk(Mutex::new(None)) }
    }

    fn memory(number: u32) -> Self {
        let path = PathBuf::from(format!("memory:{number}"));
        Self { number, path, end: AtomicU64::new(FILE_HEADER), body: Body::Memory(Mutex::default()) }
    }

    fn corrupt(&self, offset: u64, detail: impl Into<String>) -> StoreError {
        StoreError::corrupt(&self.path, offset, detail)
    }

    /// The bytes of the frame that `location` names, unchecked but within the published end.
    fn pin(&self, location: Location) -> Result<Bytes> {
        let end = location.offset.checked_add(u64::from(location.len));
        let beyond = || {
            let detail = format!("a record of {} bytes is beyond the end of the file", location.len);
            self.corrupt(location.offset, detail)
        };
        let end = end.filter(|&end| end <= self.end.load(Ordering::Acquire)).ok_or_else(beyond)?;
        let cell = match &self.body {
            Body::Memory(frames) => {
                return lock(frames).get(&location.offset).cloned().map(Bytes::Memory).ok_or_else(beyond);
            }
            Body::Disk(cell) => cell,
        };
        let mut cell = lock(cell);
        let map = match &*cell {
            Some(map) if map.len() as u64 >= end => Arc::clone(map),
            _ => Arc::clone(cell.insert(self.map()?)),
        };
        if (map.len() as u64) < end {
            return Err(beyond());
        }
        Ok(Bytes::Mapped(Mapped { map, offset: location.offset as usize, len: location.len as usize }))
    }

    fn map(&self) -> Result<Arc<MmapRaw>> {
        let file = File::open(&self.path).map_err(|e| StoreError::io(&self.path, e))?;
        let mut header = [0; FILE_HEADER as usize];
        let whole = file.read_exact_at(&mut header, 0).is_ok();
        if !whole || read_file_header(&self.path, &header, self.number)?.is_none() {
            return Err(self.corrupt(0, "the file's header is not readable"));
        }
        map_file(&file, &self.path)
    }
}

fn map_file(file: &File, path: &Path) -> Result<Arc<MmapRaw>> {
    MmapOptions::new().map_raw_read_only(file).map(Arc::new).map_err(|e| StoreError::io(path, e))
}

// ---------------------------------------------------------------------------------------------------- recovery

/// What opening found: the newest snapshot and every record after it.
pub struct Recovery {
    snapshot: Option<Frame>,
    map: Option<Arc<MmapRaw>>,
    frames: Vec<Location>,
}

impl Recovery {
    /// The bytes given to the last `rotate`; empty for a log that has never rotated.
    pub fn snapshot(&self) -> &[u8] {
        self.snapshot.as_ref().and_then(|frame| frame.array(0)).unwrap_or_default()
    }

    /// Every record after the snapshot, in order, its checksum already checked.
    pub fn frames(&self) -> impl Iterator<Item = Frame> + '_ {
        let map = self.map.iter().cycle();
        self.frames.iter().zip(map).map(|(&location, map)| mapped_frame(map, location))
    }
}

/// `location` must lie within `map` and hold a frame that was checked.
fn mapped_frame(map: &Arc<MmapRaw>, location: Location) -> Frame {
    let (offset, len) = (location.offset as usize, location.len as usize);
    Frame { bytes: Bytes::Mapped(Mapped { map: Arc::clone(map), offset, len }), location }
}

/// What a scan of the newest file found.
struct Scan {
    recovery: Recovery,
    /// LSN that the next frame gets.
    next: Lsn,
    /// Where the snapshot ends.
    data_start: u64,
    /// Where the next frame goes.
    tail: u64,
    /// End of the last byte that is not zero: the torn tail is `tail..dirty_end`.
    dirty_end: u64,
    /// Where the first frame starts that nothing proves durable.
    unproven: u64,
}

/// Reads file `number`; None when its creation was torn: no whole snapshot and no sign that it was ever used.
fn scan(path: &Path, number: u32) -> Result<Option<Scan>> {
    let file = File::open(path).map_err(|e| StoreError::io(path, e))?;
    let len = file.metadata().map_err(|e| StoreError::io(path, e))?.len();
    if len < FILE_HEADER + FRAME_HEADER {
        return Ok(None);
    }
    let map = map_file(&file, path)?;
    let whole = Mapped { map: Arc::clone(&map), offset: 0, len: map.len() };
    let image = Image { path, number, bytes: whole.bytes(), data_end: data_end(&file, len) };
    let bytes = image.bytes;
    let Some(first) = read_file_header(path, bytes, number)? else {
        image.refuse_if_used(0, 1, "the file's header is not readable")?;
        return Ok(None);
    };
    let (snapshot_len, head) = match parse(&bytes[FILE_HEADER as usize..]) {
        Ok(found) => found,
        Err(detail) => {
            image.refuse_if_used(FILE_HEADER, first, detail)?;
            return Ok(None);
        }
    };
    if head.kind != SNAPSHOT || head.lsn != first {
        return Err(StoreError::corrupt(path, FILE_HEADER, format!("the first record is not the snapshot {first}")));
    }
    let data_start = FILE_HEADER + snapshot_len as u64;
    let location = Location { file: number, offset: FILE_HEADER, len: snapshot_len as u32 };
    let snapshot = Some(mapped_frame(&map, location));
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
            if u32_at(rest, 0) == 0 {
                continue;
            }
            let (len, found) = (u64::from(u32_at(rest, 0)), stamp(rest));
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

fn file_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:010}.log"))
}

/// Numbers of the log files in `dir` and their lengths.
fn list_files(dir: &Path) -> Result<BTreeMap<u32, u64>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|e| StoreError::io(dir, e))? {
        let entry = entry.map_err(|e| StoreError::io(dir, e))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_suffix(".log")).filter(|n| n.len() == 10);
        if let Some(number) = number.and_then(|n| n.parse().ok()) {
            files.insert(number, entry.metadata().map_err(|e| StoreError::io(entry.path(), e))?.len());
        }
    }
    Ok(files)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io(dir, e))
}

/// Creates `dir` where it is missing and takes its lock.
fn lock_dir(dir: &Path) -> Result<File> {
    if !dir.is_dir() {
        fs::create_dir_all(dir).map_err(|e| StoreError::io(dir, e))?;
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_dir(parent)?;
    }
    let path = dir.join("lock");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = open.map_err(|e| StoreError::io(&path, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StoreError::Locked { path }),
        Err(e) => Err(StoreError::io(&path, e)),
    }
}

// ----------------------------------------------------------------------------------------------------- writing

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
struct Writer {
    log_file: Arc<LogFile>,
    /// None in memory.
    file: Option<Arc<File>>,
    data_start: u64,
    tail: u64,
    allocated: u64,
    next: Lsn,
    scratch: Vec<u8>,
}

impl Writer {
    fn in_memory() -> Self {
        let start = FILE_HEADER;
        let log_file = Arc::new(LogFile::memory(1));
        Self { log_file, file: None, data_start: start, tail: start, allocated: 0, next: 2, scratch: Vec::new() }
    }

    /// Makes file `number` with `snapshot` (an encoded frame) durable and ready for the frame after it.
    fn create(dir: &Path, number: u32, first: Lsn, snapshot: &[u8], file_bytes: u64) -> Result<Self> {
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
    fn resume(path: PathBuf, number: u32, scan: &Scan, file_bytes: u64) -> Result<Self> {
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

    /// Appends a frame that `encode` left in `scratch`.
    fn write(&mut self, len: u32) -> Result<Location> {
        let end = self.tail + u64::from(len);
        match (&self.file, &self.log_file.body) {
            (None, Body::Memory(frames)) => {
                lock(frames).insert(self.tail, Arc::new(Aligned::new(&self.scratch)));
            }
            (file, _) => {
                // Room for the mark too, so that writing one never needs space.
                let needed = end + FRAME_HEADER;
                let wanted = if needed > self.allocated { needed + GROWTH } else { self.allocated };
                let write = |file: &File| {
                    allocate(file, self.allocated, wanted)?;
                    file.write_all_at(&self.scratch, self.tail)
                };
                file.as_deref().map_or(Ok(()), write).map_err(|e| StoreError::io(&self.log_file.path, e))?;
                self.allocated = wanted;
            }
        }
        let location = Location { file: self.log_file.number, offset: self.tail, len };
        self.tail = end;
        self.next += 1;
        self.log_file.end.store(end, Ordering::Release);
        self.scratch.truncate(0);
        self.scratch.shrink_to(GROWTH as usize);
        Ok(location)
    }

    /// Notes behind the last frame that all of them are durable; the next frame overwrites it.
    fn mark(&mut self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let durable = self.next - 1;
        encode(&mut self.scratch, Stamp { lsn: durable, durable, kind: MARK }, &[], &[])?;
        file.write_all_at(&self.scratch, self.tail).map_err(|e| StoreError::io(&self.log_file.path, e))
    }

    fn sync(&self) -> Result<()> {
        sync_file(self.file.as_deref(), &self.log_file)
    }
}

fn sync_file(file: Option<&File>, log_file: &LogFile) -> Result<()> {
    file.map_or(Ok(()), File::sync_data).map_err(|e| StoreError::io(&log_file.path, e))
}

/// Calls `step` with a zeroed buffer for each piece of `from..to`.
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

/// What the appenders, the sync thread and the waiters share.
struct State {
    log_file: Arc<LogFile>,
    file: Option<Arc<File>>,
    written: Lsn,
    durable: Lsn,
    /// Highest LSN that somebody waits for.
    wanted: Lsn,
    /// The sync thread waits for work without a deadline.
    idle: bool,
    failed: Option<String>,
    closed: bool,
}

/// Locks are taken in the order sync, writer, then state or files.
struct Shared {
    dir: Option<PathBuf>,
    durability: Durability,
    file_bytes: u64,
    /// Held during each sync, so that no two take the error of the same pages.
    sync: Mutex<()>,
    writer: Mutex<Writer>,
    state: Mutex<State>,
    /// Wakes the sync thread.
    work: Condvar,
    /// Wakes who waits for durability.
    done: Condvar,
    files: Mutex<BTreeMap<u32, Arc<LogFile>>>,
    lock: Mutex<Option<File>>,
}

impl Shared {
    /// The durable LSN, if the log still takes records.
    fn accepting(&self) -> Result<Lsn> {
        let state = lock(&self.state);
        if state.closed { Err(StoreError::Closed) } else { healthy(&state).map(|()| state.durable) }
    }

    /// Records the first failure and wakes everybody; gives the error back.
    fn poison(&self, error: StoreError) -> StoreError {
        lock(&self.state).failed.get_or_insert_with(|| error.to_string());
        self.work.notify_all();
        self.done.notify_all();
        error
    }

    fn append(&self, kind: u8, header: &[u8], arrays: &[&[u8]]) -> Result<(Lsn, Location)> {
        let mut writer = lock(&self.writer);
        let durable = self.accepting()?;
        let lsn = writer.next;
        let len = encode(&mut writer.scratch, Stamp { lsn, durable, kind }, header, arrays)?;
        let location = writer.write(len).map_err(|e| self.poison(e))?;
        let mut state = lock(&self.state);
        state.written = lsn;
        if self.durability == Durability::Os || self.dir.is_none() {
            state.durable = lsn;
        } else if state.idle {
            self.work.notify_one();
        }
        Ok((lsn, location))
    }

    /// One fdatasync for all that was written before it, unless `lsn` is durable by now. The mark precedes the
    /// acknowledgement, so that damage to acknowledged records is found even when they are the last ones.
    fn sync_until(&self, lsn: Lsn) -> Result<()> {
        let _one_at_a_time = lock(&self.sync);
        let (target, file, log_file) = {
            let state = lock(&self.state);
            if state.durable >= lsn {
                return Ok(());
            }
            healthy(&state)?;
            (state.written, state.file.clone(), Arc::clone(&state.log_file))
        };
        let synced = sync_file(file.as_deref(), &log_file).and_then(|()| {
            let mut writer = lock(&self.writer);
            if writer.next - 1 == target { writer.mark() } else { Ok(()) }
        });
        synced.map_err(|e| self.poison(e))?;
        let mut state = lock(&self.state);
        state.durable = state.durable.max(target);
        self.done.notify_all();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.sync_until(Lsn::MAX)
    }

    /// The sync thread: at once when the log was idle or somebody waits, else every `COMMIT_INTERVAL`.
    fn run(&self) {
        let mut due = Instant::now();
        loop {
            let mut state = lock(&self.state);
            loop {
                if state.closed || state.failed.is_some() {
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
            due = Instant::now() + COMMIT_INTERVAL;
            if self.sync().is_err() {
                return;
            }
        }
    }

    /// Seals the current file and begins the next one with the snapshot that `encode` left in `frame`.
    fn next_file(&self, writer: &mut Writer, dir: &Path, number: u32, frame: &[u8]) -> Result<Writer> {
        writer.sync()?;
        writer.mark()?;
        let new = Writer::create(dir, number, writer.next, frame, self.file_bytes)?;
        // A mark of the new file's snapshot in the old one: opening never falls back behind a file that was whole.
        writer.next += 1;
        writer.mark()?;
        if let Some(old) = &writer.file {
            old.set_len(writer.tail + FRAME_HEADER).map_err(|e| StoreError::io(&writer.log_file.path, e))?;
        }
        Ok(new)
    }
}

fn healthy(state: &State) -> Result<()> {
    state.failed.clone().map_or(Ok(()), |detail| Err(StoreError::Poisoned { detail }))
}

// -------------------------------------------------------------------------------------------------------- API

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
        let nothing = Recovery { snapshot: None, map: None, frames: Vec::new() };
        let Some(dir) = dir else {
            return Ok((Self::start(None, options, Writer::in_memory(), Vec::new(), None)?, nothing));
        };
        let guard = lock_dir(dir)?;
        let mut files = list_files(dir)?;
        let mut torn = None;
        let (writer, recovery) = loop {
            let Some((number, _)) = files.pop_last() else {
                if let Some(torn @ 2..) = torn {
                    let detail = "its snapshot was never completed and the file before it is missing";
                    return Err(StoreError::corrupt(file_path(dir, torn), 0, detail));
                }
                remove_torn(dir, torn)?;
                let mut snapshot = Vec::new();
                encode(&mut snapshot, Stamp { lsn: 1, durable: 0, kind: SNAPSHOT }, &[], &[&[]])?;
                break (Writer::create(dir, 1, 1, &snapshot, options.file_bytes)?, nothing);
            };
            let path = file_path(dir, number);
            match (scan(&path, number)?, torn) {
                (Some(scan), _) => {
                    remove_torn(dir, torn)?;
                    break (Writer::resume(path, number, &scan, options.file_bytes)?, scan.recovery);
                }
                (None, None) => torn = Some(number),
                (None, Some(_)) => return Err(StoreError::corrupt(path, 0, "the sealed file has no whole snapshot")),
            }
        };
        let sealed = files.into_iter().map(|(n, len)| LogFile::disk(n, file_path(dir, n), len)).collect();
        Ok((Self::start(Some(dir), options, writer, sealed, Some(guard))?, recovery))
    }

    fn start(
        dir: Option<&Path>,
        options: LogOptions,
        writer: Writer,
        sealed: Vec<LogFile>,
        guard: Option<File>,
    ) -> Result<Self> {
        let mut files: BTreeMap<_, _> = sealed.into_iter().map(|file| (file.number, Arc::new(file))).collect();
        files.insert(writer.log_file.number, Arc::clone(&writer.log_file));
        let last = writer.next - 1;
        let (log_file, file) = (Arc::clone(&writer.log_file), writer.file.clone());
        let shared = Arc::new(Shared {
            dir: dir.map(Path::to_path_buf),
            durability: options.durability,
            file_bytes: options.file_bytes,
            sync: Mutex::new(()),
            writer: Mutex::new(writer),
            state: Mutex::new(State {
                log_file,
                file,
                written: last,
                durable: last,
                wanted: 0,
                idle: false,
                failed: None,
                closed: false,
            }),
            work: Condvar::new(),
            done: Condvar::new(),
            files: Mutex::new(files),
            lock: Mutex::new(guard),
        });
        let thread = match (dir, options.durability) {
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
        let shared = &self.0.shared;
        let appended = shared.append(kind, header, arrays)?;
        if shared.durability == Durability::Always {
            shared.sync_until(appended.0)?;
        }
        Ok(appended)
    }

    /// Whether the current file has its share: `file_bytes` of records, and no fewer than its snapshot.
    pub fn should_rotate(&self) -> bool {
        let writer = lock(&self.0.shared.writer);
        writer.tail - writer.data_start >= self.0.shared.file_bytes.max(writer.data_start)
    }

    /// Seals the current file and begins a new one with `snapshot`, durably; recovery starts there. Takes one LSN.
    ///
    /// # Errors
    /// As `append`. A failure while the files change hands poisons the log.
    pub fn rotate(&self, snapshot: &[u8]) -> Result<()> {
        let shared = &self.0.shared;
        let _no_other_sync = lock(&shared.sync);
        let mut writer = lock(&shared.writer);
        shared.accepting()?;
        let (lsn, durable) = (writer.next, writer.next - 1);
        let number = writer.log_file.number.checked_add(1).ok_or(StoreError::Full {
            what: "the number of log files",
            value: u64::from(u32::MAX) + 1,
            limit: u64::from(u32::MAX),
            remedy: "raise file_bytes in a new store",
        })?;
        let new = if let Some(dir) = &shared.dir {
            let mut frame = Vec::new();
            encode(&mut frame, Stamp { lsn, durable, kind: SNAPSHOT }, &[], &[snapshot])?;
            shared.next_file(&mut writer, dir, number, &frame).map_err(|e| shared.poison(e))?
        } else {
            let log_file = Arc::new(LogFile::memory(number));
            Writer { log_file, next: lsn + 1, ..Writer::in_memory() }
        };
        lock(&shared.files).insert(number, Arc::clone(&new.log_file));
        let mut state = lock(&shared.state);
        (state.file, state.log_file) = (new.file.clone(), Arc::clone(&new.log_file));
        (state.written, state.durable) = (lsn, lsn);
        *writer = new;
        shared.done.notify_all();
        Ok(())
    }

    /// The record at `location`, its checksum checked now.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are damaged or gone, `Io`.
    pub fn frame(&self, location: Location) -> Result<Frame> {
        let file = lock(&self.0.shared.files).get(&location.file).cloned().ok_or_else(|| {
            let path = self.0.shared.dir.as_deref().unwrap_or(Path::new("memory"));
            StoreError::corrupt(
                file_path(path, location.file),
                location.offset,
                "the file is gone, a record in it is wanted",
            )
        })?;
        let frame = Frame { bytes: file.pin(location)?, location };
        match parse(frame.bytes()) {
            Ok((len, _)) if len == location.len as usize => Ok(frame),
            Ok((len, _)) => {
                Err(file.corrupt(location.offset, format!("the record has {len} bytes, not {}", location.len)))
            }
            Err(detail) => Err(file.corrupt(location.offset, detail)),
        }
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
        let shared = &self.0.shared;
        let mut state = lock(&shared.state);
        if lsn > state.written {
            let written = state.written;
            return Err(StoreError::Conflict(format!("LSN {lsn} is not written, the last is {written}; append first")));
        }
        if state.durable < lsn {
            state.wanted = state.wanted.max(lsn);
            shared.work.notify_one();
        }
        let pending = |state: &mut State| state.durable < lsn && state.failed.is_none();
        let waited = shared.done.wait_timeout_while(state, timeout, pending);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.durable >= lsn { Ok(true) } else { healthy(&state).map(|()| false) }
    }

    /// Deletes the sealed files numbered below `file`, oldest first, after syncing the records that say why; returns
    /// how many. The caller keeps every file that holds live data; frames already read stay readable.
    ///
    /// # Errors
    /// As `append`.
    pub fn remove_before(&self, file: u32) -> Result<usize> {
        let shared = &self.0.shared;
        shared.accepting()?;
        let doomed: Vec<_> = lock(&shared.files).range(..file.min(self.current_file())).map(|(&n, _)| n).collect();
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
        lock(&self.0.shared.files).values().map(|file| file.end.load(Ordering::Acquire)).sum()
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
        let shared = &self.shared;
        lock(&shared.state).closed = true;
        // Whoever saw it open has the writer until its record is written.
        drop(lock(&shared.writer));
        shared.work.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            // The thread's failures are in the state.
            let _ = thread.join();
        }
        let Some(guard) = lock(&shared.lock).take() else { return Ok(()) };
        let synced = shared.sync();
        drop(guard);
        synced
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, e)),
        _ => Ok(()),
    }
}

fn remove_torn(dir: &Path, torn: Option<u32>) -> Result<()> {
    let Some(number) = torn else { return Ok(()) };
    remove_file(&file_path(dir, number))?;
    sync_dir(dir)
}
