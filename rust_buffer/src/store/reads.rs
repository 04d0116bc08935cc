//! What callers get together with arrays: leases, unscored trajectories, groups, single trajectories.
//!
//! The store says what there is and where the arrays lie; these are read without holding it.

use std::collections::BTreeMap;

use crate::{
    clock::Micros,
    error::{Result, StoreError},
    state::State,
    state::fork::Fork,
    state::group::{Group, Kind},
    state::trajectory::{Trajectory, Verdict, Version},
    state::turn::Turn,
    store::arrays::{ColumnReader, Extras, StoredPrompt, Tokens, read_history, read_prompt, read_runs},
    store::claim_view::{ClaimView, Columns, Rows, Segments},
    store::rollout::Granted,
    store::shared::{Clock, Shared},
    store::token_view::TokenView,
};

/// A lease with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct LeaseView {
    pub granted: Granted,
    pub prompt: StoredPrompt,
    /// Durable tokens so far: the history of the newest branch.
    pub prefix: Tokens,
}

/// A complete trajectory that awaits its verdict, with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct UnscoredView {
    pub id: u64,
    pub trajectory: Trajectory,
    pub group: Group,
    pub prompt: StoredPrompt,
    pub tokens: Tokens,
    /// What was said of the episode.
    pub turns: Vec<Turn>,
}

/// A group with its prompt.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct GroupView {
    pub id: u64,
    pub group: Group,
    /// Name of its state.
    pub state: &'static str,
    /// The one that claimed it.
    pub iteration: Option<i64>,
    pub prompt: StoredPrompt,
}

/// A trajectory with its arrays.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct TrajectoryView {
    pub id: u64,
    pub trajectory: Trajectory,
    /// Name of its state.
    pub state: &'static str,
    /// None without one.
    pub reward: Option<f64>,
    /// Of the reward, by name.
    pub components: BTreeMap<String, f64>,
    pub prompt: StoredPrompt,
    pub tokens: Tokens,
    /// Columns by name, one entry for each stored run that has the column.
    pub extras: Extras,
    /// Where branches begin among the tokens.
    pub forks: Vec<Fork>,
    /// What was said of the episode.
    pub turns: Vec<Turn>,
}

impl Shared {
    /// Leases up to `max_leases` trajectories to a worker at `version`; waits for the first one, and gives none after
    /// `timeout_s`.
    ///
    /// # Errors
    /// Those of `Store::lease` and of the log, or `Closed`.
    pub fn lease(
        &self, worker: &str, version: Version, max_leases: usize, timeout_s: f64, clock: Clock,
    ) -> Result<Vec<LeaseView>> {
        self.lease_kind(worker, version, max_leases, None, timeout_s, clock)
    }

    /// The same of one kind alone; None: of both.
    ///
    /// # Errors
    /// Those of `lease`.
    pub fn lease_kind(
        &self, worker: &str, version: Version, max_leases: usize, kind: Option<Kind>, timeout_s: f64, clock: Clock,
    ) -> Result<Vec<LeaseView>> {
        let granted = self.wait(timeout_s, clock, |store, now| {
            let granted = store.lease_kind(worker, version, max_leases, kind, now).map(some)?;
            Ok(granted.map(|granted| (granted, self.pins.pin())))
        })?;
        let Some((_, (granted, _pin))) = granted else { return Ok(Vec::new()) };
        self.read_leases(granted)
    }

    /// Leases the members of a group that can still grow, whatever the order and the budgets say.
    ///
    /// # Errors
    /// Those of `Store::lease_group` and of the log, or `Closed`.
    pub fn lease_group(&self, worker: &str, group: u64, clock: Clock) -> Result<Vec<LeaseView>> {
        let _pin = self.pins.pin();
        let (_, granted) = self.change(true, |store| store.lease_group(worker, group, clock.base()))?;
        self.read_leases(granted)
    }

    fn read_leases(&self, granted: impl IntoIterator<Item = Granted>) -> Result<Vec<LeaseView>> {
        let mut leases = Vec::new();
        for granted in granted {
            let read = read_prompt(self.log(), granted.prompt)
                .and_then(|prompt| Ok((prompt, read_history(self.log(), &granted.runs, &granted.history)?)));
            if let Some((prompt, prefix)) = self.unless_gone(granted.trajectory, read)? {
                leases.push(LeaseView { granted, prompt, prefix });
            }
        }
        Ok(leases)
    }

    /// Hands out up to `max_items` complete trajectories without a verdict for `ttl`; waits for the first one, and gives
    /// none after `timeout_s`.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn unscored(&self, max_items: usize, ttl: Micros, timeout_s: f64, clock: Clock) -> Result<Vec<UnscoredView>> {
        let waiting = self.wait(timeout_s, clock, |store, now| {
            let ids = store.unscored(max_items, ttl, now);
            let waiting = |id| {
                let (id, trajectory, group) = with_group(store.state(), id)?;
                let turns = store.state().turns(id).to_vec();
                Ok((store.state().history(id, &trajectory), id, trajectory, group, turns))
            };
            let waiting = ids.into_iter().map(waiting).collect::<Result<Vec<_>>>()?;
            Ok(some(waiting).map(|waiting| (waiting, self.pins.pin())))
        })?;
        let Some((_, (waiting, _pin))) = waiting else { return Ok(Vec::new()) };
        let mut items = Vec::new();
        for (history, id, trajectory, group, turns) in waiting {
            let read = read_prompt(self.log(), group.location)
                .and_then(|prompt| Ok((prompt, read_history(self.log(), &trajectory.runs, &history)?)));
            if let Some((prompt, tokens)) = self.unless_gone(id, read)? {
                items.push(UnscoredView { id, trajectory, group, prompt, tokens, turns });
            }
        }
        Ok(items)
    }

    /// Hands out up to `max_items` complete trajectories that `scorer` has not seen for `ttl`; waits for the first one,
    /// and gives none after `timeout_s`.
    ///
    /// # Errors
    /// `Conflict` when the scorer is not expected, those of the log, or `Closed`.
    pub fn unannotated(
        &self, scorer: &str, max_items: usize, ttl: Micros, timeout_s: f64, clock: Clock,
    ) -> Result<Vec<TrajectoryView>> {
        let waiting = self.wait(timeout_s, clock, |store, now| {
            let ids = store.unannotated(scorer, max_items, ttl, now).map(some)?;
            Ok(ids.map(|ids| (ids, self.pins.pin())))
        })?;
        let Some((_, (ids, _pin))) = waiting else { return Ok(Vec::new()) };
        let (mut views, mut columns) = (Vec::new(), ColumnReader::new(self.log()));
        for id in ids {
            match self.read_trajectory(id, &mut columns) {
                Ok(view) => views.push(view),
                Err(_) if self.query(|store| Ok(!store.state().trajectories.contains_key(&id)))? => {}
                Err(error) => return Err(error),
            }
        }
        Ok(views)
    }

    /// A page of `Store::groups` with the prompts.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn groups(
        &self, state: Option<&str>, after: Option<u64>, limit: usize,
    ) -> Result<(Vec<GroupView>, Option<u64>)> {
        let _pin = self.pins.pin();
        let (groups, next) = self.query(|store| Ok(store.groups(state, after, limit)))?;
        let mut views = Vec::new();
        for (id, group, state, iteration) in groups {
            if let Some(prompt) = self.unless_gone(group.first, read_prompt(self.log(), group.location))? {
                views.push(GroupView { id, group, state, iteration, prompt });
            }
        }
        Ok((views, next))
    }

    /// Live trajectories.
    ///
    /// # Errors
    /// `Conflict` when one is not there, those of the log, or `Closed`.
    pub fn trajectories(&self, ids: &[u64]) -> Result<Vec<TrajectoryView>> {
        let mut columns = ColumnReader::new(self.log());
        ids.iter().map(|id| self.read_trajectory(*id, &mut columns)).collect()
    }

    fn read_trajectory(&self, id: u64, columns: &mut ColumnReader<'_>) -> Result<TrajectoryView> {
        let _pin = self.pins.pin();
        let (trajectory, group, state, (reward, components), forks, turns) = self.query(|store| {
            let (id, trajectory, group) = with_group(store.state(), id)?;
            let (state, verdict) = (store.state_of(id, &trajectory), verdict(store.state(), &trajectory));
            Ok((trajectory, group, state, verdict, store.state().forks(id).to_vec(), store.state().turns(id).to_vec()))
        })?;
        let mut read = || {
            let prompt = read_prompt(self.log(), group.location)?;
            Ok((prompt, read_runs(self.log(), &trajectory.runs)?, columns.of_trajectory(&trajectory)?))
        };
        let gone = || StoreError::Conflict(format!("trajectory {id} was evicted while it was read"));
        let (prompt, tokens, extras) = self.unless_gone(id, read())?.ok_or_else(gone)?;
        Ok(TrajectoryView { id, trajectory, state, reward, components, prompt, tokens, extras, forks, turns })
    }

    /// Packs the claim of `iteration` into `columns`; its version, and the other arrays. Checksums of tokens are tested
    /// if `check`.
    ///
    /// # Errors
    /// `Conflict` when there is no such claim, or no longer, or the columns are too short; those of the log; `Closed`.
    pub fn read_claim(&self, iteration: i64, columns: &mut Columns<'_>, check: bool) -> Result<(Version, Rows)> {
        let _pin = self.pins.pin();
        let view = self.query(|store| ClaimView::new(store.state(), iteration))?;
        let packed = view.pack(self.log(), columns, check);
        if packed.is_err() && self.query(|store| Ok(!store.state().claims.contains_key(&iteration)))? {
            return Err(StoreError::Conflict(format!(
                "the claim of iteration {iteration} was evicted while it was read"
            )));
        }
        packed.map(|rows| (view.version(), rows))
    }

    /// The claim of `iteration` without its tokens: its version, its rows, and the segments they consist of.
    ///
    /// # Errors
    /// `Conflict` when there is no such claim; `Closed`.
    pub fn claim_rows(&self, iteration: i64) -> Result<(Version, Rows, Segments)> {
        let view = self.query(|store| ClaimView::new(store.state(), iteration))?;
        let (rows, segments) = view.rows()?;
        Ok((view.version(), rows, segments))
    }

    /// Tokens of each of the live trajectories `ids`, prompts included.
    ///
    /// # Errors
    /// `Conflict` when one of them is not there; `Closed`.
    pub fn token_counts(&self, ids: Vec<u64>) -> Result<Vec<i64>> {
        self.query(|store| Ok(TokenView::new(store.state(), ids)))?.lengths()
    }

    /// Fencing epochs of those of `ids` that are live.
    ///
    /// # Errors
    /// `Closed`.
    pub fn epochs(&self, ids: &[u64]) -> Result<BTreeMap<u64, u64>> {
        self.query(|store| {
            let live = |id: &u64| store.state().trajectories.get(id).map(|trajectory| (*id, trajectory.epoch));
            Ok(ids.iter().filter_map(live).collect())
        })
    }

    /// Packs the ids and log-probs of the live trajectories `ids`; checksums are tested if `check`.
    ///
    /// # Errors
    /// `Conflict` when one of them is not there, or no longer, or an array is too short; those of the log; `Closed`.
    pub fn read_tokens(&self, ids: Vec<u64>, tokens: &mut [u8], logprobs: &mut [u8], check: bool) -> Result<()> {
        let _pin = self.pins.pin();
        let view = self.query(|store| Ok(TokenView::new(store.state(), ids)))?;
        self.unless_evicted(&view, view.pack(self.log(), tokens, logprobs, check))
    }

    /// The extra columns of each of the live trajectories `ids`.
    ///
    /// # Errors
    /// `Conflict` when one of them is not there, or no longer; those of the log; `Closed`.
    pub fn read_extras(&self, ids: Vec<u64>) -> Result<Vec<Extras>> {
        let _pin = self.pins.pin();
        let view = self.query(|store| Ok(TokenView::new(store.state(), ids)))?;
        self.unless_evicted(&view, view.extras(self.log()))
    }

    /// What was read of `view`; the error says so where that failed because something of it was evicted meanwhile.
    fn unless_evicted<T>(&self, view: &TokenView, read: Result<T>) -> Result<T> {
        match read {
            Ok(read) => Ok(read),
            Err(error) => match self.query(|store| Ok(view.gone(store.state())))? {
                Some(id) => Err(StoreError::Conflict(format!("trajectory {id} is not in the store (any more)"))),
                None => Err(error),
            },
        }
    }

    /// What was read of a trajectory without holding the store; None when that failed because it was evicted meanwhile
    /// and its files deleted: that is no damage.
    fn unless_gone<T>(&self, id: u64, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(_) if self.query(|store| Ok(!store.state().trajectories.contains_key(&id)))? => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// An answer to a wait: none while it is empty.
fn some<T>(items: Vec<T>) -> Option<Vec<T>> {
    Some(items).filter(|items| !items.is_empty())
}

fn with_group(state: &State, id: u64) -> Result<(u64, Trajectory, Group)> {
    let trajectory = state.trajectory(id)?.clone();
    let group = state.group(trajectory.group)?.clone();
    Ok((id, trajectory, group))
}

fn verdict(state: &State, trajectory: &Trajectory) -> (Option<f64>, BTreeMap<String, f64>) {
    match &trajectory.verdict {
        Verdict::Scored { reward, components, .. } => (Some(*reward), state.components(components)),
        _ => (None, BTreeMap::new()),
    }
}
