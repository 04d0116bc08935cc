//! What readers see: frames, and the files that hold them.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    Location, Lsn,
    format::{FRAME_HEADER, align, entry, narrays, parse, stamp, u32_at},
    storage::{Bytes, Medium},
};
use crate::error::{Result, StoreError};

/// One record. It pins the bytes it reads: they stay readable when the file is deleted. Clone is cheap.
#[derive(Clone)]
pub struct Frame {
    bytes: Bytes,
    location: Location,
}

impl Frame {
    /// `bytes` must be a frame whose head was checked.
    pub(super) fn new(bytes: Bytes, location: Location) -> Self {
        Self { bytes, location }
    }

    /// The record's sequence number.
    pub fn lsn(&self) -> Lsn {
        stamp(&self.bytes).lsn
    }

    /// The caller's kind.
    pub fn kind(&self) -> u8 {
        stamp(&self.bytes).kind
    }

    /// Where the record is.
    pub fn location(&self) -> Location {
        self.location
    }

    /// The caller's header.
    pub fn header(&self) -> &[u8] {
        let at = FRAME_HEADER as usize + 8 * self.num_arrays();
        &self.bytes[at..at + self.header_len()]
    }

    fn header_len(&self) -> usize {
        u32_at(&self.bytes, 28) as usize
    }

    /// Number of arrays.
    pub fn num_arrays(&self) -> usize {
        narrays(&self.bytes)
    }

    /// Array `index`, 8-byte aligned; None when there is none.
    pub fn array(&self, index: usize) -> Option<&[u8]> {
        self.parts().nth(index).map(|part| part.bytes)
    }

    /// All arrays, each 8-byte aligned.
    pub fn arrays(&self) -> Vec<&[u8]> {
        self.parts().map(|part| part.bytes).collect()
    }

    /// The bytes of one of its arrays: they stay readable without the frame.
    pub fn bytes_of(&self, part: &Part<'_>) -> Bytes {
        self.bytes.slice(part.at as usize, part.bytes.len())
    }

    /// All arrays and where they are.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let mut at = FRAME_HEADER as usize + 8 * self.num_arrays() + align(self.header_len() as u64) as usize;
        (0..self.num_arrays()).map(move |index| {
            let entry = entry(&self.bytes, index);
            let part = Part { at: at as u32, crc: entry.crc, bytes: &self.bytes[at..at + entry.len as usize] };
            at += align(u64::from(entry.len)) as usize;
            part
        })
    }
}

/// One array of a frame.
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Part<'a> {
    /// Offset from the frame's start.
    pub at: u32,
    pub crc: u32,
    pub bytes: &'a [u8],
}

/// One file as its readers see it.
pub(super) struct LogFile {
    pub(super) number: u32,
    pub(super) path: PathBuf,
    pub(super) medium: Arc<dyn Medium>,
    /// Published end: all below is written whole and immutable.
    end: AtomicU64,
    /// Whether its name is on disk.
    named: AtomicBool,
}

impl LogFile {
    pub(super) fn new(number: u32, path: PathBuf, medium: Arc<dyn Medium>, end: u64, named: bool) -> Self {
        Self { number, path, medium, end: AtomicU64::new(end), named: AtomicBool::new(named) }
    }

    /// Whether its name is on disk.
    pub(super) fn is_named(&self) -> bool {
        self.named.load(Ordering::Acquire)
    }

    /// Notes that its name is on disk.
    pub(super) fn name(&self) {
        self.named.store(true, Ordering::Release);
    }

    /// The published end in bytes.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Shows readers everything below `end`.
    pub(super) fn publish(&self, end: u64) {
        self.end.store(end, Ordering::Release);
    }

    /// The record at `location`, its checksums checked now.
    pub(super) fn frame(&self, location: Location) -> Result<Frame> {
        let bytes = self.read(location.offset, location.len as usize)?;
        match parse(&bytes) {
            Ok(head) if head.len == location.len as usize => Ok(Frame::new(bytes, location)),
            Ok(head) => {
                let detail = format!("the record has {} bytes, not {}", head.len, location.len);
                Err(StoreError::corrupt(&self.path, location.offset, detail))
            }
            Err(detail) => Err(StoreError::corrupt(&self.path, location.offset, detail)),
        }
    }

    /// Bytes below the published end, unchecked.
    pub(super) fn read(&self, at: u64, len: usize) -> Result<Bytes> {
        let published = at.checked_add(len as u64).is_some_and(|end| end <= self.end());
        let located = |e: io::Error| {
            let located = io::Error::new(e.kind(), format!("{len} bytes at byte {at} cannot be read: {e}"));
            StoreError::io(&self.path, located)
        };
        let bytes = if published { self.medium.read(at, len).map_err(located)? } else { None };
        bytes.ok_or_else(|| {
            StoreError::corrupt(&self.path, at, format!("{len} bytes of a record are beyond the end of the file"))
        })
    }
}
