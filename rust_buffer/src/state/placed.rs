//! Where a record lies, and with it the tokens that it brings.

use crate::{
    error::{Result, StoreError},
    log::{Frame, Location, Lsn},
    state::record::Appended,
    state::trajectory::Run,
};

/// Where a record is.
#[allow(missing_docs, reason = "fields that say themselves")]
pub struct Placed {
    pub location: Location,
    pub lsn: Lsn,
    /// Offset in the frame and checksum of each array.
    pub arrays: Vec<(u32, u32)>,
}

impl From<&Frame> for Placed {
    fn from(frame: &Frame) -> Self {
        let arrays = frame.parts().map(|part| (part.at, part.crc)).collect();
        Self { location: frame.location(), lsn: frame.lsn(), arrays }
    }
}

impl Placed {
    /// Where the tokens of each item lie; None for those without any.
    ///
    /// # Errors
    /// `Conflict` when the record has too few arrays for them.
    pub fn runs(&self, items: &[Appended]) -> Result<Vec<Option<Run>>> {
        let mut arrays = self.arrays.iter().copied();
        // Behind one another in the first array, if each item has its own checksum.
        let mut packed = self.arrays.first().map_or(0, |(at, _)| u64::from(*at));
        let mut place = |item: &Appended| -> Option<(u32, u32)> {
            let Some(crc) = item.crc else {
                let own = arrays.next();
                (&mut arrays).take(item.extra.len()).for_each(drop);
                return own;
            };
            let at = u32::try_from(packed).ok()?;
            packed += (u64::from(item.len) * if item.observed { 4 } else { 8 }).next_multiple_of(8);
            Some((at, crc))
        };
        let run = |item: &Appended| {
            if item.len == 0 {
                return Ok(None);
            }
            let missing = || StoreError::Conflict(format!("no tokens for trajectory {}", item.trajectory));
            let (at, crc) = place(item).ok_or_else(missing)?;
            let Appended { len, version, temperature, observed, .. } = *item;
            let Location { file, offset: frame, .. } = self.location;
            Ok(Some(Run { len, version, temperature, observed, file, frame, at, crc }))
        };
        items.iter().map(run).collect()
    }
}
