//! The end of the process, within [`bounds::SIGNAL`] whatever hangs.
//!
//! ```text
//!   main thread                                           thread `end`
//!   give up a save, stop the guest; questions are
//!   answered until both are done, or hang
//!   deliver SHUTDOWN, close the clients' sockets
//!   ------------------------------------------------------> output, names, the file of memory
//!   log, then all descriptors that wait for nothing
//!   ------------------------------------------------------> disks without requests in flight
//!   _exit
//! ```
//! The main thread waits for `end`, but not beyond the bound. A thread that waits for storage which hangs
//! may keep the process from ending: then it is a process id only, that holds nothing but this storage.
use std::{
    sync::mpsc::{Receiver, Sender, channel},
    time::{Duration, Instant},
};

use machine::release;
use qmp::schema::Event;

use crate::{
    bounds, lifecycle, logging,
    pidfile::PidFile,
    terminal,
    vmm::{Ending, Vmm},
};

/// Left of the bound when the main thread goes, for the kernel to take the process apart.
const SPARE: Duration = Duration::from_millis(500);
/// How long the log may take to arrive in its file.
const LOG: Duration = Duration::from_millis(500);
/// How long clients may take to read what is queued for them.
const DELIVERY: Duration = Duration::from_secs(1);

type Step = Box<dyn FnOnce() + Send>;

/// The thread `end`, for what may wait for storage.
pub struct End {
    steps: Sender<Step>,
    done: Receiver<()>,
}

impl End {
    /// The main thread's end, and what the thread does.
    pub fn new() -> (Self, impl FnOnce() + Send + 'static) {
        let (steps, inbox) = channel::<Step>();
        let (report, done) = channel();
        let release = move || {
            while let Ok(step) = inbox.recv() {
                step();
                // The main thread may not wait for it any more.
                let _ = report.send(());
            }
        };
        (Self { steps, done }, release)
    }

    /// Do `step` there; whether it is over by `deadline`.
    fn within(&self, deadline: Instant, step: impl FnOnce() + Send + 'static) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        self.steps.send(Box::new(step)).is_ok() && self.done.recv_timeout(left).is_ok()
    }
}

impl Vmm {
    /// Whether SHUTDOWN can be told: a save is given up and the guest is stopped, or each has had
    /// as much time as a command has.
    pub(crate) fn is_ready_to_end(&mut self) -> bool {
        self.winds_up = true;
        if self.is_stuck() {
            return true;
        }
        let abandoned = self.abandons_save();
        let before = self.vain_tries();
        let rests = self.machine.pause().is_ok() || self.vain_tries() == before;
        abandoned && rests || self.ends_since().elapsed() >= bounds::REST
    }

    /// The last words, SHUTDOWN to every client, and everything that others could wait for; the process
    /// ends. `end` was started for this, and `pidfile` names the process.
    pub fn shut_down(mut self, ending: Ending, end: &End, pidfile: Option<PidFile>) {
        let deadline = self.ends_since() + bounds::SIGNAL - SPARE;
        self.leave_save_behind();
        if !self.is_stuck()
            && let Err(e) = self.apply(lifecycle::Event::Shutdown)
        {
            log::error!("ended with the guest running: {e}");
        }
        let quiet = !self.is_stuck();
        self.tell(&Event::Shutdown { guest: ending.guest, reason: ending.reason });
        let names = std::mem::take(&mut self.servers).shutdown(DELIVERY);
        terminal::put_back();
        let (leave, leave_disks) = (self.machine.leave(quiet), self.machine.leave_idle_disks());
        // Its threads may still use it; it ends with the process.
        std::mem::forget(self);

        let left = end.within(deadline - LOG, move || {
            drop((names, pidfile));
            leave();
        });
        if !left {
            log::warn!("storage hangs: what was written last may be lost");
        }
        logging::finish(LOG.min(deadline.saturating_duration_since(Instant::now())));
        // An error: the kernel gives them up when the process ends, as it does most often.
        let _ = release::everything_but_storage();
        end.within(deadline, leave_disks);
    }
}
