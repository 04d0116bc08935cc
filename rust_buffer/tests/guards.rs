//! Arguments and records that cannot be meant are refused, and leave the state as it was.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use _rust_buffer::{
    error::{Result, StoreError},
    log::{Durability, Location, Memory},
    state::State,
    state::group::{Kind, MAX_GROUP_SIZE, Phase},
    state::placed::Placed,
    state::record::{Admit, Appended, LeftOut, Quota, Record, Score, SegmentLoss},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::claim_view::{ClaimView, Columns},
    store::claims::ClaimAnswer,
    store::rollout::Granted,
    store::{Settings, Store},
    wire::Batch,
};

fn open() -> Store {
    let settings = Settings {
        groups_per_iteration: 1,
        lookahead: 1,
        max_staleness: Some(1),
        segment_loss: SegmentLoss::All,
        window: None,
        signal: None,
        successes: None,
        min_group_size: 1,
        one_version: false,
        straggler: None,
        max_attempts: 2,
        lease_ttl: i64::MAX,
        grant_tokens: 8,
        durability: Durability::Os,
        max_bytes: Some(u64::MAX),
        file_bytes: 1 << 20,
        sync_interval: Duration::from_millis(5),
    };
    let mut store = Store::open(Arc::new(Memory::default()), settings).unwrap();
    store.publish(0, None, LeftOut::default()).unwrap();
    store.set_quota(0, Quota { groups: 64, tokens: u64::MAX, tokens_per_segment: None }).unwrap();
    store
}

fn admission(number: u64, size: u32) -> Admit {
    let (request_id, prompt_id) = (format!("train-{number}"), String::new());
    let (kind, cursor) = (Kind::Train, Some(number));
    Admit { request_id, cursor, kind, prompt_id, prompt_len: 1, size, max_tokens: 8, priority: 0, drawn: None }
}

fn admit(store: &mut Store, admit: &Admit) -> Result<u64> {
    store.admit(admit, Prompt { tokens: &[1, 0, 0, 0], metadata: b"", text: None })
}

/// Brings a leased trajectory one token of `version`.
fn append_at(store: &mut Store, lease: &Granted, version: i64, stop: Option<&str>) {
    let none: Vec<(&str, &str, u32)> = Vec::new();
    let item = (lease.trajectory, lease.epoch, 0_u32, 1_u32, version, 1.0_f32, version, stop, false, &none);
    let header = rmp_serde::to_vec(&[item]).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch.extend([7, 0, 0, 0, 0, 0, 0, 0]);
    store.append(&Batch::decode(&batch).unwrap(), 0).unwrap();
}

fn append(store: &mut Store, lease: &Granted, stop: Option<&str>) {
    append_at(store, lease, 0, stop);
}

/// Admits a group and brings each of its members to its end, with one token; the trajectories.
fn complete(store: &mut Store, number: u64, size: u32) -> Vec<u64> {
    admit(store, &admission(number, size)).unwrap();
    let leases = store.lease("worker", 0, 64, 0).unwrap();
    for lease in &leases {
        append(store, lease, Some("stop"));
    }
    leases.iter().map(|lease| lease.trajectory).collect()
}

fn score(store: &mut Store, id: u64, attempt: u32, outcome: Outcome, reward: f64, name: &str) -> Result<()> {
    store.score(id, attempt, outcome, reward, BTreeMap::from([(name.to_owned(), reward)]), 0)
}

fn ready(store: &mut Store, number: u64) {
    for id in complete(store, number, 1) {
        score(store, id, 0, Outcome::Scored, 1.0, "right").unwrap();
    }
}

#[allow(clippy::needless_pass_by_value)] // Values read better at the call.
fn conflicts<T: std::fmt::Debug>(answer: Result<T>) {
    assert!(matches!(answer, Err(StoreError::Conflict(_))), "{answer:?}");
}

#[test]
fn undoing_the_claims_after_the_last_number_undoes_none() {
    let mut store = open();
    ready(&mut store, 0);
    store.claim(1, 0, 0).unwrap();
    assert_eq!(store.uncommit(i64::MAX).unwrap(), [0_i64; 0]);
    assert_eq!(store.state().open_claim(), Some(1));
    let mut state = store.state().clone();
    state.apply(&Record::Uncommit(i64::MAX), &placed()).unwrap();
    assert_eq!(state.open_claim(), Some(1));
}

#[test]
fn a_claim_at_a_version_that_was_never_published_evicts_nothing() {
    let mut store = open();
    ready(&mut store, 0);
    conflicts(store.claim(1, 1000, 0));
    conflicts(store.claim(1, -1, 0));
    conflicts(store.claim(-1, 0, 0));
    assert!(matches!(store.claim(1, 0, 0).unwrap(), Some(ClaimAnswer::Claimed(groups, _)) if groups == [0]));
    conflicts(store.claim(1, 1, 0));
}

#[test]
fn numbers_out_of_range_are_refused_before_they_are_written() {
    let mut store = open();
    let (lsn, quota) = (store.lsn(), Quota { groups: 1, tokens: 1, tokens_per_segment: None });
    conflicts(store.publish(i64::MAX, None, LeftOut::default()));
    conflicts(store.set_quota(i64::MAX, quota));
    conflicts(store.set_quota(-1, quota));
    conflicts(admit(&mut store, &Admit { size: MAX_GROUP_SIZE + 1, ..admission(0, 1) }));
    conflicts(admit(&mut store, &Admit { prompt_len: 2, ..admission(0, 1) }));
    let negative = Prompt { tokens: &[0, 0, 0, 0x80], metadata: b"", text: None };
    conflicts(store.admit(&admission(0, 1), negative));
    assert_eq!(store.lsn(), lsn);
    admit(&mut store, &Admit { cursor: Some(u64::MAX), max_tokens: u32::MAX, ..admission(0, MAX_GROUP_SIZE) }).unwrap();
    assert_eq!(store.counts().next_cursor, u64::MAX);
}

#[test]
fn the_first_outcome_of_an_attempt_stands_and_others_are_counted() {
    let mut store = open();
    let members = complete(&mut store, 0, 2);
    score(&mut store, members[0], 0, Outcome::Scored, 1.0, "right").unwrap();
    score(&mut store, members[1], 0, Outcome::InfraFailure, 0.0, "right").unwrap();
    let before = store.state().clone();
    score(&mut store, members[0], 0, Outcome::Scored, 1.0, "right").unwrap();
    score(&mut store, members[1], 0, Outcome::InfraFailure, 0.0, "right").unwrap();
    assert_eq!(store.counts().scores_ignored, 0, "these are repeats");
    score(&mut store, members[0], 0, Outcome::Scored, 0.5, "right").unwrap();
    score(&mut store, members[1], 0, Outcome::Scored, 1.0, "right").unwrap();
    assert_eq!((store.counts().scores_ignored, store.state()), (2, &before));
    conflicts(score(&mut store, members[1], 2, Outcome::Scored, 1.0, "right"));
}

#[test]
fn a_component_that_a_member_lacks_is_no_number() {
    let mut store = open();
    let members = complete(&mut store, 0, 2);
    score(&mut store, members[0], 0, Outcome::Scored, 1.0, "right").unwrap();
    score(&mut store, members[1], 0, Outcome::Scored, 0.5, "short").unwrap();
    store.claim(1, 0, 0).unwrap();
    let view = ClaimView::new(store.state(), 1).unwrap();
    let [mut tokens, mut logprobs, mut versions, mut temperatures, mut mask] = [(); 5].map(|()| vec![0; 64]);
    let mut columns = Columns {
        tokens: &mut tokens,
        logprobs: &mut logprobs,
        versions: &mut versions,
        temperatures: &mut temperatures,
        mask: &mut mask,
    };
    let components = view.pack(store.log(), &mut columns, true).unwrap().components;
    let known = |name: &str| components[name].iter().map(|value| value.is_nan()).collect::<Vec<_>>();
    assert_eq!((known("right"), known("short")), (vec![false, true], vec![true, false]));
}

fn placed() -> Placed {
    Placed { location: Location { file: 1, offset: 32, len: 32 }, lsn: 1, arrays: vec![(64, 0); 4] }
}

#[test]
fn records_that_no_store_wrote_are_errors() {
    let huge = Admit { size: u32::MAX, ..admission(0, 1) };
    conflicts(State::default().apply(&Record::Admit(huge), &placed()));
    conflicts(State::default().apply(&Record::Admit(admission(0, 0)), &placed()));

    let mut state = State::default();
    state.apply(&Record::Admit(admission(0, 1)), &placed()).unwrap();
    let item = Appended {
        trajectory: 0,
        len: u32::MAX,
        version: 0,
        temperature: 1.0,
        observed: false,
        stop: None,
        extra: Vec::new(),
        over: 0,
        crc: None,
    };
    conflicts(state.apply(&Record::Append(vec![item]), &placed()));
    let (components, phase) = (BTreeMap::new(), Some(Phase::Partial));
    let score = Score { trajectory: 0, outcome: Outcome::Scored, reward: 0.0, components, failed: false, phase };
    conflicts(state.apply(&Record::Score(score), &placed()));
}

#[test]
fn a_segment_budget_ends_with_the_quota_that_sets_it() {
    let mut store = open();
    store.set_quota(0, Quota { groups: 64, tokens: 1000, tokens_per_segment: Some(1) }).unwrap();
    admit(&mut store, &admission(0, 1)).unwrap();
    let leases = store.lease("worker", 0, 1, 0).unwrap();
    assert_eq!(leases[0].grant, 1);
    append(&mut store, &leases[0], Some("budget"));
    assert!(store.lease("worker", 0, 1, 0).unwrap().is_empty());
    for version in 1..=32 {
        store.publish(version, None, LeftOut::default()).unwrap();
        store.set_quota(version, Quota { groups: 64, tokens: 1000, tokens_per_segment: None }).unwrap();
        store.check().unwrap();
    }
    assert_eq!(store.lease("worker", 32, 1, 0).unwrap().len(), 1);
    store.check().unwrap();
}

#[test]
fn workers_that_lag_are_given_the_oldest_that_they_may_extend() {
    let mut store = open();
    for number in 0..4 {
        admit(&mut store, &admission(number, 1)).unwrap();
    }
    let leases = store.lease("worker", 0, 4, 0).unwrap();
    append(&mut store, &leases[2], Some("budget"));
    store.publish(1, None, LeftOut::default()).unwrap();
    store.set_quota(1, Quota { groups: 64, tokens: 1000, tokens_per_segment: None }).unwrap();
    for index in [0, 1] {
        append_at(&mut store, &leases[index], 1, Some("budget"));
    }
    let extends =
        |store: &mut Store, version| store.lease("other", version, 1, 0).unwrap().first().map(|l| l.trajectory);
    assert_eq!(extends(&mut store, 0), Some(2), "0 and 1 have newer tokens");
    assert_eq!(extends(&mut store, 1), Some(0));
    assert_eq!(extends(&mut store, 0), None, "1 is newer, 3 is leased");
    assert_eq!(extends(&mut store, 1), Some(1));
    store.check().unwrap();
}

#[test]
fn a_group_that_was_generated_elsewhere_is_leased_whole_and_outside_the_budget() {
    let mut store = open();
    store.set_quota(0, Quota { groups: 64, tokens: 0, tokens_per_segment: Some(1) }).unwrap();
    let group = admit(&mut store, &admission(0, 2)).unwrap();
    assert!(store.lease("worker", 0, 2, 0).unwrap().is_empty(), "there is no budget");
    let leases = store.lease_group("writer", group, 0).unwrap();
    assert_eq!(leases.iter().map(|lease| lease.grant).collect::<Vec<_>>(), [8, 8]);
    assert!(store.lease_group("writer", group, 0).unwrap().is_empty(), "they are held");
    store.check().unwrap();
    append(&mut store, &leases[0], Some("stop"));
    store.check().unwrap();
    assert!(store.ledger().contains(&("overdraft", 0)));
    conflicts(store.lease_group("writer", 7, 0));
}

#[test]
fn requests_that_are_gone_cost_no_room_while_they_are_counted() {
    let mut store = open();
    let names: Vec<String> = (0..60).map(|n| format!("train-{n}")).collect();
    let odd = ["train-007", "train-", "train", "other-99999999999999999999", "a-b-3", "-1", "ünïcode-2x"];
    let mut ids = Vec::new();
    for request_id in names.iter().map(String::as_str).chain(odd) {
        let request_id = request_id.to_owned();
        ids.push(admit(&mut store, &Admit { request_id, ..admission(0, 1) }).unwrap());
        if ids.len() % 3 == 0 {
            // In an order of their own: the newest first.
            while let Some(id) = ids.pop() {
                assert!(store.discard(id, "done").unwrap());
            }
        }
        store.check().unwrap();
    }
    while let Some(id) = ids.pop() {
        store.discard(id, "done").unwrap();
    }
    assert_eq!((store.state().counted_gone.num_runs(), store.state().gone.len()), (3, 5));
    for request_id in names.iter().map(String::as_str).chain(odd) {
        let request_id = request_id.to_owned();
        conflicts(admit(&mut store, &Admit { request_id, ..admission(0, 1) }));
    }
    for request_id in ["train-60", "train-7x", "train-070", "Train-7", "b-3"] {
        let request_id = request_id.to_owned();
        admit(&mut store, &Admit { request_id, ..admission(0, 1) }).unwrap();
    }
}
