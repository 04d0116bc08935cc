//! The core's three hot paths: `cargo bench`. Lengths are those of `bench/store.py`, which has the peers.

#![allow(missing_docs, clippy::unwrap_used)]

use std::{collections::BTreeMap, hint::black_box, path::Path, sync::Arc, time::Duration};

use _rust_buffer::{
    log::{Disk, Durability},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::claim_view::{ClaimView, Columns},
    store::{Settings, Store},
    wire::Batch,
};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

const GROUPS: u64 = 64;
const MEMBERS: u32 = 8;
const TOKENS: u32 = 1000;
/// Trajectory, epoch, offset, count, version, temperature, next version, stop, observed, extra columns.
type Head = (u64, u64, u32, u32, i64, f32, i64, Option<&'static str>, bool, Vec<(String, String, u32)>);

fn open(dir: &Path) -> Store {
    let settings = Settings {
        groups_per_iteration: GROUPS as usize,
        lookahead: 1,
        max_staleness: None,
        segment_loss: SegmentLoss::All,
        window: None,
        signal: None,
        successes: None,
        min_group_size: 2,
        one_version: false,
        straggler: None,
        max_attempts: 3,
        lease_ttl: i64::MAX,
        grant_tokens: TOKENS,
        durability: Durability::Os,
        max_bytes: None,
        file_bytes: 64 << 20,
        sync_interval: Duration::from_millis(5),
    };
    Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap()
}

/// Leased trajectories of `GROUPS` groups, and a batch that completes them all.
fn leased(dir: &Path) -> (Store, Vec<u8>) {
    let mut store = open(dir);
    store.publish(0, None, LeftOut::default()).unwrap();
    store.set_quota(0, Quota { groups: GROUPS, tokens: u64::MAX / 2, tokens_per_segment: None }).unwrap();
    for number in 0..GROUPS {
        let admit = Admit {
            request_id: format!("train-{number}"),
            cursor: Some(number),
            kind: Kind::Train,
            prompt_id: format!("prompt-{number}"),
            prompt_len: 64,
            size: MEMBERS,
            max_tokens: TOKENS,
            priority: 0,
            drawn: None,
        };
        store.admit(&admit, Prompt { tokens: &[7; 256], metadata: &[], text: None }).unwrap();
    }
    let leases = store.lease("worker", 0, usize::MAX, 0).unwrap();
    let heads = leases.iter().map(|lease| {
        let (trajectory, epoch) = (lease.trajectory, lease.epoch);
        (trajectory, epoch, 0, TOKENS, 0, 1.0, 0, Some("stop"), false, Vec::new())
    });
    (store, encode(&heads.collect::<Vec<Head>>()))
}

fn encode(heads: &[Head]) -> Vec<u8> {
    let header = rmp_serde::to_vec(heads).unwrap();
    let mut batch =
        [&b"PMDB"[..], &1_u32.to_le_bytes(), &(header.len() as u32).to_le_bytes(), &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch.resize(batch.len() + heads.len() * 8 * TOKENS as usize, 7);
    batch
}

/// All trajectories complete, scored and claimed by iteration 1.
fn claimed(dir: &Path) -> Store {
    let (mut store, batch) = leased(dir);
    store.append(&Batch::decode(&batch).unwrap(), 0).unwrap();
    for id in store.unscored(usize::MAX, 1, 0) {
        store.score(id, 0, Outcome::Scored, 1.0, BTreeMap::new(), 0).unwrap();
    }
    store.claim(1, 0, 0).unwrap();
    store
}

fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("store");
    group.sample_size(10).throughput(Throughput::Bytes(GROUPS * u64::from(MEMBERS * TOKENS) * 8));
    group.bench_function("append", |bencher| {
        let fresh = || {
            let dir = tempfile::tempdir().unwrap();
            let (store, batch) = leased(dir.path());
            (dir, store, batch)
        };
        let append = |(dir, mut store, batch): (tempfile::TempDir, Store, Vec<u8>)| {
            store.append(&Batch::decode(&batch).unwrap(), 0).unwrap();
            (dir, store, batch)
        };
        bencher.iter_batched(fresh, append, BatchSize::PerIteration);
    });

    let dir = tempfile::tempdir().unwrap();
    let store = claimed(dir.path());
    let tokens = ClaimView::new(store.state(), 1).unwrap().num_tokens().unwrap();
    let [mut ids, mut logprobs, mut versions, mut temperatures] = [(); 4].map(|()| vec![0; 4 * tokens]);
    let mut mask = vec![0; tokens];
    group.bench_function("pack a claim into reused buffers", |bencher| {
        bencher.iter(|| {
            let mut columns = Columns {
                tokens: &mut ids,
                logprobs: &mut logprobs,
                versions: &mut versions,
                temperatures: &mut temperatures,
                mask: &mut mask,
            };
            black_box(ClaimView::new(store.state(), 1).unwrap().pack(store.log(), &mut columns, true).unwrap())
        });
    });
    store.log().close().unwrap();
    drop(store);
    group.bench_function("open and scan", |bencher| {
        bencher.iter(|| {
            let store = open(dir.path());
            store.log().close().unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
