//! The bytes of file headers and frames; the module above describes them.

use std::path::Path;

use super::Lsn;
use crate::error::{Result, StoreError};

const MAGIC: [u8; 8] = *b"PMDFLOW\0";
const FORMAT: u32 = 1;
pub(super) const FILE_HEADER: u64 = 32;
pub(super) const FRAME_HEADER: u64 = 32;
pub(super) const SNAPSHOT: u8 = 0;
pub(super) const MARK: u8 = 255;

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(super) const fn align(len: u64) -> u64 {
    len.next_multiple_of(8)
}

/// CRC of a frame: its length, then everything after the CRC.
fn frame_crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..])
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

fn file_header_crc(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..FILE_HEADER as usize])
}

/// Checks the header of file `number`; its first LSN, or None when it is not whole.
pub(super) fn read_file_header(path: &Path, bytes: &[u8], number: u32) -> Result<Option<Lsn>> {
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
pub(super) struct Stamp {
    pub(super) lsn: Lsn,
    pub(super) durable: Lsn,
    pub(super) kind: u8,
}

/// Writes one frame into `out`, replacing what it held; its length fits `u32`.
pub(super) fn encode(out: &mut Vec<u8>, stamp: Stamp, header: &[u8], arrays: &[&[u8]]) -> Result<()> {
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
    Ok(())
}

/// The frame that begins a file: all before it is durable.
pub(super) fn encode_snapshot(lsn: Lsn, snapshot: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    encode(&mut frame, Stamp { lsn, durable: lsn - 1, kind: SNAPSHOT }, &[], &[snapshot])?;
    Ok(frame)
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Checks the frame at the start of `bytes` (which may go on) without trusting any of it; returns length and stamp.
pub(super) fn parse(bytes: &[u8]) -> std::result::Result<(usize, Stamp), &'static str> {
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

pub(super) fn stamp(frame: &[u8]) -> Stamp {
    Stamp { lsn: u64_at(frame, 8), durable: u64_at(frame, 16), kind: frame[24] }
}
