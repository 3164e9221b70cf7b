//! The one object that owns the machine and decides what becomes of it.
use std::time::Instant;

use config::actions::{Action, Actions};
use machine::{Machine, ReloadError, RunError};
use qmp::{
    Error, ErrorClass,
    schema::{
        Event, GuestPanicAction, MemoryFailureAction, MemoryFailureFlags, MemoryFailureRecipient,
        ShutdownCause,
    },
    server::Servers,
    table::Host,
};

use crate::{
    announce::Announcing,
    balloon::BalloonEvents,
    bounds,
    checkpoint::job::Checkpointer,
    deferred::{Deferrals, Halting},
    files::Files,
    lifecycle::{self, Denied, Halt, State, States},
    saving::Saving,
    spawner::Spawner,
};

/// The monitor's main object; lives on the main thread, and nobody else has it.
pub struct Vmm {
    /// Changed by [`Vmm::apply`] alone.
    state: State,
    pub(crate) machine: Machine,
    pub(crate) servers: Servers,
    /// Why and how to end, once the request being answered has been answered; and since when.
    ending: Option<(Ending, Instant)>,
    /// All that there is to be waited for before the end was told of it.
    pub(crate) winds_up: bool,
    actions: Actions,
    pub(crate) saving: Saving,
    pub(crate) announcing: Option<Announcing>,
    pub(crate) balloon: BalloonEvents,
    pub(crate) files: Files,
    pub(crate) spawner: Spawner,
    /// What the machine reported while its state was being saved, or something was deferred.
    late: Vec<machine::Event>,
    pub(crate) deferrals: Deferrals,
    /// Threads of the machine may wait for ever.
    stuck: bool,
}

/// How the VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// The guest's own doing.
    pub guest: bool,
    /// For the SHUTDOWN event.
    pub reason: ShutdownCause,
    /// The process's exit status.
    pub status: u8,
}

/// Why the VM could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Not in this state.
    #[error(transparent)]
    State(#[from] Denied),
    /// The machine could not.
    #[error(transparent)]
    Machine(#[from] RunError),
    /// Its kernel cannot be loaded again.
    #[error(transparent)]
    Kernel(#[from] ReloadError),
    /// A file that has to be read before does not come.
    #[error(
        "reading {0} has not finished: its storage is slow or hangs. The machine is as it was; try again \
         when the storage answers"
    )]
    Reading(String),
}

impl Vmm {
    /// A monitor for a machine that has not started.
    pub fn new(
        machine: Machine,
        servers: Servers,
        actions: Actions,
        checkpointer: Checkpointer,
        files: Files,
        spawner: Spawner,
    ) -> Self {
        Self {
            state: State::Prelaunch,
            machine,
            servers,
            ending: None,
            winds_up: false,
            actions,
            saving: Saving::new(checkpointer),
            announcing: None,
            balloon: BalloonEvents::default(),
            files,
            spawner,
            late: Vec::new(),
            deferrals: Deferrals::default(),
            stuck: false,
        }
    }

    /// Where the VM is in its life.
    pub fn state(&self) -> State {
        self.state
    }

    /// The one door through which the state changes: check, act, store, tell.
    ///
    /// # Errors
    /// When the event makes no sense now, or the machine cannot follow; the state is as before. It can
    /// be tried again if the machine has only not come to rest yet: see [`Vmm::vain_tries`].
    pub fn apply(&mut self, event: lifecycle::Event) -> Result<(), Refused> {
        let before = self.state;
        let after = before.on(event)?;
        match (before, after) {
            // Reset is the one event that does something without changing the state.
            _ if event == lifecycle::Event::Reset => {
                let kernel = self.reload()?;
                if let Err(e) = self.machine.pause() {
                    self.keep_reloaded(kernel);
                    return Err(e.into());
                }
                if let Err(e) = self.machine.reset(&kernel) {
                    let reason = ShutdownCause::HostError;
                    self.end(Ending { guest: false, reason, status: 1 });
                    return Err(e.into());
                }
                if before == State::Running {
                    self.machine.resume()?;
                }
            }
            (State::Prelaunch | State::Paused | State::PostMigrate, State::Running) => {
                self.machine.resume()?;
            }
            // Still vCPUs are what lets the last events be true. Of a halted machine the serial port
            // is still served.
            (
                State::Running | State::Halted(_),
                State::Paused | State::Saving | State::Halted(_),
            ) => {
                self.machine.pause()?;
            }
            (_, State::Shutdown) => {
                self.stuck |= !self.machine.stop_for_good(bounds::LAST_LOOK);
            }
            _ => {}
        }
        if let State::Halted(_) = after {
            // What the guest has said last can still be read.
            self.machine.serve_serial();
        }
        self.state = after;
        match (before, after) {
            (State::Prelaunch | State::Paused | State::PostMigrate, State::Running) => {
                self.tell(&Event::Resume {});
            }
            (State::Running, State::Paused | State::Saving | State::Halted(_)) => {
                self.tell(&Event::Stop {});
            }
            _ => {}
        }
        Ok(())
    }

    /// Note in the log which threads run the guest.
    pub fn log_vcpus(&self) {
        for (index, thread) in self.machine.vcpu_threads().into_iter().enumerate() {
            log::info!(target: "Vcpu", "{index} runs, as thread {thread}");
        }
    }

    /// What `act` tells one client goes out in one piece: events, then an answer.
    pub(crate) fn in_one_piece(&mut self, act: impl FnOnce(&mut Self)) {
        self.servers.hold_events();
        act(self);
        self.servers.send_events();
    }

    /// Tell every client.
    pub fn tell(&mut self, event: &Event) {
        self.servers.broadcast(event);
    }

    /// End after the request being answered. The first reason counts.
    pub fn end(&mut self, ending: Ending) {
        self.ending.get_or_insert_with(|| (ending, Instant::now()));
    }

    /// Whether to end, and how.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.map(|(ending, _)| ending)
    }

    /// Since when it is to end; now, if it is not.
    pub(crate) fn ends_since(&self) -> Instant {
        self.ending.map_or_else(Instant::now, |(_, since)| since)
    }

    /// How long until something is due that nothing else reports.
    pub(crate) fn until_due(&self) -> Option<std::time::Duration> {
        let (save, files) = (self.until_save(), self.files.until_overdue());
        let events = [self.until_announcement(), self.until_balloon()];
        [save, files, self.until_retry()].into_iter().chain(events).flatten().min()
    }

    /// Something that the machine could not decide by itself.
    pub fn machine_event(&mut self, event: machine::Event) {
        use machine::{Event as M, PowerEvent as P, Stopped as S};
        let waits = self.state == State::Saving || self.is_deferring() || self.ending.is_some();
        if waits && !matches!(event, M::MemoryLost(_) | M::Escape) {
            return self.late.push(event);
        }
        // What looks like the guest's own end may come of memory that it cannot read any more.
        if let M::Vcpu(index, S::Fault | S::Failed) = event
            && let Err(e) = machine::memory::image::check_files(self.machine.memory())
        {
            log::error!("vCPU {index} has stopped for good: {e}");
            return self.end(Ending { guest: false, reason: ShutdownCause::HostError, status: 1 });
        }
        match event {
            // Another vCPU than the one that brought the machine to its end, at the same moment.
            M::Vcpu(..) if matches!(self.state, State::Halted(_)) => {}
            M::Vcpu(_, S::Power(_) | S::Fault) if self.state == State::Prelaunch => {}
            M::Vcpu(_, S::Fault) if self.actions.triple_fault_panics => self.guest_panicked(),
            M::Vcpu(_, S::Power(P::Reset) | S::Fault) => {
                let (cause, action) = (ShutdownCause::GuestReset, self.actions.reboot);
                self.halt(Halt::Shutdown, true, cause, action, self.actions.reboot_status);
            }
            M::Vcpu(_, S::Power(P::Shutdown)) => {
                let (cause, action) = (ShutdownCause::GuestShutdown, self.actions.shutdown);
                self.halt(Halt::Shutdown, true, cause, action, 0);
            }
            M::Vcpu(_, S::Power(P::Panicked)) => self.guest_panicked(),
            M::Vcpu(index, S::Failed) => {
                log::error!("vCPU {index} has stopped for good");
                let (cause, action) = (ShutdownCause::HostError, self.actions.panic);
                self.halt(Halt::InternalError, false, cause, action, 1);
            }
            M::MemoryLost(reason) => {
                let event = Event::MemoryFailure {
                    recipient: MemoryFailureRecipient::Hypervisor,
                    action: MemoryFailureAction::Fatal,
                    flags: MemoryFailureFlags::default(),
                    reason,
                };
                self.tell(&event);
                self.stuck = true;
                self.end(Ending { guest: false, reason: ShutdownCause::HostError, status: 1 });
            }
            M::Escape => {
                self.end(Ending { guest: false, reason: ShutdownCause::HostSignal, status: 0 })
            }
            M::BalloonChanged(_) => self.balloon.changed(),
            M::DiskError { id, write, error, told: _ } => self.tell(&disk_error(id, write, &error)),
        }
    }

    /// What had to wait for the end of a save.
    pub(crate) fn late_events(&mut self) {
        for event in std::mem::take(&mut self.late) {
            self.machine_event(event);
        }
    }

    fn guest_panicked(&mut self) {
        let action = self.actions.panic;
        let told = match action {
            Action::End => GuestPanicAction::Poweroff,
            Action::Reset => GuestPanicAction::Run,
            Action::Stay => GuestPanicAction::Pause,
        };
        self.tell(&Event::GuestPanicked { action: told });
        let status = self.actions.panic_status;
        self.halt(Halt::GuestPanicked, true, ShutdownCause::GuestPanic, action, status);
    }

    /// The guest cannot go on: do what is to be done then. `status` is the process's if it ends.
    fn halt(&mut self, why: Halt, guest: bool, reason: ShutdownCause, action: Action, status: u8) {
        let until = Instant::now() + bounds::GUEST_REST;
        self.try_halt(Halting { why, guest, reason, action, status, until });
    }

    /// Whether threads of the machine may never come to an end.
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck
    }
}

fn disk_error(id: String, write: bool, error: &std::io::Error) -> Event {
    use qmp::schema::{BlockErrorAction, IoOperationType};
    let full = error.kind() == std::io::ErrorKind::StorageFull;
    Event::BlockIoError {
        node_name: Some(id.clone()),
        device: id,
        operation: if write { IoOperationType::Write } else { IoOperationType::Read },
        action: BlockErrorAction::Report,
        nospace: Some(full),
        reason: error.to_string(),
    }
}

impl Host for Vmm {
    type When = States;

    fn admit(&self, name: &str, when: States) -> Result<(), Error> {
        if when.contains(self.state) {
            return Ok(());
        }
        let desc = format!("{name} is not possible now: {}", self.state.hint());
        Err(Error::new(ErrorClass::GenericError, desc))
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Self::generic(&refused)
    }
}
