//! The snapshot, sealed files and their deletion, and readers beside the writer.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Disk, Location, Log, Position, Storage},
};

use crate::*;

fn existing(dir: &Path) -> Arc<dyn Storage> {
    Arc::new(Disk::existing(dir))
}

/// A closed log of 40 records in several files with a snapshot before record `at` (counted from 0).
fn with_snapshot(dir: &Path, at: usize) -> Vec<Location> {
    let (log, _) = open_with(dir, TINY);
    let mut locations = Vec::new();
    for i in 0..40 {
        if i == at {
            log.write_snapshot(log.position(), format!("the first {i}").as_bytes()).unwrap();
        }
        locations.push(append(&log, &record(i)).1);
    }
    log.close().unwrap();
    assert!(locations[20].file > 3 && locations[39].file > locations[20].file + 3);
    locations
}

#[test]
fn opening_reads_the_snapshot_and_the_records_after_it() {
    let dir = scratch();
    with_snapshot(dir.path(), 20);
    let (log, seen) = open_with(dir.path(), TINY);
    assert_eq!(seen.snapshot.as_deref(), Some(&b"the first 20"[..]));
    assert_eq!(seen.records(), records(20..40));
    assert_eq!((log.lsn(), log.snapshot_position().next), (40, 21));
    log.write_snapshot(log.position(), b"all").unwrap();
    drop(log);
    let (log, seen) = open_with(dir.path(), TINY);
    assert_eq!((seen.snapshot.as_deref(), seen.frames.len()), (Some(&b"all"[..]), 0));
    assert_eq!(append(&log, &record(40)).0, 41);
}

#[test]
fn a_snapshot_of_an_empty_log_and_one_of_an_earlier_position_work() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    log.write_snapshot(log.position(), b"nothing").unwrap();
    let position = log.position();
    append(&log, &record(0));
    append(&log, &record(1));
    log.write_snapshot(position, b"still nothing").unwrap();
    drop(log);
    let (_, seen) = open(dir.path());
    assert_eq!(seen.snapshot.as_deref(), Some(&b"still nothing"[..]));
    assert_eq!(seen.records(), records(0..2));
}

#[test]
fn a_snapshot_of_no_possible_record_is_refused() {
    let dir = scratch();
    with_snapshot(dir.path(), 20);
    let path = dir.path().join("index");
    let mut image = fs::read(&path).unwrap();
    let frame = &mut image[32..80]; // an array, and a header of 8 bytes
    frame[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..]);
    frame[4..8].copy_from_slice(&crc.to_le_bytes());
    fs::write(&path, &image).unwrap();
    assert_eq!(damage(dir.path()), ("index".to_owned(), 0));
}

#[test]
fn a_snapshot_damaged_anywhere_is_refused_and_never_wrong() {
    let dir = scratch();
    with_snapshot(dir.path(), 20);
    let image = fs::read(dir.path().join("index")).unwrap();
    let used = image.len() - (8 - b"the first 20".len() % 8) % 8;
    let copy = crash(dir.path());
    let path = copy.path().join("index");
    for byte in 0..image.len() {
        for bit in 0..8 {
            let mut flipped = image.clone();
            flipped[byte] ^= 1 << bit;
            fs::write(&path, &flipped).unwrap();
            if byte < used {
                assert_eq!(damage(copy.path()), ("index".to_owned(), 0), "byte {byte}");
            }
        }
        fs::write(&path, &image[..byte]).unwrap();
        assert_eq!(damage(copy.path()), ("index".to_owned(), 0), "length {byte}");
    }
    fs::write(&path, &image).unwrap();
    assert_eq!(open(copy.path()).1.records(), records(20..40));
}

#[test]
fn what_the_snapshot_covers_is_not_lost_in_silence() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let mut written = fill(&log, 0..20);
    while log.position().offset == HEADER || log.position().offset >= HEADER + TINY.file_bytes {
        written.extend(fill(&log, written.len()..written.len() + 1));
    }
    let (last, start) = (log.position().file, log.position().offset);
    log.write_snapshot(log.position(), b"").unwrap();
    let more = fill(&log, written.len()..written.len() + 1)[0];
    log.close().unwrap();
    for len in 0..end(&more) {
        let copy = crash(dir.path());
        cut(&file(copy.path(), last), len);
        if len < start {
            assert_eq!(damage(copy.path()), (name(last), if len < HEADER { 0 } else { len }), "cut at {len}");
        } else {
            assert!(open(copy.path()).1.frames.is_empty());
        }
    }
    let copy = crash(dir.path());
    fs::remove_file(file(copy.path(), last)).unwrap();
    assert_eq!(damage(copy.path()), (name(last), 0));
}

#[test]
fn a_missing_file_or_snapshot_is_refused_and_named() {
    let dir = scratch();
    let locations = with_snapshot(dir.path(), 20);
    let first = locations[20].file;
    for missing in first..locations[39].file {
        let copy = crash(dir.path());
        fs::remove_file(file(copy.path(), missing)).unwrap();
        assert_eq!(damage(copy.path()), (name(missing), 0));
    }
    // Everything is in the log itself: without a snapshot it is read from its beginning.
    let copy = crash(dir.path());
    fs::remove_file(copy.path().join("index")).unwrap();
    assert_eq!(open(copy.path()).1.records(), records(0..40));
    fs::remove_file(file(copy.path(), 1)).unwrap();
    assert_eq!(damage(copy.path()), (name(1), 0));
    // Files below the snapshot hold nothing that opening reads.
    fs::remove_file(file(dir.path(), 1)).unwrap();
    assert_eq!(open(dir.path()).1.records(), records(20..40));
}

#[test]
fn files_of_another_place_in_the_log_are_refused() {
    let dir = scratch();
    let locations = with_snapshot(dir.path(), 20);
    let (first, last) = (locations[20].file, locations[39].file);
    for number in first..=last {
        let copy = crash(dir.path());
        fs::copy(file(dir.path(), 1), file(copy.path(), number)).unwrap();
        assert_eq!(damage(copy.path()), (name(number), 16), "the header of file 1 as file {number}");
    }
    // A later file of another log, whose records are of other numbers.
    let other = scratch();
    let (log, _) = open_with(other.path(), TINY);
    while log.position().file <= last {
        append(&log, &record(0));
    }
    let copy = crash(dir.path());
    fs::copy(file(other.path(), last), file(copy.path(), last)).unwrap();
    assert_eq!(damage(copy.path()), (name(last - 1), end(locations.iter().rfind(|l| l.file < last).unwrap())));
}

#[test]
fn what_a_crash_leaves_of_a_new_snapshot_is_ignored() {
    let dir = scratch();
    with_snapshot(dir.path(), 20);
    fs::write(dir.path().join("index.tmp"), b"half a snapshot").unwrap();
    let (log, seen) = open(dir.path());
    assert_eq!(seen.records(), records(20..40));
    log.write_snapshot(log.position(), b"whole").unwrap();
    drop(log);
    assert_eq!(open(dir.path()).1.snapshot.unwrap(), b"whole");
}

#[test]
fn files_that_are_not_the_logs_are_left_alone() {
    let dir = scratch();
    filled(dir.path(), 12, TINY);
    let strangers = ["0000000000.log", "1.log", "00000000x2.log", "9999999999.log", "notes"];
    for name in strangers {
        fs::copy(file(dir.path(), 1), dir.path().join(name)).unwrap();
    }
    let (log, seen) = open_with(dir.path(), TINY);
    assert_eq!(seen.records(), records(0..12));
    log.write_snapshot(log.position(), b"").unwrap();
    log.remove_before(u32::MAX).unwrap();
    assert!(strangers.iter().all(|name| dir.path().join(name).exists()));
}

#[test]
fn sealed_files_go_oldest_first_never_beyond_the_snapshot_and_pinned_frames_stay() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let locations = fill(&log, 0..40);
    // A sync may seal a full file.
    assert!(log.wait_durable(40, PATIENCE).unwrap());
    let last = log.position().file;
    let pinned = log.frame(locations[3]).unwrap();
    assert_eq!(log.remove_before(last).unwrap(), 0, "without a snapshot everything is needed");
    let at = locations[20];
    log.write_snapshot(Position { file: at.file, offset: at.offset, next: 21 }, b"").unwrap();
    let before = log.bytes();
    assert_eq!(log.remove_before(3).unwrap(), 2);
    assert_eq!(log.remove_before(3).unwrap(), 0);
    assert_eq!(files(dir.path()), (3..=last).collect::<Vec<_>>());
    assert!(log.bytes() < before);
    assert_eq!(log.remove_before(u32::MAX).unwrap(), at.file as usize - 3);
    assert_eq!(files(dir.path()), (at.file..=last).collect::<Vec<_>>());
    assert_eq!(read(&pinned), record(3));
    assert!(matches!(log.frame(locations[0]), Err(StoreError::Corrupt { offset, .. }) if offset == HEADER));
    assert_eq!(read(&log.frame(locations[20]).unwrap()), record(20));
    log.write_snapshot(log.position(), b"").unwrap();
    assert_eq!(log.remove_before(u32::MAX).unwrap(), (last - at.file) as usize);
    assert_eq!(append(&log, &record(40)).0, 41);
    drop(log);
    assert_eq!(open(dir.path()).1.records(), records(40..41));
    assert_eq!(read(&pinned), record(3));
}

#[test]
fn a_reader_reads_on_from_files_that_the_writer_deletes_the_newest_too() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let locations = fill(&log, 0..12);
    let mut seen = Seen::default();
    let reader = Log::read(existing(dir.path()), &mut seen).unwrap();
    let newest = reader.position().file;
    while log.position().file == newest {
        append(&log, &record(12));
    }
    let at = log.position();
    log.write_snapshot(at, b"").unwrap();
    assert_eq!(log.remove_before(u32::MAX).unwrap(), at.file as usize - 1);
    for (i, location) in locations.iter().enumerate() {
        assert_eq!(read(&reader.frame(*location).unwrap()), record(i));
    }
}

#[test]
fn sealed_files_are_trimmed_and_read_after_reopening() {
    let dir = scratch();
    let locations = filled(dir.path(), 40, TINY);
    for number in 1..locations[39].file {
        let used = locations.iter().filter(|l| l.file == number).map(end).max().unwrap();
        assert_eq!(fs::metadata(file(dir.path(), number)).unwrap().len(), used + HEADER);
    }
    let (log, _) = open(dir.path());
    for (i, location) in locations.iter().enumerate() {
        assert_eq!(read(&log.frame(*location).unwrap()), record(i));
    }
}

#[test]
fn a_reader_needs_no_lock_and_changes_nothing() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let mut locations = fill(&log, 0..30);
    log.write_snapshot(log.position(), b"thirty").unwrap();
    locations.extend(fill(&log, 30..40));
    assert!(log.wait_durable(40, PATIENCE).unwrap());
    // Remains of a crash stay too.
    let copy = crash(dir.path());
    let last = log.position();
    overwrite(&file(copy.path(), last.file), last.offset, &[0xa5; 100]);
    fs::write(file(copy.path(), last.file + 1), b"torn").unwrap();
    for dir in [dir.path(), copy.path()] {
        let image = |dir: &Path| -> Vec<_> {
            let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            all.sort();
            all.into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect()
        };
        let before = image(dir);
        let mut seen = Seen::default();
        let reader = Log::read(existing(dir), &mut seen).unwrap();
        assert_eq!((seen.snapshot.as_deref(), seen.records()), (Some(&b"thirty"[..]), records(30..40)));
        assert_eq!((reader.lsn(), reader.durable_lsn()), (40, 40));
        for (i, location) in locations.iter().enumerate() {
            assert_eq!(read(&reader.frame(*location).unwrap()), record(i));
        }
        assert!(matches!(reader.append(1, b"", &Arrays::default()), Err(StoreError::ReadOnly { .. })));
        assert!(matches!(reader.write_snapshot(reader.position(), b""), Err(StoreError::ReadOnly { .. })));
        assert!(matches!(reader.remove_before(9), Err(StoreError::ReadOnly { .. })));
        reader.close().unwrap();
        drop(reader);
        assert_eq!(image(dir), before);
    }
}

#[test]
fn a_reader_of_no_log_is_refused_and_makes_none() {
    let dir = scratch();
    let refused = Log::read(existing(&dir.path().join("none")), &mut Seen::default());
    assert!(matches!(refused, Err(StoreError::Io { .. })));
    assert!(matches!(Log::read(existing(dir.path()), &mut Seen::default()), Err(StoreError::Io { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_reader_beside_a_writer_sees_a_prefix_of_what_is_written() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let written = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            fill(&log, 0..1000);
            written.store(true, Ordering::Release);
        });
        let mut seen_most = 0;
        while !written.load(Ordering::Acquire) {
            let before = log.lsn() as usize;
            let mut seen = Seen::default();
            Log::read(existing(dir.path()), &mut seen).unwrap();
            assert!(seen.frames.len() >= before.max(seen_most));
            seen_most = seen.frames.len();
            assert!(seen.records().into_iter().eq((0..seen_most).map(record)));
        }
        assert!(seen_most > 0);
    });
}

#[test]
fn a_snapshot_in_parts_is_read_whole_or_refused() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    fill(&log, 0..5);
    let parts = [b"first".to_vec(), vec![7; 100_000], Vec::new(), b"last".to_vec()];
    log.write_snapshot_parts(log.position(), 4, &mut parts.iter().cloned().map(Ok)).unwrap();
    let before = log.snapshot_position();
    let failing = [Ok(b"more".to_vec()), Err(StoreError::Conflict("it cannot be encoded".into()))];
    let failed = log.write_snapshot_parts(log.position(), 2, &mut failing.into_iter());
    assert!(failed.unwrap_err().to_string().contains("it cannot be encoded"));
    assert_eq!(log.snapshot_position(), before);
    log.close().unwrap();
    let (_, seen) = open(dir.path());
    assert_eq!((seen.snapshot.unwrap(), &seen.parts[..]), (parts[0].clone(), &parts[1..]));
    let index = dir.path().join("index");
    let bytes = fs::read(&index).unwrap();
    for len in [bytes.len() - 8, bytes.len() - 64, 1000, 100] {
        fs::write(&index, &bytes[..len]).unwrap();
        assert_eq!(damage(dir.path()), ("index".to_owned(), 0), "cut at {len}");
    }
    for at in (32..bytes.len()).step_by(997) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        fs::write(&index, &damaged).unwrap();
        assert_eq!(damage(dir.path()), ("index".to_owned(), 0), "a bit flipped at {at}");
    }
}
