//! Threads, and what the program that a machine runs in has them do before they serve.
//!
//! Neither devices nor the machine know what that is: it may limit what a thread can ask of the host.
use std::{fmt, sync::Arc};

/// What a thread is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Drives workers of devices.
    Io,
    /// Writes a file; see [`Writer`](crate::backend::writer::Writer).
    Writer,
}

/// The thread must not serve, and has to end. Whoever has refused knows why, and tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// What a new thread calls when all that it needs is set up, right before it serves.
pub type FirstStep = Box<dyn FnOnce() -> Result<(), Refused> + Send>;

/// Asked before each thread is started, on the thread that starts it: what the new one, of this kind
/// and with this name, has to do first. The default is nothing.
#[derive(Clone)]
pub struct ThreadStart(Arc<FirstSteps>);

type FirstSteps = dyn Fn(ThreadKind, &str) -> FirstStep + Send + Sync;

impl ThreadStart {
    /// `first_step` says what a thread has to do first. A step that is dropped and was not called
    /// belongs to a thread that could not be started.
    pub fn new(first_step: impl Fn(ThreadKind, &str) -> FirstStep + Send + Sync + 'static) -> Self {
        Self(Arc::new(first_step))
    }

    /// What the thread called `name`, which is about to be started, has to do first.
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
