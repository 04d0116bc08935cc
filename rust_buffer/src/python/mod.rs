//! The Python module; this file and its submodules alone name pyo3. Every call releases the GIL before it takes the store's lock.

#![allow(clippy::needless_pass_by_value)] // pyo3 hands over owned arguments.

mod buffers;
mod errors;
mod rows;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use pyo3::{buffer::PyBuffer, exceptions::PyValueError, prelude::*, types::PyDict};

use crate::{
    clock::micros,
    error::StoreError as Failure,
    log::{Disk, Durability, Memory, Storage},
    pack::{self as micro_batches, Micro, Packing},
    state::group::{Kind, Straggler},
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    state::trajectory::{Outcome, Stop, Version},
    store::claim_view::{self, ClaimView, Columns},
    store::claims::ClaimAnswer,
    store::query::{Bounds, Filter},
    store::rollout::Granted,
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};
use buffers::Buffers;
use rows::Row;

fn choose<T: Copy>(what: &str, value: &str, known: &[(&str, T)]) -> PyResult<T> {
    known.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("{what} is {value:?}; choose one of {}", names.join(", ")))
    })
}

fn seconds(what: &str, value: f64) -> PyResult<f64> {
    if value.is_nan() || value < 0.0 {
        return Err(PyValueError::new_err(format!("{what} is {value}; it must be a number of seconds >= 0")));
    }
    Ok(value)
}

const KINDS: [(&str, Kind); 2] = [("train", Kind::Train), ("eval", Kind::Eval)];

/// States of trajectories, then of groups.
const STATES: [&str; 11] =
    ["leased", "idle", "unscored", "scored", "failed", "late", "partial", "ready", "claimed", "trained", "committed"];

/// Trajectory, stale, grant.
type Answer = (u64, bool, u32);

/// The trajectory store; `pmdflow/_rust_buffer.pyi` documents it.
#[pyclass(frozen, module = "pmdflow._rust_buffer")]
struct TrajectoryStore {
    shared: Shared,
}

#[pymethods]
impl TrajectoryStore {
    #[new]
    #[pyo3(signature = (path, *, groups_per_iteration, lookahead, max_staleness, segment_loss = "all",
        min_group_size = 2, straggler = None, max_attempts = 3, lease_ttl_s = 30.0, grant_tokens = 64,
        durability = "group", max_bytes = None, file_bytes = 67_108_864, commit_interval_s = 0.005,
        read_only = false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        path: Option<PathBuf>,
        groups_per_iteration: usize,
        lookahead: u32,
        max_staleness: Option<u32>,
        segment_loss: &str,
        min_group_size: u32,
        straggler: Option<(u32, f64)>,
        max_attempts: u32,
        lease_ttl_s: f64,
        grant_tokens: u32,
        durability: &str,
        max_bytes: Option<u64>,
        file_bytes: u64,
        commit_interval_s: f64,
        read_only: bool,
    ) -> PyResult<Self> {
        if groups_per_iteration == 0 || max_attempts == 0 || grant_tokens == 0 || file_bytes == 0 {
            return Err(PyValueError::new_err(
                "groups_per_iteration, max_attempts, grant_tokens and file_bytes must be >= 1",
            ));
        }
        let straggler = match straggler {
            Some((members, _)) if members < min_group_size.max(1) => {
                return Err(PyValueError::new_err(format!(
                    "straggler has {members} members, min_group_size is {min_group_size}; wait for at least these"
                )));
            }
            Some((members, wait_s)) => {
                Some(Straggler { members, wait: micros(seconds("the wait of straggler", wait_s)?) })
            }
            None => None,
        };
        let settings = Settings {
            groups_per_iteration,
            lookahead,
            max_staleness,
            segment_loss: choose(
                "segment_loss",
                segment_loss,
                &[("all", SegmentLoss::All), ("current_only", SegmentLoss::CurrentOnly)],
            )?,
            min_group_size,
            straggler,
            max_attempts,
            lease_ttl: micros(seconds("lease_ttl_s", lease_ttl_s)?),
            grant_tokens,
            durability: choose(
                "durability",
                durability,
                &[("os", Durability::Os), ("group", Durability::Group), ("always", Durability::Always)],
            )?,
            max_bytes,
            file_bytes,
            commit_interval: Duration::from_secs_f64(seconds("commit_interval_s", commit_interval_s)?.min(3600.0)),
        };
        let open = || {
            let storage: Arc<dyn Storage> = match path {
                Some(path) if read_only => Arc::new(Disk::existing(&path)),
                Some(path) => Arc::new(Disk::new(&path)?),
                None => Arc::new(Memory::default()),
            };
            if read_only { Store::read(&storage, settings) } else { Store::open(storage, settings) }
        };
        Ok(Self { shared: Shared::new(py.detach(open)?) })
    }

    #[pyo3(signature = (version, groups, tokens, tokens_per_segment))]
    fn set_quota(
        &self,
        py: Python<'_>,
        version: Version,
        groups: u64,
        tokens: u64,
        tokens_per_segment: Option<u32>,
    ) -> PyResult<()> {
        let quota = Quota { groups, tokens, tokens_per_segment };
        py.detach(|| self.shared.change(true, |store| store.set_quota(version, quota)))?;
        Ok(())
    }

    #[pyo3(signature = (request_id, *, cursor, kind, prompt_id, prompt, metadata, group_size, max_tokens, priority = 0,
        wait = true))]
    #[allow(clippy::too_many_arguments)]
    fn admit(
        &self,
        py: Python<'_>,
        request_id: String,
        cursor: Option<u64>,
        kind: &str,
        prompt_id: String,
        prompt: &[u8],
        metadata: &[u8],
        group_size: u32,
        max_tokens: u32,
        priority: i32,
        wait: bool,
    ) -> PyResult<u64> {
        let kind = choose("kind", kind, &KINDS)?;
        let cursor = cursor.filter(|_| kind == Kind::Train);
        let prompt_len = (prompt.len() / 4) as u32;
        let admit = Admit { request_id, cursor, kind, prompt_id, prompt_len, size: group_size, max_tokens, priority };
        Ok(py.detach(|| self.shared.change(wait, |store| store.admit(&admit, prompt, metadata)))?.1)
    }

    #[pyo3(signature = (worker, version, max_leases, timeout_s, now_s = None))]
    fn lease<'py>(
        &self,
        py: Python<'py>,
        worker: &str,
        version: Version,
        max_leases: usize,
        timeout_s: f64,
        now_s: Option<f64>,
    ) -> PyResult<Vec<Row<'py>>> {
        let timeout_s = seconds("timeout_s", timeout_s)?;
        let leases = py.detach(|| {
            let granted = self.shared.wait(timeout_s, self.shared.clock(now_s), |store, now| {
                store.lease(worker, version, max_leases, now).map(|leases| Some(leases).filter(|l| !l.is_empty()))
            })?;
            let granted = granted.map(|(_, granted)| granted).unwrap_or_default();
            granted.into_iter().map(|lease| self.read_lease(lease)).collect::<Result<Vec<_>, Failure>>()
        })?;
        leases.iter().map(|lease| rows::lease(py, lease)).collect()
    }

    #[pyo3(signature = (worker))]
    fn fence(&self, py: Python<'_>, worker: &str) -> PyResult<usize> {
        Ok(py.detach(|| self.shared.change(false, |store| store.fence(worker)))?.1)
    }

    #[pyo3(signature = (batch, wait = true, now_s = None))]
    fn append(&self, py: Python<'_>, batch: &[u8], wait: bool, now_s: Option<f64>) -> PyResult<(u64, Vec<Answer>)> {
        let (lsn, replies) = py.detach(|| {
            let batch = Batch::decode(batch)?;
            let now = self.shared.clock(now_s).base();
            self.shared.change(wait, |store| store.append(&batch, now))
        })?;
        Ok((lsn, replies.into_iter().map(|reply| (reply.trajectory, reply.stale, reply.grant)).collect()))
    }

    #[pyo3(signature = (max_items, ttl_s, timeout_s, now_s = None))]
    fn unscored<'py>(
        &self,
        py: Python<'py>,
        max_items: usize,
        ttl_s: f64,
        timeout_s: f64,
        now_s: Option<f64>,
    ) -> PyResult<Vec<Row<'py>>> {
        let (ttl, timeout_s) = (micros(seconds("ttl_s", ttl_s)?), seconds("timeout_s", timeout_s)?);
        let items = py.detach(|| {
            let waiting = self.shared.wait(timeout_s, self.shared.clock(now_s), |store, now| {
                let ids = store.unscored(max_items, ttl, now);
                let waiting = ids.into_iter().map(|id| {
                    let trajectory = store.state().trajectory(id)?.clone();
                    let group = store.state().group(trajectory.group)?.clone();
                    Ok(rows::Waiting { id, trajectory, group })
                });
                waiting.collect::<Result<Vec<_>, Failure>>().map(|items| Some(items).filter(|items| !items.is_empty()))
            })?;
            let waiting = waiting.map(|(_, waiting)| waiting).unwrap_or_default();
            let read = |item: rows::Waiting| {
                let prompt = claim_view::read_array(self.shared.log(), item.group.location, 0)?;
                let metadata = claim_view::read_array(self.shared.log(), item.group.location, 1)?;
                let tokens = claim_view::read_segments(self.shared.log(), &item.trajectory.segments)?;
                Ok((item, prompt, metadata, tokens))
            };
            waiting.into_iter().map(read).collect::<Result<Vec<_>, Failure>>()
        })?;
        items.into_iter().map(|item| rows::unscored(py, &item)).collect()
    }

    #[pyo3(signature = (trajectory, attempt, outcome, reward, components, wait = true, now_s = None))]
    #[allow(clippy::too_many_arguments)]
    fn score(
        &self,
        py: Python<'_>,
        trajectory: u64,
        attempt: u32,
        outcome: &str,
        reward: f64,
        components: BTreeMap<String, f64>,
        wait: bool,
        now_s: Option<f64>,
    ) -> PyResult<()> {
        let known =
            [("scored", Outcome::Scored), ("invalid", Outcome::Invalid), ("infra_failure", Outcome::InfraFailure)];
        let outcome = choose("outcome", outcome, &known)?;
        let now = self.shared.clock(now_s).base();
        py.detach(|| {
            self.shared.change(wait, |store| store.score(trajectory, attempt, outcome, reward, components, now))
        })?;
        Ok(())
    }

    #[pyo3(signature = (version, iteration, left_out))]
    fn publish(
        &self,
        py: Python<'_>,
        version: Version,
        iteration: Option<i64>,
        left_out: BTreeMap<String, Vec<u64>>,
    ) -> PyResult<()> {
        if let Some(reason) = left_out.keys().find(|reason| !matches!(reason.as_str(), "filter" | "veto")) {
            return Err(PyValueError::new_err(format!(
                "left_out has the reason {reason:?}; choose one of filter, veto"
            )));
        }
        let ids = |reason| left_out.get(reason).into_iter().flatten().copied().collect();
        let left_out = LeftOut { filter: ids("filter"), veto: ids("veto") };
        py.detach(|| self.shared.change(true, |store| store.publish(version, iteration, left_out)))?;
        Ok(())
    }

    #[pyo3(signature = (iteration, version, timeout_s, now_s = None))]
    fn claim<'py>(
        &self,
        py: Python<'py>,
        iteration: i64,
        version: Version,
        timeout_s: f64,
        now_s: Option<f64>,
    ) -> PyResult<Row<'py>> {
        let timeout_s = seconds("timeout_s", timeout_s)?;
        let (lsn, answer) = py.detach(|| {
            let clock = self.shared.clock(now_s);
            match self.shared.wait(timeout_s, clock, |store, now| store.claim(iteration, version, now))? {
                Some((lsn, answer)) => Ok((lsn, Some(answer))),
                None => self.shared.query(|store| Ok((store.lsn(), None))),
            }
        })?;
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

    #[pyo3(signature = (iteration))]
    fn claim_tokens(&self, py: Python<'_>, iteration: i64) -> PyResult<usize> {
        Ok(py.detach(|| self.shared.query(|store| ClaimView::new(store.state(), iteration))?.num_tokens())?)
    }

    #[pyo3(signature = (iteration, *, tokens, logprobs, versions, temperatures, mask, check))]
    #[allow(clippy::too_many_arguments)]
    fn read_claim<'py>(
        &self,
        py: Python<'py>,
        iteration: i64,
        tokens: PyBuffer<u8>,
        logprobs: PyBuffer<u8>,
        versions: PyBuffer<u8>,
        temperatures: PyBuffer<u8>,
        mask: PyBuffer<u8>,
        check: bool,
    ) -> PyResult<Row<'py>> {
        let mut buffers = Buffers::new([tokens, logprobs, versions, temperatures, mask])?;
        let (version, packed) = py.detach(|| {
            let view = self.shared.query(|store| ClaimView::new(store.state(), iteration))?;
            let [tokens, logprobs, versions, temperatures, mask] = buffers.slices();
            let mut columns = Columns { tokens, logprobs, versions, temperatures, mask };
            view.pack(self.shared.log(), &mut columns, check).map(|rows| (view.version(), rows))
        })?;
        rows::batch(py, iteration, version, &packed)
    }

    #[pyo3(signature = (iteration))]
    fn commit(&self, py: Python<'_>, iteration: i64) -> PyResult<()> {
        py.detach(|| self.shared.change(true, |store| store.commit_claims(iteration)))?;
        Ok(())
    }

    #[pyo3(signature = (iteration))]
    fn uncommit(&self, py: Python<'_>, iteration: i64) -> PyResult<Vec<i64>> {
        Ok(py.detach(|| self.shared.change(true, |store| store.uncommit(iteration)))?.1)
    }

    #[pyo3(signature = (iteration))]
    fn evict(&self, py: Python<'_>, iteration: i64) -> PyResult<usize> {
        Ok(py.detach(|| {
            let (_, groups) = self.shared.change(true, |store| store.evict(iteration))?;
            self.shared.remove_dead_files().map(|()| groups)
        })?)
    }

    #[pyo3(signature = (prefix, timeout_s))]
    fn eval_results<'py>(&self, py: Python<'py>, prefix: &str, timeout_s: f64) -> PyResult<Option<Vec<Row<'py>>>> {
        let timeout_s = seconds("timeout_s", timeout_s)?;
        let results =
            py.detach(|| self.shared.wait(timeout_s, self.shared.clock(None), |store, _| store.eval_results(prefix)))?;
        let Some((_, results)) = results else { return Ok(None) };
        results.iter().map(|result| rows::eval_result(py, result)).collect::<PyResult<Vec<_>>>().map(Some)
    }

    #[pyo3(signature = (prefix))]
    fn drop_eval(&self, py: Python<'_>, prefix: &str) -> PyResult<usize> {
        Ok(py.detach(|| {
            let (_, groups) = self.shared.change(true, |store| store.drop_eval(prefix))?;
            self.shared.remove_dead_files().map(|()| groups)
        })?)
    }

    #[pyo3(signature = (state = None))]
    fn groups<'py>(&self, py: Python<'py>, state: Option<&str>) -> PyResult<Vec<Row<'py>>> {
        let groups = py.detach(|| {
            // Within the query, so that no file with metadata is deleted meanwhile.
            self.shared.query(|store| {
                let rows = store.state().groups.iter().map(|(id, group)| (*id, group, store.phase_of(group)));
                let rows = rows.filter(|(_, _, (name, _))| state.is_none_or(|state| state == *name));
                let read = rows.map(|(id, group, phase)| {
                    let metadata = claim_view::read_array(store.log(), group.location, 1)?;
                    Ok((id, group.clone(), phase, metadata))
                });
                read.collect::<Result<Vec<_>, Failure>>()
            })
        })?;
        groups.iter().map(|view| rows::group(py, view)).collect()
    }

    #[pyo3(signature = (after, limit, *, iteration, version, reward, length, stop, prompt_id, group, kind, state))]
    #[allow(clippy::too_many_arguments)]
    fn select<'py>(
        &self,
        py: Python<'py>,
        after: Option<u64>,
        limit: usize,
        iteration: Option<i64>,
        version: Bounds<Version>,
        reward: Bounds<f64>,
        length: Bounds<u32>,
        stop: Option<u8>,
        prompt_id: Option<String>,
        group: Option<u64>,
        kind: Option<&str>,
        state: Option<String>,
    ) -> PyResult<(Vec<Row<'py>>, Option<u64>)> {
        let kind = kind.map(|kind| choose("kind", kind, &KINDS)).transpose()?;
        if let Some(name) = &state {
            choose("state", name, &STATES.map(|name| (name, ())))?;
        }
        let stops = [Stop::None, Stop::Stop, Stop::Length, Stop::Repetition];
        let named = |number: u8| {
            let known = stops.into_iter().find(|stop| *stop as u8 == number);
            known.ok_or_else(|| PyValueError::new_err(format!("stop is {number}; choose one of pmdflow.types.Stop")))
        };
        let stop = stop.map(named).transpose()?;
        let filter = Filter { iteration, version, reward, length, stop, prompt_id, group, kind, state };
        let (page, next) = py.detach(|| self.shared.query(|store| Ok(store.select(&filter, after, limit.max(1)))))?;
        Ok((page.iter().map(|selected| rows::selected(py, selected)).collect::<PyResult<Vec<_>>>()?, next))
    }

    fn claims(&self, py: Python<'_>) -> PyResult<BTreeMap<i64, &'static str>> {
        Ok(py.detach(|| self.shared.query(|store| Ok(store.claims())))?)
    }

    fn take_late<'py>(&self, py: Python<'py>) -> PyResult<Vec<Row<'py>>> {
        let reports = py.detach(|| self.shared.change(true, |store| Ok(store.take_late_reports())))?.1;
        reports.iter().map(|report| rows::late_report(py, report)).collect()
    }

    #[pyo3(signature = (trajectory))]
    fn trajectory<'py>(&self, py: Python<'py>, trajectory: u64) -> PyResult<Row<'py>> {
        let id = trajectory;
        let view = py.detach(|| {
            let (trajectory, location, state) = self.shared.query(|store| {
                let trajectory = store.state().trajectory(id)?;
                let location = store.state().group(trajectory.group)?.location;
                let verdict = rows::verdict(store.state(), trajectory);
                Ok(((trajectory.clone(), verdict), location, store.state_of(id, trajectory)))
            })?;
            let (trajectory, verdict) = trajectory;
            let log = self.shared.log();
            let prompt = claim_view::read_array(log, location, 0)?;
            let tokens = claim_view::read_segments(log, &trajectory.segments)?;
            let extras = claim_view::read_extras(log, &trajectory.segments)?;
            Ok::<_, Failure>(rows::TrajectoryView { id, trajectory, state, verdict, prompt, tokens, extras })
        })?;
        rows::trajectory(py, &view)
    }

    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Row<'py>> {
        let counts = py.detach(|| self.shared.query(|store| Ok(store.counts())))?;
        rows::counts(py, &counts)
    }

    fn ledger<'py>(&self, py: Python<'py>) -> PyResult<Row<'py>> {
        let ledger = py.detach(|| self.shared.query(|store| Ok(store.ledger())))?;
        let row = PyDict::new(py);
        ledger.into_iter().try_for_each(|(key, tokens)| row.set_item(key, tokens))?;
        Ok(row)
    }

    fn versions_spent(&self, py: Python<'_>) -> PyResult<BTreeMap<Version, u64>> {
        Ok(py.detach(|| self.shared.query(|store| Ok(store.versions_spent())))?)
    }

    #[pyo3(signature = (lsn, timeout_s))]
    fn wait_durable(&self, py: Python<'_>, lsn: Option<u64>, timeout_s: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(seconds("timeout_s", timeout_s)?)
            .map_err(|error| PyValueError::new_err(format!("timeout_s is {timeout_s}: {error}")))?;
        Ok(py.detach(|| {
            let newest = self.shared.query(|store| Ok(store.lsn()))?;
            self.shared.log().wait_durable(lsn.unwrap_or(newest), timeout)
        })?)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.shared.close())?)
    }
}

impl TrajectoryStore {
    fn read_lease(&self, granted: Granted) -> Result<rows::LeaseView, Failure> {
        let prompt = claim_view::read_array(self.shared.log(), granted.prompt, 0)?;
        let metadata = claim_view::read_array(self.shared.log(), granted.prompt, 1)?;
        let prefix = claim_view::read_segments(self.shared.log(), &granted.segments)?;
        Ok(rows::LeaseView { granted, prompt, metadata, prefix })
    }
}

#[pyfunction]
#[pyo3(signature = (lengths, *, ranks, limit, steps = None, quadratic = 0.0))]
fn pack(
    py: Python<'_>,
    lengths: Vec<u64>,
    ranks: usize,
    limit: u64,
    steps: Option<Vec<usize>>,
    quadratic: f64,
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
    Ok(py.detach(|| micro_batches::pack_steps(&lengths, &steps, Packing { ranks, limit, quadratic })))
}

/// The trajectory store: the life of a trajectory on an append-only, CRC-framed log.
#[pymodule(gil_used = false)]
mod _rust_buffer {
    #[pymodule_export]
    use super::errors::{Conflict, CorruptLog, StaleLease, StoreError, StoreFull, StoreLocked};
    #[pymodule_export]
    use super::{TrajectoryStore, pack};
}
