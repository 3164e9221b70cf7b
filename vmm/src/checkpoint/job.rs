//! A save under way: the thread that copies and writes, and what it agrees on with the main thread.
//!
//! ```text
//!   main thread                              checkpoint thread
//!   (live: log dirty pages)  ---start--->    (live: copy all memory once)
//!                            <--Round----
//!   what has changed         --Changed-->    (live: copy that; again and again, until little is left)
//!                            <--Ready----
//!   stop, save state         ---Last---->    copy what has changed, or all
//!   (live: go on)            <--Copied---
//!                                            make it count
//!                            <--Done-----
//! ```
use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, Sender, channel},
    },
    thread::Builder,
    time::{Duration, Instant},
};

use machine::{MachineState, Memory, memory::image};

pub use super::image::Progress;
use super::{
    content::Config,
    save::{SaveError, Saved, Sink},
    send::Cancel,
};

/// How long a guest that runs on may be stopped, as QEMU's `downtime-limit`: once what is left can
/// be copied in that time, it is stopped.
const DOWNTIME: Duration = Duration::from_millis(300);
/// Rounds after which it is stopped all the same.
const ROUNDS: usize = 30;

/// What the thread reports.
#[derive(Debug)]
pub enum Step {
    /// All memory has been copied once; it wants to know what has changed meanwhile.
    Round,
    /// Little is left; the rest needs a machine that stands still.
    Ready,
    /// Memory is not needed any more.
    Copied,
    /// It is over. What a later save may build on.
    Done(Result<Option<Saved>, SaveError>),
}

/// What the thread is told.
enum Told {
    Changed(Vec<Range<u64>>),
    Last(Box<Last>),
}

/// What the thread needs of a machine that stands still.
struct Last {
    ranges: Vec<Range<u64>>,
    config: Config,
    state: MachineState,
}

/// What is copied while the guest runs.
pub enum Live {
    /// Nothing: it stands still.
    No,
    /// All that is not zero. With ranges that are not, although nobody may have touched them.
    All(Memory, Arc<[Range<u64>]>),
    /// These ranges.
    These(Vec<Range<u64>>),
}

type Task = Box<dyn FnOnce() + Send>;
/// Opens what is saved into.
pub type Open = Box<dyn FnOnce(&Progress) -> Result<Box<dyn Sink>, SaveError> + Send>;

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

    /// Begin a save into what `open` opens. It may wait for ever if `cancel` ends that.
    ///
    /// # Errors
    /// When the thread has gone.
    pub fn save(&self, open: Open, live: Live, cancel: Option<Cancel>) -> Result<Job, SaveError> {
        let progress = Arc::new(Progress::default());
        let (told, inbox) = channel::<Told>();
        let (report, steps) = channel();
        let (notify, shared) = (self.notify.clone(), progress.clone());
        let tell = move |step| {
            // Nobody listens any more when the process ends.
            let _ = report.send(step);
            notify();
        };
        // All that it holds is gone before it is told: whoever hears of it may look there.
        let task = move || tell(Step::Done(run(open, live, &shared, &inbox, &tell)));
        self.tasks.send(Box::new(task)).map_err(|_| SaveError::Cancelled)?;
        let started = Instant::now();
        Ok(Job { progress, steps, told: Some(told), cancel, started, took: None })
    }
}

fn run(
    open: Open,
    live: Live,
    progress: &Progress,
    inbox: &Receiver<Told>,
    tell: &impl Fn(Step),
) -> Result<Option<Saved>, SaveError> {
    let mut sink = open(progress)?;
    let mut left = Vec::new();
    let first = match live {
        Live::No => None,
        Live::All(memory, filled) => {
            Some(image::used(&memory, &filled).map_err(SaveError::Memory)?)
        }
        Live::These(ranges) => Some(ranges),
    };
    if let Some(mut ranges) = first {
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let copied = copy(&mut *sink, &ranges, progress)?;
            let took = began.elapsed();
            tell(Step::Round);
            ranges = match inbox.recv() {
                Ok(Told::Changed(ranges)) => ranges,
                _ => return Err(SaveError::Cancelled),
            };
            let (left, copied) = (u128::from(bytes(&ranges)), u128::from(copied));
            if left * took.as_nanos() <= copied * DOWNTIME.as_nanos() {
                break;
            }
        }
        left = ranges;
        tell(Step::Ready);
    }
    let Ok(Told::Last(last)) = inbox.recv() else { return Err(SaveError::Cancelled) };
    copy(&mut *sink, &image::union(&left, &last.ranges), progress)?;
    tell(Step::Copied);
    sink.finish(last.config, last.state, progress)
}

fn copy(sink: &mut dyn Sink, ranges: &[Range<u64>], progress: &Progress) -> Result<u64, SaveError> {
    let bytes = bytes(ranges);
    progress.total.fetch_add(bytes, Ordering::Relaxed);
    sink.copy(ranges, progress)?;
    Ok(bytes)
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|r| r.end - r.start).sum()
}

/// A save under way, or over.
pub struct Job {
    progress: Arc<Progress>,
    steps: Receiver<Step>,
    told: Option<Sender<Told>>,
    cancel: Option<Cancel>,
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
        if let Some(cancel) = &self.cancel {
            cancel.cancel();
        }
    }

    /// The main thread has nothing to hand over: make the save end.
    pub fn give_up(&mut self) {
        self.cancel();
        self.told = None;
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

    /// Answer [`Step::Round`]: what has changed since the last time.
    pub fn changed(&self, ranges: Vec<Range<u64>>) {
        self.tell(Told::Changed(ranges));
    }

    /// Hand over what only a machine that stands still can give: `ranges` of memory to copy, and
    /// its state.
    pub fn last(&self, ranges: Vec<Range<u64>>, config: Config, state: MachineState) {
        self.tell(Told::Last(Box::new(Last { ranges, config, state })));
    }

    fn tell(&self, told: Told) {
        // A thread that has given up says why in its last step.
        if let Some(to) = &self.told {
            let _ = to.send(told);
        }
    }
}

/// A number that no other state has.
pub fn new_id() -> u128 {
    use std::hash::{BuildHasher, RandomState};
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    let random = |n: u8| u128::from(RandomState::new().hash_one((n, now, std::process::id())));
    random(0) << 64 | random(1)
}
