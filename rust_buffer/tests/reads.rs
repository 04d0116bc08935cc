//! What callers get with arrays: texts, prefixes, columns; also of records made before texts were kept.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use _rust_buffer::{
    error::StoreError,
    log::{Arrays, Disk, Durability, Frame, Log, LogOptions, Replay},
    state::group::Kind,
    state::record::{Admit, LeftOut, Quota, Record, SegmentLoss},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::arrays::{StoredPrompt, Tokens},
    store::shared::{Clock, Shared},
    store::{Settings, Store},
    wire::{self, Batch},
};

const PROMPT: Prompt<'_> = Prompt { tokens: &[1, 0, 0, 0, 2, 0, 0, 0], metadata: b"meta", text: Some("1 + 1 = ?") };

fn open(dir: &Path) -> Shared {
    let settings = Settings {
        groups_per_iteration: 1,
        lookahead: 1,
        max_staleness: None,
        segment_loss: SegmentLoss::All,
        min_group_size: 1,
        straggler: None,
        max_attempts: 1,
        lease_ttl: i64::MAX,
        grant_tokens: 8,
        durability: Durability::Os,
        max_bytes: None,
        file_bytes: 1 << 20,
        sync_interval: Duration::from_millis(5),
    };
    Shared::new(Store::open(Arc::new(Disk::new(dir).unwrap()), settings).unwrap())
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
    let view = store.trajectory(0).unwrap();
    assert_eq!((view.state, view.reward, &view.components), ("scored", Some(0.5), &components));
    assert_eq!((&view.prompt, &view.tokens), (&stored(PROMPT.text), &tokens));
    let [experts] = &view.extras["experts"][..] else { panic!("{:?}", view.extras) };
    assert_eq!((experts.offset, experts.len, &experts.bytes[..]), (0, 3, &[7, 8, 9][..]));

    let ready = store.groups(Some("ready")).unwrap();
    assert_eq!(ready.len(), 1);
    assert_eq!((ready[0].id, ready[0].iteration, &ready[0].prompt), (0, None, &stored(PROMPT.text)));
    assert_eq!(store.groups(Some("partial")).unwrap(), []);
    assert!(matches!(store.trajectory(1), Err(StoreError::Conflict(_))));
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
    log.append(record.kind(), &wire::encode(&record).unwrap(), &Arrays::of(arrays)).unwrap();
    log.close().unwrap();
}

#[test]
fn an_admission_made_before_texts_were_kept_has_none_and_may_be_repeated_with_one() {
    let dir = tempfile::tempdir().unwrap();
    admitted(dir.path()).close().unwrap();
    write(dir.path(), &[PROMPT.tokens, PROMPT.metadata]);
    let store = open(dir.path());
    let texts: Vec<_> = store.groups(None).unwrap().into_iter().map(|group| group.prompt).collect();
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
    assert_eq!(store.groups(None).unwrap()[1].prompt, stored(Some("")));
}

#[test]
fn a_text_that_is_no_text_is_located() {
    let dir = tempfile::tempdir().unwrap();
    admitted(dir.path()).close().unwrap();
    write(dir.path(), &[PROMPT.tokens, PROMPT.metadata, &[0xff]]);
    let store = open(dir.path());
    assert!(matches!(store.groups(None), Err(StoreError::Corrupt { .. })));
}
