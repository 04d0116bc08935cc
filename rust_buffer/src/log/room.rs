//! Room that is kept for a full disk: what leads to an eviction, and the snapshot that it needs, must always fit.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{directory::SNAPSHOT_NAME, storage::Storage};
use crate::error::is_no_space;

/// Room for a snapshot that is always kept, as a share of a file's.
const SNAPSHOT_SHARE: u64 = 8;

/// What of the room that each file keeps for a full disk a record may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Half of it, if it has no arrays.
    Usual,
    /// All of it: the record leads to files that can be deleted.
    Last,
}

/// Bytes that the next snapshot has room for.
#[derive(Default)]
pub(super) struct SnapshotRoom(AtomicU64);

impl SnapshotRoom {
    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Makes room for `bytes`; false where the disk has none. Nobody else may write a snapshot meanwhile.
    pub(super) fn make(&self, storage: &dyn Storage, bytes: u64) -> bool {
        // More than is needed now, so that it need not be asked for again so soon.
        let room = match storage.spare(SNAPSHOT_NAME, &[bytes.saturating_add(bytes / 4), bytes]) {
            Ok(room) => room,
            Err(error) if is_no_space(&error) => 0,
            // Whoever writes the snapshot meets it again, and says so.
            Err(_) => bytes,
        };
        self.0.store(room, Ordering::Relaxed);
        room >= bytes
    }

    /// Makes room of the usual size, after a snapshot was read or written; as far as the disk has it.
    pub(super) fn renew(&self, storage: &dyn Storage, file_bytes: u64) {
        let now = storage.size(SNAPSHOT_NAME);
        if !self.make(storage, now.saturating_mul(2).max(file_bytes / SNAPSHOT_SHARE)) {
            // The one that was replaced has left as much.
            self.make(storage, now);
        }
    }
}
