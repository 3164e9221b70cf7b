//! Ending early: after Ctrl-C, a signal, or the end of the process that requested the measurement.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// Whether to end early; never, unless made by [`Self::watch`].
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on signals do not end this process: it has to [`Self::check`], and to clean up. The
    /// end of its standard input, which comes from the requesting process, counts as a signal.
    ///
    /// # Errors
    /// The kernel refuses a handler.
    pub fn watch() -> Result<Self> {
        let watched = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            flag::register(signal, Arc::clone(&watched.0)).context("cannot handle signals")?;
        }
        let interrupted = Arc::clone(&watched.0);
        thread::spawn(move || {
            // An error counts as the end, too.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            interrupted.store(true, Ordering::Relaxed);
        });
        Ok(watched)
    }

    /// Checks whether to continue.
    ///
    /// # Errors
    /// The measurement has to end early.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.0.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}
