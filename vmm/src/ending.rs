//! The shutdown of the process, within [`bounds::SIGNAL`] whatever hangs.
//!
//! ```text
//!   main thread                                           another thread
//!   give up a save, stop the guest, leave its backup;
//!   queries are answered until all are done, or hang
//!   deliver SHUTDOWN, close the clients' sockets
//!   ------------------------------------------------------> output, names, the memory file
//!   log, then all descriptors that wait for nothing
//!   ------------------------------------------------------> disks without requests in flight
//!   _exit
//! ```
//! The main thread waits for that, but not beyond the bound. A thread that waits for hanging
//! storage may keep the process from ending: what is left of it then is a process id that holds
//! nothing but this storage.
use std::{
    sync::mpsc::channel,
    time::{Duration, Instant},
};

use machine::release;
use qmp::schema::Event;

use crate::{
    bounds, lifecycle, logging,
    pidfile::PidFile,
    terminal,
    threads::Tasks,
    vmm::{Ending, Vmm},
};

/// Time left of the bound when the main thread exits, for the kernel to tear the process down.
const SPARE: Duration = Duration::from_millis(500);
/// How long the log may take to reach its file.
const LOG: Duration = Duration::from_millis(500);
/// How long clients may take to read what is queued for them.
const DELIVERY: Duration = Duration::from_secs(1);

/// Does what may wait for storage at the end.
pub struct End(Tasks);

impl End {
    /// An end that is carried out by `tasks`.
    pub fn new(tasks: Tasks) -> Self {
        Self(tasks)
    }

    /// Have `step` done; whether it is over by `deadline`.
    fn within(&self, deadline: Instant, step: impl FnOnce() + Send + 'static) -> bool {
        let (report, done) = channel();
        let task = move || {
            step();
            // The main thread may have stopped waiting for it.
            let _ = report.send(());
        };
        let left = deadline.saturating_duration_since(Instant::now());
        self.0.run(Box::new(task)).is_ok() && done.recv_timeout(left).is_ok()
    }
}

impl Vmm {
    /// Whether SHUTDOWN can be sent: a save has been given up and the guest has stopped, or each
    /// has had as much time as a command has; and a backup knows that it is not to continue the
    /// guest.
    pub(crate) fn is_ready_to_end(&mut self) -> bool {
        self.winds_up = true;
        if self.is_stuck() {
            return true;
        }
        let abandoned = self.abandons_save();
        let before = self.rest_timeouts();
        let rests = self.machine.pause().is_ok() || self.rest_timeouts() == before;
        let quiet = abandoned && rests || self.ends_since().elapsed() >= bounds::REST;
        quiet && self.has_left_protection()
    }

    /// Stop the guest, send SHUTDOWN to every client, release everything that others could wait
    /// for, and end the process. `end` was started for this, and `pidfile` names the process.
    pub fn shut_down(mut self, ending: Ending, end: &End, pidfile: Option<PidFile>) {
        let deadline = self.ends_since() + bounds::SIGNAL - SPARE;
        self.leave_save_behind();
        if !self.is_stuck()
            && let Err(e) = self.apply(lifecycle::Event::Shutdown)
        {
            log::error!("ended with the guest running: {e}");
        }
        let quiet = !self.is_stuck();
        self.broadcast(&Event::Shutdown { guest: ending.guest, reason: ending.reason });
        let names = std::mem::take(&mut self.servers).shutdown(DELIVERY);
        terminal::put_back();
        let (leave, leave_disks) = (self.machine.leave(quiet), self.machine.leave_idle_disks());
        // Its threads may still use it; it goes with the process.
        std::mem::forget(self);

        let left = end.within(deadline - LOG, move || {
            drop((names, pidfile));
            leave();
        });
        if !left {
            log::warn!("storage hangs: the last writes may be lost");
        }
        logging::finish(LOG.min(deadline.saturating_duration_since(Instant::now())));
        // On an error the kernel releases them when the process ends, as it usually does.
        let _ = release::everything_but_storage();
        end.within(deadline, leave_disks);
    }
}
