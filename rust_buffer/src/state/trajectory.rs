//! Segments of a trajectory and their invariants.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::state::annotation::Annotation;

/// Number of a policy publication; -1 before the first one.
pub type Version = i64;

/// The newest version that can be: each token's is an int32 to the learner.
pub const MAX_VERSION: Version = i32::MAX as Version;

/// Why a trajectory is complete; the numbers are those of `pmdflow.types.Stop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    /// Still partial.
    None = 0,
    /// The policy ended it.
    Stop = 1,
    /// It has its greatest length.
    Length = 2,
    /// The repetition detector ended it.
    Repetition = 3,
}

impl Stop {
    /// The one of this number.
    ///
    /// # Errors
    /// The number is unknown.
    pub fn numbered(number: u8) -> Result<Self, String> {
        let known = [Self::None, Self::Stop, Self::Length, Self::Repetition];
        known.into_iter().find(|stop| *stop as u8 == number).ok_or_else(|| format!("the stop {number} is unknown"))
    }
}

/// Why a worker ends its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The trajectory is complete.
    Complete(Stop),
    /// A budget is used up or the worker gives up: partial and leasable again.
    Release,
}

impl End {
    /// The stop that a trajectory of `len` tokens (of at most `max`) has after this end; None while it stays partial.
    pub fn stop(end: Option<Self>, len: u32, max: u32) -> Option<Stop> {
        match end {
            Some(Self::Complete(stop)) => Some(stop),
            _ if len >= max => Some(Stop::Length),
            _ => None,
        }
    }
}

/// One stored run of tokens: where its arrays lie. Neighbours of equal version and temperature are one segment to readers.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Run {
    /// Tokens.
    pub len: u32,
    /// Policy version that generated them.
    pub version: Version,
    pub temperature: f32,
    /// The environment made them, not the policy.
    pub observed: bool,
    pub file: u32,
    /// Offset of their frame in the file.
    pub frame: u64,
    /// Offset of their array in the frame: tokens, then log-probs unless observed.
    pub at: u32,
    /// CRC32C of the array.
    pub crc: u32,
}

impl Run {
    /// Offset of the array in the file.
    pub fn offset(&self) -> u64 {
        self.frame + u64::from(self.at)
    }

    /// Bytes of the array.
    pub fn bytes(&self) -> usize {
        self.len as usize * if self.observed { 4 } else { 8 }
    }

    /// Tokens that the policy made.
    pub fn generated(&self) -> u32 {
        if self.observed { 0 } else { self.len }
    }
}

impl Serialize for Run {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        // By position, in the order of the declaration: names would outweigh the rest of a snapshot.
        let Self { len, version, temperature, observed, file, frame, at, crc } = *self;
        (len, version, temperature, observed, file, frame, at, crc).serialize(to)
    }
}

impl<'de> Deserialize<'de> for Run {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let (len, version, temperature, observed, file, frame, at, crc) = Deserialize::deserialize(from)?;
        Ok(Self { len, version, temperature, observed, file, frame, at, crc })
    }
}

/// How scoring went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A reward.
    Scored,
    /// A reward for a completion that is invalid.
    Invalid,
    /// No reward; the attempt can be repeated.
    InfraFailure,
}

/// What scoring has decided about a trajectory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields and variants that say themselves")]
pub enum Verdict {
    /// Nothing yet.
    Pending,
    Scored {
        /// `Scored` or `Invalid`.
        outcome: Outcome,
        reward: f64,
        /// Its components, by index into the state's names.
        components: Box<[(u32, f64)]>,
    },
    /// Too many infra failures: outside the baseline.
    Failed,
    /// Its group did not wait for it: evicted, its tokens kept until the group goes.
    Late,
}

/// The token record of one attempt at a prompt, without the tokens themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Trajectory {
    pub group: u64,
    /// Number of leases so far; the newest lease's fencing epoch.
    pub epoch: u64,
    /// Tokens after the prompt.
    pub len: u32,
    /// Those of them that the environment made.
    pub observed: u32,
    /// Tokens that `last_version` generated.
    pub tail: u32,
    pub stop: Stop,
    /// Infra failures recorded; the number of the next scoring attempt.
    pub attempts: u32,
    pub verdict: Verdict,
    /// Stored runs of tokens in order; versions never decrease.
    pub runs: Vec<Run>,
    /// Whether one of them, or an annotation, has extra columns.
    #[serde(default)]
    pub columns: bool,
    /// What scorers have added, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub annotations: Vec<Annotation>,
}

impl Trajectory {
    /// An empty trajectory of `group`.
    pub fn new(group: u64) -> Self {
        Self {
            group,
            epoch: 0,
            len: 0,
            observed: 0,
            tail: 0,
            stop: Stop::None,
            attempts: 0,
            verdict: Verdict::Pending,
            runs: Vec::new(),
            columns: false,
            annotations: Vec::new(),
        }
    }

    /// Whether it can still grow.
    pub fn is_partial(&self) -> bool {
        self.stop == Stop::None && self.verdict != Verdict::Late
    }

    /// Whether it is complete and waits for its reward.
    pub fn is_unscored(&self) -> bool {
        !self.is_partial() && self.verdict == Verdict::Pending
    }

    /// Whether a scorer has added its columns.
    pub fn is_annotated(&self, scorer: &str) -> bool {
        self.annotations.iter().any(|known| known.scorer == scorer)
    }

    /// Its reward, if it has one.
    pub fn reward(&self) -> Option<f64> {
        if let Verdict::Scored { reward, .. } = self.verdict { Some(reward) } else { None }
    }

    /// Version of the newest token; None when empty.
    pub fn last_version(&self) -> Option<Version> {
        self.runs.last().map(|run| run.version)
    }

    /// Whether a worker at `version` may extend it: versions never decrease along a trajectory.
    pub fn accepts(&self, version: Version) -> bool {
        self.last_version().is_none_or(|last| last <= version)
    }

    /// Version of the newest generated token; None without one.
    pub fn newest_generated(&self) -> Option<Version> {
        self.runs.iter().rev().find(|run| !run.observed).map(|run| run.version)
    }

    /// Tokens that the policy made.
    pub fn generated(&self) -> u32 {
        self.len - self.observed
    }

    /// Tokens generated under `version`, for a version not older than the newest token's.
    pub fn tokens_under(&self, version: Version) -> u32 {
        if self.last_version() == Some(version) { self.tail } else { 0 }
    }

    /// Adds a run of tokens.
    pub fn push(&mut self, run: Run) {
        self.tail = self.tokens_under(run.version) + run.generated();
        self.len += run.len;
        self.observed += run.len - run.generated();
        self.runs.push(run);
    }

    /// Segments as readers see them.
    pub fn merged(&self) -> Vec<Segment> {
        merged(&self.runs)
    }

    /// Whether its tokens came in more than one append and lie there still.
    pub fn is_scattered(&self) -> bool {
        let frame = |run: &Run| (run.file, run.frame);
        self.runs.first().map(frame) != self.runs.last().map(frame)
    }

    /// Lets the oldest tokens lie elsewhere; false, and nothing is changed, when `new` is not as many of the same
    /// segments or ends within a stored run.
    pub fn replace_oldest(&mut self, mut new: Vec<Run>) -> bool {
        let tokens: u32 = new.iter().map(|run| run.len).fold(0, u32::saturating_add);
        let (mut old, mut count) = (0, 0);
        while old < tokens && count < self.runs.len() {
            old += self.runs[count].len;
            count += 1;
        }
        if old != tokens || merged(&self.runs[..count]) != merged(&new) {
            return false;
        }
        new.extend_from_slice(&self.runs[count..]);
        new.shrink_to_fit();
        self.runs = new;
        true
    }
}

/// Length, version, temperature, observed.
pub type Segment = (u32, Version, f32, bool);

/// Neighbours of equal version, temperature and origin, as one.
fn merged(runs: &[Run]) -> Vec<Segment> {
    let mut merged: Vec<Segment> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some((len, version, temperature, observed))
                if (*version, *observed) == (run.version, run.observed)
                    && temperature.to_bits() == run.temperature.to_bits() =>
            {
                *len += run.len;
            }
            _ => merged.push((run.len, run.version, run.temperature, run.observed)),
        }
    }
    merged
}
