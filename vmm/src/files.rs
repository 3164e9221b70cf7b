//! Opens, resizes and closes the files that commands name, on a thread for what may wait for
//! storage, so that the main thread never waits for a file system.
//!
//! ```text
//!   main thread                                   files
//!   command --Job--> queue --work, one at a time--> opens
//!   finish, answer <-----------result---------------
//! ```
//! The command is answered later, and its client's next command waits for that: each client's
//! commands are carried out in order, as QMP demands. Other clients' commands are carried out
//! meanwhile, so what was checked before has to be checked again when the file is open.
//!
//! There is one job at a time, so that another thread is left for the rest: the kernel for a reset,
//! which must not wait for a file that hangs, the disks of a replicated machine, and the end.
//!
//! One command's file may hang. Its own client waits for as long as it takes; the next command that
//! needs the thread fails after [`bounds::FILE`], with the name of what hangs.
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use qmp::{Error, server::Ticket};
use serde::Serialize;
use serde_json::Value;

use crate::{bounds, threads::Tasks, vmm::Vmm};

type Finish = Box<dyn FnOnce(&mut Vmm) -> Result<Value, Error> + Send>;
type Work = Box<dyn FnOnce() -> Finish + Send>;

/// Work on files that a command asks for.
pub(crate) struct Job {
    what: String,
    name: Option<String>,
    resizes: bool,
    overdue: Overdue,
    work: Work,
}

/// What happens to a job that has waited too long.
enum Overdue {
    /// It fails, unless it has begun.
    Fail,
    /// It is answered without the file system, and dropped unless it has begun.
    AnswerWithout(Finish),
    /// It is answered as done, which it is for the guest; the thread does it later.
    AnswerDone(Finish),
}

fn answer<R: Serialize>(result: Result<R, Error>) -> Result<Value, Error> {
    serde_json::to_value(result?).map_err(|e| Error::generic(&e))
}

impl Job {
    /// A job that runs `work` on the thread and then `finish` on the main thread. `what` describes
    /// it in messages, for example "opening /disk.img".
    pub fn new<T: Send + 'static, R: Serialize>(
        what: String,
        work: impl FnOnce() -> T + Send + 'static,
        finish: impl FnOnce(&mut Vmm, T) -> Result<R, Error> + Send + 'static,
    ) -> Self {
        let work: Work = Box::new(|| {
            let done = work();
            Box::new(|vmm| answer(finish(vmm, done)))
        });
        Self { what, name: None, resizes: false, overdue: Overdue::Fail, work }
    }

    /// Until the job is over no other job may be about the device or back-end `name`.
    pub fn about(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// The job changes the size of a disk.
    pub fn resizes(self) -> Self {
        Self { resizes: true, ..self }
    }

    /// The job is a query, which `finish` can answer without the file system if that takes too
    /// long.
    pub fn or_without<R: Serialize>(
        self,
        finish: impl FnOnce(&mut Vmm) -> Result<R, Error> + Send + 'static,
    ) -> Self {
        let finish: Finish = Box::new(|vmm| answer(finish(vmm)));
        Self { overdue: Overdue::AnswerWithout(finish), ..self }
    }

    /// Close `file`, which the machine no longer uses; `done` answers.
    pub fn close<R: Serialize>(
        what: String,
        file: impl Send + 'static,
        done: impl FnOnce(&mut Vmm) -> R + Clone + Send + 'static,
    ) -> Self {
        let late = done.clone();
        let job = Self::new(what, || drop(file), |vmm, ()| Ok(done(vmm)));
        let late: Finish = Box::new(|vmm| answer(Ok(late(vmm))));
        Self { overdue: Overdue::AnswerDone(late), ..job }
    }
}

/// A job, and the ticket of the client that waits for it.
struct Entry {
    job: Job,
    asked: Option<Ticket>,
    since: Instant,
}

impl Entry {
    fn limit(&self) -> Duration {
        match self.job.overdue {
            Overdue::AnswerWithout(_) => bounds::FILE_QUESTION,
            Overdue::Fail | Overdue::AnswerDone(_) => bounds::FILE,
        }
    }

    /// How to answer the job before it is over; `why` says what it waits for.
    fn give_up(&mut self, why: String) -> Finish {
        match std::mem::replace(&mut self.job.overdue, Overdue::Fail) {
            Overdue::AnswerWithout(finish) | Overdue::AnswerDone(finish) => finish,
            Overdue::Fail => Box::new(|_| Err(Error::text(why))),
        }
    }
}

/// What the thread is doing.
struct Running {
    entry: Entry,
    begun: Instant,
}

/// The jobs that are still to be done.
pub struct Files {
    tasks: Tasks,
    notify: Arc<dyn Fn() + Send + Sync>,
    report: Sender<Finish>,
    results: Receiver<Finish>,
    running: Option<Running>,
    /// Kept here, so that a job that fails because it has waited too long is not done later.
    queue: VecDeque<Entry>,
}

impl Files {
    /// Jobs to be done by `tasks`. `notify` is called after each job; it must not block.
    pub fn new(tasks: Tasks, notify: Arc<dyn Fn() + Send + Sync>) -> Self {
        let (report, results) = channel();
        Self { tasks, notify, report, results, running: None, queue: VecDeque::new() }
    }

    /// Check that no job is about the device or back-end `name`.
    ///
    /// # Errors
    /// What the job on it does, if there is one.
    pub(crate) fn check_idle(&self, name: &str) -> Result<(), Error> {
        match self.jobs().find(|job| job.name.as_deref() == Some(name)) {
            None => Ok(()),
            Some(job) => {
                let why = format!("'{name}' is busy: {}; try again afterwards", job.what);
                Err(Error::text(why))
            }
        }
    }

    /// Check that no disk is being resized: sizes are part of a saved state.
    ///
    /// # Errors
    /// Which disk is being resized.
    pub(crate) fn check_sizes(&self) -> Result<(), Error> {
        match self.jobs().find(|job| job.resizes) {
            None => Ok(()),
            Some(job) => {
                let why = format!("{} is in progress: try again afterwards", job.what);
                Err(Error::text(why))
            }
        }
    }

    fn jobs(&self) -> impl Iterator<Item = &Job> {
        let running = self.running.iter().map(|running| &running.entry);
        running.chain(&self.queue).map(|entry| &entry.job)
    }

    fn begin_next(&mut self) {
        if self.running.is_none()
            && let Some(mut entry) = self.queue.pop_front()
        {
            let nothing: Work = Box::new(|| Box::new(|_| Ok(Value::Null)));
            let work = std::mem::replace(&mut entry.job.work, nothing);
            let (report, notify) = (self.report.clone(), self.notify.clone());
            // A thread that has gone never answers, and is reported as one that hangs.
            let _ = self.tasks.run(Box::new(move || {
                // The monitor is ending: the result is not waited for.
                let _ = report.send(work());
                notify();
            }));
            self.running = Some(Running { entry, begun: Instant::now() });
        }
    }

    /// How long until a job has waited too long.
    pub(crate) fn until_overdue(&self) -> Option<Duration> {
        let fails = |entry: &&Entry| matches!(entry.job.overdue, Overdue::Fail);
        let running = self.running.iter().map(|running| &running.entry).filter(|e| !fails(e));
        let waiting = running.chain(&self.queue).filter(|entry| entry.asked.is_some());
        waiting.map(|e| e.limit().saturating_sub(e.since.elapsed())).min()
    }

    /// A job that has waited too long, and how to answer it.
    fn take_overdue(&mut self) -> Option<(Ticket, Finish)> {
        let late = |entry: &Entry| entry.asked.is_some() && entry.since.elapsed() >= entry.limit();
        let running = self.running.as_mut()?;
        let (busy, seconds) = (&running.entry.job.what, running.begun.elapsed().as_secs());
        let why = format!(
            "{busy} has not finished for {seconds} s: its storage hangs, and no other file can be \
             opened meanwhile; try again when the storage answers"
        );
        let begun = &mut running.entry;
        if late(begun) && !matches!(begun.job.overdue, Overdue::Fail) {
            return Some((begun.asked.take()?, begun.give_up(why)));
        }
        let index = self.queue.iter().position(late)?;
        let mut entry = self.queue.remove(index)?;
        let asked = entry.asked.take()?;
        let stays = matches!(entry.job.overdue, Overdue::AnswerDone(_));
        let finish = entry.give_up(why);
        if stays {
            self.queue.insert(index, entry);
        }
        Some((asked, finish))
    }
}

impl Vmm {
    /// Run `job` on the thread; `ticket` is answered when it is over.
    pub(crate) fn with_files(&mut self, job: Job, ticket: &Ticket) {
        let asked = Some(ticket.clone());
        self.files.queue.push_back(Entry { job, asked, since: Instant::now() });
        self.files.begin_next();
    }

    /// Close `file`; no client waits for it.
    pub(crate) fn close_file(&mut self, what: String, file: impl Send + 'static) {
        let job = Job::close(what, file, |_| ());
        self.files.queue.push_back(Entry { job, asked: None, since: Instant::now() });
        self.files.begin_next();
    }

    /// Handle finished jobs, and answer those that have waited too long.
    pub(crate) fn follow_files(&mut self) {
        while let Ok(finish) = self.files.results.try_recv() {
            // A client that has been answered already gets no second answer.
            if let Some(asked) = self.files.running.take().and_then(|running| running.entry.asked) {
                let result = finish(self);
                self.servers.reply(&asked, result);
            }
            self.files.begin_next();
        }
        while let Some((asked, finish)) = self.files.take_overdue() {
            let result = finish(self);
            self.servers.reply(&asked, result);
        }
    }
}
