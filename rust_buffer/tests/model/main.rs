//! Random histories of the store against a simple model: rollout, scoring, learner and restarts.

#![allow(clippy::unwrap_used)]

mod late;
mod ops;
mod query;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use _rust_buffer::{
    error::StoreError,
    log::{Disk, Durability},
    state::group::{Kind, Straggler},
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    state::trajectory::{Outcome, Verdict},
    store::claim_view::{self, ClaimView, Columns, Rows},
    store::claims::{ClaimAnswer, Starvation},
    store::rollout::{Granted, Reply},
    store::{Settings, Store},
    wire::Batch,
};
use late::Stragglers;
use ops::{Op, op};
use proptest::prelude::*;

const TTL: i64 = 1_000;
const GROUPS: usize = 2;

fn settings(lookahead: u32, current_only: bool, straggler: Option<Straggler>) -> Settings {
    Settings {
        groups_per_iteration: GROUPS,
        lookahead,
        max_staleness: Some(2),
        segment_loss: if current_only { SegmentLoss::CurrentOnly } else { SegmentLoss::All },
        min_group_size: 2,
        straggler,
        max_attempts: 2,
        lease_ttl: TTL,
        grant_tokens: 4,
        durability: Durability::Os,
        max_bytes: None,
        // Small, so that histories rotate and delete files.
        file_bytes: 2048,
        commit_interval: Duration::from_millis(5),
    }
}

#[derive(Clone, Copy)]
struct Token {
    id: i32,
    observed: bool,
}

#[derive(Clone)]
struct Held {
    trajectory: u64,
    epoch: u64,
    version: i64,
    grant: u32,
    deadline: i64,
}

fn open(dir: &Path, settings: Settings) -> Store {
    Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap()
}

struct Model {
    dir: tempfile::TempDir,
    settings: Settings,
    store: Option<Store>,
    now: i64,
    admitted: u64,
    evals: u64,
    /// Tokens of each trajectory; evaluation apart.
    tokens: BTreeMap<u64, Vec<Token>>,
    eval: BTreeSet<u64>,
    held: Vec<Held>,
    /// Largest budget that each version ever had.
    budgets: BTreeMap<i64, u64>,
    claims: BTreeMap<i64, Vec<u64>>,
    /// Masks of the claims that are trained.
    masks: BTreeMap<i64, Vec<u8>>,
    /// Tokens that the learner left out by filter and by veto, also of evicted iterations.
    left_out: BTreeMap<i64, [usize; 2]>,
    committed: BTreeSet<u64>,
    trained_through: i64,
    evicted: i64,
    stragglers: Stragglers,
    /// Tokens of late members.
    late_tokens: u64,
    /// Workers that were fenced.
    fenced: u64,
}

impl Model {
    fn new(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), settings);
        store.publish(0, None, LeftOut::default()).unwrap();
        Self {
            dir,
            settings,
            store: Some(store),
            now: 0,
            admitted: 0,
            evals: 0,
            tokens: BTreeMap::new(),
            eval: BTreeSet::new(),
            held: Vec::new(),
            budgets: BTreeMap::new(),
            claims: BTreeMap::new(),
            masks: BTreeMap::new(),
            left_out: BTreeMap::new(),
            committed: BTreeSet::new(),
            trained_through: 0,
            evicted: 0,
            stragglers: Stragglers::new(settings.straggler),
            late_tokens: 0,
            fenced: 0,
        }
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    fn newest(&self) -> i64 {
        self.store.as_ref().unwrap().state().version
    }

    /// What time does, at the store and in the model.
    fn tick(&mut self) {
        let now = self.now;
        self.store().expire(now).unwrap();
        self.held.retain(|held| held.deadline > now);
        for id in self.stragglers.tick(now) {
            self.late_tokens += self.tokens[&id].iter().filter(|token| !token.observed).count() as u64;
            self.held.retain(|held| held.trajectory != id);
        }
    }

    fn run(&mut self, op: &Op) {
        self.tick();
        match op {
            Op::Quota { tokens, segment } => self.quota(*tokens, *segment),
            Op::Admit { size, max_tokens, priority, eval } => self.admit(*size, *max_tokens, *priority, *eval),
            Op::Lease { max, lag } => self.lease(*max, *lag),
            Op::Fence => self.fence(),
            Op::Append { pick, count, stop, newer, observed } => {
                self.append(*pick, *count, *stop, (*newer, *observed));
            }
            Op::StaleAppend { pick } => self.stale_append(*pick),
            Op::Wait { time } => {
                self.now += time;
                self.tick();
            }
            Op::Score { pick, outcome } => self.score(*pick, *outcome),
            Op::Claim => self.claim(),
            Op::Work { stop } => (0..self.held.len()).rev().for_each(|pick| self.append(pick, 4, *stop, (true, false))),
            Op::Publish { left_out, idle, tokens, segment } => {
                if *idle || self.store().state().open_claim().is_some() {
                    self.publish(*left_out);
                    self.quota(*tokens, *segment);
                }
            }
            Op::Commit => self.commit(),
            Op::Uncommit { back } => self.uncommit(*back),
            Op::Evict => self.evict(),
            Op::DropEval => {
                let live = self.store().drop_eval("eval-").unwrap();
                assert!(live as u64 <= self.evals);
                let eval = std::mem::take(&mut self.eval);
                self.held.retain(|held| !eval.contains(&held.trajectory));
                self.tokens.retain(|id, _| !eval.contains(id));
            }
            Op::Late { pick } => self.late(*pick),
            Op::Query { filter, limit } => query::check(self.store(), filter, *limit),
            Op::Reopen => self.reopen(),
        }
        self.check();
    }

    fn quota(&mut self, tokens: u64, tokens_per_segment: Option<u32>) {
        let version = self.newest();
        let quota = Quota { groups: 6, tokens, tokens_per_segment };
        self.store().set_quota(version, quota).unwrap();
        let most = self.budgets.entry(version).or_default();
        *most = (*most).max(tokens);
    }

    fn admit(&mut self, size: u32, max_tokens: u32, priority: i32, eval: bool) {
        let number = if eval { self.evals } else { self.admitted };
        let admit = Admit {
            request_id: format!("{}-{number}", if eval { "eval" } else { "train" }),
            cursor: (!eval).then_some(number),
            kind: if eval { Kind::Eval } else { Kind::Train },
            prompt_id: format!("p{number}"),
            prompt_len: 2,
            size,
            max_tokens,
            priority,
        };
        let prompt: Vec<u8> = [7_i32, 8].iter().flat_map(|token| token.to_le_bytes()).collect();
        let untrained = self.store().counts().groups_untrained;
        match self.store().admit(&admit, &prompt, b"meta") {
            Ok(group) => {
                assert_eq!(self.store().admit(&admit, &prompt, b"meta").unwrap(), group);
                let members = self.store().state().groups[&group].members();
                if !eval {
                    self.stragglers.admit(group, members.clone());
                }
                for id in members {
                    self.tokens.insert(id, Vec::new());
                    if eval {
                        self.eval.insert(id);
                    }
                }
                *(if eval { &mut self.evals } else { &mut self.admitted }) += 1;
            }
            Err(StoreError::Full { limit, .. }) => assert!(!eval && untrained >= limit),
            Err(error) => panic!("{error}"),
        }
    }

    fn lease(&mut self, max: usize, lag: i64) {
        let (now, version) = (self.now, (self.newest() - lag).max(0));
        let open = self.store().state().open_claim().is_some() || version != self.newest();
        let worker = self.worker();
        let grants = self.store().lease(&worker, version, max, now).unwrap();
        self.check_priorities(&grants);
        for lease in grants {
            assert!(lease.grant > 0);
            assert!(lease.kind == Kind::Eval || self.settings.lookahead > 0 || !open);
            assert!(!self.held.iter().any(|held| held.trajectory == lease.trajectory));
            let prefix = claim_view::read_segments(self.store().log(), &lease.segments).unwrap();
            assert_eq!(prefix.ids, ids(&self.tokens[&lease.trajectory]));
            let observed: Vec<u8> = self.tokens[&lease.trajectory].iter().map(|t| u8::from(t.observed)).collect();
            assert_eq!(prefix.observed, observed);
            self.held.push(Held {
                trajectory: lease.trajectory,
                epoch: lease.epoch,
                version,
                grant: lease.grant,
                deadline: now + TTL,
            });
        }
    }

    /// Every lease of the present worker ends, and it gets no other; what it appends is stale; the next one takes over.
    fn fence(&mut self) {
        let (now, version, worker) = (self.now, self.newest(), self.worker());
        let before = self.store().state().clone();
        let held = std::mem::take(&mut self.held);
        assert_eq!(self.store().fence(&worker).unwrap(), held.len());
        assert_eq!(self.store().fence(&worker).unwrap(), 0);
        assert!(self.store().lease(&worker, version, 9, now).unwrap().is_empty());
        for held in &held {
            let offset = self.tokens[&held.trajectory].len() as u32;
            let sent = Sent { held, offset, tokens: &[1], next_version: held.version, stop: None, observed: false };
            let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
            assert_eq!(replies, [Reply { trajectory: held.trajectory, stale: true, grant: 0 }]);
        }
        assert_eq!(self.store().state(), &before);
        self.fenced += 1;
    }

    fn worker(&self) -> String {
        format!("worker-{}", self.fenced)
    }

    /// No group of higher priority was left out when one was started.
    fn check_priorities(&self, grants: &[Granted]) {
        let store = self.store.as_ref().unwrap();
        let group = |id: &u64| &store.state().groups[id];
        let started = grants.iter().filter(|lease| lease.kind == Kind::Train && lease.segments.is_empty());
        let Some(least) = started.map(|lease| group(&lease.group).priority).min() else { return };
        for (id, trajectory) in &store.state().trajectories {
            let left_out = trajectory.segments.is_empty() && store.state_of(*id, trajectory) == "idle";
            let group = group(&trajectory.group);
            assert!(!left_out || group.kind == Kind::Eval || group.priority <= least);
        }
    }

    fn append(&mut self, pick: usize, count: u32, stop: Option<&str>, (newer, observed): (bool, bool)) {
        if self.held.is_empty() {
            return;
        }
        let index = pick % self.held.len();
        let held = self.held[index].clone();
        let offset = self.tokens[&held.trajectory].len() as u32;
        let group = self.store().state().trajectories[&held.trajectory].group;
        let room = self.store().state().groups[&group].max_tokens - offset;
        let count = count.min(if observed { room } else { held.grant });
        let new: Vec<i32> = (0..count).map(|i| (held.trajectory * 100) as i32 + (offset + i) as i32).collect();
        let next_version = if newer { self.newest().max(held.version) } else { held.version };
        let sent = Sent { held: &held, offset, tokens: &new, next_version, stop, observed }.encode();
        let (item, now) = (Batch::decode(&sent).unwrap(), self.now);
        let reply = self.store().append(&item, now).unwrap()[0];
        assert!(!reply.stale);
        let tokens = self.tokens.get_mut(&held.trajectory).unwrap();
        tokens.extend(new.iter().map(|id| Token { id: *id, observed }));
        let before = self.store().state().clone();
        let repeat = self.store().append(&item, now).unwrap()[0];
        assert_eq!(self.store().state(), &before);
        assert_eq!(repeat, reply);
        if stop.is_some() || !before.trajectories[&held.trajectory].is_partial() {
            assert_eq!(reply.grant, 0);
            self.held.remove(index);
        } else {
            self.held[index] = Held { version: next_version, grant: reply.grant, deadline: now + TTL, ..held };
        }
    }

    fn stale_append(&mut self, pick: usize) {
        let fenced: Vec<(u64, u64)> = self
            .store()
            .state()
            .trajectories
            .iter()
            .filter(|(_, t)| t.epoch > 0)
            .map(|(id, t)| (*id, t.epoch - 1))
            .collect();
        if fenced.is_empty() {
            return;
        }
        let (trajectory, epoch) = fenced[pick % fenced.len()];
        let now = self.now;
        let before = self.store().state().clone();
        let held = Held { trajectory, epoch, version: 0, grant: 0, deadline: 0 };
        let sent =
            Sent { held: &held, offset: 0, tokens: &[1, 2, 3], next_version: 0, stop: Some("stop"), observed: false };
        let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
        assert_eq!(replies, [Reply { trajectory, stale: true, grant: 0 }]);
        assert_eq!(self.store().state(), &before);
    }

    /// A member that came too late is fenced, and its score is ignored.
    fn late(&mut self, pick: usize) {
        let live: Vec<u64> = self.store.as_ref().unwrap().state().trajectories.keys().copied().collect();
        let late: Vec<u64> = live.into_iter().filter(|id| self.stragglers.late.contains(id)).collect();
        if late.is_empty() {
            return;
        }
        let (id, now) = (late[pick % late.len()], self.now);
        let before = self.store().state().clone();
        let (offset, epoch) = (before.trajectories[&id].len, before.trajectories[&id].epoch);
        let held = Held { trajectory: id, epoch, version: 0, grant: 0, deadline: 0 };
        let sent = Sent { held: &held, offset, tokens: &[1, 2], next_version: 0, stop: None, observed: false };
        let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
        assert_eq!(replies, [Reply { trajectory: id, stale: true, grant: 0 }]);
        self.store().score(id, 0, Outcome::Scored, 1.0, BTreeMap::new(), now).unwrap();
        assert_eq!(self.store().state(), &before);
    }

    fn score(&mut self, pick: usize, outcome: Outcome) {
        let now = self.now;
        let mut unscored = self.store().unscored(8, 0, now);
        if unscored.is_empty() {
            return;
        }
        let odd = unscored.swap_remove(pick % unscored.len());
        for id in unscored {
            self.score_one(id, Outcome::Scored);
        }
        self.score_one(odd, outcome);
    }

    fn score_one(&mut self, id: u64, outcome: Outcome) {
        let now = self.now;
        let (attempt, group) = {
            let trajectory = &self.store().state().trajectories[&id];
            (trajectory.attempts, trajectory.group)
        };
        let components = BTreeMap::from([("right".to_owned(), 1.0)]);
        self.store().score(id, attempt, outcome, 1.0, components.clone(), now).unwrap();
        let before = self.store().state().clone();
        let given_up = outcome == Outcome::InfraFailure && attempt + 1 == self.settings.max_attempts;
        if given_up || outcome != Outcome::InfraFailure {
            self.stragglers.verdict(group, id, !given_up, now);
        }
        if let Some(trajectory) = before.trajectories.get(&id) {
            assert_eq!(trajectory.verdict == Verdict::Failed, given_up);
        }
        self.store().score(id, attempt, outcome, 1.0, components.clone(), now).unwrap();
        assert_eq!(self.store().state(), &before);
        if before.trajectories.contains_key(&id) && outcome != Outcome::InfraFailure {
            let other = self.store().score(id, attempt, outcome, 2.0, components, now);
            assert!(matches!(other, Err(StoreError::Conflict(_))));
        }
    }

    fn claim(&mut self) {
        let iteration = self.claims.keys().max().copied().unwrap_or(0).max(self.evicted) + 1;
        let (now, version) = (self.now, self.newest());
        let untrained = self.store().counts().groups_untrained;
        match self.store().claim(iteration, version, now) {
            Ok(Some(ClaimAnswer::Claimed(groups, lsn))) => {
                assert!(!groups.is_empty() && groups.len() <= GROUPS);
                assert!(groups.is_sorted());
                for group in &groups {
                    assert!(!self.claims.values().any(|claimed| claimed.contains(group)), "group claimed twice");
                    assert!(!self.committed.contains(group), "committed group claimed again");
                }
                let again = self.store().claim(iteration, version, now).unwrap();
                assert_eq!(again, Some(ClaimAnswer::Claimed(groups.clone(), lsn)));
                self.check_claim(iteration);
                self.claims.insert(iteration, groups);
            }
            Ok(Some(ClaimAnswer::Starved(Starvation::OverAge))) => {
                assert!(self.store().counts().groups_untrained < untrained, "nothing was evicted");
            }
            Ok(Some(ClaimAnswer::Starved(Starvation::Closed))) => {
                let counts = self.store().counts();
                assert_eq!((counts.groups_ready, counts.trajectories_leased, counts.trajectories_unscored), (0, 0, 0));
            }
            Ok(None) => {}
            Err(StoreError::Conflict(_)) => assert!(self.store().state().open_claim().is_some()),
            Err(error) => panic!("{error}"),
        }
    }

    fn check_claim(&mut self, iteration: i64) {
        let packed = Packed::of(self.store(), iteration);
        let version = self.store().state().claims[&iteration].version;
        let trained: Vec<i32> =
            packed.versions.iter().zip(&packed.mask).filter(|(_, mask)| *mask & 2 != 0).map(|(v, _)| *v).collect();
        assert!(trained.iter().all(|v| version - i64::from(*v) <= 2));
        let spans = packed.rows.cu_seqlens.windows(2).zip(&packed.rows.groups);
        for group in &self.store().state().claims[&iteration].groups.clone() {
            let mut own = spans.clone().filter(|(_, of)| **of == *group as i64).map(|(span, _)| span);
            let trains =
                |span: &[i64]| packed.mask[span[0] as usize..span[1] as usize].iter().any(|mask| mask & 2 != 0);
            assert!(own.any(trains), "group {group} has nothing to train");
        }
        assert_eq!(trained.len() as u64, self.store().state().claims[&iteration].sums.trainable);
        assert!(packed.versions.iter().zip(&packed.mask).all(|(v, mask)| (*v < 0) == (*mask == 0)));
        let (mut all, mut generated) = (Vec::new(), Vec::new());
        for id in &packed.rows.trajectories {
            all.extend([7, 8].into_iter().chain(self.tokens[&(*id as u64)].iter().map(|token| token.id)));
            generated.extend([false, false].into_iter().chain(self.tokens[&(*id as u64)].iter().map(|t| !t.observed)));
        }
        assert_eq!(packed.tokens, all);
        assert!(generated.iter().zip(&packed.mask).all(|(generated, mask)| *generated == (mask & 1 != 0)));
    }

    /// `chosen` has two bits for each trajectory of the claim: trained, filtered, vetoed, trained.
    fn publish(&mut self, chosen: u64) {
        let open = self.store().state().open_claim();
        let version = self.newest() + 1;
        let left_out = open.map_or_else(LeftOut::default, |iteration| self.leave_out(iteration, chosen));
        self.store().publish(version, open, left_out.clone()).unwrap();
        let before = self.store().state().clone();
        self.store().publish(version, open, left_out).unwrap();
        assert_eq!(self.store().state(), &before);
        self.trained_through = open.unwrap_or(self.trained_through);
        self.check_masks();
    }

    fn leave_out(&mut self, iteration: i64, chosen: u64) -> LeftOut {
        let mut packed = Packed::of(self.store(), iteration);
        let (mut left_out, mut tokens) = (LeftOut::default(), [0; 2]);
        for (row, id) in packed.rows.trajectories.iter().enumerate() {
            let (reason, flag) = match chosen >> (2 * row % 64) & 3 {
                1 => (0, 16),
                2 => (1, 32),
                _ => continue,
            };
            [&mut left_out.filter, &mut left_out.veto][reason].insert(*id as u64);
            let span = packed.rows.cu_seqlens[row] as usize..packed.rows.cu_seqlens[row + 1] as usize;
            for mask in packed.mask[span].iter_mut().filter(|mask| **mask & 2 != 0) {
                *mask ^= 2 | flag;
                tokens[reason] += 1;
            }
        }
        self.masks.insert(iteration, packed.mask);
        self.left_out.insert(iteration, tokens);
        left_out
    }

    fn check_masks(&self) {
        for (iteration, mask) in &self.masks {
            assert_eq!(&Packed::of(self.store.as_ref().unwrap(), *iteration).mask, mask);
        }
    }

    fn commit(&mut self) {
        let through = self.trained_through;
        self.store().commit_claims(through).unwrap();
        self.store().commit_claims(through).unwrap();
        for (_, groups) in self.claims.range(..=through) {
            self.committed.extend(groups);
        }
    }

    fn uncommit(&mut self, back: i64) {
        let through = (self.trained_through - back).max(self.evicted);
        let undone = self.store().uncommit(through).unwrap();
        assert_eq!(undone, self.claims.split_off(&(through + 1)).into_keys().collect::<Vec<_>>());
        assert!(self.store().uncommit(through).unwrap().is_empty());
        self.trained_through = through;
        self.masks.split_off(&(through + 1));
        self.left_out.split_off(&(through + 1));
        let live: BTreeSet<u64> = self.claims.values().flatten().copied().collect();
        let store = self.store.as_ref().unwrap();
        self.committed.retain(|group| live.contains(group) || !store.state().groups.contains_key(group));
    }

    fn evict(&mut self) {
        let through = self.trained_through;
        let dropped: Vec<i64> = self
            .claims
            .iter()
            .filter(|(_, groups)| groups.iter().all(|group| self.committed.contains(group)))
            .map(|(iteration, _)| *iteration)
            .collect();
        let expected: usize = dropped.iter().map(|iteration| self.claims[iteration].len()).sum();
        assert_eq!(self.store().evict(through).unwrap(), expected);
        assert_eq!(self.store().evict(through).unwrap(), 0);
        self.claims.retain(|iteration, _| !dropped.contains(iteration));
        self.masks.retain(|iteration, _| !dropped.contains(iteration));
        self.evicted = self.evicted.max(dropped.iter().max().copied().unwrap_or(0));
        let first = self.store().first_live_file();
        self.store().log().remove_before(first).unwrap();
    }

    fn reopen(&mut self) {
        let before = self.store().state().clone();
        self.store().log().close().unwrap();
        self.store = None;
        self.store = Some(open(self.dir.path(), self.settings));
        assert_eq!(self.store().state(), &before);
        self.held.clear();
        self.stragglers.reopen();
        self.check_masks();
    }

    fn check(&mut self) {
        let generated = self.tokens.iter().filter(|(id, _)| !self.eval.contains(id)).flat_map(|(_, tokens)| tokens);
        let (observed, generated): (Vec<&Token>, Vec<&Token>) = generated.partition(|token| token.observed);
        let admitted = self.admitted;
        let budgets = self.budgets.clone();
        let tokens = &self.tokens;
        let held: BTreeSet<u64> = self.held.iter().map(|held| held.trajectory).collect();
        let store = self.store.as_ref().unwrap();
        store.check().unwrap();
        let ledger: BTreeMap<&str, i64> = store.ledger().into_iter().collect();
        assert_eq!(ledger["generated"], generated.len() as i64);
        assert_eq!(ledger["observed"], observed.len() as i64);
        assert_eq!(ledger["evicted_late"], self.late_tokens as i64);
        for (reason, place) in ["masked_filter", "masked_veto"].into_iter().enumerate() {
            assert_eq!(ledger[place], self.left_out.values().map(|tokens| tokens[reason] as i64).sum::<i64>());
        }
        assert_eq!(store.counts().trajectories_late, self.stragglers.late.len() as u64);
        assert_eq!(store.state().next_cursor, admitted);
        for (version, spent) in &store.state().spent {
            assert!(*spent <= budgets.get(version).copied().unwrap_or(0), "version {version} spent {spent}");
        }
        let groups = store.state().groups.iter();
        let committed = groups.filter(|(_, group)| store.phase_of(group).0 == "committed").map(|(id, _)| *id).collect();
        assert!(self.committed.is_superset(&committed));
        for (id, trajectory) in &store.state().trajectories {
            assert_eq!(trajectory.len as usize, tokens[id].len());
            assert_eq!(store.state_of(*id, trajectory) == "leased", held.contains(id));
            assert_eq!(store.state_of(*id, trajectory) == "late", self.stragglers.late.contains(id));
        }
    }
}

fn bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn ids(tokens: &[Token]) -> Vec<u8> {
    bytes(&tokens.iter().map(|token| token.id).collect::<Vec<_>>())
}

/// A batch of one segment.
struct Sent<'a> {
    held: &'a Held,
    offset: u32,
    tokens: &'a [i32],
    next_version: i64,
    stop: Option<&'a str>,
    observed: bool,
}

impl Sent<'_> {
    fn encode(&self) -> Vec<u8> {
        let Held { trajectory, epoch, version, .. } = *self.held;
        let none: Vec<(&str, &str, u32)> = Vec::new();
        let count = self.tokens.len() as u32;
        let item = (
            trajectory,
            epoch,
            self.offset,
            count,
            version,
            1.0_f32,
            self.next_version,
            self.stop,
            self.observed,
            none,
        );
        let header = rmp_serde::to_vec(&[item]).unwrap();
        let mut batch =
            [&b"PMDB"[..], &1_u32.to_le_bytes(), &(header.len() as u32).to_le_bytes(), &[0; 4], &header].concat();
        batch.resize(batch.len().next_multiple_of(8), 0);
        batch.extend(bytes(self.tokens));
        if !self.observed {
            batch.extend(bytes(self.tokens));
        }
        batch.resize(batch.len().next_multiple_of(8), 0);
        batch
    }
}

struct Packed {
    tokens: Vec<i32>,
    versions: Vec<i32>,
    mask: Vec<u8>,
    rows: Rows,
}

impl Packed {
    fn of(store: &Store, iteration: i64) -> Self {
        let view = ClaimView::new(store.state(), iteration).unwrap();
        let len = view.num_tokens().unwrap();
        let [mut tokens, mut logprobs, mut versions, mut temperatures] = [(); 4].map(|()| vec![9; 4 * len]);
        let mut mask = vec![9; len];
        let mut columns = Columns {
            tokens: &mut tokens,
            logprobs: &mut logprobs,
            versions: &mut versions,
            temperatures: &mut temperatures,
            mask: &mut mask,
        };
        let rows = view.pack(store.log(), &mut columns, true).unwrap();
        let numbers = |bytes: &[u8]| bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let (tokens, versions): (Vec<i32>, Vec<i32>) = (numbers(&tokens), numbers(&versions));
        let silent = mask.iter().map(|mask| mask & 1 == 0);
        assert!(
            numbers(&logprobs)
                .iter()
                .zip(&tokens)
                .zip(silent)
                .all(|((p, t), silent)| *p == if silent { 0 } else { *t })
        );
        Self { tokens, versions, mask, rows }
    }
}

/// Cases of the quick form; `PROPTEST_CASES` makes it the nightly one.
fn cases(quick: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(quick)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(64), max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn random_histories_keep_every_invariant(
        ops in prop::collection::vec(op(), 1..400), lookahead in 0..2_u32, current_only in any::<bool>(),
        straggler in prop::option::of((2..4_u32, 1..1500_i64))
    ) {
        let straggler = straggler.map(|(members, wait)| Straggler { members, wait });
        let mut model = Model::new(settings(lookahead, current_only, straggler));
        model.run(&Op::Quota { tokens: 30, segment: None });
        for op in &ops {
            model.run(op);
        }
        model.run(&Op::Reopen);
    }
}
