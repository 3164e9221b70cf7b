//! `-machine none`: no machine, only the commands that work without one. Management software starts
//! it to learn what the monitor can do.
use std::{io, path::Path, time::Duration};

use config::cli::Control;
use mio::{Events, Poll, Token};
use qmp::{
    Error,
    schema::*,
    server::{BindError, Servers, Socket},
    table::Host,
};

use crate::{commands::bare_table, daemon::Ready, signals};

/// Executes commands where there is no machine.
pub(crate) struct Bare {
    /// Whether the host has KVM.
    kvm: bool,
    ending: Option<ShutdownCause>,
}

impl Host for Bare {
    /// Whether a command needs no machine.
    type When = bool;

    fn admit(&self, name: &str, when: bool) -> Result<(), Error> {
        match when {
            true => Ok(()),
            false => {
                let desc = "is not possible now: there is no machine (-machine none)";
                Err(Error::text(format!("{name} {desc}")))
            }
        }
    }
}

pub(crate) fn quit(bare: &mut Bare, _: Quit) -> Result<Empty, Error> {
    bare.ending = Some(ShutdownCause::HostQmpQuit);
    Ok(Empty {})
}

pub(crate) fn query_status(_: &mut Bare, _: QueryStatus) -> Result<StatusInfo, Error> {
    Ok(StatusInfo::new(RunState::Prelaunch))
}

pub(crate) fn query_kvm(bare: &mut Bare, _: QueryKvm) -> Result<KvmInfo, Error> {
    Ok(KvmInfo { enabled: bare.kvm, present: bare.kvm })
}

const SIGNALS: Token = Token(0);

/// Bind a server to each control socket.
///
/// # Errors
/// When a control socket cannot be bound; the first such error.
pub fn servers(control: &[Control], registry: &mio::Registry) -> Result<Servers, BindError> {
    let sockets = control.iter().map(|control| match control.connects {
        true => Socket::Connect(&control.path),
        false => Socket::Listen(&control.path),
    });
    Servers::open(&sockets.collect::<Vec<_>>(), registry)
}

/// Serve clients until one of them or a signal ends the monitor.
///
/// # Errors
/// When a control socket cannot be bound, or the host refuses to wait for events.
pub fn run(control: &[Control], ready: Option<Ready>) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let mut signals = signals::ending(poll.registry(), SIGNALS)?;
    let mut servers = servers(control, poll.registry())?;
    let mut bare = Bare { kvm: Path::new("/dev/kvm").exists(), ending: None };
    if let Some(ready) = ready {
        ready.tell()?;
    }
    let table = bare_table();
    let mut events = Events::with_capacity(64);
    let reason = loop {
        let more = servers.has_work();
        match poll.poll(&mut events, more.then_some(Duration::ZERO)) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e.into()),
            _ => {}
        }
        for event in &events {
            servers.ready(event);
        }
        if signals.pending().next().is_some() {
            break ShutdownCause::HostSignal;
        }
        while bare.ending.is_none()
            && let Some((request, ticket)) = servers.next_request()
        {
            if let Some(result) = table.dispatch(&mut bare, request, &ticket) {
                servers.reply(&ticket, result);
            }
        }
        if let Some(reason) = bare.ending {
            break reason;
        }
    };
    let event = Event::Shutdown { guest: false, reason };
    servers.broadcast(&event);
    servers.shutdown(Duration::from_secs(1));
    Ok(())
}
