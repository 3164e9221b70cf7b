//! The control socket of a domain's monitor: a single command, or a session.
use std::{
    io::{self, BufRead, Read, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use qmp::{
    ErrorClass,
    client::{Client, ClientError},
};
use serde_json::{Value, json};

use super::{Answer, Context, attach::quietly};
use crate::{domain, failure::Failure, matrix::Verb, registry::Name, verbs::Qmp};

/// Poll interval for changes that no event reports.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest line that is sent to a monitor, in bytes.
const MAX_LINE: u64 = 1 << 20;

pub fn qmp(ctx: &Context, args: &Qmp) -> anyhow::Result<Answer> {
    let (place, _) = ctx.inspect(Verb::Qmp, &args.domain)?;
    let mut client = domain::qmp(&place)?;
    let Some(command) = &args.command else { return converse(client, &args.domain) };
    let mut arguments = arguments(args.arguments.as_deref())?;
    from_here(command, &mut arguments);
    let value = client.execute_raw(command, arguments).map_err(|e| match e {
        ClientError::Refused { error, .. } => {
            let what = format!("{command}: {error}");
            let list = format!("`stratoctl qmp {} query-commands` lists the commands", args.domain);
            anyhow::Error::from(match error.class() {
                ErrorClass::CommandNotFound => Failure::hint(what, list),
                _ => Failure::new(what),
            })
        }
        other => other.into(),
    })?;
    Ok(Answer::new(format!("{value:#}"), value))
}

fn arguments(text: Option<&str>) -> anyhow::Result<Value> {
    let Some(text) = text else { return Ok(json!({})) };
    let value: Value = serde_json::from_str(text).map_err(|e| {
        Failure::hint(
            format!("the arguments are not JSON: {e}"),
            "for example '{\"id\": \"net1\"}'",
        )
    })?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err(Failure::new("the arguments must be a JSON object").into()),
    }
}

/// Copy lines from standard input to the monitor, and its output to standard output. After the end
/// of the input, this continues until all commands are answered.
fn converse(mut client: Client, name: &Name) -> anyhow::Result<Answer> {
    let mut to = client.stream().try_clone().context("a second handle")?;
    let asked = Arc::new(AtomicU64::new(0));
    let (count, (tell, over)) = (asked.clone(), mpsc::channel());
    thread::spawn(move || {
        let mut input = io::stdin().lock();
        let done = loop {
            match next_line(&mut input) {
                Ok(Some(line)) if line.trim().is_empty() => {}
                Ok(Some(line)) => {
                    count.fetch_add(1, Ordering::SeqCst);
                    if let Err(e) = to.write_all(request(&line).as_bytes()) {
                        break Err(e);
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        // The receiver is gone only if the process is ending.
        let _ = tell.send(done);
    });
    let mut out = io::stdout().lock();
    let (mut answered, mut limit, mut ended) = (0, ANSWER_TIMEOUT, false);
    loop {
        if !ended && let Ok(done) = over.try_recv() {
            done.context("standard input")?;
            ended = true;
        }
        if ended && answered >= asked.load(Ordering::SeqCst) {
            return Ok(Answer::silent());
        }
        let line = match client.read_line(POLL_INTERVAL) {
            Ok(line) => line,
            Err(ClientError::Timeout { .. }) => {
                if ended {
                    limit = limit.saturating_sub(POLL_INTERVAL);
                }
                if limit.is_zero() {
                    anyhow::bail!("no answer within {ANSWER_TIMEOUT:?}");
                }
                continue;
            }
            Err(ClientError::Closed { .. })
                if ended && answered >= asked.load(Ordering::SeqCst) =>
            {
                return Ok(Answer::silent());
            }
            Err(ClientError::Closed { .. }) => {
                eprintln!("'{name}' has ended.");
                return Ok(Answer::silent());
            }
            Err(e) => return Err(e.into()),
        };
        let message = serde_json::from_str::<Value>(&line).unwrap_or_default();
        if message.get("return").is_some() || message.get("error").is_some() {
            answered += 1;
        }
        if let Err(e) = writeln!(out, "{line}").and_then(|()| out.flush()) {
            return quietly(e);
        }
    }
}

/// A line without its end; `None` at the end of the input.
fn next_line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    let n = input.take(MAX_LINE).read_line(&mut line)?;
    if n as u64 == MAX_LINE && !line.ends_with('\n') {
        let what = format!("a line is longer than {MAX_LINE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok((n > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned()))
}

/// The request for a line: the line itself if it is JSON, else a command and its arguments.
/// Relative paths refer to the working directory of this process.
fn request(line: &str) -> String {
    let line = line.trim();
    let text = if line.starts_with(['{', '[']) {
        line.to_owned()
    } else {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match rest.trim() {
            "" => json!({ "execute": command }).to_string(),
            // Unchanged: the monitor reports what is wrong with it.
            rest => format!("{{\"execute\":{},\"arguments\":{rest}}}", json!(command)),
        }
    };
    let changed = || {
        let mut message = serde_json::from_str::<Value>(&text).ok()?;
        let command = message.get("execute")?.as_str()?.to_owned();
        from_here(&command, message.get_mut("arguments")?).then(|| message.to_string())
    };
    format!("{}\n", changed().unwrap_or(text))
}

/// Make the paths among `arguments` absolute; whether any was relative. The monitor has a working
/// directory of its own.
fn from_here(command: &str, arguments: &mut Value) -> bool {
    let (text, scheme) = match command {
        "blockdev-add" => (arguments.pointer_mut("/file/filename"), ""),
        "migrate" => (arguments.get_mut("uri"), ":"),
        _ => return false,
    };
    let Some(Value::String(text)) = text else { return false };
    let begin = match text.split_once(scheme) {
        _ if scheme.is_empty() => 0,
        Some((kind @ ("file" | "unix"), _)) => kind.len() + scheme.len(),
        _ => return false,
    };
    let Some(path) = text.get(begin..).map(Path::new) else { return false };
    if path.is_absolute() {
        return false;
    }
    // An empty path stays empty, and the monitor refuses it.
    let whole = std::path::absolute(path).ok();
    let Some(whole) = whole.as_deref().and_then(Path::to_str) else { return false };
    text.replace_range(begin.., whole);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_or_a_command() {
        assert_eq!(request(" {\"execute\":\"stop\"} "), "{\"execute\":\"stop\"}\n");
        assert_eq!(request("query-status"), "{\"execute\":\"query-status\"}\n");
        assert_eq!(
            request("device_del  {\"id\":\"a\"}"),
            "{\"execute\":\"device_del\",\"arguments\":{\"id\":\"a\"}}\n"
        );
    }

    #[test]
    fn paths_begin_where_the_user_is() {
        let here = std::env::current_dir().expect("a directory");
        let here = here.to_str().expect("a path");
        for (line, sent) in [
            (
                r#"blockdev-add {"node-name":"d","file":{"filename":"a.img"}}"#,
                format!(r#"{{"node-name":"d","file":{{"filename":"{here}/a.img"}}}}"#),
            ),
            (r#"migrate {"uri":"file:kept"}"#, format!(r#"{{"uri":"file:{here}/kept"}}"#)),
            (r#"migrate {"uri":"unix:s"}"#, format!(r#"{{"uri":"unix:{here}/s"}}"#)),
            (r#"migrate {"uri":"exec:cat"}"#, r#"{"uri":"exec:cat"}"#.into()),
            (r#"migrate {"uri":"file:/kept"}"#, r#"{"uri":"file:/kept"}"#.into()),
            (r#"migrate {"uri":"file:"}"#, r#"{"uri":"file:"}"#.into()),
            (r#"device_del {"id":"a.img"}"#, r#"{"id":"a.img"}"#.into()),
        ] {
            let (command, arguments) = line.split_once(' ').expect("two words");
            let sent = format!("{{\"execute\":\"{command}\",\"arguments\":{sent}}}\n");
            assert_eq!(request(line), sent);
            let whole = format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}");
            assert_eq!(request(&whole), sent);
        }
        // Lines that are neither JSON nor this form are sent unchanged.
        assert_eq!(request("migrate {uri"), "{\"execute\":\"migrate\",\"arguments\":{uri}\n");
    }

    #[test]
    fn lines_are_bounded() {
        let mut input = io::Cursor::new([b"one\r\n".to_vec(), vec![b'x'; 2 << 20]].concat());
        assert_eq!(next_line(&mut input).expect("a line").as_deref(), Some("one"));
        assert!(next_line(&mut input).is_err());
        assert_eq!(next_line(&mut io::empty()).expect("the end"), None);
    }
}
