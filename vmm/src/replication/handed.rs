//! What an agent hands over: connections, by `replication-answer` with `connected`, and the second
//! path.
use std::os::fd::OwnedFd;

use qmp::{
    Error,
    schema::ReplicationAnswer,
    server::{Servers, Ticket},
};

use transport::Descriptors;

use super::beside::Socket;

/// The connection that comes with this answer.
///
/// # Errors
/// When the descriptors that it names were not passed, or cannot be used.
pub fn take(
    answer: &ReplicationAnswer,
    servers: &mut Servers,
    ticket: &Ticket,
) -> Result<Descriptors, Error> {
    let mut take = |key: &str, name: &Option<String>| -> Result<Option<OwnedFd>, Error> {
        name.as_deref().map(|name| passed(key, name, servers, ticket)).transpose()
    };
    let (read, write) = (take("fd", &answer.fd), take("write-fd", &answer.write_fd));
    let read = read?.ok_or_else(|| Error::text("Parameter 'fd' is missing: pass it with getfd"))?;
    let made = match write? {
        None => Descriptors::socket(read),
        Some(write) => Descriptors::pipes(read, write),
    };
    made.map_err(|e| Error::text(format!("the connection that was passed cannot be used: {e}")))
}

/// The socket for datagrams that is called `name`.
///
/// # Errors
/// When it was not passed, or is none.
pub fn datagrams(name: &str, servers: &mut Servers, ticket: &Ticket) -> Result<Socket, Error> {
    Socket::new(passed("fd", name, servers, ticket)?)
}

/// The descriptor that `key` calls `name`.
fn passed(key: &str, name: &str, servers: &mut Servers, ticket: &Ticket) -> Result<OwnedFd, Error> {
    let passed = servers.named_fds(ticket).and_then(|named| named.remove(name));
    passed.ok_or_else(|| {
        Error::text(format!(
            "Invalid parameter '{key}': no descriptor is called '{name}': pass it with getfd first"
        ))
    })
}
