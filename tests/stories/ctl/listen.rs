//! The output of monitors: logs, events, answers; and of `stratoctl` itself.
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::attach::{Heard, said};
use crate::rig::Rig;

fn out(rig: &Rig, args: &[&str]) -> Result<String> {
    let out = rig.run(args)?;
    let reported = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{args:?} ended with {}: {reported}", out.status);
    Ok(String::from_utf8(out.stdout)?)
}

#[test]
fn events_are_lines_and_end_with_the_domain() -> Result<()> {
    let rig = Rig::new("events")?;
    rig.config("web.json", "hello", "obey")?;
    rig.ok(&["create", "web.json"])?;
    said(&rig, "web", "waits\n")?;
    let listen = |args: &[&str]| -> Result<(Child, Heard)> {
        let mut child = rig.command(args).stdout(Stdio::piped()).spawn()?;
        let heard = Heard::by(child.stdout.take().context("no output")?);
        Ok((child, heard))
    };
    let (mut plain, plain_heard) = listen(&["events", "web"])?;
    let (mut raw, raw_heard) = listen(&["events", "--json", "web"])?;
    let (mut all, all_heard) = listen(&["events"])?;
    // Once all of them listen, each receives one of these. Events of a domain that starts later
    // arrive, too.
    let paused_until = |name: &str, heard: &dyn Fn() -> bool| -> Result<()> {
        let deadline = Instant::now() + SOON;
        while !heard() {
            ensure!(Instant::now() < deadline, "a client does not get '{name}'");
            rig.ok(&["pause", name])?;
            rig.ok(&["unpause", name])?;
        }
        Ok(())
    };
    paused_until("web", &|| {
        let each = [(&plain_heard, "STOP"), (&raw_heard, "STOP"), (&all_heard, "web STOP")];
        each.iter().all(|(heard, word)| heard.text().contains(word))
    })?;
    rig.config("new.json", "hello", "obey")?;
    rig.ok(&["create", "new.json"])?;
    said(&rig, "new", "waits\n")?;
    paused_until("new", &|| all_heard.text().contains("new STOP"))?;
    rig.ok(&["shutdown", "-w", "web"])?;
    all_heard.wait_for("web SHUTDOWN guest=true reason=guest-shutdown")?;
    ensure!(plain.wait()?.success() && raw.wait()?.success());
    let plain = plain_heard.whole()?;
    ensure!(plain.contains(" web STOP\n"), "{plain}");
    let last = plain.lines().last().unwrap_or_default();
    ensure!(last.ends_with(" web SHUTDOWN guest=true reason=guest-shutdown"), "{last}");
    let raw = raw_heard.whole()?;
    let last: Value = serde_json::from_str(raw.lines().last().unwrap_or_default())?;
    ensure!(last.pointer("/data/reason") == Some(&json!("guest-shutdown")), "{last}");
    ensure!(last.pointer("/timestamp/seconds").is_some_and(Value::is_u64), "{last}");
    all.kill()?;
    all.wait()?;
    Ok(())
}

#[test]
fn a_monitor_answers_one_command_or_as_many_as_are_typed() -> Result<()> {
    let rig = Rig::new("qmp")?;
    rig.config("web.json", "hello", "halt")?;
    rig.ok(&["create", "web.json"])?;
    let status = rig.ok(&["qmp", "web", "query-status"])?;
    ensure!(status.get("status") == Some(&json!("running")), "{status}");
    let (what, _) = rig.refused(&["qmp", "web", "device_del", r#"{"id":"nobody"}"#])?;
    ensure!(what.contains("nobody"), "{what}");
    let (what, _) = rig.refused(&["qmp", "web", "device_del", "nobody"])?;
    ensure!(what.contains("not JSON"), "{what}");
    let (what, hint) = rig.refused(&["qmp", "web", "no-such"])?;
    ensure!(what.contains("no-such") && hint.contains("query-commands"), "{what}");
    let mut child =
        rig.command(&["qmp", "web"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("no input")?;
    input.write_all(b"stop\n\n{\"execute\":\"query-status\",\"id\":7}\nno-such {}\n[\n]\n")?;
    drop(input);
    let said = String::from_utf8(child.wait_with_output()?.stdout)?;
    let said: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let answers: Vec<_> = said.iter().filter(|m| m.get("event").is_none()).collect();
    ensure!(said.iter().any(|m| m.get("event") == Some(&json!("STOP"))), "{said:?}");
    let paused = answers.iter().find(|m| m.get("id") == Some(&json!(7))).context("no answer")?;
    ensure!(paused.pointer("/return/status") == Some(&json!("paused")), "{paused}");
    ensure!(answers.iter().any(|m| m.pointer("/error/class") == Some(&json!("CommandNotFound"))));
    rig.ok(&["unpause", "web"])?;
    // The connection ends with the domain.
    let mut child = rig
        .command(&["qmp", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.as_mut().context("no input")?.write_all(b"quit\n")?;
    let mut reported = String::new();
    BufReader::new(child.stderr.take().context("no output")?).read_line(&mut reported)?;
    ensure!(reported == "'web' has ended.\n", "{reported}");
    ensure!(child.wait()?.success());
    Ok(())
}

#[test]
fn the_log_of_a_killed_monitor_can_be_read() -> Result<()> {
    let rig = Rig::new("dmesg")?;
    rig.config("web.json", "hello", "nowhere")?;
    rig.ok(&["new", "web.json", "--on-crash", "preserve"])?;
    let (what, _) = rig.refused(&["dmesg", "web"])?;
    ensure!(what.contains("no log"), "{what}");
    let follow = |rig: &Rig| {
        let mut command = rig.command(&["dmesg", "-f", "web"]);
        command.stdout(Stdio::piped()).spawn()
    };
    rig.ok(&["start", "web"])?;
    rig.wait_state("web", "crashed")?;
    let follower = follow(&rig)?;
    ensure!(out(&rig, &["dmesg", "web"])?.contains("rip 0xd0000000"));
    rig.kill("web")?;
    ensure!(rig.state("web")? == "killed");
    let whole = out(&rig, &["dmesg", "web"])?;
    ensure!(whole.contains("rip 0xd0000000"), "{whole}");
    let last = out(&rig, &["dmesg", "-n", "1", "web"])?;
    ensure!(last.lines().count() == 1 && whole.ends_with(&last), "{last}");
    ensure!(out(&rig, &["dmesg", "-n", "0", "web"])?.is_empty());
    let followed = String::from_utf8(follower.wait_with_output()?.stdout)?;
    ensure!(followed == whole, "{followed}");
    rig.ok(&["destroy", "web"])?;
    ensure!(out(&rig, &["dmesg", "web"])? == whole, "a registered domain keeps its last log");
    Ok(())
}

#[test]
fn completions_and_pages_know_every_verb_of_the_help_text() -> Result<()> {
    let rig = Rig::new("pages")?;
    let help = out(&rig, &["--help"])?;
    let verbs: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    ensure!(verbs.len() > 20 && !verbs.contains(&"watch"), "{verbs:?}");
    out(&rig, &["man", "pages"])?;
    for verb in &verbs {
        let page = fs::read_to_string(rig.file(&format!("pages/stratoctl-{verb}.1")))?;
        let options = ["json", "root"].map(|option| format!("\\-\\-{option}"));
        ensure!(options.iter().all(|option| page.contains(option)), "{verb}: {page}");
    }
    ensure!(fs::read_dir(rig.file("pages"))?.count() == verbs.len() + 1);
    for shell in ["bash", "zsh", "fish"] {
        let script = out(&rig, &["completions", shell])?;
        for verb in &verbs {
            ensure!(script.contains(verb), "{shell}: {verb}");
        }
    }
    Ok(())
}
