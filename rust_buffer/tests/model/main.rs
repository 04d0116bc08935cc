//! Random histories of the store against a simple model: rollout, scoring, learner and restarts.

#![allow(clippy::unwrap_used)]

mod annotations;
mod branches;
mod bytes;
mod late;
mod learner;
mod ops;
mod query;
mod rollout;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    sync::Arc,
};

use _rust_buffer::{
    log::{Disk, Durability},
    state::group::Straggler,
    state::record::{LeftOut, SegmentLoss},
    store::{Settings, Store},
};
use branches::Branch;
use late::Stragglers;
use learner::Made;
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
        one_version: false,
        straggler,
        max_attempts: 2,
        lease_ttl: TTL,
        grant_tokens: 4,
        durability: Durability::Os,
        // Small, so that histories rotate and delete files.
        file_bytes: 2048,
        ..Settings::default()
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

fn open(dir: &Path, settings: Settings, scorers: &[String]) -> Store {
    let mut store = Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap();
    store.expect(scorers.iter().cloned()).unwrap();
    store
}

struct Model {
    dir: tempfile::TempDir,
    settings: Settings,
    /// Those that add columns before rewards are given.
    scorers: Vec<String>,
    /// Those that have, by trajectory.
    annotated: BTreeMap<u64, BTreeSet<String>>,
    store: Option<Store>,
    now: i64,
    admitted: u64,
    evals: u64,
    /// Tokens of each trajectory; evaluation apart.
    tokens: BTreeMap<u64, Vec<Token>>,
    branches: BTreeMap<u64, Vec<Branch>>,
    eval: BTreeSet<u64>,
    /// Text of each group's prompt.
    texts: BTreeMap<u64, Option<String>>,
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
    /// Claims as they were made.
    made: BTreeMap<i64, Made>,
    /// Undone claims, which come again in this order.
    undone: VecDeque<Made>,
    /// Iterations that the weights of each version have trained; a publication without a claim counts as one.
    trained: BTreeMap<i64, i64>,
    /// Version after each iteration in the surviving history.
    versions: BTreeMap<i64, i64>,
    /// Generated tokens of discarded groups.
    discarded_tokens: u64,
}

impl Model {
    fn new(settings: Settings, scorers: usize) -> Self {
        let scorers: Vec<String> = (0..scorers).map(|number| format!("scorer-{number}")).collect();
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path(), settings, &scorers);
        store.publish(0, None, LeftOut::default()).unwrap();
        Self {
            dir,
            settings,
            scorers,
            annotated: BTreeMap::new(),
            store: Some(store),
            now: 0,
            admitted: 0,
            evals: 0,
            tokens: BTreeMap::new(),
            branches: BTreeMap::new(),
            eval: BTreeSet::new(),
            texts: BTreeMap::new(),
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
            made: BTreeMap::new(),
            undone: VecDeque::new(),
            trained: BTreeMap::from([(0, 0)]),
            versions: BTreeMap::from([(0, 0)]),
            discarded_tokens: 0,
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
            Op::Fork { pick, keep } => self.fork(*pick, *keep),
            Op::StaleAppend { pick } => self.stale_append(*pick),
            Op::Wait { time } => {
                self.now += time;
                self.tick();
            }
            Op::Annotate { pick } => self.annotate(*pick),
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
            Op::Compact => self.compact(),
            Op::DropEval => {
                let live = self.store().drop_eval("eval-").unwrap();
                assert!(live as u64 <= self.evals);
                let eval = std::mem::take(&mut self.eval);
                self.held.retain(|held| !eval.contains(&held.trajectory));
                self.tokens.retain(|id, _| !eval.contains(id));
            }
            Op::Late { pick } => self.late(*pick),
            Op::Discard { pick } => self.discard(*pick),
            Op::Query { filter, limit } => query::check(self.store(), filter, *limit),
            Op::Reopen => self.reopen(),
        }
        self.check();
    }

    fn reopen(&mut self) {
        let before = self.store().state().clone();
        self.store().log().close().unwrap();
        self.store = None;
        self.store = Some(open(self.dir.path(), self.settings, &self.scorers));
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
        assert_eq!(ledger["evicted_discarded"], self.discarded_tokens as i64);
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
            let annotated: BTreeSet<String> = trajectory.annotations.iter().map(|known| known.scorer.clone()).collect();
            assert_eq!(&annotated, self.annotated.get(id).unwrap_or(&BTreeSet::new()));
            assert_eq!(store.state_of(*id, trajectory) == "late", self.stragglers.late.contains(id));
        }
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
        straggler in prop::option::of((2..4_u32, 1..1500_i64)), scorers in 0..3_usize
    ) {
        let straggler = straggler.map(|(members, wait)| Straggler { members, wait });
        let mut model = Model::new(settings(lookahead, current_only, straggler), scorers);
        model.run(&Op::Quota { tokens: 30, segment: None });
        for op in &ops {
            model.run(op);
        }
        model.run(&Op::Reopen);
    }
}
