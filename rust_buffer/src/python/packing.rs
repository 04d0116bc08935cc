//! `pack`: micro-batches over ranks.

use pyo3::{exceptions::PyValueError, prelude::*};

use crate::pack::{Micro, Packing, pack_steps};

#[pyfunction]
#[pyo3(signature = (lengths, *, ranks, limit, steps = None, quadratic = 0.0))]
pub fn pack(
    py: Python<'_>, lengths: Vec<u64>, ranks: usize, limit: u64, steps: Option<Vec<usize>>, quadratic: f64,
) -> PyResult<Vec<Vec<Vec<Micro>>>> {
    if ranks == 0 || limit == 0 || !quadratic.is_finite() || quadratic < 0.0 {
        return Err(PyValueError::new_err(format!(
            "ranks ({ranks}) and limit ({limit}) must be >= 1 and quadratic ({quadratic}) a number >= 0"
        )));
    }
    let steps = steps.unwrap_or_else(|| vec![lengths.len()]);
    if steps.iter().sum::<usize>() != lengths.len() {
        return Err(PyValueError::new_err(format!(
            "steps has {} sequences, lengths has {}; each sequence is in one step",
            steps.iter().sum::<usize>(),
            lengths.len()
        )));
    }
    Ok(py.detach(|| pack_steps(&lengths, &steps, Packing { ranks, limit, quadratic })))
}
