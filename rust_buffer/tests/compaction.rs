//! What the log is rid of: trajectories in pieces, files of which little is needed; and who reads meanwhile.
#![allow(clippy::unwrap_used)]

#[path = "support/watched.rs"]
mod watched;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use _rust_buffer::{
    error::StoreError,
    log::{Disk, Durability, Memory, Storage},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::arrays::{ColumnReader, Extra, read_prompt, read_runs},
    store::shared::Shared,
    store::{Settings, Store},
    wire::Batch,
};
use watched::Watched;

const FILE_BYTES: u64 = 16 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

fn settings() -> Settings {
    Settings { grant_tokens: 1 << 20, durability: Durability::Os, file_bytes: FILE_BYTES, ..Settings::default() }
}

fn open(storage: &Arc<dyn Storage>) -> Store {
    Store::open(Arc::clone(storage), settings()).unwrap()
}

fn memory() -> Arc<dyn Storage> {
    Arc::new(Memory::default())
}

fn disk(dir: &Path) -> Arc<dyn Storage> {
    Arc::new(Disk::new(dir).unwrap())
}

/// A store that has published versions 0 to 2.
fn begun(storage: &Arc<dyn Storage>) -> Store {
    let mut store = open(storage);
    for version in 0..3 {
        store.publish(version, None, LeftOut::default()).unwrap();
        store.set_quota(version, Quota { groups: 1 << 20, tokens: 1 << 40, tokens_per_segment: None }).unwrap();
    }
    store
}

fn admit(store: &mut Store, number: u64, priority: i32) -> u64 {
    let admit = Admit {
        request_id: format!("train-{number}"),
        cursor: Some(number),
        kind: Kind::Train,
        prompt_id: String::new(),
        prompt_len: 1,
        size: 1,
        max_tokens: 1 << 20,
        priority,
        drawn: None,
    };
    let text = format!("text {number}");
    store.admit(&admit, Prompt { tokens: &[1, 0, 0, 0], metadata: b"", text: Some(&text) }).unwrap()
}

/// Tokens `first..last`, which have their numbers as ids and log-probs, and a column of `width` bytes a token.
#[derive(Clone, Copy)]
struct Sent {
    first: u32,
    last: u32,
    version: i64,
    temperature: f32,
    observed: bool,
    width: u32,
    stop: Option<&'static str>,
}

fn sent(first: u32, last: u32) -> Sent {
    Sent { first, last, version: 0, temperature: 1.0, observed: false, width: 0, stop: None }
}

fn column(item: &Sent) -> Vec<u8> {
    (item.first..item.last).flat_map(|token| vec![token as u8; item.width as usize]).collect()
}

fn encode(trajectory: u64, item: &Sent) -> Vec<u8> {
    let count = item.last - item.first;
    let dtype = format!("({},)|u1", item.width);
    let columns = if item.width > 0 { vec![("column", &dtype, item.width * count)] } else { Vec::new() };
    let (version, stop) = (item.version, item.stop);
    let head = (trajectory, 1_u64, item.first, count, version, item.temperature, 2_i64, stop, item.observed, columns);
    let header = rmp_serde::to_vec(&[head]).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    let pad = |batch: &mut Vec<u8>| batch.resize(batch.len().next_multiple_of(8), 0);
    pad(&mut batch);
    batch.extend((item.first..item.last).flat_map(u32::to_le_bytes));
    if !item.observed {
        batch.extend((item.first..item.last).flat_map(|token| (token as f32).to_le_bytes()));
    }
    pad(&mut batch);
    batch.extend(column(item));
    pad(&mut batch);
    batch
}

fn append(store: &mut Store, trajectory: u64, item: &Sent) {
    let batch = encode(trajectory, item);
    assert!(!store.append(&Batch::decode(&batch).unwrap(), 0).unwrap()[0].stale);
}

/// Asserts that a trajectory has the tokens `0..last`; its columns.
fn columns(store: &Store, id: u64, last: u32) -> BTreeMap<String, Vec<Extra>> {
    store.check().unwrap();
    let runs = &store.state().trajectories[&id].runs;
    let read = read_runs(store.log(), runs).unwrap();
    assert_eq!(read.ids, (0..last).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    let observed = read.observed.iter().map(|observed| *observed == 1);
    let logprobs =
        (0..last).zip(observed).flat_map(|(t, silent)| if silent { [0; 4] } else { (t as f32).to_le_bytes() });
    assert_eq!(read.logprobs, logprobs.collect::<Vec<_>>());
    ColumnReader::new(store.log()).of_runs(runs).unwrap()
}

#[test]
fn a_complete_trajectory_is_one_run_for_each_segment_and_says_what_it_said() {
    let storage = memory();
    let mut store = begun(&storage);
    admit(&mut store, 0, 0);
    store.lease("worker", 2, 1, 0).unwrap();
    let items = [
        sent(0, 3),
        sent(3, 8),
        Sent { observed: true, ..sent(8, 11) },
        Sent { observed: true, ..sent(11, 12) },
        Sent { temperature: 0.5, ..sent(12, 15) },
        Sent { version: 1, width: 2, ..sent(15, 17) },
        Sent { version: 1, width: 2, ..sent(17, 18) },
        Sent { version: 1, width: 3, ..sent(18, 20) },
        Sent { version: 2, ..sent(20, 400) },
        Sent { version: 2, stop: Some("stop"), ..sent(400, 401) },
    ];
    for item in &items {
        append(&mut store, 0, item);
    }
    let before = (store.state().trajectories[&0].clone(), columns(&store, 0, 401));
    store.compact().unwrap();
    let after = store.state().trajectories[&0].clone();
    let lens: Vec<u32> = after.runs.iter().map(|run| run.len).collect();
    assert_eq!(lens, [8, 4, 3, 3, 2, 381], "columns of other widths stay apart");
    assert_eq!((after.merged(), after.tail), (before.0.merged(), before.0.tail));
    let bytes = |extras: &BTreeMap<String, Vec<Extra>>| -> Vec<u8> {
        extras["column"].iter().flat_map(|extra| extra.bytes.clone()).collect()
    };
    let extras = columns(&store, 0, 401);
    assert_eq!(bytes(&extras), bytes(&before.1));
    assert_eq!(extras["column"].iter().map(|extra| (extra.offset, extra.len)).collect::<Vec<_>>(), [(15, 3), (18, 2)]);
    let (lsn, state) = (store.lsn(), store.state().clone());
    store.compact().unwrap();
    assert_eq!(store.lsn(), lsn, "it is not written a third time");
    store.log().close().unwrap();
    assert_eq!(open(&storage).state(), &state);
}

#[test]
fn what_came_in_one_append_or_is_not_complete_stays_where_it_is() {
    let mut store = begun(&memory());
    admit(&mut store, 0, 0);
    admit(&mut store, 1, 0);
    store.lease("worker", 2, 2, 0).unwrap();
    append(&mut store, 0, &Sent { stop: Some("stop"), ..sent(0, 500) });
    append(&mut store, 1, &sent(0, 8));
    append(&mut store, 1, &sent(8, 16));
    let lsn = store.lsn();
    store.compact().unwrap();
    assert_eq!(store.lsn(), lsn);
}

/// An iteration of groups of `tokens` each is generated, trained and evicted; the worker leaves the lowest priority.
fn iteration(store: &mut Store, number: u64, tokens: u32) {
    let id = admit(store, number, 0);
    let held = store.lease("worker", store.state().version, 1, 0).unwrap();
    assert_eq!(held[0].group, id);
    let trajectory = held[0].trajectory;
    for first in (0..tokens).step_by(8) {
        append(store, trajectory, &sent(first, (first + 8).min(tokens)));
    }
    append(store, trajectory, &Sent { stop: Some("stop"), ..sent(tokens, tokens) });
    store.score(trajectory, 0, Outcome::Scored, 1.0, BTreeMap::new(), 0).unwrap();
    let (iteration, version) = (number as i64, store.state().version);
    store.claim(iteration, version, 0).unwrap().unwrap();
    store.publish(version + 1, Some(iteration), LeftOut::default()).unwrap();
    store.set_quota(version + 1, Quota { groups: 1 << 20, tokens: 1 << 40, tokens_per_segment: None }).unwrap();
    store.commit_claims(iteration).unwrap();
    store.evict(iteration).unwrap();
}

fn run(shared: &Shared, number: u64, tokens: u32) {
    let run = |store: &mut Store| {
        iteration(store, number, tokens);
        Ok(())
    };
    shared.change(true, run).unwrap();
}

#[test]
fn a_group_that_nobody_starts_pins_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let shared = Arc::new(Shared::new(begun(&disk(dir.path()))));
    shared.keep_compact();
    let idle = shared.change(true, |store| Ok(admit(store, 0, -1))).unwrap().1;
    for number in 1..40 {
        run(&shared, number, 1000);
        shared.remove_dead_files().unwrap();
    }
    let start = Instant::now();
    loop {
        let (bytes, live) = shared.query(|store| Ok((store.log().bytes(), store.live().total()))).unwrap();
        if bytes <= 2 * live + FILE_BYTES + FILE_BYTES / 2 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{bytes} bytes for {live} that are needed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let location = shared.query(|store| Ok(store.state().groups[&idle].location)).unwrap();
    assert!(location.file > 1, "it was copied forward");
    assert_eq!(read_prompt(shared.log(), location).unwrap().text.as_deref(), Some("text 0"));
    shared.close().unwrap();
    let store = open(&disk(dir.path()));
    store.check().unwrap();
    assert_eq!(store.state().groups[&idle].location, location);
}

#[test]
fn what_is_read_beside_a_deletion_stays() {
    let dir = tempfile::tempdir().unwrap();
    let shared = Arc::new(Shared::new(begun(&disk(dir.path()))));
    shared.keep_compact();
    let written = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !written.load(Ordering::Acquire) {
                    let live: Vec<u64> =
                        shared.query(|store| Ok(store.state().trajectories.keys().copied().collect())).unwrap();
                    for id in live {
                        let views = match shared.trajectories(&[id]) {
                            Ok(views) => views,
                            Err(error) => {
                                assert!(error.to_string().contains("not in the store"), "{error}");
                                continue;
                            }
                        };
                        let view = &views[0];
                        let ids = (0..view.trajectory.len).flat_map(u32::to_le_bytes);
                        assert_eq!(view.tokens.ids, ids.collect::<Vec<_>>());
                    }
                    assert!(shared.groups(None, None, 64).unwrap().0.iter().all(|view| view.prompt.text.is_some()));
                }
            });
        }
        for number in 0..60 {
            run(&shared, number, 600);
            shared.remove_dead_files().unwrap();
        }
        written.store(true, Ordering::Release);
    });
    assert!(shared.log().sealed().len() < 10);
    shared.close().unwrap();
}

#[test]
fn a_failure_of_the_thread_that_compacts_is_told_to_everybody() {
    let storage = Watched { failing: Some("store-compact"), ..Watched::default() };
    let mut store = begun(&(Arc::new(storage) as Arc<dyn Storage>));
    admit(&mut store, 0, -1);
    for number in 1..10 {
        iteration(&mut store, number, 1000);
    }
    let shared = Arc::new(Shared::new(store));
    shared.keep_compact();
    let start = Instant::now();
    let told = loop {
        let publish = |store: &mut Store| store.publish(store.state().version + 1, None, LeftOut::default());
        match shared.change(true, publish) {
            Ok(_) => assert!(start.elapsed() < PATIENCE, "nobody was told"),
            Err(error) => break error,
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(matches!(&told, StoreError::Poisoned { detail } if detail.contains("the disk is broken")), "{told}");
}
