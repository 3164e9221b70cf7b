//! The incoming thread of a backup: it builds the machine, which the thread that reads what a
//! primary sends must not do.
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, Builder as Thread},
};

use config::Description;
use machine::{Machine, Memory, Refused, Tsc, check_tsc};
use parking_lot::Mutex;
use qmp::schema::{ReplicationInfo, ReplicationSide, ReplicationStatus};
use replication::Incarnation;
use state::cpu::Cpu;

use super::{
    keeper::{Keeper, Wanted},
    standby::{Builder, Standby, Task, Tell, ToStandby},
};
use crate::{
    checkpoint::{
        Arrived, Assembly, IncomingError, ReceiveError, Received, RestoreError, Voice, take,
    },
    lifecycle::Halt,
    seccomp::{Confinement, Kind},
    wake::Wake,
};

/// What the thread needs.
pub struct Host {
    /// How the machine is built.
    pub assembly: Assembly,
    /// The socket at which primaries connect, and who decides.
    pub task: Task,
    /// Confines the thread that reads.
    pub confinement: Confinement,
}

enum Ask {
    Room(Box<Description>, Option<Box<(Option<Cpu>, Tsc)>>),
    Build(Box<Received>),
    Forget,
    Take,
}

/// The reading thread's end.
struct Asking<'a> {
    assembly: &'a Assembly,
    ask: Sender<Ask>,
    memory: Receiver<Result<Memory, String>>,
    answers: Receiver<Result<(), String>>,
}

impl Builder for Asking<'_> {
    fn disks(&self, description: &Description) -> Result<Vec<Wanted>, String> {
        let mut here = description.clone();
        let changed = self.assembly.apply_overrides(&mut here);
        changed.map_err(|e| qmp::Error::generic(&e).to_string())?;
        let disks = here.occupied.disks.iter().zip(&here.disk_sizes);
        let wanted = disks.filter_map(|(disk, size)| {
            let disk = disk.as_ref().filter(|disk| !disk.readonly)?;
            Some(Wanted { id: disk.id.to_string(), path: disk.path.clone(), size: *size })
        });
        Ok(wanted.collect())
    }

    fn room(
        &mut self,
        mut description: Description,
        guest: Option<(Option<Cpu>, Tsc)>,
    ) -> Result<Memory, String> {
        let changed = self.assembly.apply_overrides(&mut description);
        changed.map_err(|e| qmp::Error::generic(&e).to_string())?;
        self.send(Ask::Room(Box::new(description), guest.map(Box::new)));
        self.memory.recv().unwrap_or_else(|_| Err(gone()))
    }

    fn build(&mut self, received: Received) {
        self.send(Ask::Build(Box::new(received)));
    }

    fn forget(&mut self) {
        self.send(Ask::Forget);
    }

    fn take(&mut self) {
        self.send(Ask::Take);
    }

    fn answer(&mut self) -> Option<Result<(), String>> {
        match self.answers.try_recv() {
            Ok(answer) => Some(answer),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(gone())),
        }
    }
}

impl Asking<'_> {
    fn send(&self, ask: Ask) {
        // That thread ends after this one.
        let _ = self.ask.send(ask);
    }
}

fn gone() -> String {
    "the thread that builds it has ended".into()
}

impl Host {
    /// Be the backup, until the guest runs here or never will.
    ///
    /// # Errors
    /// Why it never will.
    pub fn serve(self, tell: impl Fn(Tell) + Send) -> Result<Arrived, RestoreError> {
        let Self { assembly, task, confinement } = self;
        let wake = task.wake.clone();
        let (ask, asked) = channel();
        let (give, memory) = channel();
        let (answer, answers) = channel();
        thread::scope(|scope| {
            let asking = Asking { assembly: &assembly, ask, memory, answers };
            let (keeper, keep) = Keeper::new(wake.clone());
            let first_step_of_disks = confinement.first_step(Kind::Disks, "disks");
            let keep = move || {
                if first_step_of_disks().is_ok() {
                    keep();
                }
            };
            let thread = Thread::new().name("disks".into()).spawn_scoped(scope, keep);
            thread.map_err(IncomingError::Wait)?;
            let first_step = confinement.first_step(Kind::Stream, "stream");
            let checked = &confinement;
            let confine =
                move || first_step().or_else(|Refused| checked.check().map_err(io::Error::other));
            let read = move || {
                confine().map_err(IncomingError::Wait)?;
                Ok::<_, RestoreError>(Standby::new(task, asking, keeper, tell).run()?)
            };
            let reader = Thread::new().name("stream".into()).spawn_scoped(scope, read);
            let reader = reader.map_err(IncomingError::Wait)?;
            let mut machine: Option<(Machine, Option<Halt>)> = None;
            for ask in asked {
                match ask {
                    Ask::Room(description, guest) => {
                        let fits = guest.as_ref().map_or(Ok(()), |guest| check_tsc(guest.1));
                        let cpu = guest.as_ref().and_then(|guest| guest.0.as_ref());
                        let room = fits
                            .map_err(RestoreError::from)
                            .and_then(|()| assembly.make_room(&description, cpu));
                        let _ = give.send(room.map_err(|e| text(&e)));
                        continue;
                    }
                    Ask::Forget => {
                        let forgotten = match machine.take() {
                            Some((machine, _)) => machine.unbuild().map_err(|e| text(&e)),
                            None => Err("it was not built".into()),
                        };
                        let _ = answer.send(forgotten);
                    }
                    Ask::Build(received) => {
                        let built = assembly.replica(*received, assembly.open_kvm());
                        let _ =
                            answer.send(built.map(|new| machine = Some(new)).map_err(|e| text(&e)));
                    }
                    Ask::Take => {
                        let taken = match &mut machine {
                            Some((machine, _)) => take(machine).map_err(|e| text(&e)),
                            None => Err("it was not built".into()),
                        };
                        let _ = answer.send(taken);
                    }
                }
                wake.wake();
            }
            let promotion = reader.join().unwrap_or_else(|_| {
                Err(IncomingError::Wait(io::Error::other("its reader thread has panicked")).into())
            })?;
            let Some((machine, halted)) = machine else {
                return Err(ReceiveError::Replica("it was not built".into()).into());
            };
            let promotion = Some(Box::new(promotion));
            Ok(Arrived { machine, halted, answer: Voice::silent(), promotion })
        })
    }
}

fn text(error: &dyn std::error::Error) -> String {
    qmp::Error::generic(error).to_string()
}

/// What main and standby share.
pub struct Shared {
    /// To the thread.
    pub orders: Sender<ToStandby>,
    /// Wakes it.
    pub wake: Wake,
    /// What it shows.
    pub status: Arc<Mutex<ReplicationInfo>>,
}

impl Shared {
    /// The ends of a new backup, which is this process, and what is left for its task. Clients see
    /// which one it is at once, not only when its thread has begun.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(own: Incarnation) -> io::Result<(Self, Receiver<ToStandby>)> {
        let (orders, inbox) = channel();
        let status = Arc::new(Mutex::new(ReplicationInfo {
            state: ReplicationStatus::Listening,
            role: Some(ReplicationSide::Backup),
            incarnation: Some(own.to_string()),
            ..Default::default()
        }));
        Ok((Self { orders, wake: Wake::new()?, status }, inbox))
    }

    /// Give the thread an order. One that has ended has said so.
    pub fn give(&self, order: ToStandby) {
        let _ = self.orders.send(order);
        self.wake.wake();
    }
}

/// A new process.
///
/// # Errors
/// When the host cannot provide random numbers.
pub fn incarnation() -> io::Result<Incarnation> {
    crate::checkpoint::job::new_id().map(Incarnation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_shown_before_its_thread_has_begun() {
        let (shared, _orders) = Shared::new(Incarnation(7)).unwrap();
        let shown = shared.status.lock();
        assert_eq!(shown.state, ReplicationStatus::Listening);
        assert_eq!(shown.role, Some(ReplicationSide::Backup));
        assert_eq!(shown.incarnation, Some(Incarnation(7).to_string()));
    }
}
