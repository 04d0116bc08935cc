//! The directory of a log: its lock, the names of its files, and what is durable in it.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::error::{Result, StoreError};

/// Path of log file `number` in `dir`.
pub(super) fn file_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("{number:010}.log"))
}

/// Numbers of the log files in `dir` and their lengths.
pub(super) fn list_files(dir: &Path) -> Result<BTreeMap<u32, u64>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|e| StoreError::io(dir, e))? {
        let entry = entry.map_err(|e| StoreError::io(dir, e))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_suffix(".log")).filter(|n| n.len() == 10);
        if let Some(number) = number.and_then(|n| n.parse().ok()) {
            files.insert(number, entry.metadata().map_err(|e| StoreError::io(entry.path(), e))?.len());
        }
    }
    Ok(files)
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io(dir, e))
}

/// Creates `dir` where it is missing and takes its lock.
pub(super) fn lock_dir(dir: &Path) -> Result<File> {
    if !dir.is_dir() {
        fs::create_dir_all(dir).map_err(|e| StoreError::io(dir, e))?;
        let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync_dir(parent)?;
    }
    let path = dir.join("lock");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = open.map_err(|e| StoreError::io(&path, e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StoreError::Locked { path }),
        Err(e) => Err(StoreError::io(&path, e)),
    }
}

/// Deletes the file at `path` where there is one.
pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, e)),
        _ => Ok(()),
    }
}
