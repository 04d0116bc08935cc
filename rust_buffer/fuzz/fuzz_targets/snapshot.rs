//! A store whose snapshot is made of arbitrary bytes: opening it and looking at it answer or refuse, never a panic, and
//! what is decoded is what it encodes to.
#![no_main]

use std::sync::{Arc, Once};

use _rust_buffer::{
    log::{Durability, Log, LogOptions, Memory, Storage},
    state::State,
    state::record::Quota,
    store::query::Filter,
    store::{Settings, Store},
    wire,
};
use libfuzzer_sys::fuzz_target;

/// Opens a store whose one snapshot is `state`; None where that is refused.
fn opened(state: &[u8]) -> Option<Store> {
    let storage: Arc<dyn Storage> = Arc::new(Memory::default());
    let options = LogOptions { durability: Durability::Os, file_bytes: 4096, ..LogOptions::default() };
    let log = Log::open(Arc::clone(&storage), options, &mut State::default()).unwrap();
    log.write_snapshot(log.position(), state).unwrap();
    log.close().unwrap();
    Store::open(storage, Settings { durability: Durability::Os, file_bytes: 4096, ..Settings::default() }).ok()
}

/// A snapshot without damage opens, or nothing of what follows is reached.
fn plain_input_opens() {
    let plain = wire::encode(&State { version: 7, ..State::default() }).unwrap();
    assert_eq!(opened(&plain).expect("a plain input opens").state().version, 7);
}

static PLAIN: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    PLAIN.call_once(plain_input_opens);
    let Ok(state) = wire::decode::<State>(bytes) else { return };
    let encoded = wire::encode(&state).unwrap();
    assert_eq!(wire::encode(&wire::decode::<State>(&encoded).unwrap()).unwrap(), encoded);
    let Some(mut store) = opened(bytes) else { return };
    let _ = (store.counts(), store.ledger(), store.versions_spent(), store.check());
    let _ = (store.groups(None, None, 64), store.select(&Filter::default(), None, 64));
    let _ = store.set_quota(store.state().version, Quota { groups: 1, tokens: 1 << 20, tokens_per_segment: None });
    let _ = store.lease("worker", store.state().version, 4, 0);
    let _ = store.claim(1, store.state().version, 0);
});
