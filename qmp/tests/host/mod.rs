//! A host of the protocol: the event loop of a monitor, and a simulated machine.
#![allow(dead_code, reason = "each test binary uses its part")]
use std::{
    collections::BTreeMap,
    io::{ErrorKind, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use qmp::{
    Error,
    client::Client,
    schema::*,
    server::{Server, Ticket},
    table::{self, Table},
};
use serde_json::Value;
use tempfile::TempDir;

/// Long enough for anything that must happen.
pub const LONG: Duration = Duration::from_secs(20);

struct Machine {
    server: Server,
    running: bool,
    quitting: bool,
    fds: BTreeMap<String, OwnedFd>,
    unanswered: Option<Ticket>,
}

impl table::Host for Machine {
    type When = ();
    fn admit(&self, _: &str, (): ()) -> Result<(), Error> {
        Ok(())
    }
}

fn commands() -> Table<Machine> {
    Table::new(())
        .on((), |m: &mut Machine, _: Stop| {
            if std::mem::take(&mut m.running) {
                m.server.broadcast(&Event::Stop {});
            }
            Ok(Empty {})
        })
        .on((), |m: &mut Machine, _: Cont| {
            if !std::mem::replace(&mut m.running, true) {
                m.server.broadcast(&Event::Resume {});
            }
            Ok(Empty {})
        })
        .on((), |m: &mut Machine, _: QueryStatus| {
            let status = if m.running { RunState::Running } else { RunState::Paused };
            Ok(StatusInfo::new(status))
        })
        .on((), |m: &mut Machine, _: Quit| {
            m.quitting = true;
            Ok(Empty {})
        })
        .on_ticket((), |m: &mut Machine, command: Getfd, ticket| {
            let fd = m.server.take_fd(ticket.client());
            let fd = fd.ok_or_else(|| Error::text("No file descriptor supplied via SCM_RIGHTS"))?;
            // Shows that it is the right one.
            std::fs::File::from(fd.try_clone().unwrap())
                .write_all(command.fdname.as_bytes())
                .unwrap();
            m.fds.insert(command.fdname, fd);
            Ok(Some(Empty {}))
        })
        // Answered by the next system_reset, from any client.
        .on_ticket((), |m: &mut Machine, _: SystemPowerdown, ticket| {
            m.unanswered = Some(ticket.clone());
            Ok(None)
        })
        .on((), |m: &mut Machine, _: SystemReset| {
            let ticket = m.unanswered.take().ok_or_else(|| Error::text("no request is pending"))?;
            m.server.reply(&ticket, Ok(Value::from("late")));
            Ok(Empty {})
        })
}

/// A running host on a socket of its own.
pub struct Host {
    pub path: PathBuf,
    /// Rounds of the event loop so far.
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
    _directory: TempDir,
}

impl Host {
    pub fn start() -> Self {
        Self::with_timeout(LONG)
    }

    /// A host that gives its clients `drain` to read the last output.
    pub fn with_timeout(drain: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let rounds = Arc::new(AtomicU64::new(0));
        let (at, count) = (path.clone(), rounds.clone());
        let poll = Poll::new().unwrap();
        let server = Server::bind(&at, poll.registry(), Token(10)).unwrap();
        let thread = thread::spawn(move || serve(poll, server, &count, drain));
        Self { path, rounds, thread: Some(thread), _directory: directory }
    }

    /// Wait until the event loop is idle; one that spins never is.
    pub fn settle(&self) {
        let deadline = Instant::now() + LONG;
        let (mut quiet, mut before) = (0, 0);
        while quiet < 10 {
            assert!(Instant::now() < deadline, "the event loop spins");
            thread::sleep(Duration::from_millis(1));
            let now = self.rounds.load(Ordering::Relaxed);
            quiet = if now == before { quiet + 1 } else { 0 };
            before = now;
        }
    }

    pub fn client(&self) -> Client {
        connect(&self.path)
    }

    /// Wait for the end that a client has requested.
    pub fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.path.exists(), "the socket is left over");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && !thread::panicking()
        {
            self.client().execute(&Quit {}).unwrap();
            thread.join().unwrap();
        }
    }
}

pub fn connect(path: &Path) -> Client {
    Client::connect(path, LONG).unwrap()
}

fn serve(mut poll: Poll, server: Server, rounds: &AtomicU64, drain: Duration) {
    let table = commands();
    let mut machine =
        Machine { server, running: true, quitting: false, fds: BTreeMap::new(), unanswered: None };
    let mut events = Events::with_capacity(16);
    loop {
        let timeout = machine.server.has_work().then_some(Duration::ZERO);
        match poll.poll(&mut events, timeout) {
            // As after a suspend of the whole host.
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            polled => polled.unwrap(),
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        for event in &events {
            assert!(machine.server.ready(event));
        }
        while let Some((request, ticket)) = machine.server.next_request() {
            if let Some(result) = table.dispatch(&mut machine, request, &ticket) {
                machine.server.reply(&ticket, result);
            }
            if machine.quitting {
                let reason = ShutdownCause::HostQmpQuit;
                machine.server.broadcast(&Event::Shutdown { guest: false, reason });
                return drop(Server::shutdown(vec![machine.server], drain));
            }
        }
    }
}
