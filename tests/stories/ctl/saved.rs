//! Domains resume from where they were saved.
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::rig::Rig;

#[test]
fn saved_domains_end_continue_or_stay_paused() -> Result<()> {
    let rig = Rig::new("save")?;
    rig.config("vm.json", "count", "registers 1")?;
    rig.ok(&["create", "vm.json"])?;
    let mut before = 0;
    for (flag, after) in [("-c", "running"), ("-p", "paused"), ("-c", "paused")] {
        let said = rig.ok(&["save", "vm", "kept", flag])?;
        ensure!(said.get("state") == Some(&json!(after)), "{said}");
        ensure!(rig.state("vm")? == after, "after {flag}");
        let now = rig.counted(&rig.file("kept"))?;
        ensure!(now >= before, "{now} after {before}");
        before = now;
    }
    let (what, _) = rig.refused(&["restore", "kept"])?;
    ensure!(what.contains("a domain 'vm' already"), "{what}");
    rig.ok(&["restore", "kept", "--name", "twin"])?;
    let uuid = |name: &str| -> Result<Value> {
        let info = rig.ok(&["info", name])?;
        info.pointer("/0/uuid").cloned().context("no uuid")
    };
    ensure!(uuid("vm")? != uuid("twin")?);
    rig.ok(&["unpause", "vm"])?;
    rig.ok(&["save", "vm", "kept"])?;
    ensure!(rig.state("vm")? == "absent" && rig.state("twin")? == "running");
    ensure!(rig.ok(&["check", "kept"])?.get("whole") == Some(&json!(true)));

    for verify in [&["restore", "kept", "-p"][..], &["restore", "kept", "--verify", "-p"]] {
        rig.ok(verify)?;
        ensure!(rig.state("vm")? == "paused");
        rig.ok(&["save", "vm", "again"])?;
        ensure!(rig.counted(&rig.file("again"))? == rig.counted(&rig.file("kept"))?, "it ran");
    }
    rig.ok(&["restore", "kept"])?;
    ensure!(rig.state("vm")? == "running");
    Ok(())
}

#[test]
fn domains_restored_from_a_save_with_disks_have_disks_of_their_own() -> Result<()> {
    let rig = Rig::new("kept")?;
    let path = rig.config("vm.json", "ledger", "")?;
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let drive = json!([{ "drive_id": "root", "path_on_host": "root.img",
        "read_only": false, "direct": false }]);
    config.as_object_mut().context("no object")?.insert("drive".into(), drive);
    fs::write(&path, config.to_string())?;
    fs::File::create(rig.file("root.img"))?.set_len(16 << 20)?;
    rig.ok(&["create", "vm.json"])?;
    rig.says("vm", "balanced")?;
    rig.ok(&["save", "vm", "kept", "-c", "--disks"])?;
    rig.ok(&["destroy", "vm"])?;
    ensure!(rig.ok(&["check", "kept"])?.get("whole") == Some(&json!(true)));

    let disks = |name: &str| -> Result<Vec<PathBuf>> {
        let info = rig.ok(&["info", name])?;
        let disks = info.pointer("/0/disks").cloned().context("no disks")?;
        Ok(serde_json::from_value(disks)?)
    };
    for name in ["one", "two"] {
        rig.ok(&["restore", "kept", "--name", name])?;
        // It detects a disk that is not from the same moment as its memory.
        rig.says(name, "balanced\nbalanced")?;
        ensure!(disks(name)?.len() == 1, "{:?}", disks(name)?);
    }
    let (one, two) = (disks("one")?, disks("two")?);
    ensure!(one != two && one.iter().chain(&two).all(|disk| disk.exists()));
    rig.ok(&["rename", "one", "uno"])?;
    ensure!(disks("uno")? == one);
    let (what, hint) = rig.refused(&["save", "uno", "mine"])?;
    ensure!(what.contains("removed when it ends") && hint.contains("--disks"), "{what}: {hint}");
    rig.ok(&["save", "uno", "mine", "--disks"])?;
    ensure!(rig.state("uno")? == "absent" && !one.iter().any(|disk| disk.exists()));
    rig.ok(&["restore", "mine"])?;
    rig.ok(&["destroy", "two"])?;
    ensure!(!two.iter().any(|disk| disk.exists()), "its disk outlives it");

    let kept = fs::read_dir(rig.file("kept"))?.flatten().map(|entry| entry.path());
    let disk = kept.into_iter().find(|path| path.to_string_lossy().contains("disk-root."));
    fs::OpenOptions::new().append(true).open(disk.context("no disk")?)?.set_len(1)?;
    let (what, _) = rig.refused(&["check", "kept"])?;
    ensure!(what.contains("another size"), "{what}");
    let (what, _) = rig.refused(&["restore", "kept", "--name", "three"])?;
    ensure!(what.contains("another size") && rig.state("three")? == "absent", "{what}");
    Ok(())
}

#[test]
fn a_restored_guest_gets_the_time_if_it_has_an_agent() -> Result<()> {
    let rig = Rig::new("told")?;
    for (id, reported) in [("org.qemu.guest_agent.0", Some(&json!(false))), ("console0", None)] {
        let path = rig.config("vm.json", "count", "registers 1")?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        let console = json!([{ "console_id": id, "socket_path": rig.file("agent.sock") }]);
        config.as_object_mut().context("no object")?.insert("console".into(), console);
        std::fs::write(&path, config.to_string())?;
        rig.ok(&["create", "vm.json"])?;
        rig.ok(&["save", "vm", "kept"])?;
        // No monitor answers there.
        let said = rig.ok(&["restore", "kept", "--clock", "realtime"])?;
        ensure!(said.get("state") == Some(&json!("running")), "{said}");
        ensure!(said.get("clock_set") == reported, "{said}");
        rig.ok(&["save", "vm", "kept"])?;
        let said = rig.ok(&["restore", "kept", "-p"])?;
        ensure!(said.get("clock_set").is_none(), "{said}");
        rig.ok(&["destroy", "vm"])?;
    }
    Ok(())
}

#[test]
fn a_save_that_cannot_be_leaves_the_domain_running() -> Result<()> {
    let rig = Rig::new("no-save")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["create", "vm.json"])?;
    let (what, _) = rig.refused(&["save", "vm", "no/such/place"])?;
    ensure!(
        what.contains("'vm' was not saved and continues") && what.contains("its parent must exist"),
        "{what}"
    );
    fs::write(rig.file("file"), "precious")?;
    rig.refused(&["save", "vm", "file"])?;
    rig.refused(&["save", "vm", "a,b"])?;
    ensure!(fs::read(rig.file("file"))? == b"precious");
    ensure!(rig.state("vm")? == "running");
    Ok(())
}

#[test]
fn what_is_damaged_is_not_restored() -> Result<()> {
    let rig = Rig::new("bad-save")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["create", "vm.json"])?;
    rig.ok(&["save", "vm", "kept"])?;
    let state = fs::read(rig.file("kept/state"))?;
    let mut bad = state.clone();
    *bad.get_mut(state.len() / 2).context("a short state")? ^= 1;
    fs::write(rig.file("kept/state"), &bad)?;
    for verb in ["check", "restore"] {
        let (what, _) = rig.refused(&[verb, "kept"])?;
        ensure!(what.contains("kept/state"), "{verb}: {what}");
    }
    ensure!(rig.state("vm")? == "absent");
    fs::write(rig.file("kept/state"), &state)?;
    let record = fs::read(rig.file("kept/domain.json"))?;
    fs::write(rig.file("kept/domain.json"), record.get(..20).context("a short record")?)?;
    for verb in ["check", "restore"] {
        let (what, _) = rig.refused(&[verb, "kept"])?;
        ensure!(what.contains("domain.json is damaged"), "{verb}: {what}");
    }
    fs::remove_file(rig.file("kept/domain.json"))?;
    rig.ok(&["check", "kept"])?;
    let (what, hint) = rig.refused(&["restore", "nowhere"])?;
    ensure!(what.contains("nowhere/state") && hint.contains("stratoctl save"), "{what}; {hint}");
    Ok(())
}

#[test]
fn what_a_monitor_has_saved_by_itself_is_restored() -> Result<()> {
    let rig = Rig::new("bare-save")?;
    rig.config("vm.json", "count", "registers 1")?;
    rig.ok(&["create", "vm.json"])?;
    let kept = rig.file("kept");
    let uri = json!({ "uri": format!("file:{}", kept.display()) }).to_string();
    rig.ok(&["qmp", "vm", "migrate", &uri])?;
    let (what, _) = rig.refused(&["restore", "kept"])?;
    ensure!(what.contains("a domain 'vm' already"), "{what}");
    rig.ok(&["destroy", "vm"])?;
    rig.ok(&["restore", "kept"])?;
    rig.ok(&["restore", "kept", "--name", "other", "--verify", "-p"])?;
    for (name, state) in [("vm", "running"), ("other", "paused")] {
        let row = rig.listed(name)?.context("not listed")?;
        let shown = ["state", "vcpus", "memory"].map(|key| row.get(key).cloned());
        ensure!(shown == [json!(state), json!(1), json!(16 << 20)].map(Some), "{row}");
    }
    rig.ok(&["info"])?;
    // From here on it is like any other.
    rig.ok(&["save", "vm", "again"])?;
    ensure!(rig.counted(&rig.file("again"))? >= rig.counted(&kept)?);
    rig.ok(&["restore", "again"])?;
    Ok(())
}

#[test]
fn a_guest_that_has_ended_is_kept_as_it_is() -> Result<()> {
    let rig = Rig::new("save-ended")?;
    for (word, flag, state) in
        [("poweroff", "--on-poweroff", "off"), ("panic", "--on-crash", "crashed")]
    {
        rig.config("vm.json", "hello", word)?;
        for then in ["preserve", "rename-restart"] {
            rig.ok(&["create", "vm.json", flag, "preserve"])?;
            rig.wait_state("vm", state)?;
            for stays in ["-c", "-p"] {
                let said = rig.ok(&["save", "vm", "kept", stays])?;
                ensure!(said.get("state") == Some(&json!(state)) && rig.state("vm")? == state);
            }
            rig.ok(&["save", "vm", "kept"])?;
            ensure!(rig.state("vm")? == "absent");
            let record = fs::read_to_string(rig.file("kept/domain.json"))?;
            fs::write(
                rig.file("kept/domain.json"),
                record.replace("\"preserve\"", &format!("\"{then}\"")),
            )?;
            // The process that restarts ended domains does not mistake it for one that has just
            // ended.
            for how in [&["restore", "kept"][..], &["restore", "kept", "-p"]] {
                let said = rig.ok(how)?;
                ensure!(said.get("state") == Some(&json!(state)), "{said}");
                ensure!(rig.state("vm")? == state && rig.state("vm-1")? == "absent");
                rig.refused(&["unpause", "vm"])?;
                rig.ok(&["destroy", "vm"])?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_restore_that_takes_long_is_shown_as_a_start() -> Result<()> {
    let mut rig = Rig::new("slow")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["create", "vm.json"])?;
    rig.ok(&["save", "vm", "kept"])?;
    // On every host it takes as long as the rest of this test.
    rig.hold()?;
    let begin = || {
        let mut command = rig.command(&["restore", "kept", "--verify", "--name", "slow"]);
        command.stdout(Stdio::null()).spawn()
    };
    let mut child = begin()?;
    rig.wait_state("slow", "starting")?;
    // Verbs that act on it wait for it; `destroy` works once no process is starting it any more.
    child.kill()?;
    child.wait()?;
    ensure!(rig.state("slow")? == "starting");
    let (what, hint) = rig.refused(&["pause", "slow"])?;
    ensure!(
        what.contains("still starting") && hint.contains("wait slow running"),
        "{what}; {hint}"
    );
    rig.ok(&["destroy", "slow"])?;
    ensure!(rig.state("slow")? == "absent");
    let mut child = begin()?;
    rig.wait_state("slow", "starting")?;
    fs::remove_file(rig.file("hold"))?;
    rig.ok(&["wait", "slow", "running"])?;
    ensure!(child.wait()?.success() && rig.state("slow")? == "running");
    Ok(())
}

#[test]
fn a_suspended_domain_stays_listed_and_resumes() -> Result<()> {
    let rig = Rig::new("suspend")?;
    rig.config("vm.json", "count", "registers 1")?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    let store = rig.file("r/state/vm/saved");
    let mut before = 0;
    for round in 0..5 {
        rig.ok(&["suspend", "vm"])?;
        ensure!(rig.state("vm")? == "suspended");
        let now = rig.counted(&store)?;
        ensure!(now >= before, "{now} after {before}");
        before = now;
        let (_, hint) = rig.refused(&["start", "vm"])?;
        ensure!(hint.contains("resume vm"), "{hint}");
        if round == 2 {
            // The state is valid until the guest runs: if the monitor dies before that, nothing is
            // lost.
            rig.ok(&["resume", "vm", "-p"])?;
            ensure!(rig.state("vm")? == "paused" && store.exists());
            rig.kill("vm")?;
            ensure!(rig.state("vm")? == "suspended");
            rig.ok(&["resume", "vm", "-p"])?;
            rig.ok(&["suspend", "vm"])?;
            ensure!(rig.counted(&store)? == now, "it ran while it was paused");
            rig.ok(&["resume", "vm", "-p"])?;
            rig.ok(&["unpause", "vm"])?;
        } else {
            rig.ok(&["resume", "vm"])?;
        }
        ensure!(rig.state("vm")? == "running" && !store.exists(), "the state still counts");
        // From here on it would not match the disks.
        if round == 3 {
            rig.kill("vm")?;
            ensure!(rig.state("vm")? == "killed");
            rig.ok(&["start", "vm"])?;
            before = 0;
        }
    }
    Ok(())
}

#[test]
fn a_resume_that_fails_keeps_the_state() -> Result<()> {
    let rig = Rig::new("no-resume")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    rig.ok(&["suspend", "vm"])?;
    let memory = rig.file("r/state/vm/saved/memory");
    fs::rename(&memory, rig.file("memory"))?;
    rig.refused(&["resume", "vm"])?;
    ensure!(rig.state("vm")? == "suspended");
    fs::rename(rig.file("memory"), &memory)?;
    let (what, hint) = rig.refused(&["delete", "vm"])?;
    ensure!(what.contains("suspended") && hint.contains("delete -f vm"), "{what}");
    rig.ok(&["rename", "vm", "other"])?;
    rig.ok(&["resume", "other"])?;
    rig.ok(&["suspend", "other"])?;
    rig.ok(&["delete", "-f", "other"])?;
    ensure!(rig.state("other")? == "absent");
    Ok(())
}

#[test]
fn the_plug_of_a_suspended_domain_can_be_pulled() -> Result<()> {
    let rig = Rig::new("unplug")?;
    rig.config("vm.json", "count", "plain 1")?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    rig.ok(&["suspend", "vm"])?;
    rig.ok(&["destroy", "vm"])?;
    ensure!(rig.state("vm")? == "registered");
    rig.ok(&["start", "vm"])?;
    let (what, hint) = rig.refused(&["resume", "vm"])?;
    ensure!(what.contains("running already") && hint.contains("info vm"), "{what}");
    Ok(())
}

/// A guest whose save takes a minute unless [`hurry`] is called, and a `stratoctl` that is saving
/// it.
fn in_the_middle_of_a_save(story: &str, verb: &[&str]) -> Result<(Rig, Child)> {
    let mut rig = Rig::new(story)?;
    let (plan, library) = (rig.file("plan"), rig.file("fail.so"));
    fs::write(&library, include_bytes!(concat!(env!("OUT_DIR"), "/fail.so")))?;
    fs::write(&plan, "pwrite 0 0")?;
    let prefix = format!("FAIL='{}' LD_PRELOAD='{}'", plan.display(), library.display());
    // The preloaded library makes system calls that the monitor's filter does not allow.
    rig.by_script(&format!("{prefix} exec \"$MONITOR\" \"$@\" -disable-seccomp"))?;
    let path = rig.config("vm.json", "fill", "248")?;
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    *config.pointer_mut("/machine-config/mem_size").context("no memory")? = json!("256M");
    fs::write(&path, config.to_string())?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    rig.says("vm", "filled")?;
    let child = rig.command(verb).stderr(Stdio::piped()).spawn()?;
    rig.wait_state("vm", "saving")?;
    // It is `saving` even before its monitor gets the command.
    let deadline = Instant::now() + SOON;
    loop {
        let save = rig.ok(&["qmp", "vm", "query-migrate"])?;
        if save.get("status") == Some(&json!("active")) {
            return Ok((rig, child));
        }
        ensure!(Instant::now() < deadline, "it is not seen saving: {save}");
    }
}

/// Lets a save run as fast as it can.
fn hurry(rig: &Rig) -> Result<()> {
    Ok(fs::write(rig.file("plan"), "")?)
}

#[test]
fn an_interrupted_save_leaves_the_domain_running() -> Result<()> {
    for (story, verb) in [("sigint", &["save", "vm", "saved"][..]), ("sigint2", &["suspend", "vm"])]
    {
        let (rig, child) = in_the_middle_of_a_save(story, verb)?;
        let (what, hint) = rig.refused(&["unpause", "vm"])?;
        ensure!(what.contains("is being saved") && hint.contains("wait vm saved"), "{what}");
        rig.signal(i32::try_from(child.id())?, Signal::INT)?;
        let out = child.wait_with_output()?;
        let said = String::from_utf8(out.stderr)?;
        ensure!(out.status.code() == Some(1) && said.contains("interrupted: 'vm'"), "{said}");
        ensure!(rig.state("vm")? == "running");
        ensure!(!rig.file("saved").exists() && !rig.file("r/state/vm/saved").exists());
    }
    Ok(())
}

#[test]
fn a_save_continues_without_the_client_that_asked_for_it() -> Result<()> {
    let (rig, mut child) = in_the_middle_of_a_save("sigkill", &["suspend", "vm"])?;
    child.kill()?;
    child.wait()?;
    hurry(&rig)?;
    rig.ok(&["wait", "vm", "saved"])?;
    // Saved but not ended: the guest may run on, which makes the saved state invalid.
    ensure!(rig.state("vm")? == "paused");
    rig.ok(&["unpause", "vm"])?;
    ensure!(!rig.file("r/state/vm/saved").exists());
    ensure!(rig.state("vm")? == "running");
    Ok(())
}

#[test]
fn the_plug_can_be_pulled_in_the_middle_of_a_save() -> Result<()> {
    let (rig, child) = in_the_middle_of_a_save("unplug2", &["suspend", "vm"])?;
    rig.ok(&["destroy", "vm"])?;
    let out = child.wait_with_output()?;
    let said = String::from_utf8(out.stderr)?;
    ensure!(out.status.code() == Some(1) && said.contains("'vm' was not saved"), "{said}");
    ensure!(rig.state("vm")? == "registered" && !rig.file("r/state/vm/saved").exists());
    Ok(())
}

#[test]
fn a_machine_that_was_begun_in_place_of_the_saved_one_is_left_alone() -> Result<()> {
    for (story, fails) in [("after-bad", true), ("after-good", false)] {
        let (rig, child) = in_the_middle_of_a_save(story, &["suspend", "vm"])?;
        let pid = i32::try_from(child.id())?;
        if !fails {
            // `stratoctl` reads the monitor's messages only afterwards.
            rig.signal(pid, Signal::STOP)?;
            hurry(&rig)?;
            let deadline = Instant::now() + SOON;
            while !rig.file("r/state/vm/saved/state").exists() {
                ensure!(Instant::now() < deadline, "it is not saved");
            }
        }
        rig.signal(pid, Signal::STOP)?;
        rig.ok(&["destroy", "vm"])?;
        hurry(&rig)?;
        rig.ok(&["start", "vm", "-p"])?;
        let new = rig.pid("vm")?;
        rig.signal(pid, Signal::CONT)?;
        child.wait_with_output()?;
        ensure!(rig.state("vm")? == "paused" && rig.pid("vm")? == new, "{story}");
    }
    Ok(())
}
