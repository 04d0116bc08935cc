//! Damage anywhere: refused with its place or found at the read, never wrong data, never a panic.

use std::fs;

use _rust_buffer::{
    error::StoreError,
    log::{Location, Log},
};
use proptest::{prelude::*, sample::Index, test_runner::TestRunner};

use crate::*;

/// Opens `dir`, which once held `written`, and reads all of it: every answer is right or an error with a place.
/// Returns whether it opened.
fn answers_are_right(dir: &Path, written: &[Location], first: usize) -> bool {
    let (log, seen) = match try_open(dir, TINY) {
        Ok(opened) => opened,
        Err(StoreError::Corrupt { .. }) => return false,
        Err(other) => panic!("{other}"),
    };
    let found = seen.frames.iter().map(|frame| (frame.lsn(), frame.kind(), frame.header()));
    let expected: Vec<Record> = records(first..first + seen.frames.len());
    assert!(found.eq(expected.iter().zip(first as u64 + 1..).map(|(r, lsn)| (lsn, r.0, &r.1[..]))));
    reads_are_right(&log, written);
    true
}

fn reads_are_right(log: &Log, written: &[Location]) {
    for (i, location) in written.iter().enumerate() {
        match log.frame(*location) {
            Ok(frame) => assert_eq!(read(&frame), record(i)),
            Err(StoreError::Corrupt { path, offset, .. }) => {
                assert_eq!(
                    (path.file_name().unwrap().to_str(), offset),
                    (Some(&*name(location.file)), location.offset)
                );
            }
            Err(other) => panic!("{other}"),
        }
    }
}

/// Whether byte `at` of the frame of record `i` is only padding of an array, which carries nothing.
fn is_padding(i: usize, location: &Location, at: u64) -> bool {
    let mut free = end(location);
    for array in record(i).2.iter().rev() {
        let start = free - (array.len() as u64).next_multiple_of(8);
        if (start + array.len() as u64..free).contains(&at) {
            return true;
        }
        free = start;
    }
    false
}

#[test]
fn a_flipped_bit_anywhere_in_a_closed_log_is_refused_with_its_place() {
    let dir = scratch();
    let locations = filled(dir.path(), 8, SMALL);
    for byte in 0..end(&locations[7]) {
        let copy = crash(dir.path());
        flip(&file(copy.path(), 1), byte * 8 + byte % 8);
        let hit = locations.iter().rposition(|location| location.offset <= byte);
        if hit.is_some_and(|i| is_padding(i, &locations[i], byte)) {
            assert_eq!(open(copy.path()).1.records(), records(0..8));
        } else {
            let place = hit.map_or(0, |i| locations[i].offset);
            assert_eq!(damage(copy.path()), (name(1), place), "byte {byte}");
        }
    }
}

#[test]
fn a_flipped_bit_in_a_sealed_file_is_refused_or_found_at_the_read() {
    let dir = scratch();
    let locations = filled(dir.path(), 12, TINY);
    let sealed: Vec<_> = locations.iter().take_while(|location| location.file == 1).collect();
    let mut opened = 0;
    for byte in 0..end(sealed[sealed.len() - 1]) {
        let copy = crash(dir.path());
        flip(&file(copy.path(), 1), byte * 8 + byte % 8);
        let hit = locations.iter().take(sealed.len()).rposition(|location| location.offset <= byte);
        let Some(i) = hit else {
            assert_eq!(damage(copy.path()), (name(1), 0));
            continue;
        };
        let head = HEADER + 8 * record(i).2.len() as u64 + (record(i).1.len() as u64).next_multiple_of(8);
        if byte < locations[i].offset + head {
            assert_eq!(damage(copy.path()), (name(1), locations[i].offset), "byte {byte}");
            continue;
        }
        // Opening reads the heads of sealed files alone.
        let (log, seen) = open_with(copy.path(), TINY);
        assert_eq!(seen.frames.len(), 12);
        reads_are_right(&log, &locations);
        assert_eq!(log.frame(locations[i]).is_ok(), is_padding(i, &locations[i], byte), "byte {byte}");
        opened += 1;
    }
    assert!(opened > 0);
}

#[test]
fn a_random_bit_flip_in_a_closed_log_of_several_files_never_gives_wrong_data() {
    let template = scratch();
    let (log, _) = open_with(template.path(), TINY);
    let mut written = fill(&log, 0..12);
    log.write_snapshot(log.position(), &[12; 30]).unwrap();
    // Up to a file that is not full, or most bits would be those of its preallocation.
    while written.len() < 20 || log.position().offset > HEADER + TINY.file_bytes {
        written.extend(fill(&log, written.len()..written.len() + 1));
    }
    log.close().unwrap();
    let num_records = written.len();
    assert!(log.position().file > 4);
    let mut paths: Vec<_> = files(template.path()).into_iter().map(name).collect();
    paths.push("index".to_owned());
    let damaged_bit = (any::<Index>(), any::<Index>());
    let flipped = TestRunner::new(cases(400)).run(&damaged_bit, |(which, bit)| {
        let copy = crash(template.path());
        let path = copy.path().join(which.get(&paths));
        flip(&path, bit.index(8 * fs::metadata(&path).unwrap().len() as usize) as u64);
        if answers_are_right(copy.path(), &written, 12) {
            // A whole log stays whole: opening it twice gives all of it, and it goes on.
            let (log, seen) = open_with(copy.path(), TINY);
            prop_assert_eq!(seen.frames.len(), num_records - 12);
            prop_assert_eq!(seen.snapshot, Some(vec![12; 30]));
            prop_assert_eq!(append(&log, &record(0)).0, num_records as u64 + 1);
        }
        Ok(())
    });
    flipped.unwrap();
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn random_damage_never_panics_and_never_returns_wrong_data(
        closed in any::<bool>(),
        n in 1..14_usize,
        damage in prop::collection::vec((1..5_u32, any::<u64>(), any::<u8>()), 1..4),
    ) {
        let dir = scratch();
        let (log, _) = open_with(dir.path(), TINY);
        let written: Vec<_> = (0..n).map(|i| append(&log, &record(i)).1).collect();
        if closed {
            log.close().unwrap();
        }
        let copy = crash(dir.path());
        for (number, at, value) in damage {
            let path = file(copy.path(), number);
            if path.exists() {
                overwrite(&path, at % 600, &[value]);
            }
        }
        answers_are_right(copy.path(), &written, 0);
    }

    #[test]
    fn hostile_files_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..600),
        keep in 0_u64..400,
        which in any::<Index>(),
    ) {
        let dir = scratch();
        let written = filled(dir.path(), 10, TINY);
        let path = file(dir.path(), *which.get(&files(dir.path())));
        cut(&path, keep);
        overwrite(&path, keep, &bytes);
        answers_are_right(dir.path(), &written, 0);
    }

    #[test]
    fn any_location_is_answered_or_refused(
        file in 0..3_u32, offset in any::<u64>(), small in 0..700_u64, len in any::<u32>(),
    ) {
        let dir = scratch();
        let (log, _) = open(dir.path());
        fill(&log, 0..6);
        for (offset, len) in [(offset, len), (small, len), (small, len % 200), (offset, len % 200)] {
            if let Ok(frame) = log.frame(Location { file, offset, len }) {
                prop_assert_eq!(read(&frame), record(frame.lsn() as usize - 1));
            }
            if let Ok(frame) = log.frame_at(file, offset) {
                prop_assert!(frame.lsn() <= 6);
            }
            if let Ok(bytes) = log.bytes_at(file, offset, len as usize) {
                prop_assert_eq!(bytes.len(), len as usize);
            }
        }
    }
}
