//! Coming to rest: all vCPUs parked, all devices quiet, and no request in flight, except in a
//! [`Captured`](crate::Captured) machine.
//!
//! ```text
//!   running -------> vCPUs asked -------> I/O threads asked -------> at rest
//!      ^      pause       |        pause          |         pause      |
//!      +------------------+-----------------------+--------------------+
//!                      give_up                                 resume
//! ```
//! A vCPU that resets a device, and an I/O thread, may wait for storage that hangs. So no call here
//! waits longer than [`AT_ONCE`], within which almost every machine is at rest. A call that times
//! out leaves the attempt pending: the next call of the same operation continues it, and
//! [`Machine::give_up`] lets the machine run on as if it had not been asked. There is only one
//! attempt: every other operation on the machine waits for it.
use std::time::{Duration, Instant};

use devices::{backend::disk::DISK_STALL_LIMIT, virtio::VirtioDevice, worker::Park};

use crate::{
    Machine, RunError,
    arch::host_ticks,
    io_thread::Ended,
    machine::Parked,
    quiesced::AskedVcpu,
    slots::Handle,
    vcpu::{self, Answer, Gone},
};

/// How long the first try of an operation waits; most are done by then. Later tries only poll.
pub const AT_ONCE: Duration = Duration::from_millis(20);
/// Time limit for a machine that has not run yet: its threads are just being started.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Interval at which a machine that has not run yet is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// How far the machine is at rest.
#[derive(Default)]
pub(crate) struct Rest {
    /// All of it is at rest.
    at_rest: bool,
    /// It is coming to rest.
    attempt: Option<Attempt>,
    /// An operation has timed out, and is to be tried again or given up.
    pending: bool,
    /// What the vCPUs were asked for once all were parked, with [`Park::Keep`].
    pub(crate) states: Vec<AskedVcpu>,
    /// How many tries have timed out.
    rest_timeouts: u64,
}

impl Rest {
    /// The machine starts to do something again.
    pub(crate) fn ends(&mut self) {
        (self.at_rest, self.attempt, self.pending) = (false, None, false);
        self.states.clear();
    }

    /// Deadline of this try.
    fn deadline(&self) -> Instant {
        Instant::now() + if self.pending { Duration::ZERO } else { AT_ONCE }
    }
}

/// A pause that has begun.
struct Attempt {
    /// The vCPUs that were asked to park and have not yet.
    vcpus: Vec<(usize, Answer<()>)>,
    /// Their states, for [`Park::Keep`], asked for once all have parked.
    states: Vec<AskedVcpu>,
    /// What becomes of requests in flight.
    park: Park,
}

/// The result of one step of an attempt.
enum Step {
    Done,
    /// What it waits for, such as `vCPU 0`.
    Waits(String),
}

impl Machine {
    /// How many tries of operations have timed out so far. An operation that fails and increases
    /// this number has changed nothing yet: it is to be tried again, or given up.
    pub fn rest_timeouts(&self) -> u64 {
        self.rest.rest_timeouts
    }

    /// Whether an operation has timed out and is pending.
    pub fn is_trying(&self) -> bool {
        self.rest.pending
    }

    /// Pause it: every vCPU has left KVM, then every device worker is quiet and has no request in
    /// flight. Pausing it twice changes nothing.
    ///
    /// # Errors
    /// When it is not at rest yet: see [`Machine::rest_timeouts`]. When a thread has ended or KVM does
    /// not report the clock; a machine that was running runs on.
    pub fn pause(&mut self) -> Result<(), RunError> {
        if self.rest.attempt.as_ref().is_some_and(|attempt| attempt.park == Park::Keep) {
            self.give_up();
        }
        self.park(Park::Drain)
    }

    /// Park every vCPU and every device worker. With [`Park::Keep`], requests of disks stay in
    /// flight: only [`Captured`](crate::Captured) asks for that, and lets a machine that was running
    /// run on. Then each vCPU's thread also reads its state while devices become quiet: after all
    /// vCPUs are parked, so that it has every interrupt that one of them has sent to another. Those
    /// that devices raise until they are quiet may be missing in it; a machine that is restored
    /// raises all of them again.
    ///
    /// # Errors
    /// As [`Machine::pause`]; also while a pause is pending that waits for such requests.
    pub(crate) fn park(&mut self, park: Park) -> Result<(), RunError> {
        if self.rest.at_rest {
            return Ok(());
        }
        let deadline = self.rest.deadline();
        // All are asked before the first is waited for.
        let ask = || self.vcpus.iter().map(vcpu::Handle::park).enumerate().collect();
        let begin = || Attempt { vcpus: ask(), states: Vec::new(), park };
        let mut attempt = self.rest.attempt.take().unwrap_or_else(begin);
        let step = match attempt.park == park {
            true => self.come_to_rest(&mut attempt, deadline),
            false => Ok(Step::Waits("a pause that has begun".into())),
        };
        match step {
            Ok(Step::Done) => {
                self.each_device(|d| d.pause());
                self.running = false;
                self.rest.ends();
                self.rest.at_rest = park == Park::Drain;
                self.rest.states = attempt.states;
                Ok(())
            }
            Ok(Step::Waits(thread)) => {
                self.rest.attempt = Some(attempt);
                Err(self.not_at_rest(thread))
            }
            Err(e) => {
                self.rest.attempt = Some(attempt);
                self.give_up();
                Err(e)
            }
        }
    }

    fn come_to_rest(
        &mut self,
        Attempt { vcpus, states, park }: &mut Attempt,
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
            self.parked =
                Some(Parked { ticks: host_ticks(), clock, advance: false, runs_since: None });
        }
        if *park == Park::Keep && states.is_empty() {
            states.extend(self.vcpus.iter().map(vcpu::Handle::save));
        }
        // Ask again, in case a thread has given up meanwhile.
        self.io_threads.iter().for_each(|(_, thread)| thread.hold(*park, DISK_STALL_LIMIT));
        for (id, thread) in &self.io_threads {
            if !thread.is_held(deadline)? {
                return Ok(Step::Waits(format!("I/O thread {id}")));
            }
        }
        Ok(Step::Done)
    }

    /// Give up the pending operation: a machine that was running runs on.
    pub fn give_up(&mut self) {
        if self.rest.at_rest {
            return;
        }
        let attempt = self.rest.attempt.take();
        self.rest.pending = false;
        self.io_threads.iter().for_each(|(_, thread)| thread.go());
        if let Some(attempt) = attempt
            && self.running
        {
            if attempt.park == Park::Keep {
                self.parked = None;
            }
            let ticks = self.restart_clocks().unwrap_or_else(|e| {
                log::error!("the guest's clocks have lost time: {e}");
                0
            });
            self.vcpus.iter().for_each(|vcpu| vcpu.resume(ticks));
        }
    }

    /// Pause a machine that has not run yet, and whose threads may not have started either.
    ///
    /// # Errors
    /// As [`Machine::pause`]; when its threads do not start within 5 seconds.
    pub(crate) fn pause_new(&mut self) -> Result<(), RunError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match self.pause() {
                Err(_) if self.rest.pending && Instant::now() < deadline => {
                    std::thread::sleep(POLL_INTERVAL)
                }
                other => return other,
            }
        }
    }

    /// Change `device` in slot `index`, whose I/O thread is paused meanwhile; the guest's driver is
    /// notified.
    ///
    /// # Errors
    /// When the device or its thread is busy: nothing has changed then. It can be tried again, see
    /// [`Machine::rest_timeouts`].
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
                thread.hold(Park::Drain, DISK_STALL_LIMIT);
            }
            if !self.running || thread.is_held(deadline)? {
                changed = Some(transport.update(change));
            }
            if self.running && changed.is_some() {
                thread.go();
            }
        }
        let Some(changed) = changed else {
            return Err(self.not_at_rest(format!("the device in slot {index}")));
        };
        self.rest.pending = false;
        Ok(changed)
    }

    /// The error for an operation that has to be tried again, because of disks with requests in
    /// flight, or otherwise because of `thread`.
    fn not_at_rest(&mut self, thread: String) -> RunError {
        self.rest.pending = true;
        self.rest.rest_timeouts = self.rest.rest_timeouts.saturating_add(1);
        let busy: Vec<&str> = self.backends.busy_disks().collect();
        if busy.is_empty() { RunError::Restless(thread) } else { RunError::Hung(busy.join(", ")) }
    }

    /// Stop it for good: whatever its disks do, the guest does not run any more. False when some of
    /// its threads still wait for storage after `limit`; then only [`Machine::leave`] can be
    /// called.
    pub fn stop_for_good(&mut self, limit: Duration) -> bool {
        if self.rest.at_rest {
            return true;
        }
        let deadline = Instant::now() + limit;
        self.rest.attempt = None;
        let answers: Vec<_> = self.vcpus.iter().map(vcpu::Handle::park).collect();
        // A vCPU that does not answer waits for a device and is not in the guest.
        let left = || deadline.saturating_duration_since(Instant::now());
        let parked = answers.iter().filter(|answer| answer.wait_for(left()).is_ok()).count();
        self.io_threads.iter().for_each(|(_, thread)| thread.hold(Park::Drain, limit));
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
