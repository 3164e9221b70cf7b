//! Where a backup listens, and who may come in.
use std::{net::TcpListener, os::fd::OwnedFd};

use config::incoming::{Place, Tls};
use qmp::server::{SocketFile, claim};
use transport::{Descriptors, Security};

use crate::checkpoint::IncomingError;

/// How a backup's connections are protected. Reads the certificates.
///
/// # Errors
/// When they cannot be used.
pub fn security(tls: &Tls) -> Result<Security, IncomingError> {
    Ok(match tls {
        Tls::Local => Security::Plain(false),
        Tls::Off => Security::Plain(true),
        Tls::Directory(directory) => Security::Server(transport::server(directory)?),
    })
}

/// A socket that listens at `place`, which accepts without waiting, and its file, if it has one.
///
/// # Errors
/// When it cannot listen there, or unencrypted connections from other hosts would reach it.
pub fn listen(place: &Place, tls: &Tls) -> Result<(OwnedFd, Option<SocketFile>), IncomingError> {
    let address = match place {
        Place::Unix(path) => {
            let (listener, file) = claim(path)?;
            return Ok((listener, Some(file)));
        }
        Place::Tcp(address) => address,
    };
    let failed = |source| IncomingError::Listen { address: address.clone(), source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    if *tls == Tls::Local && !bound.ip().is_loopback() {
        return Err(IncomingError::Unencrypted(bound));
    }
    listener
        .set_nonblocking(true)
        .and_then(|()| Descriptors::listens(&listener))
        .map_err(failed)?;
    log::info!("listening at {bound} for the primary");
    Ok((listener.into(), None))
}
