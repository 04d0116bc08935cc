//! Every way in which the store refuses or fails; a message says what happened, the value, the limit and the remedy.

use std::path::{Path, PathBuf};

/// What went wrong in the store or its log.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields and variants that say themselves")]
pub enum StoreError {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Another writer holds the directory.
    #[error("{} is open in another writer; close that one or choose another directory", path.display())]
    Locked { path: PathBuf },
    /// The directory is not on a disk of this machine.
    #[error(
        "{} lies on {name}, a network file system, on which locks, maps and syncs of a log are not proven; \
         keep the store in a directory on a disk of this machine (`store.dir` of a run)", path.display()
    )]
    Network { path: PathBuf, name: &'static str },
    /// Bytes that were written whole are not the ones read.
    #[error("{} is damaged at byte {offset}: {detail}; restore the file from a copy", path.display())]
    Corrupt {
        path: PathBuf,
        /// Where the damaged record starts, in bytes.
        offset: u64,
        /// What was expected and what was found.
        detail: String,
    },
    /// The file has another format version.
    #[error("{} has log format {found}, this program reads {supported}; open it with the version that wrote it", path.display())]
    Version {
        path: PathBuf,
        /// Format version in the file.
        found: u32,
        /// Format version of this program.
        supported: u32,
    },
    /// A record that only a newer program can read.
    #[error("{} has at byte {offset} {detail}; open it with the version that wrote it", path.display())]
    Newer {
        path: PathBuf,
        /// Where the record starts, in bytes.
        offset: u64,
        /// What it is.
        detail: String,
    },
    /// A write or sync failed before; nothing later may be called durable.
    #[error("the log stopped accepting records after a failure: {detail}; repair the cause and open it again")]
    Poisoned {
        /// The first failure.
        detail: String,
    },
    /// Admission refused.
    #[error("{what} would reach {value}, the limit is {limit}; {remedy}")]
    Full {
        /// What is limited.
        what: &'static str,
        /// Value after the refused admission.
        value: u64,
        limit: u64,
        /// What to raise or wait for.
        remedy: &'static str,
    },
    /// The disk has no room for a record; nothing of it is written, and it may be tried again.
    #[error(
        "{}: the disk is full, {bytes} more bytes are needed; commit and evict what is trained, or free space",
        path.display()
    )]
    NoSpace { path: PathBuf, bytes: u64 },
    /// A repeat with other content, a gap, or an operation in the wrong state.
    #[error("{0}")]
    Conflict(String),
    /// A change was asked of a reader.
    #[error("{} is open for reading only; open it without `read` to change it", path.display())]
    ReadOnly { path: PathBuf },
    /// A signal came in during a wait.
    #[error("the wait was interrupted by a signal")]
    Interrupted,
    /// The store or its log is closed.
    #[error("the store is closed; open it again")]
    Closed,
}

impl StoreError {
    /// An operating system error at `path`.
    pub fn io(path: impl AsRef<Path>, source: impl Into<std::io::Error>) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source: source.into() }
    }

    /// Damage in `path` at byte `offset`.
    pub fn corrupt(path: impl AsRef<Path>, offset: u64, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_path_buf(), offset, detail: detail.into() }
    }
}

/// Whether the disk has no room, or what the caller may use of it.
pub fn is_no_space(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, StoreError>;
