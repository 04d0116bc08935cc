//! Recomputes from the state what the store keeps incrementally; for tests and for doubt.

use std::collections::BTreeMap;

use crate::{
    error::Result,
    state::ClaimStatus,
    state::group::{Group, Kind, Phase},
    state::ledger::{Place, signed},
    state::mask,
    state::trajectory::{Run, Verdict, Version},
    store::index::Index,
    store::live::Live,
    store::size,
    store::snapshot::parts,
    store::{Store, conflict},
};

/// Compares ledger, spent tokens, index and reservations with what state and leases say.
///
/// # Errors
/// `Conflict` naming the first difference.
pub fn check(store: &Store) -> Result<()> {
    check_trajectories(store)?;
    check_ledger(store)?;
    check_claims(store)?;
    check_index(store)?;
    same("bytes that are needed, by file", store.live.bytes(), Live::of(&store.state).bytes())?;
    check_snapshot(store)?;
    check_overdue(store)?;
    check_reservations(store)
}

#[allow(clippy::needless_pass_by_value)] // Values read better at the call.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, kept: T, recomputed: T) -> Result<()> {
    if kept == recomputed { Ok(()) } else { conflict(format!("{what}: kept {kept:?}, recomputed {recomputed:?}")) }
}

/// Tokens of a group's members; those of late ones are evicted.
fn tokens_of(store: &Store, group: &Group) -> Result<u64> {
    let members = group.members().map(|id| store.state.trajectory(id));
    members
        .map(|trajectory| trajectory.map(|t| if t.verdict == Verdict::Late { 0 } else { u64::from(t.generated()) }))
        .sum()
}

fn check_group(store: &Store, group: &Group) -> Result<()> {
    let count = |wanted: fn(&Verdict) -> bool| -> Result<u32> {
        let verdicts = group.members().map(|id| store.state.trajectory(id).map(|t| wanted(&t.verdict)));
        verdicts.map(|is| is.map(u32::from)).sum()
    };
    same("members of a group that it waits for", group.pending, count(|v| *v == Verdict::Pending)?)?;
    same("failed members of a group", group.failed, count(|v| *v == Verdict::Failed)?)?;
    same("late members of a group", group.late, count(|v| *v == Verdict::Late)?)?;
    same("whether a group waits", group.pending > 0, group.phase == Phase::Partial)
}

fn check_overdue(store: &Store) -> Result<()> {
    let (Some(straggler), Some(overdue)) = (store.settings.straggler, &store.overdue) else { return Ok(()) };
    let groups = store.state.groups.iter().filter(|(_, group)| group.is_overdue(straggler)).map(|(id, _)| *id);
    same("overdue groups", overdue.groups().collect::<Vec<_>>(), groups.collect())
}

fn check_trajectories(store: &Store) -> Result<()> {
    for trajectory in store.state.trajectories.values() {
        let runs = &trajectory.runs;
        let newest = runs.iter().filter(|run| Some(run.version) == trajectory.last_version());
        same("tokens of a trajectory", trajectory.len, runs.iter().map(|run| run.len).sum())?;
        same("tokens of the newest version", trajectory.tail, newest.map(Run::generated).sum())?;
        let generated = runs.iter().map(Run::generated).sum();
        same("generated tokens of a trajectory", trajectory.generated(), generated)?;
        same("order of versions", runs.is_sorted_by_key(|run| run.version), true)?;
    }
    Ok(())
}

fn check_ledger(store: &Store) -> Result<()> {
    let state = &store.state;
    let mut live: BTreeMap<&str, i64> = BTreeMap::new();
    for group in state.groups.values() {
        let tokens = tokens_of(store, group)?;
        same("tokens of a group", group.tokens, tokens)?;
        check_group(store, group)?;
        if group.kind == Kind::Eval {
            continue;
        }
        match group.phase {
            Phase::Ready => *live.entry("ready").or_default() += signed(tokens),
            Phase::Claimed(_) => {}
            Phase::Partial => {
                for id in group.members() {
                    let trajectory = state.trajectory(id)?;
                    let place = match trajectory.verdict {
                        Verdict::Pending if trajectory.is_partial() => "partial",
                        Verdict::Pending => "unscored",
                        _ => "waiting_group",
                    };
                    *live.entry(place).or_default() += i64::from(trajectory.generated());
                }
            }
        }
    }
    for (place, name) in Place::ALL.iter().take(4) {
        same(name, state.ledger.get(*place), live.get(name).copied().unwrap_or(0))?;
    }
    match Place::ALL.iter().find(|(place, _)| state.ledger.get(*place) < 0) {
        Some((place, name)) => same(name, state.ledger.get(*place), 0),
        None => Ok(()),
    }
}

fn check_claims(store: &Store) -> Result<()> {
    let state = &store.state;
    let mut claimed = 0;
    for (iteration, claim) in &state.claims {
        for id in &claim.groups {
            same("phase of a claimed group", state.group(*id)?.phase, Phase::Claimed(*iteration))?;
        }
        same("sums of a claim", claim.sums, mask::sums(state, claim)?)?;
        if claim.status == ClaimStatus::Claimed {
            claimed += signed(claim.sums.trainable);
        }
    }
    for id in state.undone.iter().flat_map(|undone| &undone.groups) {
        same("phase of a group whose claim was undone", state.group(*id)?.phase, Phase::Ready)?;
    }
    same("claimed", state.ledger.get(Place::Claimed), claimed)
}

fn check_index(store: &Store) -> Result<()> {
    let mut index = store.index.clone();
    // What is handed out for scoring is soft state of its own.
    index.take_back(&store.state, i64::MAX);
    let mut fresh = Index::expecting(&store.state, index.scorers().cloned().collect::<Vec<_>>())?;
    for (id, _) in store.leases.iter() {
        fresh.remove(&store.state, *id, false)?;
        fresh.add(&store.state, *id, true)?;
    }
    same("index", index, fresh)
}

/// The room that is kept for a snapshot is enough.
fn check_snapshot(store: &Store) -> Result<()> {
    let (state, mut size) = (&store.state, 0);
    for part in parts(state).1 {
        size += part?.len() as u64;
    }
    let room = store.live.snapshot_bytes(state);
    same("bytes of a snapshot at most", room, Live::of(state).snapshot_bytes(state))?;
    same("bytes of a snapshot", size.max(size::BASE + room), size::BASE + room)
}

fn check_reservations(store: &Store) -> Result<()> {
    let mut reserved: BTreeMap<Version, u64> = BTreeMap::new();
    for (_, lease) in store.leases.iter().filter(|(_, lease)| lease.budgeted) {
        *reserved.entry(lease.version).or_default() += u64::from(lease.grant);
    }
    reserved.into_iter().try_for_each(|(version, tokens)| same("reserved", store.leases.reserved(version), tokens))
}
