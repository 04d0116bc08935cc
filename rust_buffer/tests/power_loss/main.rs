//! Power loss, dying processes and failing disks: what was acknowledged is there afterwards, and nothing else.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod log;
mod storage;
mod store;
#[path = "../support/tokens.rs"]
mod tokens;

use proptest::{prelude::*, test_runner::Config};

use storage::Fault;

/// `quick` cases, or as many as `PROPTEST_CASES` says; the nightly form is 10,000.
fn cases(quick: u32) -> Config {
    let config = Config { max_shrink_iters: 2000, ..Config::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { Config { cases: quick, ..config } }
}

/// `quick` cases, or 1 in 50 of the nightly ones: of what takes long.
fn few(quick: u32) -> Config {
    let all = cases(quick);
    Config { cases: (all.cases / 50).max(quick), max_shrink_iters: 50, ..all }
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => (1..12_u32).prop_map(Fault::Death),
        3 => (1..5_u32).prop_map(Fault::Sync),
        2 => (1..8_u32).prop_map(Fault::Write),
        2 => (1..4_u32).prop_map(Fault::Room),
        1 => (1..12_u32).prop_map(Fault::Read),
    ]
}

/// How a process ends, and what goes wrong when the next one opens.
#[derive(Debug, Clone, Copy)]
struct End {
    power_loss: bool,
    fault: Option<Fault>,
    /// After a fault, whether the power fails too or the page cache stays.
    again: bool,
}

fn end() -> impl Strategy<Value = End> {
    (any::<bool>(), prop::option::weighted(0.3, fault()), any::<bool>()).prop_map(|(power_loss, fault, again)| End {
        power_loss,
        fault,
        again,
    })
}
