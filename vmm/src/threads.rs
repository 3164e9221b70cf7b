//! The threads beside the main one that exist whatever the machine is. They start while it is
//! built: the main thread starts one thread, which starts the rest before it confines itself.
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::Builder,
};

use anyhow::Context;

use crate::{
    checkpoint::job::{Checkpointer, Task},
    ending::End,
    files::Files,
    seccomp::{Confinement, Kind},
};

/// Gives a thread something to do, one task after another.
pub struct Tasks(Sender<Task>);

impl Tasks {
    /// The handle, and the body of the thread.
    fn new() -> (Self, impl FnOnce() + Send + 'static) {
        let (tasks, inbox) = channel::<Task>();
        (Self(tasks), move || inbox.iter().for_each(|task| task()))
    }

    /// Have the thread do `task`.
    ///
    /// # Errors
    /// When the thread has gone.
    pub fn run(&self, task: Task) -> io::Result<()> {
        self.0.send(task).map_err(|_| io::Error::other("its thread has ended"))
    }
}

/// Handles of the threads.
pub struct Threads {
    /// Makes saves.
    pub checkpointer: Checkpointer,
    /// Opens files.
    pub files: Files,
    /// Reads the disks of a replicated machine, and writes their sidecars.
    pub disks: Tasks,
    /// Releases what may hang.
    pub end: End,
}

/// Threads that are being started.
pub struct Starting {
    checkpointer: Checkpointer,
    files: Files,
    disks: Tasks,
    end: End,
    started: Receiver<io::Result<()>>,
}

impl Starting {
    /// Start the threads. `notify` is called when one of them has something to report; it must not
    /// block. Each of them is confined by `confinement` before it serves.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn begin(
        notify: &Arc<dyn Fn() + Send + Sync>,
        confinement: &Confinement,
    ) -> io::Result<Self> {
        let (checkpointer, save) = Checkpointer::new(notify.clone());
        let (files, serve, read) = Files::new(notify.clone());
        let (disks, tasks) = Tasks::new();
        let (end, release) = End::new();
        let (report, started) = channel();
        let confined = confinement.clone();
        let start_others = move || -> io::Result<()> {
            start(&confined, Kind::Files, "files", 128 << 10, serve)?;
            start(&confined, Kind::Kernel, "kernel", 128 << 10, read)?;
            start(&confined, Kind::Disks, "disks", 256 << 10, tasks)?;
            start(&confined, Kind::End, "end", 64 << 10, release)
        };
        let first_step = confinement.first_step(Kind::Checkpoint, "checkpoint");
        Builder::new().name("checkpoint".into()).stack_size(256 << 10).spawn(move || {
            // The receiver is gone only if the process is ending.
            let _ = report.send(start_others());
            drop(report);
            if first_step().is_ok() {
                save();
            }
        })?;
        Ok(Self { checkpointer, files, disks, end, started })
    }

    /// Wait until all have started.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn finish(self) -> anyhow::Result<Threads> {
        let Self { checkpointer, files, disks, end, started } = self;
        let started = started.recv().context("a thread ended before it was ready")?;
        started.context("cannot start a thread")?;
        Ok(Threads { checkpointer, files, disks, end })
    }
}

/// Start a thread that confines itself and then serves.
fn start(
    confinement: &Confinement,
    kind: Kind,
    name: &str,
    stack: usize,
    serve: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let first_step = confinement.first_step(kind, name);
    let run = move || {
        if first_step().is_ok() {
            serve();
        }
    };
    Builder::new().name(name.into()).stack_size(stack).spawn(run).map(drop)
}
