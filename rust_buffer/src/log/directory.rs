//! Names of the log's files.

use std::collections::BTreeSet;

use super::storage::Storage;
use crate::error::{Result, StoreError};

/// Name of the file with the newest snapshot.
pub(super) const SNAPSHOT_NAME: &str = "index";

/// Name of a log file that is not begun.
pub(super) const NEXT_NAME: &str = "next";

/// Name of log file `number`.
pub(super) fn file_name(number: u32) -> String {
    format!("{number:010}.log")
}

/// Numbers of the log files, and whether there is a snapshot.
pub(super) fn list(storage: &dyn Storage) -> Result<(BTreeSet<u32>, bool)> {
    let names = storage.names().map_err(|e| StoreError::io(storage.path(), e))?;
    let number = |name: &String| -> Option<u32> {
        let number = name.strip_suffix(".log").filter(|number| number.len() == 10)?.parse().ok()?;
        (number > 0).then_some(number)
    };
    Ok((names.iter().filter_map(number).collect(), names.iter().any(|name| name == SNAPSHOT_NAME)))
}

/// Deletes log file `number` where there is one.
pub(super) fn remove(storage: &dyn Storage, number: u32) -> Result<()> {
    let name = file_name(number);
    storage.remove(&name).map_err(|e| StoreError::io(storage.path_of(&name), e))
}
