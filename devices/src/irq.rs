//! Ways to interrupt the guest. A line is an eventfd that the VM binds to KVM as an irqfd, so
//! raising it from any thread takes no lock and calls no device.
use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line.
#[derive(Clone, Debug)]
pub struct Line(Arc<EventFd>);

impl Line {
    /// A line that is not bound yet.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(|fd| Self(Arc::new(fd)))
    }

    /// Raise one edge. A saturated counter means that edges are pending already.
    pub fn trigger(&self) {
        let _ = self.0.write(1);
    }

    /// The eventfd, to bind it or to check it in a test.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl AsRawFd for Line {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl vm_superio::Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Self::trigger(self);
        Ok(())
    }
}
