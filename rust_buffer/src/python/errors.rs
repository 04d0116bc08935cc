//! The exceptions of the Python module.

use pyo3::{
    PyErr, PyResult, Python, create_exception,
    exceptions::{PyException, PyKeyboardInterrupt},
    types::PyAnyMethods,
};

use crate::{error::StoreError as Failure, store::shared::Interrupted};

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
    "Damage before the tail of the log, or another format; names file and offset."
);
create_exception!(
    pmdflow._rust_buffer,
    DiskFault,
    StoreError,
    "The operating system failed to read, write or sync a file; names it. What was acknowledged is not lost."
);
create_exception!(
    pmdflow._rust_buffer,
    StorePoisoned,
    StoreError,
    "A write or sync failed before, and the store takes no more records; names that failure. Open it again."
);
create_exception!(pmdflow._rust_buffer, StoreLocked, StoreError, "Another process has the store open for writing.");

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Full { .. } | Failure::NoSpace { .. } => StoreFull::new_err(text),
            Failure::Conflict(_) => Conflict::new_err(text),
            Failure::Corrupt { .. } | Failure::Version { .. } | Failure::Newer { .. } => CorruptLog::new_err(text),
            Failure::Io { .. } => DiskFault::new_err(text),
            Failure::Poisoned { .. } => StorePoisoned::new_err(text),
            Failure::Locked { .. } => StoreLocked::new_err(text),
            Failure::Interrupted => raised().unwrap_or_else(|| PyKeyboardInterrupt::new_err(text)),
            Failure::Network { .. } | Failure::ReadOnly { .. } | Failure::Closed => StoreError::new_err(text),
        }
    }
}

/// What ends a wait of this thread early: signals are handled in the main thread alone, and another one had better not
/// ask for the GIL while Python ends.
pub fn interrupted(py: Python<'_>) -> PyResult<Option<Interrupted>> {
    let threading = py.import("threading")?;
    let main: u64 = threading.call_method0("main_thread")?.getattr("ident")?.extract()?;
    let own: u64 = threading.call_method0("get_ident")?.extract()?;
    Ok((main == own).then_some(signalled))
}

/// Whether the handler of a signal has raised an exception, which stays set until `raised` takes it.
fn signalled() -> bool {
    Python::attach(|py| py.check_signals().map_err(|error| error.restore(py)).is_err())
}

fn raised() -> Option<PyErr> {
    Python::attach(PyErr::take)
}
