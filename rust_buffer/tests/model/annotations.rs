//! Scorers, as the model expects them.

use _rust_buffer::{log::Log, state::trajectory::Trajectory, store::arrays::ColumnReader};

use crate::Model;

/// What a scorer adds: a byte for each token, and one value of the trajectory.
fn columns(id: u64, len: u32) -> (Vec<u8>, [u8; 4]) {
    ((0..len).map(|token| (u64::from(token) + id) as u8).collect(), (id as u32).to_le_bytes())
}

/// Reads what every scorer has added to a trajectory.
pub fn check(log: &Log, id: u64, trajectory: &Trajectory) {
    let extras = ColumnReader::new(log).of_trajectory(trajectory).unwrap();
    let (tokens, whole) = columns(id, trajectory.len);
    for known in &trajectory.annotations {
        let of = |name: &str| extras[&format!("{}-{name}", known.scorer)][0].clone();
        assert_eq!((of("tokens").bytes, of("tokens").offset, of("tokens").len), (tokens.clone(), 0, trajectory.len));
        assert_eq!(of("whole").bytes, whole);
    }
}

impl Model {
    pub fn annotate(&mut self, pick: usize) {
        let now = self.now;
        let Some(scorer) = self.scorers.get(pick % self.scorers.len().max(1)).cloned() else {
            assert!(self.store().unannotated("scorer-0", 8, 0, now).is_err(), "nobody expects it");
            return;
        };
        for id in self.store().unannotated(&scorer, 1 + pick, 0, now).unwrap() {
            let trajectory = self.store().state().trajectories[&id].clone();
            assert!(!trajectory.is_partial() && !self.eval.contains(&id) && !trajectory.is_annotated(&scorer));
            let (tokens, whole) = columns(id, trajectory.len);
            let names = [format!("{scorer}-tokens"), format!("{scorer}-whole")];
            let given = [(&*names[0], "|u1", &tokens[..]), (&*names[1], "trajectory <u4", &whole[..])];
            assert!(self.store().annotate(id, &scorer, &[(&*names[0], "<f8", &[0; 3])], now).is_err());
            self.store().annotate(id, &scorer, &given, now).unwrap();
            let lsn = self.store().lsn();
            self.store().annotate(id, &scorer, &given[..1], now).unwrap();
            assert_eq!(self.store().lsn(), lsn, "a repeat changes nothing");
            assert!(self.store().annotate(id, "another", &given, now).is_err(), "columns that there are already");
            self.annotated.entry(id).or_default().insert(scorer.clone());
            let store = self.store.as_ref().unwrap();
            check(store.log(), id, &store.state().trajectories[&id]);
        }
    }
}
