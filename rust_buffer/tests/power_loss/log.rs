//! Random histories of the log on a disk that fails.

use std::time::Duration;

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Durability, Frame, Location, Log, LogOptions, Lsn, Replay},
};
use proptest::prelude::*;

use crate::{
    End, cases, end, fault, few,
    storage::{Disk, Fault},
    tokens,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// A few records to a file.
const SMALL_FILE: u64 = 600;
const LARGE_FILE: u64 = 4 << 20;

#[derive(Debug, Clone)]
enum Op {
    Append { sizes: Vec<usize> },
    Wait,
    Sync,
    Read { pick: usize },
    Snapshot,
    Remove { file: u32 },
    Close,
    Arm(Fault),
    End(End),
}

/// Sizes of the arrays of most appends.
fn small() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0..60_usize, 1 => 400..1500_usize]
}

/// Those of appends of up to 4 MB.
fn large() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..60_usize, 4 => 64_000..300_000_usize, 1 => 600_000..1_000_000_usize]
}

fn op(size: impl Strategy<Value = usize>) -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => prop::collection::vec(size, 0..5).prop_map(|sizes| Op::Append { sizes }),
        3 => prop_oneof![Just(Op::Wait), Just(Op::Sync)],
        1 => any::<usize>().prop_map(|pick| Op::Read { pick }),
        2 => Just(Op::Snapshot),
        1 => prop_oneof![1..9_u32, Just(u32::MAX)].prop_map(|file| Op::Remove { file }),
        1 => Just(Op::Close),
        2 => fault().prop_map(Op::Arm),
        2 => end().prop_map(Op::End),
    ]
}

/// A record and where it is, if its append was answered.
#[derive(Clone)]
struct Written {
    serial: u8,
    sizes: Vec<usize>,
    location: Option<Location>,
}

impl Written {
    fn header(&self) -> [u8; 3] {
        [self.serial, self.sizes.len() as u8, 7]
    }

    fn arrays(&self) -> Vec<Vec<u8>> {
        let array = |(i, size): (usize, &usize)| {
            let vocabulary = tokens::VOCABULARIES[i % 2];
            let mut bytes = tokens::run(size.div_ceil(8), vocabulary, u64::from(self.serial) << 8 | i as u64);
            bytes.truncate(*size);
            bytes
        };
        self.sizes.iter().enumerate().map(array).collect()
    }

    fn check(&self, frame: &Frame) {
        assert_eq!((frame.kind(), frame.header()), (1, &self.header()[..]), "LSN {}", frame.lsn());
        assert_eq!(frame.arrays(), self.arrays(), "LSN {}", frame.lsn());
    }
}

#[derive(Default)]
struct Seen {
    /// LSN that the snapshot covers.
    base: Lsn,
    frames: Vec<Frame>,
}

impl Replay for Seen {
    fn snapshot(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.base = Lsn::from_le_bytes(bytes.try_into().map_err(|_| "not a snapshot")?);
        Ok(())
    }

    fn record(&mut self, frame: &Frame) -> Result<(), String> {
        assert_eq!(frame.lsn(), self.base + self.frames.len() as u64 + 1, "LSNs are dense");
        self.frames.push(frame.clone());
        Ok(())
    }
}

struct Run {
    disk: Disk,
    options: LogOptions,
    log: Option<Log>,
    /// What each LSN was given.
    written: Vec<Written>,
    /// LSN whose loss by power would break a promise.
    kept: Lsn,
    /// Snapshots that opening may find.
    bases: Vec<Lsn>,
    /// Files below it may be deleted.
    removed: u32,
    serial: u8,
    /// A record was refused: no later one may be taken or acknowledged by this process.
    failed: bool,
}

impl Run {
    fn new(seed: u64, options: LogOptions) -> Self {
        let disk = Disk::new(seed);
        let mut run = Self {
            disk,
            options,
            log: None,
            written: Vec::new(),
            kept: 0,
            bases: vec![0],
            removed: 0,
            serial: 0,
            failed: false,
        };
        run.open(0);
        run
    }

    fn log(&self) -> &Log {
        self.log.as_ref().unwrap()
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Append { sizes } => self.append(sizes),
            Op::Wait => self.wait(Log::wait_durable),
            Op::Sync => self.wait(Log::sync_through),
            Op::Read { pick } => self.read(*pick),
            Op::Snapshot => self.snapshot(),
            Op::Remove { file } => self.remove(*file),
            Op::Close => {
                if self.log().close().is_ok() && !self.failed {
                    self.kept = self.written.len() as u64;
                }
                self.end(End { power_loss: false, fault: None, again: false });
            }
            Op::Arm(fault) => self.disk.arm(*fault),
            Op::End(end) => self.end(*end),
        }
        self.acknowledged();
    }

    /// Level `Os` promises nothing about power.
    fn acknowledged(&mut self) {
        if self.options.durability != Durability::Os {
            self.kept = self.kept.max(self.log().durable_lsn());
        }
    }

    fn append(&mut self, sizes: &[usize]) {
        self.serial = self.serial.wrapping_add(1);
        let mut record = Written { serial: self.serial, sizes: sizes.to_vec(), location: None };
        let arrays = record.arrays();
        let slices: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
        let lsn = self.log().lsn();
        match self.log().append(1, &record.header(), &Arrays::of(&slices)) {
            Ok((lsn, location)) => {
                assert!(!self.failed, "a record is taken after a failure");
                assert_eq!(lsn, self.written.len() as u64 + 1);
                record.location = Some(location);
                self.written.push(record);
                if self.options.durability == Durability::Always {
                    self.kept = lsn;
                }
            }
            Err(StoreError::Io { .. }) => {
                // It may be there after all.
                self.failed = true;
                self.written.push(record);
            }
            // Nothing of it is there, and the next one may find room.
            Err(StoreError::NoSpace { .. }) => assert_eq!(self.log().lsn(), lsn),
            Err(StoreError::Poisoned { .. }) => {
                self.failed = true;
                // Level `Always`: written, and then the making of the next file failed.
                if self.log().lsn() > self.written.len() as u64 {
                    self.written.push(record);
                }
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn wait(&mut self, durable: fn(&Log, Lsn, Duration) -> Result<bool, StoreError>) {
        let lsn = self.log().lsn();
        match durable(self.log(), lsn, PATIENCE) {
            Ok(true) => {
                assert!(self.log().durable_lsn() >= lsn);
                self.acknowledged();
            }
            Ok(false) => panic!("record {lsn} neither durable nor refused"),
            Err(StoreError::Io { .. } | StoreError::Poisoned { .. }) => self.failed = true,
            Err(other) => panic!("{other}"),
        }
    }

    fn read(&mut self, pick: usize) {
        let Some(index) = pick.checked_rem(self.written.len()) else { return };
        let record = &self.written[index];
        let Some(location) = record.location.filter(|location| location.file >= self.removed) else { return };
        match self.log().frame(location) {
            Ok(frame) => record.check(&frame),
            Err(StoreError::Io { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn snapshot(&mut self) {
        let (position, lsn) = (self.log().position(), self.log().lsn());
        self.bases.push(position.next - 1);
        match self.log().write_snapshot(position, &(position.next - 1).to_le_bytes()) {
            Ok(()) => {
                self.bases = vec![position.next - 1];
                self.kept = self.kept.max(lsn);
            }
            Err(StoreError::Io { .. } | StoreError::Poisoned { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn remove(&mut self, file: u32) {
        let end = file.min(self.log().snapshot_position().file);
        match self.log().remove_before(file) {
            Ok(_) | Err(StoreError::Io { .. } | StoreError::Poisoned { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        self.removed = self.removed.max(end);
    }

    fn end(&mut self, end: End) {
        self.acknowledged();
        if end.power_loss {
            self.disk.lose_power();
        } else {
            self.disk.kill();
        }
        self.log = None;
        let mut least = if end.power_loss { self.kept } else { self.answered() };
        if let Some(fault) = end.fault {
            self.disk.arm(fault);
            let mut seen = Seen::default();
            let opened = Log::open(self.disk.process(), self.options, &mut seen);
            self.disk.disarm();
            match opened {
                Ok(log) => self.check(log, &seen, least),
                Err(StoreError::Io { .. } | StoreError::NoSpace { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            least = if end.again { self.kept } else { least };
            if end.again {
                self.disk.lose_power();
            } else {
                self.disk.kill();
            }
            self.log = None;
        }
        self.open(least);
        // Opening changes nothing that a second opening sees.
        let (before, snapshot) = (self.log().position(), self.log().snapshot_position());
        self.disk.kill();
        self.log = None;
        self.open(before.next - 1);
        assert_eq!((self.log().position(), self.log().snapshot_position()), (before, snapshot));
    }

    /// The last record whose append was answered.
    fn answered(&self) -> Lsn {
        self.written.iter().rposition(|record| record.location.is_some()).map_or(0, |last| last as u64 + 1)
    }

    fn open(&mut self, least: Lsn) {
        let mut seen = Seen::default();
        let log = Log::open(self.disk.process(), self.options, &mut seen);
        self.check(log.map_err(|error| error.to_string()).unwrap(), &seen, least);
    }

    fn check(&mut self, log: Log, seen: &Seen, least: Lsn) {
        let newest = seen.base + seen.frames.len() as u64;
        assert!(self.bases.contains(&seen.base), "snapshot of {}, not of {:?}", seen.base, self.bases);
        assert!(newest >= least, "{least} records were acknowledged, {newest} are there");
        assert!(newest <= self.written.len() as u64, "{} records were written, {newest} are there", self.written.len());
        for frame in &seen.frames {
            let record = &mut self.written[frame.lsn() as usize - 1];
            record.check(frame);
            record.check(&log.frame(frame.location()).unwrap());
            record.location = Some(frame.location());
        }
        assert_eq!((log.lsn(), log.durable_lsn()), (newest, newest));
        self.written.truncate(newest as usize);
        (self.kept, self.bases, self.failed) = (newest, vec![seen.base], false);
        self.log = Some(log);
    }
}

fn run(seed: u64, durability: Durability, file_bytes: u64, ops: &[Op]) {
    let options = LogOptions { durability, file_bytes, sync_interval: Duration::from_millis(1) };
    let mut run = Run::new(seed, options);
    for op in ops {
        run.run(op);
    }
    run.run(&Op::End(End { power_loss: true, fault: None, again: false }));
}

#[test]
fn what_a_failed_opening_zeroed_does_not_come_back() {
    let append = Op::Append { sizes: vec![432] };
    let lose = |fault| Op::End(End { power_loss: true, fault, again: false });
    for seed in 0..300 {
        let mut ops = vec![append.clone(); 4];
        ops.extend([lose(Some(Fault::Sync(1))), append.clone(), Op::Snapshot, lose(None)]);
        let options = LogOptions { durability: Durability::Os, file_bytes: 8192, ..LogOptions::default() };
        let mut run = Run::new(seed, options);
        for op in &ops {
            run.run(op);
        }
    }
}

proptest! {
    #![proptest_config(few(6))]

    #[test]
    fn large_appends_keep_the_promises_of_every_level(
        seed in any::<u64>(),
        level in prop_oneof![Just(Durability::Os), Just(Durability::Group), Just(Durability::Always)],
        ops in prop::collection::vec(op(large()), 1..16),
    ) {
        run(seed, level, LARGE_FILE, &ops);
    }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn level_always_keeps_what_it_answers(seed in any::<u64>(), ops in prop::collection::vec(op(small()), 1..80)) {
        run(seed, Durability::Always, SMALL_FILE, &ops);
    }

    #[test]
    fn level_group_keeps_what_it_calls_durable(seed in any::<u64>(), ops in prop::collection::vec(op(small()), 1..80)) {
        run(seed, Durability::Group, SMALL_FILE, &ops);
    }

    #[test]
    fn level_os_opens_with_a_prefix_after_power_loss(seed in any::<u64>(), ops in prop::collection::vec(op(small()), 1..80)) {
        run(seed, Durability::Os, SMALL_FILE, &ops);
    }
}
