//! Guests that are asked to shut down: some do, and some do not.
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::attach::said;
use crate::rig::Rig;

fn begins(rig: &Rig, way: &str) -> Result<()> {
    rig.config("web.json", "hello", way)?;
    rig.ok(&["create", "web.json"])?;
    said(rig, "web", if way == "obey" { "waits\n" } else { "halts\n" })
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[test]
fn a_guest_that_obeys_the_power_button_ends() -> Result<()> {
    let rig = Rig::new("asked")?;
    begins(&rig, "obey")?;
    let reported = rig.ok(&["shutdown", "-w", "web"])?;
    ensure!(text(&reported, "asked") == "power button", "{reported}");
    ensure!(
        text(&reported, "reason") == "guest-shutdown" && text(&reported, "state") == "absent",
        "{reported}"
    );
    ensure!(rig.state("web")? == "absent");
    // A registered one stays registered; without -w the command reports that the guest has not
    // reacted yet.
    rig.ok(&["new", "web.json"])?;
    rig.ok(&["start", "web"])?;
    said(&rig, "web", "waits\n")?;
    let out = rig.run(&["shutdown", "web"])?;
    let line = String::from_utf8(out.stdout)?;
    ensure!(line == "asked by the power button; the guest has not reacted yet\n", "{line}");
    rig.wait_state("web", "registered")
}

#[test]
fn a_guest_that_does_not_is_destroyed_only_when_that_is_asked_for() -> Result<()> {
    let rig = Rig::new("deaf")?;
    begins(&rig, "halt")?;
    rig.ok(&["shutdown", "web"])?;
    let (what, hint) = rig.refused(&["shutdown", "-w", "-t", "0.2", "web"])?;
    ensure!(what.contains("power button") && what.contains("is still running"), "{what}");
    ensure!(hint.contains("shutdown -F web"), "{hint}");
    ensure!(rig.state("web")? == "running");
    let reported = rig.ok(&["shutdown", "-F", "-t", "0.2", "web"])?;
    ensure!(reported.get("forced") == Some(&json!(true)), "{reported}");
    ensure!(rig.state("web")? == "absent");
    let (what, _) = rig.refused(&["shutdown", "web"])?;
    ensure!(what.contains("no domain 'web'"), "{what}");
    Ok(())
}

#[test]
fn a_guest_reboots_by_its_keyboard_in_place() -> Result<()> {
    let rig = Rig::new("keys")?;
    begins(&rig, "obey")?;
    let pid = rig.pid("web")?;
    let reported = rig.ok(&["reboot", "-F", "web"])?;
    ensure!(text(&reported, "asked") == "Ctrl-Alt-Del key", "{reported}");
    ensure!(
        text(&reported, "reason") == "guest-reset" && text(&reported, "state") == "running",
        "{reported}"
    );
    ensure!(reported.get("forced") == Some(&json!(false)), "{reported}");
    said(&rig, "web", "keys\nhello\nwaits\n")?;
    ensure!(rig.pid("web")? == pid, "in another process");
    Ok(())
}

#[test]
fn a_guest_that_does_not_reboot_is_reset_only_when_that_is_asked_for() -> Result<()> {
    let rig = Rig::new("reset")?;
    begins(&rig, "halt")?;
    let pid = rig.pid("web")?;
    let reported = rig.ok(&["reboot", "-F", "-t", "0.2", "web"])?;
    ensure!(reported.get("forced") == Some(&json!(true)), "{reported}");
    said(&rig, "web", "halts\nhello\nhalts\n")?;
    // Keys that the guest does not read fill the keyboard's buffer.
    let full = (0..4).find_map(|_| rig.refused(&["reboot", "web"]).ok());
    let (what, hint) = full.context("its keyboard takes any number of keys")?;
    ensure!(what.contains("cannot be asked") && hint.contains("reboot -F web"), "{what}: {hint}");
    let reported = rig.ok(&["reboot", "-F", "web"])?;
    ensure!(reported.get("forced") == Some(&json!(true)), "{reported}");
    said(&rig, "web", "halts\nhello\nhalts\nhello\nhalts\n")?;
    ensure!(rig.pid("web")? == pid && rig.state("web")? == "running");
    Ok(())
}

#[test]
fn an_agent_that_does_not_answer_costs_a_second_and_nothing_is_sent_to_other_consoles() -> Result<()>
{
    let rig = Rig::new("agent")?;
    for (id, is_agent) in [("org.qemu.guest_agent.0", true), ("console0", false)] {
        let path = rig.config("web.json", "hello", "obey")?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let socket = rig.file("agent.sock");
        let console = json!([{ "console_id": id, "socket_path": socket }]);
        config.as_object_mut().context("no object")?.insert("console".into(), console);
        std::fs::write(&path, config.to_string())?;
        rig.ok(&["create", "web.json"])?;
        said(&rig, "web", "waits\n")?;
        // A server in place of the monitor, which sends unsolicited data.
        std::fs::remove_file(&socket)?;
        let listener = UnixListener::bind(&socket)?;
        listener.set_nonblocking(!is_agent)?;
        let reported = thread::scope(|scope| -> Result<Value> {
            let far = scope.spawn(move || {
                let (mut stream, _) = listener.accept()?;
                // If this thread is late, the client has already disconnected.
                let _ = stream.write_all(b"\xff{\"return\": 1}\nlogin: \xff\xff{\"ret");
                Ok::<_, std::io::Error>(stream)
            });
            let reported = rig.ok(&["shutdown", "-w", "web"]);
            let asked = far.join().map_err(|_| anyhow::anyhow!("a panic"))?;
            ensure!(asked.is_ok() == is_agent, "{id}: {asked:?}");
            reported
        })?;
        ensure!(text(&reported, "asked") == "power button", "{reported}");
        ensure!(text(&reported, "instead").contains("does not answer") == is_agent, "{reported}");
        std::fs::remove_file(&socket)?;
    }
    Ok(())
}
