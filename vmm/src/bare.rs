//! `-machine none`: no machine, only what can be told without one. Managers start it to learn what the
//! monitor can do.
use std::{io, path::Path, time::Duration};

use config::cli::Control;
use mio::{Events, Interest, Poll, Token};
use qmp::{
    Error,
    schema::*,
    server::{BindError, Server},
    table::{Host, Table},
};
use signal_hook_mio::v1_0::Signals;

use crate::{commands::bare_table, daemon::Ready, event_loop::ENDING};

/// Where a machine would be.
pub(crate) struct Bare {
    /// Whether there is a KVM for one.
    kvm: bool,
    ending: Option<ShutdownCause>,
}

impl Host for Bare {
    /// Whether it needs no machine.
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
/// Each QMP server has this many tokens.
const SERVER_TOKENS: usize = 1 << 32;

/// A server for each control socket; the tokens of each begin at `token`.
///
/// # Errors
/// The first that cannot be bound.
pub fn servers(
    control: &[Control],
    registry: &mio::Registry,
    token: impl Fn(usize) -> Token,
) -> Result<Vec<Server>, BindError> {
    let server = |(index, control): (usize, &Control)| match control.connects {
        true => Server::connect(&control.path, registry, token(index)),
        false => Server::bind(&control.path, registry, token(index)),
    };
    let share = |server: Server| server.one_of(control.len());
    control.iter().enumerate().map(|each| server(each).map(share)).collect()
}

/// Answer until a client or a signal ends it.
///
/// # Errors
/// When a control socket cannot be bound, or the host refuses to wait for events.
pub fn run(control: &[Control], ready: Option<Ready>) -> anyhow::Result<()> {
    let mut poll = Poll::new()?;
    let mut signals = Signals::new(ENDING)?;
    poll.registry().register(&mut signals, SIGNALS, Interest::READABLE)?;
    let token = |index| Token((index + 1) * SERVER_TOKENS);
    let mut servers = servers(control, poll.registry(), token)?;
    let mut bare = Bare { kvm: Path::new("/dev/kvm").exists(), ending: None };
    if let Some(ready) = ready {
        ready.tell()?;
    }
    let table = bare_table();
    let mut events = Events::with_capacity(64);
    let reason = loop {
        let more = servers.iter().any(Server::has_work);
        match poll.poll(&mut events, more.then_some(Duration::ZERO)) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e.into()),
            _ => {}
        }
        for event in &events {
            let index = (event.token().0 / SERVER_TOKENS).checked_sub(1);
            index.and_then(|index| servers.get_mut(index)).map(|server| server.ready(event));
        }
        if signals.pending().next().is_some() {
            break ShutdownCause::HostSignal;
        }
        for server in &mut servers {
            answer(server, &table, &mut bare);
        }
        if let Some(reason) = bare.ending {
            break reason;
        }
    };
    let event = Event::Shutdown { guest: false, reason };
    servers.iter_mut().for_each(|server| server.broadcast(&event));
    Server::shutdown(servers, Duration::from_secs(1));
    Ok(())
}

fn answer(server: &mut Server, table: &Table<Bare>, bare: &mut Bare) {
    while bare.ending.is_none()
        && let Some((request, ticket)) = server.next_request()
    {
        if let Some(result) = table.dispatch(bare, request, &ticket) {
            server.reply(&ticket, result);
        }
    }
}
