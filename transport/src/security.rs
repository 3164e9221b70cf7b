//! How the connections of one side are protected: the same for each of them.
use std::{net::IpAddr, sync::Arc, time::Instant};

use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};

use super::{Descriptors, Link, LinkError, Role};

/// Whose certificate a server has to have.
#[derive(Debug, Clone)]
pub enum Names {
    /// That of this host.
    Of(ServerName<'static>),
    /// That of the address that is connected to.
    OfAddress,
}

/// How connections are protected.
#[derive(Debug, Clone)]
pub enum Security {
    /// Not at all; with true, also when the peer is on another host.
    Plain(bool),
    /// TLS, of the side that opens connections.
    Client(Arc<ClientConfig>, Names),
    /// TLS, of the side that accepts them.
    Server(Arc<ServerConfig>),
}

impl Security {
    /// A connection over `descriptors`, whose handshake begins `now` if it has one.
    ///
    /// # Errors
    /// When a peer of this kind must not be connected to in this way.
    pub fn link(&self, descriptors: Descriptors, now: Instant) -> Result<Link, LinkError> {
        let role = match self {
            Self::Plain(allow_network) => return Link::plain(descriptors, *allow_network),
            Self::Client(config, Names::Of(name)) => Role::Client(config.clone(), name.clone()),
            Self::Client(config, Names::OfAddress) => {
                let host = descriptors.host().ok_or(LinkError::NoName)?;
                Role::Client(config.clone(), ServerName::IpAddress(canonical(host).into()))
            }
            Self::Server(config) => Role::Server(config.clone()),
        };
        Link::tls(descriptors, role, now)
    }
}

/// Addresses of IPv4 as certificates have them.
const fn canonical(host: IpAddr) -> IpAddr {
    host.to_canonical()
}
