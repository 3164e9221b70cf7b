//! TLS on a connection, without waiting.
use std::{
    io::{self, BufRead, Write},
    sync::Arc,
    time::Instant,
};

use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use super::{Descriptors, LinkError, MOST_AT_ONCE, queue::Queue, subject};

/// Most bytes that TLS keeps of what is to be sent.
const KEPT: usize = 64 << 10;

/// The side that one is.
pub enum Role {
    /// Has opened the connection to the host with this name or address, which the peer's
    /// certificate has to be for.
    Client(Arc<ClientConfig>, rustls::pki_types::ServerName<'static>),
    /// Has accepted it.
    Server(Arc<ServerConfig>),
}

/// A session.
pub struct Session {
    tls: Box<Connection>,
    /// Until the handshake is complete.
    deadline: Option<Instant>,
}

impl Session {
    pub fn new(role: Role, deadline: Instant) -> Result<Self, rustls::Error> {
        let mut tls: Connection = match role {
            Role::Client(config, name) => ClientConnection::new(config, name)?.into(),
            Role::Server(config) => ServerConnection::new(config)?.into(),
        };
        tls.set_buffer_limit(Some(KEPT));
        Ok(Self { tls: Box::new(tls), deadline: Some(deadline) })
    }

    pub const fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub fn subject(&self) -> Option<String> {
        let certificate = self.tls.peer_certificates()?.first()?;
        if self.deadline.is_some() { None } else { subject::of(certificate) }
    }

    pub fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Write what fits, of TLS's own and of `queue`.
    pub fn write(&mut self, queue: &mut Queue, to: &mut Descriptors) -> Result<(), LinkError> {
        loop {
            while self.tls.wants_write() {
                match self.tls.write_tls(to) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
            if self.tls.is_handshaking() || queue.is_empty() {
                return Ok(());
            }
            match self.tls.writer().write(queue.front())? {
                0 => return Ok(()),
                taken => queue.take(taken),
            }
        }
    }

    /// Read what has arrived, and append what is for the caller to `into`.
    pub fn read(
        &mut self,
        now: Instant,
        from: &mut Descriptors,
        into: &mut Vec<u8>,
    ) -> Result<(), LinkError> {
        let before = into.len();
        while into.len() - before < MOST_AT_ONCE {
            self.take(into)?;
            match self.tls.read_tls(from) {
                Ok(0) => {
                    // What was cut off is no message of TLS; nothing follows.
                    return Err(LinkError::Closed);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            let processed = self.tls.process_new_packets();
            self.take(into)?;
            processed.map_err(LinkError::Tls)?;
        }
        if !self.tls.is_handshaking() {
            self.deadline = None;
        }
        match self.deadline {
            Some(deadline) if now >= deadline => Err(LinkError::Handshake),
            _ => Ok(()),
        }
    }

    /// Append what was decrypted to `into`.
    fn take(&mut self, into: &mut Vec<u8>) -> Result<(), LinkError> {
        let mut reader = self.tls.reader();
        loop {
            let length = match reader.fill_buf() {
                // The peer has said that this is the end.
                Ok([]) => return Err(LinkError::Closed),
                Ok(bytes) => {
                    into.extend_from_slice(bytes);
                    bytes.len()
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            reader.consume(length);
        }
    }

    /// Say that this is the end.
    pub fn end(&mut self) {
        self.tls.send_close_notify();
    }
}
