//! `pack`: micro-batches over ranks.

use pyo3::{exceptions::PyValueError, prelude::*};

use crate::pack::{Micro, Packing, pack_steps};

/// Most parts, ranks times steps, that one call deals sequences to.
const MAX_PARTS: usize = 1 << 20;

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
    if ranks.saturating_mul(steps.len().max(1)) > MAX_PARTS {
        return Err(PyValueError::new_err(format!(
            "ranks ({ranks}) x steps ({}) is more than {MAX_PARTS}; name fewer",
            steps.len()
        )));
    }
    if lengths.iter().try_fold(0_u64, |sum, length| sum.checked_add(*length)).is_none() {
        return Err(PyValueError::new_err("the sum of lengths is 2^64 or more; lengths are numbers of tokens"));
    }
    let sequences = steps.iter().try_fold(0_usize, |sum, step| sum.checked_add(*step));
    if sequences != Some(lengths.len()) {
        return Err(PyValueError::new_err(format!(
            "steps has {} sequences, lengths has {}; each sequence is in one step",
            sequences.map_or("2^64 or more".to_owned(), |sequences| sequences.to_string()),
            lengths.len()
        )));
    }
    Ok(py.detach(|| pack_steps(&lengths, &steps, Packing { ranks, limit, quadratic })))
}
