//! Answers as Python dictionaries.

use std::{collections::BTreeMap, iter::repeat_n};

use pyo3::{
    prelude::*,
    types::{IntoPyDict, PyBytes, PyDict, PyList, PyString},
};

use crate::{
    log::Lsn,
    state::record::Plan,
    state::successes::Successes,
    state::trajectory::Version,
    state::turn::Turn,
    store::arrays::{Extra, Extras, StoredPrompt},
    store::claim_view::{Rows, Segments},
    store::claims::{ClaimAnswer, EvalResult},
    store::counts::Counts,
    store::late::LateReport,
    store::query::Selected,
    store::reads::{GroupView, LeaseView, TrajectoryView, UnscoredView},
};

/// One answer.
pub type Row<'py> = Bound<'py, PyDict>;

/// Number of the rates of success, keys (u64), rates (f64).
pub type Rates<'py> = (i64, Bound<'py, PyBytes>, Bound<'py, PyBytes>);

pub fn rates<'py>(py: Python<'py>, successes: &Successes, after: Option<i64>) -> Rates<'py> {
    let moved = successes.since(after).into_iter();
    let (keys, rates): (Vec<_>, Vec<_>) = moved.map(|(key, rate)| (key.to_le_bytes(), rate.to_le_bytes())).unzip();
    (successes.number, PyBytes::new(py, keys.as_flattened()), PyBytes::new(py, rates.as_flattened()))
}

pub fn ledger<'py>(py: Python<'py>, ledger: &[(&str, i64)]) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    ledger.iter().try_for_each(|(key, tokens)| row.set_item(key, tokens))?;
    Ok(row)
}

/// What every answer with a prompt says of it.
fn set_prompt(row: &Row<'_>, prompt: &StoredPrompt) -> PyResult<()> {
    row.set_item("metadata", PyBytes::new(row.py(), &prompt.metadata))?;
    row.set_item("text", prompt.text.as_deref())
}

pub fn lease<'py>(py: Python<'py>, view: &LeaseView) -> PyResult<Row<'py>> {
    let (lease, row) = (&view.granted, PyDict::new(py));
    row.set_item("trajectory", lease.trajectory)?;
    row.set_item("group", lease.group)?;
    row.set_item("epoch", lease.epoch)?;
    row.set_item("kind", lease.kind.name())?;
    set_prompt(&row, &view.prompt)?;
    row.set_item("prompt", PyBytes::new(py, &view.prompt.tokens))?;
    row.set_item("prefix", PyBytes::new(py, &view.prefix.ids))?;
    row.set_item("prefix_observed", PyBytes::new(py, &view.prefix.observed))?;
    row.set_item("max_tokens", lease.max_tokens)?;
    row.set_item("grant", lease.grant)?;
    Ok(row)
}

pub fn extra<'py>(py: Python<'py>, extras: &Extras) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    for (name, runs) in extras {
        let run = |run: &Extra| (run.offset, run.len, run.dtype.clone(), PyBytes::new(py, &run.bytes).unbind());
        row.set_item(name, runs.iter().map(run).collect::<Vec<_>>())?;
    }
    Ok(row)
}

pub fn unscored<'py>(py: Python<'py>, item: &UnscoredView) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("trajectory", item.id)?;
    row.set_item("group", item.trajectory.group)?;
    row.set_item("kind", item.group.kind.name())?;
    row.set_item("attempt", item.trajectory.attempts)?;
    row.set_item("prompt_id", &item.group.prompt_id)?;
    set_prompt(&row, &item.prompt)?;
    row.set_item("prompt", PyBytes::new(py, &item.prompt.tokens))?;
    row.set_item("tokens", PyBytes::new(py, &item.tokens.ids))?;
    row.set_item("observed", PyBytes::new(py, &item.tokens.observed))?;
    row.set_item("stop", item.trajectory.stop as u8)?;
    row.set_item("turns", turns(&item.turns))?;
    Ok(row)
}

/// A trajectory as a scorer is told of it.
pub fn unannotated<'py>(py: Python<'py>, view: &TrajectoryView) -> PyResult<Row<'py>> {
    let row = trajectory(py, view)?;
    set_prompt(&row, &view.prompt)?;
    Ok(row)
}

/// Offset, rewards, key of each note on an episode.
fn turns(turns: &[Turn]) -> Vec<(u32, &BTreeMap<String, f64>, Option<&str>)> {
    turns.iter().map(|turn| (turn.offset, &turn.rewards, turn.key.as_deref())).collect()
}

/// `answer` is None when the time was over first; `lsn` is the claim's record, or the newest one.
pub fn claim(py: Python<'_>, answer: Option<ClaimAnswer>, lsn: Lsn) -> PyResult<Row<'_>> {
    let (status, reason, groups, lsn) = match answer {
        Some(ClaimAnswer::Claimed(groups, lsn)) => ("claimed", None, groups, lsn),
        Some(ClaimAnswer::Starved(why)) => ("starved", Some(why.name()), Vec::new(), lsn),
        None => ("timeout", None, Vec::new(), lsn),
    };
    let row = PyDict::new(py);
    row.set_item("status", status)?;
    row.set_item("reason", reason)?;
    row.set_item("groups", groups)?;
    row.set_item("lsn", lsn)?;
    Ok(row)
}

pub fn batch<'py>(py: Python<'py>, iteration: i64, version: Version, rows: &Rows) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("iteration", iteration)?;
    row.set_item("version", version)?;
    let arrays: [(&str, &[u8]); 6] = [
        ("cu_seqlens", bytemuck::cast_slice(&rows.cu_seqlens)),
        ("prompt_lengths", bytemuck::cast_slice(&rows.prompt_lengths)),
        ("groups", bytemuck::cast_slice(&rows.groups)),
        ("trajectories", bytemuck::cast_slice(&rows.trajectories)),
        ("rewards", bytemuck::cast_slice(&rows.rewards)),
        ("stops", &rows.stops),
    ];
    arrays.into_iter().try_for_each(|(name, bytes)| row.set_item(name, PyBytes::new(py, bytes)))?;
    let components = PyDict::new(py);
    for (name, values) in &rows.components {
        components.set_item(name, PyBytes::new(py, bytemuck::cast_slice(values)))?;
    }
    row.set_item("components", components)?;
    let branches = PyDict::new(py);
    branches.set_item("episodes", PyBytes::new(py, bytemuck::cast_slice(&rows.episodes)))?;
    branches.set_item("parents", PyBytes::new(py, bytemuck::cast_slice(&rows.parents)))?;
    branches.set_item("fork_offsets", PyBytes::new(py, bytemuck::cast_slice(&rows.fork_offsets)))?;
    row.set_item("branches", rows.parents.iter().any(|parent| *parent >= 0).then_some(branches))?;
    let prompt_ids = rows.prompt_ids.iter().flat_map(|(id, count)| repeat_n(PyString::new(py, id), *count));
    row.set_item("prompt_ids", PyList::new(py, prompt_ids.collect::<Vec<_>>())?)?;
    row.set_item("columns", rows.columns)?;
    let said = |(row, turn): &(i64, Turn)| (*row, turn.offset, turn.rewards.clone(), turn.key.clone());
    row.set_item("turns", rows.turns.iter().map(said).collect::<Vec<_>>())?;
    row.set_item("restored", rows.restored.iter().copied().into_py_dict(py)?)?;
    Ok(row)
}

pub fn plan<'py>(py: Python<'py>, (plan, steps): &(Plan, Vec<u32>)) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("rule", &plan.rule)?;
    row.set_item("seed", plan.seed)?;
    row.set_item("num_steps", plan.num_steps)?;
    row.set_item("steps", steps)?;
    Ok(row)
}

/// Adds the segments of a claim to its row.
pub fn set_segments(row: &Row<'_>, segments: &Segments) -> PyResult<()> {
    let arrays: [(&str, &[u8]); 5] = [
        ("segment_offsets", bytemuck::cast_slice(&segments.offsets)),
        ("segment_lengths", bytemuck::cast_slice(&segments.lengths)),
        ("segment_versions", bytemuck::cast_slice(&segments.versions)),
        ("segment_temperatures", bytemuck::cast_slice(&segments.temperatures)),
        ("segment_masks", &segments.masks),
    ];
    arrays.into_iter().try_for_each(|(name, bytes)| row.set_item(name, PyBytes::new(row.py(), bytes)))
}

pub fn eval_result<'py>(py: Python<'py>, result: &EvalResult) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("request_id", &result.request_id)?;
    row.set_item("prompt_id", &result.prompt_id)?;
    row.set_item("reward", result.reward)?;
    row.set_item("length", result.len)?;
    row.set_item("stop", result.stop as u8)?;
    row.set_item("first_version", result.first_version)?;
    row.set_item("last_version", result.last_version)?;
    Ok(row)
}

pub fn group<'py>(py: Python<'py>, view: &GroupView) -> PyResult<Row<'py>> {
    let (group, row) = (&view.group, PyDict::new(py));
    row.set_item("group", view.id)?;
    row.set_item("request_id", &group.request_id)?;
    row.set_item("prompt_id", &group.prompt_id)?;
    row.set_item("kind", group.kind.name())?;
    row.set_item("state", view.state)?;
    row.set_item("iteration", view.iteration)?;
    row.set_item("trajectories", group.members().collect::<Vec<_>>())?;
    row.set_item("cursor", group.cursor)?;
    row.set_item("priority", group.priority)?;
    row.set_item("max_tokens", group.max_tokens)?;
    row.set_item("prompt_length", group.prompt_len)?;
    row.set_item("tokens", group.tokens)?;
    row.set_item("scored", group.scored())?;
    row.set_item("failed", group.failed)?;
    row.set_item("late", group.late)?;
    set_prompt(&row, &view.prompt)?;
    Ok(row)
}

pub fn selected<'py>(py: Python<'py>, selected: &Selected) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("trajectory", selected.trajectory)?;
    row.set_item("group", selected.group)?;
    row.set_item("prompt_id", &selected.prompt_id)?;
    row.set_item("kind", selected.kind.name())?;
    row.set_item("state", selected.state)?;
    row.set_item("group_state", selected.group_state)?;
    row.set_item("iteration", selected.iteration)?;
    row.set_item("reward", selected.reward)?;
    row.set_item("length", selected.len)?;
    row.set_item("stop", selected.stop as u8)?;
    row.set_item("first_version", selected.first_version)?;
    row.set_item("last_version", selected.last_version)?;
    Ok(row)
}

pub fn late_report<'py>(py: Python<'py>, report: &LateReport) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("group", report.group)?;
    row.set_item("prompt_id", &report.prompt_id)?;
    row.set_item("members", report.members)?;
    row.set_item("tokens", report.tokens)?;
    Ok(row)
}

pub fn trajectory<'py>(py: Python<'py>, view: &TrajectoryView) -> PyResult<Row<'py>> {
    let (trajectory, row) = (&view.trajectory, PyDict::new(py));
    row.set_item("trajectory", view.id)?;
    row.set_item("group", trajectory.group)?;
    row.set_item("state", view.state)?;
    row.set_item("prompt", PyBytes::new(py, &view.prompt.tokens))?;
    row.set_item("tokens", PyBytes::new(py, &view.tokens.ids))?;
    row.set_item("logprobs", PyBytes::new(py, &view.tokens.logprobs))?;
    row.set_item("observed", PyBytes::new(py, &view.tokens.observed))?;
    row.set_item("segments", trajectory.merged())?;
    row.set_item("reward", view.reward)?;
    row.set_item("components", &view.components)?;
    row.set_item("stop", trajectory.stop as u8)?;
    row.set_item("attempts", trajectory.attempts)?;
    row.set_item("epoch", trajectory.epoch)?;
    row.set_item("extra", extra(py, &view.extras)?)?;
    row.set_item("turns", turns(&view.turns))?;
    row.set_item("forks", view.forks.iter().map(|fork| (fork.branch, fork.start, fork.offset)).collect::<Vec<_>>())?;
    Ok(row)
}

pub fn counts<'py>(py: Python<'py>, counts: &Counts) -> PyResult<Row<'py>> {
    let row = PyDict::new(py);
    row.set_item("version", counts.version)?;
    row.set_item("max_version", counts.max_version)?;
    row.set_item("next_cursor", counts.next_cursor)?;
    row.set_item("lsn", counts.lsn)?;
    row.set_item("durable_lsn", counts.durable_lsn)?;
    row.set_item("groups_untrained", counts.groups_untrained)?;
    row.set_item("oldest_untrained", counts.oldest_untrained)?;
    row.set_item("groups_ready", counts.groups_ready)?;
    row.set_item("groups_claimed", counts.groups_claimed)?;
    row.set_item("claims_undone", counts.claims_undone)?;
    row.set_item("trajectories_leased", counts.trajectories_leased)?;
    row.set_item("trajectories_idle", counts.trajectories_idle)?;
    row.set_item("trajectories_partial", counts.trajectories_partial)?;
    row.set_item("trajectories_unscored", counts.trajectories_unscored)?;
    row.set_item("trajectories_late", counts.trajectories_late)?;
    row.set_item("groups_no_signal", counts.groups_no_signal)?;
    row.set_item("scores_ignored", counts.scores_ignored)?;
    row.set_item("eval_pending", counts.eval_pending)?;
    row.set_item("tokens_budget", counts.tokens_budget)?;
    row.set_item("tokens_spent", counts.tokens_spent)?;
    row.set_item("bytes", counts.bytes)?;
    Ok(row)
}
