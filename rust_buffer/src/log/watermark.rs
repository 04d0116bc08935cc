//! Which records are written and which are durable, and who waits for that: the one piece of the log in which threads
//! meet. `loom` runs it through all their orders, so it takes locks from here and knows no file.

#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};
use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};

use super::Lsn;
use crate::error::{Result, StoreError};

/// Whether records are taken.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Open,
    Closed,
    ReadOnly,
}

struct State {
    written: Lsn,
    /// Newest LSN that is as durable as the level promises.
    durable: Lsn,
    /// Newest LSN known to be on disk.
    synced: Lsn,
    /// Highest LSN that somebody waits for.
    wanted: Lsn,
    /// The sync thread waits for work without a deadline.
    idle: bool,
    /// Somebody syncs.
    syncing: bool,
    failed: Option<String>,
    access: Access,
}

impl State {
    fn healthy(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), |detail| Err(StoreError::Poisoned { detail }))
    }
}

/// Whether the caller is to sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// Yes: all that is written up to here; `end_sync` or `fail` must follow.
    Ours(Lsn),
    /// No: what it asked for is on disk.
    Done,
    /// No: another's sync has not ended in time.
    TimedOut,
}

/// What appenders, the sync thread and waiters share.
pub(super) struct Watermark {
    state: Mutex<State>,
    /// Wakes the sync thread.
    work: Condvar,
    /// Wakes who waits for durability or for its turn to sync.
    done: Condvar,
}

impl Watermark {
    /// That of a log whose records up to `last` are on disk.
    pub(super) fn new(last: Lsn, access: Access) -> Self {
        let (written, durable, synced) = (last, last, last);
        let state = State { written, durable, synced, wanted: 0, idle: false, syncing: false, failed: None, access };
        Self { state: Mutex::new(state), work: Condvar::new(), done: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether records are taken, and the synced LSN if nothing has failed.
    pub(super) fn access(&self) -> (Access, Result<Lsn>) {
        let state = self.lock();
        (state.access, state.healthy().map(|()| state.synced))
    }

    /// LSN of the last record written.
    pub(super) fn written(&self) -> Lsn {
        self.lock().written
    }

    /// LSN of the last record that is as durable as the level promises.
    pub(super) fn durable(&self) -> Lsn {
        self.lock().durable
    }

    /// Notes that record `lsn` is written, after all before it; `durable` where that is all that the level promises.
    pub(super) fn wrote(&self, lsn: Lsn, durable: bool) {
        let mut state = self.lock();
        state.written = lsn;
        if durable {
            state.durable = lsn;
        }
    }

    /// Has the sync thread sync what is written: at once if it was idle.
    pub(super) fn wake(&self) {
        let state = self.lock();
        if state.idle && state.written > state.durable {
            self.work.notify_one();
        }
    }

    /// The caller's turn to sync, unless `lsn`, or all that is written, gets on disk before: one syncs at a time.
    ///
    /// # Errors
    /// `Poisoned`: no sync may begin after a failure.
    pub(super) fn begin_sync(&self, lsn: Lsn, timeout: Duration) -> Result<Turn> {
        let start = Instant::now();
        let mut state = self.lock();
        let lsn = lsn.min(state.written);
        while state.synced < lsn {
            state.healthy()?;
            if !state.syncing {
                state.syncing = true;
                return Ok(Turn::Ours(state.written));
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(Turn::TimedOut);
            }
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Turn::Done)
    }

    /// Notes that record `lsn` and all before it are on disk.
    pub(super) fn synced(&self, lsn: Lsn) {
        self.raise(&mut self.lock(), lsn);
    }

    /// The same, at the end of the caller's turn.
    pub(super) fn end_sync(&self, lsn: Lsn) {
        let mut state = self.lock();
        state.syncing = false;
        self.raise(&mut state, lsn);
    }

    fn raise(&self, state: &mut State, lsn: Lsn) {
        state.synced = state.synced.max(lsn);
        state.durable = state.durable.max(lsn);
        self.done.notify_all();
    }

    /// Records the first failure, after which nobody has a turn, and wakes everybody.
    pub(super) fn fail(&self, error: &StoreError) {
        self.lock().failed.get_or_insert_with(|| error.to_string());
        self.work.notify_all();
        self.done.notify_all();
    }

    /// Refuses records, and ends the sync thread.
    pub(super) fn close(&self) {
        self.lock().access = Access::Closed;
        self.work.notify_all();
    }

    /// The sync thread: calls `sync` at once when the log was idle or somebody waits, else every `interval`, until the
    /// log is closed or has failed.
    pub(super) fn keep_synced(&self, interval: Duration, mut sync: impl FnMut() -> Result<()>) {
        let mut due = Instant::now();
        loop {
            let mut state = self.lock();
            loop {
                if state.access != Access::Open || state.failed.is_some() {
                    return;
                }
                let wait = due.saturating_duration_since(Instant::now());
                if state.written == state.durable {
                    state.idle = true;
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                    state.idle = false;
                } else if state.wanted > state.durable || wait.is_zero() {
                    break;
                } else {
                    state = self.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
            drop(state);
            due = Instant::now() + interval;
            if sync().is_err() {
                return;
            }
        }
    }

    /// Waits until record `lsn` and all before it are durable; false when `timeout` passed first.
    ///
    /// # Errors
    /// `Poisoned` when they will never be, `Conflict` when `lsn` is not yet written.
    pub(super) fn wait(&self, lsn: Lsn, timeout: Duration) -> Result<bool> {
        let start = Instant::now();
        let mut state = self.lock();
        if lsn > state.written {
            let written = state.written;
            return Err(StoreError::Conflict(format!("LSN {lsn} is not written, the last is {written}; append first")));
        }
        if state.durable < lsn {
            state.wanted = state.wanted.max(lsn);
            self.work.notify_one();
        }
        while state.durable < lsn {
            state.healthy()?;
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(false);
            }
            state = self.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(true)
    }
}

#[cfg(all(test, loom))]
mod tests;
