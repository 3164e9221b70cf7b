//! Domains that are protected by a receiver with a registry of its own, as on another host, with
//! real monitors.
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::monitor::SOON;
use stories::replicated::certificates;

use crate::protected::count_aloud;
use crate::remus::running;
use crate::rig::Rig;

/// Two hosts, as far as registries are concerned.
struct Pair {
    rig: Rig,
    elsewhere: PathBuf,
    receiver: Option<Child>,
}

impl Pair {
    fn new(story: &str) -> Result<Self> {
        let rig = Rig::new(story)?;
        let elsewhere = rig.file("elsewhere");
        fs::create_dir(rig.file("witness"))?;
        count_aloud(&rig)?;
        Ok(Self { rig, elsewhere, receiver: None })
    }

    fn witness(&self) -> String {
        format!("dir:{}", self.rig.file("witness").display())
    }

    /// A verb on the other host.
    fn there(&self, args: &[&str]) -> Result<Value> {
        let elsewhere = self.elsewhere.display().to_string();
        self.rig.ok(&[&["--root", &elsewhere], args].concat())
    }

    /// What `list` on the other host says about the replication of the domain.
    fn state_there(&self) -> Result<Value> {
        let rows = self.there(&["list"])?;
        let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "web"));
        Ok(row.and_then(|row| row.get("replication")).cloned().unwrap_or_default())
    }

    fn protect(&self, way: &[&str]) -> Result<()> {
        let witness = self.witness();
        let options = ["remus", "-i", "25", "--timeout", "1000", "--witness", &witness];
        let said = self.rig.ok(&[&options[..], way].concat())?;
        ensure!(said.pointer("/replication/state") == Some(&json!("protected")), "{said}");
        self.wait("standby", || Ok(self.state_there()?.get("state") == Some(&json!("standby"))))
    }

    fn epoch(&self) -> Result<u64> {
        let row = self.rig.listed("web")?.context("not listed")?;
        Ok(row.pointer("/replication/acked").and_then(Value::as_u64).unwrap_or_default())
    }

    fn wait(&self, what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while !is_so()? {
            let there = self.state_there();
            ensure!(Instant::now() < deadline, "in vain for: {what}; there: {there:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The guest runs on the other host when its monitor here is killed.
    fn moves_when_killed(&self) -> Result<()> {
        self.rig.kill("web")?;
        self.wait("a failover", || Ok(self.state_there()?.get("role") == Some(&json!("primary"))))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // The rig does not know the other registry.
        for args in [&["destroy", "-F", "web"][..], &["delete", "web"]] {
            let _ = self.there(args);
        }
        if let Some(mut receiver) = self.receiver.take() {
            let _ = receiver.kill();
            let _ = receiver.wait();
        }
    }
}

#[test]
fn a_receiver_at_a_port_has_certificates_and_agents_that_are_stopped_change_nothing() -> Result<()>
{
    let mut pair = Pair::new("certified")?;
    let tls = pair.rig.file("tls");
    certificates::write(&tls)?;
    let (tls, witness) = (tls.display().to_string(), pair.witness());
    let elsewhere = pair.elsewhere.display().to_string();
    let listen = ["--root", &elsewhere, "remus-receive", "-p", "0", "--tls", &tls];
    let mut receiver = pair.rig.command(&[&listen[..], &["--witness", &witness]].concat());
    let mut receiver = receiver.stderr(Stdio::piped()).spawn()?;
    let mut said = String::new();
    let stderr = receiver.stderr.take().context("no standard error")?;
    BufReader::new(stderr).read_line(&mut said)?;
    pair.receiver = Some(receiver);
    let port = said.split(' ').nth(3).with_context(|| said.clone())?.to_owned();

    let strange = pair.rig.file("strange");
    certificates::write(&strange)?;
    let strange = strange.display().to_string();
    let (what, _) = pair.rig.refused(&[
        "remus",
        "-F",
        "--witness",
        &witness,
        "-p",
        &port,
        "--tls",
        &strange,
        "web",
        "localhost",
    ])?;
    ensure!(what.contains("not protected: cannot connect to localhost"), "{what}");
    ensure!(pair.state_there()? == Value::Null, "a stranger has made a domain");

    pair.protect(&["-p", &port, "--tls", &tls, "web", "localhost"])?;
    // The agents of both sides are stopped: nothing is asked, and nothing changes.
    let own = running(&pair.rig.file("r"), "\0remus-agent\0web\0")?;
    let theirs = running(&pair.elsewhere, "\0remus-agent\0web\0")?;
    ensure!((own.len(), theirs.len()) == (1, 1), "{own:?}, {theirs:?}");
    for pid in own.iter().chain(&theirs) {
        pair.rig.signal(*pid, Signal::STOP)?;
    }
    let before = pair.epoch()?;
    pair.wait("checkpoints", || Ok(pair.epoch()? > before + 10))?;
    // Without an answer the backup does not run the guest, however long that takes.
    pair.rig.kill("web")?;
    pair.wait("a suspicion", || Ok(pair.state_there()?["claimed"] == json!(true)))?;
    ensure!(pair.state_there()?["state"] == "suspecting");
    pair.rig.signal(theirs[0], Signal::CONT)?;
    pair.wait("a failover", || Ok(pair.state_there()?["role"] == "primary"))?;
    pair.rig.signal(own[0], Signal::CONT)
}

#[test]
fn a_command_that_ends_is_run_again_and_its_receiver_finds_the_same_backup() -> Result<()> {
    let pair = Pair::new("command")?;
    let stratoctl = pair.rig.command(&[]).get_program().to_string_lossy().into_owned();
    let second = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let line = format!(
        "{stratoctl} --root {} remus-receive --witness {} --heartbeat-path {second}",
        pair.elsewhere.display(),
        pair.witness()
    );
    pair.protect(&["-s", "", "--heartbeat-path", &second, "web", &line])?;
    let beats = |info: &Value| info["second-path-beats"].as_u64() > Some(0);
    pair.wait("signs of life by the second path", || {
        let here = pair.rig.listed("web")?.context("not listed")?;
        Ok(beats(&here["replication"]) && beats(&pair.state_there()?))
    })?;
    let receivers = || running(&pair.elsewhere, "\0remus-receive\0");
    for _ in 0..3 {
        let old = receivers()?;
        ensure!(old.len() == 1, "{old:?}");
        pair.rig.signal(old[0], Signal::KILL)?;
        pair.wait("another command", || Ok(receivers()?.iter().any(|pid| *pid != old[0])))?;
        let before = pair.epoch()?;
        pair.wait("checkpoints", || {
            let row = pair.rig.listed("web")?.context("not listed")?;
            let state = row.pointer("/replication/state").cloned();
            Ok(state == Some(json!("protected")) && pair.epoch()? > before + 5)
        })?;
    }
    pair.moves_when_killed()
}

#[test]
fn a_backup_that_is_destroyed_is_not_made_again_before_it_is_wanted_again() -> Result<()> {
    let pair = Pair::new("destroyed")?;
    let stratoctl = pair.rig.command(&[]).get_program().to_string_lossy().into_owned();
    let (elsewhere, witness) = (pair.elsewhere.display(), pair.witness());
    let line = format!("{stratoctl} --root {elsewhere} remus-receive --witness {witness}");
    let mut events = pair.rig.command(&["events", "web"]).stdout(Stdio::piped()).spawn()?;
    let mut events = BufReader::new(events.stdout.take().context("no output")?).lines();
    pair.protect(&["-s", "", "web", &line])?;
    pair.there(&["destroy", "-F", "web"])?;
    pair.rig.wait_replication("web", "state", "degraded")?;
    let told = events.by_ref().map_while(Result::ok).find(|line| line.contains("state=stalled"));
    ensure!(told.as_ref().is_some_and(|line| line.contains("left on purpose")), "{told:?}");
    ensure!(pair.state_there()? == Value::Null, "there is another one");
    pair.protect(&["-s", "", "web", &line])
}

#[test]
fn a_domain_that_moves_is_protected_on_the_way_only() -> Result<()> {
    let pair = Pair::new("moving")?;
    let stratoctl = pair.rig.command(&[]).get_program().to_string_lossy().into_owned();
    let line = format!("{stratoctl} --root {} remus-receive", pair.elsewhere.display());
    // With and without somebody who decides when a host fails meanwhile.
    let decided = format!("{line} --witness {}", pair.witness());
    let witness = pair.witness();
    for (options, line) in [(&[][..], &line), (&["--witness", &witness][..], &decided)] {
        pair.rig.ok(&[&["migrate", "-s", "", "web", line], options].concat())?;
        ensure!(pair.rig.state("web")? == "absent", "it is here still");
        pair.wait("the end of the protection", || {
            let rows = pair.there(&["list"])?;
            let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "web"));
            let row = row.context("it is not there")?;
            Ok(row["state"] == "running" && row["replication"] == Value::Null)
        })?;
        // It is gone with that: nobody has registered it there.
        pair.there(&["destroy", "web"])?;
        pair.rig.ok(&["create", "web.json"])?;
        pair.rig.says("web", "tally")?;
    }
    Ok(())
}
