//! A disk that loses power: what is not synced may be there, may be gone, and may be torn at any 512-byte sector.
//!
//! Each file is kept twice, as the page cache shows it and as the disk has it, with every version that each dirty
//! sector has had since it was last synced. Power loss keeps any of these versions, sector by sector, any of the
//! lengths, and any state of each name since the last sync of the names. A sync that fails keeps a part and calls all
//! pages clean, as Linux does: what was lost stays visible until the power goes, and no later sync brings it back.
//! Names whose sync failed stay dirty: a file system that loses those refuses to go on.

mod file;

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use _rust_buffer::{
    error::{Result, StoreError},
    log::{Bytes, Medium, Storage},
};
use file::{Dice, File};

/// What is to go wrong, and after how many operations of its kind it does. Each happens once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process dies within an operation that changes something.
    Death(u32),
    /// A sync of a file or of the names fails.
    Sync(u32),
    /// The disk is full in the middle of a write.
    Write(u32),
    /// The disk has no room to be allocated.
    Room(u32),
    /// A read fails.
    Read(u32),
}

type Names = BTreeMap<String, usize>;

struct Inner {
    files: Vec<File>,
    names: Names,
    disk_names: Names,
    /// What each name was since the last sync of the names, oldest first.
    dirty_names: BTreeMap<String, Vec<Option<usize>>>,
    locked: bool,
    dead: bool,
    /// Counts the processes that had the disk.
    process: u32,
    faults: Vec<Fault>,
    dice: Dice,
}

/// The disk; clones share it.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<Inner>>);

impl Disk {
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            files: Vec::new(),
            names: Names::new(),
            disk_names: Names::new(),
            dirty_names: BTreeMap::new(),
            locked: false,
            dead: false,
            process: 0,
            faults: Vec::new(),
            dice: Dice(seed),
        })))
    }

    /// The disk as the next process sees it.
    pub fn process(&self) -> Arc<dyn Storage> {
        Arc::new(Process { disk: self.clone(), number: self.lock().process })
    }

    pub fn arm(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    pub fn disarm(&self) {
        self.lock().faults.clear();
    }

    /// Ends the process, and faults that are yet to come; the page cache survives.
    pub fn kill(&self) {
        self.disarm();
        let mut inner = self.lock();
        (inner.locked, inner.dead) = (false, false);
        inner.process += 1;
    }

    /// Ends the process and everything that is not on the disk.
    pub fn lose_power(&self) {
        self.kill();
        let mut guard = self.lock();
        let Inner { files, names, disk_names, dirty_names, dice, .. } = &mut *guard;
        for (name, versions) in std::mem::take(dirty_names) {
            if let Some(version) = dice.below(versions.len() + 1).checked_sub(1).map(|pick| versions[pick]) {
                set(disk_names, &name, version);
            }
        }
        names.clone_from(disk_names);
        for file in files {
            file.sync_partly(dice);
            file.cache = file.disk.clone();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }
}

fn set(names: &mut Names, name: &str, file: Option<usize>) {
    match file {
        Some(file) => names.insert(name.to_owned(), file),
        None => names.remove(name),
    };
}

fn failure(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, "a fault of the simulated disk")
}

impl Inner {
    /// Counts down the faults of a kind; true when one of them is due.
    fn is_due(&mut self, of_kind: impl Fn(&mut Fault) -> Option<&mut u32>) -> bool {
        let due = self.faults.iter_mut().position(|fault| {
            of_kind(fault).is_some_and(|left| {
                *left = left.saturating_sub(1);
                *left == 0
            })
        });
        due.map(|index| self.faults.remove(index)).is_some()
    }

    /// Whether the process dies within the operation that changes something and is about to begin.
    fn dies(&mut self) -> bool {
        self.dead = self.is_due(|fault| if let Fault::Death(left) = fault { Some(left) } else { None });
        self.dead
    }

    fn rename(&mut self, name: &str, file: Option<usize>) {
        set(&mut self.names, name, file);
        self.dirty_names.entry(name.to_owned()).or_default().push(file);
    }

    fn create(&mut self) -> usize {
        self.files.push(File::default());
        self.files.len() - 1
    }

    fn write(&mut self, file: usize, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        let bytes = parts.concat();
        let dies = self.dies();
        if dies || self.is_due(|fault| if let Fault::Write(left) = fault { Some(left) } else { None }) {
            let part = self.dice.below(bytes.len() + 1);
            self.files[file].write(at as usize, &bytes[..part]);
            return Err(failure(if dies { io::ErrorKind::BrokenPipe } else { io::ErrorKind::StorageFull }));
        }
        self.files[file].write(at as usize, &bytes);
        Ok(())
    }

    fn resize(&mut self, file: usize, len: u64) -> io::Result<()> {
        if self.dies() {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        self.files[file].resize(len as usize);
        Ok(())
    }

    /// Whether a sync goes well; none begins in a dead process.
    fn syncs(&mut self) -> io::Result<bool> {
        if self.dies() {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        Ok(!self.is_due(|fault| if let Fault::Sync(left) = fault { Some(left) } else { None }))
    }

    fn sync(&mut self, file: usize) -> io::Result<()> {
        if self.syncs()? {
            self.files[file].sync();
            return Ok(());
        }
        self.files[file].sync_partly(&mut self.dice);
        Err(failure(io::ErrorKind::Other))
    }

    fn sync_names(&mut self) -> io::Result<()> {
        if !self.syncs()? {
            return Err(failure(io::ErrorKind::Other));
        }
        self.disk_names = self.names.clone();
        self.dirty_names.clear();
        Ok(())
    }

    fn read<T>(&mut self, run: impl FnOnce(&Self) -> T) -> io::Result<T> {
        if self.is_due(|fault| if let Fault::Read(left) = fault { Some(left) } else { None }) {
            return Err(failure(io::ErrorKind::Other));
        }
        Ok(run(self))
    }
}

/// The disk in the hands of one process.
struct Process {
    disk: Disk,
    number: u32,
}

/// An open file.
struct Handle {
    process: Process,
    file: usize,
}

/// Lets others in when it goes, unless its process is gone already.
struct Guard(Process);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Ok(mut inner) = self.0.inner() {
            inner.locked = false;
        }
    }
}

impl Process {
    fn inner(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.disk.lock();
        if inner.dead || inner.process != self.number {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        Ok(inner)
    }

    fn again(&self) -> Self {
        Self { disk: self.disk.clone(), number: self.number }
    }

    fn handle(&self, file: usize) -> Arc<dyn Medium> {
        Arc::new(Handle { process: self.again(), file })
    }
}

impl Storage for Process {
    fn path(&self) -> &Path {
        Path::new("simulated")
    }

    fn lock(&self) -> Result<Box<dyn Send>> {
        let mut inner = self.inner().map_err(|e| StoreError::io(self.path(), e))?;
        if std::mem::replace(&mut inner.locked, true) {
            return Err(StoreError::Locked { path: self.path().to_path_buf() });
        }
        Ok(Box::new(Guard(self.again())))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.inner()?.read(|inner| inner.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let mut inner = self.inner()?;
        if inner.names.contains_key(name) {
            return Err(failure(io::ErrorKind::AlreadyExists));
        }
        let (file, dies) = (inner.create(), inner.dies());
        inner.rename(name, Some(file));
        if dies { Err(failure(io::ErrorKind::BrokenPipe)) } else { Ok(self.handle(file)) }
    }

    fn open(&self, name: &str, _write: bool) -> io::Result<Arc<dyn Medium>> {
        let file = self.inner()?.names.get(name).copied();
        file.map(|file| self.handle(file)).ok_or_else(|| failure(io::ErrorKind::NotFound))
    }

    fn replace(&self, name: &str, parts: &mut dyn Iterator<Item = io::Result<Vec<u8>>>) -> io::Result<()> {
        let (mut inner, aside) = (self.inner()?, format!("{name}.tmp"));
        let (file, mut end) = (inner.create(), 0);
        inner.rename(&aside, Some(file));
        for part in parts {
            let part = part?;
            inner.write(file, end, &[&part])?;
            inner.sync(file)?;
            end += part.len() as u64;
        }
        if inner.dies() {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        inner.rename(&aside, None);
        inner.rename(name, Some(file));
        inner.sync_names()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut inner = self.inner()?;
        if inner.dies() {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        if inner.names.contains_key(name) {
            inner.rename(name, None);
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.inner()?;
        if inner.dies() {
            return Err(failure(io::ErrorKind::BrokenPipe));
        }
        let file = inner.names.get(from).copied().ok_or_else(|| failure(io::ErrorKind::NotFound))?;
        inner.rename(from, None);
        inner.rename(to, Some(file));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        self.inner()?.sync_names()
    }
}

impl Medium for Handle {
    fn len(&self) -> io::Result<u64> {
        self.process.inner()?.read(|inner| inner.files[self.file].cache.bytes.len() as u64)
    }

    fn data_end(&self) -> io::Result<u64> {
        self.process.inner()?.read(|inner| inner.files[self.file].cache.data_end as u64)
    }

    fn allocate(&self, from: u64, to: u64) -> io::Result<()> {
        let mut inner = self.process.inner()?;
        if to <= from || to <= inner.files[self.file].cache.bytes.len() as u64 {
            return Ok(());
        }
        if inner.is_due(|fault| if let Fault::Room(left) = fault { Some(left) } else { None }) {
            return Err(failure(io::ErrorKind::StorageFull));
        }
        inner.resize(self.file, to)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.process.inner()?.resize(self.file, len)
    }

    fn write(&self, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.process.inner()?.write(self.file, at, parts)
    }

    fn sync(&self) -> io::Result<()> {
        self.process.inner()?.sync(self.file)
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Option<Bytes>> {
        let range = at as usize..at as usize + len;
        self.process.inner()?.read(|inner| inner.files[self.file].cache.bytes.get(range).map(Bytes::from))
    }

    fn copy(&self, len: u64) -> io::Result<Bytes> {
        let copy = |inner: &Inner| {
            let mut bytes = inner.files[self.file].cache.bytes.clone();
            bytes.resize(len as usize, 0);
            Bytes::from(&bytes[..])
        };
        self.process.inner()?.read(copy)
    }
}
