//! Trajectories in the order of their ids, each with the number of its tokens under its newest version.
//!
//! The first with fewer than some limit is found without a look at the others, whatever the limit: another quota moves
//! none of them.

use std::collections::BTreeMap;

/// A node covers so many bits of the id more than those below it.
const BITS: u32 = 6;
/// The nodes of the top one cover 16 million ids each.
const LEVELS: usize = 5;

/// A tree over the bits of the ids: on the lowest level tokens by id, on each other one the least of a node by prefix.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tails([BTreeMap<u64, u32>; LEVELS]);

impl Tails {
    /// Number of trajectories.
    pub(super) fn len(&self) -> usize {
        self.0[0].len()
    }

    /// Adds a trajectory that is not there.
    pub(super) fn insert(&mut self, id: u64, tokens: u32) {
        let mut prefix = id;
        for level in &mut self.0 {
            level.entry(prefix).and_modify(|least| *least = tokens.min(*least)).or_insert(tokens);
            prefix >>= BITS;
        }
    }

    /// Removes a trajectory.
    pub(super) fn remove(&mut self, id: u64) {
        self.0[0].remove(&id);
        let mut prefix = id >> BITS;
        for level in 1..LEVELS {
            let least = self.0[level - 1].range(below(prefix)).map(|(_, tokens)| *tokens).min();
            match least {
                Some(least) => self.0[level].insert(prefix, least),
                None => self.0[level].remove(&prefix),
            };
            prefix >>= BITS;
        }
    }

    /// The first trajectory with fewer tokens than `limit`; None: the first of all.
    pub(super) fn first_below(&self, limit: Option<u32>) -> Option<u64> {
        let (mut range, mut found) = (0..=u64::MAX, None);
        for level in self.0.iter().rev() {
            let (prefix, _) = level.range(range).find(|(_, least)| limit.is_none_or(|limit| **least < limit))?;
            (range, found) = (below(*prefix), Some(*prefix));
        }
        found
    }
}

/// Prefixes of the level below that begin with `prefix`.
fn below(prefix: u64) -> std::ops::RangeInclusive<u64> {
    let first = prefix << BITS;
    first..=first | ((1 << BITS) - 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::Tails;

    proptest! {
        #[test]
        fn it_finds_what_a_look_at_all_finds(
            changes in prop::collection::vec((prop_oneof![0_u64..200, 0_u64..1 << 40, any::<u64>()], 0_u32..9), 0..300),
            limits in prop::collection::vec(prop::option::of(0_u32..10), 4),
        ) {
            let (mut tails, mut all) = (Tails::default(), BTreeMap::new());
            for (id, tokens) in changes {
                if all.remove(&id).is_some() {
                    tails.remove(id);
                } else {
                    all.insert(id, tokens);
                    tails.insert(id, tokens);
                }
                prop_assert_eq!(tails.len(), all.len());
                for limit in &limits {
                    let first = all.iter().find(|(_, tokens)| limit.is_none_or(|limit| **tokens < limit));
                    prop_assert_eq!(tails.first_below(*limit), first.map(|(id, _)| *id));
                }
            }
            for id in all.into_keys() {
                tails.remove(id);
            }
            prop_assert_eq!(tails, Tails::default());
        }
    }
}
