//! Answers what a monitor needs: it asks by the event `REPLICATION_NEEDS`, and is answered by
//! `replication-answer`, over one connection.
//!
//! ```text
//!   monitor --REPLICATION_NEEDS--> main thread --> dial | witness | fence   (a thread each)
//!           <--replication-answer--           <---
//! ```
//! Each of the three threads answers one need after another; the main thread is the only one that
//! talks to the monitor, and waits for nobody else. What takes long holds up its own kind only.
//! Nothing is decided here: an answer is passed on whatever it says, and a failure is `unknown`.
use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::Duration,
};

use qmp::client::{Client, ClientError};
use serde_json::{Value, json};

use super::{
    Unknown,
    bounded::wait,
    wire::{Need, Needs, Said},
};

/// The event that asks.
const NEEDS: &str = "REPLICATION_NEEDS";
/// The command that answers.
const ANSWER: &str = "replication-answer";
/// How often it is checked whether the domain is still protected.
const CHECK: Duration = Duration::from_secs(2);
/// Most needs that are worked on. A monitor asks again.
const MAX_NEEDS: usize = 64;

/// What can answer, one function for each kind of need.
pub struct Means {
    /// Connects to the backup.
    pub dial: Box<dyn FnMut() -> Result<OwnedFd, Unknown> + Send>,
    /// Asks the witness.
    pub witness: Box<dyn FnMut(&Need) -> Said + Send>,
    /// Fences.
    pub fence: Box<dyn FnMut(&Need) -> Said + Send>,
}

/// Why a server has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The monitor has hung up.
    HungUp,
    /// The monitor did not take an answer in time, and a later one could be taken for it.
    Late,
    /// It is no longer needed.
    Unneeded,
}

/// What was found out about a need.
enum Found {
    Said(Said),
    Connection(OwnedFd),
}

struct Done {
    needs: Needs,
    found: Found,
}

/// Answers one monitor.
pub struct Server {
    dial: Sender<Needs>,
    witness: Sender<Needs>,
    fence: Sender<Needs>,
    done: Receiver<Done>,
    /// Readable when something is done.
    wake: UnixStream,
    /// Worked on.
    open: Vec<Needs>,
    /// Connections passed on, for their names.
    passed: u64,
}

impl Server {
    /// A server that answers by these means, and by nothing else.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(means: Means) -> std::io::Result<Self> {
        let Means { mut dial, mut witness, mut fence } = means;
        let (sender, done) = mpsc::channel();
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let report = || -> std::io::Result<_> { Ok((sender.clone(), waker.try_clone()?)) };
        let dial = worker("dial", report()?, move |_| match dial() {
            Ok(fd) => Found::Connection(fd),
            Err(why) => Found::Said(Said::Unknown { reason: why.to_string() }),
        })?;
        let witness = worker("witness", report()?, move |need| Found::Said(witness(need)))?;
        let fence = worker("fence", report()?, move |need| Found::Said(fence(need)))?;
        Ok(Self { dial, witness, fence, done, wake, open: Vec::new(), passed: 0 })
    }

    /// Answer `client` until it hangs up or is no longer `needed`, and report to `log`.
    ///
    /// # Errors
    /// It does not speak QMP.
    pub fn run(
        &mut self,
        client: &mut Client,
        mut needed: impl FnMut() -> bool,
        mut log: impl FnMut(&str),
    ) -> Result<End, ClientError> {
        loop {
            // An answer's own reply may come after events: they are in the client's memory then.
            loop {
                match client.next_event(Duration::ZERO) {
                    Ok(event) if event.event == NEEDS => match serde_json::from_value(event.data) {
                        Ok(needs) => self.begin(needs),
                        Err(e) => log(&format!("the monitor needs something unknown: {e}")),
                    },
                    Ok(_) => {}
                    Err(ClientError::Timeout { .. }) => break,
                    Err(e) => return ended(e),
                }
            }
            let mut answered = false;
            while let Ok(done) = self.done.try_recv() {
                answered = true;
                self.open.retain(|open| *open != done.needs);
                match self.answer(client, done) {
                    Ok(()) => {}
                    // It no longer wants to know.
                    Err(e @ ClientError::Refused { .. }) => log(&e.to_string()),
                    Err(ClientError::Timeout { .. }) => return Ok(End::Late),
                    Err(e) => return ended(e),
                }
            }
            if answered {
                continue;
            }
            if !needed() {
                return Ok(End::Unneeded);
            }
            wait(&[client.stream().as_fd(), self.wake.as_fd()], CHECK)?;
            // Whatever has woken it is found above.
            while matches!(self.wake.read(&mut [0; 64]), Ok(1..)) {}
        }
    }

    /// Begin to work on a need, unless that is done already: it is repeated until it is answered.
    fn begin(&mut self, needs: Needs) {
        if self.open.contains(&needs) || self.open.len() >= MAX_NEEDS {
            return;
        }
        let worker = match needs.need {
            Need::Connect => &self.dial,
            Need::Look { .. } | Need::Claim { .. } | Need::Settle { .. } => &self.witness,
            Need::Fence { .. } => &self.fence,
        };
        self.open.push(needs.clone());
        // A worker ends only with this server.
        let _ = worker.send(needs);
    }

    fn answer(&mut self, client: &mut Client, done: Done) -> Result<(), ClientError> {
        let said = match done.found {
            Found::Said(said) => said,
            Found::Connection(fd) => {
                self.passed += 1;
                let name = format!("replication-{}", self.passed);
                let arguments = json!({ "fdname": name });
                client.execute_with_fds("getfd", arguments, &[fd.as_fd()])?;
                Said::Connected { fd: name }
            }
        };
        let answered = client.execute_raw(ANSWER, arguments(&done.needs, &said));
        if let (Said::Connected { fd }, Err(ClientError::Refused { .. })) = (&said, &answered) {
            // The monitor would keep it open, and the backup would wait for its first frame.
            client.execute_raw("closefd", json!({ "fdname": fd }))?;
        }
        answered.map(|_| ())
    }
}

fn arguments(needs: &Needs, said: &Said) -> Value {
    let mut arguments = json!({ "nonce": needs.nonce, "need": needs.need.word() });
    if let (Some(members), Ok(Value::Object(said))) =
        (arguments.as_object_mut(), serde_json::to_value(said))
    {
        members.extend(said);
    }
    arguments
}

fn ended(e: ClientError) -> Result<End, ClientError> {
    match e {
        ClientError::Closed { .. } | ClientError::Io(_) => Ok(End::HungUp),
        e => Err(e),
    }
}

/// A thread that works on what is sent to it.
fn worker(
    name: &str,
    (done, mut waker): (Sender<Done>, UnixStream),
    mut find: impl FnMut(&Need) -> Found + Send + 'static,
) -> std::io::Result<Sender<Needs>> {
    let (sender, receiver) = mpsc::channel::<Needs>();
    let work = move || {
        for needs in receiver {
            let found = find(&needs.need);
            if done.send(Done { needs, found }).is_err() {
                return;
            }
            // If it cannot be written to, it is full, and wakes anyway.
            let _ = waker.write(&[0]);
        }
    };
    thread::Builder::new().name(name.to_owned()).spawn(work)?;
    Ok(sender)
}

#[cfg(test)]
mod tests;
