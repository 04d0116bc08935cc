//! Files in memory, for simulations and tests: nothing survives.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, RwLock},
};

use super::{
    lock,
    storage::{Bytes, Medium, Storage},
};
use crate::error::Result;

/// A place without a disk.
#[derive(Default)]
pub struct Memory {
    files: Mutex<BTreeMap<String, Arc<MemoryFile>>>,
}

#[derive(Default)]
struct MemoryFile(RwLock<Vec<u8>>);

impl Storage for Memory {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn lock(&self) -> Result<Box<dyn Send>> {
        Ok(Box::new(()))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(lock(&self.files).keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let file = Arc::new(MemoryFile::default());
        lock(&self.files).insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn open(&self, name: &str, _write: bool) -> io::Result<Arc<dyn Medium>> {
        let file = lock(&self.files).get(name).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(file)
    }

    fn replace(&self, name: &str, parts: &mut dyn Iterator<Item = io::Result<Vec<u8>>>) -> io::Result<()> {
        let bytes = parts.collect::<io::Result<Vec<_>>>()?.concat();
        lock(&self.files).insert(name.to_owned(), Arc::new(MemoryFile(RwLock::new(bytes))));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        lock(&self.files).remove(name);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = lock(&self.files);
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(())
    }
}

impl MemoryFile {
    fn bytes(&self) -> io::Result<std::sync::RwLockReadGuard<'_, Vec<u8>>> {
        self.0.read().map_err(|_| io::Error::other("a call panicked"))
    }
}

impl Medium for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes()?.len() as u64)
    }

    fn data_end(&self) -> io::Result<u64> {
        self.len()
    }

    fn allocate(&self, _from: u64, _to: u64) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.write().map_err(|_| io::Error::other("a call panicked"))?.truncate(len as usize);
        Ok(())
    }

    fn write(&self, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut bytes = self.0.write().map_err(|_| io::Error::other("a call panicked"))?;
        bytes.resize(at as usize, 0);
        for part in parts {
            bytes.extend_from_slice(part);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Option<Bytes>> {
        let Some(end) = usize::try_from(at).ok().and_then(|at| at.checked_add(len)) else { return Ok(None) };
        Ok(self.bytes()?.get(at as usize..end).map(Bytes::from))
    }

    fn copy(&self, len: u64) -> io::Result<Bytes> {
        let mut bytes = self.bytes()?.clone();
        bytes.resize(len as usize, 0);
        Ok(Bytes::from(&bytes[..]))
    }
}
