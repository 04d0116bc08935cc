//! The exceptions of the Python module.

use pyo3::{PyErr, create_exception, exceptions::PyException};

use crate::error::StoreError as Failure;

create_exception!(pmdflow._rust_buffer, StoreError, PyException, "Root of the store's errors.");
create_exception!(
    pmdflow._rust_buffer,
    StoreFull,
    StoreError,
    "Admission refused: the quota of groups or `max_bytes` is reached, or the disk is full; names the limit."
);
create_exception!(
    pmdflow._rust_buffer,
    Conflict,
    StoreError,
    "A repeat with other content, a gap in offsets, or an operation in the wrong state."
);
create_exception!(
    pmdflow._rust_buffer,
    CorruptLog,
    StoreError,
    "Damage before the tail of the log, a newer format or a failed sync; names file and offset."
);
create_exception!(pmdflow._rust_buffer, StoreLocked, StoreError, "Another process has the store open for writing.");

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Full { .. } | Failure::NoSpace { .. } => StoreFull::new_err(text),
            Failure::Conflict(_) => Conflict::new_err(text),
            Failure::Corrupt { .. } | Failure::Version { .. } | Failure::Poisoned { .. } => CorruptLog::new_err(text),
            Failure::Locked { .. } => StoreLocked::new_err(text),
            Failure::Io { .. } | Failure::Network { .. } | Failure::ReadOnly { .. } | Failure::Closed => {
                StoreError::new_err(text)
            }
        }
    }
}
