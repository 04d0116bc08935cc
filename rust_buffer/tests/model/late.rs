//! The straggler rule, told once more: who is late, and when.

use std::collections::{BTreeMap, BTreeSet};

use _rust_buffer::state::group::Straggler;

#[derive(Debug, Default)]
struct Waiting {
    pending: BTreeSet<u64>,
    scored: u32,
    /// When the rule's number of rewards was there, as far as this opening knows.
    since: Option<i64>,
}

/// Training groups by what they wait for, and the members that came too late.
#[derive(Debug, Default)]
pub struct Stragglers {
    rule: Option<Straggler>,
    waiting: BTreeMap<u64, Waiting>,
    pub late: BTreeSet<u64>,
}

impl Stragglers {
    pub fn new(rule: Option<Straggler>) -> Self {
        Self { rule, ..Self::default() }
    }

    pub fn admit(&mut self, group: u64, members: impl Iterator<Item = u64>) {
        self.waiting.insert(group, Waiting { pending: members.collect(), ..Waiting::default() });
    }

    /// One more verdict, a reward or not.
    pub fn verdict(&mut self, group: u64, member: u64, scored: bool, now: i64) {
        let Some(waiting) = self.waiting.get_mut(&group) else { return };
        waiting.pending.remove(&member);
        waiting.scored += u32::from(scored);
        if self.rule.is_some_and(|rule| waiting.scored >= rule.members) {
            waiting.since.get_or_insert(now);
        }
        if waiting.pending.is_empty() {
            self.waiting.remove(&group);
        }
    }

    /// Nobody waits for it any more.
    pub fn discard(&mut self, group: u64) {
        self.waiting.remove(&group);
    }

    /// Time passes: returns the members that are late from now on.
    pub fn tick(&mut self, now: i64) -> Vec<u64> {
        let Some(rule) = self.rule else { return Vec::new() };
        let mut late = Vec::new();
        self.waiting.retain(|_, waiting| {
            if waiting.scored < rule.members || now - *waiting.since.get_or_insert(now) < rule.wait {
                return true;
            }
            late.extend(&waiting.pending);
            false
        });
        self.late.extend(&late);
        late
    }

    /// Nobody remembers when.
    pub fn reopen(&mut self) {
        self.waiting.values_mut().for_each(|waiting| waiting.since = None);
    }
}
