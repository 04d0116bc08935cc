//! Queries of the store: counts, the ledger and the names of states.

use std::collections::BTreeMap;

use crate::{
    log::Lsn,
    state::group::{Group, Phase},
    state::ledger::{Place, signed},
    state::successes::Successes,
    state::trajectory::{Trajectory, Verdict, Version},
    store::Store,
};

/// Live numbers, as in `pmdflow.types.Counts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Counts {
    /// Newest published version.
    pub version: Version,
    /// Newest version ever seen.
    pub max_version: Version,
    /// First prompt cursor position never admitted.
    pub next_cursor: u64,
    pub lsn: Lsn,
    pub durable_lsn: Lsn,
    /// Training groups not yet trained.
    pub groups_untrained: u64,
    /// The oldest of them.
    pub oldest_untrained: Option<u64>,
    pub groups_ready: usize,
    /// Those in the untrained claim.
    pub groups_claimed: usize,
    /// Undone claims, which are made again before any new one.
    pub claims_undone: usize,
    /// Leased training trajectories.
    pub trajectories_leased: u64,
    pub trajectories_idle: usize,
    /// Idle ones that hold tokens.
    pub trajectories_partial: usize,
    /// Complete ones without a verdict.
    pub trajectories_unscored: u64,
    /// Those that their groups did not wait for, since the store began.
    pub trajectories_late: u64,
    /// Training groups evicted since the store was opened because their rewards said nothing to the learner.
    pub groups_no_signal: u64,
    /// Second, differing outcomes of scoring attempts since the store was opened: the first ones stand.
    pub scores_ignored: u64,
    /// Evaluation trajectories without a verdict.
    pub eval_pending: u64,
    /// Budget of the newest version.
    pub tokens_budget: u64,
    /// Durable tokens of the newest version.
    pub tokens_spent: u64,
    /// Size of the log.
    pub bytes: u64,
}

impl Store {
    /// Rates of success by key: a cheap clone, to be gone through without the store.
    pub fn successes(&self) -> Successes {
        self.state.successes.clone()
    }

    /// Live numbers.
    pub fn counts(&self) -> Counts {
        let (state, index) = (&self.state, &self.index);
        let (idle, partial) = index.idle();
        let claimed = state.open_claim().and_then(|iteration| state.claims.get(&iteration));
        Counts {
            version: state.version,
            max_version: state.max_version,
            next_cursor: state.next_cursor,
            lsn: self.log.lsn(),
            durable_lsn: self.log.durable_lsn(),
            groups_untrained: index.untrained.len() as u64,
            oldest_untrained: index.untrained.first().copied(),
            groups_ready: index.ready.len(),
            groups_claimed: claimed.map_or(0, |claim| claim.groups.len()),
            claims_undone: state.undone.len(),
            trajectories_leased: index.leased,
            trajectories_idle: idle,
            trajectories_partial: partial,
            trajectories_unscored: index.unscored_train,
            trajectories_late: state.ledger.late,
            groups_no_signal: self.no_signal,
            scores_ignored: self.scores_ignored,
            eval_pending: index.eval_pending,
            tokens_budget: state.quotas.get(&state.version).map_or(0, |quota| quota.tokens),
            tokens_spent: state.spent.get(&state.version).copied().unwrap_or(0),
            bytes: self.log.bytes(),
        }
    }

    /// The ledger by key; `prompt`, `observed`, `reprefill`, `eval` and `overdraft` are outside the sum
    /// `generated`.
    pub fn ledger(&self) -> Vec<(&'static str, i64)> {
        let ledger = &self.state.ledger;
        let leased = signed(self.index.leased_tokens);
        let mut rows = vec![
            ("generated", ledger.generated()),
            ("partial_leased", leased),
            ("partial_idle", ledger.get(Place::Partial) - leased),
        ];
        let rest = Place::ALL.iter().filter(|(place, _)| *place != Place::Partial);
        rows.extend(rest.map(|(place, key)| (*key, ledger.get(*place))));
        rows.extend([
            ("prompt", signed(ledger.prompt)),
            ("observed", signed(ledger.observed)),
            ("reprefill", signed(ledger.reprefill)),
            ("eval", signed(ledger.eval)),
            ("overdraft", signed(ledger.overdraft)),
        ]);
        rows
    }

    /// Durable training tokens by version, for the versions that have a quota.
    pub fn versions_spent(&self) -> BTreeMap<Version, u64> {
        let spent = |version| self.state.spent.get(version).copied().unwrap_or(0);
        self.state.quotas.keys().map(|version| (*version, spent(version))).collect()
    }

    /// Name of a group's state in Python, and the iteration of its claim.
    pub fn phase_of(&self, group: &Group) -> (&'static str, Option<i64>) {
        match group.phase {
            Phase::Partial => ("partial", None),
            Phase::Ready => ("ready", None),
            Phase::Claimed(iteration) => {
                (self.state.claims.get(&iteration).map_or("claimed", |claim| claim.status.name()), Some(iteration))
            }
        }
    }

    /// Name of the state of every claim that is not evicted, by iteration.
    pub fn claims(&self) -> BTreeMap<i64, &'static str> {
        self.state.claims.iter().map(|(iteration, claim)| (*iteration, claim.status.name())).collect()
    }

    /// Name of a trajectory's state in Python.
    pub fn state_of(&self, id: u64, trajectory: &Trajectory) -> &'static str {
        match trajectory.verdict {
            Verdict::Scored { .. } => "scored",
            Verdict::Failed => "failed",
            Verdict::Late => "late",
            Verdict::Pending if !trajectory.is_partial() => "unscored",
            Verdict::Pending if self.leases.contains(id) => "leased",
            Verdict::Pending => "idle",
        }
    }
}
