//! Appends: a column for each field, one value where all items have it, and nothing where all have the default.

use serde::{Deserialize, Serialize};

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

/// The fields of an append.
#[derive(Serialize, Deserialize)]
pub struct Columns {
    trajectory: Vec<u64>,
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
}

impl Columns {
    pub fn of(items: &[Appended]) -> Self {
        let extra = items.iter().any(|item| !item.extra.is_empty());
        Self {
            trajectory: items.iter().map(|item| item.trajectory).collect(),
            len: Column::of(items.iter().map(|item| item.len).collect()),
            version: Column::of(items.iter().map(|item| item.version).collect()),
            temperature: Column::of(items.iter().map(|item| item.temperature).collect()),
            observed: Column::sparse(items.iter().map(|item| item.observed).collect()),
            stop: Column::sparse(items.iter().map(|item| item.stop.unwrap_or(Stop::None) as u8).collect()),
            over: Column::sparse(items.iter().map(|item| item.over).collect()),
            extra: if extra { items.iter().map(|item| item.extra.clone()).collect() } else { Vec::new() },
        }
    }

    pub fn items(self) -> Result<Vec<Appended>, String> {
        let count = self.trajectory.len();
        let (len, version, temperature) =
            (self.len.take(count)?, self.version.take(count)?, self.temperature.take(count)?);
        let (observed, stop, over) =
            (filled(self.observed, count)?, filled(self.stop, count)?, filled(self.over, count)?);
        if !self.extra.is_empty() && self.extra.len() != count {
            return Err(format!("columns of {} items for {count}", self.extra.len()));
        }
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
            })
        };
        self.trajectory.into_iter().enumerate().map(item).collect()
    }
}
