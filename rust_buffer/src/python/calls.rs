//! How every call takes the store, without the GIL, and how it is let go.

use pyo3::prelude::*;

use super::{TrajectoryStore, errors};
use crate::{error::Result, store::Store, store::shared::Clock};

impl TrajectoryStore {
    pub(super) fn query<T: Send>(&self, py: Python<'_>, run: impl FnOnce(&Store) -> Result<T> + Send) -> PyResult<T> {
        Ok(py.detach(|| self.shared.query(run))?)
    }

    pub(super) fn change<T: Send>(
        &self, py: Python<'_>, wait: bool, run: impl FnOnce(&mut Store) -> Result<T> + Send,
    ) -> PyResult<T> {
        Ok(py.detach(|| self.shared.change(wait, run))?.1)
    }

    /// The clock of a call that waits.
    pub(super) fn waiting(&self, py: Python<'_>, now_s: Option<f64>) -> PyResult<Clock> {
        Ok(self.shared.clock(now_s).interruptible(errors::interrupted(py)?))
    }
}

impl Drop for TrajectoryStore {
    fn drop(&mut self) {
        // Whoever wants to know calls `close` first.
        let _ = self.shared.close();
    }
}
