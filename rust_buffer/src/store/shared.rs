//! The store shared by threads: one lock, one condition variable, and every wait with a deadline.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    clock::{Micros, micros},
    error::{Result, StoreError},
    log::{Durability, Log, Lsn},
    store::Store,
    store::pins::Pins,
};

/// Time that a record may take to be durable before its call fails.
const SYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time that a wait goes without asking whether it is interrupted.
const SLICE: Duration = Duration::from_millis(100);

/// The store, and whether it is closed.
pub(super) struct Guarded {
    pub(super) store: Store,
    pub(super) closed: bool,
}

/// The store and its waiters.
pub struct Shared {
    guarded: Mutex<Guarded>,
    changed: Condvar,
    /// Wakes the compactor.
    pub(super) work: Condvar,
    pub(super) compactor: Mutex<Option<JoinHandle<()>>>,
    pub(super) pins: Pins,
    log: Log,
    durability: Durability,
    start: Instant,
}

/// The caller's clock: a start, and real time since the call.
#[derive(Clone, Copy)]
pub struct Clock {
    base: Micros,
    since: Instant,
    interrupted: Option<Interrupted>,
}

/// Whether a wait is to end with `Interrupted`; it is asked a few times a second, without the store's lock.
pub type Interrupted = fn() -> bool;

impl Clock {
    /// The time of the call.
    pub fn base(self) -> Micros {
        self.base
    }

    /// The same, for a wait that `interrupted` can end.
    #[must_use]
    pub fn interruptible(self, interrupted: Option<Interrupted>) -> Self {
        Self { interrupted, ..self }
    }

    fn now(self) -> Micros {
        self.base.saturating_add(i64::try_from(self.since.elapsed().as_micros()).unwrap_or(i64::MAX))
    }
}

impl Shared {
    /// Shares `store`.
    pub fn new(store: Store) -> Self {
        let (log, durability) = (store.log().clone(), store.settings.durability);
        let guarded = Mutex::new(Guarded { store, closed: false });
        let (changed, work, compactor, pins) = (Condvar::new(), Condvar::new(), Mutex::default(), Pins::default());
        Self { guarded, changed, work, compactor, pins, log, durability, start: Instant::now() }
    }

    /// The log, for reads that need not hold the store.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The clock of a call: `now_s`, or the monotonic clock.
    pub fn clock(&self, now_s: Option<f64>) -> Clock {
        let since = Instant::now();
        let base = now_s.unwrap_or_else(|| since.duration_since(self.start).as_secs_f64());
        Clock { base: micros(base), since, interrupted: None }
    }

    pub(super) fn lock(&self) -> Result<MutexGuard<'_, Guarded>> {
        self.log.begin()?;
        let guarded = self.guarded.lock().map_err(|_| StoreError::Poisoned { detail: "a call panicked".to_owned() })?;
        if guarded.closed { Err(StoreError::Closed) } else { Ok(guarded) }
    }

    fn wake_compactor(&self, guarded: &Guarded) {
        if guarded.store.live.is_due() {
            self.work.notify_one();
        }
    }

    /// Runs a query.
    ///
    /// # Errors
    /// Those of the query, or `Closed`.
    pub fn query<T>(&self, run: impl FnOnce(&Store) -> Result<T>) -> Result<T> {
        run(&self.lock()?.store)
    }

    /// Runs a change, wakes the waiters, and, if `wait`, waits until it is as durable as the settings promise.
    ///
    /// # Errors
    /// Those of the change, or `Closed`.
    pub fn change<T>(&self, wait: bool, run: impl FnOnce(&mut Store) -> Result<T>) -> Result<(Lsn, T)> {
        let mut guarded = self.lock()?;
        let before = guarded.store.signature();
        let answer = run(&mut guarded.store);
        let (lsn, after) = (guarded.store.lsn(), guarded.store.signature());
        self.wake_compactor(&guarded);
        drop(guarded);
        if before != after {
            self.changed.notify_all();
        }
        let answer = answer.inspect_err(|_| self.log.wake())?;
        if wait {
            self.acknowledge(lsn)?;
        } else {
            self.log.wake();
        }
        Ok((lsn, answer))
    }

    /// Repeats `attempt` after each change and deadline until it has an answer; None after `timeout_s`.
    ///
    /// # Errors
    /// Those of the attempt, or `Closed`.
    pub fn wait<T>(
        &self, timeout_s: f64, clock: Clock, mut attempt: impl FnMut(&mut Store, Micros) -> Result<Option<T>>,
    ) -> Result<Option<(Lsn, T)>> {
        let deadline = clock.base.saturating_add(micros(timeout_s.max(0.0)));
        let mut guarded = self.lock()?;
        // A simulator's clock stands still unless we really wait.
        let mut now = clock.base;
        loop {
            let (before, signature) = (guarded.store.lsn(), guarded.store.signature());
            let answer = guarded.store.expire(now).and_then(|()| attempt(&mut guarded.store, now));
            self.wake_compactor(&guarded);
            let lsn = guarded.store.lsn();
            // What is handed out changes no record, but the deadline that others wait for.
            if lsn != before || guarded.store.signature() != signature {
                self.changed.notify_all();
            }
            if let Ok(Some(answer)) = answer {
                drop(guarded);
                self.acknowledge(lsn)?;
                return Ok(Some((lsn, answer)));
            }
            if lsn != before {
                self.log.wake();
            }
            answer?;
            if now >= deadline {
                return Ok(None);
            }
            let until = guarded.store.next_deadline().map_or(deadline, |next| next.clamp(now + 1, deadline));
            let pause = Duration::from_micros(u64::try_from(until.saturating_sub(now)).unwrap_or(0));
            let slice = if clock.interrupted.is_some() { pause.min(SLICE) } else { pause };
            let woken = self.changed.wait_timeout(guarded, slice);
            let (mut locked, waited) =
                woken.map_err(|_| StoreError::Poisoned { detail: "a call panicked".to_owned() })?;
            if waited.timed_out() && clock.interrupted.is_some() {
                // A handler of the signal may call the store.
                drop(locked);
                refuse_interrupted(clock.interrupted)?;
                locked = self.lock()?;
            }
            guarded = locked;
            if guarded.closed {
                return Err(StoreError::Closed);
            }
            now = clock.now();
        }
    }

    /// Waits until record `lsn`, or the newest one, and all before it are as durable as the settings promise; false when
    /// that takes longer than `timeout`.
    ///
    /// # Errors
    /// Those of the log, `Interrupted`, or `Closed`.
    pub fn wait_durable(&self, lsn: Option<Lsn>, timeout: Duration, interrupted: Option<Interrupted>) -> Result<bool> {
        let newest = self.query(|store| Ok(store.lsn()))?;
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            if self.log.wait_durable(lsn.unwrap_or(newest), left.min(SLICE))? {
                return Ok(true);
            }
            if left <= SLICE {
                return Ok(false);
            }
            refuse_interrupted(interrupted)?;
        }
    }

    /// Brings every record so far to the disk, at level `Os` too; the newest of them.
    ///
    /// # Errors
    /// Those of the log, or `Closed`.
    pub fn sync(&self) -> Result<Lsn> {
        let lsn = self.query(|store| Ok(store.lsn()))?;
        self.synced(lsn).map(|()| lsn)
    }

    fn acknowledge(&self, lsn: Lsn) -> Result<()> {
        if self.durability == Durability::Os { Ok(()) } else { self.synced(lsn) }
    }

    fn synced(&self, lsn: Lsn) -> Result<()> {
        if self.log.sync_through(lsn, SYNC_TIMEOUT)? {
            return Ok(());
        }
        let detail = format!("record {lsn} is not on disk after {} s", SYNC_TIMEOUT.as_secs());
        Err(StoreError::Poisoned { detail })
    }

    /// Syncs, wakes every waiter with `Closed` and releases the lock. Safe to repeat.
    ///
    /// # Errors
    /// A failed sync.
    pub fn close(&self) -> Result<()> {
        if self.log.begin().is_err() {
            return Ok(());
        }
        let mut guarded = self.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut guarded.closed, true) {
            return Ok(());
        }
        guarded.store.snapshots.finish();
        drop(guarded);
        self.changed.notify_all();
        self.work.notify_all();
        if let Some(compactor) = self.compactor.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic there has nothing to tell that the log does not know.
            let _ = compactor.join();
        }
        self.log.close()
    }
}

fn refuse_interrupted(interrupted: Option<Interrupted>) -> Result<()> {
    if interrupted.is_some_and(|interrupted| interrupted()) { Err(StoreError::Interrupted) } else { Ok(()) }
}
