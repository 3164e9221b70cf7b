//! A client that lets the guest write record after record to its disk, and remembers how many were
//! acknowledged.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::client::Client;
use crate::lab::namespace::Namespace;
use crate::monitor::SOON;

/// A client that records, in a thread of its own; ended when dropped.
pub struct Recorder {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    failed: Mutex<Option<String>>,
}

impl Recorder {
    /// Connects from `namespace`, once, and begins. After each answer it waits for `pause`.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(namespace: &Namespace, pause: Duration) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = namespace.spawn("recorder", move || {
            if let Err(error) = record(&theirs, pause) {
                let mut failed = theirs.failed.lock().unwrap_or_else(PoisonError::into_inner);
                *failed = Some(format!("{error:#}"));
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many records the guest has acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits for that many more.
    ///
    /// # Errors
    /// They do not come within `limit`, or something is wrong.
    pub fn wait(&self, more: u64, limit: Duration) -> Result<()> {
        let (deadline, enough) = (Instant::now() + limit, self.acknowledged() + more);
        while self.acknowledged() < enough {
            let failed = self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(error) = &*failed {
                bail!("the recorder: {error}");
            }
            drop(failed);
            ensure!(Instant::now() < deadline, "{more} records do not come within {limit:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Ends it; how many were acknowledged.
    #[must_use]
    pub fn finish(mut self) -> u64 {
        self.end();
        self.acknowledged()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // A panic there has been printed.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end();
    }
}

fn record(shared: &Shared, pause: Duration) -> Result<()> {
    let mut client = Client::here(SOON)?;
    while !shared.stop.load(Ordering::SeqCst) {
        let number = client.record(SOON)?;
        let last = shared.acknowledged.swap(number, Ordering::SeqCst);
        ensure!(number > last, "record {number} was written again: {last} was acknowledged");
        std::thread::sleep(pause);
    }
    Ok(())
}
