//! The part of a primary's agent that connects to the backup: in the primary's host, again and
//! again. It has a connection of its own to the monitor, so that nothing else waits for the network.
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use qmp::client::{Client, ClientError};
use serde_json::json;

use crate::lab::namespace::Namespace;
use crate::monitor::SOON;

/// How long a connection may take.
const LIMIT: Duration = Duration::from_millis(500);
/// How often it looks whether it is to end.
const TURN: Duration = Duration::from_millis(20);

/// Connects in a thread; ended when dropped.
pub struct Dialer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Dialer {
    /// Connects from `host` to `backup` whenever the monitor behind the control socket wants it.
    ///
    /// # Errors
    /// Nobody listens at the control socket.
    pub fn start(socket: &Path, host: &Namespace, backup: SocketAddr) -> Result<Self> {
        let mut client = Client::connect(socket, SOON)?;
        client.execute_raw("qmp_capabilities", json!({}))?;
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread = host.spawn("dialer", move || {
            // The monitor's end is its end.
            let _ = serve(&mut client, backup, &theirs);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A panic there has been printed.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn serve(client: &mut Client, backup: SocketAddr, stop: &AtomicBool) -> Result<(), ClientError> {
    while !stop.load(Ordering::Relaxed) {
        let event = match client.next_event(TURN) {
            Ok(event) => event,
            Err(ClientError::Timeout { .. }) => continue,
            Err(error) => return Err(error),
        };
        if event.event != "REPLICATION_NEEDS" || event.data.get("need") != Some(&json!("connect")) {
            continue;
        }
        let answer = match connect(client, backup) {
            Ok(()) => json!({ "nonce": 0, "need": "connect", "result": "connected", "fd": "to" }),
            Err(error) => {
                let reason = error.to_string();
                json!({ "nonce": 0, "need": "connect", "result": "unknown", "reason": reason })
            }
        };
        client.execute_raw("replication-answer", answer)?;
    }
    Ok(())
}

/// Connects, and passes the connection to the monitor.
fn connect(client: &mut Client, backup: SocketAddr) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&backup, LIMIT)?;
    let passed = client.execute_with_fds("getfd", json!({ "fdname": "to" }), &[stream.as_fd()]);
    passed.map(|_| ()).map_err(io::Error::other)
}
