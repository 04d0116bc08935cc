//! Files in memory that count what is read of them, and of which a snapshot cannot be replaced by one thread.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use _rust_buffer::{
    error::Result,
    log::{Bytes, Medium, Memory, Storage},
};

/// The files.
#[derive(Default)]
pub struct Watched {
    pub memory: Memory,
    /// Name of the thread to which the disk answers with an error when it replaces a file.
    pub failing: Option<&'static str>,
    /// Bytes read.
    pub read: Arc<AtomicU64>,
}

impl Watched {
    fn file(&self, medium: Arc<dyn Medium>) -> Arc<dyn Medium> {
        Arc::new(File { medium, read: Arc::clone(&self.read) })
    }
}

struct File {
    medium: Arc<dyn Medium>,
    read: Arc<AtomicU64>,
}

impl Storage for Watched {
    fn path(&self) -> &Path {
        self.memory.path()
    }

    fn lock(&self) -> Result<Box<dyn Send>> {
        self.memory.lock()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.memory.names()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        self.memory.create(name).map(|medium| self.file(medium))
    }

    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn Medium>> {
        self.memory.open(name, write).map(|medium| self.file(medium))
    }

    fn replace(&self, name: &str, parts: &mut dyn Iterator<Item = io::Result<Vec<u8>>>) -> io::Result<()> {
        if self.failing.is_some() && std::thread::current().name() == self.failing {
            return Err(io::Error::other("the disk is broken"));
        }
        self.memory.replace(name, parts)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.memory.remove(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.memory.rename(from, to)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.memory.sync_names()
    }
}

impl Medium for File {
    fn len(&self) -> io::Result<u64> {
        self.medium.len()
    }

    fn data_end(&self) -> io::Result<u64> {
        self.medium.data_end()
    }

    fn allocate(&self, from: u64, to: u64) -> io::Result<()> {
        self.medium.allocate(from, to)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.medium.truncate(len)
    }

    fn write(&self, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        self.medium.write(at, parts)
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.sync()
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Option<Bytes>> {
        self.read.fetch_add(len as u64, Ordering::Relaxed);
        self.medium.read(at, len)
    }

    fn copy(&self, len: u64) -> io::Result<Bytes> {
        self.medium.copy(len)
    }
}
