//! What a healthy log does: records, files, levels, waiting, threads, closing.

use std::{fs, os::unix::fs::MetadataExt, sync::Arc, time::Instant};

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Durability, Entry, Log, LogOptions, Memory, Storage, network_name},
};
use tempfile::TempDir;

use crate::*;

#[test]
fn records_come_back_from_every_place_and_level() {
    for durability in [Durability::Os, Durability::Group, Durability::Always] {
        let dir = scratch();
        let places: [Arc<dyn Storage>; 2] = [disk(dir.path()), Arc::new(Memory::default())];
        for storage in places {
            let mut seen = Seen::default();
            let options = LogOptions { durability, file_bytes: 512, ..SMALL };
            let log = Log::open(storage, options, &mut seen).unwrap();
            assert!(seen.snapshot.is_none() && seen.frames.is_empty());
            let written: Vec<_> = (0..100).map(|i| (append(&log, &record(i)), record(i))).collect();
            assert!(log.position().file > 3);
            assert!(log.wait_durable(log.lsn(), PATIENCE).unwrap());
            for ((lsn, location), record) in &written {
                let frame = log.frame(*location).unwrap();
                assert_eq!((frame.lsn(), frame.location(), read(&frame)), (*lsn, *location, record.clone()));
                assert_eq!(frame.num_arrays(), record.2.len());
                assert!(frame.array(record.2.len()).is_none());
                assert_eq!(read(&log.frame_at(location.file, location.offset).unwrap()), *record);
                for part in frame.parts() {
                    assert!(part.bytes.as_ptr().align_offset(8) == 0);
                    let at = location.offset + u64::from(part.at);
                    let bytes = log.bytes_at(location.file, at, part.bytes.len()).unwrap();
                    assert_eq!((&*bytes, crc32c::crc32c(&bytes)), (part.bytes, part.crc));
                }
            }
        }
    }
}

#[test]
fn lsns_are_dense_across_files_and_openings() {
    let dir = scratch();
    for opening in 0..4_usize {
        let (log, seen) = open_with(dir.path(), TINY);
        let before = opening * 30;
        assert_eq!(seen.records(), records(0..before));
        assert_eq!((log.lsn(), log.durable_lsn()), (before as u64, before as u64));
        assert_eq!(log.position().next, before as u64 + 1);
        assert!((before..before + 30).all(|i| append(&log, &record(i)).0 == i as u64 + 1));
        log.close().unwrap();
    }
    let numbers = files(dir.path());
    assert!(numbers.len() > 4);
    assert!(numbers.iter().zip(1..).all(|(number, expected)| *number == expected));
}

#[test]
fn a_record_larger_than_the_file_is_read_while_the_file_grows() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let small = append(&log, &record(1)).1;
    assert_eq!(log.frame(small).unwrap().header(), record(1).1);
    let big = vec![7; 3 << 20];
    let location = log.append(1, b"big", &Arrays::of(&[&big, &big])).unwrap().1;
    assert_eq!(log.frame(location).unwrap().array(1).unwrap(), big);
    append(&log, &record(2));
    drop(log);
    let (log, seen) = open(dir.path());
    assert_eq!(seen.frames[1].array(0).unwrap(), big);
    assert_eq!(log.lsn(), 3);
}

#[test]
fn a_record_has_up_to_65535_arrays() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), TINY);
    let arrays: Vec<Vec<u8>> = (0..u32::from(u16::MAX)).map(|i| i.to_le_bytes()[..i as usize % 5].to_vec()).collect();
    let slices: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
    for count in [255, 256, 1025, 65_535] {
        let all = Arrays::of(&slices[..count]);
        let places = all.places(3);
        let (_, location) = log.append(1, b"abc", &all).unwrap();
        let frame = log.frame(location).unwrap();
        assert_eq!(frame.arrays(), slices[..count]);
        assert!(frame.parts().map(|part| (part.at, part.crc)).eq(places));
    }
    let lsn = log.lsn();
    let many = vec![&b""[..]; 65_536];
    assert!(matches!(log.append(1, b"", &Arrays::of(&many)), Err(StoreError::Full { limit: 65_535, .. })));
    assert_eq!(log.append(1, b"", &Arrays::default()).unwrap().0, lsn + 1, "a refusal harms nothing");
    drop(log);
    assert_eq!(open(dir.path()).1.frames[3].arrays(), slices);
}

#[test]
fn arrays_that_lie_together_are_stored_as_if_given_one_by_one() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let (one, two) = ([1_u8; 8], [2_u8; 5]);
    let together = [&one[..], &two, &[0; 3]].concat();
    let entries: Vec<_> = [&one[..], &two].map(Entry::of).into();
    let mut arrays = Arrays::of(&[b"first"]);
    assert_eq!(arrays.end(), 8);
    arrays.extend(&entries, &together);
    assert_eq!(arrays.end(), 24);
    let apart = Arrays::of(&[b"first", &one, &two]);
    assert_eq!(arrays.places(5), apart.places(5));
    let (a, b) = (log.append(1, b"h", &arrays).unwrap().1, log.append(1, b"h", &apart).unwrap().1);
    assert_eq!(log.frame(a).unwrap().arrays(), log.frame(b).unwrap().arrays());
}

#[test]
fn the_logs_own_kinds_are_refused() {
    let mut seen = Seen::default();
    let log = Log::open(Arc::new(Memory::default()), SMALL, &mut seen).unwrap();
    for kind in [0, 255] {
        assert!(matches!(log.append(kind, b"", &Arrays::default()), Err(StoreError::Conflict(_))));
    }
    assert_eq!(log.append(254, b"", &Arrays::default()).unwrap().0, 1);
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
fn waiting_for_durability_ends() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    assert!(matches!(log.wait_durable(1, PATIENCE), Err(StoreError::Conflict(_))));
    for i in 0..100 {
        let (lsn, _) = append(&log, &record(i));
        assert!(log.wait_durable(lsn, PATIENCE).unwrap());
        assert!(log.durable_lsn() >= lsn);
    }
    // Nobody waits: the sync thread does it on its own.
    let (lsn, _) = append(&log, &record(100));
    let start = Instant::now();
    while log.durable_lsn() < lsn {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn level_os_is_durable_for_the_process_at_once() {
    let dir = scratch();
    let (log, _) = open_with(dir.path(), LogOptions { durability: Durability::Os, ..TINY });
    for i in 0..20 {
        let (lsn, _) = append(&log, &record(i));
        assert_eq!(log.durable_lsn(), lsn);
        assert!(log.wait_durable(lsn, PATIENCE).unwrap());
    }
    assert_eq!(open(crash(dir.path()).path()).1.records(), records(0..20));
}

#[test]
fn level_always_is_durable_when_append_returns() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open_with(dir.path(), LogOptions { durability: Durability::Always, ..SMALL });
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
    assert_eq!(log.lsn(), 80);
}

#[test]
fn threads_append_rotate_snapshot_and_wait_together() {
    let dir = scratch();
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
                        let durable = if thread < 2 { Log::sync_through } else { Log::wait_durable };
                        assert!(durable(&log, lsn, PATIENCE).unwrap());
                        assert!(log.durable_lsn() >= lsn);
                    }
                    if thread == 0 && i % 40 == 0 {
                        log.write_snapshot(log.position(), &lsn.to_le_bytes()).unwrap();
                    }
                }
            });
        }
    });
    assert!(log.position().file > 2);
    let position = log.position();
    let snapshot = log.snapshot_position();
    drop(log);
    let (log, seen) = open(dir.path());
    assert_eq!((log.position(), log.snapshot_position()), (position, snapshot));
    assert_eq!(seen.frames[0].lsn(), snapshot.next);
    assert_eq!(seen.frames.last().unwrap().lsn(), 1200);
}

#[test]
fn a_failure_poisons_the_log_and_a_closed_one_refuses() {
    let dir = scratch();
    let path = dir.path().join("store");
    let (log, _) = open_with(&path, TINY);
    let mut lsn = 0;
    while log.position().offset < HEADER + TINY.file_bytes {
        lsn = append(&log, &record(1)).0;
    }
    assert!(log.wait_durable(lsn, PATIENCE).unwrap());
    fs::remove_dir_all(&path).unwrap();
    // One file more may have been made ahead; a further one cannot be.
    let refused = (0..2 * TINY.file_bytes).find_map(|_| log.append(1, b"", &Arrays::default()).err());
    assert!(matches!(refused, Some(StoreError::Io { .. } | StoreError::Poisoned { .. })), "{refused:?}");
    assert!(matches!(log.append(1, b"", &Arrays::default()), Err(StoreError::Poisoned { .. })));
    assert!(matches!(log.remove_before(1), Err(StoreError::Poisoned { .. })));
    assert!(matches!(log.write_snapshot(log.position(), b""), Err(StoreError::Poisoned { .. })));
    assert!(log.wait_durable(lsn, PATIENCE).unwrap());

    let (log, _) = open(&path);
    let (lsn, location) = append(&log, &record(1));
    log.close().unwrap();
    log.close().unwrap();
    assert!(matches!(log.append(1, b"", &Arrays::default()), Err(StoreError::Closed)));
    assert!(matches!(log.remove_before(9), Err(StoreError::Closed)));
    assert!(matches!(log.write_snapshot(log.position(), b""), Err(StoreError::Closed)));
    assert!(log.wait_durable(lsn, PATIENCE).unwrap());
    assert_eq!(log.frame(location).unwrap().header(), record(1).1);
}

#[test]
fn a_rotation_takes_the_file_that_was_made_ahead() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    let (aside, first) = (dir.path().join("next"), log.position().file);
    while log.position().offset < SMALL.file_bytes * 3 / 4 {
        append(&log, &record(0));
    }
    let start = Instant::now();
    while !aside.exists() {
        assert!(start.elapsed() < PATIENCE && log.position().file == first, "nothing is made ahead");
        std::thread::yield_now();
    }
    let made = fs::metadata(&aside).unwrap().ino();
    while log.position().file == first {
        append(&log, &record(0));
    }
    let file = dir.path().join(format!("{:010}.log", first + 1));
    assert_eq!(fs::metadata(file).unwrap().ino(), made);
}

#[test]
fn a_caller_may_poison_the_log() {
    let dir = scratch();
    let (log, _) = open(dir.path());
    append(&log, &record(0));
    log.poison(StoreError::Conflict("state and log differ".to_owned()));
    let refused = log.append(1, b"", &Arrays::default());
    assert!(matches!(refused, Err(StoreError::Poisoned { detail }) if detail.contains("differ")));
}

#[test]
fn network_file_systems_are_known_by_name() {
    // Those of ext4, XFS, Btrfs, ZFS, tmpfs and overlayfs are local.
    for local in [0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0x0102_1994, 0x794c_7630] {
        assert_eq!(network_name(local), None);
    }
    for (kind, name) in [(0x6969, "NFS"), (0xff53_4d42, "CIFS"), (0x0bd0_0bd0, "Lustre"), (0x6573_5546, "FUSE")] {
        assert_eq!(network_name(kind), Some(name));
        let refused = StoreError::Network { path: "/far/store".into(), name }.to_string();
        assert!(refused.contains(name) && refused.contains("a disk of this machine"), "{refused}");
    }
}
