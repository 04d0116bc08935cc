//! The file of the newest snapshot: a header, and a frame for each of its parts; the first says how many there are.

use std::io;

use super::{
    Location, Position,
    directory::SNAPSHOT_NAME,
    format::{
        Arrays, FILE_HEADER, Head, SNAPSHOT, Stamp, encode, file_header, parse, read_file_header, u32_at, u64_at,
    },
    reader::Frame,
    recovery::Replay,
    storage::Storage,
};
use crate::error::{Result, StoreError};

/// Replaces it by `count` parts, each of which is asked for once those before it are on disk.
pub(super) fn write_snapshot(
    storage: &dyn Storage, position: Position, count: u64, parts: &mut dyn Iterator<Item = Result<Vec<u8>>>,
) -> Result<()> {
    let framed = |(number, part): (u64, Result<Vec<u8>>)| {
        let frame = part.and_then(|part| frame(position, number, count, &part));
        frame.map_err(|error| io::Error::other(error.to_string()))
    };
    let replaced = storage.replace(SNAPSHOT_NAME, &mut (0..count).zip(parts).map(framed));
    replaced.map_err(|e| StoreError::io(storage.path_of(SNAPSHOT_NAME), e))
}

/// The bytes of part `number`; before the first one those of the file's header.
fn frame(position: Position, number: u64, count: u64, part: &[u8]) -> Result<Vec<u8>> {
    let header = match (number, count) {
        (0, 1) => position.offset.to_le_bytes().to_vec(),
        (0, _) => [position.offset, count].map(u64::to_le_bytes).concat(),
        _ => number.to_le_bytes().to_vec(),
    };
    let (mut head, arrays, lsn) = (Vec::new(), Arrays::of(&[part]), position.next - 1);
    encode(&mut head, Stamp { lsn, durable: lsn, kind: SNAPSHOT }, &header, &arrays)?;
    let mut bytes = Vec::with_capacity(head.len() + part.len() + 64);
    if number == 0 {
        bytes.extend_from_slice(&file_header(position.file, position.next));
    }
    bytes.extend_from_slice(&head);
    arrays.bytes().iter().for_each(|piece| bytes.extend_from_slice(piece));
    Ok(bytes)
}

/// Gives the parts to `replay`; the position where the snapshot stands.
pub(super) fn read_snapshot(storage: &dyn Storage, replay: &mut dyn Replay) -> Result<Position> {
    let path = storage.path_of(SNAPSHOT_NAME);
    let read = || {
        let medium = storage.open(SNAPSHOT_NAME, false)?;
        medium.read(0, medium.len()? as usize)
    };
    let bytes = read().map_err(|e| StoreError::io(&path, e))?;
    let damaged = |detail: &str| StoreError::corrupt(&path, 0, detail);
    let bytes = bytes.ok_or_else(|| damaged("it shrank while it was read"))?;
    let number = if bytes.len() < FILE_HEADER as usize { 0 } else { u32_at(&bytes, 16) };
    let Some(next) = read_file_header(&path, &bytes, number)? else {
        return Err(damaged("the header is not readable"));
    };
    let mut at = FILE_HEADER as usize;
    let mut part = || -> Result<Frame> {
        let Head { len, stamp, .. } = parse(bytes.get(at..).unwrap_or_default()).map_err(damaged)?;
        if stamp.kind != SNAPSHOT || stamp.lsn.checked_add(1) != Some(next) || number == 0 {
            return Err(damaged("it is not the snapshot that its header names"));
        }
        let location = Location { file: 0, offset: at as u64, len: len as u32 };
        let frame = Frame::new(bytes.slice(at, len), location);
        at += len;
        Ok(frame)
    };
    let first = part()?;
    let numbers: Vec<u64> = first.header().chunks_exact(8).map(|word| u64_at(word, 0)).collect();
    let (offset, count) = match numbers[..] {
        [offset] if first.header().len() == 8 => (offset, 1),
        [offset, count] if first.header().len() == 16 => (offset, count),
        _ => return Err(damaged("it has no position")),
    };
    replay.snapshot(first.array(0).unwrap_or_default()).map_err(|detail| damaged(&detail))?;
    for number in 1..count {
        let part = part()?;
        if part.header() != number.to_le_bytes() {
            return Err(damaged("a part of it is missing"));
        }
        replay.snapshot_part(part.array(0).unwrap_or_default()).map_err(|detail| damaged(&detail))?;
    }
    Ok(Position { file: number, offset, next })
}
