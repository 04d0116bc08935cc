//! The log's contract, point by point, on real files.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use _rust_buffer::{
    error::StoreError,
    log::{Durability, Location, Log, LogOptions, Recovery},
};
use proptest::prelude::*;
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(10);
const SMALL: LogOptions = LogOptions { durability: Durability::Group, file_bytes: 4096 };

/// Kind, header, arrays.
type Record = (u8, Vec<u8>, Vec<Vec<u8>>);

fn record(i: usize) -> Record {
    let bytes = |len: usize, salt: usize| (0..len).map(|j| ((i * 31 + j * 7 + salt) % 251) as u8 + 1).collect();
    ((i % 5 + 1) as u8, bytes(i % 11 + 1, 1), (0..i % 4).map(|a| bytes(i * 3 + a * 5, a)).collect())
}

fn append(log: &Log, record: &Record) -> (u64, Location) {
    let arrays: Vec<&[u8]> = record.2.iter().map(Vec::as_slice).collect();
    log.append(record.0, &record.1, &arrays).unwrap()
}

fn records(recovery: &Recovery) -> Vec<Record> {
    let read = |f: _rust_buffer::log::Frame| {
        (f.kind(), f.header().to_vec(), f.arrays().into_iter().map(<[u8]>::to_vec).collect())
    };
    recovery.frames().map(read).collect()
}

fn open(dir: &Path) -> (Log, Recovery) {
    Log::open(Some(dir), SMALL).map_err(|e| e.to_string()).unwrap()
}

fn refusal(dir: &Path) -> StoreError {
    Log::open(Some(dir), SMALL).err().expect("the log opened")
}

fn file(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:010}.log"))
}

/// A directory in memory where there is one: most of these tests are about bytes, not about the disk.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

/// A copy of what is on disk now, as `kill -9` would leave it.
fn crash(dir: &Path) -> TempDir {
    let copy = scratch();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

fn flip(path: &Path, bit: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8).unwrap();
}

/// A closed log of `n` records in `dir`, and where they are.
fn filled(dir: &Path, n: usize) -> Vec<Location> {
    let (log, _) = open(dir);
    let locations = (0..n).map(|i| append(&log, &record(i)).1).collect();
    log.close().unwrap();
    locations
}

#[test]
fn records_come_back_from_every_place_and_level() {
    for durability in [Durability::Os, Durability::Group, Durability::Always] {
        let dir = TempDir::new().unwrap();
        for dir in [None, Some(dir.path())] {
            let (log, recovery) = Log::open(dir, LogOptions { durability, file_bytes: 512 }).unwrap();
            assert!(recovery.snapshot().is_empty() && recovery.frames().next().is_none());
            let mut expected = Vec::new();
            for i in 0..200 {
                let (lsn, location) = append(&log, &record(i));
                expected.push((lsn, location, record(i)));
                if log.should_rotate() {
                    log.rotate(format!("snapshot {i}").as_bytes()).unwrap();
                }
            }
            assert!(log.current_file() > 3);
            assert!(log.wait_durable(log.lsn(), SECOND).unwrap());
            for (lsn, location, record) in &expected {
                let frame = log.frame(*location).unwrap();
                assert_eq!((frame.lsn(), frame.kind(), frame.header()), (*lsn, record.0, &record.1[..]));
                assert_eq!(frame.arrays(), record.2);
                assert_eq!(frame.num_arrays(), record.2.len());
                assert!(frame.array(record.2.len()).is_none());
                assert!(frame.arrays().iter().all(|a| a.as_ptr().align_offset(8) == 0));
            }
        }
    }
}

#[test]
fn lsns_are_dense_across_files_and_openings() {
    let dir = scratch();
    let mut next = 2;
    for opening in 0..4 {
        let (log, recovery) = open(dir.path());
        assert_eq!(log.lsn(), next - 1);
        assert_eq!(log.durable_lsn(), next - 1);
        assert_eq!(recovery.snapshot(), if opening == 0 { vec![] } else { vec![opening; 9] });
        assert_eq!(records(&recovery), (0..if opening == 0 { 0 } else { 3 }).map(record).collect::<Vec<_>>());
        assert!((0..5).all(|i| append(&log, &record(i)).0 == next + i as u64));
        log.rotate(&[opening + 1; 9]).unwrap();
        assert!((0..3).all(|i| append(&log, &record(i)).0 == next + 6 + i as u64));
        next += 9;
        log.close().unwrap();
    }
}

#[test]
fn a_record_larger_than_the_file_is_read_while_the_file_grows() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let small = append(&log, &record(1)).1;
    assert_eq!(log.frame(small).unwrap().header(), record(1).1);
    let big = vec![7; 3 << 20];
    let location = log.append(1, b"big", &[&big, &big]).unwrap().1;
    assert_eq!(log.frame(location).unwrap().array(1).unwrap(), big);
    append(&log, &record(2));
    drop(log);
    let (log, recovery) = open(dir.path());
    assert_eq!(recovery.frames().nth(1).unwrap().array(0).unwrap(), big);
    assert_eq!(log.lsn(), 4);
}

#[test]
fn what_was_written_survives_without_closing() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    for i in 0..30 {
        append(&log, &record(i));
    }
    let copy = crash(dir.path());
    let (after, recovery) = open(copy.path());
    assert_eq!(records(&recovery), (0..30).map(record).collect::<Vec<_>>());
    append(&after, &record(30));
    after.close().unwrap();
    assert_eq!(records(&open(copy.path()).1).len(), 31);
}

#[test]
fn truncation_at_every_byte_keeps_exactly_the_whole_records() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let locations: Vec<_> = (0..8).map(|i| append(&log, &record(i)).1).collect();
    let ends: Vec<u64> = locations.iter().map(|l| l.offset + u64::from(l.len)).collect();
    for cut in 0..=ends[7] + 40 {
        let copy = crash(dir.path());
        OpenOptions::new().write(true).open(file(copy.path(), 1)).unwrap().set_len(cut).unwrap();
        let (after, recovery) = open(copy.path());
        let whole = ends.iter().filter(|&&end| end <= cut).count();
        assert_eq!(records(&recovery), (0..whole).map(record).collect::<Vec<_>>(), "cut at {cut}");
        assert_eq!(append(&after, &record(whole)).0, whole as u64 + 2);
        after.close().unwrap();
        drop((after, recovery));
        assert_eq!(records(&open(copy.path()).1).len(), whole + 1);
    }
}

#[test]
fn a_tail_cut_at_every_byte_and_then_zeros_or_garbage_is_truncated_durably() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let written: Vec<_> = (0..6).map(|i| append(&log, &record(i)).1).collect();
    let last = written[5];
    for cut in last.offset..last.offset + u64::from(last.len) {
        for garbage in [0u8, 0xa5] {
            let copy = crash(dir.path());
            let path = file(copy.path(), 1);
            // As if the last record and all behind it had not reached the disk whole.
            let rest = vec![garbage; (fs::metadata(&path).unwrap().len() - cut) as usize];
            OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&rest, cut).unwrap();
            let (after, recovery) = open(copy.path());
            let found = records(&recovery);
            let whole = if found.len() == 6 { 6 } else { 5 }; // the record may end in zeros of its own
            assert_eq!(found, (0..whole).map(record).collect::<Vec<_>>(), "cut at {cut}");
            assert_eq!(after.lsn(), whole as u64 + 1);
            let raw = fs::read(&path).unwrap();
            let tail = written[whole - 1].offset as usize + written[whole - 1].len as usize + 32;
            assert!(raw[tail..].iter().all(|&b| b == 0));
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_closed_log_is_refused_with_its_place() {
    let dir = scratch();
    let locations = filled(dir.path(), 8);
    let end = locations[7].offset + u64::from(locations[7].len);
    for byte in 0..end {
        let copy = crash(dir.path());
        flip(&file(copy.path(), 1), byte * 8 + byte % 8);
        let StoreError::Corrupt { path, offset, .. } = refusal(copy.path()) else { panic!("byte {byte}") };
        let place = locations.iter().map(|l| l.offset).filter(|&offset| offset <= byte).max();
        assert_eq!((path, offset), (file(copy.path(), 1), place.unwrap_or(if byte < 32 { 0 } else { 32 })));
    }
}

#[test]
fn damage_to_acknowledged_records_is_refused_without_closing_too() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let locations: Vec<_> = (0..4).map(|i| append(&log, &record(i)).1).collect();
    assert!(log.wait_durable(log.lsn(), SECOND).unwrap());
    let copy = crash(dir.path());
    flip(&file(copy.path(), 1), (locations[3].offset + 20) * 8);
    assert!(matches!(refusal(copy.path()), StoreError::Corrupt { offset, .. } if offset == locations[3].offset));
    // A page of zeros where a durable record was is not the end of the log.
    let copy = crash(dir.path());
    let zeros = vec![0; locations[1].len as usize];
    OpenOptions::new()
        .write(true)
        .open(file(copy.path(), 1))
        .unwrap()
        .write_all_at(&zeros, locations[1].offset)
        .unwrap();
    assert!(matches!(refusal(copy.path()), StoreError::Corrupt { offset, .. } if offset == locations[1].offset));
}

#[test]
fn power_loss_may_drop_an_unsynced_page_before_one_that_was_kept() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(dir.path());
    append(&log, &record(0));
    assert!(log.wait_durable(2, SECOND).unwrap());
    let batch: Vec<_> = (1..6).map(|i| append(&log, &record(i)).1).collect();
    let image = fs::read(file(dir.path(), 1)).unwrap();
    assert!(log.wait_durable(log.lsn(), SECOND).unwrap());
    // The image was taken while none or some of the batch was synced: judge by what it says itself.
    let copy = crash(dir.path());
    let mut torn = image.clone();
    torn[batch[1].offset as usize..][..batch[1].len as usize].fill(0);
    fs::write(file(copy.path(), 1), &torn).unwrap();
    let claims_durable = |at: usize| u64::from_le_bytes(image[at + 16..at + 24].try_into().unwrap()) >= 4;
    let later = batch[2..].iter().map(|l| l.offset as usize);
    let mark = batch[4].offset as usize + batch[4].len as usize;
    if later.chain([mark]).any(claims_durable) {
        assert!(matches!(refusal(copy.path()), StoreError::Corrupt { .. }));
    } else {
        let (after, recovery) = open(copy.path());
        assert_eq!(records(&recovery), vec![record(0), record(1)]);
        append(&after, &record(9));
        after.close().unwrap();
        drop((after, recovery));
        assert_eq!(records(&open(copy.path()).1), vec![record(0), record(1), record(9)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_never_panics_and_never_returns_wrong_data(
        closed in any::<bool>(),
        rotated in any::<bool>(),
        damage in prop::collection::vec((0u32..2, any::<u64>(), any::<u8>()), 1..4),
    ) {
        let dir = scratch();
        let (log, _) = open(dir.path());
        let mut expected: Vec<_> = (0..6).map(|i| (append(&log, &record(i)).1, record(i))).collect();
        if rotated {
            log.rotate(b"the snapshot").unwrap();
            expected.extend((6..10).map(|i| (append(&log, &record(i)).1, record(i))));
        }
        if closed {
            log.close().unwrap();
        }
        let copy = crash(dir.path());
        for (which, at, value) in damage {
            let path = file(copy.path(), if rotated { which + 1 } else { 1 });
            let f = OpenOptions::new().write(true).open(&path).unwrap();
            f.write_all_at(&[value], at % 1200).unwrap();
        }
        match Log::open(Some(copy.path()), SMALL) {
            Err(StoreError::Corrupt { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
            Ok((after, recovery)) => {
                let fallback = rotated && after.current_file() == 1;
                prop_assert!(!(fallback && closed));
                let base = if rotated && !fallback { 6 } else { 0 };
                let found = records(&recovery);
                prop_assert!(found.iter().eq(expected[base..].iter().map(|(_, r)| r).take(found.len())));
                for (location, record) in &expected {
                    if let Ok(frame) = after.frame(*location) {
                        prop_assert_eq!(frame.header(), &record.1[..]);
                        prop_assert_eq!(frame.arrays(), record.2.clone());
                    }
                }
            }
        }
    }

    #[test]
    fn hostile_files_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        keep in 0usize..400,
    ) {
        let dir = scratch();
        let locations = filled(dir.path(), 6);
        let mut image = fs::read(file(dir.path(), 1)).unwrap();
        image.truncate(keep);
        image.extend(bytes);
        fs::write(file(dir.path(), 1), image).unwrap();
        if let Ok((log, recovery)) = Log::open(Some(dir.path()), SMALL) {
            let found = records(&recovery);
            prop_assert!(found.iter().cloned().eq((0..found.len()).map(record)));
            for location in locations {
                let _ = log.frame(location);
            }
        }
    }

    #[test]
    fn any_location_is_answered_or_refused(file in 0u32..3, offset in any::<u64>(), small in 0u64..700, len in any::<u32>()) {
        let dir = scratch();
        let (log, _) = open(dir.path());
        for i in 0..6 {
            append(&log, &record(i));
        }
        for (offset, len) in [(offset, len), (small, len), (small, len % 200), (offset, len % 200)] {
            if let Ok(frame) = log.frame(Location { file, offset, len }) {
                prop_assert!(frame.lsn() <= 7);
            }
        }
    }
}

#[test]
fn a_torn_rotation_falls_back_to_the_file_before() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    for i in 0..5 {
        append(&log, &record(i));
    }
    assert!(log.wait_durable(6, SECOND).unwrap());
    let before = crash(dir.path());
    log.rotate(&[9; 100]).unwrap();
    let second = fs::read(file(dir.path(), 2)).unwrap();
    for cut in 0..(32 + 40 + 100) {
        let copy = crash(before.path());
        let mut torn = second.clone();
        torn[cut..].fill(0);
        fs::write(file(copy.path(), 2), &torn[..if cut % 2 == 0 { cut } else { torn.len() }]).unwrap();
        let (after, recovery) = open(copy.path());
        assert_eq!(after.current_file(), 1, "cut at {cut}");
        assert!(!file(copy.path(), 2).exists());
        assert_eq!(records(&recovery), (0..5).map(record).collect::<Vec<_>>());
        assert_eq!(append(&after, &record(5)).0, 7);
        after.rotate(b"again").unwrap();
        drop((after, recovery));
        assert_eq!(open(copy.path()).1.snapshot(), b"again");
    }
}

#[test]
fn a_completed_rotation_never_falls_back() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    append(&log, &record(0));
    log.rotate(&[9; 100]).unwrap();
    append(&log, &record(1));
    log.close().unwrap();
    for cut in [0, 31, 32, 60, 100] {
        let copy = crash(dir.path());
        OpenOptions::new().write(true).open(file(copy.path(), 2)).unwrap().set_len(cut).unwrap();
        assert!(matches!(refusal(copy.path()), StoreError::Corrupt { .. }), "cut at {cut}");
        assert!(file(copy.path(), 2).exists());
    }
    fs::remove_file(file(dir.path(), 1)).unwrap();
    assert_eq!(records(&open(dir.path()).1), vec![record(1)]);
    OpenOptions::new().write(true).open(file(dir.path(), 2)).unwrap().set_len(50).unwrap();
    assert!(matches!(refusal(dir.path()), StoreError::Corrupt { .. }));
}

#[test]
fn a_second_writer_is_refused_until_the_first_closes() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    assert!(matches!(refusal(dir.path()), StoreError::Locked { path } if path == dir.path().join("lock")));
    log.close().unwrap();
    let (second, _) = open(dir.path());
    assert!(matches!(refusal(dir.path()), StoreError::Locked { .. }));
    drop(second);
    open(dir.path());
}

#[test]
fn another_format_version_is_refused() {
    let dir = scratch();
    filled(dir.path(), 3);
    let path = file(dir.path(), 1);
    let mut raw = fs::read(&path).unwrap();
    raw[8..12].copy_from_slice(&2u32.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&raw[..12]), &raw[16..32]);
    raw[12..16].copy_from_slice(&crc.to_le_bytes());
    fs::write(&path, &raw).unwrap();
    assert!(matches!(refusal(dir.path()), StoreError::Version { found: 2, supported: 1, .. }));
    assert_eq!(fs::read(&path).unwrap(), raw);
}

#[test]
fn waiting_for_durability_ends() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(dir.path());
    assert!(matches!(log.wait_durable(2, SECOND), Err(StoreError::Conflict(_))));
    for i in 0..100 {
        let (lsn, _) = append(&log, &record(i));
        assert!(log.wait_durable(lsn, SECOND).unwrap());
        assert!(log.durable_lsn() >= lsn);
    }
    // Nobody waits: the sync thread does it on its own.
    let (lsn, _) = append(&log, &record(100));
    let start = Instant::now();
    while log.durable_lsn() < lsn {
        assert!(start.elapsed() < SECOND);
        std::thread::yield_now();
    }
}

#[test]
fn level_always_is_durable_when_append_returns() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(Some(dir.path()), LogOptions { durability: Durability::Always, ..SMALL }).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = log.clone();
            scope.spawn(move || {
                for i in 0..20 {
                    let (lsn, _) = append(&log, &record(thread * 20 + i));
                    assert!(log.durable_lsn() >= lsn);
                }
            });
        }
    });
    assert_eq!(log.lsn(), 81);
}

#[test]
fn threads_append_rotate_read_and_wait_together() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(dir.path());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = log.clone();
            scope.spawn(move || {
                for i in 0..300 {
                    let written = record(thread * 300 + i);
                    let (lsn, location) = append(&log, &written);
                    assert_eq!(log.frame(location).unwrap().arrays(), written.2);
                    if i % 50 == 0 {
                        assert!(log.wait_durable(lsn, SECOND).unwrap());
                    }
                    if thread == 0 && log.should_rotate() {
                        log.rotate(b"").unwrap();
                    }
                }
            });
        }
    });
    assert!(log.current_file() > 2);
    let (lsn, file) = (log.lsn(), log.current_file());
    drop(log);
    let (log, _) = open(dir.path());
    assert_eq!((log.lsn(), log.current_file()), (lsn, file));
}

#[test]
fn sealed_files_go_oldest_first_and_pinned_frames_stay() {
    for on_disk in [true, false] {
        let dir = scratch();
        let (log, _) = Log::open(on_disk.then_some(dir.path()), SMALL).unwrap();
        let mut locations = Vec::new();
        for i in 0..4 {
            locations.push(append(&log, &record(i + 5)).1);
            log.rotate(b"s").unwrap();
        }
        let pinned = log.frame(locations[0]).unwrap();
        let before = log.bytes();
        assert_eq!(log.remove_before(3).unwrap(), 2);
        assert_eq!(log.remove_before(3).unwrap(), 0);
        assert!(log.bytes() < before);
        assert_eq!(pinned.header(), record(5).1);
        assert!(matches!(log.frame(locations[1]), Err(StoreError::Corrupt { .. })));
        assert_eq!(log.frame(locations[2]).unwrap().header(), record(7).1);
        assert_eq!(log.remove_before(u32::MAX).unwrap(), 2);
        assert_eq!(append(&log, &record(1)).1.file, 5);
        assert_eq!(pinned.header(), record(5).1);
        drop(log);
        if on_disk {
            let files = fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(files, 2, "one log file and the lock");
            assert_eq!(records(&open(dir.path()).1), vec![record(1)]);
        }
    }
}

#[test]
fn sealed_files_are_read_after_reopening_and_damage_in_them_is_located() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let locations: Vec<_> = (0..5).map(|i| append(&log, &record(i)).1).collect();
    log.rotate(b"s").unwrap();
    let preallocated = fs::metadata(file(dir.path(), 1)).unwrap().len();
    assert!(preallocated < 1024, "a sealed file is trimmed to what it holds");
    drop(log);
    flip(&file(dir.path(), 1), (locations[2].offset + 25) * 8);
    let (log, _) = open(dir.path());
    for (i, location) in locations.iter().enumerate() {
        match log.frame(*location) {
            Ok(frame) => assert_eq!(frame.arrays(), record(i).2),
            Err(StoreError::Corrupt { offset, .. }) => assert_eq!((i, offset), (2, location.offset)),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_failure_poisons_the_log_and_a_closed_one_refuses() {
    let dir = scratch();
    let path = dir.path().join("store");
    let (log, _) = open(&path);
    append(&log, &record(1));
    assert!(log.wait_durable(2, SECOND).unwrap());
    fs::remove_dir_all(&path).unwrap();
    assert!(matches!(log.rotate(b"s"), Err(StoreError::Io { .. })));
    assert!(matches!(log.append(1, b"", &[]), Err(StoreError::Poisoned { .. })));
    assert!(matches!(log.rotate(b"s"), Err(StoreError::Poisoned { .. })));
    assert!(log.wait_durable(2, SECOND).unwrap());

    let (log, _) = open(&path);
    let (lsn, location) = append(&log, &record(1));
    log.close().unwrap();
    log.close().unwrap();
    assert!(matches!(log.append(1, b"", &[]), Err(StoreError::Closed)));
    assert!(matches!(log.rotate(b""), Err(StoreError::Closed)));
    assert!(log.wait_durable(lsn, SECOND).unwrap());
    assert_eq!(log.frame(location).unwrap().header(), record(1).1);
}

#[test]
fn the_logs_own_kinds_and_too_many_arrays_are_refused() {
    let (log, _) = Log::open(None, SMALL).unwrap();
    assert!(matches!(log.append(0, b"", &[]), Err(StoreError::Conflict(_))));
    assert!(matches!(log.append(255, b"", &[]), Err(StoreError::Conflict(_))));
    assert!(matches!(log.append(1, b"", &[&b""[..]; 256]), Err(StoreError::Full { limit: 255, .. })));
    assert_eq!(log.append(1, b"", &[&b""[..]; 255]).unwrap().0, 2);
}
