//! A directory on disk: written with pwrite, read through read-only maps.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::{
    fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek},
    io::{Errno, pwritev},
};

use super::{
    lock,
    storage::{Bytes, Medium, Storage},
};
use crate::error::{Result, StoreError};

/// Most parts of one pwritev; Linux takes 1024.
const MAX_PARTS: usize = 512;

const PAGE_BYTES: u64 = 4096;

/// Bytes that are copied at once from a file that may be written meanwhile.
const COPY_BYTES: usize = 4096;

/// A directory of log files.
pub struct Disk {
    dir: PathBuf,
}

impl Disk {
    /// The directory `dir`, made where it is missing.
    ///
    /// # Errors
    /// `Io`.
    pub fn new(dir: &Path) -> Result<Self> {
        let mut missing: Vec<&Path> = dir.ancestors().take_while(|path| !path.as_os_str().is_empty()).collect();
        missing.retain(|path| !path.is_dir());
        fs::create_dir_all(dir).map_err(|e| StoreError::io(dir, e))?;
        for path in missing {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            sync_dir(parent).map_err(|e| StoreError::io(parent, e))?;
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// The directory `dir`, which nothing here will change.
    pub fn existing(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Storage for Disk {
    fn path(&self) -> &Path {
        &self.dir
    }

    fn lock(&self) -> Result<Box<dyn Send>> {
        let path = self.dir.join("lock");
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(|e| StoreError::io(&path, e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Box::new(file)),
            Err(Errno::WOULDBLOCK) => Err(StoreError::Locked { path }),
            Err(e) => Err(StoreError::io(&path, e)),
        }
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
        names.collect()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn Medium>> {
        let path = self.dir.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        Ok(Arc::new(DiskFile { path, file: Some(file), map: Mutex::new(None) }))
    }

    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn Medium>> {
        let path = self.dir.join(name);
        // A file that is only read is opened when it is: there may be many.
        let file = write.then(|| OpenOptions::new().read(true).write(true).open(&path)).transpose()?;
        Ok(Arc::new(DiskFile { path, file, map: Mutex::new(None) }))
    }

    fn replace(&self, name: &str, bytes: &[&[u8]]) -> io::Result<()> {
        let aside = self.dir.join(format!("{name}.tmp"));
        let file = File::create(&aside)?;
        write_all(&file, 0, bytes)?;
        file.sync_all()?;
        fs::rename(&aside, self.dir.join(name))?;
        self.sync_names()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        sync_dir(&self.dir)
    }
}

/// Fills `bytes` as far as the file goes.
fn read_whole(file: &File, at: u64, mut bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while !bytes.is_empty() {
        match file.read_at(bytes, at + done) {
            Ok(0) => break,
            Ok(read) => (bytes, done) = (&mut bytes[read..], done + read as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn write_all(file: &File, mut at: u64, parts: &[&[u8]]) -> io::Result<()> {
    for chunk in parts.chunks(MAX_PARTS) {
        let mut slices: Vec<IoSlice<'_>> = chunk.iter().map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut slices[..];
        while rest.iter().any(|slice| !slice.is_empty()) {
            match pwritev(file, rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    at += written as u64;
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Bytes of a map whose pages are faulted in together: one by one they cost more than copying what is in them.
const FAULT_BYTES: usize = 2 << 20;

/// A log file; `file` is None where it is only read.
struct DiskFile {
    path: PathBuf,
    file: Option<File>,
    /// Made at the first read, and again when a read lies beyond it.
    map: Mutex<Option<Map>>,
}

struct Map {
    bytes: Arc<MmapRaw>,
    /// Which pieces of `FAULT_BYTES` have been faulted in.
    touched: Vec<bool>,
}

impl Map {
    fn of(file: &File) -> io::Result<Self> {
        let bytes = Arc::new(MmapOptions::new().map_raw_read_only(file)?);
        let touched = vec![false; bytes.len().div_ceil(FAULT_BYTES)];
        Ok(Self { bytes, touched })
    }

    fn touch(&mut self, from: usize, to: usize) {
        for piece in from / FAULT_BYTES..to.div_ceil(FAULT_BYTES).min(self.touched.len()) {
            if !std::mem::replace(&mut self.touched[piece], true) {
                let start = piece * FAULT_BYTES;
                let len = FAULT_BYTES.min(self.bytes.len() - start);
                // Older kernels cannot; then the pages come one by one.
                let _ = self.bytes.advise_range(Advice::PopulateRead, start, len);
            }
        }
    }
}

impl DiskFile {
    fn writable(&self) -> io::Result<&File> {
        self.file.as_ref().ok_or_else(|| io::Error::other("the file is open for reading only"))
    }

    fn with<T>(&self, run: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        match &self.file {
            Some(file) => run(file),
            None => run(&File::open(&self.path)?),
        }
    }
}

impl Medium for DiskFile {
    fn len(&self) -> io::Result<u64> {
        Ok(fs::metadata(&self.path)?.len())
    }

    fn data_end(&self) -> io::Result<u64> {
        let len = self.len()?;
        self.with(|file| {
            let (mut at, mut end) = (0, 0);
            loop {
                match seek(file, SeekFrom::Data(at)).and_then(|start| seek(file, SeekFrom::Hole(start))) {
                    Ok(hole) if hole > at => (at, end) = (hole, hole),
                    Err(Errno::NXIO) => return Ok(end),
                    _ => return Ok(len),
                }
            }
        })
    }

    fn allocate(&self, from: u64, to: u64) -> io::Result<()> {
        if to <= from {
            return Ok(());
        }
        let file = self.writable()?;
        match fallocate(file, FallocateFlags::empty(), from, to - from) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(to),
            Err(e) => Err(e.into()),
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.writable()?.set_len(len)
    }

    fn write(&self, at: u64, parts: &[&[u8]]) -> io::Result<()> {
        write_all(self.writable()?, at, parts)
    }

    #[allow(unsafe_code)]
    fn hasten(&self, from: u64, to: u64) {
        // The last page may be written again soon. A length of 0 would mean all that follows.
        let len = (to / PAGE_BYTES * PAGE_BYTES).saturating_sub(from);
        #[cfg(target_os = "linux")]
        if let (Some(file), Ok(from), Ok(len @ 1..)) = (&self.file, from.try_into(), len.try_into()) {
            // SAFETY: the call has an open descriptor and numbers, and no memory. Its failure is `sync`'s to tell:
            // without the flags that wait, it takes no error of the file away.
            unsafe { libc::sync_file_range(file.as_raw_fd(), from, len, libc::SYNC_FILE_RANGE_WRITE) };
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.writable()?.sync_data()
    }

    fn read(&self, at: u64, len: usize) -> io::Result<Option<Bytes>> {
        let Some(end) = at.checked_add(len as u64) else { return Ok(None) };
        let mut cell = lock(&self.map);
        let map = match &mut *cell {
            Some(map) if map.bytes.len() as u64 >= end => map,
            _ => cell.insert(self.with(Map::of)?),
        };
        map.touch(at as usize, end as usize);
        Ok(Bytes::mapped(&map.bytes, at as usize, len))
    }

    fn copy(&self, len: u64) -> io::Result<Bytes> {
        self.with(|file| {
            let mut bytes = vec![0; len as usize];
            // Backwards, as the writer goes forwards: what is there with a record is there with all before it.
            for (at, piece) in bytes.chunks_mut(COPY_BYTES).enumerate().rev() {
                read_whole(file, (at * COPY_BYTES) as u64, piece)?;
            }
            Ok(Bytes::from(&bytes[..]))
        })
    }
}
