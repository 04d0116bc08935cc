//! The Python module; this file and its submodules alone name pyo3. Every call releases the GIL before it takes the store's lock.

#![allow(clippy::needless_pass_by_value)] // pyo3 hands over owned arguments.

mod buffers;
mod calls;
mod errors;
mod packing;
mod parse;
mod rows;
mod settings;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use pyo3::{buffer::PyBuffer, exceptions::PyValueError, prelude::*, pybacked::PyBackedBytes};

use crate::{
    state::group::Kind,
    state::record::{Admit, Quota},
    state::successes::Drawn,
    state::trajectory::Version,
    store::admission::Prompt,
    store::claim_view::{ClaimView, Columns},
    store::query::{Bounds, Filter},
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};
use buffers::{Buffers, View};
use parse::{seconds, ticks};
use rows::Row;
use settings::Given;

/// Trajectory, stale, grant.
type Answer = (u64, bool, u32);

/// The trajectory store; `pmdflow/_rust_buffer.pyi` documents it.
#[pyclass(frozen, module = "pmdflow._rust_buffer")]
struct TrajectoryStore {
    shared: Arc<Shared>,
}

#[pymethods]
impl TrajectoryStore {
    #[new]
    #[pyo3(signature = (path, *, groups_per_iteration, lookahead, max_staleness, segment_loss = "all",
        window = None, signal = None, successes = None, min_group_size = 2, one_version = false, straggler = None, max_attempts = 3,
        lease_ttl_s = 30.0, grant_tokens = 64, durability = "group", max_bytes = None, file_bytes = 67_108_864,
        sync_interval_s = 0.005, read_only = false, scorers = Vec::new()))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>, path: Option<PathBuf>, groups_per_iteration: usize, lookahead: u32, max_staleness: Option<u32>,
        segment_loss: &str, window: Option<u64>, signal: Option<(Option<f64>, Option<f64>)>,
        successes: Option<(f64, f64)>, min_group_size: u32, one_version: bool, straggler: Option<(u32, f64)>,
        max_attempts: u32, lease_ttl_s: f64, grant_tokens: u32, durability: &str, max_bytes: Option<u64>,
        file_bytes: u64, sync_interval_s: f64, read_only: bool, scorers: Vec<String>,
    ) -> PyResult<Self> {
        #[rustfmt::skip] // One name a line says no more.
        let settings = Settings::try_from(Given {
            groups_per_iteration, lookahead, max_staleness, segment_loss, window, signal, successes, min_group_size, one_version,
            straggler, max_attempts, lease_ttl_s, grant_tokens, durability, max_bytes, file_bytes, sync_interval_s,
        })?;
        let shared = py.detach(|| settings::open(path, settings, read_only, scorers))?;
        Ok(Self { shared })
    }

    fn set_quota(
        &self, py: Python<'_>, version: Version, groups: u64, tokens: u64, tokens_per_segment: Option<u32>,
    ) -> PyResult<()> {
        self.change(py, true, |store| store.set_quota(version, Quota { groups, tokens, tokens_per_segment }))
    }

    #[pyo3(signature = (request_id, *, cursor, kind, prompt_id, prompt, metadata, text = None, group_size, max_tokens,
        priority = 0, drawn = None, wait = true))]
    #[allow(clippy::too_many_arguments)]
    fn admit(
        &self, py: Python<'_>, request_id: String, cursor: Option<u64>, kind: &str, prompt_id: String, prompt: &[u8],
        metadata: &[u8], text: Option<&str>, group_size: u32, max_tokens: u32, priority: i32,
        drawn: Option<(u64, i64)>, wait: bool,
    ) -> PyResult<u64> {
        let kind = parse::kind(kind)?;
        let cursor = cursor.filter(|_| kind == Kind::Train);
        let prompt_len = (prompt.len() / 4) as u32;
        let drawn = drawn.map(|(key, number)| Drawn { key, number });
        let admit =
            Admit { request_id, cursor, kind, prompt_id, prompt_len, size: group_size, max_tokens, priority, drawn };
        self.change(py, wait, |store| store.admit(&admit, Prompt { tokens: prompt, metadata, text }))
    }

    #[pyo3(signature = (worker, version, max_leases, timeout_s, now_s = None, kind = None))]
    #[allow(clippy::too_many_arguments)]
    fn lease<'py>(
        &self, py: Python<'py>, worker: &str, version: Version, max_leases: usize, timeout_s: f64, now_s: Option<f64>,
        kind: Option<&str>,
    ) -> PyResult<Vec<Row<'py>>> {
        let (timeout_s, clock) = (seconds("timeout_s", timeout_s)?, self.waiting(py, now_s)?);
        let kind = kind.map(parse::kind).transpose()?;
        let leases = py.detach(|| self.shared.lease_kind(worker, version, max_leases, kind, timeout_s, clock))?;
        leases.iter().map(|lease| rows::lease(py, lease)).collect()
    }

    fn lease_group<'py>(&self, py: Python<'py>, worker: &str, group: u64) -> PyResult<Vec<Row<'py>>> {
        let leases = py.detach(|| self.shared.lease_group(worker, group, self.shared.clock(None)))?;
        leases.iter().map(|lease| rows::lease(py, lease)).collect()
    }

    fn set_oldest(&self, py: Python<'_>, version: Version) -> PyResult<()> {
        self.change(py, false, |store| {
            store.set_oldest(version);
            Ok(())
        })
    }

    fn in_flight(&self, py: Python<'_>) -> PyResult<BTreeMap<Version, u64>> {
        self.query(py, Store::in_flight)
    }

    fn wait_drained(&self, py: Python<'_>, version: Version, timeout_s: f64) -> PyResult<bool> {
        let (timeout_s, clock) = (seconds("timeout_s", timeout_s)?, self.waiting(py, None)?);
        let drained = |store: &mut Store, _| Ok(store.has_drained(version)?.then_some(()));
        Ok(py.detach(|| self.shared.wait(timeout_s, clock, drained))?.is_some())
    }

    fn fence(&self, py: Python<'_>, worker: &str) -> PyResult<usize> {
        self.change(py, false, |store| store.fence(worker))
    }

    #[pyo3(signature = (batch, wait = true, now_s = None))]
    fn append(
        &self, py: Python<'_>, batch: PyBuffer<u8>, wait: bool, now_s: Option<f64>,
    ) -> PyResult<(u64, Vec<Answer>)> {
        let view = View::new(batch)?;
        let (lsn, replies) = py.detach(|| {
            let batch = Batch::decode(view.bytes())?;
            let now = self.shared.clock(now_s).base();
            self.shared.change(wait, |store| store.append(&batch, now))
        })?;
        Ok((lsn, replies.into_iter().map(|reply| (reply.trajectory, reply.stale, reply.grant)).collect()))
    }

    #[pyo3(signature = (trajectory, epoch, offset, wait = true, now_s = None))]
    fn fork(
        &self, py: Python<'_>, trajectory: u64, epoch: u64, offset: u32, wait: bool, now_s: Option<f64>,
    ) -> PyResult<(bool, u64, u64)> {
        let now = self.shared.clock(now_s).base();
        let forked = self.change(py, wait, |store| store.fork(trajectory, epoch, offset, now))?;
        Ok((forked.stale, forked.branch, forked.epoch))
    }

    #[pyo3(signature = (trajectory, epoch, number, rewards, key = None, wait = true, now_s = None))]
    #[allow(clippy::too_many_arguments)]
    fn turn(
        &self, py: Python<'_>, trajectory: u64, epoch: u64, number: usize, rewards: BTreeMap<String, f64>,
        key: Option<String>, wait: bool, now_s: Option<f64>,
    ) -> PyResult<bool> {
        let now = self.shared.clock(now_s).base();
        self.change(py, wait, |store| store.turn(trajectory, epoch, number, rewards, key, now))
    }

    #[pyo3(signature = (max_items, ttl_s, timeout_s, now_s = None))]
    fn unscored<'py>(
        &self, py: Python<'py>, max_items: usize, ttl_s: f64, timeout_s: f64, now_s: Option<f64>,
    ) -> PyResult<Vec<Row<'py>>> {
        let (ttl, timeout_s, clock) =
            (ticks("ttl_s", ttl_s)?, seconds("timeout_s", timeout_s)?, self.waiting(py, now_s)?);
        let items = py.detach(|| self.shared.unscored(max_items, ttl, timeout_s, clock))?;
        items.iter().map(|item| rows::unscored(py, item)).collect()
    }

    fn unannotated<'py>(
        &self, py: Python<'py>, scorer: &str, max_items: usize, ttl_s: f64, timeout_s: f64, now_s: Option<f64>,
    ) -> PyResult<Vec<Row<'py>>> {
        let (ttl, timeout_s, clock) =
            (ticks("ttl_s", ttl_s)?, seconds("timeout_s", timeout_s)?, self.waiting(py, now_s)?);
        let items = py.detach(|| self.shared.unannotated(scorer, max_items, ttl, timeout_s, clock))?;
        items.iter().map(|item| rows::unannotated(py, item)).collect()
    }

    fn annotate(
        &self, py: Python<'_>, trajectory: u64, scorer: &str, columns: Vec<(String, String, PyBackedBytes)>,
        wait: bool, now_s: Option<f64>,
    ) -> PyResult<()> {
        let now = self.shared.clock(now_s).base();
        let columns: Vec<_> = columns.iter().map(|(name, dtype, bytes)| (&name[..], &dtype[..], &bytes[..])).collect();
        self.change(py, wait, |store| store.annotate(trajectory, scorer, &columns, now))
    }

    #[pyo3(signature = (trajectory, attempt, outcome, reward, components, wait = true, now_s = None))]
    #[allow(clippy::too_many_arguments)]
    fn score(
        &self, py: Python<'_>, trajectory: u64, attempt: u32, outcome: &str, reward: f64,
        components: BTreeMap<String, f64>, wait: bool, now_s: Option<f64>,
    ) -> PyResult<()> {
        let (outcome, now) = (parse::outcome(outcome)?, self.shared.clock(now_s).base());
        self.change(py, wait, |store| store.score(trajectory, attempt, outcome, reward, components, now))
    }

    fn publish(
        &self, py: Python<'_>, version: Version, iteration: Option<i64>, left_out: BTreeMap<String, Vec<u64>>,
    ) -> PyResult<()> {
        let left_out = parse::left_out(&left_out)?;
        self.change(py, true, |store| store.publish(version, iteration, left_out))
    }

    fn restore(&self, py: Python<'_>, version: Version, weights_of: Version) -> PyResult<()> {
        self.change(py, true, |store| store.restore(version, weights_of))
    }

    #[pyo3(signature = (iteration, version, timeout_s, now_s = None))]
    fn claim<'py>(
        &self, py: Python<'py>, iteration: i64, version: Version, timeout_s: f64, now_s: Option<f64>,
    ) -> PyResult<Row<'py>> {
        let (timeout_s, clock) = (seconds("timeout_s", timeout_s)?, self.waiting(py, now_s)?);
        let answer =
            py.detach(|| self.shared.wait(timeout_s, clock, |store, now| store.claim(iteration, version, now)))?;
        match answer {
            Some((lsn, answer)) => rows::claim(py, Some(answer), lsn),
            None => rows::claim(py, None, self.query(py, |store| Ok(store.lsn()))?),
        }
    }

    fn claim_tokens(&self, py: Python<'_>, iteration: i64) -> PyResult<usize> {
        Ok(py.detach(|| self.shared.query(|store| ClaimView::new(store.state(), iteration))?.num_tokens())?)
    }

    #[pyo3(signature = (iteration, *, tokens, logprobs, versions, temperatures, mask, check))]
    #[allow(clippy::too_many_arguments)]
    fn read_claim<'py>(
        &self, py: Python<'py>, iteration: i64, tokens: PyBuffer<u8>, logprobs: PyBuffer<u8>, versions: PyBuffer<u8>,
        temperatures: PyBuffer<u8>, mask: PyBuffer<u8>, check: bool,
    ) -> PyResult<Row<'py>> {
        let mut buffers = Buffers::new([tokens, logprobs, versions, temperatures, mask])?;
        let (version, packed) = py.detach(|| {
            let [tokens, logprobs, versions, temperatures, mask] = buffers.slices();
            let mut columns = Columns { tokens, logprobs, versions, temperatures, mask };
            self.shared.read_claim(iteration, &mut columns, check)
        })?;
        rows::batch(py, iteration, version, &packed)
    }

    fn record_plan(
        &self, py: Python<'_>, iteration: i64, rule: String, seed: Option<i64>, num_steps: u32, steps: Vec<u32>,
    ) -> PyResult<()> {
        self.change(py, true, |store| store.record_plan(iteration, rule, seed, num_steps, &steps))
    }

    fn plan<'py>(&self, py: Python<'py>, iteration: i64) -> PyResult<Option<Row<'py>>> {
        self.query(py, |store| store.plan(iteration))?.map(|plan| rows::plan(py, &plan)).transpose()
    }

    fn claim_rows<'py>(&self, py: Python<'py>, iteration: i64) -> PyResult<Row<'py>> {
        let (version, packed, segments) = py.detach(|| self.shared.claim_rows(iteration))?;
        let row = rows::batch(py, iteration, version, &packed)?;
        rows::set_segments(&row, &segments).map(|()| row)
    }

    fn token_counts(&self, py: Python<'_>, trajectories: Vec<u64>) -> PyResult<Vec<i64>> {
        Ok(py.detach(|| self.shared.token_counts(trajectories))?)
    }

    fn epochs(&self, py: Python<'_>, trajectories: Vec<u64>) -> PyResult<BTreeMap<u64, u64>> {
        Ok(py.detach(|| self.shared.epochs(&trajectories))?)
    }

    #[pyo3(signature = (trajectories, *, tokens, logprobs, check))]
    fn read_tokens(
        &self, py: Python<'_>, trajectories: Vec<u64>, tokens: PyBuffer<u8>, logprobs: PyBuffer<u8>, check: bool,
    ) -> PyResult<()> {
        let mut buffers = Buffers::new([tokens, logprobs])?;
        py.detach(|| {
            let [tokens, logprobs] = buffers.slices();
            self.shared.read_tokens(trajectories, tokens, logprobs, check)
        })?;
        Ok(())
    }

    fn prefetch(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.shared.prefetch())?)
    }

    fn read_extras<'py>(&self, py: Python<'py>, trajectories: Vec<u64>) -> PyResult<Vec<Row<'py>>> {
        let extras = py.detach(|| self.shared.read_extras(trajectories))?;
        extras.iter().map(|extra| rows::extra(py, extra)).collect()
    }

    fn commit(&self, py: Python<'_>, iteration: i64) -> PyResult<()> {
        self.change(py, true, |store| store.commit_claims(iteration))
    }

    fn uncommit(&self, py: Python<'_>, iteration: i64) -> PyResult<Vec<i64>> {
        self.change(py, true, |store| store.uncommit(iteration))
    }

    fn evict(&self, py: Python<'_>, iteration: i64) -> PyResult<usize> {
        let groups = self.change(py, true, |store| store.evict(iteration))?;
        Ok(py.detach(|| self.shared.remove_dead_files()).map(|()| groups)?)
    }

    fn discard(&self, py: Python<'_>, group: u64, reason: &str) -> PyResult<bool> {
        let discarded = self.change(py, true, |store| store.discard(group, reason))?;
        Ok(py.detach(|| self.shared.remove_dead_files()).map(|()| discarded)?)
    }

    fn eval_results<'py>(&self, py: Python<'py>, prefix: &str, timeout_s: f64) -> PyResult<Option<Vec<Row<'py>>>> {
        let (timeout_s, clock) = (seconds("timeout_s", timeout_s)?, self.waiting(py, None)?);
        let results = py.detach(|| self.shared.wait(timeout_s, clock, |store, _| store.eval_results(prefix)))?;
        let rows = |(_, results): (_, Vec<_>)| results.iter().map(|result| rows::eval_result(py, result)).collect();
        results.map(rows).transpose()
    }

    fn drop_eval(&self, py: Python<'_>, prefix: &str) -> PyResult<usize> {
        let groups = self.change(py, true, |store| store.drop_eval(prefix))?;
        Ok(py.detach(|| self.shared.remove_dead_files()).map(|()| groups)?)
    }

    fn groups<'py>(
        &self, py: Python<'py>, state: Option<&str>, after: Option<u64>, limit: usize,
    ) -> PyResult<(Vec<Row<'py>>, Option<u64>)> {
        let (page, next) = py.detach(|| self.shared.groups(state, after, limit.max(1)))?;
        Ok((page.iter().map(|group| rows::group(py, group)).collect::<PyResult<_>>()?, next))
    }

    #[pyo3(signature = (after, limit, *, iteration, version, reward, length, stop, prompt_id, group, kind, state))]
    #[allow(clippy::too_many_arguments)]
    fn select<'py>(
        &self, py: Python<'py>, after: Option<u64>, limit: usize, iteration: Option<i64>, version: Bounds<Version>,
        reward: Bounds<f64>, length: Bounds<u32>, stop: Option<u8>, prompt_id: Option<String>, group: Option<u64>,
        kind: Option<&str>, state: Option<String>,
    ) -> PyResult<(Vec<Row<'py>>, Option<u64>)> {
        let (kind, stop) = (kind.map(parse::kind).transpose()?, stop.map(parse::stop).transpose()?);
        state.as_deref().map(parse::state).transpose()?;
        let filter = Filter { iteration, version, reward, length, stop, prompt_id, group, kind, state };
        let (page, next) = self.query(py, |store| Ok(store.select(&filter, after, limit.max(1))))?;
        Ok((page.iter().map(|selected| rows::selected(py, selected)).collect::<PyResult<_>>()?, next))
    }

    fn claims(&self, py: Python<'_>) -> PyResult<BTreeMap<i64, &'static str>> {
        self.query(py, |store| Ok(store.claims()))
    }

    fn claim_lsn(&self, py: Python<'_>, iteration: i64) -> PyResult<u64> {
        self.query(py, |store| Ok(store.state().claim(iteration)?.lsn))
    }

    fn take_late<'py>(&self, py: Python<'py>) -> PyResult<Vec<Row<'py>>> {
        let reports = self.change(py, true, |store| Ok(store.take_late_reports()))?;
        reports.iter().map(|report| rows::late_report(py, report)).collect()
    }

    fn trajectories<'py>(&self, py: Python<'py>, trajectories: Vec<u64>) -> PyResult<Vec<Row<'py>>> {
        let views = py.detach(|| self.shared.trajectories(&trajectories))?;
        views.iter().map(|view| rows::trajectory(py, view)).collect()
    }

    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Row<'py>> {
        rows::counts(py, &self.query(py, |store| Ok(store.counts()))?)
    }

    fn ledger<'py>(&self, py: Python<'py>) -> PyResult<Row<'py>> {
        rows::ledger(py, &self.query(py, |store| Ok(store.ledger()))?)
    }

    fn versions_spent(&self, py: Python<'_>) -> PyResult<BTreeMap<Version, u64>> {
        self.query(py, |store| Ok(store.versions_spent()))
    }

    #[pyo3(signature = (after = None))]
    fn successes<'py>(&self, py: Python<'py>, after: Option<i64>) -> PyResult<rows::Rates<'py>> {
        Ok(rows::rates(py, &self.query(py, |store| Ok(store.successes()))?, after))
    }

    fn wait_durable(&self, py: Python<'_>, lsn: Option<u64>, timeout_s: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(seconds("timeout_s", timeout_s)?)
            .map_err(|error| PyValueError::new_err(format!("timeout_s is {timeout_s}: {error}")))?;
        let interrupted = errors::interrupted(py)?;
        Ok(py.detach(|| self.shared.wait_durable(lsn, timeout, interrupted))?)
    }

    fn sync(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.shared.sync())?)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.shared.close())?)
    }
}

/// The trajectory store: the life of a trajectory on an append-only, CRC-framed log.
#[pymodule(gil_used = false)]
mod _rust_buffer {
    #[pymodule_export]
    use super::TrajectoryStore;
    #[pymodule_export]
    use super::errors::{Conflict, CorruptLog, DiskFault, StoreError, StoreFull, StoreLocked, StorePoisoned};
    #[pymodule_export]
    use super::packing::pack;
}
