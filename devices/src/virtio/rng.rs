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
};

use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use virtio_queue::{QueueOwnedT, QueueT};

use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, Interrupt, VirtioDevice,
    chain::{self, Chain, ChainError},
};
use crate::{
    Device, Memory,
    rate_limit::RateLimiter,
    state::{Section, Snapshot, StateError},
    worker::{Home, Worker},
};

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZE: u16 = 256;
/// Most bytes for one request, whatever its buffers hold: descriptors may overlap and add up to
/// more than there is memory.
const MOST: usize = 64 << 10;

/// Why an entropy device could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "shown by the message")]
pub enum RngError {
    #[error("cannot open {path}, the source of randomness; /dev/urandom is there on every host")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is not a character device or FIFO; use /dev/urandom")]
    NotASource { path: PathBuf },
}

/// An entropy device.
pub struct Rng {
    id: String,
    source: File,
    bps: Option<u64>,
    home: Home<RngWorker>,
}

impl Rng {
    /// A device fed from `path`, at most `bps` bytes per second. A source that has nothing to give
    /// makes the guest wait, nobody else.
    ///
    /// # Errors
    /// When `path` cannot be opened, or has an end, as regular files do.
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
        Ok(Self { id: id.into(), source, bps, home: Home::Idle })
    }
}

impl Device for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn pause(&mut self) {
        self.home.park();
    }

    fn resume(&mut self) {
        if let Err(error) = self.home.unpark() {
            log::error!("{}: {error}", self.id);
        }
    }

    fn reset(&mut self) {
        self.home.stop();
    }

    fn save(&self) -> Result<Section, StateError> {
        Section::of(self)
    }

    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        section.pour(self)
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
        // Section 5.4.4: there is none.
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let queue = with.queues.into_iter().next().ok_or(ActivateError::MissingQueue(0))?;
        let host = |what| move |source| ActivateError::Host { what, source };
        let worker = RngWorker::new(
            self.source.try_clone().map_err(host("duplicate the source of randomness"))?,
            self.bps,
            queue,
            with.memory,
            with.interrupt,
            with.features & F_INDIRECT_DESC != 0,
        )
        .map_err(host("wait for the source of randomness"))?;
        self.home.start(worker, with.thread).map_err(host("start the entropy device's worker"))
    }
}

/// The saved form: how far the queue has been worked off, once there is one. Nothing is in flight
/// in a quiet device, so one number says it all.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    position: Option<u16>,
    broken: bool,
}

impl Snapshot for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
    type State = State;

    fn save(&self) -> State {
        let worker = self.home.parked();
        State {
            position: worker.map(|w| w.active.queue.next_used()),
            broken: worker.is_some_and(|w| w.broken),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        match (self.home.parked_mut(), state.position) {
            (None, None) if !state.broken => {}
            (Some(worker), Some(position)) => {
                worker.active.queue.set_next_avail(position);
                worker.active.queue.set_next_used(position);
                worker.broken = state.broken;
            }
            _ => return Err(StateError::Invalid("entropy device with and without driver")),
        }
        Ok(())
    }
}

struct RngWorker {
    source: File,
    /// Holds the source if it can be waited on.
    epoll: OwnedFd,
    limiter: RateLimiter,
    active: ActiveQueue,
    memory: Memory,
    interrupt: Interrupt,
    indirect: bool,
    /// The ring says nonsense: left alone until the driver resets the device.
    broken: bool,
    chain: Chain,
    scratch: Vec<u8>,
}

/// Why a round ended.
#[derive(PartialEq, Eq)]
enum Round {
    /// The ring is empty.
    Drained,
    /// As many requests as the queue has room for: others first.
    Full,
    /// Nothing to give at the moment, or a broken ring. Something else will continue.
    Blocked,
}

impl RngWorker {
    fn new(
        source: File,
        bps: Option<u64>,
        active: ActiveQueue,
        memory: Memory,
        interrupt: Interrupt,
        indirect: bool,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        match epoll::add(&epoll, &source, data, epoll::EventFlags::IN) {
            // EPERM: cannot be waited on because it never has nothing.
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Self {
            source,
            epoll,
            limiter: RateLimiter::new(None, bps)?,
            active,
            memory,
            interrupt,
            indirect,
            broken: false,
            chain: Chain::default(),
            scratch: vec![0; MOST],
        })
    }

    fn work(&mut self) {
        let mut used = false;
        loop {
            // An unreadable ring shows itself in the next round.
            let _ = self.active.queue.disable_notification(&self.memory);
            let round = self.round(&mut used);
            let again = match round {
                Round::Drained => {
                    self.active.queue.enable_notification(&self.memory).unwrap_or(false)
                }
                Round::Full => {
                    // A saturated counter will bring us back all the same.
                    let _ = self.active.notify.write(1);
                    false
                }
                Round::Blocked => false,
            };
            if !again {
                break;
            }
        }
        if used && chain::needs_interrupt(&mut self.active.queue, &self.memory) {
            self.interrupt.used();
        }
    }

    fn round(&mut self, used: &mut bool) -> Round {
        for _ in 0..self.active.queue.size() {
            if self.broken {
                return Round::Blocked;
            }
            let len = match self.chain.pop(&mut self.active.queue, &self.memory, self.indirect) {
                Ok(false) => return Round::Drained,
                Ok(true) => match self.fill() {
                    Some(len) => len,
                    None => {
                        self.active.queue.go_to_previous_position();
                        return Round::Blocked;
                    }
                },
                Err(ChainError::Ring) => {
                    self.give_up();
                    return Round::Blocked;
                }
                Err(_) => 0,
            };
            if self.active.queue.add_used(&self.memory, self.chain.head(), len).is_err() {
                self.give_up();
                return Round::Blocked;
            }
            *used = true;
        }
        Round::Full
    }

    /// Fill the chain's buffers; how many bytes of them. `None` when there is nothing to give yet.
    fn fill(&mut self) -> Option<u32> {
        let buffers = self.chain.writable();
        let want = usize::try_from(chain::total(buffers)).unwrap_or(MOST).min(MOST);
        if want == 0 {
            return Some(0);
        }
        if !self.limiter.take(0, want as u64) {
            return None;
        }
        let scratch = self.scratch.get_mut(..want)?;
        let got = loop {
            match self.source.read(scratch) {
                Ok(n) if n > 0 => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing yet, or a FIFO whose writer has left, or a device that was pulled out.
                Ok(_) | Err(_) => return None,
            }
        };
        let written = chain::write(&self.memory, buffers, 0, scratch.get(..got)?);
        u32::try_from(written).ok()
    }

    fn give_up(&mut self) {
        self.broken = true;
        self.interrupt.needs_reset();
    }
}

impl Worker for RngWorker {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.active.notify.as_raw_fd(), self.limiter.fd(), self.epoll.as_raw_fd()]
    }

    fn ready(&mut self, _: usize) {
        // Empty when another source fired.
        let _ = self.active.notify.read();
        self.limiter.replenish();
        self.work();
    }

    fn quiesce(&mut self) {
        // Requests are carried out on the spot: nothing is in flight.
    }
}
