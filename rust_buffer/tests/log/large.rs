//! Large appends, torn: whatever is left of them is never taken for records.

use std::{iter::once, sync::Arc};

use _rust_buffer::log::{Arrays, Durability, Log, LogOptions, Memory, Storage};

use crate::{
    Record, Seen, record,
    tokens::{VOCABULARIES, run},
};

const PAGE: usize = 4096;
const ARRAYS: usize = 64;
const OPTIONS: LogOptions =
    LogOptions { durability: Durability::Os, file_bytes: 16 << 20, sync_interval: std::time::Duration::MAX };

fn open(bytes: &[u8]) -> Result<Seen, String> {
    let storage = Memory::default();
    storage.replace("0000000001.log", &mut once(Ok(bytes.to_vec()))).unwrap();
    let mut seen = Seen::default();
    Log::open(Arc::new(storage), OPTIONS, &mut seen).map(|_| seen).map_err(|error| error.to_string())
}

/// A log file: some small records, and one of `len` bytes from byte `.1` on that nothing calls durable.
fn written(len: usize, vocabulary: u64) -> (Vec<u8>, usize, Vec<Record>) {
    let storage: Arc<dyn Storage> = Arc::new(Memory::default());
    let log = Log::open(Arc::clone(&storage), OPTIONS, &mut Seen::default()).unwrap();
    let mut records: Vec<Record> = (0..40).map(record).collect();
    let arrays = (0..ARRAYS).map(|i| run(len / ARRAYS / 8, vocabulary, (len + i) as u64)).collect();
    records.push((4, b"large".to_vec(), arrays));
    let mut last = 0;
    for (kind, header, arrays) in &records {
        let slices: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
        last = log.append(*kind, header, &Arrays::of(&slices)).unwrap().1.offset as usize;
    }
    let medium = storage.open("0000000001.log", false).unwrap();
    let bytes = medium.copy(medium.len().unwrap()).unwrap().to_vec();
    (bytes, last, records)
}

/// Every `step`th page of what `written` gave is lost, then everything behind it.
fn lost_pages_open(len: usize, vocabulary: u64, step: usize) {
    let (bytes, last, records) = written(len, vocabulary);
    let mut opened = 0;
    for page in (last / PAGE..bytes.len().div_ceil(PAGE)).step_by(step) {
        let (from, to) = ((page * PAGE).max(last), bytes.len().min((page + 1) * PAGE));
        let mut torn = bytes.clone();
        torn[from..to].fill(0);
        for torn in [&torn, &bytes[..from]] {
            let seen = open(torn).unwrap();
            let whole = torn == bytes;
            assert_eq!(seen.records(), records[..40 + usize::from(whole)], "page {page}");
            opened += 1;
        }
    }
    assert!(opened >= 2 * (len / PAGE / step));
}

#[test]
fn every_lost_page_of_a_large_append_opens() {
    let nightly = std::env::var_os("PROPTEST_CASES").is_some();
    for vocabulary in VOCABULARIES {
        lost_pages_open(64 << 10, vocabulary, if nightly { 1 } else { 3 });
        lost_pages_open(4 << 20, vocabulary, if nightly { 1 } else { 499 });
    }
}

#[test]
fn a_record_in_a_payload_counts_only_if_it_can_be_there() {
    let (mut bytes, last, records) = written(64 << 10, VOCABULARIES[0]);
    // The whole file in the payload of a torn record: its frames are older, none of them can be behind it.
    let copy = bytes[..last].to_vec();
    bytes[last + 4] ^= 1;
    let inside = (last + 8192).next_multiple_of(8);
    bytes[inside..inside + copy.len()].copy_from_slice(&copy);
    assert_eq!(open(&bytes).unwrap().records(), records[..40]);
    // And one that says that the torn record was durable, of an LSN that cannot have come so soon, nor so late.
    for (lsn, refused) in [(40, false), (41, true), (60, true), (41 + 8192 / 32, true), (90_000, false)] {
        let frame = mark(lsn);
        bytes[inside..inside + frame.len()].copy_from_slice(&frame);
        assert_eq!(open(&bytes).is_err(), refused, "LSN {lsn}");
    }
}

#[test]
fn a_payload_that_looks_like_records_is_not_looked_at_behind_a_whole_head() {
    let (mut bytes, last, records) = written(1 << 20, VOCABULARIES[0]);
    // Length, checksum, LSN, stamp, kind and header length of a record, as token ids of a period of 8: to tell that it
    // is none takes a checksum of 100 KB, at every 32nd byte.
    let ids = [100_032_u32, 777, 60, 0, 50, 0, 198, 100_000].map(u32::to_le_bytes).concat();
    let (first, end) = ((last + 8192).next_multiple_of(32), last + (1 << 20));
    for place in bytes[first..end].chunks_exact_mut(32) {
        place.copy_from_slice(&ids);
    }
    assert_eq!(open(&bytes).unwrap().records(), records[..40]);
}

/// A mark of `lsn`, as another log would have it.
fn mark(lsn: u64) -> [u8; 32] {
    let mut frame = [0; 32];
    frame[0] = 32;
    frame[8..16].copy_from_slice(&lsn.to_le_bytes());
    frame[16..24].copy_from_slice(&lsn.to_le_bytes());
    frame[24] = 255;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..]);
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    frame
}
