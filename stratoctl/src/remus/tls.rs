//! The two first lines of a connection, encrypted. Afterwards the same connection is the monitors',
//! who speak TLS themselves: so the session is closed properly, and no byte is read that comes
//! behind it.
use std::{
    io::{self, BufRead, Read, Write},
    net::TcpStream,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConnection, Connection, ServerConfig, ServerConnection, pki_types::ServerName};
use serde::{Serialize, de::DeserializeOwned};

use super::dial::MAX_LINE;

/// A record's header: its type, a version, and the length of what follows.
const HEADER: usize = 5;
/// How long the peer may take for anything but a line that it has to think about.
const STEP_LIMIT: Duration = Duration::from_secs(5);

/// A TLS session on a connection that outlives it.
pub struct Encrypted<'a> {
    tls: Connection,
    stream: &'a TcpStream,
}

impl<'a> Encrypted<'a> {
    /// With the certificates in `directory`, to a host whose certificate has to be for `host`.
    ///
    /// # Errors
    /// The certificates cannot be used, or the peer is not that host.
    pub fn client(stream: &'a TcpStream, directory: &Path, host: &str) -> anyhow::Result<Self> {
        let name = ServerName::try_from(host.to_owned())?;
        let tls = ClientConnection::new(transport::client(directory)?, name)?.into();
        Ok(Self::shake_hands(tls, stream)?)
    }

    /// With somebody who has connected, and has to have a certificate.
    ///
    /// # Errors
    /// It has none.
    pub fn server(stream: &'a TcpStream, config: Arc<ServerConfig>) -> anyhow::Result<Self> {
        Ok(Self::shake_hands(ServerConnection::new(config)?.into(), stream)?)
    }

    fn shake_hands(tls: Connection, stream: &'a TcpStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(STEP_LIMIT))?;
        let mut this = Self { tls, stream };
        let deadline = Instant::now() + STEP_LIMIT;
        this.flush()?;
        while this.tls.is_handshaking() {
            this.take_record(deadline)?;
            this.flush()?;
        }
        Ok(this)
    }

    /// Send a value as one line.
    ///
    /// # Errors
    /// The peer does not read it.
    pub fn send(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        // rustls keeps no more than this at a time.
        for part in line.chunks(16 << 10) {
            self.tls.writer().write_all(part)?;
            self.flush()?;
        }
        Ok(())
    }

    /// Receive a value on one line.
    ///
    /// # Errors
    /// It does not come within `limit`, is too long, or is not what is expected.
    pub fn receive<T: DeserializeOwned>(&mut self, limit: Duration) -> io::Result<T> {
        let deadline = Instant::now() + limit;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if line.len() > MAX_LINE {
                return Err(io::Error::other("a line is too long"));
            }
            self.take_record(deadline)?;
            let mut reader = self.tls.reader();
            let length = match reader.fill_buf() {
                Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => {
                    line.extend_from_slice(bytes);
                    bytes.len()
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(e) => return Err(e),
            };
            reader.consume(length);
        }
        Ok(serde_json::from_slice(&line)?)
    }

    /// Close the session, as the peer does, too. The connection is free then.
    ///
    /// # Errors
    /// The peer does not.
    pub fn end(mut self) -> io::Result<()> {
        self.tls.send_close_notify();
        self.flush()?;
        let deadline = Instant::now() + STEP_LIMIT;
        while !self.take_record(deadline)? {}
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.stream)?;
        }
        Ok(())
    }

    /// Read one record and not a byte more; whether the peer has closed the session with it.
    fn take_record(&mut self, deadline: Instant) -> io::Result<bool> {
        let mut record = vec![0; HEADER];
        self.fill(&mut record, deadline)?;
        if let [_, _, _, high, low] = record[..] {
            let length = usize::from(u16::from_be_bytes([high, low]));
            record.resize(HEADER + length, 0);
        }
        self.fill(record.get_mut(HEADER..).unwrap_or_default(), deadline)?;
        let mut rest = &record[..];
        while !rest.is_empty() {
            self.tls.read_tls(&mut rest)?;
            match self.tls.process_new_packets() {
                Ok(state) if state.peer_has_closed() => return Ok(true),
                Ok(_) => {}
                Err(e) => {
                    // An alert says why.
                    let _ = self.flush();
                    return Err(io::Error::other(e));
                }
            }
        }
        Ok(false)
    }

    fn fill(&mut self, mut into: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !into.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            match (&mut &*self.stream).read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => into = into.get_mut(length..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
