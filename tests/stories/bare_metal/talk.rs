//! The control socket as people and managers use it, byte for byte.
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::held::until;
use stories::monitor::{Monitor, SOON};

use crate::plug::refused;
use crate::stage::{Stage, descriptors, ends, exists, quits, simple, status};

/// A connection as `ncat -U` shows it.
pub struct Ncat(BufReader<UnixStream>);

impl Ncat {
    pub fn connect(stage: &Stage) -> Result<Self> {
        let stream = UnixStream::connect(stage.socket())?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub fn types(&mut self, text: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(text.as_bytes())?)
    }

    pub fn sees(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let text = line.strip_suffix("\r\n").context("a line does not end with CR LF")?;
        Ok(text.to_owned())
    }

    /// The next line is exactly that event, with the current time.
    pub fn sees_event(&mut self, name: &str, data: &str) -> Result<()> {
        let line = self.sees()?;
        let start = format!(r#"{{"event":"{name}","data":{data},"timestamp":{{"#);
        ensure!(line.starts_with(&start), "{line}");
        let event: Value = serde_json::from_str(&line)?;
        let timestamp = event.get("timestamp").and_then(Value::as_object).context("no time")?;
        ensure!(timestamp.len() == 2 && timestamp.get("microseconds").is_some_and(Value::is_u64));
        let seconds = timestamp.get("seconds").and_then(Value::as_u64).context("no seconds")?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(seconds) < 60, "{line} at {now}");
        Ok(())
    }

    fn sees_the_end(&mut self) -> Result<()> {
        let mut rest = String::new();
        self.0.read_to_string(&mut rest)?;
        ensure!(rest.is_empty(), "after the end came {rest}");
        Ok(())
    }
}

fn counting(stage: &Stage) -> Result<Monitor> {
    stage.vm("count", "registers 1")?.start(&stage.paths, &stage.dir)
}

#[test]
fn the_conversation_of_the_life_cycle_guide() -> Result<()> {
    let stage = Stage::new("guide")?;
    let mut monitor = counting(&stage)?;
    drop(monitor.qmp()?);
    let mut ncat = Ncat::connect(&stage)?;
    let greeting: Value = serde_json::from_str(&ncat.sees()?)?;
    let major = greeting.pointer("/QMP/version/qemu/major").and_then(Value::as_u64);
    ensure!(major >= Some(5), "{greeting}");
    ensure!(greeting.pointer("/QMP/capabilities").is_some_and(Value::is_array), "{greeting}");

    ncat.types("{\"execute\":\"stop\"}\n")?;
    ncat.sees_event("STOP", "{}")?;
    ensure!(ncat.sees()? == r#"{"return":{}}"#);
    ncat.types("{\"execute\":\"query-status\"}\n")?;
    ensure!(ncat.sees()? == r#"{"return":{"running":false,"singlestep":false,"status":"paused"}}"#);
    ncat.types("{\"execute\":\"cont\"}\n")?;
    ncat.sees_event("RESUME", "{}")?;
    ensure!(ncat.sees()? == r#"{"return":{}}"#);
    ncat.types("{\"execute\":\"query-status\"}\n")?;
    ensure!(ncat.sees()? == r#"{"return":{"running":true,"singlestep":false,"status":"running"}}"#);
    ncat.types("{\"execute\":\"quit\"}\n")?;
    ensure!(ncat.sees()? == r#"{"return":{}}"#);
    ncat.sees_event("SHUTDOWN", r#"{"guest":false,"reason":"host-qmp-quit"}"#)?;
    ncat.sees_the_end()?;
    ensure!(monitor.wait_exit()?.code() == Some(0));
    ensure!(!exists(&stage.socket()), "the socket's file is left behind");
    Ok(())
}

#[test]
fn commands_split_joined_and_with_any_id() -> Result<()> {
    let stage = Stage::new("pieces")?;
    let mut monitor = counting(&stage)?;
    let mut client = monitor.qmp()?;
    let mut ncat = Ncat::connect(&stage)?;
    ncat.sees()?;
    for byte in "{ \"execute\" :\r\n \"query-status\", \"id\": 7 }".bytes() {
        ncat.types(char::from(byte).encode_utf8(&mut [0; 4]))?;
    }
    ensure!(ncat.sees()?.ends_with(r#""status":"running"},"id":7}"#));
    ncat.types(
        r#"{"execute":"stop","id":"libvirt-1"}{"execute":"cont","id":{"a":[null,1.5]}}{"execute":"nonsense","id":[]}"#,
    )?;
    ncat.sees_event("STOP", "{}")?;
    ensure!(ncat.sees()? == r#"{"return":{},"id":"libvirt-1"}"#);
    ncat.sees_event("RESUME", "{}")?;
    ensure!(ncat.sees()? == r#"{"return":{},"id":{"a":[null,1.5]}}"#);
    let refused: Value = serde_json::from_str(&ncat.sees()?)?;
    ensure!(refused.pointer("/error/class") == Some(&json!("CommandNotFound")), "{refused}");
    ensure!(refused.get("id") == Some(&json!([])), "{refused}");
    // A client that disconnects in the middle of a word disturbs no other client.
    ncat.types("{\"exec")?;
    drop(ncat);
    quits(&stage, &mut monitor, &mut client)
}

#[test]
fn started_frozen_it_runs_after_cont() -> Result<()> {
    let stage = Stage::new("frozen")?;
    let mut monitor = stage.vm("hello", "halt")?.args(&["-S"]).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    ensure!(status(&mut qmp)? == "paused");
    thread::sleep(Duration::from_millis(50));
    ensure!(monitor.unseen().is_empty(), "the guest runs: {}", monitor.unseen());
    simple(&mut qmp, "cont")?;
    qmp.wait_event("RESUME", SOON)?;
    monitor.wait_for("halts\n", SOON)?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_signal_ends_it_in_good_order() -> Result<()> {
    let stage = Stage::new("signal")?;
    for signal in ["TERM", "INT", "HUP"] {
        let (mut monitor, mut qmp) =
            stage.start(stage.vm("count", "registers 4")?.machine("vcpu_count", 4))?;
        monitor.wait_for("processors 4\n", SOON)?;
        kill(signal, monitor.pid())?;
        ends(&mut monitor, &mut qmp, false, "host-signal", 0)?;
        ensure!(!exists(&stage.socket()), "the socket's file is left behind");
    }
    Ok(())
}

#[test]
fn the_guests_end_is_reported_to_every_client() -> Result<()> {
    let stage = Stage::new("all_told")?;
    let vm = stage.vm("hello", "poweroff")?.args(&["-S"]);
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    let mut clients = vec![monitor.qmp()?];
    for _ in 0..20 {
        clients.push(Client::connect(&stage.socket(), SOON)?);
    }
    // One that sends and reads nothing, and one that has disconnected.
    let silent = UnixStream::connect(stage.socket())?;
    drop(UnixStream::connect(stage.socket())?);
    clients.first_mut().context("no client")?.execute_raw("cont", json!({}))?;
    for mut client in clients {
        ensure!(
            client.wait_event("SHUTDOWN", SOON)?.data.get("reason")
                == Some(&json!("guest-shutdown"))
        );
        client.wait_closed(SOON)?;
    }
    ensure!(monitor.wait_exit()?.code() == Some(0));
    drop(silent);
    Ok(())
}

#[test]
fn when_killed_it_leaves_nothing_that_keeps_the_next_one_from_starting() -> Result<()> {
    let stage = Stage::new("killed")?;
    let image = stage.file("disk");
    fs::write(&image, [0; 4096])?;
    let vm = stage.vm("hello", "halt")?.disk("vda", &image, false);
    let mut monitor = vm.clone().start(&stage.paths, &stage.dir)?;
    monitor.qmp()?;
    // The harness kills it.
    drop(monitor);
    ensure!(fs::symlink_metadata(stage.socket())?.file_type().is_socket(), "no stale socket");
    let mut monitor = vm.start(&stage.paths, &stage.dir)?;
    monitor.wait_for("halts\n", SOON)?;
    let mut qmp = Client::connect(&stage.socket(), SOON)?;
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn somebody_elses_socket_or_file_is_left_alone() -> Result<()> {
    let stage = Stage::new("taken")?;
    let listener = UnixListener::bind(stage.socket())?;
    refuses(&stage, "another program listens there")?;
    // The monitor only connects, to find out.
    drop(listener);
    fs::remove_file(stage.socket())?;

    fs::write(stage.socket(), "precious")?;
    refuses(&stage, "remove it or choose another path")?;
    ensure!(fs::read(stage.socket())? == b"precious");
    fs::remove_file(stage.socket())?;

    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "halt")?)?;
    refuses(&stage, "another program listens there")?;
    ensure!(status(&mut qmp)? == "running", "the second one disturbed the first");
    quits(&stage, &mut monitor, &mut qmp)
}

/// A monitor started now prints that about the socket, and exits with status 1.
fn refuses(stage: &Stage, why: &str) -> Result<()> {
    let mut monitor = stage.vm("hello", "halt")?.start(&stage.paths, &stage.dir)?;
    let status = monitor.wait_exit()?;
    ensure!(status.code() == Some(1), "it ended with {status}");
    let said = monitor.said_to_its_end()?;
    ensure!(said.contains(why) && said.contains("qmp.sock"), "{said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok(())
}

fn kill(signal: &str, process: u32) -> Result<()> {
    let status = std::process::Command::new("kill")
        .args([format!("-{signal}"), process.to_string()])
        .status()?;
    ensure!(status.success());
    Ok(())
}

#[test]
fn an_event_and_the_answer_that_it_belongs_to_come_in_one_piece() -> Result<()> {
    let stage = Stage::new("one_piece")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    let mut raw = UnixStream::connect(stage.socket())?;
    raw.set_read_timeout(Some(SOON))?;
    let mut piece = [0; 4096];
    let mut read = |raw: &mut UnixStream| -> Result<String> {
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&*raw, &mut piece))?;
        Ok(String::from_utf8_lossy(piece.get(..length).unwrap_or_default()).into_owned())
    };
    read(&mut raw)?;
    let commands = [
        ("stop", "STOP"),
        ("cont", "RESUME"),
        ("system_reset", "RESET"),
        ("system_powerdown", "POWERDOWN"),
    ];
    for _ in 0..50 {
        for (command, event) in commands {
            raw.write_all(format!("{{\"execute\":\"{command}\"}}").as_bytes())?;
            let said = read(&mut raw)?;
            let lines: Vec<&str> = said.lines().collect();
            let [first, second] = lines[..] else { bail!("{command}: {said}") };
            ensure!(first.contains(&format!("\"event\":\"{event}\"")), "{said}");
            ensure!(second == "{\"return\":{}}", "{said}");
        }
    }
    drop(raw);
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_descriptor_s_name_is_its_client_s_own_and_goes_with_it() -> Result<()> {
    let stage = Stage::new("named")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("hello", "")?)?;
    let before = descriptors(&monitor)?;
    let mut other = Client::connect(&stage.socket(), SOON)?;
    let null = fs::File::open("/dev/null")?;
    let name = json!({ "fdname": "null" });
    other.execute_with_fds("getfd", name.clone(), &[null.as_fd()])?;
    ensure!(descriptors(&monitor)? == before + 2, "a connection and what it has sent");
    refused(&mut qmp, "closefd", name.clone(), "not found")?;
    qmp.execute_with_fds("getfd", name.clone(), &[null.as_fd()])?;
    drop(other);
    until("what it has sent goes", || descriptors(&monitor).is_ok_and(|now| now == before + 1))?;
    ensure!(qmp.execute_raw("closefd", name)? == json!({}));
    quits(&stage, &mut monitor, &mut qmp)
}
