//! A vCPU thread and the handle that controls it.
//!
//! ```text
//!            resume            kick, then EINTR
//!   Parked ----------> Running ----------------> Parked
//!     | save, restore     |  guest event            |
//!     |                   +-----------------------> |
//!     +------------------- exit --------------------+
//! ```
//! Requests are served only while parked, and the thread parks only on `EINTR` out of KVM_RUN: by
//! then KVM has completed any pending PIO or MMIO, so the registers are consistent. (An access
//! across a page takes two entries; each returns to the run loop as an exit of its own.) A kick
//! means "check your requests", never "stop": a late one finds none and has no effect.
pub mod kick;
#[cfg(test)]
mod tests;
mod usage;

use std::{
    cell::OnceCell,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use devices::{
    PowerEvent,
    threads::{ThreadKind, ThreadStart},
};

/// The result of one entry into the guest. `Cpu::run` handles plain PIO and MMIO by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Handled; enter again.
    Handled,
    /// Kicked: EINTR from KVM_RUN, all pending work complete.
    Kicked,
    /// The vCPU has stopped by itself.
    Stopped(Stopped),
}

/// Why a vCPU stopped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It wrote to a register that requests a reset or a power-off, or reports a guest crash: on
    /// real hardware, nothing is executed after that.
    Power(PowerEvent),
    /// It has met an error that it cannot handle (x86: a triple fault): on real hardware, a reset.
    Fault,
    /// KVM or the monitor cannot run it any further; the log says why.
    Failed,
}

/// The architecture's vCPU; the only implementor outside tests wraps KVM.
pub trait Cpu: Send + 'static {
    /// Saved registers.
    type State: Send + 'static;
    /// Why the registers could not be read or written.
    type Error: Send + 'static;
    /// Interrupts `run` from any thread.
    type Kicker: Kick;
    /// A kicker for this CPU, made on its own thread.
    ///
    /// # Errors
    /// When the host refuses a resource for it.
    fn kicker(&mut self) -> io::Result<Self::Kicker>;
    /// Enter the guest once.
    fn run(&mut self) -> Exit;
    /// Called before the first `run` after a pause, which took `ticks` of the host's counter. If they
    /// are negative, its own counter has to continue from that far ahead of where it was restored.
    fn resumed(&mut self, ticks: i64);
    /// Registers of a parked CPU.
    ///
    /// # Errors
    /// When they cannot be read.
    fn save(&self) -> Result<Self::State, Self::Error>;
    /// Replace the registers of a parked CPU.
    ///
    /// # Errors
    /// When they are not accepted.
    fn restore(&mut self, state: Self::State) -> Result<(), Self::Error>;
}

/// Interrupts a vCPU.
pub trait Kick: Send + 'static {
    /// Make `run` return [`Exit::Kicked`], now or at its next call.
    fn kick(&self);
    /// The kernel's thread id of the vCPU's thread.
    fn thread(&self) -> u32;
}

impl Kick for kick::Kicker {
    fn kick(&self) {
        Self::kick(self);
    }
    fn thread(&self) -> u32 {
        Self::thread(self)
    }
}

/// The pending answer to a request.
#[must_use = "a request is done when its answer arrives"]
pub struct Answer<T>(Receiver<T>);

impl<T> Answer<T> {
    /// Wait for it.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn wait(self) -> Result<T, Gone> {
        self.0.recv().map_err(|_| Gone)
    }

    /// Wait for it, at most for `patience`.
    ///
    /// # Errors
    /// `Timeout` when it has not come within `patience`, `Disconnected` when it never will.
    pub fn wait_for(&self, patience: Duration) -> Result<T, RecvTimeoutError> {
        self.0.recv_timeout(patience)
    }
}

/// The vCPU thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("vCPU thread has exited")]
pub struct Gone;

enum Request<C: Cpu> {
    Park(Sender<()>),
    /// Stay out of the guest for this long, unless something else is requested.
    Rest(Duration),
    Resume(i64),
    Save(Sender<Result<C::State, C::Error>>),
    Work(Box<dyn FnOnce() + Send>),
    Restore(Box<C::State>, Sender<Result<(), C::Error>>),
    Replace(Box<C>, Sender<io::Result<C::Kicker>>),
    Exit,
}

/// Controls one vCPU thread.
pub struct Handle<C: Cpu> {
    requests: Sender<Request<C>>,
    /// Sent by the thread once it runs; only a caller that wants to kick it has to wait for that.
    kicker: Receiver<io::Result<C::Kicker>>,
    known_kicker: OnceCell<Option<C::Kicker>>,
    /// Microseconds that the kernel had worked for the thread when it parked last.
    system: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Cpu> Handle<C> {
    /// Start the thread of a parked vCPU, set up by `start`. When the vCPU stops by itself, the
    /// cause goes to `report`, and it is parked.
    ///
    /// # Errors
    /// When the host refuses the thread or a resource for kicking it.
    pub fn spawn(
        index: usize,
        mut cpu: C,
        start: &ThreadStart,
        report: impl Fn(usize, Stopped) + Send + 'static,
    ) -> io::Result<Self> {
        let (requests, inbox) = channel();
        let (send_kicker, kicker) = channel();
        let name = format!("vcpu{index}");
        let first_step = start.first_step(ThreadKind::Vcpu, &name);
        let system = Arc::<AtomicU64>::default();
        let told = system.clone();
        let thread = Builder::new().name(name).spawn(move || {
            let kicker = cpu.kicker();
            let failed = kicker.is_err();
            if send_kicker.send(kicker).is_err() {
                return;
            }
            if failed {
                return report(index, Stopped::Failed);
            }
            if first_step().is_err() {
                return;
            }
            while parked(&mut cpu, &inbox) {
                match running(&mut cpu, &inbox) {
                    Left::Parked(reply) => {
                        told.store(usage::system_us(), Ordering::Relaxed);
                        let _ = reply.send(());
                    }
                    // Parked until the VM has decided how to react.
                    Left::Stopped(why) => report(index, why),
                    Left::Exit => break,
                }
            }
        })?;
        let known_kicker = OnceCell::new();
        Ok(Self { requests, kicker, known_kicker, system, thread: Some(thread) })
    }

    /// `None` if the thread could not set up kicking; it has ended then.
    fn kicker(&self) -> Option<&C::Kicker> {
        let receive = || match self.kicker.recv() {
            Ok(Ok(kicker)) => Some(kicker),
            Ok(Err(e)) => {
                log::error!("a vCPU thread cannot start: {e}");
                None
            }
            Err(_) => None,
        };
        self.known_kicker.get_or_init(receive).as_ref()
    }

    fn kick(&self) {
        if let Some(kicker) = self.kicker() {
            kicker.kick();
        }
    }

    /// Request a stop at the next consistent point. Send the request to all vCPUs first, then wait
    /// for each.
    pub fn park(&self) -> Answer<()> {
        let answer = self.ask(Request::Park);
        self.kick();
        answer
    }
    /// Keep a running vCPU out of the guest for `time`. Any other request ends that.
    pub fn rest(&self, time: Duration) {
        let _ = self.requests.send(Request::Rest(time));
        self.kick();
    }
    /// Let a parked vCPU run, after a pause of `ticks` of the host's counter.
    pub fn resume(&self, ticks: i64) {
        let _ = self.requests.send(Request::Resume(ticks));
    }
    /// Request the registers of a parked vCPU.
    pub fn save(&self) -> Answer<Result<C::State, C::Error>> {
        self.ask(Request::Save)
    }
    /// Have the thread of a parked vCPU do `job`.
    pub fn work(&self, job: Box<dyn FnOnce() + Send>) {
        let _ = self.requests.send(Request::Work(job));
    }
    /// Give a parked vCPU new registers.
    pub fn restore(&self, state: C::State) -> Answer<Result<(), C::Error>> {
        self.ask(|reply| Request::Restore(Box::new(state), reply))
    }
    /// Let the thread of a parked vCPU run `cpu` from now on; the old one is dropped.
    ///
    /// # Errors
    /// When the thread has ended, or the host refuses a resource for kicking it.
    pub fn replace(&mut self, cpu: C) -> io::Result<()> {
        let answer = self.ask(|reply| Request::Replace(Box::new(cpu), reply));
        let kicker = answer.wait().map_err(io::Error::other)??;
        self.known_kicker = OnceCell::from(Some(kicker));
        Ok(())
    }
    /// How long the kernel had worked for the thread when it parked last: for a vCPU, mostly
    /// handling page faults and exits.
    pub fn system_time(&self) -> Duration {
        Duration::from_micros(self.system.load(Ordering::Relaxed))
    }
    /// The kernel's thread id of the thread; 0 if it has ended.
    pub fn thread(&self) -> u32 {
        self.kicker().map_or(0, Kick::thread)
    }

    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request<C>) -> Answer<T> {
        let (reply, answer) = channel();
        // If the thread has ended, the answer is closed.
        let _ = self.requests.send(request(reply));
        Answer(answer)
    }
}

impl<C: Cpu> Drop for Handle<C> {
    fn drop(&mut self) {
        let _ = self.requests.send(Request::Exit);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serve requests until one asks to run (true) or to exit (false).
fn parked<C: Cpu>(cpu: &mut C, inbox: &Receiver<Request<C>>) -> bool {
    while let Ok(request) = inbox.recv() {
        match request {
            Request::Park(reply) => drop(reply.send(())),
            Request::Rest(_) => {}
            Request::Save(reply) => save(cpu, &reply),
            Request::Work(job) => job(),
            Request::Restore(state, reply) => restore(cpu, state, &reply),
            Request::Replace(new, reply) => {
                *cpu = *new;
                drop(reply.send(cpu.kicker()));
            }
            Request::Resume(ticks) => {
                cpu.resumed(ticks);
                return true;
            }
            Request::Exit => return false,
        }
    }
    false
}

// A vCPU's state takes several pages of stack. As parts of `parked`, these two functions would make
// every vCPU thread touch them; like this, only a thread that saves or restores a state does.

#[inline(never)]
fn save<C: Cpu>(cpu: &C, reply: &Sender<Result<C::State, C::Error>>) {
    let _ = reply.send(cpu.save());
}

#[inline(never)]
#[expect(clippy::boxed_local, reason = "taken out of its box on this stack, not on the caller's")]
fn restore<C: Cpu>(cpu: &mut C, state: Box<C::State>, reply: &Sender<Result<(), C::Error>>) {
    let _ = reply.send(cpu.restore(*state));
}

/// Why the run loop was left.
enum Left {
    Parked(Sender<()>),
    Stopped(Stopped),
    Exit,
}

/// Enter the guest until it stops or a request stops it.
fn running<C: Cpu>(cpu: &mut C, inbox: &Receiver<Request<C>>) -> Left {
    // One kick may stand for several requests if a device has blocked the thread meanwhile.
    if let Some(left) = asked(inbox) {
        return left;
    }
    loop {
        match cpu.run() {
            Exit::Handled => {}
            Exit::Stopped(why) => return Left::Stopped(why),
            Exit::Kicked => {
                if let Some(left) = asked(inbox) {
                    return left;
                }
            }
        }
    }
}

/// The pending request that stops a vCPU, if any.
fn asked<C: Cpu>(inbox: &Receiver<Request<C>>) -> Option<Left> {
    let mut rest = None;
    loop {
        let request = match rest.take() {
            None => inbox.try_recv(),
            Some(time) => inbox.recv_timeout(time).map_err(|e| match e {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            }),
        };
        match request {
            Ok(Request::Park(reply)) => return Some(Left::Parked(reply)),
            Ok(Request::Exit) | Err(TryRecvError::Disconnected) => return Some(Left::Exit),
            Ok(Request::Rest(time)) => rest = Some(time),
            // State requests need a parked vCPU: the caller sees the dropped reply as `Gone`.
            Ok(
                Request::Resume(_)
                | Request::Save(_)
                | Request::Work(_)
                | Request::Restore(..)
                | Request::Replace(..),
            ) => {}
            Err(TryRecvError::Empty) => return None,
        }
    }
}
