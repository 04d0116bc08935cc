//! What callers cannot bring about or see: a record that the state does not take, and the parts of a snapshot.

use std::{collections::BTreeMap, sync::Arc};

use super::{Settings, Store, live::Live, size, snapshot::parts};
use crate::{
    error::StoreError,
    log::{Arrays, Durability, Location, Memory, Replay},
    state::annotation::Annotation,
    state::fork::Fork,
    state::gone,
    state::group::{Group, Kind, Phase},
    state::placed::Placed,
    state::record::{Admit, LeftOut, Plan, Quota, Record, SegmentLoss},
    state::successes::Drawn,
    state::trajectory::{Outcome, Run, Stop, Trajectory, Verdict},
    state::turn::Turn,
    state::{Claim, ClaimStatus, ClaimSums, KEPT_QUOTAS, Publication, State},
};

#[test]
fn a_record_that_is_written_and_cannot_be_applied_ends_the_log() {
    let settings =
        Settings { lease_ttl: 1, grant_tokens: 1, durability: Durability::Os, file_bytes: 4096, ..Settings::default() };
    let mut store = Store::open(Arc::new(Memory::default()), settings).expect("an empty store");
    let refused = store.record(&Record::Late(vec![99]), &Arrays::default()).expect_err("there is no group 99");
    assert!(!matches!(refused, StoreError::Poisoned { .. }), "{refused}");
    let next = store.record(&Record::Commit(0), &Arrays::default());
    assert!(matches!(next, Err(StoreError::Poisoned { detail }) if detail == refused.to_string()));
    assert_eq!(store.lsn(), 1, "nothing was written after it");
}

#[test]
fn a_large_state_goes_into_parts_and_comes_back() {
    let mut state = State::default();
    for number in 0..5000 {
        let admit = Admit {
            request_id: format!("train-{number}"),
            cursor: Some(number),
            kind: Kind::Train,
            prompt_id: String::new(),
            prompt_len: 1,
            size: 2,
            max_tokens: 1,
            priority: 0,
            drawn: None,
        };
        let location = Location { file: 1, offset: 32 * number, len: 32 };
        let placed = Placed { location, lsn: number + 1, arrays: Vec::new() };
        state.apply(&Record::Admit(admit), &placed).expect("room for a group");
    }
    let (count, parts) = parts(&state);
    let parts: Vec<Vec<u8>> = parts.collect::<Result<_, _>>().expect("a state can be encoded");
    assert_eq!((count as usize, parts.len()), (5, 5), "the rest, 5,000 groups, 10,000 trajectories");
    let (size, said) = (parts.iter().map(Vec::len).sum::<usize>() as u64, Live::of(&state).snapshot_bytes(&state));
    assert!((size..=5 * size).contains(&said), "{size} bytes, said to be {said} at most");
    let mut read = State::default();
    read.snapshot(&parts[0]).expect("the first part");
    parts[1..].iter().for_each(|part| read.snapshot_part(part).expect("another part"));
    assert_eq!(read, state);
}

/// Numbers that take the most bytes, counted down from the greatest.
const MOST: u64 = u64::MAX >> 1;
const FAR: Location = Location { file: u32::MAX, offset: MOST, len: u32::MAX };

const RUN: Run = Run {
    len: u32::MAX,
    version: i64::MAX,
    temperature: 0.1,
    observed: false,
    file: u32::MAX,
    frame: MOST,
    at: u32::MAX,
    crc: u32::MAX,
};

fn widest_trajectory(group: u64) -> Trajectory {
    let components = (0..4).map(|number| (u32::MAX - number, 0.1)).collect();
    Trajectory {
        group,
        epoch: MOST,
        len: u32::MAX,
        observed: u32::MAX,
        tail: u32::MAX,
        stop: Stop::Repetition,
        attempts: u32::MAX,
        verdict: Verdict::Scored { outcome: Outcome::Invalid, reward: 0.1, components },
        runs: Vec::new(),
        columns: true,
        annotations: Vec::new(),
    }
}

fn widest_group(id: u64, iteration: i64) -> Group {
    Group {
        request_id: "r".repeat(3000),
        kind: Kind::Train,
        prompt_id: "p".repeat(2000),
        location: FAR,
        prompt_len: u32::MAX,
        max_tokens: u32::MAX,
        first: id,
        size: 1,
        cursor: Some(MOST),
        priority: i32::MIN,
        phase: Phase::Claimed(iteration),
        pending: u32::MAX,
        failed: u32::MAX,
        late: u32::MAX,
        tokens: MOST,
        drawn: Some(Drawn { key: MOST, number: i64::MAX }),
        passed: MOST,
    }
}

fn widest_claim(id: u64) -> Claim {
    let sums = ClaimSums { trainable: MOST, over_age: MOST, segment: MOST, filter: MOST, veto: MOST, failed: MOST };
    let plan = Plan {
        rule: "r".repeat(256),
        seed: Some(i64::MAX),
        num_steps: u32::MAX,
        steps: BTreeMap::from([(id, u32::MAX)]),
    };
    Claim {
        version: i64::MAX,
        max_staleness: Some(u32::MAX),
        segment_loss: SegmentLoss::CurrentOnly,
        groups: vec![id],
        lsn: MOST,
        status: ClaimStatus::Committed,
        sums,
        left_out: LeftOut::default(),
        asked: Some(i64::MAX),
        plan: Some(plan),
    }
}

/// Adds what a state can have, a kind at a time, to the group, trajectory and claim of one id.
const KINDS: [fn(&mut State, u64); 12] = [
    |state, id| {
        let iteration = id as i64;
        state.groups.insert(id, widest_group(id, iteration));
        state.claims.insert(iteration, widest_claim(id));
        let publication = Publication { iteration: Some(iteration), left_out: LeftOut::default() };
        state.publications.insert(iteration, publication);
    },
    |state, id| {
        state.trajectories.insert(id, widest_trajectory(id));
        leave_out(state, id, id);
    },
    |state, id| state.trajectories[&id].runs = vec![RUN; 20],
    |state, id| {
        let components = (0..30).map(|number| (u32::MAX - number, 0.1)).collect();
        state.trajectories[&id].verdict = Verdict::Scored { outcome: Outcome::Invalid, reward: 0.1, components };
    },
    |state, id| {
        state.trajectories[&id].annotations = vec![Annotation { scorer: "s".repeat(300), location: FAR }; 9];
    },
    |state, id| {
        state.forks.insert(id, vec![Fork { branch: MOST, start: u32::MAX, offset: u32::MAX, epoch: MOST }]);
        leave_out(state, id, id - (MOST >> 1));
    },
    |state, id| {
        let rewards = (0..9).map(|reward| (format!("{reward}{}", "n".repeat(200)), 0.1)).collect();
        state.turns.insert(id, vec![Turn { offset: u32::MAX, rewards, key: Some("k".repeat(500)) }]);
    },
    |state, _| state.components.push("c".repeat(300)),
    |state, id| {
        state.spent.insert(id as i64, MOST);
        state.trained.restore(id as i64, -1);
    },
    |state, id| {
        state.successes.rates.insert(id, 0.1);
        state.successes.moved.push((id, 0.1));
        state.successes.evicted.push((id, 0.1));
    },
    |state, id| gone::insert(&mut state.gone, &mut state.counted_gone, &format!("none{id}")),
    |state, id| {
        let request_id = format!("{}{id}-{}", "g".repeat(900), MOST >> 4);
        gone::insert(&mut state.gone, &mut state.counted_gone, &request_id);
    },
];

fn leave_out(state: &mut State, claimed: u64, id: u64) {
    let iteration = claimed as i64;
    state.claims.entry(iteration).and_modify(|claim| _ = claim.left_out.filter.insert(id));
    state.publications.entry(iteration).and_modify(|publication| _ = publication.left_out.filter.insert(id));
}

/// Bytes of a snapshot, and how many are said to be the most beside those of every one.
fn sizes(state: &State) -> (u64, u64) {
    let size = parts(state).1.map(|part| part.expect("a state can be encoded").len() as u64).sum();
    (size, Live::of(state).snapshot_bytes(state))
}

#[test]
fn no_snapshot_is_larger_than_the_room_that_is_kept_for_it() {
    let mut state = State { evicted: Some(i64::MAX), next_group: MOST, next_trajectory: MOST, ..State::default() };
    for number in 0..KEPT_QUOTAS as i64 {
        let quota = Quota { groups: MOST, tokens: MOST, tokens_per_segment: Some(u32::MAX) };
        state.quotas.insert(i64::MAX - number, quota);
    }
    let mut before = sizes(&state);
    // The ledger's numbers come to a few hundred more.
    assert!(before.0 + 1000 < size::BASE && before.1 == 0, "{before:?}");
    for (nth, add) in KINDS.iter().enumerate() {
        (0..1000).for_each(|number| add(&mut state, MOST - number));
        let after = sizes(&state);
        let (grown, said) = (after.0 - before.0, after.1 - before.1);
        assert!((grown..=3 * grown).contains(&said), "kind {nth}: {grown} more bytes, said to be {said} at most");
        before = after;
    }
}
