//! Columns that scorers add to a complete trajectory.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Result, StoreError},
    log::Location,
    state::{State, record::Annotate},
};

/// What one scorer said of a trajectory, and where it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Annotation {
    /// Name of the scorer.
    pub scorer: String,
    /// Frame with its columns.
    pub location: Location,
}

impl State {
    /// Notes an annotation; of a scorer that is known already, only where it lies now.
    pub(super) fn apply_annotate(&mut self, annotate: &Annotate, location: Location) -> Result<()> {
        let Annotate { trajectory: id, scorer, .. } = annotate;
        let (trajectory, _) = self.pair_mut(*id)?;
        if trajectory.is_partial() {
            return Err(StoreError::Conflict(format!("trajectory {id} is not complete and cannot be annotated")));
        }
        trajectory.columns = true;
        match trajectory.annotations.iter_mut().find(|known| known.scorer == *scorer) {
            Some(known) => known.location = location,
            None => trajectory.annotations.push(Annotation { scorer: scorer.clone(), location }),
        }
        Ok(())
    }
}
