//! Admission, leases and appends, as the model expects them.

use std::collections::BTreeMap;

use _rust_buffer::{
    error::StoreError,
    state::group::Kind,
    state::record::{Admit, Quota},
    state::trajectory::Outcome,
    store::admission::Prompt,
    store::append::Reply,
    store::arrays,
    store::rollout::Granted,
    wire::Batch,
};

use crate::{
    Branch, Held, Model, TTL, Token,
    bytes::{Sent, ids},
};

impl Model {
    pub fn quota(&mut self, tokens: u64, tokens_per_segment: Option<u32>) {
        let version = self.newest();
        let quota = Quota { groups: 6, tokens, tokens_per_segment };
        self.store().set_quota(version, quota).unwrap();
        let most = self.budgets.entry(version).or_default();
        *most = (*most).max(tokens);
    }

    pub fn admit(&mut self, size: u32, max_tokens: u32, priority: i32, eval: bool) {
        let number = if eval { self.evals } else { self.admitted };
        let admit = Admit {
            request_id: format!("{}-{number}", if eval { "eval" } else { "train" }),
            cursor: (!eval).then_some(number),
            kind: if eval { Kind::Eval } else { Kind::Train },
            prompt_id: format!("p{number}"),
            prompt_len: 2,
            size,
            max_tokens,
            priority,
            drawn: None,
        };
        let prompt: Vec<u8> = [7_i32, 8].iter().flat_map(|token| token.to_le_bytes()).collect();
        // One in three as before texts were kept.
        let text = (number % 3 > 0).then(|| format!("What is {number}?"));
        let prompt = Prompt { tokens: &prompt, metadata: b"meta", text: text.as_deref() };
        let untrained = self.store().counts().groups_untrained;
        match self.store().admit(&admit, prompt) {
            Ok(group) => {
                assert_eq!(self.store().admit(&admit, prompt).unwrap(), group);
                let other = self.store().admit(&admit, Prompt { text: Some("another"), ..prompt });
                assert_eq!(other.is_ok(), text.is_none(), "texts are compared where one was recorded");
                self.texts.insert(group, text);
                let members = self.store().state().groups[&group].members();
                if !eval {
                    self.stragglers.admit(group, members.clone());
                }
                for id in members {
                    self.tokens.insert(id, Vec::new());
                    self.branches.insert(id, vec![Branch::first(id)]);
                    if eval {
                        self.eval.insert(id);
                    }
                }
                *(if eval { &mut self.evals } else { &mut self.admitted }) += 1;
            }
            Err(StoreError::Full { limit, .. }) => assert!(!eval && untrained >= limit),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn lease(&mut self, max: usize, lag: i64) {
        let (now, version) = (self.now, (self.newest() - lag).max(0));
        let open = self.store().state().open_claim().is_some() || version != self.newest();
        let worker = self.worker();
        let grants = self.store().lease(&worker, version, max, now).unwrap();
        self.check_priorities(&grants);
        for lease in grants {
            assert!(lease.grant > 0);
            assert!(lease.kind == Kind::Eval || self.settings.lookahead > 0 || !open);
            assert!(!self.held.iter().any(|held| held.trajectory == lease.trajectory));
            let prompt = arrays::read_prompt(self.store().log(), lease.prompt).unwrap();
            assert_eq!(Some(&prompt.text), self.texts.get(&lease.group));
            let prefix = arrays::read_history(self.store().log(), &lease.runs, &lease.history).unwrap();
            let history: Vec<Token> = self.history(lease.trajectory).into_iter().map(|(token, _)| token).collect();
            assert_eq!(prefix.ids, ids(&history));
            let observed: Vec<u8> = history.iter().map(|token| u8::from(token.observed)).collect();
            assert_eq!(prefix.observed, observed);
            self.held.push(Held {
                trajectory: lease.trajectory,
                epoch: lease.epoch,
                version,
                grant: lease.grant,
                deadline: now + TTL,
            });
        }
    }

    /// Every lease of the present worker ends, and it gets no other; what it appends is stale; the next one takes over.
    pub fn fence(&mut self) {
        let (now, version, worker) = (self.now, self.newest(), self.worker());
        let before = self.store().state().clone();
        let held = std::mem::take(&mut self.held);
        assert_eq!(self.store().fence(&worker).unwrap(), held.len());
        assert_eq!(self.store().fence(&worker).unwrap(), 0);
        assert!(self.store().lease(&worker, version, 9, now).unwrap().is_empty());
        for held in &held {
            let offset = self.tokens[&held.trajectory].len() as u32;
            let sent = Sent { held, offset, tokens: &[1], next_version: held.version, stop: None, observed: false };
            let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
            assert_eq!(replies, [Reply { trajectory: held.trajectory, stale: true, grant: 0 }]);
        }
        assert_eq!(self.store().state(), &before);
        self.fenced += 1;
    }

    pub fn worker(&self) -> String {
        format!("worker-{}", self.fenced)
    }

    /// No group of higher priority was left out when one was started.
    pub fn check_priorities(&self, grants: &[Granted]) {
        let store = self.store.as_ref().unwrap();
        let group = |id: &u64| &store.state().groups[id];
        let started = grants.iter().filter(|lease| lease.kind == Kind::Train && lease.runs.is_empty());
        let Some(least) = started.map(|lease| group(&lease.group).priority).min() else { return };
        for (id, trajectory) in &store.state().trajectories {
            let left_out = trajectory.runs.is_empty() && store.state_of(*id, trajectory) == "idle";
            let group = group(&trajectory.group);
            assert!(!left_out || group.kind == Kind::Eval || group.priority <= least);
        }
    }

    pub fn append(&mut self, pick: usize, count: u32, stop: Option<&str>, (newer, observed): (bool, bool)) {
        if self.held.is_empty() {
            return;
        }
        let index = pick % self.held.len();
        let held = self.held[index].clone();
        let offset = self.tokens[&held.trajectory].len() as u32;
        let group = self.store().state().trajectories[&held.trajectory].group;
        let room = self.store().state().groups[&group].max_tokens - offset;
        let count = count.min(if observed { room } else { held.grant });
        let new: Vec<i32> = (0..count).map(|i| (held.trajectory * 100) as i32 + (offset + i) as i32).collect();
        let next_version = if newer { self.newest().max(held.version) } else { held.version };
        let at = self.offset(held.trajectory, offset);
        let sent = Sent { held: &held, offset: at, tokens: &new, next_version, stop, observed }.encode();
        let (item, now) = (Batch::decode(&sent).unwrap(), self.now);
        let reply = self.store().append(&item, now).unwrap()[0];
        assert!(!reply.stale);
        let tokens = self.tokens.get_mut(&held.trajectory).unwrap();
        tokens.extend(new.iter().map(|id| Token { id: *id, observed }));
        let before = self.store().state().clone();
        let repeat = self.store().append(&item, now).unwrap()[0];
        assert_eq!(self.store().state(), &before);
        assert_eq!(repeat, reply);
        self.append_again(index, offset, &new, (next_version, stop));
        if stop.is_some() || !before.trajectories[&held.trajectory].is_partial() {
            assert_eq!(reply.grant, 0);
            self.held.remove(index);
        } else {
            self.held[index] = Held { version: next_version, grant: reply.grant, deadline: now + TTL, ..held };
        }
    }

    /// A worker that lost an answer sends a run again, or the end of it: nothing changes.
    fn append_again(&mut self, index: usize, offset: u32, new: &[i32], (next_version, stop): (i64, Option<&str>)) {
        let (held, now) = (self.held[index].clone(), self.now);
        let before = self.store().state().clone();
        for skip in 0..new.len() {
            let (offset, tokens) = (offset + skip as u32, &new[skip..]);
            let observed = self.tokens[&held.trajectory][offset as usize].observed;
            let offset = self.offset(held.trajectory, offset);
            let sent = Sent { held: &held, offset, tokens, next_version, stop, observed }.encode();
            let replies = self.store().append(&Batch::decode(&sent).unwrap(), now).unwrap();
            assert!(!replies[0].stale);
        }
        assert_eq!(self.store().state(), &before);
    }

    pub fn stale_append(&mut self, pick: usize) {
        let fenced: Vec<(u64, u64)> = self
            .store()
            .state()
            .trajectories
            .iter()
            .filter(|(_, t)| t.epoch > 0)
            .map(|(id, t)| (*id, t.epoch - 1))
            .collect();
        if fenced.is_empty() {
            return;
        }
        let (trajectory, epoch) = fenced[pick % fenced.len()];
        let now = self.now;
        let before = self.store().state().clone();
        let held = Held { trajectory, epoch, version: 0, grant: 0, deadline: 0 };
        let sent =
            Sent { held: &held, offset: 0, tokens: &[1, 2, 3], next_version: 0, stop: Some("stop"), observed: false };
        let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
        assert_eq!(replies, [Reply { trajectory, stale: true, grant: 0 }]);
        assert_eq!(self.store().state(), &before);
    }

    /// A member that came too late is fenced, and its score is ignored.
    pub fn late(&mut self, pick: usize) {
        let live: Vec<u64> = self.store.as_ref().unwrap().state().trajectories.keys().copied().collect();
        let late: Vec<u64> = live.into_iter().filter(|id| self.stragglers.late.contains(id)).collect();
        if late.is_empty() {
            return;
        }
        let (id, now) = (late[pick % late.len()], self.now);
        let before = self.store().state().clone();
        let (offset, epoch) = (before.trajectories[&id].len, before.trajectories[&id].epoch);
        let held = Held { trajectory: id, epoch, version: 0, grant: 0, deadline: 0 };
        let sent = Sent { held: &held, offset, tokens: &[1, 2], next_version: 0, stop: None, observed: false };
        let replies = self.store().append(&Batch::decode(&sent.encode()).unwrap(), now).unwrap();
        assert_eq!(replies, [Reply { trajectory: id, stale: true, grant: 0 }]);
        self.store().score(id, 0, Outcome::Scored, 1.0, BTreeMap::new(), now).unwrap();
        assert_eq!(self.store().state(), &before);
    }
}
