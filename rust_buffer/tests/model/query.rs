//! Queries against a filter written plainly.

use _rust_buffer::{
    state::trajectory::Verdict,
    store::Store,
    store::query::{Bounds, Filter},
};

fn within<T: PartialOrd + Copy>((low, high): Bounds<T>, value: T) -> bool {
    !(low.is_some_and(|low| value < low) || high.is_some_and(|high| value > high))
}

/// The ids that `filter` selects.
fn plain(store: &Store, filter: &Filter) -> Vec<u64> {
    let mut ids: Vec<u64> = store.state().trajectories.keys().copied().collect();
    ids.retain(|id| {
        let trajectory = &store.state().trajectories[id];
        let group = &store.state().groups[&trajectory.group];
        let (group_state, iteration) = store.phase_of(group);
        let mut wanted = within(filter.length, trajectory.generated());
        if let Some(number) = filter.iteration {
            wanted &= iteration == Some(number);
        }
        if filter.version != (None, None) {
            wanted &= trajectory.runs.iter().any(|run| within(filter.version, run.version));
        }
        if filter.reward != (None, None) {
            wanted &= match trajectory.verdict {
                Verdict::Scored { reward, .. } => within(filter.reward, reward),
                _ => false,
            };
        }
        if let Some(state) = &filter.state {
            wanted &= [group_state, store.state_of(*id, trajectory)].contains(&state.as_str());
        }
        wanted
            && filter.stop.is_none_or(|stop| stop == trajectory.stop)
            && filter.prompt_id.as_ref().is_none_or(|prompt| *prompt == group.prompt_id)
            && filter.group.is_none_or(|id| id == trajectory.group)
            && filter.kind.is_none_or(|kind| kind == group.kind)
    });
    ids.sort_unstable();
    ids
}

/// Asserts that the pages of `limit` together are what the plain filter selects.
pub fn check(store: &Store, filter: &Filter, limit: usize) {
    let (mut selected, mut after) = (Vec::new(), None);
    loop {
        let (page, next) = store.select(filter, after, limit);
        assert!(page.len() == limit || next.is_none());
        for row in page {
            let trajectory = &store.state().trajectories[&row.trajectory];
            assert_eq!((row.group, row.len, row.stop), (trajectory.group, trajectory.generated(), trajectory.stop));
            assert_eq!(
                (row.state, row.last_version),
                (store.state_of(row.trajectory, trajectory), trajectory.last_version())
            );
            selected.push(row.trajectory);
        }
        if next.is_none() {
            break;
        }
        assert!(next > after);
        after = next;
    }
    assert_eq!(selected, plain(store, filter), "{filter:?}");
}
