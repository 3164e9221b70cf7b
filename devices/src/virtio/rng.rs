//! The entropy device (virtio 1.3, section 5.4).
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use ::state::device as saved;
use rustix::event::{EventfdFlags, epoll, eventfd};

use super::{
    ActivateError, Activation, F_EVENT_IDX, F_INDIRECT_DESC, Interrupt, VirtioDevice, VirtioWorker,
    chain::{self, Chain, total},
    ring::{Broken, Popped, Ring},
};
use crate::{
    model::Model,
    rate_limit::RateLimiter,
    state::{Snapshot, StateError},
    worker::{Worker, WorkerControl},
};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 256;
/// Most bytes returned for one request, whatever its buffers hold: descriptors may overlap and add
/// up to more than all memory.
const MAX_REQUEST: usize = 64 << 10;

/// Why an entropy device could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "shown by the message")]
pub enum RngError {
    #[error("cannot open {path}, the source of randomness; /dev/urandom is there on every host")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is not a character device or FIFO; use /dev/urandom")]
    NotASource { path: PathBuf },
    #[error("out of file descriptors for a source of randomness")]
    Descriptor(#[source] io::Error),
}

/// An entropy device.
pub struct Rng {
    id: String,
    source: File,
    bps: Option<u64>,
    worker: VirtioWorker<RngWorker>,
}

impl Rng {
    /// A device that reads from `path`, at most `bps` bytes per second. If the source has no data,
    /// only this guest waits.
    ///
    /// # Errors
    /// When `path` cannot be opened, or is neither a character device nor a FIFO.
    pub fn new(id: impl Into<String>, path: &Path, bps: Option<u64>) -> Result<Self, RngError> {
        let failed = |source| RngError::Open { path: path.into(), source };
        let source = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        let kind = source.metadata().map_err(failed)?.file_type();
        if !kind.is_char_device() && !kind.is_fifo() {
            return Err(RngError::NotASource { path: path.into() });
        }
        Ok(Self { id: id.into(), source, bps, worker: VirtioWorker::default() })
    }

    /// A device without a source: it can be restored from a saved state, and makes its guest wait.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn without_source(id: impl Into<String>, bps: Option<u64>) -> Result<Self, RngError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let source = fd.map_err(|e| RngError::Descriptor(e.into()))?.into();
        Ok(Self { id: id.into(), source, bps, worker: VirtioWorker::default() })
    }
}

impl Model for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.worker)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {
        // Section 5.4.4: there is no configuration space.
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let queue = with.queues.into_iter().next().ok_or(ActivateError::MissingQueue(0))?;
        let host = |what| move |source| ActivateError::Host { what, source };
        let worker = RngWorker::new(
            self.id.clone(),
            self.source.try_clone().map_err(host("duplicate the source of randomness"))?,
            self.bps,
            Ring::new(queue, with.memory, with.features & F_INDIRECT_DESC != 0),
            with.interrupt.clone(),
        )
        .map_err(host("wait for the source of randomness"))?;
        self.worker.start(worker, with.interrupt, with.thread)
    }
}

/// Nothing is in flight in a quiesced device, so one number gives the queue's position.
impl Snapshot for Rng {
    type State = saved::Rng;

    fn save(&self) -> Result<saved::Rng, StateError> {
        let worker = self.worker.parked()?;
        Ok(saved::Rng {
            next_avail: worker.map(|w| w.ring.position()),
            needs_reset: worker.is_some_and(|w| w.broken),
        })
    }

    fn restore(&mut self, state: saved::Rng) -> Result<(), StateError> {
        match (self.worker.parked_mut(), state.next_avail) {
            (None, None) if !state.needs_reset => {}
            (Some(worker), Some(position)) => {
                worker.ring.set_position(position);
                worker.broken = state.needs_reset;
            }
            _ => return Err(StateError::Invalid("entropy device with and without driver")),
        }
        Ok(())
    }
}

struct RngWorker {
    id: String,
    source: File,
    /// Contains the source if it can be waited on.
    epoll: OwnedFd,
    limiter: RateLimiter,
    ring: Ring,
    interrupt: Interrupt,
    /// The driver has broken the ring and has to reset the device.
    broken: bool,
    chain: Chain,
    scratch: Box<[u8]>,
}

impl RngWorker {
    fn new(
        id: String,
        source: File,
        bps: Option<u64>,
        ring: Ring,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        match epoll::add(&epoll, &source, data, epoll::EventFlags::IN) {
            // EPERM: the source cannot be waited on, because it always has data.
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Self {
            id,
            source,
            epoll,
            limiter: RateLimiter::new(None, bps)?,
            chain: Chain::with_capacity(ring.size().into()),
            ring,
            interrupt,
            broken: false,
            scratch: vec![0; MAX_REQUEST].into_boxed_slice(),
        })
    }

    /// Serve requests, at most a queue's worth before other workers get their turn.
    fn work(&mut self) -> Result<(), Broken> {
        self.ring.ignore()?;
        let more = self.serve()?;
        if self.ring.wants_interrupt()? {
            self.interrupt.used(self.ring.index());
        }
        if more {
            self.ring.come_back();
        }
        Ok(())
    }

    /// True when there may be more to do.
    fn serve(&mut self) -> Result<bool, Broken> {
        for _ in 0..self.ring.size() {
            let len = match self.ring.pop(&mut self.chain)? {
                Popped::Nothing if self.ring.listen()? => {
                    self.ring.ignore()?;
                    continue;
                }
                Popped::Nothing => return Ok(false),
                Popped::Malformed => 0,
                Popped::Chain => match self.fill() {
                    Some(len) => len,
                    None => {
                        self.ring.unpop(1);
                        return Ok(false);
                    }
                },
            };
            self.ring.put_used(0, self.chain.head(), len)?;
            self.ring.publish(1)?;
        }
        Ok(true)
    }

    /// Fill the chain's buffers; returns the number of bytes. `None` when no data is available yet.
    fn fill(&mut self) -> Option<u32> {
        let buffers = self.chain.writable();
        let want = usize::try_from(total(buffers)).unwrap_or(MAX_REQUEST).min(MAX_REQUEST);
        if want == 0 {
            return Some(0);
        }
        // The limiter refuses based on what was returned before; only what is returned now is
        // charged.
        if !self.limiter.take(0, 0) {
            return None;
        }
        let scratch = self.scratch.get_mut(..want)?;
        let got = loop {
            match self.source.read(scratch) {
                Ok(n) if n > 0 => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No data yet, or a FIFO whose writer has closed it, or a device that was removed.
                Ok(_) | Err(_) => return None,
            }
        };
        self.limiter.take(0, got as u64);
        let written = chain::write(self.ring.memory(), buffers, 0, scratch.get(..got)?);
        u32::try_from(written).ok()
    }
}

impl Worker for RngWorker {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.ring.fd(), self.limiter.fd(), self.epoll.as_raw_fd()]
    }

    fn ready(&mut self, _: usize) {
        self.ring.drain();
        self.limiter.replenish();
        if !self.broken
            && let Err(broken) = self.work()
        {
            self.broken = true;
            broken.report(&self.id, &self.interrupt);
        }
    }

    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        // Requests are carried out synchronously: nothing is in flight.
        true
    }
}
