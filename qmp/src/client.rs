//! A blocking client, for tests and command line tools.
use std::{
    collections::VecDeque,
    io::{self, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    Error,
    request::line,
    schema::{Command, Timestamp, VersionInfo},
};

/// Default time to wait for an answer.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest line accepted from a server, bytes.
const MAX_LINE: usize = 16 << 20;

/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_millis(2);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No server answers there.
    #[error("cannot connect to QMP socket '{}'", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The last attempt's error.
        source: io::Error,
    },
    /// The server did not answer in time.
    #[error("no {what} from the QMP server within {timeout:?}")]
    Timeout {
        /// What the client waited for.
        what: String,
        /// How long.
        timeout: Duration,
    },
    /// The server has hung up.
    #[error("the QMP server has hung up while {what} was expected")]
    Closed {
        /// What the client waited for.
        what: String,
    },
    /// The server does not speak QMP.
    #[error("the server does not speak QMP: {0}")]
    NotQmp(String),
    /// The command failed.
    #[error("{command}: {error}")]
    Refused {
        /// Its name.
        command: String,
        /// The server's error.
        error: Error,
    },
    /// The connection broke.
    #[error("the QMP connection failed")]
    Io(#[from] io::Error),
}

/// An event as received.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ReceivedEvent {
    /// Its name.
    pub event: String,
    /// Its data.
    #[serde(default)]
    pub data: Value,
    /// When it happened, by the server's clock.
    pub timestamp: Timestamp,
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// How many bytes of `input` are known to have no line end.
    searched: usize,
    events: VecDeque<ReceivedEvent>,
    version: VersionInfo,
    timeout: Duration,
}

impl Client {
    /// Connect to the socket at `path`, which may take up to `timeout` to appear, and read the
    /// greeting. The caller sends `qmp_capabilities`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= deadline => {
                    return Err(ClientError::Connect { path: path.into(), source });
                }
                Err(_) => thread::sleep(RETRY),
            }
        };
        Self::greeted(stream, deadline.max(Instant::now() + RETRY), timeout)
    }

    /// Use a connected socket: read the greeting, which may take up to `timeout`.
    pub fn on(stream: UnixStream, timeout: Duration) -> Result<Self, ClientError> {
        Self::greeted(stream, Instant::now() + timeout, timeout)
    }

    fn greeted(
        stream: UnixStream,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Self, ClientError> {
        stream.set_write_timeout(Some(DEFAULT_TIMEOUT))?;
        #[derive(Deserialize)]
        struct Greeting {
            #[serde(rename = "QMP")]
            qmp: Hello,
        }
        #[derive(Deserialize)]
        struct Hello {
            version: VersionInfo,
        }
        let nothing = VersionInfo::own();
        let mut client = Self {
            stream,
            input: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            version: nothing,
            timeout: DEFAULT_TIMEOUT,
        };
        let line = client.line_by("greeting", deadline, timeout)?;
        let greeting: Greeting = parse(&line)?;
        client.version = greeting.qmp.version;
        Ok(client)
    }

    /// The server's version, from its greeting.
    pub fn version(&self) -> &VersionInfo {
        &self.version
    }

    /// Set how long to wait for answers from now on (30 s by default).
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Run `command`.
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Return, ClientError> {
        let unfit = |e: serde_json::Error| ClientError::NotQmp(format!("{}: {e}", C::NAME));
        let mut arguments = serde_json::to_value(command).map_err(unfit)?;
        // Absent members are left out, also in nested values.
        without_null(&mut arguments);
        let reply = self.execute_raw(C::NAME, arguments)?;
        serde_json::from_value(reply).map_err(unfit)
    }

    /// Read the answer to a `C` that was already sent. Answers come in the order of their commands.
    pub fn receive<C: Command>(&mut self) -> Result<C::Return, ClientError> {
        let unfit = |e: serde_json::Error| ClientError::NotQmp(format!("{}: {e}", C::NAME));
        serde_json::from_value(self.receive_raw(C::NAME)?).map_err(unfit)
    }

    /// Run a command by its name.
    pub fn execute_raw(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.execute_with_fds(command, arguments, &[])
    }

    /// Run a command with descriptors.
    pub fn execute_with_fds(
        &mut self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, ClientError> {
        self.send_with_fds(&line(&json!({"execute": command, "arguments": arguments})), fds)?;
        self.receive_raw(command)
    }

    fn receive_raw(&mut self, command: &str) -> Result<Value, ClientError> {
        let mut message = self.read_reply(command)?;
        if let Some(value) = message.remove("return") {
            return Ok(value);
        }
        let error = message.remove("error").unwrap_or_default();
        let error = Error::deserialize(error)
            .map_err(|e| ClientError::NotQmp(format!("the reply to {command}: {e}")))?;
        Err(ClientError::Refused { command: command.into(), error })
    }

    /// The next message that is not an event; events before it are kept.
    fn read_reply(&mut self, what: &str) -> Result<Map<String, Value>, ClientError> {
        let deadline = Instant::now() + self.timeout;
        let what = format!("reply to {what}");
        loop {
            let line = self.line_by(&what, deadline, self.timeout)?;
            let message: Map<String, Value> = parse(&line)?;
            match message.contains_key("event") {
                true => self.events.push_back(parse(&line)?),
                false => return Ok(message),
            }
        }
    }

    /// Wait for the event called `name`; other events are kept. Events received already count,
    /// oldest first.
    pub fn wait_event(
        &mut self,
        name: &str,
        timeout: Duration,
    ) -> Result<ReceivedEvent, ClientError> {
        let deadline = Instant::now() + timeout;
        let what = format!("{name} event");
        let mut seen = 0;
        loop {
            let found = self.events.iter().skip(seen).position(|e| e.event == name);
            if let Some(event) = found.and_then(|found| self.events.remove(seen + found)) {
                return Ok(event);
            }
            seen = self.events.len();
            let line = self.line_by(&what, deadline, timeout)?;
            self.events.push_back(parse(&line)?);
        }
    }

    /// The oldest event that was kept, or the next one.
    pub fn next_event(&mut self, timeout: Duration) -> Result<ReceivedEvent, ClientError> {
        match self.events.pop_front() {
            Some(event) => Ok(event),
            None => parse(&self.line_by("event", Instant::now() + timeout, timeout)?),
        }
    }

    /// The events that were kept.
    pub fn take_events(&mut self) -> Vec<ReceivedEvent> {
        self.events.drain(..).collect()
    }

    /// Send bytes unchanged.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// Send a line unchanged, with a line feed.
    pub fn send_line(&mut self, text: &str) -> Result<(), ClientError> {
        self.send_raw(format!("{text}\n").as_bytes())
    }

    /// Send bytes and, with the first of them, descriptors.
    pub fn send_with_fds(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let mut sent = 0;
        if !fds.is_empty() {
            let size = SendAncillaryMessage::ScmRights(fds).size();
            let mut space = vec![MaybeUninit::uninit(); size];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(fds));
            sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
                .map_err(io::Error::from)?;
        }
        self.send_raw(bytes.get(sent..).unwrap_or_default())
    }

    /// The next line as received, without its line end; may be an event.
    pub fn read_line(&mut self, timeout: Duration) -> Result<String, ClientError> {
        let line = self.line_by("line", Instant::now() + timeout, timeout)?;
        String::from_utf8(line).map_err(|_| ClientError::NotQmp("a line is not UTF-8".into()))
    }

    /// Wait until the server hangs up; events until then are kept.
    pub fn wait_closed(&mut self, timeout: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.line_by("end of the stream", deadline, timeout) {
                Ok(line) => self.events.extend(parse(&line).ok()),
                Err(ClientError::Closed { .. }) => return Ok(()),
                Err(ClientError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The stream, for operations that this client does not have.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn line_by(
        &mut self,
        what: &str,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<Vec<u8>, ClientError> {
        let late = || ClientError::Timeout { what: what.into(), timeout };
        let mut looked = false;
        loop {
            let fresh = self.input.get(self.searched..).unwrap_or_default();
            if let Some(end) = fresh.iter().position(|byte| *byte == b'\n') {
                let rest = self.input.split_off(self.searched + end + 1);
                let mut line = std::mem::replace(&mut self.input, rest);
                self.searched = 0;
                while line.pop_if(|byte| matches!(byte, b'\r' | b'\n')).is_some() {}
                return Ok(line);
            }
            self.searched = self.input.len();
            if self.input.len() > MAX_LINE {
                return Err(ClientError::NotQmp(format!("a line is longer than {MAX_LINE} bytes")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // Check once more after the deadline: this process may have been stopped until then.
            if left.is_zero() && std::mem::replace(&mut looked, true) {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed { what: what.into() }),
                Ok(length) => self.input.extend_from_slice(chunk.get(..length).unwrap_or_default()),
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(late()),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(e.into()),
                },
            }
        }
    }
}

fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, ClientError> {
    serde_json::from_slice(line)
        .map_err(|e| ClientError::NotQmp(format!("{e} in '{}'", String::from_utf8_lossy(line))))
}

fn without_null(value: &mut Value) {
    if let Value::Object(members) = value {
        members.retain(|_, member| !member.is_null());
        members.values_mut().for_each(without_null);
    }
}
