//! The orders in which threads can meet at the watermark, by loom; 3 preemptions take half a minute, each more tenfold:
//! `LOOM_MAX_PREEMPTIONS=3 RUSTFLAGS="--cfg loom" cargo test -p rust_buffer --lib watermark -- --nocapture`

use loom::{
    sync::{Arc, Mutex},
    thread,
};

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// A log without bytes: LSNs written, and those on disk.
struct Log {
    watermark: Watermark,
    /// The writer's lock; what it guards is the newest record.
    writer: Mutex<Lsn>,
    /// The newest record on disk.
    disk: Mutex<Lsn>,
}

impl Log {
    fn new() -> Arc<Self> {
        Arc::new(Self { watermark: Watermark::new(0, Access::Open), writer: Mutex::new(0), disk: Mutex::new(0) })
    }

    /// As `Shared::write`.
    fn write(&self) -> Result<Lsn> {
        let mut writer = self.writer.lock().unwrap();
        let (access, synced) = self.watermark.access();
        assert!(synced? <= *writer);
        if access != Access::Open {
            return Err(StoreError::Closed);
        }
        *writer += 1;
        self.watermark.wrote(*writer, false);
        Ok(*writer)
    }

    /// As `Log::append`.
    fn append(&self) -> Result<Lsn> {
        let lsn = self.write()?;
        self.watermark.wake();
        Ok(lsn)
    }

    /// As `Shared::sync_until`: the disk has what was written when the sync began.
    fn sync(&self, lsn: Lsn, fails: bool) -> Result<()> {
        let Turn::Ours(target) = self.watermark.begin_sync(lsn, HOUR)? else { return Ok(()) };
        // Locked: another syncs too.
        let mut disk = self.disk.try_lock().unwrap();
        if fails {
            let error = StoreError::Closed;
            self.watermark.fail(&error);
            return Err(error);
        }
        *disk = target;
        drop(disk);
        drop(self.writer.lock().unwrap());
        self.watermark.end_sync(target);
        Ok(())
    }

    /// As `Log::write` and `Log::commit`.
    fn write_and_sync(&self, fails: bool) -> Result<()> {
        let lsn = self.write()?;
        self.sync(lsn, fails)?;
        assert!(self.watermark.durable() >= lsn);
        assert!(*self.disk.lock().unwrap() >= lsn, "called durable before a sync that covers it");
        Ok(())
    }

    /// As `Shared::close`: what is written is synced by who closes.
    fn close(&self) {
        self.watermark.close();
        drop(self.writer.lock().unwrap());
        self.sync(Lsn::MAX, false).unwrap();
    }

    fn append_and_wait(&self) -> Result<bool> {
        let lsn = self.append()?;
        let durable = self.watermark.wait(lsn, HOUR)?;
        assert!(self.watermark.durable() >= lsn);
        assert!(*self.disk.lock().unwrap() >= lsn, "called durable before a sync that covers it");
        Ok(durable)
    }
}

fn sync_thread(log: &Arc<Log>, interval: Duration, fails: bool) -> thread::JoinHandle<()> {
    let log = Arc::clone(log);
    thread::spawn(move || log.watermark.keep_synced(interval, || log.sync(Lsn::MAX, fails)))
}

/// Runs `run` in every order of its threads and prints how many there were.
fn in_every_order(name: &str, run: impl Fn() + Sync + Send + 'static) {
    let orders = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&orders);
    loom::model(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        run();
    });
    println!("{name}: {} orders", orders.load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_record_is_durable_only_after_a_sync_that_began_after_it() {
    for interval in [Duration::ZERO, HOUR] {
        in_every_order("two appenders wait, one sync thread", move || {
            let log = Log::new();
            let syncing = sync_thread(&log, interval, false);
            let appender = {
                let log = Arc::clone(&log);
                thread::spawn(move || assert!(log.append_and_wait().unwrap()))
            };
            assert!(log.append_and_wait().unwrap());
            appender.join().unwrap();
            log.close();
            syncing.join().unwrap();
            assert_eq!(log.watermark.durable(), 2);
        });
    }
}

#[test]
fn appenders_that_sync_for_themselves_share_syncs() {
    in_every_order("two that commit, and a waiter", || {
        let log = Log::new();
        let appender = {
            let log = Arc::clone(&log);
            thread::spawn(move || log.write_and_sync(false).unwrap())
        };
        log.write_and_sync(false).unwrap();
        // The last one written may be the other's.
        let newest = log.watermark.written();
        assert!(log.watermark.wait(newest, HOUR).unwrap());
        appender.join().unwrap();
        assert_eq!(log.watermark.durable(), 2);
    });
    in_every_order("one that commits, one that waits for the sync thread", || {
        let log = Log::new();
        let syncing = sync_thread(&log, HOUR, false);
        let appender = {
            let log = Arc::clone(&log);
            thread::spawn(move || log.write_and_sync(false).unwrap())
        };
        assert!(log.append_and_wait().unwrap());
        appender.join().unwrap();
        log.close();
        syncing.join().unwrap();
        assert_eq!(log.watermark.durable(), 2);
    });
}

#[test]
fn a_failed_sync_wakes_every_waiter_and_nothing_is_durable_after_it() {
    in_every_order("two waiters, a sync that fails", || {
        let log = Log::new();
        let syncing = sync_thread(&log, HOUR, true);
        let appender = {
            let log = Arc::clone(&log);
            thread::spawn(move || assert!(matches!(log.append_and_wait(), Err(StoreError::Poisoned { .. }))))
        };
        assert!(matches!(log.append_and_wait(), Err(StoreError::Poisoned { .. })));
        appender.join().unwrap();
        syncing.join().unwrap();
        assert_eq!(log.watermark.durable(), 0);
        assert!(log.sync(Lsn::MAX, false).is_err(), "a sync after a failed one");
    });
    in_every_order("two that commit, every sync fails", || {
        let log = Log::new();
        let appender = {
            let log = Arc::clone(&log);
            thread::spawn(move || assert!(log.write_and_sync(true).is_err()))
        };
        assert!(log.write_and_sync(true).is_err());
        appender.join().unwrap();
        assert_eq!(log.watermark.durable(), 0);
    });
}

#[test]
fn closing_ends_the_thread_and_keeps_who_waits() {
    in_every_order("close beside an appender that waits", || {
        let log = Log::new();
        let syncing = sync_thread(&log, HOUR, false);
        let appender = {
            let log = Arc::clone(&log);
            thread::spawn(move || match log.append_and_wait() {
                Ok(durable) => assert!(durable),
                Err(error) => assert!(matches!(error, StoreError::Closed)),
            })
        };
        log.close();
        syncing.join().unwrap();
        appender.join().unwrap();
        assert_eq!(log.watermark.durable(), log.watermark.written());
    });
}
