//! A directory on disk: written with pwrite, read through read-only maps.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice},
    num::NonZeroU64,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::{
    fs::{Advice as FileAdvice, FallocateFlags, FlockOperation, SeekFrom, fadvise, fallocate, flock, seek},
    io::{Errno, pwritev},
};

use super::{
    lock,
    network::refuse_network,
    storage::{Bytes, Medium, Storage},
};
use crate::error::{Result, StoreError};

/// Most parts of one pwritev; Linux takes 1024.
const MAX_PARTS: usize = 512;

const PAGE_BYTES: u64 = 4096;

/// Most bytes that Linux reads ahead when it is asked once.
const READ_AHEAD_BYTES: usize = 128 << 10;

/// Bytes that are copied at once from a file that may be written meanwhile.
const COPY_BYTES: usize = 4096;

/// A directory of log files.
pub struct Disk {
    dir: PathBuf,
    /// What was found readable before the newest of these is looked at again.
    looks: Arc<AtomicU64>,
}

impl Disk {
    /// The directory `dir`, made where it is missing.
    ///
    /// # Errors
    /// `Io`; `Network` where it lies on a network file system.
    pub fn new(dir: &Path) -> Result<Self> {
        // Of what was there, the last name may be that of a process that died before it was synced.
        let mut made: Vec<&Path> = dir.ancestors().take_while(|path| !path.as_os_str().is_empty()).collect();
        made.retain(|path| *path == dir || !path.is_dir());
        let existed = dir.is_dir();
        fs::create_dir_all(dir).map_err(|e| StoreError::io(dir, e))?;
        for path in made {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            match sync_dir(parent) {
                // Then somebody else made the name.
                Err(e) if existed && e.kind() == io::ErrorKind::PermissionDenied => {}
                synced => synced.map_err(|e| StoreError::io(parent, e))?,
            }
        }
        refuse_network(dir)?;
        Ok(Self::existing(dir))
    }

    /// The directory `dir`, which nothing here will change.
    pub fn existing(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), looks: Arc::new(AtomicU64::new(1)) }
    }

    /// Where the next content of `name` is written. What is there already keeps its place on the disk.
    fn aside(&self, name: &str) -> io::Result<(PathBuf, File)> {
        let path = self.dir.join(format!("{name}.tmp"));
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        Ok((path, file))
    }

    fn medium(&self, path: PathBuf, file: Option<File>) -> Arc<dyn Medium> {
        Arc::new(DiskFile { path, file, map: Mutex::new(None), looks: Arc::clone(&self.looks) })
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
            Ok(()) => Ok(Box::new(Lock { file, pid: std::process::id() })),
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
        Ok(self.medium(path, Some(file)))
    }

    fn open(&self, name: &str, write: bool) -> io::Result<Arc<dyn Medium>> {
        let path = self.dir.join(name);
        // A file that is only read is opened when it is: there may be many.
        let file = write.then(|| OpenOptions::new().read(true).write(true).open(&path)).transpose()?;
        Ok(self.medium(path, file))
    }

    fn replace(&self, name: &str, parts: &mut dyn Iterator<Item = io::Result<Vec<u8>>>) -> io::Result<()> {
        let (aside, file) = self.aside(name)?;
        let mut end = 0;
        for part in parts {
            let part = part?;
            if end > 0 {
                file.sync_data()?;
            }
            write_all(&file, end, &[&part])?;
            end += part.len() as u64;
        }
        file.set_len(end)?;
        file.sync_all()?;
        fs::rename(&aside, self.dir.join(name))?;
        self.sync_names()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn spare(&self, name: &str, wanted: &[u64]) -> io::Result<u64> {
        let (_, file) = self.aside(name)?;
        let mut refused = None;
        for bytes in wanted {
            match preallocate(&file, 0, *bytes) {
                // A file system that cannot promise it has room or has not: `replace` finds out.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(*bytes),
                Err(error) => refused = Some(error.into()),
            }
        }
        refused.map_or(Ok(0), Err)
    }

    fn size(&self, name: &str) -> u64 {
        fs::metadata(self.dir.join(name)).map_or(0, |file| file.len())
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

    fn look_again(&self) {
        self.looks.fetch_add(1, Ordering::Relaxed);
    }
}

/// The lock on a directory. It belongs to the open file, which a forked child has too: closing this process's
/// descriptor would leave it with a child that lives on, and a child that ends must not undo it.
struct Lock {
    file: File,
    pid: u32,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            // There is nobody to tell, and the end of the process does it too.
            let _ = flock(&self.file, FlockOperation::Unlock);
        }
    }
}

/// Makes room in a file; a signal that interrupts it is no failure.
fn preallocate(file: &File, from: u64, to: u64) -> rustix::io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), from, to - from) {
            Err(Errno::INTR) => {}
            allocated => return allocated,
        }
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

/// Bytes of a map whose pages are faulted in together at least: one by one they cost more than copying what is in them.
const FAULT_BYTES: usize = 64 << 10;

/// A log file; `file` is None where it is only read.
struct DiskFile {
    path: PathBuf,
    file: Option<File>,
    /// Made at the first read, and again when a read lies beyond it.
    map: Mutex<Option<Map>>,
    looks: Arc<AtomicU64>,
}

struct Map {
    bytes: Arc<MmapRaw>,
    /// At which look each piece of `FAULT_BYTES` was last found readable.
    seen: Vec<u64>,
}

impl Map {
    fn of(file: &File) -> io::Result<Self> {
        let bytes = Arc::new(MmapOptions::new().map_raw_read_only(file)?);
        let seen = vec![0; bytes.len().div_ceil(FAULT_BYTES)];
        Ok(Self { bytes, seen })
    }

    /// Faults the pages of a range in; false where the disk cannot, and touching them would end the process.
    fn is_readable(&mut self, from: usize, to: usize, look: u64) -> bool {
        let pieces = from / FAULT_BYTES..to.div_ceil(FAULT_BYTES);
        if self.seen[pieces.clone()].iter().all(|seen| *seen == look) {
            return true;
        }
        let (start, end) = (pieces.start * FAULT_BYTES, (pieces.end * FAULT_BYTES).min(self.bytes.len()));
        if self.bytes.advise_range(Advice::PopulateRead, start, end - start).is_ok() {
            self.seen[pieces].fill(look);
            return true;
        }
        // The file may end before the map does: what was preallocated goes when it is sealed.
        let start = from / PAGE_BYTES as usize * PAGE_BYTES as usize;
        self.bytes.advise_range(Advice::PopulateRead, start, to - start).is_ok()
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
        match preallocate(file, from, to) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(to),
            allocated => Ok(allocated?),
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
        let look = self.looks.load(Ordering::Relaxed);
        if map.bytes.len() as u64 >= end && map.is_readable(at as usize, end as usize, look) {
            return Ok(Bytes::mapped(&map.bytes, at as usize, len));
        }
        drop(cell);
        // The disk cannot read it, or the file was cut, or the kernel is older than 5.14: what pread says is right.
        self.with(|file| {
            let mut bytes = vec![0; len.min(file.metadata()?.len().saturating_sub(at) as usize)];
            read_whole(file, at, &mut bytes)?;
            Ok((bytes.len() == len).then(|| Bytes::from(&bytes[..])))
        })
    }

    fn will_need(&self, from: u64, to: u64) {
        let ask = |file: &File| {
            for at in (from..to).step_by(READ_AHEAD_BYTES) {
                let len = NonZeroU64::new((to - at).min(READ_AHEAD_BYTES as u64));
                fadvise(file, at, len, FileAdvice::WillNeed)?;
            }
            Ok(())
        };
        // What is not read now is read when it is wanted.
        let _ = self.with(ask);
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
