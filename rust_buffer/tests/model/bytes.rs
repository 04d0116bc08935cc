//! What is sent to the store and what it packs, as bytes.

use _rust_buffer::{
    store::Store,
    store::claim_view::{ClaimView, Columns, Rows},
};

use crate::{Held, Token};

fn bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn ids(tokens: &[Token]) -> Vec<u8> {
    bytes(&tokens.iter().map(|token| token.id).collect::<Vec<_>>())
}

/// A batch of one segment.
pub struct Sent<'a> {
    pub held: &'a Held,
    pub offset: u32,
    pub tokens: &'a [i32],
    pub next_version: i64,
    pub stop: Option<&'a str>,
    pub observed: bool,
}

impl Sent<'_> {
    pub fn encode(&self) -> Vec<u8> {
        let Held { trajectory, epoch, version, .. } = *self.held;
        let none: Vec<(&str, &str, u32)> = Vec::new();
        let count = self.tokens.len() as u32;
        let item = (
            trajectory,
            epoch,
            self.offset,
            count,
            version,
            1.0_f32,
            self.next_version,
            self.stop,
            self.observed,
            none,
        );
        let header = rmp_serde::to_vec(&[item]).unwrap();
        let mut batch =
            [&b"PMDB"[..], &1_u32.to_le_bytes(), &(header.len() as u32).to_le_bytes(), &[0; 4], &header].concat();
        batch.resize(batch.len().next_multiple_of(8), 0);
        batch.extend(bytes(self.tokens));
        if !self.observed {
            batch.extend(bytes(self.tokens));
        }
        batch.resize(batch.len().next_multiple_of(8), 0);
        batch
    }
}

pub struct Packed {
    pub tokens: Vec<i32>,
    pub versions: Vec<i32>,
    pub mask: Vec<u8>,
    pub rows: Rows,
}

impl Packed {
    pub fn of(store: &Store, iteration: i64) -> Self {
        let view = ClaimView::new(store.state(), iteration).unwrap();
        let len = view.num_tokens().unwrap();
        let [mut tokens, mut logprobs, mut versions, mut temperatures] = [(); 4].map(|()| vec![9; 4 * len]);
        let mut mask = vec![9; len];
        let mut columns = Columns {
            tokens: &mut tokens,
            logprobs: &mut logprobs,
            versions: &mut versions,
            temperatures: &mut temperatures,
            mask: &mut mask,
        };
        let rows = view.pack(store.log(), &mut columns, true).unwrap();
        let numbers = |bytes: &[u8]| bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
        let (tokens, versions): (Vec<i32>, Vec<i32>) = (numbers(&tokens), numbers(&versions));
        let silent = mask.iter().map(|mask| mask & 1 == 0);
        assert!(
            numbers(&logprobs)
                .iter()
                .zip(&tokens)
                .zip(silent)
                .all(|((p, t), silent)| *p == if silent { 0 } else { *t })
        );
        Self { tokens, versions, mask, rows }
    }
}
