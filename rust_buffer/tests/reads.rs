//! What callers get with arrays: texts, prefixes, columns; also of records made before texts were kept.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc};

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Disk, Durability, Frame, Log, LogOptions, Replay},
    state::State,
    state::codec,
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, Record},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::arrays::{StoredPrompt, Tokens},
    store::claim_view::Columns,
    store::reads::GroupView,
    store::shared::{Clock, Shared},
    store::{Settings, Store},
    wire::Batch,
};

const PROMPT: Prompt<'_> = Prompt { tokens: &[1, 0, 0, 0, 2, 0, 0, 0], metadata: b"meta", text: Some("1 + 1 = ?") };

fn open(dir: &Path) -> Shared {
    open_with(dir, 1 << 20)
}

fn open_with(dir: &Path, file_bytes: u64) -> Shared {
    let settings = Settings { grant_tokens: 8, durability: Durability::Os, file_bytes, ..Settings::default() };
    Shared::new(Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap())
}

/// All groups, in pages of two.
fn every_group(store: &Shared) -> Result<Vec<GroupView>, StoreError> {
    let (mut groups, mut after) = (Vec::new(), None);
    loop {
        let (page, next) = store.groups(None, after, 2)?;
        groups.extend(page);
        after = next;
        if after.is_none() {
            return Ok(groups);
        }
    }
}

fn admission(number: u64) -> Admit {
    Admit {
        request_id: format!("train-{number}"),
        cursor: Some(number),
        kind: Kind::Train,
        prompt_id: format!("p{number}"),
        prompt_len: 2,
        size: 1,
        max_tokens: 8,
        priority: 0,
        drawn: None,
    }
}

/// A store with one group of one member.
fn admitted(dir: &Path) -> Shared {
    let store = open(dir);
    let quota = Quota { groups: 8, tokens: 100, tokens_per_segment: None };
    let fill = |store: &mut Store| {
        store.publish(0, None, LeftOut::default())?;
        store.set_quota(0, quota)?;
        store.admit(&admission(0), PROMPT)
    };
    assert_eq!(store.change(false, fill).unwrap().1, 0);
    store
}

fn now(store: &Shared) -> Clock {
    store.clock(Some(0.0))
}

fn stored(text: Option<&str>) -> StoredPrompt {
    StoredPrompt { tokens: PROMPT.tokens.to_vec(), metadata: PROMPT.metadata.to_vec(), text: text.map(str::to_owned) }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Appends two runs: a generated one with a column of expert ids, and an observed one, which ends the trajectory.
fn append(store: &Shared) {
    let extra = vec![("experts", "<u1", 3_u32)];
    let none: Vec<(&str, &str, u32)> = Vec::new();
    let heads = [
        (0_u64, 1_u64, 0_u32, 3_u32, 0_i64, 1.0_f32, 0_i64, None, false, extra),
        (0, 1, 3, 1, 0, 1.0, 0, Some("stop"), true, none),
    ];
    let header = rmp_serde::to_vec(&heads).unwrap();
    let len = (header.len() as u32).to_le_bytes();
    let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
    batch.resize(batch.len().next_multiple_of(8), 0);
    batch.extend(words(&[10, 11, 12, 20, 21, 22]));
    batch.extend([7, 8, 9, 0, 0, 0, 0, 0]);
    batch.extend(words(&[13, 0]));
    let (_, replies) = store.change(false, |store| store.append(&Batch::decode(&batch).unwrap(), 0)).unwrap();
    assert!(replies.iter().all(|reply| !reply.stale));
}

#[test]
fn a_lease_has_its_prompt_and_its_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let store = admitted(dir.path());
    let leases = store.lease("worker", 0, 4, 0.0, now(&store)).unwrap();
    assert_eq!(leases.len(), 1);
    assert_eq!((leases[0].granted.trajectory, leases[0].granted.grant), (0, 8));
    assert_eq!((&leases[0].prompt, &leases[0].prefix), (&stored(PROMPT.text), &Tokens::default()));
    assert_eq!(store.lease("worker", 0, 4, 0.0, now(&store)).unwrap(), [], "none is left");
}

#[test]
fn unscored_trajectories_groups_and_trajectories_are_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = admitted(dir.path());
    assert_eq!(store.unscored(4, 0, 0.0, now(&store)).unwrap(), []);
    store.lease("worker", 0, 4, 0.0, now(&store)).unwrap();
    append(&store);
    let tokens =
        Tokens { ids: words(&[10, 11, 12, 13]), logprobs: words(&[20, 21, 22, 0]), observed: vec![0, 0, 0, 1] };

    let unscored = store.unscored(4, 1, 0.0, now(&store)).unwrap();
    assert_eq!(unscored.len(), 1);
    assert_eq!((unscored[0].id, &unscored[0].prompt, &unscored[0].tokens), (0, &stored(PROMPT.text), &tokens));

    let components = BTreeMap::from([("right".to_owned(), 1.0)]);
    store.change(false, |store| store.score(0, 0, Outcome::Scored, 0.5, components.clone(), 0)).unwrap();
    let view = store.trajectories(&[0]).unwrap().remove(0);
    assert_eq!((view.state, view.reward, &view.components), ("scored", Some(0.5), &components));
    assert_eq!((&view.prompt, &view.tokens), (&stored(PROMPT.text), &tokens));
    let [experts] = &view.extras["experts"][..] else { panic!("{:?}", view.extras) };
    assert_eq!((experts.offset, experts.len, &experts.bytes[..]), (0, 3, &[7, 8, 9][..]));

    let (ready, _) = store.groups(Some("ready"), None, 2).unwrap();
    assert_eq!(ready.len(), 1);
    assert_eq!((ready[0].id, ready[0].iteration, &ready[0].prompt), (0, None, &stored(PROMPT.text)));
    assert_eq!(store.groups(Some("partial"), None, 2).unwrap(), (Vec::new(), None));
    assert!(matches!(store.trajectories(&[1]), Err(StoreError::Conflict(_))));
}

struct Ignore;

impl Replay for Ignore {
    fn snapshot(&mut self, _bytes: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn record(&mut self, _frame: &Frame) -> Result<(), String> {
        Ok(())
    }
}

/// Writes an admission with these arrays, as another version of this program would.
fn write(dir: &Path, arrays: &[&[u8]]) {
    let log = Log::open(Arc::new(Disk::new(dir).unwrap()), LogOptions::default(), &mut Ignore).unwrap();
    let record = Record::Admit(admission(1));
    log.append(record.kind(), &codec::encode(&record).unwrap(), &Arrays::of(arrays)).unwrap();
    log.close().unwrap();
}

#[test]
fn an_admission_made_before_texts_were_kept_has_none_and_may_be_repeated_with_one() {
    let dir = tempfile::tempdir().unwrap();
    admitted(dir.path()).close().unwrap();
    write(dir.path(), &[PROMPT.tokens, PROMPT.metadata]);
    let store = open(dir.path());
    let texts: Vec<_> = every_group(&store).unwrap().into_iter().map(|group| group.prompt).collect();
    assert_eq!(texts, [stored(PROMPT.text), stored(None)]);
    let admit = |number: u64, prompt: Prompt<'_>| store.change(false, |store| store.admit(&admission(number), prompt));
    assert_eq!(admit(1, PROMPT).unwrap().1, 1);
    assert_eq!(admit(1, Prompt { text: None, ..PROMPT }).unwrap().1, 1);
    assert!(matches!(admit(1, Prompt { metadata: b"other", ..PROMPT }), Err(StoreError::Conflict(_))));
    assert_eq!(admit(0, PROMPT).unwrap().1, 0);
    for text in [None, Some("2 + 2 = ?"), Some("")] {
        assert!(matches!(admit(0, Prompt { text, ..PROMPT }), Err(StoreError::Conflict(_))), "{text:?}");
    }
}

#[test]
fn an_empty_text_is_a_text() {
    let dir = tempfile::tempdir().unwrap();
    let store = admitted(dir.path());
    store.change(false, |store| store.admit(&admission(1), Prompt { text: Some(""), ..PROMPT })).unwrap();
    assert_eq!(every_group(&store).unwrap()[1].prompt, stored(Some("")));
}

#[test]
fn a_text_that_is_no_text_is_located() {
    let dir = tempfile::tempdir().unwrap();
    admitted(dir.path()).close().unwrap();
    write(dir.path(), &[PROMPT.tokens, PROMPT.metadata, &[0xff]]);
    let store = open(dir.path());
    assert!(matches!(every_group(&store), Err(StoreError::Corrupt { .. })));
}

#[test]
fn a_record_of_a_newer_program_is_refused_as_that() {
    for (kind, named) in [(16, "16 (unknown here)"), (200, "200 (unknown here)")] {
        let dir = tempfile::tempdir().unwrap();
        admitted(dir.path()).close().unwrap();
        let log = Log::open(Arc::new(Disk::new(dir.path()).unwrap()), LogOptions::default(), &mut Ignore).unwrap();
        log.append(kind, b"\x80", &Arrays::default()).unwrap();
        log.close().unwrap();
        let mut state = State::default();
        let refused = Log::open(Arc::new(Disk::new(dir.path()).unwrap()), LogOptions::default(), &mut state);
        let text = refused.err().unwrap().to_string();
        assert!(text.contains(named) && text.contains("open it with the version that wrote it"), "{text}");
    }
}

/// A group of one member that is complete, scored, claimed by iteration `number + 1`, trained and committed.
fn train(store: &Shared, number: u64) {
    let change = |store: &mut Store| {
        let version = number as i64;
        store.admit(&admission(number), PROMPT)?;
        let lease = store.lease("worker", version, 1, 0)?.remove(0);
        let none: Vec<(&str, &str, u32)> = Vec::new();
        let item = (lease.trajectory, lease.epoch, 0_u32, 2_u32, version, 1.0_f32, version, Some("stop"), false, none);
        let header = rmp_serde::to_vec(&[item]).unwrap();
        let len = (header.len() as u32).to_le_bytes();
        let mut batch = [&b"PMDB"[..], &1_u32.to_le_bytes(), &len, &[0; 4], &header].concat();
        batch.resize(batch.len().next_multiple_of(8), 0);
        batch.extend(words(&[1, 2, 3, 4]));
        store.append(&Batch::decode(&batch)?, 0)?;
        store.score(lease.trajectory, 0, Outcome::Scored, 1.0, BTreeMap::new(), 0)?;
        store.claim(version + 1, version, 0)?;
        store.publish(version + 1, Some(version + 1), LeftOut::default())?;
        store.set_quota(version + 1, Quota { groups: 8, tokens: 100, tokens_per_segment: None })?;
        store.commit_claims(version + 1)
    };
    store.change(false, change).unwrap();
}

#[test]
fn what_is_evicted_while_it_is_read_is_gone_and_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 512);
    let first = |store: &mut Store| {
        store.publish(0, None, LeftOut::default())?;
        store.set_quota(0, Quota { groups: 8, tokens: 100, tokens_per_segment: None })
    };
    store.change(false, first).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let gone = |answer: Result<(), StoreError>| match answer {
        Ok(()) | Err(StoreError::Conflict(_)) => {}
        Err(other) => panic!("{other}"),
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let newest = store.query(|store| Ok(store.state().next_trajectory)).unwrap();
                gone(store.trajectories(&[newest.saturating_sub(1)]).map(drop));
                gone(every_group(&store).map(drop));
                let [mut tokens, mut logprobs, mut versions, mut temperatures] = [(); 4].map(|()| [0; 64]);
                let mut mask = [0; 16];
                let mut columns = Columns {
                    tokens: &mut tokens,
                    logprobs: &mut logprobs,
                    versions: &mut versions,
                    temperatures: &mut temperatures,
                    mask: &mut mask,
                };
                gone(store.read_claim(newest as i64, &mut columns, true).map(drop));
            }
        });
        for number in 0..60 {
            train(&store, number);
            store.change(false, |store| store.evict(number as i64 + 1)).unwrap();
            store.remove_dead_files().unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap();
    });
}
