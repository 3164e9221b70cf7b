//! A save under way: the thread that copies and writes, and what it agrees on with the main thread.
//!
//! ```text
//!   main thread                              checkpoint thread
//!   (live: log dirty pages)  ---start--->    (live: copy all memory once)
//!                            <--Ready----
//!   stop, save state         ---Last---->    copy what has changed, or all
//!   (live: go on)            <--Copied---
//!                                            sync, put in place
//!                            <--Done-----
//! ```
use std::{
    io,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, Sender, channel},
    },
    thread::Builder,
    time::{Duration, Instant},
};

use machine::{MachineState, Memory, Quiesced, memory::image};

pub use super::image::Progress;
use crate::lifecycle::Halt;

use super::{
    content::Config,
    save::{self, MemoryFile, SaveError, Target},
};

/// What the thread reports.
#[derive(Debug)]
pub enum Step {
    /// All memory has been copied once; the rest needs a machine that stands still.
    Ready,
    /// Memory is not needed any more.
    Copied,
    /// It is over.
    Done(Result<(), SaveError>),
}

/// What the thread needs of a machine that stands still.
struct Last {
    ranges: Vec<Range<u64>>,
    config: Config,
    state: MachineState,
}

type Task = Box<dyn FnOnce() + Send>;

/// The thread. It is there from the start, because none can be started behind the system-call
/// filter.
pub struct Checkpointer {
    tasks: Sender<Task>,
    notify: Arc<dyn Fn() + Send + Sync>,
}

impl Checkpointer {
    /// Start it. `notify` is called after each step; it must not block.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn(notify: Arc<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let (tasks, inbox) = channel::<Task>();
        Builder::new().name("checkpoint".into()).stack_size(256 << 10).spawn(move || {
            while let Ok(task) = inbox.recv() {
                task();
            }
        })?;
        Ok(Self { tasks, notify })
    }

    /// Begin a save of `memory`, `size` bytes, into `directory`. When `live`, all of memory is
    /// copied once before [`Step::Ready`], while the guest runs on.
    ///
    /// # Errors
    /// When the files cannot be made.
    pub fn save(
        &self,
        directory: &Path,
        memory: Memory,
        size: u64,
        live: bool,
    ) -> Result<Job, SaveError> {
        let target = Target::open(directory)?;
        let file = MemoryFile::create(&target, size)?;
        let progress = Arc::new(Progress::default());
        let (last, inbox) = channel::<Last>();
        let (report, steps) = channel();
        let (notify, shared) = (self.notify.clone(), progress.clone());
        let tell = move |step| {
            // Nobody listens any more when the process ends.
            let _ = report.send(step);
            notify();
        };
        let task = move || {
            let result = run(target, &file, &memory, live, &shared, &inbox, &tell);
            // Before it is told: whoever hears of it may look at the directory.
            drop(memory);
            tell(Step::Done(result));
        };
        let gone = || SaveError::Cancelled;
        self.tasks.send(Box::new(task)).map_err(|_| gone())?;
        Ok(Job { progress, steps, last: Some(last), started: Instant::now(), took: None })
    }
}

fn run(
    target: Target,
    file: &MemoryFile,
    memory: &Memory,
    live: bool,
    progress: &Progress,
    inbox: &Receiver<Last>,
    tell: &impl Fn(Step),
) -> Result<(), SaveError> {
    let mut writer = file.writer(memory)?;
    if live {
        let used = image::used(memory).map_err(SaveError::Memory)?;
        add_total(progress, &used);
        file.copy(&mut writer, &used, progress)?;
        tell(Step::Ready);
    }
    let Last { ranges, config, state } = inbox.recv().map_err(|_| SaveError::Cancelled)?;
    add_total(progress, &ranges);
    file.copy(&mut writer, &ranges, progress)?;
    tell(Step::Copied);
    save::finish(target, file, writer, config, state)
}

fn add_total(progress: &Progress, ranges: &[Range<u64>]) {
    let bytes = ranges.iter().map(|r| r.end - r.start).sum();
    progress.total.fetch_add(bytes, Ordering::Relaxed);
}

/// A save under way, or over.
pub struct Job {
    progress: Arc<Progress>,
    steps: Receiver<Step>,
    last: Option<Sender<Last>>,
    started: Instant,
    took: Option<Duration>,
}

impl Job {
    /// How far it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// How long it has taken.
    pub fn time(&self) -> Duration {
        self.took.unwrap_or_else(|| self.started.elapsed())
    }

    /// Make it stop as soon as it can; [`Step::Done`] comes all the same.
    pub fn cancel(&self) {
        self.progress.cancelled.store(true, Ordering::Relaxed);
    }

    /// The main thread has nothing to hand over: make the save end.
    pub fn give_up(&mut self) {
        self.cancel();
        self.last = None;
    }

    /// The next step, if it has been made.
    pub fn step(&mut self) -> Option<Step> {
        let step = self.steps.try_recv().ok();
        self.note(step)
    }

    /// Wait for the next step.
    pub fn wait(&mut self, at_most: Duration) -> Option<Step> {
        let step = self.steps.recv_timeout(at_most).ok();
        self.note(step)
    }

    fn note(&mut self, step: Option<Step>) -> Option<Step> {
        if let Some(Step::Done(_)) = step {
            self.took = Some(self.started.elapsed());
        }
        step
    }

    /// Hand over what only a machine that stands still can give: `ranges` of memory to copy, and
    /// its state. `halted` says why its guest cannot go on.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn last(
        &self,
        machine: &Quiesced<'_>,
        ranges: Vec<Range<u64>>,
        halted: Option<Halt>,
    ) -> Result<(), machine::SaveError> {
        let state = machine.save()?;
        let (config, occupied) = machine.made_of();
        let disk_sizes = machine.disk_sizes();
        let config = Config { id: new_id(), machine: config.clone(), occupied, disk_sizes, halted };
        // A thread that has given up says why in its last step.
        if let Some(last) = &self.last {
            let _ = last.send(Last { ranges, config, state });
        }
        Ok(())
    }
}

/// A number that no other state has.
fn new_id() -> u128 {
    use std::hash::{BuildHasher, RandomState};
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    let random = |n: u8| u128::from(RandomState::new().hash_one((n, now, std::process::id())));
    random(0) << 64 | random(1)
}
