//! Coming to rest: all vCPUs are parked, all devices are quiet, and nothing is in flight.
//!
//! ```text
//!   running -------> vCPUs asked -------> I/O threads asked -------> at rest
//!      ^      pause       |        pause          |         pause      |
//!      +------------------+-----------------------+--------------------+
//!                      give_up                                 resume
//! ```
//! A vCPU that resets a device, and an I/O thread, may wait for storage that hangs. So no call here waits
//! for longer than [`AT_ONCE`], within which almost every machine is at rest. A call that fails for want
//! of time leaves the attempt as it stands: the next call of the same operation continues it, and
//! [`Machine::give_up`] lets the machine run on as if nothing had been asked. There is only one attempt:
//! whatever is asked of the machine meanwhile waits for it.
use std::time::{Duration, Instant};

use devices::{backend::disk::DISK_STALL_LIMIT, virtio::VirtioDevice};

use crate::{
    Machine, RunError,
    arch::host_ticks,
    io_thread::Ended,
    machine::Parked,
    slots::Handle,
    vcpu::{self, Answer, Gone},
};

/// How long the first try of an operation waits for what most often comes at once. Later ones only look.
pub const AT_ONCE: Duration = Duration::from_millis(20);
/// How long a machine that has not run yet may take: its threads are just being started.
const START_LIMIT: Duration = Duration::from_secs(5);
/// How often a machine that has not run yet is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// How the machine stands.
#[derive(Default)]
pub(crate) struct Rest {
    /// All of it is at rest.
    whole: bool,
    /// It is coming to rest: the vCPUs that were asked and have not parked.
    attempt: Option<Vec<(usize, Answer<()>)>>,
    /// An operation was tried in vain, and is to be tried again or given up.
    trying: bool,
    /// How often any was.
    vain_tries: u64,
}

impl Rest {
    /// It begins to do something again.
    pub(crate) fn ends(&mut self) {
        (self.whole, self.attempt, self.trying) = (false, None, false);
    }

    /// Until when this try may wait.
    fn deadline(&self) -> Instant {
        Instant::now() + if self.trying { Duration::ZERO } else { AT_ONCE }
    }
}

/// What a step of an attempt has come to.
enum Step {
    Done,
    /// What it waits for, such as `vCPU 0`.
    Waits(String),
}

impl Machine {
    /// How often operations were tried in vain so far. One that fails and makes this number larger has
    /// changed nothing so far: it is to be tried again, or given up.
    pub fn vain_tries(&self) -> u64 {
        self.rest.vain_tries
    }

    /// Whether there is such an operation.
    pub fn is_trying(&self) -> bool {
        self.rest.trying
    }

    /// Stop it: every vCPU has left KVM, then every device worker is quiet and has nothing in
    /// flight. Doing it twice changes nothing.
    ///
    /// # Errors
    /// When it is not at rest yet: see [`Machine::vain_tries`]. When a thread has ended or KVM does not tell
    /// the clock; a machine that was running runs on.
    pub fn pause(&mut self) -> Result<(), RunError> {
        if self.rest.whole {
            return Ok(());
        }
        let deadline = self.rest.deadline();
        // All are asked before the first is waited for.
        let ask = || self.vcpus.iter().map(vcpu::Handle::park).enumerate().collect();
        let mut vcpus = self.rest.attempt.take().unwrap_or_else(ask);
        let step = self.come_to_rest(&mut vcpus, deadline);
        self.rest.attempt = Some(vcpus);
        match step {
            Ok(Step::Done) => {
                self.each_device(|d| d.pause());
                self.running = false;
                self.rest.ends();
                self.rest.whole = true;
                Ok(())
            }
            Ok(Step::Waits(thread)) => Err(self.not_yet(thread)),
            Err(e) => {
                self.give_up();
                Err(e)
            }
        }
    }

    fn come_to_rest(
        &mut self,
        vcpus: &mut Vec<(usize, Answer<()>)>,
        deadline: Instant,
    ) -> Result<Step, RunError> {
        use std::sync::mpsc::RecvTimeoutError as E;
        while let Some((index, answer)) = vcpus.last() {
            let left = deadline.saturating_duration_since(Instant::now());
            match answer.wait_for(left) {
                Ok(()) => drop(vcpus.pop()),
                Err(E::Timeout) => return Ok(Step::Waits(format!("vCPU {index}"))),
                Err(E::Disconnected) => return Err(Gone.into()),
            }
        }
        if self.parked.is_none() {
            let clock = self.vm.clock()?;
            self.parked = Some(Parked { ticks: host_ticks(), clock, advance: false });
        }
        // Again, if one has given up meanwhile.
        self.io_threads.iter().for_each(|(_, thread)| thread.hold(DISK_STALL_LIMIT));
        for (id, thread) in &self.io_threads {
            if !thread.is_held(deadline)? {
                return Ok(Step::Waits(format!("I/O thread {id}")));
            }
        }
        Ok(Step::Done)
    }

    /// Give up the operation that was tried in vain: a machine that was running runs on.
    pub fn give_up(&mut self) {
        if self.rest.whole {
            return;
        }
        let attempt = self.rest.attempt.take();
        self.rest.trying = false;
        self.io_threads.iter().for_each(|(_, thread)| thread.go());
        if attempt.is_some() && self.running {
            let ticks = self.restart_clocks().unwrap_or_else(|e| {
                log::error!("the guest's clocks have lost time: {e}");
                0
            });
            self.vcpus.iter().for_each(|vcpu| vcpu.resume(ticks));
        }
    }

    /// Stop a machine that has not run yet, and whose threads may not run yet either.
    ///
    /// # Errors
    /// As [`Machine::pause`]; when its threads do not start within 5 seconds.
    pub(crate) fn pause_new(&mut self) -> Result<(), RunError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match self.pause() {
                Err(_) if self.rest.trying && Instant::now() < deadline => {
                    std::thread::sleep(POLL_INTERVAL)
                }
                other => return other,
            }
        }
    }

    /// Change `device` in slot `index`, whose I/O thread is paused meanwhile; its driver learns of
    /// it.
    ///
    /// # Errors
    /// When the device or its thread cannot be had: nothing has changed then. It can be tried again, see
    /// [`Machine::vain_tries`].
    pub(crate) fn change<D: VirtioDevice, R>(
        &mut self,
        index: usize,
        device: &Handle<D>,
        change: impl FnOnce(&mut D) -> R,
    ) -> Result<R, RunError> {
        let deadline = self.rest.deadline();
        let thread = self.slots.thread(index).ok_or(RunError::NoThread)?;
        let mut changed = None;
        // A vCPU that resets a device keeps it locked until its disk has finished.
        if self.rest.attempt.is_none()
            && let Some(mut transport) = device.try_lock_until(deadline)
        {
            if self.running {
                thread.hold(DISK_STALL_LIMIT);
            }
            if !self.running || thread.is_held(deadline)? {
                changed = Some(transport.update(change));
            }
            if self.running && changed.is_some() {
                thread.go();
            }
        }
        let Some(changed) = changed else {
            return Err(self.not_yet(format!("the device in slot {index}")));
        };
        self.rest.trying = false;
        Ok(changed)
    }

    /// The operation has to be tried again, because of the disks that requests are in flight to, or else
    /// because of `thread`.
    fn not_yet(&mut self, thread: String) -> RunError {
        self.rest.trying = true;
        self.rest.vain_tries = self.rest.vain_tries.saturating_add(1);
        let busy: Vec<&str> = self.backends.busy_disks().collect();
        if busy.is_empty() { RunError::Restless(thread) } else { RunError::Hung(busy.join(", ")) }
    }

    /// Stop it for good: whatever its disks do, the guest does not run any more. False when some of its
    /// threads still wait for storage after `patience`; nothing can be done to the machine then but
    /// [`Machine::leave`].
    pub fn stop_for_good(&mut self, patience: Duration) -> bool {
        if self.rest.whole {
            return true;
        }
        let deadline = Instant::now() + patience;
        self.rest.attempt = None;
        let answers: Vec<_> = self.vcpus.iter().map(vcpu::Handle::park).collect();
        // One that does not answer waits for a device, and not in the guest.
        let left = || deadline.saturating_duration_since(Instant::now());
        let parked = answers.iter().filter(|answer| answer.wait_for(left()).is_ok()).count();
        self.io_threads.iter().for_each(|(_, thread)| thread.hold(patience));
        let held = self.io_threads.iter().filter(|(_, t)| t.is_held(deadline) == Ok(true)).count();
        let quiet = parked == answers.len() && held == self.io_threads.len();
        if quiet {
            self.each_device(|device| device.pause());
        }
        self.running = false;
        quiet
    }
}

impl From<Ended> for RunError {
    fn from(_: Ended) -> Self {
        Self::NoThread
    }
}
