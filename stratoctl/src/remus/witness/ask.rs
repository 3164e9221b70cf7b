//! Asks a witness in a process of its own: what waits for a file system that hangs cannot be
//! interrupted, only left behind. The process answers one question after another, so an answer
//! takes no longer than the witness itself does; one that is late is killed, and the next question
//! starts another one.
//!
//! On its standard input it gets a [`Need`] on each line, or [`IDENTIFY`]; on its standard output
//! it writes a [`Said`] on each, or the identity in quotes.
use std::{
    io::{self, BufRead, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{Uri, Witness};
use crate::remus::{
    Unknown,
    bounded::wait,
    wire::{Need, Said},
};

/// Asks for the identity.
const IDENTIFY: &str = "\"identify\"";
/// Longest answer, in bytes.
const MAX_LINE: usize = 4096;
/// How many processes that could not be killed are left behind before no more are started.
const MAX_STUCK: usize = 8;
/// How long a process that was killed may take to end.
const KILL_LIMIT: Duration = Duration::from_millis(200);
/// More than a process may take to report that its witness is too slow.
const MARGIN: Duration = Duration::from_secs(2);

/// A witness that answers in limited time.
pub struct Asked {
    uri: Uri,
    identity: Option<String>,
    /// This program.
    program: PathBuf,
    running: Option<Running>,
    /// Killed, and not ended when last looked at.
    stuck: Vec<Child>,
}

struct Running {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    /// Received after the last answer.
    rest: Vec<u8>,
}

impl Asked {
    /// The witness at `uri`, asked by `program`, this program. If `identity` is given, every answer
    /// comes from the witness that has it.
    pub fn new(uri: Uri, identity: Option<String>, program: PathBuf) -> Self {
        Self { uri, identity, program, running: None, stuck: Vec::new() }
    }

    /// Start the process that asks, so that the first question does not wait for that.
    pub fn warm_up(&mut self) {
        if self.running.is_none() {
            // If it does not start, the first question says why.
            self.running = self.start().ok();
        }
    }

    /// Its identity.
    ///
    /// # Errors
    /// It does not answer.
    pub fn identify(&mut self) -> Result<String, Unknown> {
        let line = self.line(IDENTIFY)?;
        if let Ok(identity) = serde_json::from_str(&line) {
            return Ok(identity);
        }
        match serde_json::from_str(&line) {
            Ok(Said::Unknown { reason }) => Err(Unknown::new(reason)),
            _ => Err(self.failed("does not understand its own words")),
        }
    }

    /// Its answer to `need`.
    pub fn ask(&mut self, need: &Need) -> Said {
        let asked = serde_json::to_string(need).map_err(|e| Unknown::new(e.to_string()));
        let answer = asked.and_then(|text| self.line(&text)).and_then(|line| {
            serde_json::from_str(&line)
                .map_err(|_| self.failed("does not understand its own words"))
        });
        answer.unwrap_or_else(|why| Said::Unknown { reason: why.to_string() })
    }

    fn failed(&self, what: &str) -> Unknown {
        Unknown::new(format!("the process that asks witness {} {what}", self.uri))
    }

    /// The answer to one line.
    fn line(&mut self, question: &str) -> Result<String, Unknown> {
        let limit = self.uri.limit() + MARGIN;
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.start()?,
        };
        match running.exchange(question, Instant::now() + limit) {
            Ok(line) => {
                self.running = Some(running);
                Ok(line)
            }
            Err(e) => {
                self.end(running.child);
                let late = e.kind() == io::ErrorKind::TimedOut;
                Err(match late {
                    true => Unknown::new(format!(
                        "witness {} has not answered within {limit:?}",
                        self.uri
                    )),
                    false => self.failed(&format!("has ended: {e}")),
                })
            }
        }
    }

    fn start(&mut self) -> Result<Running, Unknown> {
        self.stuck.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        if self.stuck.len() >= MAX_STUCK {
            return Err(Unknown::new(format!(
                "witness {}: {MAX_STUCK} processes that have asked it hang, and cannot be killed",
                self.uri
            )));
        }
        let mut command = Command::new(&self.program);
        command.arg("ask-witness").arg(self.uri.to_string()).args(&self.identity);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let failed = |e: io::Error| self.failed(&format!("cannot be started: {e}"));
        let mut child = command.process_group(0).spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(self.failed("has no pipes"));
        };
        Ok(Running { child, input, output, rest: Vec::new() })
    }

    /// Kill a process; one that the kernel cannot end is left behind.
    fn end(&mut self, mut child: Child) {
        let _ = child.kill();
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .is_ok_and(|end| wait(&[end.as_fd()], KILL_LIMIT).unwrap_or(false));
        if !ended || !matches!(child.try_wait(), Ok(Some(_))) {
            self.stuck.push(child);
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.end(running.child);
        }
    }
}

impl Running {
    /// Write a line and read one. A line fits into the pipe, so only reading may wait.
    fn exchange(&mut self, question: &str, deadline: Instant) -> io::Result<String> {
        self.input.write_all(format!("{question}\n").as_bytes())?;
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return String::from_utf8(line).map_err(io::Error::other);
            }
            if self.rest.len() > MAX_LINE {
                return Err(io::Error::other("a line is too long"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !wait(&[self.output.as_fd()], left)? {
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                continue;
            }
            let mut chunk = [0; 1024];
            match self.output.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => self.rest.extend_from_slice(chunk.get(..length).unwrap_or_default()),
            }
        }
    }
}

/// The process: answers the lines of its standard input until that ends.
///
/// # Errors
/// Its standard input or output fails.
pub fn answer_lines(uri: &Uri, identity: Option<String>) -> io::Result<()> {
    let mut witness = uri.open(identity.clone());
    let mut out = io::stdout();
    for line in io::stdin().lock().lines() {
        let line = line?;
        // The files that were missing may be there by now.
        if witness.is_err() {
            witness = uri.open(identity.clone());
        }
        let mut answer = match &mut witness {
            Ok(witness) => answer(&mut **witness, &line),
            Err(why) => serde_json::to_string(&Said::from(Err(why.clone()))),
        }?;
        answer.push('\n');
        out.write_all(answer.as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

fn answer(witness: &mut dyn Witness, line: &str) -> serde_json::Result<String> {
    if line == IDENTIFY {
        return match witness.identify() {
            Ok(identity) => serde_json::to_string(&identity),
            Err(why) => serde_json::to_string(&Said::from(Err(why))),
        };
    }
    let need: Result<Need, _> = serde_json::from_str(line);
    let question = need.map_err(|e| Unknown::new(e.to_string())).and_then(Need::question);
    let answer = question.and_then(|(lineage, question)| witness.ask(lineage, question));
    serde_json::to_string(&Said::from(answer))
}
