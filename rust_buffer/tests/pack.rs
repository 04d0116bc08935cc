//! Micro-batches over ranks: whole, within the limit, even, and the same each time.

#![allow(clippy::cast_possible_wrap)]

use _rust_buffer::pack::{Micro, Packing, pack, pack_steps};
use proptest::prelude::*;

fn costs(ranks: &[Vec<Micro>], lengths: &[u64], quadratic: f64) -> Vec<f64> {
    let cost = |index: &usize| {
        let length = lengths[*index] as f64;
        length + quadratic * length * length
    };
    ranks.iter().map(|rank| rank.iter().flatten().map(cost).sum()).collect()
}

fn packings() -> impl Strategy<Value = Packing> {
    let quadratic = prop_oneof![Just(0.0), 0.0..0.1_f64];
    (1..6_usize, 1..200_u64, quadratic).prop_map(|(ranks, limit, quadratic)| Packing { ranks, limit, quadratic })
}

proptest! {
    #[test]
    fn every_sequence_is_packed_once_within_the_limit_and_evenly(
        lengths in prop::collection::vec(0..150_u64, 0..120), packing in packings()
    ) {
        let ranks = pack(&lengths, packing);
        prop_assert_eq!(ranks.len(), packing.ranks);
        let mut indices: Vec<usize> = ranks.iter().flatten().flatten().copied().collect();
        indices.sort_unstable();
        prop_assert_eq!(indices, (0..lengths.len()).collect::<Vec<_>>());

        let tokens = |micro: &Micro| micro.iter().map(|index| lengths[*index]).sum::<u64>();
        for rank in &ranks {
            prop_assert_eq!(rank.len(), ranks[0].len());
            prop_assert!(rank.iter().all(|micro| micro.len() == 1 || tokens(micro) <= packing.limit));
        }
        let longest = lengths.iter().copied().max().unwrap_or(0) as f64;
        let costs = costs(&ranks, &lengths, packing.quadratic);
        let (least, most) = (costs.iter().copied().fold(f64::MAX, f64::min), costs.iter().copied().fold(0.0, f64::max));
        prop_assert!(most - least <= (longest + packing.quadratic * longest * longest) * (1.0 + 1e-9));
        // Two micro-batches of a rank that is not even fit into one: none is needlessly there.
        let needed = ranks.iter().map(|rank| {
            let total: u64 = rank.iter().map(tokens).sum();
            let oversize = rank.iter().filter(|micro| tokens(micro) > packing.limit).count() as u64;
            2 * total.div_ceil(packing.limit) + oversize + 1
        });
        prop_assert!(ranks[0].len() as u64 <= needed.max().unwrap_or(0));
        prop_assert_eq!(pack(&lengths, packing), ranks);
    }

    #[test]
    fn steps_are_packed_apart(
        steps in prop::collection::vec(prop::collection::vec(1..100_u64, 0..20), 0..6), packing in packings()
    ) {
        let sizes: Vec<usize> = steps.iter().map(Vec::len).collect();
        let packed = pack_steps(&steps.concat(), &sizes, packing);
        let mut first = 0;
        for (lengths, ranks) in steps.iter().zip(packed) {
            let mut alone = pack(lengths, packing);
            alone.iter_mut().flatten().flatten().for_each(|index| *index += first);
            prop_assert_eq!(ranks, alone);
            first += lengths.len();
        }
    }
}

#[test]
fn ranks_run_equally_expensive_micro_batches_at_the_same_time() {
    let lengths: Vec<u64> = (0..512).map(|i| 100 + (i * 7919) % 3000).collect();
    let ranks = pack(&lengths, Packing { ranks: 8, limit: 16_384, quadratic: 0.0 });
    let tokens = |micro: &Micro| micro.iter().map(|index| lengths[*index]).sum::<u64>();
    let total: u64 = lengths.iter().sum();
    let slowest: u64 =
        (0..ranks[0].len()).map(|step| ranks.iter().map(|rank| tokens(&rank[step])).max().unwrap_or(0)).sum();
    assert!((slowest * 8) as f64 / total as f64 <= 1.02, "{slowest} x 8 for {total}");
}
