//! A process that asks a witness, and the words that it understands.
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use replication::{Answer, Incarnation, Lineage, Party, Question, Record, Settled, Side, Word};
use serde_json::{Value, json};
use stories::agent;

fn stratoctl() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| agent::stratoctl().map_err(|error| format!("{error:#}")));
    built.clone().map_err(|error| anyhow!(error))
}

/// A process that asks one witness.
pub struct Asker {
    uri: String,
    identity: Option<String>,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Asker {
    pub fn new(uri: &str, identity: Option<&str>) -> Result<Self> {
        let mut command = Command::new(stratoctl()?);
        command.arg("ask-witness").arg(uri).args(identity);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("no pipes")
        };
        let (uri, identity) = (uri.to_owned(), identity.map(str::to_owned));
        Ok(Self { uri, identity, child, input, output: BufReader::new(output) })
    }

    /// Sends a line, and does not wait for its answer.
    pub fn send(&mut self, line: &str) -> Result<()> {
        Ok(self.input.write_all(format!("{line}\n").as_bytes())?)
    }

    pub fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("'{line}'"))
    }

    /// Kills the process wherever it is, and starts another one.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        *self = Self::new(&self.uri, self.identity.as_deref())?;
        Ok(())
    }

    pub fn identify(&mut self) -> Result<String> {
        self.send("\"identify\"")?;
        let answer = self.receive()?;
        Ok(answer.as_str().with_context(|| answer.to_string())?.to_owned())
    }

    /// The answer to a question; an error if it is unknown.
    pub fn ask(&mut self, lineage: Lineage, question: Question) -> Result<Answer> {
        self.send(&line(lineage, question).to_string())?;
        answer(&self.receive()?)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A question as it is sent.
pub fn line(lineage: Lineage, question: Question) -> Value {
    let mut line = json!({ "lineage": uuid(lineage.0), "term": question.term().0 });
    let more = match question {
        Question::Look { .. } => json!({ "need": "look" }),
        Question::Claim { word, party, .. } => json!({
            "need": "claim",
            "word": format!("{word:?}").to_lowercase(),
            "side": format!("{:?}", party.side).to_lowercase(),
            "incarnation": uuid(party.incarnation.0),
        }),
        Question::Settle { winner, to, .. } => match to {
            Settled::Running => {
                json!({ "need": "settle", "winner": uuid(winner.0), "to": "running" })
            }
            Settled::Yielded { to } => json!({ "need": "settle", "winner": uuid(winner.0),
                "to": "yielded", "yielded-to": uuid(to.0) }),
        },
        Question::Fence { .. } => json!({ "need": "fence" }),
    };
    if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
        line.extend(more);
    }
    line
}

/// An answer as it was received.
fn answer(said: &Value) -> Result<Answer> {
    match text(said, "result") {
        Some("superseded") => Ok(Answer::Superseded),
        Some("record") => match said.get("record") {
            None | Some(Value::Null) => Ok(Answer::Record(None)),
            Some(record) => Ok(Answer::Record(Some(self::record(record)?))),
        },
        _ => bail!("{said}"),
    }
}

fn text<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    object.get(name).and_then(Value::as_str)
}

fn record(said: &Value) -> Result<Record> {
    let word = match text(said, "word") {
        Some("solo") => Word::Solo,
        Some("promote") => Word::Promote,
        Some("cold") => Word::Cold,
        Some("end") => Word::End,
        _ => bail!("{said}"),
    };
    let side = match text(said, "side") {
        Some("primary") => Side::Primary,
        Some("backup") => Side::Backup,
        _ => bail!("{said}"),
    };
    let settled = match text(said, "settled") {
        None => None,
        Some("running") => Some(Settled::Running),
        Some("yielded") => Some(Settled::Yielded { to: incarnation(said, "yielded-to")? }),
        Some(_) => bail!("{said}"),
    };
    let winner = Party { side, incarnation: incarnation(said, "incarnation")? };
    Ok(Record { word, winner, settled })
}

fn incarnation(said: &Value, name: &str) -> Result<Incarnation> {
    let digits = text(said, name).context("no UUID")?.replace('-', "");
    Ok(Incarnation(u128::from_str_radix(&digits, 16)?))
}

fn uuid(number: u128) -> String {
    let part = |shift: u32, bits: u32| (number >> shift) & ((1 << bits) - 1);
    let (a, b, c) = (part(96, 32), part(80, 16), part(64, 16));
    format!("{a:08x}-{b:04x}-{c:04x}-{:04x}-{:012x}", part(48, 16), part(0, 48))
}
