//! Scores, claims, publications and eviction, as the model expects them.

use std::collections::{BTreeMap, BTreeSet};

use _rust_buffer::{
    error::StoreError,
    log::Location,
    state::State,
    state::group::Group,
    state::record::LeftOut,
    state::trajectory::{Outcome, Trajectory, Verdict},
    store::Store,
    store::arrays,
    store::claims::{ClaimAnswer, Starvation},
};

use crate::{
    GROUPS, Model, annotations,
    bytes::{Packed, ids},
};

/// A claim as it was made.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    groups: Vec<u64>,
    version: i64,
    /// None when a group of it was discarded since.
    mask: Option<Vec<u8>>,
    /// Step of each group.
    plan: BTreeMap<u64, u32>,
}

impl Model {
    pub fn score(&mut self, pick: usize, outcome: Outcome) {
        let now = self.now;
        let mut unscored = self.store().unscored(8, 0, now);
        for id in unscored.iter().filter(|id| !self.eval.contains(id)) {
            let seen = self.annotated.get(id).map_or(0, BTreeSet::len);
            assert_eq!(seen, self.scorers.len(), "a reward before every scorer has seen it");
        }
        if unscored.is_empty() {
            return;
        }
        let odd = unscored.swap_remove(pick % unscored.len());
        for id in unscored {
            self.score_one(id, Outcome::Scored);
        }
        self.score_one(odd, outcome);
    }

    pub fn score_one(&mut self, id: u64, outcome: Outcome) {
        let now = self.now;
        let (attempt, group) = {
            let trajectory = &self.store().state().trajectories[&id];
            (trajectory.attempts, trajectory.group)
        };
        let components = BTreeMap::from([("right".to_owned(), 1.0)]);
        self.store().score(id, attempt, outcome, 1.0, components.clone(), now).unwrap();
        let before = self.store().state().clone();
        let given_up = outcome == Outcome::InfraFailure && attempt + 1 == self.settings.max_attempts;
        if given_up || outcome != Outcome::InfraFailure {
            self.stragglers.verdict(group, id, !given_up, now);
        }
        if let Some(trajectory) = before.trajectories.get(&id) {
            assert_eq!(trajectory.verdict == Verdict::Failed, given_up);
        }
        self.store().score(id, attempt, outcome, 1.0, components.clone(), now).unwrap();
        assert_eq!(self.store().state(), &before);
        if before.trajectories.contains_key(&id) && outcome != Outcome::InfraFailure {
            let other = self.store().score(id, attempt, outcome, 2.0, components, now);
            other.unwrap();
            assert_eq!(self.store().state(), &before, "the first outcome of an attempt stands");
        }
    }

    pub fn claim(&mut self) {
        let iteration = self.claims.keys().max().copied().unwrap_or(0).max(self.evicted) + 1;
        let (now, version) = (self.now, self.newest());
        let untrained = self.store().counts().groups_untrained;
        match self.store().claim(iteration, version, now) {
            Ok(Some(ClaimAnswer::Claimed(groups, lsn))) => {
                assert!(!groups.is_empty() && groups.len() <= GROUPS);
                assert!(groups.is_sorted());
                for group in &groups {
                    assert!(!self.claims.values().any(|claimed| claimed.contains(group)), "group claimed twice");
                    assert!(!self.committed.contains(group), "committed group claimed again");
                }
                let again = self.store().claim(iteration, version, now).unwrap();
                assert_eq!(again, Some(ClaimAnswer::Claimed(groups.clone(), lsn)));
                let (before, other) = (self.store().state().clone(), self.store().claim(iteration, version + 1, now));
                assert!(matches!(other, Err(StoreError::Conflict(_))) && self.store().state() == &before);
                self.check_claim(iteration);
                self.check_made(iteration, &groups);
                self.claims.insert(iteration, groups);
            }
            Ok(Some(ClaimAnswer::Starved(Starvation::OverAge))) => {
                assert!(self.store().counts().groups_untrained < untrained, "nothing was evicted");
            }
            Ok(Some(ClaimAnswer::Starved(Starvation::Closed))) => {
                let counts = self.store().counts();
                assert_eq!((counts.groups_ready, counts.trajectories_leased, counts.trajectories_unscored), (0, 0, 0));
            }
            Ok(Some(ClaimAnswer::Starved(Starvation::NoSignal))) => panic!("no group is judged here"),
            Ok(None) => {}
            Err(StoreError::Conflict(_)) => assert!(self.store().state().open_claim().is_some()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Undone claims come first, as they were.
    fn check_made(&mut self, iteration: i64, groups: &[u64]) {
        let mask = Some(Packed::of(self.store(), iteration).mask);
        let version = self.store().state().claims[&iteration].version;
        let mut made = Made { groups: groups.to_vec(), version, mask, plan: BTreeMap::new() };
        let recorded = self.store().plan(iteration).unwrap().map(|(plan, _)| plan.steps);
        if let Some(undone) = self.undone.pop_front() {
            assert_eq!((&made.groups, made.version), (&undone.groups, undone.version));
            assert!(undone.mask.is_none() || made.mask == undone.mask);
            assert_eq!(recorded.as_ref(), Some(&undone.plan));
            made.plan = undone.plan;
        } else {
            assert_eq!(recorded, None);
            made.plan = self.deal(iteration, groups);
        }
        self.made.insert(iteration, made);
    }

    /// Deals a claim to three steps in a way of its own.
    fn deal(&mut self, iteration: i64, groups: &[u64]) -> BTreeMap<u64, u32> {
        let steps: Vec<u32> = groups.iter().map(|group| (*group as u32 * 7 + iteration as u32) % 3).collect();
        let record =
            |store: &mut Store, steps: &[u32]| store.record_plan(iteration, "random".into(), Some(-1), 3, steps);
        for refused in [&[3; GROUPS][..groups.len()], &steps[1..]] {
            assert!(matches!(record(self.store(), refused), Err(StoreError::Conflict(_))));
        }
        record(self.store(), &steps).unwrap();
        let lsn = self.store().lsn();
        record(self.store(), &steps).unwrap();
        assert_eq!(self.store().lsn(), lsn, "a repeat");
        let other: Vec<u32> = steps.iter().map(|step| (step + 1) % 3).collect();
        assert!(matches!(record(self.store(), &other), Err(StoreError::Conflict(_))));
        let (plan, in_order) = self.store().plan(iteration).unwrap().unwrap();
        assert_eq!((in_order, plan.num_steps), (steps, 3));
        plan.steps
    }

    pub fn discard(&mut self, pick: usize) {
        let live: Vec<u64> = self.store().state().groups.keys().copied().collect();
        let Some(group) = live.get(pick % live.len().max(1)).copied() else { return };
        let before = self.store().state().clone();
        let members: Vec<u64> = before.groups[&group].members().collect();
        if self.claims.values().any(|claimed| claimed.contains(&group)) {
            assert!(matches!(self.store().discard(group, "claimed"), Err(StoreError::Conflict(_))));
            assert_eq!(self.store().state(), &before);
            return;
        }
        assert!(self.store().discard(group, "unwanted").unwrap());
        assert!(!self.store().discard(group, "unwanted").unwrap());
        self.held.retain(|held| !members.contains(&held.trajectory));
        self.stragglers.discard(group);
        for id in members {
            if self.eval.remove(&id) {
                self.tokens.remove(&id);
            } else if !self.stragglers.late.contains(&id) {
                self.discarded_tokens += self.tokens[&id].iter().filter(|token| !token.observed).count() as u64;
            }
        }
        for undone in self.undone.iter_mut().filter(|undone| undone.groups.contains(&group)) {
            undone.groups.retain(|other| *other != group);
            undone.mask = None;
            undone.plan.remove(&group);
        }
        self.undone.retain(|undone| !undone.groups.is_empty());
    }

    pub fn check_claim(&mut self, iteration: i64) {
        let packed = Packed::of(self.store(), iteration);
        let version = self.store().state().claims[&iteration].version;
        let trained: Vec<i32> =
            packed.versions.iter().zip(&packed.mask).filter(|(_, mask)| *mask & 2 != 0).map(|(v, _)| *v).collect();
        let ages = |flag: u8| {
            let tokens = packed.versions.iter().zip(&packed.mask).filter(move |(_, mask)| *mask & flag != 0);
            tokens.map(|(v, _)| self.trained[&version] - self.trained[&i64::from(*v)])
        };
        assert!(ages(2).all(|age| age <= 2) && ages(4).all(|age| age > 2));
        let spans = packed.rows.cu_seqlens.windows(2).zip(&packed.rows.groups);
        for group in &self.store().state().claims[&iteration].groups.clone() {
            let mut own = spans.clone().filter(|(_, of)| **of == *group as i64).map(|(span, _)| span);
            let trains =
                |span: &[i64]| packed.mask[span[0] as usize..span[1] as usize].iter().any(|mask| mask & 2 != 0);
            assert!(own.any(trains), "group {group} has nothing to train");
        }
        assert_eq!(trained.len() as u64, self.store().state().claims[&iteration].sums.trainable);
        assert!(packed.versions.iter().zip(&packed.mask).all(|(v, mask)| (*v < 0) == (*mask == 0)));
        let (mut all, mut generated) = (Vec::new(), Vec::new());
        let mut rows = Vec::new();
        for episode in &packed.rows.episodes {
            if rows.last().is_none_or(|(_, last, _)| last != episode) {
                rows.extend(self.branches_of(*episode as u64).into_iter().map(|branch| (branch.id, *episode, branch)));
            }
        }
        assert_eq!(packed.rows.trajectories, rows.iter().map(|(id, ..)| *id as i64).collect::<Vec<_>>());
        for (index, (_, episode, branch)) in rows.iter().enumerate() {
            let kept = branch.parent.map_or((-1, 0), |(parent, offset)| (parent as i64, offset as i32));
            assert_eq!((packed.rows.episodes[index], packed.rows.parents[index]), (*episode, kept.0));
            assert_eq!(packed.rows.fork_offsets[index], kept.1);
            all.extend([7, 8].into_iter().chain(branch.history.iter().map(|(token, _)| token.id)));
            let own = branch.history.iter().map(|(token, own)| *own && !token.observed);
            generated.extend([false, false].into_iter().chain(own));
        }
        assert_eq!(packed.tokens, all);
        assert!(generated.iter().zip(&packed.mask).all(|(generated, mask)| *generated == (mask & 1 != 0)));
    }

    /// `chosen` has two bits for each trajectory of the claim: trained, filtered, vetoed, trained.
    pub fn publish(&mut self, chosen: u64) {
        let open = self.store().state().open_claim();
        let version = self.newest() + 1;
        let left_out = open.map_or_else(LeftOut::default, |iteration| self.leave_out(iteration, chosen));
        self.store().publish(version, open, left_out.clone()).unwrap();
        let before = self.store().state().clone();
        self.store().publish(version, open, left_out).unwrap();
        assert_eq!(self.store().state(), &before);
        self.trained_through = open.unwrap_or(self.trained_through);
        self.trained.insert(version, self.trained[&(version - 1)] + 1);
        self.versions.insert(self.trained_through, version);
        self.check_masks();
    }

    pub fn leave_out(&mut self, iteration: i64, chosen: u64) -> LeftOut {
        let mut packed = Packed::of(self.store(), iteration);
        let (mut left_out, mut tokens) = (LeftOut::default(), [0; 2]);
        for (row, id) in packed.rows.trajectories.iter().enumerate() {
            let (reason, flag) = match chosen >> (2 * row % 64) & 3 {
                1 => (0, 16),
                2 => (1, 32),
                _ => continue,
            };
            [&mut left_out.filter, &mut left_out.veto][reason].insert(*id as u64);
            let span = packed.rows.cu_seqlens[row] as usize..packed.rows.cu_seqlens[row + 1] as usize;
            for mask in packed.mask[span].iter_mut().filter(|mask| **mask & 2 != 0) {
                *mask ^= 2 | flag;
                tokens[reason] += 1;
            }
        }
        self.masks.insert(iteration, packed.mask);
        self.left_out.insert(iteration, tokens);
        left_out
    }

    pub fn check_masks(&self) {
        for (iteration, mask) in &self.masks {
            assert_eq!(&Packed::of(self.store.as_ref().unwrap(), *iteration).mask, mask);
        }
    }

    pub fn commit(&mut self) {
        let through = self.trained_through;
        self.store().commit_claims(through).unwrap();
        self.store().commit_claims(through).unwrap();
        for (_, groups) in self.claims.range(..=through) {
            self.committed.extend(groups);
        }
    }

    pub fn uncommit(&mut self, back: i64) {
        let through = (self.trained_through - back).max(self.evicted);
        let undone = self.store().uncommit(through).unwrap();
        assert_eq!(undone, self.claims.split_off(&(through + 1)).into_keys().collect::<Vec<_>>());
        assert!(self.store().uncommit(through).unwrap().is_empty());
        for made in self.made.split_off(&(through + 1)).into_values().rev() {
            self.undone.push_front(made);
        }
        self.trained_through = through;
        self.versions.split_off(&(through + 1));
        self.restore(through);
        self.masks.split_off(&(through + 1));
        self.left_out.split_off(&(through + 1));
        let live: BTreeSet<u64> = self.claims.values().flatten().copied().collect();
        let store = self.store.as_ref().unwrap();
        self.committed.retain(|group| live.contains(group) || !store.state().groups.contains_key(group));
    }

    /// The learner goes back to the weights after iteration `through`, under a new number.
    fn restore(&mut self, through: i64) {
        let (newest, old) = (self.newest(), self.versions[&through]);
        if newest == old {
            return;
        }
        self.store().restore(newest + 1, old).unwrap();
        let before = self.store().state().clone();
        self.store().restore(newest + 1, old).unwrap();
        assert_eq!(self.store().state(), &before);
        self.trained.insert(newest + 1, self.trained[&old]);
        self.versions.insert(through, newest + 1);
    }

    pub fn evict(&mut self) {
        let through = self.trained_through;
        let dropped: Vec<i64> = self
            .claims
            .iter()
            .filter(|(_, groups)| groups.iter().all(|group| self.committed.contains(group)))
            .map(|(iteration, _)| *iteration)
            .collect();
        let expected: usize = dropped.iter().map(|iteration| self.claims[iteration].len()).sum();
        assert_eq!(self.store().evict(through).unwrap(), expected);
        assert_eq!(self.store().evict(through).unwrap(), 0);
        self.claims.retain(|iteration, _| !dropped.contains(iteration));
        self.masks.retain(|iteration, _| !dropped.contains(iteration));
        self.evicted = self.evicted.max(dropped.iter().max().copied().unwrap_or(0));
        self.remove_dead_files();
    }

    /// Tokens and prompts lie elsewhere, and nothing else changes: `check` and every later read compare them.
    pub fn compact(&mut self) {
        let before = self.store().state().clone();
        self.store().compact().unwrap();
        let after = self.store().state().clone();
        for (id, trajectory) in &after.trajectories {
            assert_eq!(trajectory.merged(), before.trajectories[id].merged());
            let whole = trajectory.is_partial() || trajectory.verdict == Verdict::Late || self.eval.contains(id);
            assert!(whole || !trajectory.is_scattered(), "a complete trajectory lies in pieces");
            annotations::check(self.store.as_ref().unwrap().log(), *id, trajectory);
            let read = arrays::read_runs(self.store.as_ref().unwrap().log(), &trajectory.runs).unwrap();
            assert_eq!(read.ids, ids(&self.tokens[id]));
        }
        let places = |state: &State| {
            let mut state = state.clone();
            state.trajectories = state.trajectories.into_iter().map(|(id, t)| (id, without_places(t))).collect();
            state.groups = state
                .groups
                .into_iter()
                .map(|(id, g)| (id, Group { location: before.groups[&id].location, ..g }))
                .collect();
            state
        };
        assert_eq!(places(&after), places(&before));
        self.remove_dead_files();
    }

    fn remove_dead_files(&mut self) {
        let store = self.store.as_ref().unwrap();
        store.log().remove_files(|file| store.is_dead(file)).unwrap();
    }
}

/// The same wherever its tokens and annotations lie.
fn without_places(mut trajectory: Trajectory) -> Trajectory {
    trajectory.runs.clear();
    for known in &mut trajectory.annotations {
        known.location = Location { file: 0, offset: 0, len: 0 };
    }
    trajectory
}
