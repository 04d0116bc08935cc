//! Decoding arbitrary bytes as a worker's batch and as a record: never a panic, bounded in memory and time, and what is
//! decoded is what it encodes to.
#![no_main]

use _rust_buffer::{state::codec, wire::Batch};
use libfuzzer_sys::fuzz_target;

fn record(bytes: &[u8]) {
    let Some((kind, header)) = bytes.split_first() else { return };
    let Ok(record) = codec::decode(*kind, header) else { return };
    let encoded = codec::encode(&record).unwrap();
    assert_eq!(codec::encode(&codec::decode(record.kind(), &encoded).unwrap()).unwrap(), encoded);
}

fn batch(bytes: &[u8]) {
    let Ok(batch) = Batch::decode(bytes) else { return };
    let mut end = 0;
    for item in &batch.items {
        assert!(item.count == 0 || item.range.start == end);
        assert_eq!(item.entries.len(), if item.count == 0 { 0 } else { 1 + item.extra.len() });
        let len: usize = item.entries.iter().map(|entry| (entry.len as usize).next_multiple_of(8)).sum();
        assert_eq!(batch.payload[item.range.clone()].len(), len);
        let _ = item.end();
        end = item.range.end;
    }
    assert_eq!(end, batch.payload.len());
}

fuzz_target!(|bytes: &[u8]| {
    // One input in three kinds: what follows the first byte, and for batches also under a right head.
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => batch(rest),
        1 => {
            let cut = usize::from(*kind) * rest.len() / 256;
            let mut whole = [&b"PMDB"[..], &[1, 0, 0, 0], &(cut as u32).to_le_bytes(), &[0; 4], &rest[..cut]].concat();
            whole.resize(whole.len().next_multiple_of(8), 0);
            whole.extend_from_slice(&rest[cut..]);
            batch(&whole);
        }
        _ => record(rest),
    }
});
