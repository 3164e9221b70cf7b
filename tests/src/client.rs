//! A client of the control socket: enough of QMP to tell a story.
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A connection.
pub struct Client {
    stream: BufReader<UnixStream>,
    events: VecDeque<Value>,
    greeting: Value,
}

impl Client {
    /// Connects and reads the greeting.
    ///
    /// # Errors
    /// Nobody listens, or what comes is no greeting.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let mut client =
            Self { stream: BufReader::new(stream), events: VecDeque::new(), greeting: Value::Null };
        client.greeting = client.receive(Instant::now() + LIMIT)?;
        client.greeting.get("QMP").context("the first message is no greeting")?;
        client.execute("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// What the server said first.
    #[must_use]
    pub const fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command and gives what it returns. Events that come first are kept.
    ///
    /// # Errors
    /// The command's own, or the connection's.
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut command = json!({ "execute": name });
        if let (Value::Object(command), false) = (&mut command, arguments.is_null()) {
            command.insert("arguments".to_owned(), arguments);
        }
        self.send(&command.to_string())?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut message =
                self.receive(deadline).with_context(|| format!("no answer to {name}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("{name}: {message}");
            }
        }
    }

    /// The data of the next event of that name, whether it came already or not. Others are dropped.
    ///
    /// # Errors
    /// It does not come in time.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            let mut message = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(deadline).with_context(|| format!("no event {name}"))?,
            };
            if message.get("event").is_some_and(|event| event == name) {
                return Ok(message.get_mut("data").context("an event without data")?.take());
            }
        }
    }

    /// Sends text as it is, with the end of the line.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.stream
            .get_mut()
            .write_all(format!("{text}\r\n").as_bytes())
            .context("the control socket is closed")
    }

    /// Receives one line, whatever it is; `None` at the end of the connection.
    ///
    /// # Errors
    /// Nothing comes in time.
    pub fn line(&mut self, deadline: Instant) -> Result<Option<String>> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left))?;
        let mut line = String::new();
        match self.stream.read_line(&mut line).context("nothing came in time")? {
            0 => Ok(None),
            _ => Ok(Some(line.trim_end().to_owned())),
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<Value> {
        let line = self.line(deadline)?.context("the control socket was closed")?;
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
