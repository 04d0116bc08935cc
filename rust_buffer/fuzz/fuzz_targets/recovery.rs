//! Opening a log made of arbitrary bytes and of arbitrary well-formed frames: never a panic, bounded in memory and
//! time, and what opens once opens again with the same records.
#![no_main]

use std::{
    iter::once,
    sync::{Arc, Once},
};

use _rust_buffer::{
    log::{Arrays, Durability, FORMAT, Frame, Log, LogOptions, Lsn, Memory, Replay, Storage},
    state::State,
    store::arrays::read_prompt,
};
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    files: Vec<Vec<Piece<'a>>>,
    first_file: u8,
    snapshot: Option<Vec<Piece<'a>>>,
}

/// Something in a file. Checksums of what has some are right.
#[derive(Debug, Arbitrary)]
enum Piece<'a> {
    Header { number: Option<u32>, first: u64 },
    Frame { lsn: u64, durable: u64, kind: u8, header: &'a [u8], arrays: Vec<&'a [u8]>, damage: Option<(u8, u8)> },
    Next { unsynced: u8, header: &'a [u8], arrays: Vec<&'a [u8]>, damage: Option<(u8, u8)> },
    Mark { behind: i8 },
    Zeros(u8),
    Raw(&'a [u8]),
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn file_header(number: u32, first: u64) -> Vec<u8> {
    let mut bytes =
        [b"PMDFLOW\0", &FORMAT.to_le_bytes()[..], &[0; 4], &number.to_le_bytes(), &[0; 4], &first.to_le_bytes()];
    let crc = crc32c::crc32c(&[&bytes[..2].concat()[..], &bytes[3..].concat()].concat()).to_le_bytes();
    bytes[2] = &crc;
    bytes.concat()
}

fn frame(lsn: u64, durable: u64, kind: u8, header: &[u8], arrays: &[&[u8]]) -> Vec<u8> {
    let (mut head, mut tail) = (vec![0; 8], Vec::new());
    head.extend([lsn.to_le_bytes(), durable.to_le_bytes()].concat());
    head.extend([kind, 0]);
    head.extend((arrays.len() as u16).to_le_bytes());
    head.extend((header.len() as u32).to_le_bytes());
    for array in arrays {
        head.extend((array.len() as u32).to_le_bytes());
        head.extend(crc32c::crc32c(array).to_le_bytes());
        tail.extend_from_slice(array);
        pad(&mut tail);
    }
    head.extend_from_slice(header);
    pad(&mut head);
    let len = ((head.len() + tail.len()) as u32).to_le_bytes();
    head[..4].copy_from_slice(&len);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&len), &head[8..]).to_le_bytes();
    head[4..8].copy_from_slice(&crc);
    head.extend(tail);
    head
}

/// The bytes of a file whose name says `number`; `next` is the LSN that belongs next.
fn bytes(pieces: &[Piece<'_>], number: u32, next: &mut u64) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces.iter().take(64) {
        let (start, mut damaged) = (out.len(), None);
        match piece {
            Piece::Header { number: other, first } => {
                *next = if *first == 0 { *next } else { *first };
                out.extend(file_header(other.unwrap_or(number), *next));
            }
            Piece::Frame { lsn, durable, kind, header, arrays, damage } => {
                damaged = *damage;
                out.extend(frame(*lsn, *durable, *kind, header, arrays));
            }
            Piece::Next { unsynced, header, arrays, damage } => {
                damaged = *damage;
                let durable = next.saturating_sub(u64::from(*unsynced) + 1);
                out.extend(frame(*next, durable, 1, header, arrays));
                *next = next.wrapping_add(1);
            }
            Piece::Mark { behind } => {
                let lsn = next.wrapping_sub(1).wrapping_add_signed(i64::from(*behind));
                out.extend(frame(lsn, lsn, 255, &[], &[]));
            }
            Piece::Zeros(count) => out.resize(out.len() + 8 * usize::from(*count), 0),
            Piece::Raw(raw) => out.extend_from_slice(raw),
        }
        if let Some((at, bits)) = damaged {
            let len = out.len() - start;
            out[start + usize::from(at) % len] ^= bits;
        }
    }
    out
}

#[derive(Default, PartialEq, Debug)]
struct Seen {
    snapshot: Option<Vec<u8>>,
    records: Vec<(Lsn, u8, Vec<u8>, usize)>,
}

impl Replay for Seen {
    fn snapshot(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.snapshot = Some(bytes.to_vec());
        Ok(())
    }

    fn record(&mut self, frame: &Frame) -> Result<(), String> {
        assert!(self.records.last().is_none_or(|last| last.0 + 1 == frame.lsn()));
        self.records.push((frame.lsn(), frame.kind(), frame.header().to_vec(), frame.arrays().len()));
        Ok(())
    }
}

fn open(storage: &Arc<dyn Storage>) -> Option<(Log, Seen)> {
    let options = LogOptions { durability: Durability::Os, file_bytes: 4096, ..LogOptions::default() };
    let mut seen = Seen::default();
    Log::open(Arc::clone(storage), options, &mut seen).ok().map(|log| (log, seen))
}

/// A log without damage opens, or nothing of what follows is reached.
fn plain_input_opens() {
    let record = Piece::Next { unsynced: 1, header: b"header", arrays: vec![b"abc", b"12345678"], damage: None };
    let pieces = [Piece::Header { number: None, first: 0 }, record, Piece::Mark { behind: 0 }];
    let storage: Arc<dyn Storage> = Arc::new(Memory::default());
    storage.replace("0000000001.log", &mut once(Ok(bytes(&pieces, 1, &mut 1)))).unwrap();
    let (_, seen) = open(&storage).expect("a plain input opens");
    assert_eq!(seen.records, [(1, 1, b"header".to_vec(), 2)]);
}

static PLAIN: Once = Once::new();

fuzz_target!(|input: Input<'_>| {
    PLAIN.call_once(plain_input_opens);
    let storage: Arc<dyn Storage> = Arc::new(Memory::default());
    let mut next = 1;
    for (pieces, offset) in input.files.iter().take(6).zip(0..) {
        let number = u32::from(input.first_file) + offset;
        storage.replace(&format!("{number:010}.log"), &mut once(Ok(bytes(pieces, number, &mut next)))).unwrap();
    }
    if let Some(pieces) = &input.snapshot {
        storage.replace("index", &mut once(Ok(bytes(pieces, 1, &mut next)))).unwrap();
    }
    // The store's own reader of records and of prompts: any answer but a panic.
    let mut state = State::default();
    if let Ok(log) = Log::read(Arc::clone(&storage), &mut state) {
        state.groups.values().for_each(|group| drop(read_prompt(&log, group.location)));
    }
    let mut before = Seen::default();
    let read = Log::read(Arc::clone(&storage), &mut before);
    let Some((log, seen)) = open(&storage) else { return };
    if let Ok(reader) = read {
        assert_eq!((reader.lsn(), &before), (log.lsn(), &seen), "reading and opening differ");
    }
    let arrays = Arrays::of(&[b"abc"]);
    let (lsn, location) = log.append(1, b"more", &arrays).unwrap();
    assert_eq!(log.frame(location).unwrap().arrays(), [b"abc"]);
    log.close().unwrap();
    let (_, again) = open(&storage).expect("what opened once opens again");
    assert_eq!(again.snapshot, seen.snapshot);
    assert_eq!(again.records[..seen.records.len()], seen.records);
    assert_eq!(again.records[seen.records.len()..], [(lsn, 1, b"more".to_vec(), 1)]);
});
