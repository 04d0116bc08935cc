//! The end of the last file after a crash: what is torn is dropped durably, what was acknowledged never.

use std::fs;

use _rust_buffer::{
    error::StoreError,
    log::{Durability, FORMAT, LogOptions},
};

use crate::*;

#[test]
fn what_was_written_survives_without_closing() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    for i in 0..30 {
        append(&log, &record(i));
    }
    let copy = crash(dir.path());
    let (after, seen) = open(copy.path());
    assert_eq!(seen.records(), records(0..30));
    append(&after, &record(30));
    after.close().unwrap();
    assert_eq!(open(copy.path()).1.records(), records(0..31));
}

#[test]
fn truncation_at_every_byte_keeps_exactly_the_whole_records() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let ends: Vec<u64> = (0..8).map(|i| end(&append(&log, &record(i)).1)).collect();
    for len in 0..=ends[7] + 40 {
        let copy = crash(dir.path());
        cut(&file(copy.path(), 1), len);
        let (after, seen) = open(copy.path());
        let whole = ends.iter().filter(|&&end| end <= len).count();
        assert_eq!(seen.records(), records(0..whole), "cut at {len}");
        assert_eq!(append(&after, &record(whole)).0, whole as u64 + 1);
        after.close().unwrap();
        drop(after);
        assert_eq!(open(copy.path()).1.records(), records(0..whole + 1));
    }
}

#[test]
fn a_tail_cut_at_every_byte_and_then_zeros_or_garbage_is_truncated_durably() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let written = fill(&log, 0..6);
    let last = written[5];
    for at in last.offset..end(&last) {
        for garbage in [0u8, 0xa5] {
            let copy = crash(dir.path());
            let path = file(copy.path(), 1);
            // As if the last record and all behind it had not reached the disk whole.
            let rest = vec![garbage; (fs::metadata(&path).unwrap().len() - at) as usize];
            overwrite(&path, at, &rest);
            let (after, seen) = open(copy.path());
            let whole = seen.frames.len();
            assert!(whole == 5 || whole == 6, "all but its last padding may be there");
            assert_eq!(seen.records(), records(0..whole), "cut at {at}");
            assert_eq!(after.lsn(), whole as u64);
            let raw = fs::read(&path).unwrap();
            let tail = (end(&written[whole - 1]) + HEADER) as usize;
            assert!(raw[tail..].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn damage_to_acknowledged_records_is_refused_without_closing_too() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let locations = fill(&log, 0..4);
    assert!(log.wait_durable(log.lsn(), PATIENCE).unwrap());
    let copy = crash(dir.path());
    flip(&file(copy.path(), 1), (locations[3].offset + 20) * 8);
    assert_eq!(damage(copy.path()), (name(1), locations[3].offset));
    // A page of zeros where a durable record was is not the end of the log.
    let copy = crash(dir.path());
    overwrite(&file(copy.path(), 1), locations[1].offset, &vec![0; locations[1].len as usize]);
    assert_eq!(damage(copy.path()), (name(1), locations[1].offset));
}

#[test]
fn power_loss_may_drop_an_unsynced_page_before_one_that_was_kept() {
    // Nothing but rotation syncs at level `Os`, so no record says that an earlier one was on disk.
    let dir = scratch();
    let (log, _) = open_with(dir.path(), LogOptions { durability: Durability::Os, ..SMALL });
    let batch = fill(&log, 0..6);
    assert_eq!(log.durable_lsn(), 6);
    let copy = crash(dir.path());
    overwrite(&file(copy.path(), 1), batch[2].offset, &vec![0; batch[2].len as usize]);
    let (after, seen) = open(copy.path());
    assert_eq!(seen.records(), records(0..2));
    append(&after, &record(9));
    after.close().unwrap();
    drop(after);
    assert_eq!(open(copy.path()).1.records(), vec![record(0), record(1), record(9)]);
    // Once they are synced, the same loss is damage.
    log.write_snapshot(log.snapshot_position(), b"").unwrap();
    let copy = crash(dir.path());
    overwrite(&file(copy.path(), 1), batch[2].offset, &vec![0; batch[2].len as usize]);
    assert_eq!(damage(copy.path()), (name(1), batch[2].offset));
}

#[test]
fn a_torn_creation_of_the_newest_file_falls_back_to_the_one_before() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let mut n = 0;
    while log.position().offset < HEADER + TINY.file_bytes {
        append(&log, &record(n));
        n += 1;
    }
    assert!(log.wait_durable(n as u64, PATIENCE).unwrap());
    let before = crash(dir.path());
    append(&log, &record(n));
    let second = fs::read(file(dir.path(), 2)).unwrap();
    for whole in 0..=HEADER as usize {
        for len in [whole, second.len()] {
            let copy = crash(before.path());
            let mut torn = second[..len].to_vec();
            torn[whole..].fill(0);
            fs::write(file(copy.path(), 2), torn).unwrap();
            let (after, seen) = open_with(copy.path(), TINY);
            // The header may end in zeros of its own.
            let kept = second[whole..HEADER as usize].iter().all(|&byte| byte == 0) && len >= HEADER as usize;
            assert_eq!(after.position().file, if kept { 2 } else { 1 }, "{whole} bytes of {len}");
            assert_eq!(file(copy.path(), 2).exists(), kept);
            assert_eq!(seen.records(), records(0..n));
            assert_eq!(append(&after, &record(n)).0, n as u64 + 1);
            drop(after);
            assert_eq!(open(copy.path()).1.records(), records(0..n + 1));
        }
    }
}

#[test]
fn a_file_with_records_in_it_never_counts_as_a_torn_creation() {
    let dir = scratch();
    let locations = filled(dir.path(), 12, TINY);
    let last = locations[11].file;
    assert!(last > 1);
    overwrite(&file(dir.path(), last), 0, &[0; 20]);
    assert_eq!(damage(dir.path()), (name(last), 0));
    assert!(file(dir.path(), last).exists());
}

#[test]
fn another_format_version_is_refused() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    append(&log, &record(1));
    log.write_snapshot(log.position(), b"snapshot").unwrap();
    log.close().unwrap();
    for (name, version) in
        [name(1), "index".to_owned()].into_iter().flat_map(|name| [(name.clone(), 2), (name, FORMAT + 1)])
    {
        let copy = crash(dir.path());
        let path = copy.path().join(name);
        let mut raw = fs::read(&path).unwrap();
        raw[8..12].copy_from_slice(&u32::to_le_bytes(version));
        let crc = crc32c::crc32c_append(crc32c::crc32c(&raw[..12]), &raw[16..32]);
        raw[12..16].copy_from_slice(&crc.to_le_bytes());
        fs::write(&path, &raw).unwrap();
        let refused = refusal(copy.path());
        assert!(
            matches!(refused, StoreError::Version { found, supported: FORMAT, path: p } if (found, &p) == (version, &path))
        );
        assert_eq!(fs::read(&path).unwrap(), raw);
    }
}
