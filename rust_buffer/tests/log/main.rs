//! The log's contract, point by point, on real files.
#![allow(clippy::unwrap_used)]

mod bytes;
mod damage;
mod large;
mod life;
mod snapshot;
mod tail;
#[path = "../support/tokens.rs"]
mod tokens;

use std::{
    fs::{self, OpenOptions},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Disk, Durability, Frame, Location, Log, LogOptions, Replay, Storage},
};
use proptest::test_runner::Config as ProptestConfig;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(10);
/// Size of the headers of files, frames and marks.
const HEADER: u64 = 32;
/// One file is enough for most of these tests.
const SMALL: LogOptions =
    LogOptions { durability: Durability::Group, file_bytes: 4096, sync_interval: Duration::from_millis(5) };
/// A few records to a file.
const TINY: LogOptions = LogOptions { file_bytes: 256, ..SMALL };

/// Kind, header, arrays.
type Record = (u8, Vec<u8>, Vec<Vec<u8>>);

fn record(i: usize) -> Record {
    let bytes = |len: usize, salt: usize| (0..len).map(|j| ((i * 31 + j * 7 + salt) % 251) as u8 + 1).collect();
    ((i % 5 + 1) as u8, bytes(i % 11 + 1, 1), (0..i % 4).map(|a| bytes(i * 3 + a * 5, a)).collect())
}

fn read(frame: &Frame) -> Record {
    (frame.kind(), frame.header().to_vec(), frame.arrays().into_iter().map(<[u8]>::to_vec).collect())
}

fn append(log: &Log, record: &Record) -> (u64, Location) {
    let arrays: Vec<&[u8]> = record.2.iter().map(Vec::as_slice).collect();
    log.append(record.0, &record.1, &Arrays::of(&arrays)).unwrap()
}

/// Appends records `range`; where they are.
fn fill(log: &Log, range: Range<usize>) -> Vec<Location> {
    range.map(|i| append(log, &record(i)).1).collect()
}

/// `quick` cases, or as many as `PROPTEST_CASES` says; the nightly form is 10,000.
fn cases(quick: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases: quick, ..config } }
}

/// What opening found.
#[derive(Default)]
struct Seen {
    snapshot: Option<Vec<u8>>,
    parts: Vec<Vec<u8>>,
    frames: Vec<Frame>,
}

impl Replay for Seen {
    fn snapshot(&mut self, bytes: &[u8]) -> Result<(), String> {
        assert!(self.snapshot.replace(bytes.to_vec()).is_none() && self.frames.is_empty());
        Ok(())
    }

    fn snapshot_part(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.parts.push(bytes.to_vec());
        Ok(())
    }

    fn record(&mut self, frame: &Frame) -> Result<(), String> {
        assert!(self.frames.last().is_none_or(|last| last.lsn() + 1 == frame.lsn()), "LSNs are not dense");
        self.frames.push(frame.clone());
        Ok(())
    }
}

impl Seen {
    fn records(&self) -> Vec<Record> {
        self.frames.iter().map(read).collect()
    }
}

fn records(range: Range<usize>) -> Vec<Record> {
    range.map(record).collect()
}

fn disk(dir: &Path) -> Arc<dyn Storage> {
    Arc::new(Disk::new(dir).unwrap())
}

fn try_open(dir: &Path, options: LogOptions) -> Result<(Log, Seen), StoreError> {
    let mut seen = Seen::default();
    Log::open(disk(dir), options, &mut seen).map(|log| (log, seen))
}

fn open_with(dir: &Path, options: LogOptions) -> (Log, Seen) {
    try_open(dir, options).map_err(|error| error.to_string()).unwrap()
}

fn open(dir: &Path) -> (Log, Seen) {
    open_with(dir, SMALL)
}

fn refusal(dir: &Path) -> StoreError {
    try_open(dir, SMALL).err().expect("the log opened")
}

/// File and offset of the damage that opening `dir` is refused for.
fn damage(dir: &Path) -> (String, u64) {
    match refusal(dir) {
        StoreError::Corrupt { path, offset, .. } => (path.file_name().unwrap().to_string_lossy().into_owned(), offset),
        other => panic!("{other}"),
    }
}

fn name(number: u32) -> String {
    format!("{number:010}.log")
}

fn file(dir: &Path, number: u32) -> PathBuf {
    dir.join(name(number))
}

fn files(dir: &Path) -> Vec<u32> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut numbers: Vec<u32> = names.filter_map(|name| name.strip_suffix(".log")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

/// A directory in memory where there is one: most of these tests are about bytes, not about the disk.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

/// A copy of what is on disk now, as `kill -9` would leave it; what is preallocated stays a hole.
fn crash(dir: &Path) -> TempDir {
    let copy = scratch();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // A file that is made ahead may get another name meanwhile.
        let Ok(bytes) = fs::read(&path) else { continue };
        let mut data = &bytes[..];
        while let Some(rest) = data.strip_suffix(&[0; 1024]) {
            data = rest;
        }
        let to = copy.path().join(path.file_name().unwrap());
        fs::write(&to, data).unwrap();
        cut(&to, bytes.len() as u64);
    }
    copy
}

fn flip(path: &Path, bit: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8).unwrap();
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn cut(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn end(location: &Location) -> u64 {
    location.offset + u64::from(location.len)
}

/// A closed log of `n` records in `dir`, and where they are.
fn filled(dir: &Path, n: usize, options: LogOptions) -> Vec<Location> {
    let (log, _) = open_with(dir, options);
    let locations = fill(&log, 0..n);
    log.close().unwrap();
    locations
}
