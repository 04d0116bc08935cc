//! The bytes of file headers and frames, as `rust_buffer/README.md` draws them.

use std::path::Path;

use super::Lsn;
use crate::error::{Result, StoreError};

const MAGIC: [u8; 8] = *b"PMDFLOW\0";
/// Version of the files' bytes that is written; those from `OLDEST` on are read, other ones refused.
pub const FORMAT: u32 = 4;
const OLDEST: u32 = 3;
pub(super) const FILE_HEADER: u64 = 32;
pub(super) const FRAME_HEADER: u64 = 32;
pub(super) const SNAPSHOT: u8 = 0;
pub(super) const MARK: u8 = 255;

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(super) const fn align(len: u64) -> u64 {
    len.next_multiple_of(8)
}

pub(super) fn file_header(number: u32, first: Lsn) -> [u8; FILE_HEADER as usize] {
    let mut out = [0; FILE_HEADER as usize];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    out[16..20].copy_from_slice(&number.to_le_bytes());
    out[24..].copy_from_slice(&first.to_le_bytes());
    let crc = file_header_crc(&out);
    out[12..16].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The header of a file of an earlier format as it is written today; None where it is today's.
pub(super) fn raised(header: &[u8]) -> Option<[u8; FILE_HEADER as usize]> {
    (u32_at(header, 8) < FORMAT).then(|| file_header(u32_at(header, 16), u64_at(header, 24)))
}

fn file_header_crc(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..FILE_HEADER as usize])
}

/// Checks the header of file `number`; its first LSN (0 where none was begun), or None when it is not whole.
pub(super) fn read_file_header(path: &Path, bytes: &[u8], number: u32) -> Result<Option<Lsn>> {
    if bytes.len() < FILE_HEADER as usize || bytes[..8] != MAGIC || u32_at(bytes, 12) != file_header_crc(bytes) {
        return Ok(None);
    }
    let (found, stored) = (u32_at(bytes, 8), u32_at(bytes, 16));
    if !(OLDEST..=FORMAT).contains(&found) {
        return Err(StoreError::Version { path: path.to_path_buf(), found, supported: FORMAT });
    }
    if stored != number {
        return Err(StoreError::corrupt(path, 16, format!("the header says file {stored}, the name says {number}")));
    }
    let first = u64_at(bytes, 24);
    if first > u64::MAX / 2 {
        return Err(StoreError::corrupt(path, 24, format!("the first LSN {first} is out of range")));
    }
    Ok(Some(first))
}

/// The fixed fields of a frame.
#[derive(Clone, Copy)]
pub(super) struct Stamp {
    pub(super) lsn: Lsn,
    pub(super) durable: Lsn,
    pub(super) kind: u8,
}

/// The arrays of a record: their lengths and checksums, and their bytes as they will lie in the frame.
#[derive(Default)]
pub struct Arrays<'a> {
    table: Vec<Entry>,
    bytes: Vec<&'a [u8]>,
    len: u64,
}

/// Length in bytes and CRC32C of one array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Bytes, without padding.
    pub len: u32,
    /// CRC32C of these.
    pub crc: u32,
}

impl Entry {
    /// That of `bytes`, which are fewer than 4 GiB.
    pub fn of(bytes: &[u8]) -> Self {
        Self { len: bytes.len() as u32, crc: crc32c::crc32c(bytes) }
    }
}

impl<'a> Arrays<'a> {
    /// Those of `arrays`.
    pub fn of(arrays: &[&'a [u8]]) -> Self {
        let mut all = Self::default();
        for bytes in arrays {
            all.table.push(Entry::of(bytes));
            all.bytes.push(bytes);
            all.bytes.push(padding(bytes.len()));
            all.len += align(bytes.len() as u64);
        }
        all
    }

    /// Adds arrays that lie in `bytes` one behind the other, each padded with zeros to 8 bytes.
    pub fn extend(&mut self, entries: &[Entry], bytes: &'a [u8]) {
        debug_assert_eq!(entries.iter().map(|entry| align(u64::from(entry.len))).sum::<u64>(), bytes.len() as u64);
        self.table.extend_from_slice(entries);
        self.bytes.push(bytes);
        self.len += bytes.len() as u64;
    }

    /// One array, of the pieces behind one another; empty pieces are none.
    pub fn joined(pieces: Vec<&'a [u8]>) -> Self {
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let crc = pieces.iter().fold(0, |crc, piece| crc32c::crc32c_append(crc, piece));
        let mut joined = Self { table: vec![Entry { len: len as u32, crc }], bytes: pieces, len: align(len as u64) };
        joined.bytes.push(padding(len));
        joined
    }

    /// Where the next array will begin, from the first one's start.
    pub fn end(&self) -> u64 {
        self.len
    }

    /// Offset in the frame and checksum of each array, under a header of `header_len` bytes.
    pub fn places(&self, header_len: usize) -> Vec<(u32, u32)> {
        let mut at = head_len(header_len, self.table.len());
        let place = |entry: &Entry| {
            let place = (at as u32, entry.crc);
            at += align(u64::from(entry.len));
            place
        };
        self.table.iter().map(place).collect()
    }

    pub(super) fn bytes(&self) -> &[&'a [u8]] {
        &self.bytes
    }
}

fn padding(len: usize) -> &'static [u8] {
    &[0; 8][..len.next_multiple_of(8) - len]
}

/// Bytes before the first array of a frame.
pub(super) fn head_len(header_len: usize, narrays: usize) -> u64 {
    FRAME_HEADER + 8 * narrays as u64 + align(header_len as u64)
}

/// Writes the head of a frame into `out`, replacing what it held; returns the length of the whole frame.
pub(super) fn encode(out: &mut Vec<u8>, stamp: Stamp, header: &[u8], arrays: &Arrays<'_>) -> Result<u32> {
    let narrays = u16::try_from(arrays.table.len()).map_err(|_| StoreError::Full {
        what: "the number of arrays of one record",
        value: arrays.table.len() as u64,
        limit: u64::from(u16::MAX),
        remedy: "split the record",
    })?;
    let total = head_len(header.len(), arrays.table.len()) + arrays.len;
    let len = u32::try_from(total).map_err(|_| StoreError::Full {
        what: "the bytes of one record",
        value: total,
        limit: u64::from(u32::MAX),
        remedy: "split the record",
    })?;
    out.clear();
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&stamp.lsn.to_le_bytes());
    out.extend_from_slice(&stamp.durable.to_le_bytes());
    out.extend_from_slice(&[stamp.kind, 0]);
    out.extend_from_slice(&narrays.to_le_bytes());
    out.extend_from_slice(&(header.len() as u32).to_le_bytes());
    for entry in &arrays.table {
        out.extend_from_slice(&entry.len.to_le_bytes());
        out.extend_from_slice(&entry.crc.to_le_bytes());
    }
    out.extend_from_slice(header);
    out.extend_from_slice(padding(out.len()));
    let crc = head_crc(out);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    Ok(len)
}

/// CRC of a frame's head: its length, then everything after the CRC.
fn head_crc(head: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&head[..4]), &head[8..])
}

/// The head of a frame, checked.
pub(super) struct Head {
    /// Bytes of the whole frame.
    pub(super) len: usize,
    /// Bytes before the first array.
    pub(super) arrays_at: usize,
    pub(super) stamp: Stamp,
}

/// Length of the whole frame at the start of `bytes` (which may go on) and of its head: that its parts fill it exactly is
/// checked, and no checksum.
fn outline(bytes: &[u8]) -> std::result::Result<(usize, usize), &'static str> {
    if bytes.len() < FRAME_HEADER as usize {
        return Err("the file ends within the record's head");
    }
    let (len, narrays) = (u32_at(bytes, 0) as usize, narrays(bytes));
    let arrays_at = head_len(u32_at(bytes, 28) as usize, narrays);
    if len < FRAME_HEADER as usize || len % 8 != 0 || arrays_at > len as u64 {
        return Err("the record's length is impossible");
    }
    let head = bytes.get(..arrays_at as usize).ok_or("the file ends within the record")?;
    let total = (0..narrays).map(|i| align(u64::from(entry(head, i).len))).sum::<u64>();
    if arrays_at + total != len as u64 {
        return Err("the parts do not fit the record's length");
    }
    Ok((len, head.len()))
}

/// Bytes that a checksum of the head at the start of `bytes` reads, or None where there can be none.
pub(super) fn checksummed(bytes: &[u8]) -> Option<u64> {
    outline(bytes).ok().map(|(_, arrays_at)| arrays_at as u64)
}

/// Checks the head of the frame at the start of `bytes` (which may go on) without trusting any of it.
pub(super) fn parse_head(bytes: &[u8]) -> std::result::Result<Head, &'static str> {
    let (len, arrays_at) = outline(bytes)?;
    let head = &bytes[..arrays_at];
    if u32_at(head, 4) != head_crc(head) {
        return Err("the checksum does not match");
    }
    Ok(Head { len, arrays_at, stamp: stamp(head) })
}

/// Checks the frame at the start of `bytes`, its arrays too.
pub(super) fn parse(bytes: &[u8]) -> std::result::Result<Head, &'static str> {
    let head = parse_head(bytes)?;
    let frame = bytes.get(..head.len).ok_or("the file ends within the record")?;
    let mut at = head.arrays_at;
    for i in 0..narrays(frame) {
        let entry = entry(frame, i);
        if crc32c::crc32c(&frame[at..at + entry.len as usize]) != entry.crc {
            return Err("the checksum of an array does not match");
        }
        at += align(u64::from(entry.len)) as usize;
    }
    Ok(head)
}

pub(super) fn stamp(frame: &[u8]) -> Stamp {
    Stamp { lsn: u64_at(frame, 8), durable: u64_at(frame, 16), kind: frame[24] }
}

pub(super) fn narrays(frame: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([frame[26], frame[27]]))
}

pub(super) fn entry(frame: &[u8], index: usize) -> Entry {
    let at = FRAME_HEADER as usize + 8 * index;
    Entry { len: u32_at(frame, at), crc: u32_at(frame, at + 4) }
}
