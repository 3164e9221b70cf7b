//! Two hosts that can run the same guest, and clients outside. In each host the guest's tap is on a
//! bridge; the hosts and the outside are joined by one switch, and the hosts by a second one for
//! what they say to each other.
//!
//! ```text
//!   left: guest0 - br0 - up0 --.                 .-- up0 - br0 - guest0 :right
//!     |                         `---- front ----'                         |
//!   link0                             |                                 link0
//!     |                        outside: eth0                              |
//!     `------------------------------ link -------------------------------'
//! ```
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::Result;

use super::namespace::Namespace;
use super::switch::{Mac, Switch};
use crate::debian::Debian;

/// The guest's server.
pub const GUEST: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(10, 9, 0, 2), 7000));
/// The guest's address on the network.
pub const GUEST_MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// The tap for the guest in each host.
pub const TAP: &str = "guest0";
/// The port of `front` that leads outside. Those of the hosts, there and of `link`, are
/// [`Side::port`].
pub const OUTSIDE: usize = 2;

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    Left,
    /// The second.
    Right,
}

impl Side {
    /// Its port at both switches.
    #[must_use]
    pub const fn port(self) -> usize {
        self as usize
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }

    /// Its address on the link between the hosts.
    #[must_use]
    pub const fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 10, 0, self as u8 + 1)
    }
}

/// The hosts and what joins them; everything disappears when it is dropped.
pub struct Hosts {
    /// Where clients are.
    pub outside: Namespace,
    left: Namespace,
    right: Namespace,
    /// What the guest says to clients.
    pub front: Switch,
    /// What the hosts say to each other.
    pub link: Switch,
}

impl Hosts {
    /// Perfect links; `seed` determines what is random on them later.
    ///
    /// # Errors
    /// This process may not make namespaces or taps: this needs root.
    pub fn new(debian: &Debian, seed: u64) -> Result<Self> {
        let outside = Namespace::new(debian)?;
        let eth0 = outside.tap("eth0")?;
        outside.ip(debian, "addr add 10.9.0.1/24 dev eth0")?;
        outside.ip(debian, "link set eth0 up")?;
        // What is lost at a failover is sent again soon, so that clients see how long the failover
        // takes and not TCP's timer, which is 200 ms at least.
        outside.ip(debian, "route replace 10.9.0.0/24 dev eth0 rto_min 10ms")?;
        let (left, left_up, left_link) = host(debian, Side::Left)?;
        let (right, right_up, right_link) = host(debian, Side::Right)?;
        let front = Switch::new(vec![left_up, right_up, eth0], seed)?;
        let link = Switch::new(vec![left_link, right_link], seed ^ 1)?;
        Ok(Self { outside, left, right, front, link })
    }

    /// A host's namespace.
    #[must_use]
    pub const fn host(&self, side: Side) -> &Namespace {
        match side {
            Side::Left => &self.left,
            Side::Right => &self.right,
        }
    }
}

/// A host, and the other ends of its uplink and its link.
fn host(debian: &Debian, side: Side) -> Result<(Namespace, std::fs::File, std::fs::File)> {
    let host = Namespace::new(debian)?;
    let (up, link) = (host.tap("up0")?, host.tap("link0")?);
    host.ip(debian, &format!("tuntap add mode tap name {TAP}"))?;
    // One that snoops on multicast announces itself, a second after it is up, to those that do too.
    host.ip(debian, "link add br0 type bridge mcast_snooping 0")?;
    for port in ["up0", TAP] {
        host.ip(debian, &format!("link set {port} master br0 up"))?;
    }
    host.ip(debian, "link set br0 up")?;
    host.ip(debian, &format!("addr add {}/24 dev link0", side.address()))?;
    host.ip(debian, "link set link0 up")?;
    Ok((host, up, link))
}
