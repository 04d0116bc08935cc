//! Quotas and admission: the only calls that are refused for want of room.

use crate::{
    error::{Result, StoreError},
    log::Arrays,
    state::group::{Kind, MAX_GROUP_SIZE},
    state::record::{Admit, Quota, Record},
    state::trajectory::{MAX_VERSION, Version},
    store::{Store, conflict},
};

/// Room kept in `max_bytes` for a token to come: 8 bytes of payload, twice if it comes in pieces, and for headers.
pub const BYTES_PER_TOKEN: u64 = 18;

/// What an admission keeps of its prompt: the arrays of its record.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// int32 token ids, little-endian.
    pub tokens: &'a [u8],
    /// Opaque bytes.
    pub metadata: &'a [u8],
    /// The text that the tokens are of; records made before texts were kept have none.
    pub text: Option<&'a str>,
}

impl<'a> Prompt<'a> {
    fn arrays(self) -> Vec<&'a [u8]> {
        [self.tokens, self.metadata].into_iter().chain(self.text.map(str::as_bytes)).collect()
    }
}

impl Store {
    /// Sets what rollout may do under `version`.
    ///
    /// # Errors
    /// `Conflict` for an empty segment budget or a version whose books are closed.
    pub fn set_quota(&mut self, version: Version, quota: Quota) -> Result<()> {
        if !(0..=MAX_VERSION).contains(&version) || quota.tokens_per_segment == Some(0) {
            return conflict(format!(
                "version {version} must be 0 to {MAX_VERSION} and tokens_per_segment >= 1 or None"
            ));
        }
        if self.state.quotas.get(&version) == Some(&quota) {
            return Ok(());
        }
        if self.state.is_closed(version) {
            return conflict(format!(
                "version {version} is older than every quota that is kept; set one for a newer version"
            ));
        }
        self.quota_changes += 1;
        self.record(&Record::Quota(version, quota), &Arrays::default()).map(drop)
    }

    /// Admits a group; answers a repeat with its id.
    ///
    /// # Errors
    /// `Full` when the quota or `max_bytes` is reached, `Conflict` for a repeat with other content or of a group that is gone.
    pub fn admit(&mut self, admit: &Admit, prompt: Prompt<'_>) -> Result<u64> {
        if let Some(id) = self.index.requests.get(&admit.request_id).copied() {
            return self.check_repeated_admission(id, admit, prompt);
        }
        if self.state.is_gone(&admit.request_id) {
            return conflict(format!(
                "request {:?} was admitted and its group is gone; use a new id",
                admit.request_id
            ));
        }
        if admit.size == 0 || admit.max_tokens == 0 || prompt.tokens.is_empty() || prompt.tokens.len() % 4 != 0 {
            return conflict(format!(
                "request {:?}: group_size ({}) and max_tokens ({}) must be >= 1 and the prompt ({} bytes) one or more int32",
                admit.request_id,
                admit.size,
                admit.max_tokens,
                prompt.tokens.len()
            ));
        }
        if admit.size > MAX_GROUP_SIZE {
            let (request, size) = (&admit.request_id, admit.size);
            return conflict(format!(
                "request {request:?}: group_size {size}, a group has at most {MAX_GROUP_SIZE} members"
            ));
        }
        if admit.prompt_len as usize != prompt.tokens.len() / 4 || prompt.tokens.chunks_exact(4).any(|id| id[3] > 0x7f)
        {
            let (request, len) = (&admit.request_id, admit.prompt_len);
            return conflict(format!("request {request:?}: the prompt is not {len} token ids of 0 to {}", i32::MAX));
        }
        let arrays = prompt.arrays();
        if admit.kind == Kind::Train {
            self.check_room(admit, arrays.iter().map(|bytes| bytes.len()).sum())?;
        }
        let id = self.state.next_group;
        self.record(&Record::Admit(admit.clone()), &Arrays::of(&arrays))?;
        Ok(id)
    }

    fn check_repeated_admission(&self, id: u64, admit: &Admit, prompt: Prompt<'_>) -> Result<u64> {
        let group = self.state.group(id)?;
        let frame = self.log.frame(group.location)?;
        let text = frame.array(2);
        let same = group.kind == admit.kind
            && group.prompt_id == admit.prompt_id
            && (group.size, group.max_tokens, group.cursor) == (admit.size, admit.max_tokens, admit.cursor)
            && group.priority == admit.priority
            && frame.array(0).unwrap_or_default() == prompt.tokens
            && frame.array(1).unwrap_or_default() == prompt.metadata
            && (text.is_none() || text == prompt.text.map(str::as_bytes));
        if same { Ok(id) } else { conflict(format!("request {:?} was admitted with other content", admit.request_id)) }
    }

    fn check_room(&self, admit: &Admit, bytes: usize) -> Result<()> {
        let groups = self.state.quotas.get(&self.state.version).map_or(0, |quota| quota.groups);
        let untrained = self.index.untrained.len() as u64;
        if untrained >= groups {
            return Err(StoreError::Full {
                what: "the number of untrained groups",
                value: untrained + 1,
                limit: groups,
                remedy: "train some or set the newest version's quota",
            });
        }
        let Some(limit) = self.settings.max_bytes else { return Ok(()) };
        let tokens = self.index.outstanding_tokens + u64::from(admit.size) * u64::from(admit.max_tokens);
        let value =
            self.log.bytes().saturating_add(tokens.saturating_mul(BYTES_PER_TOKEN)).saturating_add(bytes as u64);
        if value > limit {
            let (what, remedy) =
                ("the store's size in bytes, unfinished work included,", "raise max_bytes or evict what is archived");
            return Err(StoreError::Full { what, value, limit, remedy });
        }
        Ok(())
    }
}
