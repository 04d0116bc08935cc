//! How long an append waits for what else the store does, with a million short trajectories: `cargo bench --bench beside`.
//! No interpreter is in the way here; `bench/store.py --only beside` asks the same through Python.
//!
//! `BESIDE_GROUPS` is the number of groups of ten, `BESIDE_ROUNDS` that of interleaved rounds, `BESIDE_DIR` the disk.

#![allow(missing_docs, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use _rust_buffer::{
    log::{Disk, Durability},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    store::admission::Prompt,
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};

const MEMBERS: u32 = 10;
const LANES: usize = 4096;
const ITEMS: usize = 64;
const TOKENS: u32 = 8;
const APPENDS: usize = 2000;
/// Groups that one call reads, as `TrajectoryStore.groups` does.
const PAGE: usize = 64;

/// What goes on beside the appends.
type Beside<'a> = Option<&'a (dyn Fn() + Sync)>;
/// Trajectory, offset.
type Lane = (u64, u32);
/// Trajectory, epoch, offset, count, version, temperature, next version, stop, observed, extra columns.
type Head = (u64, u64, u32, u32, i64, f32, i64, Option<&'static str>, bool, Vec<(String, String, u32)>);

fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn open(dir: &Path, file_bytes: u64) -> Store {
    let settings = Settings {
        groups_per_iteration: 1,
        lookahead: 1,
        max_staleness: None,
        segment_loss: SegmentLoss::All,
        min_group_size: 1,
        window: None,
        signal: None,
        successes: None,
        one_version: false,
        straggler: None,
        max_attempts: 1,
        lease_ttl: i64::MAX,
        grant_tokens: 1 << 20,
        durability: Durability::Group,
        max_bytes: None,
        file_bytes,
        sync_interval: Duration::from_millis(5),
    };
    Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap()
}

fn quota(store: &mut Store, tokens_per_segment: u32) {
    let tokens_per_segment = Some(tokens_per_segment);
    store.set_quota(0, Quota { groups: 1 << 30, tokens: 1 << 40, tokens_per_segment }).unwrap();
}

fn encode(lanes: &[Lane], stop: Option<&'static str>) -> Vec<u8> {
    let head = |(id, offset): &Lane| (*id, 1, *offset, TOKENS, 0, 1.0, 0, stop, false, Vec::new());
    let header = rmp_serde::to_vec(&lanes.iter().map(head).collect::<Vec<Head>>()).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch.resize(batch.len() + lanes.len() * 8 * TOKENS as usize, 7);
    batch
}

/// Admits and leases groups; their trajectories.
fn lease(store: &mut Store, groups: std::ops::Range<u64>) -> Vec<Lane> {
    for number in groups {
        let admit = Admit {
            request_id: format!("train-{number}"),
            cursor: Some(number),
            kind: Kind::Train,
            prompt_id: format!("prompt-{number}"),
            prompt_len: 1,
            size: MEMBERS,
            max_tokens: 1 << 20,
            priority: 0,
            drawn: None,
        };
        store.admit(&admit, Prompt { tokens: &[1, 0, 0, 0], metadata: b"", text: Some("1") }).unwrap();
    }
    store.lease("worker", 0, usize::MAX, 0).unwrap().iter().map(|lease| (lease.trajectory, 0)).collect()
}

/// Milliseconds of durable appends to some lanes after others, sorted, while `beside` runs again and again.
fn appends(shared: &Shared, lanes: &mut [Lane], beside: Beside<'_>) -> Vec<f64> {
    let done = AtomicBool::new(false);
    let mut seen = Vec::new();
    std::thread::scope(|scope| {
        if let Some(beside) = beside {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    beside();
                }
            });
        }
        for number in 0..APPENDS {
            let from = number * ITEMS % LANES;
            let some = &mut lanes[from..from + ITEMS];
            let bytes = encode(some, None);
            let start = Instant::now();
            let batch = Batch::decode(&bytes).unwrap();
            shared.change(true, |store| store.append(&batch, 0)).unwrap();
            seen.push(start.elapsed().as_secs_f64() * 1e3);
            for lane in some {
                lane.1 += TOKENS;
            }
        }
        done.store(true, Ordering::Release);
    });
    seen.sort_unstable_by(f64::total_cmp);
    seen
}

fn main() {
    let (groups, rounds) = (number("BESIDE_GROUPS", 100_000), number("BESIDE_ROUNDS", 5));
    let dir = env::var("BESIDE_DIR").map_or_else(|_| tempfile::tempdir(), tempfile::tempdir_in).unwrap();
    let mut store = open(dir.path(), 64 << 20);
    store.publish(0, None, LeftOut::default()).unwrap();
    quota(&mut store, 1 << 30);
    for first in (0..groups).step_by(1000) {
        for lanes in lease(&mut store, first..(first + 1000).min(groups)).chunks(1000) {
            store.append(&Batch::decode(&encode(lanes, Some("stop"))).unwrap(), 0).unwrap();
        }
    }
    let mut lanes = lease(&mut store, groups..groups + LANES as u64 / u64::from(MEMBERS) + 1);
    let shared = Shared::new(store);
    let groups = || {
        let mut after = None;
        while {
            after = shared.groups(None, after, PAGE).unwrap().1;
            after.is_some()
        } {}
    };
    let quotas = || {
        for limit in [1 << 29, 1 << 30] {
            let set = |store: &mut Store| {
                quota(store, limit);
                Ok(())
            };
            shared.change(true, set).unwrap();
        }
    };
    let snapshot = || shared.write_snapshot().unwrap();
    let subjects: [(&str, Beside<'_>); 4] =
        [("alone", None), ("groups()", Some(&groups)), ("set_quota", Some(&quotas)), ("snapshot", Some(&snapshot))];
    let mut all: BTreeMap<&str, Vec<(f64, f64, f64)>> = BTreeMap::new();
    for round in 0..rounds as usize {
        for turn in 0..subjects.len() {
            let (name, beside) = subjects[(round + turn) % subjects.len()];
            let seen = appends(&shared, &mut lanes, beside);
            let at = |share: f64| seen[((seen.len() as f64 * share) as usize).min(seen.len() - 1)];
            println!("{round} {name}: p50 {:.2} ms, p99.9 {:.2} ms, most {:.2} ms", at(0.5), at(0.999), at(1.0));
            all.entry(name).or_default().push((at(0.5), at(0.999), at(1.0)));
        }
    }
    let median = |name: &str| {
        let mut seen: Vec<f64> = all[name].iter().map(|(_, p999, _)| *p999).collect();
        seen.sort_unstable_by(f64::total_cmp);
        seen[seen.len() / 2]
    };
    for (name, _) in &subjects[1..] {
        println!("p99.9 beside {name} / alone: {:.2}, wanted at most 3", median(name) / median("alone"));
    }
    shared.close().unwrap();
}
