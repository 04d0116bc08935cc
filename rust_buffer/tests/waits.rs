//! Waits end when what they wait for is there, or can no longer be, and when somebody interrupts them.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, sync::Arc, thread, time::Duration};

use _rust_buffer::{
    error::StoreError,
    log::{Durability, Memory},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, SegmentLoss},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::claims::ClaimAnswer,
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};

const LONG_S: f64 = 60.0;
const SOON: Duration = Duration::from_secs(10);

/// A store that wants two groups in a claim, with two admitted groups of two complete members, all handed out.
fn complete() -> Shared {
    let settings = Settings {
        groups_per_iteration: 2,
        lookahead: 1,
        max_staleness: None,
        segment_loss: SegmentLoss::All,
        window: None,
        signal: None,
        successes: None,
        min_group_size: 2,
        one_version: false,
        straggler: None,
        max_attempts: 1,
        lease_ttl: i64::MAX,
        grant_tokens: 8,
        durability: Durability::Os,
        max_bytes: None,
        file_bytes: 1 << 20,
        sync_interval: Duration::from_millis(5),
    };
    let mut store = Store::open(Arc::new(Memory::default()), settings).unwrap();
    store.publish(0, None, LeftOut::default()).unwrap();
    store.set_quota(0, Quota { groups: 2, tokens: 100, tokens_per_segment: None }).unwrap();
    for number in 0..2 {
        let (request_id, prompt_id) = (format!("train-{number}"), String::new());
        let (kind, cursor) = (Kind::Train, Some(number));
        let admit = Admit {
            request_id,
            cursor,
            kind,
            prompt_id,
            prompt_len: 1,
            size: 2,
            max_tokens: 8,
            priority: 0,
            drawn: None,
        };
        store.admit(&admit, Prompt { tokens: &[1, 0, 0, 0], metadata: b"", text: None }).unwrap();
    }
    let none: Vec<(&str, &str, u32)> = Vec::new();
    for lease in store.lease("worker", 0, 4, 0).unwrap() {
        let item = (lease.trajectory, lease.epoch, 0_u32, 0_u32, 0_i64, 1.0_f32, 0_i64, Some("stop"), false, &none);
        let header = rmp_serde::to_vec(&[item]).unwrap();
        let len = (header.len() as u32).to_le_bytes();
        let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
        batch.resize(batch.len().next_multiple_of(8), 0);
        store.append(&Batch::decode(&batch).unwrap(), 0).unwrap();
    }
    assert_eq!(store.unscored(4, i64::MAX, 0).len(), 4);
    Shared::new(store)
}

fn score(store: &Shared, id: u64, outcome: Outcome) {
    store.change(false, |store| store.score(id, 0, outcome, 1.0, BTreeMap::new(), 0)).unwrap();
}

#[test]
fn a_claim_is_told_of_the_score_that_closes_rollout() {
    let store = complete();
    for id in 0..3 {
        score(&store, id, Outcome::Scored);
    }
    let clock = store.clock(None);
    thread::scope(|scope| {
        let claim = scope.spawn(|| store.wait(LONG_S, clock, |store, now| store.claim(1, 0, now)));
        // It has waited, or will see the score at once.
        thread::sleep(Duration::from_millis(100));
        let scored = std::time::Instant::now();
        score(&store, 3, Outcome::InfraFailure);
        let answer = claim.join().unwrap().unwrap();
        assert!(scored.elapsed() < SOON, "{:?}", scored.elapsed());
        // The second group has one member left and is evicted; so nothing will ever be ready, and nothing has tokens.
        assert!(matches!(answer, Some((_, ClaimAnswer::Starved(_)))), "{answer:?}");
    });
}

#[test]
fn a_wait_that_is_interrupted_ends() {
    let store = complete();
    let clock = store.clock(None).interruptible(Some(|| true));
    let start = std::time::Instant::now();
    let answer = store.wait(LONG_S, clock, |store, now| store.claim(1, 0, now));
    assert!(matches!(answer, Err(StoreError::Interrupted)));
    assert!(start.elapsed() < SOON);
    let clock = store.clock(None).interruptible(Some(|| false));
    assert!(store.wait(0.3, clock, |store, now| store.claim(1, 0, now)).unwrap().is_none());
}
