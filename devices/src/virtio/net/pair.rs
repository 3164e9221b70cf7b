//! A pair of queues: what is sent is often answered at once, so the two share their interrupts.
use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    rx::Rx,
    tx::{Stop, Tx},
    worker::Shared,
};
use crate::virtio::{ring::Broken, spin::Spin};

/// Time after which other workers of the thread get their turn, though there is more to send.
const TURN: Duration = Duration::from_micros(500);

/// A receive and a transmit queue.
pub(super) struct Pair {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    pub(super) spin: Spin,
}

impl Pair {
    /// Receive what is available, then notify the driver of these and of sent frames.
    pub(super) fn receive(&mut self, n: usize, shared: &mut Shared) -> Result<(), Broken> {
        if self.rx.run(n, shared)? {
            self.rx.ring.come_back();
        }
        self.signal(shared)
    }

    /// Decide on one interrupt for both rings.
    fn signal(&mut self, shared: &Shared) -> Result<(), Broken> {
        let wants = [
            self.rx.ring.wants_interrupt()?.then_some(self.rx.ring.index()),
            self.tx.ring.wants_interrupt()?.then_some(self.tx.ring.index()),
        ];
        shared.interrupt.used_all(wants.into_iter().flatten());
        Ok(())
    }

    /// Send what is available; `stop` is why the last batch has ended.
    pub(super) fn send(
        &mut self,
        n: usize,
        shared: &mut Shared,
        mut stop: Stop,
    ) -> Result<(), Broken> {
        let begin = Instant::now();
        loop {
            match stop {
                Stop::Wait => break,
                Stop::Drained => {
                    if n < shared.active_pairs.into() {
                        self.look(n, shared)?;
                    }
                    if !self.tx.ring.listen()? {
                        break;
                    }
                    if begin.elapsed() > TURN {
                        self.tx.ring.come_back();
                        break;
                    }
                }
                Stop::Turn => {
                    self.tx.ring.come_back();
                    break;
                }
            }
            stop = self.tx.run(n, shared)?;
        }
        self.signal(shared)
    }

    /// Wait briefly for an answer to what was sent, or for more to send. The driver's notifications
    /// are still off, and it has not been interrupted yet: one interrupt then serves both
    /// directions, and this thread sleeps less often.
    fn look(&mut self, n: usize, shared: &mut Shared) -> Result<(), Broken> {
        let mut answered = false;
        self.spin.wait(|| {
            // The answer may come from a process that waits for this CPU.
            thread::yield_now();
            answered = shared.has_frame(n);
            answered || self.tx.ring.is_pending()
        });
        if answered { self.receive(n, shared) } else { self.signal(shared) }
    }
}
