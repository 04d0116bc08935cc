//! Scorers: what they are to look at, and the columns that they add.

use crate::{
    clock::Micros,
    error::Result,
    log::Arrays,
    state::group::Phase,
    state::record::{Annotate, Record},
    state::trajectory::Verdict,
    store::arrays::ColumnReader,
    store::{Store, conflict},
    wire,
};

impl Store {
    /// Up to `max_items` complete trajectories that `scorer` has not seen; each comes again after `ttl`.
    ///
    /// # Errors
    /// `Conflict`: the scorer is not expected.
    pub fn unannotated(&mut self, scorer: &str, max_items: usize, ttl: Micros, now: Micros) -> Result<Vec<u64>> {
        self.index.take_back(&self.state, now);
        if let Some(queue) = self.index.unannotated(scorer) {
            return Ok(queue.hand_out(max_items, now.saturating_add(ttl)));
        }
        let known: Vec<&str> = self.index.scorers().map(String::as_str).collect();
        conflict(format!("the scorer {scorer:?} is not expected; those of this store are: {}", known.join(", ")))
    }

    /// Adds columns (name, dtype, bytes) of a scorer to a complete trajectory, each a value for every token after the
    /// prompt, or one of the trajectory. What the scorer has added stands: a repeat changes nothing, nor does a call
    /// for what is gone, given up or too late.
    ///
    /// # Errors
    /// `Conflict`: not complete, in a claim, a column that is not what its dtype says, or one that there is already.
    pub fn annotate(&mut self, id: u64, scorer: &str, columns: &[(&str, &str, &[u8])], now: Micros) -> Result<()> {
        self.expire(now)?;
        let Some(trajectory) = self.state.trajectories.get(&id) else {
            return self.state.require_gone(id);
        };
        if trajectory.is_annotated(scorer) || matches!(trajectory.verdict, Verdict::Late | Verdict::Failed) {
            return Ok(());
        }
        if trajectory.is_partial() {
            return conflict(format!("trajectory {id} is not complete and cannot be annotated"));
        }
        if let Phase::Claimed(iteration) = self.state.group(trajectory.group)?.phase {
            return conflict(format!("trajectory {id} is in the claim of iteration {iteration}: its columns stay"));
        }
        if scorer.is_empty() || columns.is_empty() {
            return conflict(format!("trajectory {id}: an annotation has the name of its scorer and a column"));
        }
        let known = ColumnReader::new(&self.log).of_trajectory(trajectory)?;
        for (nth, (name, dtype, bytes)) in columns.iter().enumerate() {
            if known.contains_key(*name) || columns[..nth].iter().any(|(other, ..)| other == name) {
                return conflict(format!("trajectory {id} has the column {name:?} already"));
            }
            if let Err(detail) = wire::check_column(name, dtype, bytes.len() as u64, trajectory.len) {
                return conflict(format!("trajectory {id}: {detail}"));
            }
        }
        let named = columns.iter().map(|(name, dtype, _)| ((*name).to_owned(), (*dtype).to_owned())).collect();
        let arrays: Vec<&[u8]> = columns.iter().map(|(.., bytes)| *bytes).collect();
        let annotate = Annotate { trajectory: id, scorer: scorer.to_owned(), columns: named };
        self.record(&Record::Annotate(annotate), &Arrays::of(&arrays)).map(drop)
    }
}
