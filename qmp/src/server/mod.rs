//! Many clients on one unix socket, driven by the caller's mio loop.
//!
//! ```text
//!   poll --> ready(event) --> next_request() --> [handler] --> reply(ticket, result)
//!     ^                          |    ^                            |
//!     +------- None -------------+    +----------------------------+
//! ```
//!
//! Clients take turns, one request each; a client's next request waits for the answer to its
//! previous one. One round of [`Server::next_request`] is bounded: when it ends with
//! [`Server::has_work`] true, the caller polls with a zero timeout, so that its other event sources
//! get their turn.
//!
//! A client can delay another only by one turn: input is bounded by the length of a message,
//! answers wait while 64 KiB are unread, and a client with 1 MiB unread is dropped at the next
//! event. The memory of all clients together is bounded, too.
mod bind;
mod connection;
mod servers;

pub use bind::{BindError, SocketFile, claim};
pub use servers::{Servers, Socket};

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Display,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SocketFlags, accept_with},
    process::{Resource, getrlimit},
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    Error, Request,
    request::{Id, answer, line},
    schema::{Event, Timestamp, VersionInfo},
};
use connection::{Connection, Gone, MAX_MEMORY};

/// Pieces of work in one round of [`Server::next_request`].
const ROUND: usize = 64;

/// One client, for as long as it is connected; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientId {
    slot: usize,
    serial: u64,
}

/// The right to answer one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Ticket {
    /// The server's first token.
    server: usize,
    client: ClientId,
    id: Id,
}

impl Ticket {
    /// The client that sent the request.
    pub fn client(&self) -> ClientId {
        self.client
    }

    /// A ticket without a client.
    #[cfg(test)]
    pub(crate) fn for_test() -> Self {
        Self { server: 0, client: ClientId { slot: 0, serial: 0 }, id: None }
    }
}

/// The server. Dropping it disconnects all clients and removes the socket; [`Server::shutdown`]
/// first delivers the queued output.
pub struct Server {
    /// `None` for a server that has connected to its one client itself.
    listener: Option<OwnedFd>,
    file: Option<SocketFile>,
    registry: Registry,
    /// Token of the listener; connection `n` has `base + 1 + n`.
    base: usize,
    /// A client may be waiting to be accepted.
    acceptable: bool,
    /// A client had to wait for lack of descriptors or memory.
    starved: bool,
    connections: Vec<Option<Connection>>,
    /// Most connections at once.
    most: usize,
    last_serial: u64,
    /// Connections with work, in turn.
    queue: VecDeque<usize>,
    /// Pieces of work left in this round.
    round: usize,
    /// Bytes of memory that all connections use, and their limit.
    memory: usize,
    most_memory: usize,
    /// Events are held until the next send.
    holding: bool,
}

impl Server {
    /// Listen at `path` and register with `registry` under `base` and all tokens above it.
    ///
    /// The socket has mode 0600. A stale one (without a listener) is replaced; a live one and
    /// anything that is not a socket are refused.
    pub fn bind(path: &Path, registry: &Registry, base: Token) -> Result<Self, BindError> {
        let (listener, file) = bind::claim(path)?;
        let os = |source| BindError::Os { action: "watch", path: path.into(), source };
        let mut source = SourceFd(&listener.as_raw_fd());
        registry.register(&mut source, base, Interest::READABLE).map_err(os)?;
        Self::new(Some(listener), Some(file), registry, base).map_err(os)
    }

    /// Connect to the one client, which listens at `path`. Once it has hung up, there is no client.
    pub fn connect(path: &Path, registry: &Registry, base: Token) -> Result<Self, BindError> {
        let client = bind::connected(path)?;
        let mut this = Self::new(None, None, registry, base).map_err(|source| BindError::Os {
            action: "watch",
            path: path.into(),
            source,
        })?;
        this.admit(0, client);
        Ok(this)
    }

    fn new(
        listener: Option<OwnedFd>,
        file: Option<SocketFile>,
        registry: &Registry,
        base: Token,
    ) -> io::Result<Self> {
        let registry = registry.try_clone()?;
        // Clients get at most half of the descriptors: disks and NICs need some, too.
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 2;
        Ok(Self {
            file,
            registry,
            base: base.0,
            acceptable: listener.is_some(),
            listener,
            starved: false,
            connections: Vec::new(),
            most: usize::try_from(limit).unwrap_or(usize::MAX),
            last_serial: 0,
            queue: VecDeque::new(),
            round: ROUND,
            memory: 0,
            most_memory: MAX_MEMORY,
            holding: false,
        })
    }

    /// Reduce the limits to those of one of `servers` that share descriptors and memory for
    /// clients.
    #[must_use]
    pub fn one_of(self, servers: usize) -> Self {
        let servers = servers.max(1);
        let (most, most_memory) = (self.most / servers, self.most_memory / servers);
        Self { most, most_memory, ..self }
    }

    /// Hold events from now on, so that those of one command are sent with its answer.
    pub fn hold_events(&mut self) {
        self.holding = true;
    }

    /// Send the held events.
    pub fn send_events(&mut self) {
        if std::mem::take(&mut self.holding) {
            for slot in 0..self.connections.len() {
                self.with(slot, Connection::flush);
            }
        }
    }

    /// Handle an event of the poll; returns whether it was for this server.
    pub fn ready(&mut self, event: &mio::event::Event) -> bool {
        let Some(index) = event.token().0.checked_sub(self.base) else { return false };
        let Some(slot) = index.checked_sub(1) else {
            self.acceptable = true;
            return true;
        };
        // Descriptors may have become free for a waiting client.
        self.acceptable |= self.starved;
        self.with(slot, |connection| {
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                connection.readable();
            }
            connection.flush()
        });
        true
    }

    /// Whether [`Server::next_request`] has work without another event.
    pub fn has_work(&self) -> bool {
        self.acceptable || !self.queue.is_empty()
    }

    /// The next request. It must be answered by [`Server::reply`], now or later. `None` ends a
    /// round.
    pub fn next_request(&mut self) -> Option<(Request, Ticket)> {
        while self.round > 0 && self.has_work() {
            self.round -= 1;
            if self.acceptable {
                self.acceptable = self.accept();
            }
            let Some(slot) = self.queue.pop_front() else { continue };
            let (mut request, server) = (None, self.base);
            self.with(slot, |connection| {
                connection.queued = false;
                let client = connection.id;
                request = connection.step()?.map(|(r, id)| (r, Ticket { server, client, id }));
                Ok(())
            });
            if request.is_some() {
                return request;
            }
        }
        self.round = ROUND;
        None
    }

    /// Answer a request; does nothing if the client is gone.
    pub fn reply(&mut self, ticket: &Ticket, result: Result<Value, Error>) {
        let line = answer(result, &ticket.id);
        if self.connection(ticket.client).is_some() {
            self.with(ticket.client.slot, |connection| connection.answer(&line));
        }
    }

    /// Send `event` to every client, after everything sent to it so far.
    pub fn broadcast(&mut self, event: &Event) {
        #[derive(Serialize)]
        struct Message<'a> {
            #[serde(flatten)]
            event: &'a Event,
            timestamp: Timestamp,
        }
        let line = line(&Message { event, timestamp: Timestamp::now() });
        let holding = self.holding;
        for slot in 0..self.connections.len() {
            self.with(slot, |connection| match holding {
                true => connection.hold(&line),
                false => connection.queue(&line),
            });
        }
    }

    /// The descriptors that `client` has named.
    pub fn named_fds(&mut self, client: ClientId) -> Option<&mut BTreeMap<String, OwnedFd>> {
        self.connection(client).map(|connection| &mut connection.named)
    }

    /// The descriptor that came with the current request of `client` (SCM_RIGHTS).
    pub fn take_fd(&mut self, client: ClientId) -> Option<OwnedFd> {
        self.connection(client)?.take_fd()
    }

    /// End servers: no new clients; queued output is delivered to clients that read it within
    /// `timeout`, then all are disconnected. The sockets' names are removed when the returned
    /// values are dropped, which may wait for a file system.
    pub fn shutdown(servers: Vec<Self>, timeout: Duration) -> Vec<SocketFile> {
        let deadline = Instant::now() + timeout;
        let (mut files, mut waiting) = (Vec::new(), Vec::new());
        for Self { file, connections, .. } in servers {
            files.extend(file);
            waiting.extend(connections.into_iter().flatten());
        }
        loop {
            let mut at_work = Vec::new();
            for mut connection in waiting {
                match connection.flush() {
                    Ok(()) if connection.has_output() => at_work.push(connection),
                    Ok(()) | Err(_) => connection.hang_up(),
                }
            }
            waiting = at_work;
            let left = deadline.saturating_duration_since(Instant::now());
            if waiting.is_empty() || left.is_zero() {
                return files;
            }
            let mut fds: Vec<_> =
                waiting.iter().map(|c| PollFd::from_borrowed_fd(c.fd(), PollFlags::OUT)).collect();
            let left = Timespec::try_from(left).ok();
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return files,
            }
        }
    }

    fn connection(&mut self, client: ClientId) -> Option<&mut Connection> {
        self.connections.get_mut(client.slot)?.as_mut().filter(|c| c.id == client)
    }

    /// Call `act` for the connection in `slot`, then queue it, let it wait, or drop it.
    fn with(&mut self, slot: usize, act: impl FnOnce(&mut Connection) -> Result<(), Gone>) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else { return };
        match act(connection) {
            Ok(()) if connection.finished() => self.disconnect(slot, &Gone::HungUp),
            Ok(()) => {
                if connection.has_work() && !connection.queued {
                    connection.queued = true;
                    self.queue.push_back(slot);
                }
                let now = connection.memory();
                let before = std::mem::replace(&mut connection.counted, now);
                self.memory = (self.memory + connection.counted).saturating_sub(before);
            }
            Err(gone) => self.disconnect(slot, &gone),
        }
        while self.memory > self.most_memory {
            let most = self.connections.iter().enumerate();
            let most = most.max_by_key(|(_, c)| c.as_ref().map_or(0, |c| c.counted));
            match most {
                Some((slot, Some(_))) => self.disconnect(slot, &Gone::TooMuch),
                _ => return,
            }
        }
    }

    fn disconnect(&mut self, slot: usize, gone: &Gone) {
        let Some(place) = self.connections.get_mut(slot) else { return };
        let Some(connection) = place else { return };
        match gone {
            Gone::HungUp => log::debug!("QMP client {} has hung up", connection.id.serial),
            gone => log::warn!("QMP client {} is disconnected: {gone}", connection.id.serial),
        }
        if connection.queued {
            self.queue.retain(|queued| *queued != slot);
        }
        // Closing would suffice, unless there is a duplicate of the descriptor.
        let _ = self.registry.deregister(&mut SourceFd(&connection.raw_fd()));
        self.memory = self.memory.saturating_sub(connection.counted);
        *place = None;
        self.acceptable |= self.starved;
    }

    /// Leave waiting clients unaccepted for now.
    fn starve(&mut self, why: &dyn Display) -> bool {
        if !self.starved {
            log::warn!("QMP clients have to wait: {why}");
        }
        self.starved = true;
        false
    }

    /// Accept one client; returns whether another may be waiting.
    fn accept(&mut self) -> bool {
        let Some(listener) = &self.listener else { return false };
        let free = self.connections.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.connections.len());
        if slot >= self.most {
            return self.starve(&"there are too many of them");
        }
        let fd = match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(Errno::INTR | Errno::CONNABORTED) => return true,
            Err(Errno::AGAIN) => {
                self.starved = false;
                return false;
            }
            // Trying again at once would spin: see `ready`.
            Err(e) => return self.starve(&e),
        };
        self.admit(slot, fd);
        true
    }

    /// Greet the client at the other end of `fd`, which gets `slot`.
    fn admit(&mut self, slot: usize, fd: OwnedFd) {
        self.last_serial += 1;
        let connection = Connection::new(ClientId { slot, serial: self.last_serial }, fd);
        let token = Token(self.base.saturating_add(1).saturating_add(slot));
        let interest = Interest::READABLE | Interest::WRITABLE;
        let fd = connection.raw_fd();
        if let Err(e) = self.registry.register(&mut SourceFd(&fd), token, interest) {
            log::warn!("a QMP client was rejected: {e}");
            return;
        }
        match self.connections.get_mut(slot) {
            Some(place) => *place = Some(connection),
            None => self.connections.push(Some(connection)),
        }
        let greeting = greeting();
        self.with(slot, |connection| connection.queue(&greeting));
    }
}

fn greeting() -> Vec<u8> {
    #[derive(Serialize)]
    struct Greeting {
        #[serde(rename = "QMP")]
        qmp: Hello,
    }
    #[derive(Serialize)]
    struct Hello {
        version: VersionInfo,
        capabilities: [&'static str; 0],
    }
    line(&Greeting { qmp: Hello { version: VersionInfo::own(), capabilities: [] } })
}

#[cfg(test)]
mod tests;
