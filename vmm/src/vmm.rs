//! The one object that owns the machine and controls its life cycle.
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
    replication::Replication,
    saving::Saving,
    spawner::Spawner,
    threads::Tasks,
};

/// The monitor's main object; it lives on the main thread, and no other thread has access to it.
pub struct Vmm {
    /// Changed only by [`Vmm::apply`].
    state: State,
    pub(crate) machine: Machine,
    pub(crate) servers: Servers,
    /// Why and how to end, once the current request has been answered; and since when.
    ending: Option<(Ending, Instant)>,
    /// Everything that the end waits for has been asked to stop.
    pub(crate) winds_up: bool,
    actions: Actions,
    pub(crate) saving: Saving,
    pub(crate) replication: Replication,
    pub(crate) announcing: Option<Announcing>,
    pub(crate) balloon: BalloonEvents,
    pub(crate) files: Files,
    /// Does what may wait for storage.
    pub(crate) storage: Tasks,
    pub(crate) spawner: Spawner,
    /// Events of the machine that came while its state was being saved, or an operation was
    /// deferred.
    late: Vec<machine::Event>,
    pub(crate) deferrals: Deferrals,
    /// Threads of the machine may never end.
    stuck: bool,
}

/// How the VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// The guest has caused it.
    pub guest: bool,
    /// For the SHUTDOWN event.
    pub reason: ShutdownCause,
    /// The process's exit status.
    pub status: u8,
}

/// Why the VM could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The event is not possible in this state.
    #[error(transparent)]
    State(#[from] Denied),
    /// The machine could not do it.
    #[error(transparent)]
    Machine(#[from] RunError),
    /// The kernel cannot be loaded again.
    #[error(transparent)]
    Kernel(#[from] ReloadError),
    /// A file that has to be read first cannot be read in time.
    #[error(
        "reading {0} has not finished: its storage is slow or hangs. The machine is unchanged; try \
         again when the storage answers"
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
        storage: Tasks,
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
            replication: Replication::default(),
            announcing: None,
            balloon: BalloonEvents::default(),
            files,
            storage,
            spawner,
            late: Vec::new(),
            deferrals: Deferrals::default(),
            stuck: false,
        }
    }

    /// The VM's state.
    pub fn state(&self) -> State {
        self.state
    }

    /// The only place where the state changes: check, act, store, report.
    ///
    /// # Errors
    /// When the event is not possible now, or the machine cannot follow; the state is as before. It
    /// can be retried if the machine has merely not come to rest yet: see [`Vmm::rest_timeouts`].
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
            // Only with stopped vCPUs are the last events true. The serial port of a halted machine
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
            // The guest's last output can still be read.
            self.machine.serve_serial();
        }
        self.state = after;
        match (before, after) {
            (State::Prelaunch | State::Paused | State::PostMigrate, State::Running) => {
                self.broadcast(&Event::Resume {});
            }
            (State::Running, State::Paused | State::Saving) => self.broadcast(&Event::Stop {}),
            (State::Running, State::Halted(_)) => self.tell_of_guest(Event::Stop {}),
            _ => {}
        }
        Ok(())
    }

    /// Log which threads run the guest.
    pub fn log_vcpus(&self) {
        for (index, thread) in self.machine.vcpu_threads().into_iter().enumerate() {
            log::info!(target: "Vcpu", "{index} runs, as thread {thread}");
        }
    }

    /// Send what `act` produces for one client in one piece: events, then an answer.
    pub(crate) fn in_one_piece(&mut self, act: impl FnOnce(&mut Self)) {
        self.servers.hold_events();
        act(self);
        self.servers.send_events();
    }

    /// Send an event to every client.
    pub fn broadcast(&mut self, event: &Event) {
        self.servers.broadcast(event);
    }

    /// End after the current request has been answered. The first reason counts.
    pub fn end(&mut self, ending: Ending) {
        if self.ending.is_none() {
            self.ending = Some((ending, Instant::now()));
            self.leave_protection(ending.reason);
        }
    }

    /// How to end, if the VM is to end.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.map(|(ending, _)| ending)
    }

    /// Since when the VM is to end; now, if it is not to.
    pub(crate) fn ends_since(&self) -> Instant {
        self.ending.map_or_else(Instant::now, |(_, since)| since)
    }

    /// How long until something is due that no event reports.
    pub(crate) fn until_due(&self) -> Option<std::time::Duration> {
        let (save, files) = (self.until_save(), self.files.until_overdue());
        let events = [self.until_announcement(), self.until_balloon(), self.until_epoch()];
        [save, files, self.until_retry()].into_iter().chain(events).flatten().min()
    }

    /// Handle an event that the machine cannot decide by itself.
    pub fn machine_event(&mut self, event: machine::Event) {
        use machine::{Event as M, PowerEvent as P, Stopped as S};
        let waits = self.state == State::Saving || self.is_deferring() || self.ending.is_some();
        if waits && !matches!(event, M::MemoryLost(_) | M::Escape) {
            return self.late.push(event);
        }
        // What looks like the guest's own end may be caused by memory that can no longer be read.
        if let M::Vcpu(index, S::Fault | S::Failed) = event
            && let Err(e) = machine::memory::image::check_files(self.machine.memory())
        {
            log::error!("vCPU {index} has stopped: {e}");
            return self.end(Ending { guest: false, reason: ShutdownCause::HostError, status: 1 });
        }
        match event {
            // Another vCPU than the one that halted the machine, at the same moment.
            M::Vcpu(..) if matches!(self.state, State::Halted(_)) => {}
            M::Vcpu(_, S::Power(_) | S::Fault) if self.state == State::Prelaunch => {}
            M::Vcpu(_, S::Fault) if self.actions.fault_panics => self.guest_panicked(),
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
                log::error!("vCPU {index} has stopped");
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
                self.broadcast(&event);
                self.stuck = true;
                self.end(Ending { guest: false, reason: ShutdownCause::HostError, status: 1 });
            }
            M::Escape => {
                self.end(Ending { guest: false, reason: ShutdownCause::HostSignal, status: 0 })
            }
            M::BalloonChanged(_) => self.balloon.changed(),
            M::DiskError { id, write, error, token: _ } => {
                self.tell_of_guest(disk_error(id, write, &error))
            }
        }
    }

    /// Handle the events that had to wait for the end of a save.
    pub(crate) fn late_events(&mut self) {
        for event in std::mem::take(&mut self.late) {
            self.machine_event(event);
        }
    }

    fn guest_panicked(&mut self) {
        let action = self.actions.panic;
        let reaction = match action {
            Action::End => GuestPanicAction::Poweroff,
            Action::Reset => GuestPanicAction::Run,
            Action::Stay => GuestPanicAction::Pause,
        };
        self.tell_of_guest(Event::GuestPanicked { action: reaction });
        let status = self.actions.panic_status;
        self.halt(Halt::GuestPanicked, true, ShutdownCause::GuestPanic, action, status);
    }

    /// Halt the guest, which cannot run on, and take `action`. `status` is the exit status if the
    /// process ends.
    fn halt(&mut self, why: Halt, guest: bool, reason: ShutdownCause, action: Action, status: u8) {
        let until = Instant::now() + bounds::GUEST_REST;
        self.try_halt(Halting { why, guest, reason, action, status, until });
    }

    /// Whether threads of the machine may never end.
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
        let desc = if !when.contains(self.state) {
            format!("{name} is not possible now: {}", self.state.hint())
        } else if let Some(why) = self.replication_forbids(name) {
            format!("{name} is not possible now: {why}")
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorClass::GenericError, desc))
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        Self::generic(&refused)
    }
}
