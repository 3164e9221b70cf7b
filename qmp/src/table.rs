//! The table from command names to handlers.
use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::{
    Error, ErrorClass, Request,
    decode::decode,
    schema::{
        Command, CommandInfo, Empty, QmpCapabilities, QueryCommands, QueryEvents, QueryQmpSchema,
        QueryVersion, VersionInfo,
        describe::{Describer, event_names},
    },
    server::Ticket,
};

/// A host that may refuse a command in its current state.
pub trait Host {
    /// Condition under which a command may run.
    type When: Copy;
    /// `Ok` if commands marked `when` may run now.
    fn admit(&self, name: &str, when: Self::When) -> Result<(), Error>;
}

/// A handler's answer; `None`: it has kept the ticket and answers later.
type Answer = Result<Option<Value>, Error>;

/// A handler for [`Table::on_ticket`].
pub type TicketHandler<H, C> =
    fn(&mut H, C, &Ticket) -> Result<Option<<C as Command>::Return>, Error>;

type Run<H> = Box<dyn Fn(&Table<H>, &mut H, Request, &Ticket) -> Answer>;

/// A check of arguments as they were sent.
pub type Look = fn(&Map<String, Value>) -> Result<(), Error>;

struct Row<H: Host> {
    when: H::When,
    run: Run<H>,
    describe: fn(&mut Describer),
}

/// All commands of one host.
pub struct Table<H: Host>(BTreeMap<&'static str, Row<H>>);

impl<H: Host + 'static> Table<H> {
    /// A table with the commands of the protocol itself, which may run `always`.
    pub fn new(always: H::When) -> Self {
        Self(BTreeMap::new())
            .row::<QmpCapabilities>(always, |_, _, command, _| {
                match command.enable.unwrap_or_default().first() {
                    Some(name) => {
                        Err(Error::text(format!("QMP capability '{name}' is not available")))
                    }
                    None => Ok(Some(Empty {})),
                }
            })
            .row::<QueryCommands>(always, |table, _, _, _| {
                Ok(Some(table.names().map(|name| CommandInfo { name: name.into() }).collect()))
            })
            .row::<QueryEvents>(always, |_, _, _, _| Ok(Some(event_names())))
            .row::<QueryVersion>(always, |_, _, _, _| Ok(Some(VersionInfo::own())))
            .row::<QueryQmpSchema>(always, |table, _, _, _| {
                let mut describer = Describer::with_events();
                table.0.values().for_each(|row| (row.describe)(&mut describer));
                Ok(Some(describer.finish()))
            })
    }

    /// Handle command `C`, determined by the type of the handler's argument.
    #[must_use]
    pub fn on<C: Command + 'static>(
        self,
        when: H::When,
        f: fn(&mut H, C) -> Result<C::Return, Error>,
    ) -> Self {
        self.row::<C>(when, move |_, host, command, _| f(host, command).map(Some))
    }

    /// As [`Table::on`], with a check of the raw arguments before they are decoded: their purpose
    /// may be the only error worth reporting.
    #[must_use]
    pub fn on_after<C: Command + 'static>(
        self,
        when: H::When,
        look: Look,
        f: fn(&mut H, C) -> Result<C::Return, Error>,
    ) -> Self {
        self.looked_row::<C>(when, look, move |_, host, command, _| f(host, command).map(Some))
    }

    /// As [`Table::on`], for a handler that needs the client (to take the descriptors that came
    /// with the command) or that answers later: it returns `None` and keeps a clone of the ticket
    /// for [`crate::server::Server::reply`]. Until then that client's next command waits.
    #[must_use]
    pub fn on_ticket<C: Command + 'static>(self, when: H::When, f: TicketHandler<H, C>) -> Self {
        self.row::<C>(when, move |_, host, command, ticket| f(host, command, ticket))
    }

    /// Also list and describe the commands of `other` that are missing here. They run `when` the
    /// host admits them, which must be never.
    #[must_use]
    pub fn listing<G: Host>(mut self, other: &Table<G>, when: H::When) -> Self {
        for (name, row) in &other.0 {
            self.0.entry(name).or_insert_with(|| {
                let run: Run<H> = Box::new(|_, _, request, _| {
                    Err(Error::text(format!("{} is not possible now", request.execute)))
                });
                Row { when, run, describe: row.describe }
            });
        }
        self
    }

    /// When the command `name` may run, if it exists.
    pub fn when(&self, name: &str) -> Option<H::When> {
        self.0.get(name).map(|row| row.when)
    }

    fn row<C: Command + 'static>(
        self,
        when: H::When,
        f: impl Fn(&Self, &mut H, C, &Ticket) -> Result<Option<C::Return>, Error> + 'static,
    ) -> Self {
        self.looked_row(when, |_| Ok(()), f)
    }

    fn looked_row<C: Command + 'static>(
        mut self,
        when: H::When,
        look: Look,
        f: impl Fn(&Self, &mut H, C, &Ticket) -> Result<Option<C::Return>, Error> + 'static,
    ) -> Self {
        let run: Run<H> = Box::new(move |table, host, request, ticket| {
            look(&request.arguments)?;
            let Some(reply) = f(table, host, decode(request.arguments)?, ticket)? else {
                return Ok(None);
            };
            serde_json::to_value(reply).map(Some).map_err(|e| Error::generic(&e))
        });
        let row = Row { when, run, describe: Describer::command::<C> };
        let twice = self.0.insert(C::NAME, row);
        assert!(twice.is_none(), "{} has two handlers", C::NAME);
        self
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }

    /// Run one request. `None`: the answer comes later.
    pub fn dispatch(
        &self,
        host: &mut H,
        request: Request,
        ticket: &Ticket,
    ) -> Option<Result<Value, Error>> {
        let Some(row) = self.0.get(request.execute.as_str()) else {
            return Some(Err(Error::new(
                ErrorClass::CommandNotFound,
                format!("The command {} has not been found", request.execute),
            )));
        };
        host.admit(&request.execute, row.when)
            .and_then(|()| (row.run)(self, host, request, ticket))
            .transpose()
    }
}

#[cfg(test)]
mod tests;
