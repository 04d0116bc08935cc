//! What readers see: frames, and the files that hold them.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{MmapOptions, MmapRaw};

use super::{
    Location, Lsn,
    format::{FILE_HEADER, FRAME_HEADER, align, parse, read_file_header, stamp, u32_at},
    lock,
};
use crate::error::{Result, StoreError};

/// A range of a map, below the published end of its file.
#[derive(Clone)]
pub(super) struct Mapped {
    map: Arc<MmapRaw>,
    offset: usize,
    len: usize,
}

impl Mapped {
    /// All of a file that no writer has yet.
    pub(super) fn whole(map: &Arc<MmapRaw>) -> Self {
        Self { map: Arc::clone(map), offset: 0, len: map.len() }
    }

    #[allow(unsafe_code)]
    pub(super) fn bytes(&self) -> &[u8] {
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
    /// `location` must lie within `map` and hold a frame that was checked.
    pub(super) fn mapped(map: &Arc<MmapRaw>, location: Location) -> Self {
        let (offset, len) = (location.offset as usize, location.len as usize);
        Self { bytes: Bytes::Mapped(Mapped { map: Arc::clone(map), offset, len }), location }
    }

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
pub(super) struct LogFile {
    pub(super) number: u32,
    pub(super) path: PathBuf,
    /// Published end: all below is written whole and immutable.
    end: AtomicU64,
    body: Body,
}

impl LogFile {
    pub(super) fn disk(number: u32, path: PathBuf, end: u64) -> Self {
        Self { number, path, end: AtomicU64::new(end), body: Body::Disk(Mutex::new(None)) }
    }

    pub(super) fn memory(number: u32) -> Self {
        let path = PathBuf::from(format!("memory:{number}"));
        Self { number, path, end: AtomicU64::new(FILE_HEADER), body: Body::Memory(Mutex::default()) }
    }

    /// The published end in bytes.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Shows readers everything below `end`.
    pub(super) fn publish(&self, end: u64) {
        self.end.store(end, Ordering::Release);
    }

    /// Takes in a frame of a file in memory.
    pub(super) fn keep(&self, offset: u64, frame: &[u8]) {
        if let Body::Memory(frames) = &self.body {
            lock(frames).insert(offset, Arc::new(Aligned::new(frame)));
        }
    }

    /// The record at `location`, its checksum checked now.
    pub(super) fn frame(&self, location: Location) -> Result<Frame> {
        let frame = Frame { bytes: self.pin(location)?, location };
        match parse(frame.bytes()) {
            Ok((len, _)) if len == location.len as usize => Ok(frame),
            Ok((len, _)) => {
                Err(self.corrupt(location.offset, format!("the record has {len} bytes, not {}", location.len)))
            }
            Err(detail) => Err(self.corrupt(location.offset, detail)),
        }
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
        let end = end.filter(|&end| end <= self.end()).ok_or_else(beyond)?;
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

pub(super) fn map_file(file: &File, path: &Path) -> Result<Arc<MmapRaw>> {
    MmapOptions::new().map_raw_read_only(file).map(Arc::new).map_err(|e| StoreError::io(path, e))
}
