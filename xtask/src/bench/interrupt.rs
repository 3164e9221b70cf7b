//! Ending early: after Ctrl-C, a signal, or the end of the process that asked for the measurement.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether to end early; never, unless it watches.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on signals do not end this process: it has to [`Self::check`], and to clean up. The
    /// end of its standard input counts as one, as that is where the process that asked is.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub fn watch() -> Result<Self> {
        let watched = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            flag::register(signal, Arc::clone(&watched.0)).context("cannot handle signals")?;
        }
        let told = Arc::clone(&watched.0);
        thread::spawn(move || {
            // An error is an end as well.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            told.store(true, Ordering::Relaxed);
        });
        Ok(watched)
    }

    /// Goes on, or not.
    ///
    /// # Errors
    /// It is time to end.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.0.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}
