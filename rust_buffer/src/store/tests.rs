//! What no caller can bring about: a record that the state does not take.

use std::{sync::Arc, time::Duration};

use super::{Settings, Store};
use crate::{
    error::StoreError,
    log::{Arrays, Durability, Memory},
    state::record::{Record, SegmentLoss},
};

#[test]
fn a_record_that_is_written_and_cannot_be_applied_ends_the_log() {
    let settings = Settings {
        groups_per_iteration: 1,
        lookahead: 1,
        max_staleness: None,
        segment_loss: SegmentLoss::All,
        window: None,
        signal: None,
        min_group_size: 1,
        straggler: None,
        max_attempts: 1,
        lease_ttl: 1,
        grant_tokens: 1,
        durability: Durability::Os,
        max_bytes: None,
        file_bytes: 4096,
        sync_interval: Duration::from_millis(1),
    };
    let mut store = Store::open(Arc::new(Memory::default()), settings).expect("an empty store");
    let refused = store.record(&Record::Late(vec![99]), &Arrays::default()).expect_err("there is no group 99");
    assert!(!matches!(refused, StoreError::Poisoned { .. }), "{refused}");
    let next = store.record(&Record::Commit(0), &Arrays::default());
    assert!(matches!(next, Err(StoreError::Poisoned { detail }) if detail == refused.to_string()));
    assert_eq!(store.lsn(), 1, "nothing was written after it");
}
