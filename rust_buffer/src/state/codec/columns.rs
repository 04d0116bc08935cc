//! Appends: a column for each field, one value where all items have it, and nothing where all have the default.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::{
    state::record::Appended,
    state::trajectory::{Stop, Version},
};

/// Values of the items.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Column<T> {
    Each(Vec<T>),
    All(T),
}

impl<T: Clone + PartialEq> Column<T> {
    fn of(values: Vec<T>) -> Self {
        match values.first() {
            Some(first) if values.len() > 1 && values.iter().all(|value| value == first) => Self::All(first.clone()),
            _ => Self::Each(values),
        }
    }

    /// None where all items have the default.
    fn sparse(values: Vec<T>) -> Option<Self>
    where
        T: Default,
    {
        let default = T::default();
        if values.iter().all(|value| *value == default) { None } else { Some(Self::of(values)) }
    }

    fn take(self, len: usize) -> Result<Vec<T>, String> {
        match self {
            Self::All(value) => Ok(vec![value; len]),
            Self::Each(values) if values.len() == len => Ok(values),
            Self::Each(values) => Err(format!("a column of {} values for {len} items", values.len())),
        }
    }
}

fn filled<T: Clone + Default + PartialEq>(column: Option<Column<T>>, len: usize) -> Result<Vec<T>, String> {
    column.map_or_else(|| Ok(vec![T::default(); len]), |column| column.take(len))
}

/// Ids of trajectories.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Ids {
    List(Vec<u64>),
    /// The difference of each to the one before (to 0 for the first), its sign in the lowest bit, seven bits a byte from
    /// the lowest on; the highest bit of a byte says that more follow.
    Differences(ByteBuf),
}

impl Ids {
    fn differences(ids: impl Iterator<Item = u64>) -> Self {
        let (mut bytes, mut last) = (Vec::new(), 0);
        for id in ids {
            let difference = id.wrapping_sub(last) as i64;
            let mut left = ((difference << 1) ^ (difference >> 63)) as u64;
            while left >= 0x80 {
                bytes.push(left as u8 | 0x80);
                left >>= 7;
            }
            bytes.push(left as u8);
            last = id;
        }
        Self::Differences(ByteBuf::from(bytes))
    }

    fn list(self) -> Result<Vec<u64>, String> {
        let bytes = match self {
            Self::List(ids) => return Ok(ids),
            Self::Differences(bytes) => bytes,
        };
        let (mut ids, mut last, mut value, mut shift) = (Vec::new(), 0_u64, 0_u64, 0);
        for byte in bytes {
            if shift > 63 {
                return Err("the difference of two ids has more than 64 bits".to_owned());
            }
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                last = last.wrapping_add((value >> 1) ^ (value & 1).wrapping_neg());
                ids.push(last);
                (value, shift) = (0, 0);
            }
        }
        if shift == 0 { Ok(ids) } else { Err("the ids end within one".to_owned()) }
    }
}

/// The fields of an append.
#[derive(Serialize, Deserialize)]
pub struct Columns {
    trajectory: Ids,
    len: Column<u32>,
    version: Column<Version>,
    temperature: Column<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    observed: Option<Column<bool>>,
    /// Numbers of `Stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stop: Option<Column<u8>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    over: Option<Column<u32>>,
    /// Names and dtypes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    extra: Vec<Vec<(String, String)>>,
    /// Of the items with tokens, where they lie in one array: CRC32C, four bytes each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crc: Option<ByteBuf>,
}

impl Columns {
    pub fn of(items: &[Appended]) -> Self {
        let extra = items.iter().any(|item| !item.extra.is_empty());
        let ids = items.iter().map(|item| item.trajectory);
        let crc: Vec<u8> = items.iter().filter_map(|item| item.crc).flat_map(u32::to_le_bytes).collect();
        Self {
            trajectory: if crc.is_empty() { Ids::List(ids.collect()) } else { Ids::differences(ids) },
            len: Column::of(items.iter().map(|item| item.len).collect()),
            version: Column::of(items.iter().map(|item| item.version).collect()),
            temperature: Column::of(items.iter().map(|item| item.temperature).collect()),
            observed: Column::sparse(items.iter().map(|item| item.observed).collect()),
            stop: Column::sparse(items.iter().map(|item| item.stop.unwrap_or(Stop::None) as u8).collect()),
            over: Column::sparse(items.iter().map(|item| item.over).collect()),
            extra: if extra { items.iter().map(|item| item.extra.clone()).collect() } else { Vec::new() },
            crc: (!crc.is_empty()).then(|| ByteBuf::from(crc)),
        }
    }

    pub fn items(self) -> Result<Vec<Appended>, String> {
        let trajectories = self.trajectory.list()?;
        let count = trajectories.len();
        let (len, version, temperature) =
            (self.len.take(count)?, self.version.take(count)?, self.temperature.take(count)?);
        let (observed, stop, over) =
            (filled(self.observed, count)?, filled(self.stop, count)?, filled(self.over, count)?);
        if !self.extra.is_empty() && self.extra.len() != count {
            return Err(format!("columns of {} items for {count}", self.extra.len()));
        }
        let packed = self.crc.is_some();
        let crcs = self.crc.unwrap_or_default();
        let mut crcs = crcs.chunks_exact(4).map(|crc| u32::from_le_bytes([crc[0], crc[1], crc[2], crc[3]]));
        let mut extra = self.extra.into_iter();
        let item = |(index, trajectory)| {
            Ok(Appended {
                trajectory,
                len: len[index],
                version: version[index],
                temperature: temperature[index],
                observed: observed[index],
                stop: Some(Stop::numbered(stop[index])?).filter(|stop| *stop != Stop::None),
                extra: extra.next().unwrap_or_default(),
                over: over[index],
                crc: (packed && len[index] > 0).then(|| crcs.next().ok_or("a checksum is missing")).transpose()?,
            })
        };
        trajectories.into_iter().enumerate().map(item).collect()
    }
}
