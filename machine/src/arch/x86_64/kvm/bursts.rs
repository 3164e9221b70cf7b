//! Bursts of console output, whose bytes KVM keeps (see [`crate::kvm::coalesced`]).
//!
//! A driver that polls reads the port's status before each byte. That read exits, and the byte
//! before can be written then: it need not exit by itself. But if no read followed, a kept byte
//! would never be written, as KVM does not report that it has kept one. So bytes are kept only
//! during a burst:
//!
//! ```text
//!           ENOUGH bytes exited within WINDOW
//!   exits ----------------------------------> kept, with a tick each PERIOD
//!     ^                                         |
//!     +--- a tick after which none was kept, or a kick
//! ```
//! A tick interrupts KVM_RUN, and then all bytes are written. It may be lost when it falls between
//! two entries; the next one is not. Until then, bytes that have left the ring are passed on to the
//! back-end line by line (see [`Output`]).
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use devices::legacy::serial::Output;
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::{kvm::Vm, vcpu::kick::Ticks};

/// This many bytes within [`WINDOW`] begin a burst.
const ENOUGH: u32 = 8;
const WINDOW: Duration = Duration::from_millis(2);
/// A byte is written one period late at most, two if a tick is lost.
const PERIOD: Duration = Duration::from_millis(4);

/// A vCPU's record of the bursts that it has begun.
pub struct Bursts {
    /// `None` where KVM cannot keep writes.
    vm: Option<Arc<VmFd>>,
    port: u16,
    /// What the bytes are written to, if it can hold them.
    output: Option<Output>,
    /// Made when the first burst begins.
    ticks: Option<Ticks>,
    /// Bytes that exited since `since`.
    exits: u32,
    since: Instant,
    lasts: bool,
    /// A byte was kept since the last tick.
    busy: bool,
}

impl Bursts {
    /// Bursts of bytes written to `port` of `vm`, and from there to `output`.
    pub fn new(vm: &Vm, port: u16, output: Option<Output>) -> Self {
        let vm = vm.coalesces.then(|| vm.fd.clone());
        let since = Instant::now();
        Self { vm, port, output, ticks: None, exits: 0, since, lasts: false, busy: false }
    }

    /// The guest has exited to write a byte. A burst begins if there were enough of them. Called on
    /// the vCPU's thread, which ticks interrupt.
    pub fn exited(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) > WINDOW {
            (self.since, self.exits) = (now, 0);
        }
        self.exits += 1;
        let Some(vm) = &self.vm else { return };
        if self.exits < ENOUGH || self.lasts {
            return;
        }
        if self.ticks.is_none() {
            // Without a timer there is no burst.
            self.ticks = Ticks::new().ok();
        }
        if self.ticks.as_ref().is_none_or(|ticks| ticks.every(PERIOD).is_err()) {
            return;
        }
        self.lasts = true;
        self.busy = true;
        self.output.iter().for_each(Output::hold);
        // Otherwise the bytes exit as before, and the burst ends at the second tick.
        let _ = vm.register_coalesced_mmio(self.place(), 1);
    }

    /// A byte was kept, and has been written now.
    pub fn kept(&mut self) {
        self.busy = true;
    }

    /// A tick; true if the burst has ended. The caller then has to apply what other vCPUs may have
    /// added meanwhile.
    pub fn tick(&mut self) -> bool {
        if std::mem::take(&mut self.busy) { false } else { self.end() }
    }

    /// Pass on the bytes that the output holds.
    pub fn pass_on(&self) {
        if self.lasts {
            self.output.iter().for_each(Output::pass_on);
        }
    }

    /// End the burst; true if there was one. The caller then has to apply what other vCPUs may have
    /// added meanwhile.
    pub fn end(&mut self) -> bool {
        if !std::mem::take(&mut self.lasts) {
            return false;
        }
        self.exits = 0;
        if let Some(vm) = &self.vm {
            let _ = vm.unregister_coalesced_mmio(self.place(), 1);
        }
        if let Some(ticks) = &self.ticks {
            let _ = ticks.every(Duration::ZERO);
        }
        self.output.iter().for_each(Output::release);
        true
    }

    fn place(&self) -> IoEventAddress {
        IoEventAddress::Pio(self.port.into())
    }
}
