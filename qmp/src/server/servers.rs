//! All control sockets of one process, as one server: a [`Ticket`] identifies the socket it came
//! from.
use std::{collections::BTreeMap, os::fd::OwnedFd, path::Path, time::Duration};

use mio::{Registry, Token};
use serde_json::Value;

use super::{BindError, Server, SocketFile, Ticket};
use crate::{Error, Request, schema::Event};

/// Tokens per server; the first server's begin at this number.
const TOKENS: usize = 1 << 32;

/// How to reach clients.
#[derive(Debug, Clone, Copy)]
pub enum Socket<'a> {
    /// Clients connect here.
    Listen(&'a Path),
    /// The one client listens here.
    Connect(&'a Path),
}

/// The servers of all control sockets. Dropping them disconnects every client and removes the
/// sockets; [`Servers::shutdown`] first delivers what is queued.
#[derive(Default)]
pub struct Servers {
    servers: Vec<Server>,
    /// The server whose requests come next in this round.
    turn: usize,
}

impl Servers {
    /// Open a server for each of `sockets`; they share the limits of descriptors and memory for
    /// clients. They use the tokens from 2^32 on.
    ///
    /// # Errors
    /// The first socket that cannot be opened.
    pub fn open(sockets: &[Socket<'_>], registry: &Registry) -> Result<Self, BindError> {
        let open = |(index, socket): (usize, &Socket<'_>)| {
            let base = Token((index + 1) * TOKENS);
            let server = match socket {
                Socket::Listen(path) => Server::bind(path, registry, base),
                Socket::Connect(path) => Server::connect(path, registry, base),
            };
            server.map(|server| server.one_of(sockets.len()))
        };
        let servers = sockets.iter().enumerate().map(open).collect::<Result<_, _>>()?;
        Ok(Self { servers, turn: 0 })
    }

    /// Handle an event of the poll; returns whether it was for one of the servers.
    pub fn ready(&mut self, event: &mio::event::Event) -> bool {
        let index = (event.token().0 / TOKENS).checked_sub(1);
        let server = index.and_then(|index| self.servers.get_mut(index));
        server.is_some_and(|server| server.ready(event))
    }

    /// Whether [`Servers::next_request`] has work without another event.
    pub fn has_work(&self) -> bool {
        self.servers.iter().any(Server::has_work)
    }

    /// The next request. It must be answered by [`Servers::reply`], now or later. `None` ends a
    /// round.
    pub fn next_request(&mut self) -> Option<(Request, Ticket)> {
        while let Some(server) = self.servers.get_mut(self.turn) {
            if let Some(request) = server.next_request() {
                return Some(request);
            }
            self.turn += 1;
        }
        self.turn = 0;
        None
    }

    /// Answer a request; does nothing if the client is gone.
    pub fn reply(&mut self, ticket: &Ticket, result: Result<Value, Error>) {
        if let Some(server) = self.of(ticket) {
            server.reply(ticket, result);
        }
    }

    /// Send `event` to every client, after everything sent to it so far.
    pub fn broadcast(&mut self, event: &Event) {
        self.servers.iter_mut().for_each(|server| server.broadcast(event));
    }

    /// Hold events from now on, so that those of one command are sent with its answer.
    pub fn hold_events(&mut self) {
        self.servers.iter_mut().for_each(Server::hold_events);
    }

    /// Send the held events.
    pub fn send_events(&mut self) {
        self.servers.iter_mut().for_each(Server::send_events);
    }

    /// The named descriptors of the client that holds `ticket`.
    pub fn named_fds(&mut self, ticket: &Ticket) -> Option<&mut BTreeMap<String, OwnedFd>> {
        self.of(ticket)?.named_fds(ticket.client())
    }

    /// The descriptor that came with the request of `ticket` (SCM_RIGHTS).
    pub fn take_fd(&mut self, ticket: &Ticket) -> Option<OwnedFd> {
        self.of(ticket)?.take_fd(ticket.client())
    }

    /// End all servers, as [`Server::shutdown`].
    pub fn shutdown(self, timeout: Duration) -> Vec<SocketFile> {
        Server::shutdown(self.servers, timeout)
    }

    fn of(&mut self, ticket: &Ticket) -> Option<&mut Server> {
        self.servers.iter_mut().find(|server| server.base == ticket.server)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixStream,
    };

    use mio::{Events, Poll};
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_goes_to_the_socket_that_the_request_came_from() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| dir.path().join(name));
        let sockets = paths.each_ref().map(|path| Socket::Listen(path));
        let mut poll = Poll::new().unwrap();
        let mut servers = Servers::open(&sockets, poll.registry()).unwrap();
        let mut clients = paths.each_ref().map(|path| UnixStream::connect(path).unwrap());
        for client in &mut clients {
            client.write_all(b"{\"execute\":\"query-name\"}\n").unwrap();
        }
        let (mut events, mut asked) = (Events::with_capacity(8), Vec::new());
        while asked.len() < clients.len() {
            poll.poll(&mut events, servers.has_work().then_some(Duration::ZERO)).unwrap();
            for event in &events {
                assert!(servers.ready(event));
            }
            while let Some((_, ticket)) = servers.next_request() {
                asked.push(ticket);
            }
        }
        // The first client has the same number on each server.
        assert_eq!(asked[0].client(), asked[1].client());
        asked.sort_by_key(|ticket| ticket.server);
        for (number, ticket) in asked.iter().enumerate() {
            servers.reply(ticket, Ok(json!(number)));
        }
        drop(servers);
        for (number, client) in clients.into_iter().enumerate() {
            let lines: Vec<_> = BufReader::new(client).lines().map(Result::unwrap).collect();
            assert_eq!(lines[1..], [format!("{{\"return\":{number}}}")]);
        }
    }
}
