//! Threads that help to build a machine, and serve something else once it is built.
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread,
    time::Duration,
};

/// Something for another thread to do.
pub type Task = Box<dyn FnOnce() + Send>;

/// Carries out tasks on other threads while a machine is built; clones share these threads. By
/// default there is a new thread for each task.
#[derive(Clone)]
pub struct Helpers(Arc<dyn Fn(Task) + Send + Sync>);

impl Helpers {
    /// `give` has a thread carry out a task, and does not wait for it. A task that cannot be carried
    /// out is dropped. At least three tasks must be possible at the same time: taking in a machine,
    /// opening KVM for it, and building its devices.
    pub fn new(give: impl Fn(Task) + Send + Sync + 'static) -> Self {
        Self(Arc::new(give))
    }

    /// Have another thread do `work`.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Pending<T> {
        let (report, result) = channel();
        (self.0)(Box::new(move || {
            // Nobody waits for it any more if this fails.
            let _ = report.send(work());
        }));
        Pending(result)
    }
}

impl Default for Helpers {
    fn default() -> Self {
        Self::new(|task| {
            // If the host refuses the thread, the task is dropped.
            let _ = thread::Builder::new().spawn(task);
        })
    }
}

/// The result of a task, to be waited for. What the task owned has been dropped by then.
pub struct Pending<T>(Receiver<T>);

impl<T> Pending<T> {
    /// Wait for it.
    ///
    /// # Errors
    /// When the task was dropped, or its thread has panicked.
    pub fn wait(self) -> io::Result<T> {
        self.0.recv().map_err(|_| io::Error::other("the thread that does it has gone"))
    }

    /// Wait until the task is over, at most for `limit`.
    pub fn wait_for_end(self, limit: Duration) {
        let _ = self.0.recv_timeout(limit);
    }
}
