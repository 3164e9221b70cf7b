//! The second path for signs of life: this makes the sockets, the monitors send and listen.
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket},
    os::fd::AsFd,
};

use anyhow::Context as _;
use qmp::client::Client;
use serde_json::json;

/// A socket that sends to `address`, where a backup listens.
///
/// # Errors
/// It has no address, or there is no way to it.
pub fn connect(address: &str) -> anyhow::Result<UdpSocket> {
    let to = resolved(address)?;
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let made = UdpSocket::bind(any).and_then(|socket| socket.connect(to).map(|()| socket));
    made.with_context(|| format!("--heartbeat-path: cannot send to {address}"))
}

/// A socket that listens at `address`, one of this host.
///
/// # Errors
/// It is none of this host, or in use.
pub fn listen(address: &str) -> anyhow::Result<UdpSocket> {
    let made = UdpSocket::bind(resolved(address)?);
    made.with_context(|| format!("--heartbeat-path: cannot listen at {address}"))
}

/// Give the socket to a monitor.
///
/// # Errors
/// It does not take it.
pub fn hand_over(client: &mut Client, socket: &UdpSocket) -> anyhow::Result<()> {
    let name = "heartbeat-path";
    client.execute_with_fds("getfd", json!({ "fdname": name }), &[socket.as_fd()])?;
    client.execute_raw("replication-heartbeat-path", json!({ "fd": name }))?;
    Ok(())
}

fn resolved(address: &str) -> anyhow::Result<SocketAddr> {
    let first = address.to_socket_addrs().and_then(|mut all| {
        all.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no address"))
    });
    first.with_context(|| format!("--heartbeat-path {address}: must be HOST:PORT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_where_the_backup_listens() {
        let there = listen("localhost:0").unwrap();
        let address = there.local_addr().unwrap();
        let here = connect(&address.to_string()).unwrap();
        here.send(b"beat").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(there.recv_from(&mut buffer).unwrap(), (4, here.local_addr().unwrap()));
        for wrong in ["localhost", "localhost:x", ":1:2"] {
            let said = format!("{:#}", connect(wrong).unwrap_err());
            assert!(said.contains("HOST:PORT"), "{said}");
        }
        assert!(listen(&address.to_string()).is_err(), "it is in use");
    }
}
