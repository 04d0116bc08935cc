//! Reads that go on without the store: what they were told to read stays where it is until they end.

use std::{
    collections::BTreeMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// Reads by generation; those that began before a file became dead may need it.
#[derive(Default)]
pub(crate) struct Pins {
    state: Mutex<Reads>,
    ended: Condvar,
}

#[derive(Default)]
struct Reads {
    generation: u64,
    going_on: BTreeMap<u64, usize>,
}

/// A read; it ends when this is dropped.
pub(crate) struct Pin<'a> {
    pins: &'a Pins,
    generation: u64,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, Reads> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a read; to be called before, or while the store is held in which it is looked up what is read.
    pub(crate) fn pin(&self) -> Pin<'_> {
        let mut reads = self.lock();
        let generation = reads.generation;
        *reads.going_on.entry(generation).or_default() += 1;
        Pin { pins: self, generation }
    }

    /// Waits until every read has ended that has begun.
    pub(crate) fn wait(&self) {
        let mut reads = self.lock();
        let newest = reads.generation;
        reads.generation += 1;
        while reads.going_on.range(..=newest).next().is_some() {
            reads = self.ended.wait(reads).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let mut reads = self.pins.lock();
        if let Some(count) = reads.going_on.get_mut(&self.generation) {
            *count -= 1;
            if *count == 0 {
                reads.going_on.remove(&self.generation);
                self.pins.ended.notify_all();
            }
        }
    }
}
