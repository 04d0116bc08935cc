//! The store: each operation is checked against the state, logged as a record, and applied.
//!
//! This file holds opening and the path of every record; `admission`, `rollout`, `append` and `scoring` hold what a
//! trajectory goes through, `claims` the learner's side, `counts`, `query` and `reads` what is only looked at,
//! `compaction` the upkeep of the log. Nothing here blocks: waits are in `shared`, and `compactor` works beside.

pub mod admission;
pub mod append;
pub mod arrays;
pub mod check;
pub mod claim_view;
pub mod claims;
mod compaction;
mod compactor;
pub mod counts;
mod discard;
pub mod forks;
pub mod index;
pub mod late;
pub mod lease;
pub mod live;
mod pins;
mod plans;
mod prefetch;
pub mod query;
pub mod reads;
mod repeats;
pub mod rollout;
mod scoring;
pub mod shared;
mod snapshot;
#[cfg(test)]
mod tests;
pub mod token_view;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::{
    clock::Micros,
    error::{Result, StoreError},
    log::{Arrays, Durability, Location, Log, LogOptions, Lsn, Room, Storage},
    state::State,
    state::codec,
    state::group::{Signal, Straggler},
    state::placed::Placed,
    state::record::{Record, SegmentLoss},
    state::successes::Averaging,
    state::trajectory::Version,
    store::index::Index,
    store::late::{LateReport, Overdue},
    store::lease::Leases,
    store::live::Live,
    store::snapshot::Snapshots,
};

/// Looks of a reader at a store that is being written, before it believes what it sees; and the time between two.
const READ_ATTEMPTS: u32 = 20;
const READ_PAUSE: Duration = Duration::from_millis(10);

/// The settings of a store. What a record decides by them is in the record, so they may change at each opening.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Settings {
    /// Groups of one claim.
    pub groups_per_iteration: usize,
    /// Iterations that rollout may run ahead of the learner.
    pub lookahead: u32,
    /// Greatest staleness of a trained token; None is unbounded.
    pub max_staleness: Option<u32>,
    pub segment_loss: SegmentLoss,
    /// Places, from that of the oldest untrained group on, out of which groups are claimed; None: all.
    pub window: Option<u64>,
    /// Training groups without it are evicted as soon as all their rewards are there; None: none is.
    pub signal: Option<Signal>,
    /// How the success of prompts is averaged; None: it is not kept.
    pub successes: Option<Averaging>,
    /// Scored members below which a group is evicted.
    pub min_group_size: u32,
    /// When a group does not wait for its late members; None: it waits for all.
    pub straggler: Option<Straggler>,
    /// Infra failures after which a member is given up.
    pub max_attempts: u32,
    /// Time that an append renews a lease for.
    pub lease_ttl: Micros,
    pub grant_tokens: u32,
    /// What an acknowledged call survives.
    pub durability: Durability,
    /// Size above which admission is refused.
    pub max_bytes: Option<u64>,
    /// Size at which the log starts a new file.
    pub file_bytes: u64,
    /// Longest time between two syncs of a log that is written to and that nobody waits for.
    pub sync_interval: Duration,
}

/// The trajectory store.
pub struct Store {
    pub(crate) log: Log,
    pub(crate) settings: Settings,
    pub(crate) state: State,
    pub(crate) index: Index,
    pub(crate) live: Live,
    pub(crate) leases: Leases,
    /// None until the first call that has a clock.
    pub(crate) overdue: Option<Overdue>,
    pub(crate) late_reports: VecDeque<LateReport>,
    pub(crate) snapshots: Snapshots,
    quota_changes: u64,
    /// Second, differing outcomes of scoring attempts since the store was opened.
    pub(crate) scores_ignored: u64,
    /// Groups evicted without a signal since the store was opened.
    pub(crate) no_signal: u64,
    /// Whether the disk had no room for the last record with arrays: then each file that can go counts.
    pub(crate) is_full: bool,
    /// Those of which a claim was told.
    pub(crate) no_signal_told: u64,
}

/// What waits look at.
#[derive(PartialEq)]
pub(crate) struct Signature {
    ready: usize,
    unscored: usize,
    unscored_train: u64,
    taken_back: Option<Micros>,
    idle: usize,
    leased: u64,
    eval_pending: u64,
    overdue: Option<Micros>,
    next_group: u64,
    version: Version,
    open_claim: Option<i64>,
    budgets: Vec<bool>,
    no_signal: u64,
    quotas: u64,
}

pub(crate) fn conflict<T>(detail: impl Into<String>) -> Result<T> {
    Err(StoreError::Conflict(detail.into()))
}

impl Store {
    /// Opens or creates the store in `storage`. No lease survives.
    ///
    /// # Errors
    /// `Locked`, `Corrupt`, `Version` or `Io` of the log; `Corrupt` for a record that does not fit the state.
    pub fn open(storage: Arc<dyn Storage>, settings: Settings) -> Result<Self> {
        let options = LogOptions {
            durability: settings.durability,
            file_bytes: settings.file_bytes,
            sync_interval: settings.sync_interval,
        };
        let mut state = State::default();
        let log = Log::open(storage, options, &mut state)?;
        Self::with(log, state, settings)
    }

    /// Reads the store in `storage` as it is now, beside one that may be at work there; every change is refused.
    ///
    /// # Errors
    /// As `open`, but never `Locked`.
    pub fn read(storage: &Arc<dyn Storage>, settings: Settings) -> Result<Self> {
        let mut attempt = 1;
        loop {
            let mut state = State::default();
            match Log::read(Arc::clone(storage), &mut state) {
                Ok(log) => return Self::with(log, state, settings),
                // The writer may have deleted files between two looks.
                Err(_) if attempt < READ_ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(READ_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn with(log: Log, state: State, settings: Settings) -> Result<Self> {
        let (index, live) = (Index::of(&state)?, Live::of(&state));
        let (leases, snapshots) = (Leases::default(), Snapshots::new(settings.file_bytes));
        let late_reports = VecDeque::new();
        Ok(Self {
            log,
            settings,
            state,
            index,
            live,
            leases,
            overdue: None,
            late_reports,
            snapshots,
            quota_changes: 0,
            scores_ignored: 0,
            no_signal: 0,
            is_full: false,
            no_signal_told: 0,
        })
    }

    /// The durable state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The log; clones share it, so that waits and reads need not hold the store.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The newest record.
    pub fn lsn(&self) -> Lsn {
        self.log.lsn()
    }

    /// Changes with whatever a wait may be for. Tokens that are appended to a lease that goes on change nothing.
    pub(crate) fn signature(&self) -> Signature {
        let budgets = self.state.quotas.keys().rev().take(2).map(|version| self.budget_left(*version) > 0);
        Signature {
            ready: self.index.ready.len(),
            unscored: self.index.num_unscored(),
            unscored_train: self.index.unscored_train,
            taken_back: self.index.next_deadline(),
            idle: self.index.num_idle(),
            leased: self.index.leased,
            eval_pending: self.index.eval_pending,
            overdue: self.overdue.as_ref().and_then(Overdue::next_deadline),
            next_group: self.state.next_group,
            version: self.state.version,
            open_claim: self.state.open_claim(),
            budgets: budgets.collect(),
            no_signal: self.no_signal,
            quotas: self.quota_changes,
        }
    }

    /// When the passing of time alone next changes what a wait can have.
    pub fn next_deadline(&self) -> Option<Micros> {
        let overdue = self.overdue.as_ref().and_then(Overdue::next_deadline);
        [self.leases.next_deadline(), self.index.next_deadline(), overdue].into_iter().flatten().min()
    }

    /// Logs a record and applies it.
    pub(crate) fn record(&mut self, record: &Record, arrays: &Arrays<'_>) -> Result<(Lsn, Location)> {
        let header = codec::encode(record)?;
        let written = self.log_record(record, &header, arrays);
        if arrays.end() > 0 || written.is_err() {
            self.is_full = matches!(written, Err(StoreError::NoSpace { .. }));
        }
        let (lsn, location) = written?;
        let placed = Placed { location, lsn, arrays: arrays.places(header.len()) };
        // The log has it already: whatever came after it would be decided on another state than replay has.
        self.apply(record, &placed).map_err(|error| self.log.poison(error))?;
        if self.snapshots.is_due(location.len, self.live.snapshot_bytes(&self.state)) {
            self.snapshots.take(&self.state, &self.log);
        }
        Ok((lsn, location))
    }

    fn log_record(&self, record: &Record, header: &[u8], arrays: &Arrays<'_>) -> Result<(Lsn, Location)> {
        let snapshot = self.state.snapshot_bytes(record);
        if arrays.end() > 0 && !self.log.has_room(snapshot) {
            // Taken now, it could not be evicted later.
            return Err(StoreError::NoSpace { path: self.log.snapshot_path(), bytes: snapshot });
        }
        let room = if record.makes_room() { Room::Last } else { Room::Usual };
        self.log.write(record.kind(), header, arrays, room)
    }

    fn apply(&mut self, record: &Record, placed: &Placed) -> Result<()> {
        let taken = self.index.take_out(&self.state, &self.leases, record)?;
        let leaving = self.live.take_out(&self.state, record);
        self.state.apply(record, placed)?;
        self.live.put_back(&self.state, record, placed, &leaving);
        self.leases.end_complete(record);
        self.index.put_back(&self.state, &self.leases, taken)
    }

    /// Recomputes everything that is kept incrementally.
    ///
    /// # Errors
    /// `Conflict` naming the first difference; an error of ours.
    pub fn check(&self) -> Result<()> {
        check::check(self)
    }
}
