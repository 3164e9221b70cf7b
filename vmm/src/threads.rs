//! The threads beside the main one that exist whatever the machine is. They start while it is
//! built: the main thread starts one thread, which starts the rest. Until the machine is complete
//! they help to build it; then they confine themselves, and serve.
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread::Builder,
};

use anyhow::Context;
use machine::Helpers;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    checkpoint::job::{Checkpointer, Task},
    ending::End,
    files::Files,
    seccomp::{Confinement, Kind},
};

/// Threads for what may wait for storage. There are two: whatever hangs, one of them is left for
/// the end of the monitor, or for a reset.
const FILES: [&str; 2] = ["files0", "files1"];

/// Gives threads something to do. Clones share the threads; each task is done by the first that
/// has nothing to do.
#[derive(Clone)]
pub struct Tasks(Arc<Queue>);

struct Queue {
    /// `None` once it is closed. Never locked while a task is done.
    tasks: Mutex<Option<VecDeque<Task>>>,
    changed: Condvar,
}

impl Tasks {
    fn new() -> Self {
        let tasks = Mutex::new(Some(VecDeque::new()));
        Self(Arc::new(Queue { tasks, changed: Condvar::new() }))
    }

    /// Have a thread do `task`.
    ///
    /// # Errors
    /// When the threads do something else now.
    pub fn run(&self, task: Task) -> io::Result<()> {
        let closed = || io::Error::other("its threads do something else now");
        self.0.tasks.lock().as_mut().ok_or_else(closed)?.push_back(task);
        self.0.changed.notify_one();
        Ok(())
    }

    /// The threads do not wait for tasks any more.
    fn close(&self) {
        *self.0.tasks.lock() = None;
        self.0.changed.notify_all();
    }

    /// Do tasks, until they are closed.
    fn serve(&self) {
        let mut queue = self.0.tasks.lock();
        while let Some(tasks) = &mut *queue {
            match tasks.pop_front() {
                Some(task) => MutexGuard::unlocked(&mut queue, task),
                None => self.0.changed.wait(&mut queue),
            }
        }
    }
}

/// Handles of the threads.
pub struct Threads {
    /// Makes saves.
    pub checkpointer: Checkpointer,
    /// Opens files.
    pub files: Files,
    /// Does what may wait for storage.
    pub storage: Tasks,
    /// Releases what may hang.
    pub end: End,
}

/// Threads that are being started.
pub struct Starting {
    checkpointer: Checkpointer,
    storage: Tasks,
    notify: Arc<dyn Fn() + Send + Sync>,
    /// What they do before they serve; closed when they are to serve.
    setup: Tasks,
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
        let (storage, setup) = (Tasks::new(), Tasks::new());
        let (serve, help) = (storage.clone(), setup.clone());
        let (report, started) = channel();
        let first_step = confinement.first_step(Kind::Checkpoint, "checkpoint");
        let others = FILES.map(|name| (name, confinement.first_step(Kind::Files, name)));
        Builder::new().name("checkpoint".into()).spawn(move || {
            let start_others = || {
                others.into_iter().try_for_each(|(name, first_step)| {
                    let (help, serve) = (help.clone(), serve.clone());
                    let run = move || {
                        help.serve();
                        if first_step().is_ok() {
                            serve.serve();
                        }
                    };
                    Builder::new().name(name.into()).spawn(run).map(drop)
                })
            };
            // The receiver is gone only if the process is ending.
            let _ = report.send(start_others());
            drop(report);
            help.serve();
            if first_step().is_ok() {
                save();
            }
        })?;
        Ok(Self { checkpointer, storage, notify: notify.clone(), setup, started })
    }

    /// The threads, as long as they do not serve.
    pub fn helpers(&self) -> Helpers {
        let setup = self.setup.clone();
        Helpers::new(move |task| {
            // A task that comes too late is dropped, which its sender notices.
            let _ = setup.run(task);
        })
    }

    /// Let them serve, once the machine is complete.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn finish(self) -> anyhow::Result<Threads> {
        let Self { checkpointer, storage, notify, setup, started } = self;
        setup.close();
        let started = started.recv().context("a thread ended before it was ready")?;
        started.context("cannot start a thread")?;
        let (files, end) = (Files::new(storage.clone(), notify), End::new(storage.clone()));
        Ok(Threads { checkpointer, files, storage, end })
    }
}
