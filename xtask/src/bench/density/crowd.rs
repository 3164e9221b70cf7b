//! Monitors that are started together, one right after the other. One thread starts them, another
//! waits for all of them at once.
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{Timespec, epoll};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpriority_process, kill_process, setpriority_process};

use crate::bench::control::Connection;
use crate::bench::guests::FIRST_BYTE;
use crate::bench::interrupt::Interrupt;
use crate::bench::monitors::Found;
use crate::bench::run::{Started, last_words, spawn, tail};
use crate::bench::smaps::{Shares, shares};
use crate::bench::snapshots;

/// How long all of them may take together.
const LIMIT: Duration = Duration::from_secs(100);
/// How long a control socket that exists may refuse connections: it is bound before it listens.
const LISTENS: Duration = Duration::from_secs(5);
/// How often to check for an interrupt.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// The epoll token for new sockets; the monitors' outputs have their own.
const SOCKETS: u64 = u64::MAX;

/// How a crowd is started.
pub struct Launch<'a> {
    /// Which monitor.
    pub found: &'a Found,
    /// A directory for all of its files; removed with the crowd.
    pub dir: PathBuf,
    /// Ends the measurement early.
    pub interrupt: &'a Interrupt,
    /// Makes the command of one monitor, for its control socket and its directory.
    pub command: &'a (dyn Fn(&Path, &Path) -> Result<Command> + Sync),
    /// Where the save is, if each monitor needs commands to restore it or to let the guest run.
    pub resume: Option<&'a PathBuf>,
    /// Stop each (SIGSTOP) at its guest's first byte.
    pub freeze: bool,
}

impl Launch<'_> {
    fn socket(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{number}.sock"))
    }

    fn own_dir(&self, number: usize) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// An error of one of them, with the end of its standard error.
    fn explained(&self, number: usize, what: &str) -> anyhow::Error {
        anyhow!("number {number}: {what}: {}", last_words(&self.own_dir(number)))
    }
}

/// Running monitors, whose guests have all reported. Killed when dropped.
pub struct Crowd<'a> {
    launch: &'a Launch<'a>,
    members: Vec<Member>,
    wall: Duration,
}

/// One of them.
struct Member {
    child: Child,
    out: File,
    /// The end of its output: Firecracker's log is part of it.
    said: Vec<u8>,
    /// Its guest's first byte has arrived.
    heard: bool,
}

impl<'a> Crowd<'a> {
    /// Starts `count` monitors, waits until every guest has reported that it runs, inspects them,
    /// and ends them: none is left afterwards, even if this fails.
    ///
    /// # Errors
    /// One of them fails or takes too long, or the user has interrupted it.
    pub fn gather<T>(
        launch: &'a Launch<'a>,
        count: usize,
        inspect: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let mut crowd = Self { launch, members: Vec::new(), wall: Duration::ZERO };
        let commands = (0..count).map(|number| {
            let dir = launch.own_dir(number);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            (launch.command)(&launch.socket(number), &dir)
        });
        let commands: Vec<Command> = commands.collect::<Result<_>>()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let sockets = launch.resume.is_some().then(|| Sockets::new(launch, count, &epoll));
        let mut sockets = sockets.transpose()?;
        let halt = AtomicBool::new(false);
        let (sender, started) = channel();
        let inspected = thread::scope(|scope| {
            scope.spawn(|| start_all(launch, commands, &epoll, &sender, &halt));
            let prompt = Prompt::begin();
            let met = crowd.meet(count, (&epoll, sockets.as_mut()), &started, scope);
            drop(prompt);
            let inspected = met.and_then(|()| inspect(&mut crowd));
            halt.store(true, Ordering::Relaxed);
            // Also ends the threads that still wait for an answer, which a frozen monitor does not
            // give.
            crowd.kill();
            inspected
        });
        // Kill those that were started meanwhile.
        crowd.members.extend(started.try_iter().flatten().map(Member::new));
        inspected
    }

    /// Waits for all first bytes, and measures the time.
    fn meet<'scope>(
        &mut self,
        count: usize,
        (epoll, mut sockets): (&OwnedFd, Option<&mut Sockets>),
        started: &Receiver<Result<Started>>,
        scope: &'scope Scope<'scope, '_>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        let launch = self.launch;
        let deadline = Instant::now() + LIMIT;
        let (answer, answers) = channel();
        let mut events = Vec::with_capacity(64);
        let (mut first, mut last, mut heard) = (None, Instant::now(), 0);
        while heard < count {
            launch.interrupt.check()?;
            ensure!(Instant::now() < deadline, "only {heard} of {count} guests reported in time");
            events.clear();
            match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), Some(&LOOK)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for new in started.try_iter() {
                let new = new?;
                first.get_or_insert(new.at);
                self.members.push(Member::new(new));
            }
            answers.try_iter().collect::<Result<()>>()?;
            for event in &events {
                match (event.data.u64(), &mut sockets) {
                    (SOCKETS, Some(sockets)) => sockets.resume_new(launch, &answer, scope)?,
                    (number, _) => {
                        let number = usize::try_from(number)?;
                        // The output of one that has not been announced yet stays readable.
                        let Some(member) = self.members.get_mut(number) else { continue };
                        if member.listen(launch, number, epoll)? {
                            (last, heard) = (Instant::now(), heard + 1);
                        }
                    }
                }
            }
        }
        self.wall = last - first.context("nothing was started")?;
        Ok(())
    }

    /// From the first exec to the last guest's first byte.
    #[must_use]
    pub const fn wall(&self) -> Duration {
        self.wall
    }

    /// The memory of each, whose guests have `ram_kib` of RAM.
    ///
    /// # Errors
    /// One of them has ended.
    pub fn shares(&mut self, ram_kib: u64) -> Result<Vec<Shares>> {
        let launch = self.launch;
        let of = |(number, member): (usize, &mut Member)| {
            member.check(launch, number)?;
            let smaps = fs::read_to_string(format!("/proc/{}/smaps", member.child.id()))?;
            shares(&smaps, ram_kib)
        };
        self.members.iter_mut().enumerate().map(of).collect()
    }

    fn kill(&mut self) {
        // An error here means that it has ended already.
        for member in &mut self.members {
            let _ = member.child.kill();
        }
        for member in &mut self.members {
            let _ = member.child.wait();
        }
    }
}

impl Drop for Crowd<'_> {
    fn drop(&mut self) {
        self.kill();
        // Otherwise it is removed with its directory.
        let _ = fs::remove_dir_all(&self.launch.dir);
    }
}

/// Starts one after another, and announces each.
fn start_all(
    launch: &Launch<'_>,
    commands: Vec<Command>,
    epoll: &OwnedFd,
    sender: &Sender<Result<Started>>,
    halt: &AtomicBool,
) {
    for (number, command) in commands.into_iter().enumerate() {
        if halt.load(Ordering::Relaxed) {
            return;
        }
        let started = spawn(launch.found, command, &launch.own_dir(number)).and_then(|started| {
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(epoll, &started.out, data, epoll::EventFlags::IN)?;
            Ok(started)
        });
        let failed = started.is_err();
        // The other thread ends those that have been started.
        if sender.send(started).is_err() || failed {
            return;
        }
    }
}

impl Member {
    fn new(started: Started) -> Self {
        Self { child: started.child, out: started.out, said: Vec::new(), heard: false }
    }

    /// Reads its output; returns whether its guest's first byte has arrived now.
    fn listen(&mut self, launch: &Launch<'_>, number: usize, epoll: &OwnedFd) -> Result<bool> {
        let mut buffer = [0; 4096];
        // A terminal that is closed gives an error.
        let length = self.out.read(&mut buffer).unwrap_or(0);
        if length == 0 {
            epoll::delete(epoll, &self.out)?;
            let status = self.child.wait()?;
            return Err(self.ended(launch, number, status));
        }
        let bytes = buffer.get(..length).unwrap_or_default();
        self.said.drain(..self.said.len().saturating_sub(buffer.len()));
        self.said.extend(bytes);
        if self.heard || !bytes.contains(&FIRST_BYTE) {
            return Ok(false);
        }
        self.heard = true;
        if launch.freeze {
            kill_process(Pid::from_child(&self.child), Signal::STOP)?;
        }
        Ok(true)
    }

    /// Whether it still runs.
    fn check(&mut self, launch: &Launch<'_>, number: usize) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(self.ended(launch, number, status)),
        }
    }

    fn ended(&self, launch: &Launch<'_>, number: usize, status: ExitStatus) -> anyhow::Error {
        let said = tail(&self.said);
        launch.explained(number, &format!("it has ended ({status}), and said: {said}"))
    }
}

/// While this exists, the calling thread, and those that it starts, run before all others:
/// otherwise a guest that has reported would run on, and take CPU time, until this thread gets its
/// turn to freeze it. Without the permission for that nothing changes.
struct Prompt {
    /// The nice value before.
    before: i32,
}

impl Prompt {
    fn begin() -> Option<Self> {
        // `None` stands for the calling thread here.
        let before = getpriority_process(None).ok()?;
        setpriority_process(None, -20).ok()?;
        Some(Self { before })
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        let _ = setpriority_process(None, self.before);
    }
}

/// The control sockets that do not exist yet.
struct Sockets {
    /// Readable when there is a new file in their directory.
    changes: File,
    awaited: Vec<usize>,
}

impl Sockets {
    fn new(launch: &Launch<'_>, count: usize, epoll: &OwnedFd) -> Result<Self> {
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&changes, &launch.dir, inotify::WatchFlags::CREATE)?;
        epoll::add(epoll, &changes, epoll::EventData::new_u64(SOCKETS), epoll::EventFlags::IN)?;
        Ok(Self { changes: changes.into(), awaited: (0..count).collect() })
    }

    /// Talks to each monitor whose socket has appeared, in a thread of its own.
    fn resume_new<'scope>(
        &mut self,
        launch: &'scope Launch<'_>,
        answer: &Sender<Result<()>>,
        scope: &'scope Scope<'scope, '_>,
    ) -> Result<()> {
        let mut names = [0; 4096];
        let length = self.changes.read(&mut names)?;
        ensure!(length > 0, "no changes of a directory");
        let new = self.awaited.extract_if(.., |number| launch.socket(*number).exists());
        for number in new {
            let answer = answer.clone();
            scope.spawn(move || {
                let resumed = resume(launch, number);
                // The receiver no longer exists if all guests have reported, or if it has failed.
                let _ = answer
                    .send(resumed.map_err(|error| launch.explained(number, &format!("{error:#}"))));
            });
        }
        Ok(())
    }
}

fn resume(launch: &Launch<'_>, number: usize) -> Result<()> {
    let Some(saved) = launch.resume else { bail!("there is nothing to resume") };
    let deadline = Instant::now() + LISTENS;
    let mut connection = loop {
        match Connection::connect(launch.found.monitor.protocol, &launch.socket(number)) {
            Ok(connection) => break connection,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    };
    snapshots::resume(launch.found, &mut connection, saved)
}
