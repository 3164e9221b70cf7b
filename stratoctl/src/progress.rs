//! Progress of operations that take long: shown on standard error if that is a terminal, and
//! nowhere else.
use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Poll interval.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// An operation that is over sooner is not shown if only a spinner could be shown.
const SPINNER_DELAY: Duration = Duration::from_millis(500);

/// A progress bar that counts bytes.
pub fn bar(what: &str) -> ProgressBar {
    shown(what, "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

/// A spinner, for an operation whose progress is not known.
pub fn spinner(what: &str) -> ProgressBar {
    shown(what, "{spinner} {msg} ({elapsed})")
}

/// Turn a spinner that has existed for a while.
pub fn turn(spinner: &ProgressBar) {
    if spinner.elapsed() >= SPINNER_DELAY {
        spinner.tick();
    }
}

fn shown(what: &str, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.with_message(what.to_owned())
}

/// Run `work` in a thread of its own, and call `poll` at intervals until it is done.
///
/// # Errors
/// When the thread panics.
pub fn during<T: Send>(
    work: impl FnOnce() -> T + Send,
    mut poll: impl FnMut(),
) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let job = scope.spawn(move || sender.send(work()));
        loop {
            match receiver.recv_timeout(POLL_INTERVAL) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Timeout) => poll(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        // Joined here and not at the end of the scope, which would propagate its panic.
        let _ = job.join();
        anyhow::bail!("a thread has panicked")
    })
}
