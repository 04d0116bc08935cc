//! The thread that compacts a store beside those who use it, and the deletion of files that nothing needs.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
    time::Duration,
};

use crate::{
    error::{Result, StoreError, is_no_space},
    store::Store,
    store::compaction::Work,
    store::pins::Pin,
    store::shared::Shared,
    store::snapshot::Task,
};

/// Time until it is tried again, where the disk has no room for a copy.
const PAUSE: Duration = Duration::from_secs(1);

impl Shared {
    /// Starts the thread; it ends when the store is closed. Where none can be had, the log stays as it is written.
    pub fn keep_compact(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name("store-compact".into()).spawn(move || shared.compacting());
        *self.compactor.lock().unwrap_or_else(PoisonError::into_inner) = thread.ok();
    }

    fn compacting(&self) {
        // Of a failure of the log everybody is told.
        while let Ok(Some((work, pin))) = self.await_work() {
            match self.compact(work, pin).and_then(|()| self.remove_dead_files()) {
                Ok(()) => {}
                Err(error) if is_full(&error) => {
                    if !self.pause() {
                        return;
                    }
                }
                Err(StoreError::Closed) => return,
                // Nobody waits for this thread: without it the log would grow, and nobody would be told.
                Err(error) => return drop(self.log().poison(error)),
            }
        }
    }

    /// The next thing to be done; None once the store is closed.
    fn await_work(&self) -> Result<Option<(Work, Pin<'_>)>> {
        let mut guarded = self.lock()?;
        loop {
            if guarded.closed {
                return Ok(None);
            }
            if let Some(work) = guarded.store.next_work() {
                return Ok(Some((work, self.pins.pin())));
            }
            guarded = self.work.wait(guarded).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn compact(&self, work: Work, pin: Pin<'_>) -> Result<()> {
        let file = work.file();
        for plan in work.plans() {
            let copies = plan.read(self.log());
            let mut guarded = self.lock()?;
            let written = guarded.store.rewrite(&copies);
            if matches!(written, Err(StoreError::NoSpace { .. })) {
                guarded.store.live.give_back(copies.trajectories());
            }
            drop(guarded);
            self.log().wake();
            written?;
        }
        drop(pin);
        self.lock()?.store.emptied(file);
        Ok(())
    }

    /// False once the store is closed.
    fn pause(&self) -> bool {
        let Ok(guarded) = self.lock() else { return false };
        self.work
            .wait_timeout_while(guarded, PAUSE, |guarded| !guarded.closed)
            .is_ok_and(|(guarded, _)| !guarded.closed)
    }

    /// Writes a snapshot now, beside those who use the store.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn write_snapshot(&self) -> Result<()> {
        let task = self.query(|store| Ok(store.snapshots.task(&store.state, &store.log)))?;
        task.write(self.log())
    }

    /// Deletes the log files of which nothing is needed, once nobody reads in them; writes a snapshot first where
    /// recovery would need them, if they hold more than that.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn remove_dead_files(&self) -> Result<()> {
        let (dead, snapshot) = self.query(|store| Ok(store.dead_files()))?;
        if dead.is_empty() {
            return Ok(());
        }
        if let Some(snapshot) = snapshot {
            snapshot.write(self.log())?;
        }
        self.pins.wait();
        if self.log().remove_files(|number| dead.contains(&number))? > 0 {
            if let Ok(mut guarded) = self.lock() {
                guarded.store.is_full = false;
            }
        }
        Ok(())
    }
}

/// Whether the disk has no room.
fn is_full(error: &StoreError) -> bool {
    match error {
        StoreError::NoSpace { .. } => true,
        StoreError::Io { source, .. } => is_no_space(source),
        _ => false,
    }
}

impl Store {
    /// Sealed files of which nothing is needed, and the snapshot that has to be written before they can go.
    fn dead_files(&self) -> (BTreeSet<u32>, Option<Task>) {
        let mut dead = self.log.sealed();
        dead.retain(|file, _| self.is_dead(*file));
        let snapshot = self.log.snapshot_position().file;
        let behind: u64 = dead.range(snapshot..).map(|(_, bytes)| bytes).sum();
        if behind > self.live.snapshot_bytes(&self.state) || (self.is_full && behind > 0) {
            let task = self.snapshots.task(&self.state, &self.log);
            return (dead.into_keys().collect(), Some(task));
        }
        (dead.range(..snapshot).map(|(file, _)| *file).collect(), None)
    }
}
