//! Connections that an agent hands over: `replication-answer` with `connected`.
use std::os::fd::OwnedFd;

use qmp::{
    Error,
    schema::ReplicationAnswer,
    server::{Servers, Ticket},
};

use transport::Descriptors;

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
        let Some(name) = name else { return Ok(None) };
        let passed = servers.named_fds(ticket).and_then(|named| named.remove(name));
        passed.map(Some).ok_or_else(|| {
            Error::text(format!(
                "Invalid parameter '{key}': no descriptor is called '{name}': pass it with getfd \
                 first"
            ))
        })
    };
    let (read, write) = (take("fd", &answer.fd), take("write-fd", &answer.write_fd));
    let read = read?.ok_or_else(|| Error::text("Parameter 'fd' is missing: pass it with getfd"))?;
    let made = match write? {
        None => Descriptors::socket(read),
        Some(write) => Descriptors::pipes(read, write),
    };
    made.map_err(|e| Error::text(format!("the connection that was passed cannot be used: {e}")))
}
