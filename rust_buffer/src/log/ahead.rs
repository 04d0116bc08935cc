//! The next file is made before it is needed, in a thread of its own, so that nobody waits for it.

use std::sync::{Condvar, Mutex, PoisonError};

use super::{lock, writer::Prepared};
use crate::error::Result;

enum Slot {
    Empty,
    /// The number of the file to make.
    Wanted(u32),
    Making,
    Ready(Prepared),
    Closed,
}

/// What the writer and the thread share.
pub(super) struct Ahead {
    slot: Mutex<Slot>,
    changed: Condvar,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { slot: Mutex::new(Slot::Empty), changed: Condvar::new() }
    }

    /// Has file `number` made, unless one is.
    pub(super) fn want(&self, number: u32) {
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Empty) {
            *slot = Slot::Wanted(number);
            self.changed.notify_all();
        }
    }

    /// File `number` if it is made; with `wait` also if it is being made.
    pub(super) fn take(&self, number: u32, wait: bool) -> Option<Prepared> {
        let mut slot = lock(&self.slot);
        while wait && matches!(*slot, Slot::Making) {
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        match std::mem::replace(&mut *slot, Slot::Empty) {
            Slot::Ready(made) if made.number == number => Some(made),
            // Whoever waits makes it now.
            Slot::Wanted(_) if wait => None,
            other => {
                *slot = other;
                None
            }
        }
    }

    /// The thread.
    pub(super) fn run(&self, build: impl Fn(u32) -> Result<Prepared>) {
        let mut slot = lock(&self.slot);
        loop {
            match *slot {
                Slot::Closed => return,
                Slot::Wanted(number) => {
                    *slot = Slot::Making;
                    drop(slot);
                    let made = build(number);
                    slot = lock(&self.slot);
                    let closed = matches!(*slot, Slot::Closed);
                    *slot = match made {
                        _ if closed => Slot::Closed,
                        Ok(made) => Slot::Ready(made),
                        // Nothing is written to it yet: whoever needs it makes it, and meets the error if it lasts.
                        Err(_) => Slot::Empty,
                    };
                    self.changed.notify_all();
                }
                _ => slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Ends the thread.
    pub(super) fn close(&self) {
        *lock(&self.slot) = Slot::Closed;
        self.changed.notify_all();
    }
}
