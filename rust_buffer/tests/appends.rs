//! What an append takes, and what it refuses: repeats in part, overdrafts, and numbers that no policy can have made.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, atomic::Ordering};

#[path = "support/watched.rs"]
mod watched;

use _rust_buffer::{
    error::{Result, StoreError},
    log::{Durability, Memory, Storage},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota},
    store::admission::Prompt,
    store::append::Reply,
    store::arrays::{ColumnReader, Tokens, read_runs},
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};
use watched::Watched;

fn words<T: Copy + Into<f64>>(values: &[T], word: fn(f64) -> [u8; 4]) -> Vec<u8> {
    values.iter().flat_map(|value| word((*value).into())).collect()
}

/// A store that has leased one trajectory, number 0, of at most 12 tokens, with a grant of 4.
fn leased(kind: Kind) -> Store {
    leased_in(Arc::new(Memory::default()), kind)
}

fn leased_in(storage: Arc<dyn Storage>, kind: Kind) -> Store {
    let settings = Settings { grant_tokens: 4, durability: Durability::Os, file_bytes: 1 << 20, ..Settings::default() };
    let mut store = Store::open(storage, settings).unwrap();
    store.publish(0, None, LeftOut::default()).unwrap();
    store.set_quota(0, Quota { groups: 8, tokens: 6, tokens_per_segment: None }).unwrap();
    let (request_id, prompt_id) = ("one".to_owned(), String::new());
    let cursor = None;
    let admit =
        Admit { request_id, cursor, kind, prompt_id, prompt_len: 1, size: 1, max_tokens: 12, priority: 0, drawn: None };
    store.admit(&admit, Prompt { tokens: &[1, 0, 0, 0], metadata: b"", text: None }).unwrap();
    assert_eq!(store.lease("worker", 0, 1, 0).unwrap().len(), 1);
    store
}

/// Tokens `first..last`, each with its number as id and log-prob, and a column of two bytes a token.
#[derive(Clone, Copy)]
struct Sent {
    first: u32,
    last: u32,
    version: i64,
    temperature: f32,
    stop: Option<&'static str>,
}

fn sent(first: u32, last: u32) -> Sent {
    Sent { first, last, version: 0, temperature: 1.0, stop: None }
}

fn encode(items: &[Sent], change: impl Fn(&mut Vec<f64>, &mut Vec<f64>)) -> Vec<u8> {
    let heads: Vec<_> = items
        .iter()
        .map(|item| {
            let count = item.last - item.first;
            let columns = if count > 0 { vec![("column", "<u2", 2 * count)] } else { Vec::new() };
            let end = (item.version, item.stop, false, columns);
            (0_u64, 1_u64, item.first, count, item.version, item.temperature, end.0, end.1, end.2, end.3)
        })
        .collect();
    let header = rmp_serde::to_vec(&heads).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    for item in items {
        let mut ids: Vec<f64> = (item.first..item.last).map(f64::from).collect();
        let mut logprobs = ids.clone();
        change(&mut ids, &mut logprobs);
        batch.extend(words(&ids, |id| (id as i64 as i32).to_le_bytes()));
        batch.extend(words(&logprobs, |logprob| (logprob as f32).to_le_bytes()));
        batch.extend((item.first..item.last).flat_map(|token| (token as u16).to_le_bytes()));
        batch.resize(batch.len().next_multiple_of(8), 0);
    }
    batch
}

fn append(store: &mut Store, items: &[Sent]) -> Result<Vec<Reply>> {
    store.append(&Batch::decode(&encode(items, |_, _| ()))?, 0)
}

/// Asserts that the trajectory has the tokens `0..last`, with their log-probs and columns.
fn assert_holds(store: &Store, last: u32) {
    let trajectory = &store.state().trajectories[&0];
    let Tokens { ids, logprobs, .. } = read_runs(store.log(), &trajectory.runs).unwrap();
    let numbers: Vec<f64> = (0..last).map(f64::from).collect();
    assert_eq!(ids, words(&numbers, |id| (id as i32).to_le_bytes()));
    assert_eq!(logprobs, words(&numbers, |logprob| (logprob as f32).to_le_bytes()));
    let columns = ColumnReader::new(store.log()).of_runs(&trajectory.runs).unwrap();
    let column: Vec<u8> = columns["column"].iter().flat_map(|run| run.bytes.clone()).collect();
    assert_eq!(column, (0..last).flat_map(|token| (token as u16).to_le_bytes()).collect::<Vec<_>>());
    store.check().unwrap();
}

fn refused<T: std::fmt::Debug>(answer: Result<T>, part: &str) {
    match answer {
        Err(StoreError::Conflict(detail)) => assert!(detail.contains(part), "{detail}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn of_an_item_that_repeats_durable_tokens_the_rest_is_taken() {
    let mut store = leased(Kind::Train);
    append(&mut store, &[sent(0, 3)]).unwrap();
    append(&mut store, &[sent(1, 6)]).unwrap();
    assert_holds(&store, 6);
    append(&mut store, &[sent(0, 7), sent(4, 8), sent(4, 8)]).unwrap();
    assert_holds(&store, 8);
    append(&mut store, &[sent(2, 5)]).unwrap();
    assert_holds(&store, 8);
    let other = encode(&[sent(4, 10)], |ids, _| ids[1] += 1.0);
    refused(store.append(&Batch::decode(&other).unwrap(), 0), "other content");
    let other = encode(&[sent(4, 10)], |_, logprobs| logprobs[3] -= 1.0);
    refused(store.append(&Batch::decode(&other).unwrap(), 0), "other content");
    refused(append(&mut store, &[sent(8, 9), Sent { temperature: 0.5, ..sent(8, 10) }]), "other content");
    assert_holds(&store, 8);
}

#[test]
fn an_end_that_is_sent_twice_in_one_batch_ends_the_lease_once() {
    let mut store = leased(Kind::Train);
    append(&mut store, &[sent(0, 2)]).unwrap();
    let end = Sent { stop: Some("stop"), ..sent(0, 4) };
    let batch = [end, end, Sent { stop: Some("stop"), ..sent(4, 4) }];
    let replies = append(&mut store, &batch).unwrap();
    assert!(replies.iter().all(|reply| !reply.stale && reply.grant == 0));
    assert_holds(&store, 4);
    assert!(append(&mut store, &batch).unwrap().iter().all(|reply| !reply.stale));
    assert!(append(&mut store, &[sent(4, 5)]).unwrap()[0].stale, "what comes after the end is too late");
}

#[test]
fn tokens_beyond_the_grant_are_taken_and_counted() {
    let mut store = leased(Kind::Train);
    let overdraft = |store: &Store| store.ledger().into_iter().find(|(key, _)| *key == "overdraft").unwrap().1;
    assert_eq!(append(&mut store, &[sent(0, 3)]).unwrap()[0].grant, 3);
    assert_eq!(overdraft(&store), 0);
    append(&mut store, &[sent(3, 5), sent(5, 8)]).unwrap();
    assert_eq!(overdraft(&store), 2);
    assert_eq!(append(&mut store, &[sent(8, 9)]).unwrap()[0].grant, 0);
    assert_eq!(overdraft(&store), 3);
    assert_holds(&store, 9);
}

#[test]
fn numbers_that_no_policy_can_have_made_are_refused_and_nothing_is_written() {
    let mut store = leased(Kind::Train);
    let before = store.state().clone();
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused(Batch::decode(&encode(&[sent(0, 4)], |_, logprobs| logprobs[2] = value)).map(drop), "not finite");
    }
    refused(Batch::decode(&encode(&[sent(0, 4)], |ids, _| ids[3] = -1.0)).map(drop), "token id -1");
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refused(append(&mut store, &[Sent { temperature, ..sent(0, 2) }]), "temperature");
    }
    refused(append(&mut store, &[Sent { version: 1, ..sent(0, 2) }]), "never published");
    refused(append(&mut store, &[Sent { version: -1, ..sent(0, 2) }]), "versions never decrease");
    refused(append(&mut store, &[sent(0, 13)]), "limit is 12");
    assert_eq!(store.state(), &before);
    append(&mut leased(Kind::Eval), &[Sent { temperature: 0.0, ..sent(0, 2) }]).unwrap();
}

#[test]
fn a_record_is_read_once_for_all_the_columns_in_it_that_a_call_wants() {
    let storage = Arc::new(Watched::default());
    let mut store = leased_in(storage.clone(), Kind::Train);
    let items: Vec<Sent> = (0..12).map(|token| sent(token, token + 1)).collect();
    append(&mut store, &items).unwrap();
    let record = store.log().bytes();
    let read = || storage.read.swap(0, Ordering::Relaxed);
    read();
    append(&mut store, &items).unwrap();
    assert!(read() < 2 * record, "a repeat of all its items");
    assert_holds(&store, 12);
    let shared = Shared::new(store);
    read();
    assert_eq!(shared.read_extras(vec![0]).unwrap()[0]["column"].len(), 12);
    assert!(read() < 2 * record);
    assert_eq!(shared.trajectories(&[0, 0]).unwrap()[1].extras["column"].len(), 12);
    assert!(read() < 3 * record, "tokens and prompt are read for each trajectory");
}
