//! Forks, told once more: each branch has its whole history.

use _rust_buffer::{error::StoreError, store::forks::Forked};

use crate::{Held, Model, TTL, Token};

/// A branch of an episode: where its own tokens begin, and what it holds.
#[derive(Clone)]
pub struct Branch {
    pub id: u64,
    pub parent: Option<(u64, u32)>,
    start: usize,
    kept: Vec<Token>,
    /// Filled when it is asked for: tokens, and whether they came in this branch.
    pub history: Vec<(Token, bool)>,
}

impl Branch {
    pub fn first(id: u64) -> Self {
        Self { id, parent: None, start: 0, kept: Vec::new(), history: Vec::new() }
    }
}

impl Model {
    /// The branches of an episode that something came in, or the only one.
    pub fn branches_of(&self, id: u64) -> Vec<Branch> {
        let (branches, tokens) = (&self.branches[&id], &self.tokens[&id]);
        let mut filled = Vec::new();
        for (nth, branch) in branches.iter().enumerate() {
            let end = branches.get(nth + 1).map_or(tokens.len(), |next| next.start);
            if nth > 0 && end == branch.start {
                continue;
            }
            let own = tokens[branch.start..end].iter().map(|token| (*token, true));
            let history = branch.kept.iter().map(|token| (*token, false)).chain(own).collect();
            filled.push(Branch { history, ..branch.clone() });
        }
        filled
    }

    /// What the newest branch holds.
    pub fn history(&self, id: u64) -> Vec<(Token, bool)> {
        let newest = self.branches[&id].last().unwrap();
        let own = self.tokens[&id][newest.start..].iter().map(|token| (*token, true));
        newest.kept.iter().map(|token| (*token, false)).chain(own).collect()
    }

    /// Where the token at `place` of the episode is in the history of its newest branch.
    pub fn offset(&self, id: u64, place: u32) -> u32 {
        let newest = self.branches[&id].last().unwrap();
        (place as usize - newest.start + newest.kept.len()) as u32
    }

    pub fn fork(&mut self, pick: usize, keep: u32) {
        if self.held.is_empty() {
            return;
        }
        let index = pick % self.held.len();
        let (Held { trajectory: id, epoch, .. }, now) = (self.held[index].clone(), self.now);
        let (before, history) = (self.store().state().clone(), self.history(id));
        let place = self.tokens[&id].len();
        let fork = |model: &mut Self, epoch, offset| model.store().fork(id, epoch, offset, now);
        if place == 0 {
            assert!(matches!(fork(self, epoch, 0), Err(StoreError::Conflict(_))), "nothing came in the episode");
            assert_eq!(self.store().state(), &before);
            return;
        }
        let newest = self.branches[&id].last().unwrap().clone();
        let bare = place == newest.start;
        for (epoch, offset) in [(epoch, history.len() as u32 + 1), (epoch + 1, 0)] {
            assert!(matches!(fork(self, epoch, offset), Err(StoreError::Conflict(_))));
        }
        assert_eq!(self.store().state(), &before);
        let offset = keep % (history.len() as u32 + 1);
        let forked = fork(self, epoch, offset).unwrap();
        let new = if bare { newest.id } else { before.next_trajectory };
        assert_eq!(forked, Forked { stale: false, branch: new, epoch: epoch + 1 });
        let after = self.store().state().clone();
        assert_eq!(fork(self, epoch, offset).unwrap(), forked, "a repeat");
        assert!(matches!(fork(self, epoch, offset + 1), Err(StoreError::Conflict(_))), "a repeat with another offset");
        assert!(epoch == 1 || fork(self, epoch - 1, offset).unwrap().stale);
        assert_eq!(self.store().state(), &after);
        let parent = Some((if bare { newest.parent.unwrap().0 } else { newest.id }, offset));
        let kept = history[..offset as usize].iter().map(|(token, _)| *token).collect();
        let branch = Branch { id: forked.branch, parent, start: place, kept, history: Vec::new() };
        let branches = self.branches.get_mut(&id).unwrap();
        if bare {
            branches.pop();
        }
        branches.push(branch);
        self.held[index] = Held { epoch: forked.epoch, deadline: now + TTL, ..self.held[index].clone() };
    }
}
