//! Random workloads of the whole store on a disk that fails.

use std::{collections::BTreeMap, time::Duration};

use _rust_buffer::{
    error::{Result, StoreError},
    log::{Durability, Lsn},
    state::State,
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::arrays,
    store::{Settings, Store},
    wire::{self, Batch},
};
use proptest::prelude::*;

use crate::{
    End, cases, end, fault,
    storage::{Disk, Fault},
};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
enum Op {
    Admit { size: u32, max_tokens: u32 },
    Lease,
    Append { count: u32, stop: bool },
    Score,
    Claim,
    Publish,
    Commit,
    Evict,
    Compact,
    Wait,
    Arm(Fault),
    End(End),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (2..4_u32, 1..40_u32).prop_map(|(size, max_tokens)| Op::Admit { size, max_tokens }),
        4 => Just(Op::Lease),
        8 => (0..20_u32, any::<bool>()).prop_map(|(count, stop)| Op::Append { count, stop }),
        6 => Just(Op::Score),
        4 => Just(Op::Claim),
        4 => Just(Op::Publish),
        2 => Just(Op::Commit),
        2 => Just(Op::Evict),
        3 => Just(Op::Compact),
        2 => Just(Op::Wait),
        1 => fault().prop_map(Op::Arm),
        2 => end().prop_map(Op::End),
    ]
}

fn settings(durability: Durability) -> Settings {
    Settings {
        groups_per_iteration: 2,
        lookahead: 1,
        max_staleness: Some(2),
        segment_loss: SegmentLoss::All,
        window: None,
        signal: None,
        successes: None,
        min_group_size: 1,
        max_attempts: 2,
        lease_ttl: 1_000,
        grant_tokens: 16,
        durability,
        one_version: false,
        straggler: None,
        max_bytes: None,
        file_bytes: 1024,
        sync_interval: Duration::from_millis(1),
    }
}

#[derive(Clone, Copy)]
struct Held {
    trajectory: u64,
    epoch: u64,
    version: i64,
    grant: u32,
}

struct Run {
    disk: Disk,
    settings: Settings,
    store: Option<Store>,
    /// The state after each call, by its newest record.
    states: BTreeMap<Lsn, State>,
    /// LSN whose loss by power would break a promise.
    kept: Lsn,
    /// What was appended to each trajectory.
    tokens: BTreeMap<u64, Vec<i32>>,
    /// Text of each admission that was tried.
    texts: BTreeMap<String, String>,
    held: Vec<Held>,
    /// Makes each admission and each run of tokens another one.
    serial: u32,
    /// A record may be in the log that the state does not have: no later one is taken by this process.
    failed: bool,
}

impl Run {
    fn new(seed: u64, durability: Durability) -> Self {
        let mut run = Self {
            disk: Disk::new(seed),
            settings: settings(durability),
            store: None,
            states: BTreeMap::from([(0, State::default())]),
            kept: 0,
            tokens: BTreeMap::new(),
            texts: BTreeMap::new(),
            held: Vec::new(),
            serial: 0,
            failed: false,
        };
        run.open(0);
        run
    }

    fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    fn run(&mut self, op: &Op) {
        self.serial += 1;
        let answer = match op {
            Op::Admit { size, max_tokens } => self.admit(*size, *max_tokens),
            Op::Lease => self.lease(),
            Op::Append { count, stop } => self.append(*count, *stop),
            Op::Score => self.score(),
            Op::Claim => self.claim(),
            Op::Publish => self.publish(),
            Op::Commit => self.trained().map_or(Ok(()), |iteration| self.store().commit_claims(iteration)),
            Op::Evict => self.evict(),
            Op::Compact => self.compact(),
            Op::Wait => self.wait(),
            Op::Arm(fault) => {
                self.disk.arm(*fault);
                Ok(())
            }
            Op::End(end) => {
                self.end(*end);
                Ok(())
            }
        };
        match answer {
            Ok(()) | Err(StoreError::Full { .. } | StoreError::NoSpace { .. }) => {
                let store = self.store.as_ref().unwrap();
                store.check().unwrap();
                if !self.failed {
                    self.states.insert(store.lsn(), store.state().clone());
                }
            }
            Err(StoreError::Io { .. } | StoreError::Poisoned { .. }) => self.failed = true,
            Err(other) => panic!("{other}"),
        }
        self.acknowledged();
    }

    /// Level `Os` promises nothing about power.
    fn acknowledged(&mut self) {
        if self.settings.durability != Durability::Os {
            self.kept = self.kept.max(self.store().log().durable_lsn());
        }
    }

    fn admit(&mut self, size: u32, max_tokens: u32) -> Result<()> {
        let version = self.store().state().version;
        if version < 0 {
            self.store().publish(0, None, LeftOut::default())?;
        }
        let quota = Quota { groups: 6, tokens: 1_000_000, tokens_per_segment: None };
        self.store().set_quota(version.max(0), quota)?;
        let admit = Admit {
            request_id: format!("r{}", self.serial),
            cursor: Some(self.store().state().next_cursor),
            kind: Kind::Train,
            prompt_id: format!("p{}", self.serial),
            prompt_len: 2,
            size,
            max_tokens,
            priority: 0,
            drawn: None,
        };
        let text = format!("text {}", self.serial);
        self.texts.insert(admit.request_id.clone(), text.clone());
        let prompt = Prompt { tokens: &[7; 8], metadata: b"metadata", text: Some(&text) };
        self.store().admit(&admit, prompt).map(drop)
    }

    fn lease(&mut self) -> Result<()> {
        let version = self.store().state().version.max(0);
        for lease in self.store().lease("worker", version, 8, 0)? {
            let (trajectory, epoch, grant) = (lease.trajectory, lease.epoch, lease.grant);
            self.held.push(Held { trajectory, epoch, version, grant });
        }
        Ok(())
    }

    fn append(&mut self, count: u32, stop: bool) -> Result<()> {
        for held in std::mem::take(&mut self.held) {
            let tokens = self.tokens.entry(held.trajectory).or_default();
            let (offset, count) = (tokens.len() as u32, count.min(held.grant));
            let new: Vec<i32> = (0..count).map(|i| (self.serial * 1000 + i) as i32).collect();
            tokens.extend(&new);
            let sent = encode(held, offset, &new, stop);
            let reply = self.store().append(&Batch::decode(&sent)?, 0)?[0];
            assert!(!reply.stale);
            let partial = self.store().state().trajectories[&held.trajectory].is_partial();
            if partial && !stop {
                self.held.push(Held { grant: reply.grant, ..held });
            }
        }
        Ok(())
    }

    fn score(&mut self) -> Result<()> {
        for id in self.store().unscored(8, 0, 0) {
            let attempt = self.store().state().trajectories[&id].attempts;
            let outcome = if self.serial % 5 == 0 { Outcome::InfraFailure } else { Outcome::Scored };
            let components = BTreeMap::from([("right".to_owned(), 1.0)]);
            let reward = f64::from(self.serial);
            self.store().score(id, attempt, outcome, reward, components, 0)?;
        }
        Ok(())
    }

    fn claim(&mut self) -> Result<()> {
        let state = self.store().state();
        if state.open_claim().is_some() || state.version < 0 {
            return Ok(());
        }
        let newest = state.claims.keys().next_back().copied().max(state.evicted);
        let (iteration, version) = (newest.unwrap_or(0) + 1, state.version);
        self.store().claim(iteration, version, 0).map(drop)
    }

    fn publish(&mut self) -> Result<()> {
        let state = self.store().state();
        let Some(open) = state.open_claim() else { return Ok(()) };
        let (version, group) = (state.max_version + 1, state.group(state.claims[&open].groups[0])?);
        let scored = state.members(group).filter(|(_, member)| member.reward().is_some()).map(|(id, _)| id);
        let left_out = LeftOut { filter: scored.take(1).collect(), ..LeftOut::default() };
        self.store().publish(version, Some(open), left_out)
    }

    /// The newest claim that may be committed.
    fn trained(&mut self) -> Option<i64> {
        let state = self.store().state();
        let open = state.open_claim();
        state.claims.keys().rev().copied().find(|iteration| Some(*iteration) != open)
    }

    fn evict(&mut self) -> Result<()> {
        if let Some(iteration) = self.trained() {
            self.store().evict(iteration)?;
        }
        self.remove_dead_files()
    }

    /// What the compactor does, up to any point of it.
    fn compact(&mut self) -> Result<()> {
        self.store().compact()?;
        if self.serial % 2 == 0 {
            return Ok(());
        }
        let (position, state) = (self.store().log().position(), self.store().state().clone());
        self.store().log().write_snapshot(position, &wire::encode(&state)?)?;
        self.remove_dead_files()
    }

    fn remove_dead_files(&mut self) -> Result<()> {
        let store = self.store.as_ref().unwrap();
        store.log().remove_files(|file| store.is_dead(file)).map(drop)
    }

    fn wait(&mut self) -> Result<()> {
        let lsn = self.store().lsn();
        assert!(self.store().log().wait_durable(lsn, PATIENCE)?, "record {lsn} neither durable nor refused");
        Ok(())
    }

    fn end(&mut self, end: End) {
        self.acknowledged();
        let least = if end.power_loss { self.kept } else { self.store().lsn() };
        if end.power_loss {
            self.disk.lose_power();
        } else {
            self.disk.kill();
        }
        self.store = None;
        if let Some(fault) = end.fault {
            self.disk.arm(fault);
            match Store::open(self.disk.process(), self.settings) {
                Ok(_) | Err(StoreError::Io { .. } | StoreError::NoSpace { .. }) => {}
                Err(other) => panic!("{other}"),
            }
            self.disk.kill();
        }
        self.open(least);
        let before = (self.store().lsn(), self.store().state().clone());
        self.disk.kill();
        self.store = None;
        self.open(before.0);
        assert!(self.store().lsn() == before.0 && *self.store().state() == before.1, "opening twice differs");
    }

    fn open(&mut self, least: Lsn) {
        let store = Store::open(self.disk.process(), self.settings).map_err(|error| error.to_string()).unwrap();
        store.check().unwrap();
        let lsn = store.lsn();
        assert!(lsn >= least, "{least} records were acknowledged, {lsn} are there");
        if let Some(state) = self.states.get(&lsn) {
            assert!(store.state() == state, "the state after record {lsn} differs");
        }
        for (id, trajectory) in &store.state().trajectories {
            let read = arrays::read_runs(store.log(), &trajectory.runs).unwrap();
            let sent = self.tokens.get(id).map_or(&[][..], Vec::as_slice);
            assert_eq!(read.ids, bytes(&sent[..trajectory.len as usize]), "tokens of trajectory {id}");
        }
        for group in store.state().groups.values() {
            let read = arrays::read_prompt(store.log(), group.location).unwrap();
            assert_eq!(read.text.as_ref(), self.texts.get(&group.request_id), "text of {}", group.request_id);
        }
        let state = store.state();
        self.tokens.retain(|id, tokens| {
            tokens.truncate(state.trajectories.get(id).map_or(0, |trajectory| trajectory.len as usize));
            !tokens.is_empty()
        });
        self.states.split_off(&(lsn + 1));
        self.states.insert(lsn, state.clone());
        self.held.clear();
        (self.kept, self.failed, self.store) = (lsn, false, Some(store));
    }
}

fn bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A batch of one segment.
fn encode(held: Held, offset: u32, tokens: &[i32], stop: bool) -> Vec<u8> {
    let (none, stop): (Vec<(&str, &str, u32)>, _) = (Vec::new(), stop.then_some("stop"));
    let Held { trajectory, epoch, version, .. } = held;
    let item = (trajectory, epoch, offset, tokens.len() as u32, version, 1.0_f32, version, stop, false, none);
    let header = rmp_serde::to_vec(&[item]).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch.extend([bytes(tokens), bytes(tokens)].concat());
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch
}

proptest! {
    #![proptest_config(cases(30))]

    #[test]
    fn the_store_keeps_what_it_acknowledges(
        seed in any::<u64>(),
        durability in prop_oneof![Just(Durability::Os), Just(Durability::Group), Just(Durability::Always)],
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut run = Run::new(seed, durability);
        for op in &ops {
            run.run(op);
        }
        run.run(&Op::End(End { power_loss: true, fault: None, again: false }));
    }
}
