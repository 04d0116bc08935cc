//! One file of the disk: as the page cache shows it, as the disk has it, and what may still become of the difference.

use std::collections::BTreeMap;

const SECTOR: usize = 512;

/// A random sequence, by `SplitMix64`.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % sides as u64) as usize
    }
}

/// Contents, and the end of what was ever written of it.
#[derive(Clone, Default)]
pub struct Image {
    pub bytes: Vec<u8>,
    pub data_end: usize,
}

impl Image {
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at..end].copy_from_slice(bytes);
        self.data_end = self.data_end.max(end);
    }

    pub fn resize(&mut self, len: usize) {
        self.bytes.resize(len, 0);
        self.data_end = self.data_end.min(len);
    }

    pub fn sector(&self, index: usize) -> Vec<u8> {
        let end = self.bytes.len().min((index + 1) * SECTOR);
        self.bytes.get(index * SECTOR..end).unwrap_or_default().to_vec()
    }
}

#[derive(Default)]
pub struct File {
    pub cache: Image,
    pub disk: Image,
    /// Versions of the dirty sectors, oldest first.
    dirty: BTreeMap<usize, Vec<Vec<u8>>>,
    /// Lengths since the last sync.
    lens: Vec<usize>,
}

impl File {
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let before = self.cache.bytes.len();
        self.cache.write(at, bytes);
        if self.cache.bytes.len() != before {
            self.lens.push(self.cache.bytes.len());
        }
        for index in at / SECTOR..(at + bytes.len()).div_ceil(SECTOR) {
            self.dirty.entry(index).or_default().push(self.cache.sector(index));
        }
    }

    pub fn resize(&mut self, len: usize) {
        self.cache.resize(len);
        self.lens.push(len);
    }

    pub fn sync(&mut self) {
        self.disk.resize(self.cache.bytes.len());
        for (index, versions) in std::mem::take(&mut self.dirty) {
            if let Some(bytes) = versions.last() {
                self.disk.write(index * SECTOR, bytes);
            }
        }
        self.disk.resize(self.cache.bytes.len());
        self.lens.clear();
    }

    /// Any part of what is dirty reaches the disk, the rest never will.
    pub fn sync_partly(&mut self, dice: &mut Dice) {
        let pick = dice.below(self.lens.len() + 1);
        let len = if pick == 0 { self.disk.bytes.len() } else { self.lens[pick - 1] };
        for (index, versions) in std::mem::take(&mut self.dirty) {
            if let Some(bytes) = dice.below(versions.len() + 1).checked_sub(1).map(|pick| &versions[pick]) {
                self.disk.write(index * SECTOR, bytes);
            }
        }
        self.disk.resize(len);
        self.lens.clear();
    }
}
