//! What the next claim will read, asked of the disk beforehand; its masks are computed when it is opened.

use crate::{error::Result, state::trajectory::Verdict, store::Store, store::shared::Shared};

/// Bytes between two places that are read too, rather than asked for apart.
const GAP_BYTES: u64 = 64 << 10;

/// Bytes of one file that are asked for together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    file: u32,
    from: u64,
    to: u64,
}

/// Places in order, neighbours joined.
fn joined(mut places: Vec<Place>) -> Vec<Place> {
    places.sort_unstable();
    let mut joined: Vec<Place> = Vec::new();
    for place in places {
        match joined.last_mut() {
            Some(last) if last.file == place.file && place.from <= last.to + GAP_BYTES => {
                last.to = last.to.max(place.to);
            }
            _ => joined.push(place),
        }
    }
    joined
}

impl Store {
    /// The groups that a claim would take now: those of the oldest undone one, or the first that are ready.
    fn next_groups(&self) -> Vec<u64> {
        match self.state.undone.front() {
            Some(undone) => undone.groups.clone(),
            None => self.index.ready.iter().take(self.settings.groups_per_iteration).copied().collect(),
        }
    }

    /// Where prompts and tokens of the next claim lie, and how many tokens these are.
    fn next_places(&self) -> Result<(Vec<Place>, u64)> {
        let (mut places, mut tokens) = (Vec::new(), 0);
        for id in self.next_groups() {
            let group = self.state.group(id)?;
            let at = group.location;
            places.push(Place { file: at.file, from: at.offset, to: at.offset + u64::from(at.len) });
            for (_, trajectory) in self.state.members(group) {
                if matches!(trajectory.verdict, Verdict::Scored { .. }) {
                    tokens += u64::from(group.prompt_len + trajectory.len);
                    places.extend(trajectory.runs.iter().map(|run| {
                        let from = run.offset();
                        Place { file: run.file, from, to: from + run.bytes() as u64 }
                    }));
                }
            }
        }
        Ok((joined(places), tokens))
    }
}

impl Shared {
    /// Has the disk read what a claim would take now, without waiting for it; the number of tokens.
    ///
    /// # Errors
    /// An error of ours, or `Closed`.
    pub fn prefetch(&self) -> Result<u64> {
        let (places, tokens) = self.query(Store::next_places)?;
        for place in places {
            self.log().will_need(place.file, place.from, place.to);
        }
        Ok(tokens)
    }
}
