//! Micro-batches over data-parallel ranks, balanced by tokens.
//!
//! The ranks of a sharded model meet at each micro-batch, so all have equally many, and those that run at the same
//! time cost about the same. Everything is greedy and deterministic, longest sequence first.

use std::{cmp::Reverse, collections::BinaryHeap};

/// Sequences of one micro-batch, as indices; empty only to keep pace with the other ranks.
pub type Micro = Vec<usize>;

/// What to pack for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Packing {
    /// Data-parallel ranks, at least one.
    pub ranks: usize,
    /// Most tokens of a micro-batch; a longer sequence is alone in one.
    pub limit: u64,
    /// A sequence of n tokens costs n + `quadratic` n^2; 0 balances tokens.
    pub quadratic: f64,
}

impl Packing {
    fn cost(&self, length: u64) -> f64 {
        let length = length as f64;
        length + self.quadratic * length * length
    }
}

/// For each rank its micro-batches, equally many. The costs of two ranks differ at most by that of the longest sequence.
///
/// A rank's micro-batches are as even as its sequences allow if they then keep the limit, else filled first fit: so
/// there are at most 11/9 as many as the busiest rank needs, and one. The most expensive come first.
pub fn pack(lengths: &[u64], packing: Packing) -> Vec<Vec<Micro>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|index| (Reverse(lengths[*index]), *index));
    let ranks = spread(&order, lengths, packing, packing.ranks.max(1));
    let filled: Vec<Vec<Micro>> = ranks.iter().map(|rank| fill(rank, lengths, packing.limit)).collect();
    let pace = filled.iter().map(Vec::len).max().unwrap_or(0);
    let keeps = |micro: &Micro| micro.len() < 2 || tokens(micro, lengths) <= packing.limit;
    let even = |(rank, filled): (Micro, Vec<Micro>)| {
        let even = spread(&rank, lengths, packing, pace);
        let mut micros = if even.iter().all(keeps) { even } else { filled };
        micros.resize_with(pace, Vec::new);
        micros.sort_by_cached_key(|micro| Reverse(cost(micro, lengths, packing).to_bits()));
        micros
    };
    ranks.into_iter().zip(filled).map(even).collect()
}

/// `pack` for each step; `steps` says how many sequences each one has, in order, all of `lengths` together.
pub fn pack_steps(lengths: &[u64], steps: &[usize], packing: Packing) -> Vec<Vec<Vec<Micro>>> {
    let mut first = 0;
    let mut step = |size: &usize| {
        let mut ranks = pack(&lengths[first..first + size], packing);
        ranks.iter_mut().flatten().flatten().for_each(|index| *index += first);
        first += size;
        ranks
    };
    steps.iter().map(&mut step).collect()
}

fn tokens(micro: &Micro, lengths: &[u64]) -> u64 {
    micro.iter().map(|index| lengths[*index]).sum()
}

fn cost(micro: &Micro, lengths: &[u64], packing: Packing) -> f64 {
    micro.iter().map(|index| packing.cost(lengths[*index])).sum()
}

/// Each to the part that costs least so far, the first of equal ones.
fn spread(order: &[usize], lengths: &[u64], packing: Packing, parts: usize) -> Vec<Micro> {
    let mut spread = vec![Micro::new(); parts];
    // The bits of floats that are not negative are in the order of their values.
    let mut loads: BinaryHeap<_> = (0..parts).map(|part| Reverse((0_f64.to_bits(), part))).collect();
    for index in order {
        let Some(Reverse((load, part))) = loads.pop() else { break };
        spread[part].push(*index);
        loads.push(Reverse(((f64::from_bits(load) + packing.cost(lengths[*index])).to_bits(), part)));
    }
    spread
}

/// Each to the first micro-batch that has room.
fn fill(order: &[usize], lengths: &[u64], limit: u64) -> Vec<Micro> {
    let mut filled: Vec<(u64, Micro)> = Vec::new();
    for index in order {
        let length = lengths[*index];
        match filled.iter_mut().find(|(tokens, _)| tokens.saturating_add(length) <= limit) {
            Some((tokens, micro)) => {
                *tokens += length;
                micro.push(*index);
            }
            None => filled.push((length, vec![*index])),
        }
    }
    filled.into_iter().map(|(_, micro)| micro).collect()
}
