//! virtio-console with one port (virtio 1.3, section 5.3).
//!
//! Output is passed on as fast as the peer takes it, and the rest is held back in the queue, so
//! that a slow reader loses nothing. A reader that reads nothing at all for a second loses output:
//! Linux waits for its console with interrupts off, and a stopped terminal must not hang the guest.
mod saved;
#[cfg(test)]
mod tests;
mod worker;

use std::io;

use self::worker::{ConsoleWorker, WorkerArgs};
use super::{
    ActivateError, Activation, ActiveQueue, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice,
    VirtioWorker, ring::Ring,
};
use crate::{
    backend::char::{Char, CharSink, CharSource},
    model::Model,
    worker::WorkerControl,
};

const DEVICE_TYPE: u32 = 3;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`.
const F_EMERGENCY_WRITE: u64 = 1 << 2;
const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;
const TX: u16 = 1;
/// Offset of `emerg_wr` in the configuration space.
const EMERGENCY_WRITE: u64 = 8;

/// A console.
pub struct Console {
    id: String,
    name: String,
    sink: CharSink,
    /// The worker has it while there is one.
    source: Option<CharSource>,
    worker: VirtioWorker<ConsoleWorker>,
}

impl Console {
    /// A console connected to `char`.
    pub fn new(id: impl Into<String>, char: Char) -> Self {
        let Char { source, sink, name } = char;
        let source = Some(source);
        Self { id: id.into(), name, sink, source, worker: VirtioWorker::default() }
    }

    /// The name of its back-end in `query-chardev`.
    pub fn chardev(&self) -> &str {
        &self.name
    }
}

impl Model for Console {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.worker)
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.stop() {
            self.source = Some(worker.into_source());
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_INDIRECT_DESC | F_EVENT_IDX | F_EMERGENCY_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    /// Section 5.3.4: cols, rows, max_nr_ports (none of them offered), emerg_wr.
    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn configurable_always(&self) -> bool {
        true
    }

    /// Section 5.3.4: a byte written to emerg_wr is output, whatever state the driver is in.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERGENCY_WRITE, [byte, ..]) = (offset, data) {
            self.sink.send(&[*byte]);
        }
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        let indirect = with.features & F_INDIRECT_DESC != 0;
        let mut queues = with.queues;
        let mut ring = |index: u16| {
            let at = queues.iter().position(|q: &ActiveQueue| q.index == index);
            let at = at.ok_or(ActivateError::MissingQueue(index))?;
            Ok(Ring::new(queues.swap_remove(at), with.memory.clone(), indirect))
        };
        let (rx, tx) = (ring(RX)?, ring(TX)?);
        let host = |what| move |source| ActivateError::Host { what, source };
        // Missing only if an I/O thread has ended while holding it.
        let gone = || host("find the console's input")(io::ErrorKind::NotFound.into());
        let source = self.source.take().ok_or_else(gone)?;
        let args = WorkerArgs {
            id: self.id.clone(),
            rx,
            tx,
            source,
            sink: self.sink.clone(),
            interrupt: with.interrupt.clone(),
        };
        let worker = ConsoleWorker::new(args).map_err(|failed| {
            let (e, source) = *failed;
            self.source = Some(source);
            host("make the descriptors of a console")(e)
        })?;
        self.worker.start(worker, with.interrupt, with.thread)
    }
}
