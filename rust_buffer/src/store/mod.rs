//! The store: each operation is checked against the state, logged as a record, and applied.
//!
//! This file holds opening, the path of every record, quotas, admission, scoring and publication; `rollout` holds
//! leases and appends, `claims` the learner's side, `view` the queries. Nothing here blocks: waits are in `shared`.

pub mod check;
pub mod claim_view;
pub mod claims;
pub mod counts;
pub mod index;
pub mod late;
pub mod lease;
pub mod query;
pub mod rollout;
pub mod shared;
mod snapshot;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{
    clock::Micros,
    error::{Result, StoreError},
    log::{Arrays, Durability, Location, Log, LogOptions, Lsn, Storage},
    state::apply::Placed,
    state::group::{Group, Kind, Phase, Straggler},
    state::record::{Admit, LeftOut, Quota, Record, Score, SegmentLoss},
    state::trajectory::{Outcome, Verdict, Version},
    state::{ClaimStatus, Publication, State, request_hash},
    store::index::Index,
    store::late::{LateReport, Overdue},
    store::lease::Leases,
    store::snapshot::Snapshots,
    wire,
};

/// Room kept in `max_bytes` for a token to come: 8 bytes of payload, the rest for headers and alignment.
pub const BYTES_PER_TOKEN: u64 = 16;

/// Members of a group: each has its place in the index from the admission on.
pub const MAX_GROUP_SIZE: u32 = 1 << 16;

/// Looks of a reader at a store that is being written, before it believes what it sees; and the time between two.
const READ_ATTEMPTS: u32 = 20;
const READ_PAUSE: Duration = Duration::from_millis(10);

/// The settings of a store. What a record decides by them is in the record, so they may change at each opening.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Groups of one claim.
    pub groups_per_iteration: usize,
    /// Iterations that rollout may run ahead of the learner.
    pub lookahead: u32,
    /// Greatest staleness of a trained token; None is unbounded.
    pub max_staleness: Option<u32>,
    /// Which segments have a gradient.
    pub segment_loss: SegmentLoss,
    /// Scored members below which a group is evicted.
    pub min_group_size: u32,
    /// When a group does not wait for its late members; None: it waits for all.
    pub straggler: Option<Straggler>,
    /// Infra failures after which a member is given up.
    pub max_attempts: u32,
    /// Time that an append renews a lease for.
    pub lease_ttl: Micros,
    /// Tokens of one grant.
    pub grant_tokens: u32,
    /// What an acknowledged call survives.
    pub durability: Durability,
    /// Size above which admission is refused.
    pub max_bytes: Option<u64>,
    /// Size at which the log starts a new file.
    pub file_bytes: u64,
    /// Longest time between two syncs of a log that is written to and that nobody waits for.
    pub commit_interval: Duration,
}

/// The trajectory store.
pub struct Store {
    pub(crate) log: Log,
    pub(crate) settings: Settings,
    pub(crate) state: State,
    pub(crate) index: Index,
    pub(crate) leases: Leases,
    /// None until the first call that has a clock.
    pub(crate) overdue: Option<Overdue>,
    pub(crate) late_reports: VecDeque<LateReport>,
    pub(crate) snapshots: Snapshots,
    quota_changes: u64,
}

/// What waits look at.
#[derive(PartialEq)]
pub(crate) struct Signature {
    ready: usize,
    unscored: usize,
    idle: usize,
    leased: u64,
    eval_pending: u64,
    overdue: Option<Micros>,
    next_group: u64,
    version: Version,
    open_claim: Option<i64>,
    budgets: Vec<bool>,
    quotas: u64,
}

pub(crate) fn conflict<T>(detail: impl Into<String>) -> Result<T> {
    Err(StoreError::Conflict(detail.into()))
}

/// What a record changes, for the index: trajectories, and groups.
type Touched = (BTreeSet<u64>, BTreeSet<u64>);

impl Store {
    /// Opens or creates the store in `storage`. No lease survives.
    ///
    /// # Errors
    /// `Locked`, `Corrupt`, `Version` or `Io` of the log; `Corrupt` for a record that does not fit the state.
    pub fn open(storage: Arc<dyn Storage>, settings: Settings) -> Result<Self> {
        let options = LogOptions {
            durability: settings.durability,
            file_bytes: settings.file_bytes,
            commit_interval: settings.commit_interval,
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
        let index = Index::of(&state)?;
        let (leases, snapshots) = (Leases::default(), Snapshots::new(settings.file_bytes));
        let late_reports = VecDeque::new();
        Ok(Self { log, settings, state, index, leases, overdue: None, late_reports, snapshots, quota_changes: 0 })
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
            idle: self.index.num_idle(),
            leased: self.index.leased,
            eval_pending: self.index.eval_pending,
            overdue: self.overdue.as_ref().and_then(Overdue::next_deadline),
            next_group: self.state.next_group,
            version: self.state.version,
            open_claim: self.state.open_claim(),
            budgets: budgets.collect(),
            quotas: self.quota_changes,
        }
    }

    /// When the passing of time alone next changes what a wait can have.
    pub fn next_deadline(&self) -> Option<Micros> {
        let overdue = self.overdue.as_ref().and_then(Overdue::next_deadline);
        [self.leases.next_deadline(), self.index.next_deadline(), overdue].into_iter().flatten().min()
    }

    /// Logs and applies a record.
    pub(crate) fn commit(&mut self, record: &Record, arrays: &Arrays<'_>) -> Result<(Lsn, Location)> {
        let header = wire::encode(record)?;
        let (lsn, location) = self.log.write(record.kind(), &header, arrays)?;
        let (mut trajectories, mut groups) = self.touched(record);
        for id in &trajectories {
            self.index.remove(&self.state, *id, self.leases.contains(*id))?;
        }
        for id in &groups {
            self.index.remove_group(&self.state, *id);
        }
        // Most records remove no group, and claims of many groups should not look up their names.
        let leaving = match record {
            Record::Score(_) | Record::Evict(..) | Record::Drop(_) => self.requests_of(groups.iter().copied()),
            _ => Vec::new(),
        };
        let (next_group, next_trajectory) = (self.state.next_group, self.state.next_trajectory);
        self.state.apply(record, &Placed { location, lsn, arrays: arrays.places(header.len()) })?;
        if let Record::Append(items) = record {
            // A complete trajectory has no lease.
            for item in items.iter().filter(|item| item.stop.is_some()) {
                self.leases.remove(item.trajectory);
            }
        }
        for (request, id) in &leaving {
            if !self.state.groups.contains_key(id) {
                self.index.requests.remove(request);
            }
        }
        for (request, id) in self.requests_of(next_group..self.state.next_group) {
            self.index.requests.insert(request, id);
        }
        trajectories.extend(next_trajectory..self.state.next_trajectory);
        groups.extend(next_group..self.state.next_group);
        for id in &groups {
            self.index.add_group(&self.state, *id);
        }
        for id in &trajectories {
            self.index.add(&self.state, *id, self.leases.contains(*id))?;
        }
        if self.snapshots.is_due(location.len) {
            self.snapshots.take(&self.state, &self.log);
        }
        Ok((lsn, location))
    }

    /// Request ids of the groups that there are.
    fn requests_of(&self, groups: impl IntoIterator<Item = u64>) -> Vec<(String, u64)> {
        let named = |id| self.state.groups.get(&id).map(|group| (group.request_id.clone(), id));
        groups.into_iter().filter_map(named).collect()
    }

    fn touched(&self, record: &Record) -> Touched {
        let members = |ids: &BTreeSet<u64>| -> BTreeSet<u64> {
            ids.iter().filter_map(|id| self.state.groups.get(id)).flat_map(Group::members).collect()
        };
        let claimed = |iterations: &mut dyn Iterator<Item = &i64>| -> BTreeSet<u64> {
            iterations.filter_map(|i| self.state.claims.get(i)).flat_map(|claim| claim.groups.clone()).collect()
        };
        let none = BTreeSet::new();
        match record {
            Record::Quota(version, _) => (self.index.idle_under(&self.state, *version).into_iter().collect(), none),
            Record::Admit(_) | Record::Commit(_) | Record::Lease(_) => (none.clone(), none),
            Record::Append(items) => (items.iter().map(|item| item.trajectory).collect(), none),
            Record::Score(score) => {
                let group = self.state.trajectories.get(&score.trajectory).map(|trajectory| trajectory.group);
                (BTreeSet::from([score.trajectory]), group.into_iter().collect())
            }
            Record::Publish(_, iteration, _) => (none, claimed(&mut iteration.iter())),
            Record::Claim(claim) => (none, claim.groups.iter().copied().collect()),
            Record::Evict(groups, _) | Record::Late(groups) => {
                let groups: BTreeSet<u64> = groups.iter().copied().collect();
                (members(&groups), groups)
            }
            Record::Uncommit(iteration) => {
                (none, claimed(&mut self.state.claims.range(iteration + 1..).map(|(iteration, _)| iteration)))
            }
            Record::Drop(iteration) => {
                (none, claimed(&mut self.state.claims.range(..=iteration).map(|(iteration, _)| iteration)))
            }
        }
    }

    /// First log file that a live group needs. Segments lie after their group's admission, and groups are admitted in
    /// the order of their ids.
    pub fn first_live_file(&self) -> u32 {
        self.state.groups.get_min().map_or(self.log.position().file, |(_, group)| group.location.file)
    }

    /// Sets what rollout may do under `version`.
    ///
    /// # Errors
    /// `Conflict` for an empty segment budget or a version whose books are closed.
    pub fn set_quota(&mut self, version: Version, quota: Quota) -> Result<()> {
        if version < 0 || quota.tokens_per_segment == Some(0) {
            return conflict(format!("version {version} must be >= 0 and tokens_per_segment >= 1 or None"));
        }
        if self.state.quotas.get(&version) == Some(&quota) {
            return Ok(());
        }
        if self.state.is_closed(version) {
            return conflict(format!(
                "version {version} is older than every quota that is kept; set one for a newer version"
            ));
        }
        self.quota_changes += 1;
        self.commit(&Record::Quota(version, quota), &Arrays::default()).map(drop)
    }

    /// Admits a group; answers a repeat with its id.
    ///
    /// # Errors
    /// `Full` when the quota or `max_bytes` is reached, `Conflict` for a repeat with other content or of a group that is gone.
    pub fn admit(&mut self, admit: &Admit, prompt: &[u8], metadata: &[u8]) -> Result<u64> {
        if let Some(id) = self.index.requests.get(&admit.request_id).copied() {
            return self.check_repeated_admission(id, admit, prompt, metadata);
        }
        if self.state.gone.contains(&request_hash(&admit.request_id)) {
            return conflict(format!(
                "request {:?} was admitted and its group is gone; use a new id",
                admit.request_id
            ));
        }
        if admit.size == 0 || admit.max_tokens == 0 || prompt.is_empty() || prompt.len() % 4 != 0 {
            return conflict(format!(
                "request {:?}: group_size ({}) and max_tokens ({}) must be >= 1 and the prompt ({} bytes) one or more int32",
                admit.request_id,
                admit.size,
                admit.max_tokens,
                prompt.len()
            ));
        }
        if admit.size > MAX_GROUP_SIZE {
            let (request, size) = (&admit.request_id, admit.size);
            return conflict(format!(
                "request {request:?}: group_size {size}, a group has at most {MAX_GROUP_SIZE} members"
            ));
        }
        if admit.kind == Kind::Train {
            self.check_room(admit, prompt.len() + metadata.len())?;
        }
        let id = self.state.next_group;
        self.commit(&Record::Admit(admit.clone()), &Arrays::of(&[prompt, metadata]))?;
        Ok(id)
    }

    fn check_repeated_admission(&self, id: u64, admit: &Admit, prompt: &[u8], metadata: &[u8]) -> Result<u64> {
        let group = self.state.group(id)?;
        let frame = self.log.frame(group.location)?;
        let same = group.kind == admit.kind
            && group.prompt_id == admit.prompt_id
            && (group.size, group.max_tokens, group.cursor) == (admit.size, admit.max_tokens, admit.cursor)
            && group.priority == admit.priority
            && frame.array(0).unwrap_or_default() == prompt
            && frame.array(1).unwrap_or_default() == metadata;
        if same { Ok(id) } else { conflict(format!("request {:?} was admitted with other content", admit.request_id)) }
    }

    fn check_room(&self, admit: &Admit, bytes: usize) -> Result<()> {
        let groups = self.state.quotas.get(&self.state.version).map_or(0, |quota| quota.groups);
        if self.index.groups_untrained >= groups {
            return Err(StoreError::Full {
                what: "the number of untrained groups",
                value: self.index.groups_untrained + 1,
                limit: groups,
                remedy: "train some or set the newest version's quota",
            });
        }
        let Some(limit) = self.settings.max_bytes else { return Ok(()) };
        let tokens = self.index.outstanding_tokens + u64::from(admit.size) * u64::from(admit.max_tokens);
        let value = self.log.bytes() + tokens * BYTES_PER_TOKEN + bytes as u64;
        if value > limit {
            let (what, remedy) =
                ("the store's size in bytes, unfinished work included,", "raise max_bytes or evict what is archived");
            return Err(StoreError::Full { what, value, limit, remedy });
        }
        Ok(())
    }

    /// Up to `max_items` complete trajectories without a verdict; each comes again after `ttl`.
    pub fn unscored(&mut self, max_items: usize, ttl: Micros, now: Micros) -> Vec<u64> {
        self.index.take_back(&self.state, now);
        self.index.hand_out(max_items, now.saturating_add(ttl))
    }

    /// Records the outcome of scoring attempt `attempt`; of a member that came too late, it is ignored.
    ///
    /// # Errors
    /// `Conflict`: not complete, a reward that is not finite, or another outcome for an attempt already recorded.
    pub fn score(
        &mut self,
        id: u64,
        attempt: u32,
        outcome: Outcome,
        reward: f64,
        components: BTreeMap<String, f64>,
        now: Micros,
    ) -> Result<()> {
        self.expire(now)?;
        let Some(trajectory) = self.state.trajectories.get(&id) else {
            // Only groups whose verdicts are final leave the store, so this repeats a recorded one.
            return if id < self.state.next_trajectory { Ok(()) } else { self.state.trajectory(id).map(drop) };
        };
        if trajectory.verdict == Verdict::Late {
            return Ok(());
        }
        let (reward, components) = match outcome {
            Outcome::InfraFailure => (0.0, BTreeMap::new()),
            _ => (reward, components),
        };
        if let Some((name, value)) = components.iter().find(|(_, value)| !value.is_finite()) {
            return conflict(format!("trajectory {id}: component {name:?} is {value}; rewards must be finite"));
        }
        if !reward.is_finite() {
            return conflict(format!("trajectory {id}: the reward is {reward}; rewards must be finite"));
        }
        if trajectory.is_partial() {
            return conflict(format!("trajectory {id} is not complete and cannot be scored"));
        }
        let repeats = if attempt < trajectory.attempts {
            outcome == Outcome::InfraFailure
        } else {
            matches!(&trajectory.verdict, Verdict::Scored { outcome: o, reward: r, components: c }
                if (*o, *r) == (outcome, reward) && self.state.components(c) == components)
        };
        if repeats {
            return Ok(());
        }
        if attempt != trajectory.attempts || trajectory.verdict != Verdict::Pending {
            return conflict(format!(
                "trajectory {id}: attempt {attempt} differs from what is recorded (next attempt: {})",
                trajectory.attempts
            ));
        }
        let failed = outcome == Outcome::InfraFailure && attempt + 1 >= self.settings.max_attempts;
        let (id_of_group, group) = (trajectory.group, self.state.group(trajectory.group)?);
        let phase = if outcome == Outcome::InfraFailure && !failed {
            Some(Phase::Partial)
        } else {
            group.after_verdict(failed, self.settings.min_group_size)
        };
        let score = Score { trajectory: id, outcome, reward, components, failed, phase };
        self.commit(&Record::Score(score), &Arrays::default())?;
        self.watch_group(id_of_group, now);
        Ok(())
    }

    /// Makes `version` the newest and `iteration`'s claim trained, but for what the learner left out of it.
    ///
    /// # Errors
    /// `Conflict`: not above every earlier version and no repeat, no such claim, or something left out that is not in it.
    pub fn publish(&mut self, version: Version, iteration: Option<i64>, left_out: LeftOut) -> Result<()> {
        let publication = Publication { iteration, left_out };
        if self.state.publications.get(&version) == Some(&publication) {
            return Ok(());
        }
        if version <= self.state.version {
            return conflict(format!(
                "version {version} is not above the newest, {}; publish {} or higher",
                self.state.version,
                self.state.max_version + 1
            ));
        }
        if let Some(iteration) = iteration {
            let claim = self.state.claim(iteration)?;
            if claim.status != ClaimStatus::Claimed {
                return conflict(format!("the claim of iteration {iteration} is trained already"));
            }
        }
        self.check_left_out(&publication)?;
        let Publication { iteration, left_out } = publication;
        self.commit(&Record::Publish(version, iteration, left_out), &Arrays::default()).map(drop)
    }

    /// Whether what is left out, each for one reason, is in the claim.
    fn check_left_out(&self, publication: &Publication) -> Result<()> {
        let LeftOut { filter, veto } = &publication.left_out;
        if let Some(id) = filter.intersection(veto).next() {
            return conflict(format!("trajectory {id} is left out by filter and by veto; name one reason"));
        }
        for id in filter.union(veto) {
            let scored = self.state.trajectories.get(id).filter(|trajectory| trajectory.reward().is_some());
            let phase = scored.and_then(|trajectory| self.state.groups.get(&trajectory.group)).map(|group| group.phase);
            if publication.iteration.is_none_or(|iteration| phase != Some(Phase::Claimed(iteration))) {
                return conflict(format!(
                    "trajectory {id}, which the learner left out, is not in the claim that is published (iteration {:?})",
                    publication.iteration
                ));
            }
        }
        Ok(())
    }

    /// Recomputes everything that is kept incrementally.
    ///
    /// # Errors
    /// `Conflict` naming the first difference; an error of ours.
    pub fn check(&self) -> Result<()> {
        crate::store::check::check(self)
    }
}
