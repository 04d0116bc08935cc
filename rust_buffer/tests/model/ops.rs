//! The steps of random histories.

use _rust_buffer::{
    state::group::Kind,
    state::trajectory::{Outcome, Stop},
    store::query::{Bounds, Filter},
};
use proptest::prelude::*;

/// One step of a history.
#[derive(Debug, Clone)]
pub enum Op {
    Quota { tokens: u64, segment: Option<u32> },
    Admit { size: u32, max_tokens: u32, priority: i32, eval: bool },
    Lease { max: usize, lag: i64 },
    Fence,
    Append { pick: usize, count: u32, stop: Option<&'static str>, newer: bool, observed: bool },
    Fork { pick: usize, keep: u32 },
    Work { stop: Option<&'static str> },
    StaleAppend { pick: usize },
    Wait { time: i64 },
    Annotate { pick: usize },
    Score { pick: usize, outcome: Outcome },
    Claim,
    Publish { left_out: u64, idle: bool, tokens: u64, segment: Option<u32> },
    Commit,
    Uncommit { back: i64 },
    Evict,
    Compact,
    DropEval,
    Late { pick: usize },
    Discard { pick: usize },
    Query { filter: Filter, limit: usize },
    Reopen,
}

fn bounds<S: Strategy + Clone + 'static>(value: S) -> impl Strategy<Value = Bounds<S::Value>>
where
    S::Value: Clone,
{
    let (low, high) = (prop::option::weighted(0.2, value.clone()), prop::option::weighted(0.2, value));
    (low, high)
}

fn filter() -> impl Strategy<Value = Filter> {
    let stop = prop_oneof![Just(Stop::None), Just(Stop::Stop), Just(Stop::Length), Just(Stop::Repetition)];
    let state = prop::sample::select(vec!["leased", "idle", "scored", "late", "partial", "ready", "trained"]);
    let numbers = (prop::option::weighted(0.1, 1..4_i64), bounds(0..4_i64), bounds(0..2_u8), bounds(0..6_u32));
    let names = (
        prop::option::weighted(0.2, stop),
        prop::option::weighted(0.1, 0..4_u64),
        prop::option::weighted(0.1, 0..8_u64),
        prop::option::weighted(0.2, prop_oneof![Just(Kind::Train), Just(Kind::Eval)]),
        prop::option::weighted(0.3, state),
    );
    (numbers, names).prop_map(|((iteration, version, reward, length), (stop, prompt, group, kind, state))| Filter {
        iteration,
        version,
        reward: (reward.0.map(f64::from), reward.1.map(f64::from)),
        length,
        stop,
        prompt_id: prompt.map(|number| format!("p{number}")),
        group,
        kind,
        state: state.map(str::to_owned),
    })
}

/// Any step, the productive ones more often.
pub fn op() -> impl Strategy<Value = Op> {
    let stop = prop_oneof![
        4 => Just(None),
        2 => Just(Some("stop")),
        1 => Just(Some("budget")),
        1 => Just(Some("repetition")),
        1 => Just(Some("length")),
    ];
    let outcome =
        prop_oneof![5 => Just(Outcome::Scored), 1 => Just(Outcome::Invalid), 2 => Just(Outcome::InfraFailure)];
    prop_oneof![
        1 => (0..60_u64, prop::option::of(1..5_u32)).prop_map(|(tokens, segment)| Op::Quota { tokens, segment }),
        3 => (2..6_u32, 1..9_u32, 0..2_i32, prop::bool::weighted(0.2))
            .prop_map(|(size, max_tokens, priority, eval)| Op::Admit { size, max_tokens, priority, eval }),
        5 => (1..4_usize, 0..2_i64).prop_map(|(max, lag)| Op::Lease { max, lag }),
        1 => Just(Op::Fence),
        8 => (0..8_usize, 0..5_u32, stop, prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(pick, count, stop, newer, observed)| Op::Append { pick, count, stop, newer, observed }),
        8 => prop::option::of(Just("stop")).prop_map(|stop| Op::Work { stop }),
        2 => (0..8_usize, 0..9_u32).prop_map(|(pick, keep)| Op::Fork { pick, keep }),
        1 => (0..8_usize).prop_map(|pick| Op::StaleAppend { pick }),
        2 => (1..1000_i64).prop_map(|time| Op::Wait { time }),
        10 => (0..8_usize, outcome).prop_map(|(pick, outcome)| Op::Score { pick, outcome }),
        8 => (0..8_usize).prop_map(|pick| Op::Annotate { pick }),
        4 => Just(Op::Claim),
        4 => (prop_oneof![Just(0), any::<u64>()], prop::bool::weighted(0.1), 10..60_u64, prop::option::of(1..6_u32))
            .prop_map(|(left_out, idle, tokens, segment)| Op::Publish { left_out, idle, tokens, segment }),
        2 => Just(Op::Commit),
        1 => (0..3_i64).prop_map(|back| Op::Uncommit { back }),
        1 => Just(Op::Evict),
        1 => Just(Op::Compact),
        1 => Just(Op::DropEval),
        1 => (0..8_usize).prop_map(|pick| Op::Late { pick }),
        1 => (0..8_usize).prop_map(|pick| Op::Discard { pick }),
        1 => (filter(), 1..5_usize).prop_map(|(filter, limit)| Op::Query { filter, limit }),
        1 => Just(Op::Reopen),
    ]
}
