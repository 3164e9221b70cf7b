//! The QEMU guest agent, at the guest's end of a console. It may not answer, and the guest is not
//! trusted: what it sends is bounded in time and size, and only the expected answer is used.
//!
//! `guest-sync-delimited` comes first: the agent sends a byte that occurs in no JSON text, 0xFF,
//! before its answer, which separates the answer from older bytes in the pipe.
#[cfg(test)]
mod tests;

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// The console of the agent, by the name in the agent's own documentation.
pub const CONSOLE: &str = "org.qemu.guest_agent.0";
/// How long the agent may take to report that it is there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the agent may take to refuse a command. It sends no answer when it complies.
const REFUSAL: Duration = Duration::from_millis(300);
/// Longest answer, in bytes.
const MAX_ANSWER: usize = 4096;
const DELIMITER: u8 = 0xff;

/// What the guest is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Powerdown,
    Reboot,
    /// To set its clock to this date, in nanoseconds since 1970 (UTC).
    SetTime(u64),
}

impl Mode {
    fn command(self) -> Value {
        let shutdown = |mode| json!({ "execute": "guest-shutdown", "arguments": { "mode": mode } });
        match self {
            Self::Powerdown => shutdown("powerdown"),
            Self::Reboot => shutdown("reboot"),
            Self::SetTime(date) => {
                json!({ "execute": "guest-set-time", "arguments": { "time": date } })
            }
        }
    }

    /// How long it may take to answer the command.
    fn limit(self) -> Duration {
        match self {
            Self::Powerdown | Self::Reboot => REFUSAL,
            Self::SetTime(_) => ANSWER_TIMEOUT,
        }
    }
}

/// Why the guest could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("it does not answer")]
    Silent,
    #[error("it refuses: {0}")]
    Refuses(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Ask for `mode`. Only a clock that was set is confirmed; otherwise success means that the agent
/// has not refused.
///
/// # Errors
/// When no agent answers, or the agent refuses.
pub fn ask(stream: UnixStream, mode: Mode) -> Result<(), AgentError> {
    ask_within(stream, mode, ANSWER_TIMEOUT, mode.limit())
}

/// Ask an agent that may take `hello` to report that it is there, and `answer` to answer the
/// command.
fn ask_within(
    stream: UnixStream,
    mode: Mode,
    hello: Duration,
    answer: Duration,
) -> Result<(), AgentError> {
    stream.set_write_timeout(Some(hello))?;
    let id = u64::from(std::process::id());
    let mut line = Line { stream, held: Vec::new() };
    line.say(&[DELIMITER])?;
    line.say_json(&json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } }))?;
    let deadline = Instant::now() + hello;
    loop {
        line.skip_delimiter(deadline)?;
        let answer = line.object(deadline)?;
        if answer.is_some_and(|answer| answer.get("return") == Some(&json!(id))) {
            break;
        }
    }
    line.say_json(&mode.command())?;
    let deadline = Instant::now() + answer;
    loop {
        match line.object(deadline) {
            Err(e) if matches!(mode, Mode::SetTime(_)) => return Err(e),
            Err(_) => return Ok(()),
            Ok(Some(answer)) if answer.get("error").is_some() => {
                let why = answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("error");
                // The text comes from the guest, so it is not written to the terminal as it is.
                let why = why.chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(AgentError::Refuses(why));
            }
            Ok(Some(answer)) if answer.get("return").is_some() => return Ok(()),
            Ok(_) => {}
        }
    }
}

struct Line {
    stream: UnixStream,
    /// Bytes that were received and not processed.
    held: Vec<u8>,
}

impl Line {
    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn say_json(&mut self, value: &Value) -> io::Result<()> {
        self.say(format!("{value}\n").as_bytes())
    }

    /// Drop everything up to the next delimiter, including that.
    fn skip_delimiter(&mut self, deadline: Instant) -> Result<(), AgentError> {
        loop {
            if let Some(at) = self.held.iter().position(|byte| *byte == DELIMITER) {
                self.held.drain(..=at);
                return Ok(());
            }
            self.held.clear();
            self.more(deadline)?;
        }
    }

    /// The next line, if it is a JSON object.
    fn object(&mut self, deadline: Instant) -> Result<Option<Value>, AgentError> {
        let mut searched = 0;
        loop {
            let fresh = self.held.get(searched..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.held.drain(..=searched + at).collect();
                // A sender that was interrupted in the middle of a line starts again after a
                // delimiter.
                let last = line.rsplit(|byte| *byte == DELIMITER).next().unwrap_or_default();
                return Ok(serde_json::from_slice(last).ok().filter(Value::is_object));
            }
            if self.held.len() > MAX_ANSWER {
                self.held.clear();
                return Ok(None);
            }
            searched = self.held.len();
            self.more(deadline)?;
        }
    }

    fn more(&mut self, deadline: Instant) -> Result<(), AgentError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(AgentError::Silent);
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut chunk = [0; 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(AgentError::Silent),
            Ok(n) => {
                self.held.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Ok(())
            }
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(AgentError::Silent),
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(e.into()),
            },
        }
    }
}
