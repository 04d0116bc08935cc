//! What callers cannot bring about or see: a record that the state does not take, and the parts of a snapshot.

use std::sync::Arc;

use super::{Settings, Store, live::Live, snapshot::parts};
use crate::{
    error::StoreError,
    log::{Arrays, Durability, Location, Memory, Replay},
    state::State,
    state::group::Kind,
    state::placed::Placed,
    state::record::{Admit, Record},
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
    assert!((size..=3 * size).contains(&said), "{size} bytes, said to be about {said}");
    let mut read = State::default();
    read.snapshot(&parts[0]).expect("the first part");
    parts[1..].iter().for_each(|part| read.snapshot_part(part).expect("another part"));
    assert_eq!(read, state);
}
