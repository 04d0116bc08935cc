//! Where a log keeps its files; `disk` and `memory` are such places.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::MmapRaw;

use crate::error::Result;

/// A place for named files. Only what `sync_names`, `replace` and `Medium::sync` have answered is durable.
pub trait Storage: Send + Sync {
    /// Name of the place in messages.
    fn path(&self) -> &Path;

    /// Keeps other writers away while the guard lives.
    ///
    /// # Errors
    /// `Locked` by another writer, `Io`.
    fn lock(&self) -> Result<Box<dyn Send>>;

    /// Names of the files.
    ///
    /// # Errors
    /// Those of the operating system, as everywhere below.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Makes a new file.
    ///
    /// # Errors
    /// Also when it exists.
    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>>;

    /// Opens a file, for reading alone or for writing too.
    ///
    /// # Errors
    /// Also when there is none.
    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn Medium>>;

    /// Gives `name` the content of `parts`, durably, and never anything between the old and the new. Each part goes to
    /// the disk before the next one is asked for, so that others who sync have little to wait for.
    ///
    /// # Errors
    /// The old content stands.
    fn replace(&self, name: &str, parts: &mut dyn Iterator<Item = io::Result<Vec<u8>>>) -> io::Result<()>;

    /// Deletes a file where there is one.
    ///
    /// # Errors
    /// Those of the operating system.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name.
    ///
    /// # Errors
    /// Those of the operating system.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Keeps room for the next `replace` of `name`: the first of `wanted`, in bytes, that the disk has; none of them on an
    /// error.
    ///
    /// # Errors
    /// Those of the operating system.
    fn spare(&self, _name: &str, wanted: &[u64]) -> io::Result<u64> {
        Ok(wanted.first().copied().unwrap_or_default())
    }

    /// Bytes that `name` has; 0 where there is no such file.
    fn size(&self, _name: &str) -> u64 {
        0
    }

    /// Makes the names durable.
    ///
    /// # Errors
    /// Those of the operating system.
    fn sync_names(&self) -> io::Result<()>;

    /// Reads from now on find out anew whether the disk can read, and whether somebody has cut a file.
    fn look_again(&self) {}

    /// Path of a file in messages.
    fn path_of(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// One file.
pub trait Medium: Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// Those of the operating system, as everywhere below.
    fn len(&self) -> io::Result<u64>;

    /// Whether nothing is in it.
    ///
    /// # Errors
    /// Those of the operating system.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Where the last data ends: behind it are only bytes that were never written, which read as zeros.
    ///
    /// # Errors
    /// Those of the operating system.
    fn data_end(&self) -> io::Result<u64>;

    /// Makes room, so that writing below `to` needs no space; the length becomes at least `to`.
    ///
    /// # Errors
    /// Those of the operating system.
    fn allocate(&self, from: u64, to: u64) -> io::Result<()>;

    /// Cuts it to `len` bytes.
    ///
    /// # Errors
    /// Those of the operating system.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Writes the parts one behind the other.
    ///
    /// # Errors
    /// Any number of the bytes may be written.
    fn write(&self, at: u64, parts: &[&[u8]]) -> io::Result<()>;

    /// Begins to bring what is written in the range to disk, where the medium can; `sync` then has less to wait for.
    fn hasten(&self, _from: u64, _to: u64) {}

    /// Makes all that is written durable.
    ///
    /// # Errors
    /// It may never be.
    fn sync(&self) -> io::Result<()>;

    /// Bytes that nobody writes any more; None when they are not all there.
    ///
    /// # Errors
    /// Those of the operating system.
    fn read(&self, at: u64, len: usize) -> io::Result<Option<Bytes>>;

    /// Begins to read the range, where the medium can; `read` then has less to wait for.
    fn will_need(&self, _from: u64, _to: u64) {}

    /// A copy of the first `len` bytes, zeros beyond the end, while another process may write them or cut the file;
    /// whatever was written before a byte that is in it is in it too.
    ///
    /// # Errors
    /// Those of the operating system.
    fn copy(&self, len: u64) -> io::Result<Bytes>;
}

/// Bytes of a file. They stay readable when the file is deleted. Clone is cheap.
#[derive(Clone)]
pub struct Bytes {
    source: Source,
    offset: usize,
    len: usize,
}

#[derive(Clone)]
enum Source {
    Map(Arc<MmapRaw>),
    Copy(Arc<[u8]>),
}

impl Bytes {
    /// The range of `map` that starts at `offset`; None when the map ends before it does.
    pub(super) fn mapped(map: &Arc<MmapRaw>, offset: usize, len: usize) -> Option<Self> {
        let whole = offset.checked_add(len).is_some_and(|end| end <= map.len());
        whole.then(|| Self { source: Source::Map(Arc::clone(map)), offset, len })
    }

    /// A part of them, which must lie within.
    pub(super) fn slice(&self, offset: usize, len: usize) -> Self {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{offset}+{len} of {} bytes", self.len);
        Self { source: self.source.clone(), offset: self.offset + offset, len }
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self { source: Source::Copy(bytes.into()), offset: 0, len: bytes.len() }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        match &self.source {
            // SAFETY: `mapped` and `slice` have checked that the range lies within the map, which lives as long as
            // self. Callers ask only for bytes below the published end of a file, which are never written again
            // (invariant 6), for a file that no writer has yet, or for the records of a sealed one. That nobody
            // truncates the file from outside is the same assumption that every reader of a mapped file makes.
            Source::Map(map) => unsafe { std::slice::from_raw_parts(map.as_ptr().add(self.offset), self.len) },
            Source::Copy(bytes) => &bytes[self.offset..self.offset + self.len],
        }
    }
}
