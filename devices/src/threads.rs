//! Threads, and the start-up step that the embedding program requires of each.
//!
//! Neither devices nor the machine know what that step is: it may restrict the thread's system
//! calls.
use std::{fmt, sync::Arc};

/// The purpose of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Drives workers of devices.
    Io,
    /// Writes a file; see [`Writer`](crate::backend::writer::Writer).
    Writer,
}

/// The thread must end without doing its work. The step that refused knows the cause and reports
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// What a new thread calls once it is set up, right before it begins its work.
pub type FirstStep = Box<dyn FnOnce() -> Result<(), Refused> + Send>;

/// Provides the first step of each new thread, by the thread's kind and name. It is called on the
/// starting thread, before the new one exists. The default step does nothing.
#[derive(Clone)]
pub struct ThreadStart(Arc<FirstSteps>);

type FirstSteps = dyn Fn(ThreadKind, &str) -> FirstStep + Send + Sync;

impl ThreadStart {
    /// `first_step` returns the first step of a thread. A step that is dropped without being called
    /// belongs to a thread that could not be started.
    pub fn new(first_step: impl Fn(ThreadKind, &str) -> FirstStep + Send + Sync + 'static) -> Self {
        Self(Arc::new(first_step))
    }

    /// The first step of the thread called `name`, which is about to be started.
    pub fn first_step(&self, kind: ThreadKind, name: &str) -> FirstStep {
        (self.0)(kind, name)
    }
}

impl Default for ThreadStart {
    fn default() -> Self {
        Self::new(|_, _| Box::new(|| Ok(())))
    }
}

impl fmt::Debug for ThreadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadStart")
    }
}
