//! What happens to a domain when its guest powers off, reboots or crashes.
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::attach::said;
use crate::damage::monitors_in;
use crate::rig::Rig;

const WAYS: [(&str, &str, &str); 4] = [
    ("poweroff", "--on-poweroff", "off"),
    ("keyboard-reset", "--on-reboot", "off"),
    ("panic", "--on-crash", "crashed"),
    ("nowhere", "--on-crash", "crashed"),
];

#[test]
fn a_domain_ends() -> Result<()> {
    let rig = Rig::new("destroyed")?;
    for (way, policy, _) in WAYS {
        rig.config("web.json", "hello", way)?;
        rig.ok(&["create", "web.json", policy, "destroy"])?;
        rig.wait_state("web", "absent")?;
        rig.ok(&["new", "web.json", policy, "destroy"])?;
        rig.ok(&["start", "web"])?;
        rig.wait_state("web", "registered")?;
        rig.ok(&["delete", "web"])?;
    }
    Ok(())
}

#[test]
fn a_domain_reboots_in_place() -> Result<()> {
    let rig = Rig::new("restarted")?;
    for (way, policy, _) in WAYS {
        rig.config("web.json", "hello", way)?;
        rig.ok(&["create", "web.json", policy, "restart"])?;
        let pid = rig.pid("web")?;
        let begins = if way == "nowhere" { "hello\nhello\n" } else { "hello\nhello\nhello\n" };
        said(&rig, "web", begins)?;
        ensure!(rig.pid("web")? == pid && rig.state("web")? == "running");
        rig.ok(&["destroy", "web"])?;
    }
    Ok(())
}

#[test]
fn a_domain_is_kept_to_be_looked_at() -> Result<()> {
    let rig = Rig::new("preserved")?;
    for (way, policy, state) in WAYS {
        rig.config("web.json", "hello", way)?;
        rig.ok(&["create", "web.json", policy, "preserve"])?;
        rig.wait_state("web", state)?;
        said(&rig, "web", "hello\n")?;
        let (_, hint) = rig.refused(&["unpause", "web"])?;
        ensure!(hint.contains("destroy web"), "{hint}");
        rig.ok(&["rename", "web", "late"])?;
        ensure!(rig.state("late")? == state);
        rig.ok(&["destroy", "late"])?;
    }
    Ok(())
}

#[test]
fn a_triple_fault_is_a_reboot_unless_crashes_are_looked_into() -> Result<()> {
    let rig = Rig::new("triple")?;
    rig.config("web.json", "hello", "triple-fault")?;
    rig.ok(&["create", "web.json", "--on-poweroff", "preserve"])?;
    said(&rig, "web", "hello\nhello\nhello\n")?;
    rig.ok(&["destroy", "web"])?;
    rig.ok(&["create", "web.json", "--on-crash", "preserve"])?;
    rig.wait_state("web", "crashed")
}

/// The names of two domains, in order, and their states.
fn listed(rig: &Rig) -> Result<Vec<(String, String)>> {
    let Value::Array(rows) = rig.ok(&["list"])? else { anyhow::bail!("no list") };
    let text = |row: &Value, key: &str| -> Result<String> {
        Ok(row.get(key).and_then(Value::as_str).context("no text")?.to_owned())
    };
    rows.iter().map(|row| Ok((text(row, "name")?, text(row, "state")?))).collect()
}

/// Wait until a domain's log has `text` in it.
fn logged(rig: &Rig, name: &str, text: &str) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let log = String::from_utf8(rig.run(&["dmesg", name])?.stdout)?;
        if log.contains(text) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{log}");
    }
}

#[test]
fn a_crashed_domain_is_kept_under_another_name_and_a_new_one_has_its_own() -> Result<()> {
    let rig = Rig::new("rename")?;
    for managed in [false, true] {
        let path = rig.config("web.json", "hello", "panic")?;
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        // Resources that only one machine at a time can have.
        fs::write(rig.file("disk.img"), vec![0; 1 << 20])?;
        let members = config.as_object_mut().context("no object")?;
        members.insert("domain".into(), json!({ "on_crash": "rename-restart" }));
        let disk = json!({ "drive_id": "d", "path_on_host": "disk.img", "read_only": false, "direct": false });
        members.insert("drive".into(), json!([disk]));
        let console = json!({ "console_id": "c", "socket_path": rig.file("c.sock") });
        members.insert("console".into(), json!([console]));
        fs::write(&path, config.to_string())?;
        match managed {
            false => drop(rig.ok(&["create", "web.json"])?),
            true => {
                rig.ok(&["new", "web.json"])?;
                rig.ok(&["start", "web"])?;
            }
        }
        // The second one crashes at once, too, and is not restarted again.
        rig.wait_state("web-1", "crashed")?;
        rig.wait_state("web", "crashed")?;
        let both = [("web", "crashed"), ("web-1", "crashed")];
        let both = both.map(|(name, state)| (name.to_owned(), state.to_owned()));
        ensure!(listed(&rig)? == both, "{:?}", listed(&rig)?);
        ensure!(rig.pid("web")? != rig.pid("web-1")?);
        said(&rig, "web", "hello\n")?;
        said(&rig, "web-1", "hello\n")?;
        // Written once the new one runs.
        logged(&rig, "web-1", "restarted; this instance is now 'web-1'")?;
        let kept = rig.listed("web-1")?.context("not listed")?;
        ensure!(kept.get("managed") == Some(&json!(false)), "it is registered twice");
        // The processes that listen end with them.
        let listeners = || -> Result<usize> {
            let root = rig.file("r");
            let of = |pid: &fs::DirEntry| {
                let words = fs::read(pid.path().join("cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&words).into_owned();
                words.contains("\0watch\0") && words.contains(&*root.to_string_lossy())
            };
            Ok(fs::read_dir("/proc")?.flatten().filter(of).count())
        };
        ensure!(listeners()? == 1, "{} listen", listeners()?);
        rig.clean("web")?;
        rig.clean("web-1")?;
        let deadline = Instant::now() + SOON;
        while listeners()? > 0 {
            ensure!(Instant::now() < deadline, "one listens forever");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    Ok(())
}

#[test]
fn a_new_one_that_cannot_be_resumed_does_not_run_on_unseen() -> Result<()> {
    let mut rig = Rig::new("unheard")?;
    rig.patience = "2";
    // From the second monitor on no client can connect.
    let first = rig.file("first");
    let script = format!(
        "\"$MONITOR\" \"$@\" || exit\nif [ -e '{0}' ]; then rm qmp.sock; fi\n: >'{0}'",
        first.display()
    );
    rig.by_script(&script)?;
    rig.config("web.json", "hello", "panic")?;
    rig.ok(&["create", "web.json", "--on-crash", "rename-restart"])?;
    rig.wait_state("web-1", "crashed")?;
    logged(&rig, "web-1", "cannot be restarted as 'web'")?;
    let deadline = Instant::now() + SOON;
    while monitors_in(&rig)? > 1 || rig.state("web")? != "absent" {
        ensure!(Instant::now() < deadline, "{} monitors", monitors_in(&rig)?);
    }
    Ok(())
}

#[test]
fn the_new_name_is_a_free_one_and_a_renamed_domain_is_found() -> Result<()> {
    let rig = Rig::new("renamed")?;
    rig.config("other-1.json", "count", "plain 1")?;
    rig.ok(&["create", "other-1.json"])?;
    rig.config("web.json", "hello", "obey")?;
    rig.ok(&["create", "web.json", "--on-poweroff", "rename-restart"])?;
    rig.ok(&["rename", "web", "other"])?;
    said(&rig, "other", "waits\n")?;
    let pid = rig.pid("other")?;
    rig.ok(&["shutdown", "-w", "other"])?;
    rig.wait_state("other-2", "off")?;
    rig.wait_state("other", "running")?;
    ensure!(rig.pid("other-2")? == pid && rig.pid("other")? != pid);
    ensure!(rig.state("other-1")? == "running");
    said(&rig, "other", "hello\nwaits\n")?;
    // The policy does not cover reboots.
    rig.ok(&["reboot", "-F", "other"])?;
    ensure!(rig.state("other-3")? == "absent");
    Ok(())
}

#[test]
fn a_domain_that_was_suspended_is_still_restarted() -> Result<()> {
    let rig = Rig::new("resumed")?;
    rig.config("web.json", "hello", "obey")?;
    rig.ok(&["new", "web.json", "--on-poweroff", "rename-restart"])?;
    rig.ok(&["start", "web"])?;
    said(&rig, "web", "waits\n")?;
    rig.ok(&["suspend", "web"])?;
    rig.ok(&["resume", "web"])?;
    rig.ok(&["shutdown", "-w", "web"])?;
    rig.wait_state("web-1", "off")?;
    rig.wait_state("web", "running")?;
    let managed = |name| -> Result<Option<Value>> {
        Ok(rig.listed(name)?.and_then(|row| row.get("managed").cloned()))
    };
    ensure!(managed("web")? == Some(json!(true)) && managed("web-1")? == Some(json!(false)));
    // If the process that restarts the domain is killed, the domain is kept.
    said(&rig, "web", "waits\n")?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        if words.contains("\0watch\0web\0") && words.contains(&*rig.file("r").to_string_lossy()) {
            let pid = entry.file_name().to_string_lossy().parse()?;
            rig.signal(pid, rustix::process::Signal::KILL)?;
        }
    }
    rig.ok(&["shutdown", "-w", "web"])?;
    ensure!(rig.state("web")? == "off" && rig.state("web-2")? == "absent");
    Ok(())
}
