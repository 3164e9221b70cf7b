//! A registry that is damaged or cannot be written, and commands that are killed half-way.
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::rig::Rig;

#[test]
fn a_damaged_record_is_shown_and_does_not_hide_the_others() -> Result<()> {
    let rig = Rig::new("damaged")?;
    rig.config("vm.json", "hello", "halt")?;
    for name in ["a", "b"] {
        rig.ok(&["new", "vm.json", "--name", name])?;
    }
    rig.ok(&["start", "a"])?;
    let record = rig.file("r/state/a/domain.json");
    let whole = fs::read_to_string(&record)?;
    let other = whole.replace("\"version\": 1", "\"version\": 7");
    let cases = [
        ("", "is damaged"),
        (whole.get(..whole.len() / 2).context("a record")?, "is damaged"),
        (other.as_str(), "has version 7; this stratoctl knows 1"),
    ];
    for (text, says) in cases {
        fs::write(&record, text)?;
        let row = rig.listed("a")?.context("not listed")?;
        ensure!(row.get("state") == Some(&json!("running")), "{row}");
        ensure!(row.get("damaged").is_some_and(|said| said.to_string().contains(says)), "{row}");
        ensure!(rig.state("b")? == "registered");
        // Commands that do not need the record work.
        rig.ok(&["pause", "a"])?;
        rig.ok(&["unpause", "a"])?;
        let (what, hint) = rig.refused(&["suspend", "a"])?;
        ensure!(what.contains(says) && hint.contains("delete -f a"), "{what}; {hint}");
    }
    rig.ok(&["destroy", "a"])?;
    let (what, _) = rig.refused(&["start", "a"])?;
    ensure!(what.contains("version 7"), "{what}");
    rig.ok(&["delete", "-f", "a"])?;
    ensure!(rig.state("a")? == "absent");
    Ok(())
}

#[test]
fn a_fifo_in_the_registry_blocks_no_verb() -> Result<()> {
    let rig = Rig::new("fifo")?;
    rig.config("vm.json", "hello", "halt")?;
    for name in ["a", "b"] {
        rig.ok(&["new", "vm.json", "--name", name])?;
        rig.ok(&["start", name])?;
    }
    let fifo = |path: &Path| {
        let aside = path.with_extension("aside");
        let _ = fs::rename(path, &aside);
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        Ok::<_, anyhow::Error>(aside)
    };
    for name in ["domain.json", "run/start.json", "run/pid", "run/log", "../../run/.lock/a.save"] {
        let path = rig.file("r/state/a").join(name);
        let aside = fifo(&path)?;
        let row = rig.listed("a")?.context("not listed")?;
        ensure!(row.get("state") == Some(&json!("running")), "{name}: {row}");
        if name == "domain.json" {
            ensure!(
                row.get("damaged").is_some_and(|s| s.to_string().contains("is a FIFO")),
                "{row}"
            );
        }
        rig.ok(&["info", "a"])?;
        ensure!(rig.state("b")? == "running");
        fs::remove_file(&path)?;
        let _ = fs::rename(aside, &path);
    }
    // A FIFO in place of a file that a restore reads does not block it either.
    rig.ok(&["suspend", "a"])?;
    let state = rig.file("r/state/a/saved/state");
    let aside = fifo(&state)?;
    let (what, _) = rig.refused(&["resume", "a"])?;
    ensure!(what.contains("state"), "{what}");
    fs::remove_file(&state)?;
    fs::rename(aside, &state)?;
    rig.ok(&["resume", "a"])?;
    Ok(())
}

#[test]
fn a_verb_that_is_killed_leaves_what_the_next_one_can_use() -> Result<()> {
    let rig = Rig::new("interrupted")?;
    rig.config("vm.json", "count", "plain 1")?;
    let config = rig.file("vm.json");
    let config = config.to_str().context("a path")?;
    let mut seen = Vec::new();
    let deadline = Instant::now() + SOON * 5;
    for round in 0_u64.. {
        if round >= 60 && seen.iter().any(|state| state == "running") {
            break;
        }
        ensure!(Instant::now() < deadline, "nothing came of it: {seen:?}");
        // Each of these verbs is allowed in some of the states.
        let verbs: [&[&str]; 6] = [
            &["new", config, "--name", "vm"],
            &["start", "vm"],
            &["suspend", "vm"],
            &["resume", "vm"],
            &["rename", "vm", "other"],
            &["destroy", "vm"],
        ];
        let verb = verbs.get(usize::try_from(round)? % verbs.len()).context("a verb")?;
        let mut child = rig.command(verb).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        // Killed later and later, so that verbs complete even on a slow host.
        thread::sleep(Duration::from_micros(round * 7919 % (40_000 + 2_000 * round)));
        child.kill()?;
        child.wait()?;
        for name in ["vm", "other"] {
            let state = rig.state(name)?;
            ensure!(state != "killed", "after {verb:?} it is {state}");
            seen.push(state);
        }
        // Both at once would mean one domain under two names.
        let here = |name| Ok::<_, anyhow::Error>(rig.state(name)? != "absent");
        ensure!(!(here("vm")? && here("other")?), "after {verb:?} there are two");
        if here("other")? {
            rig.ok(&["rename", "other", "vm"])?;
        }
    }
    rig.clean("vm")?;
    rig.ok(&["new", config, "--name", "vm"])?;
    rig.ok(&["start", "vm"])?;
    rig.clean("vm")
}

#[test]
fn an_unmanaged_domain_whose_creator_was_killed_is_whole_or_gone() -> Result<()> {
    let rig = Rig::new("orphan")?;
    rig.config("vm.json", "hello", "halt")?;
    for round in 0..30_u64 {
        let mut child = rig
            .command(&["create", "vm.json"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        thread::sleep(Duration::from_micros(round * 7919 % 50_000));
        child.kill()?;
        child.wait()?;
        let state = rig.state("vm")?;
        ensure!(
            ["absent", "starting", "running", "hung"].contains(&state.as_str()),
            "it is {state}"
        );
        // A monitor that was starting comes up, and its domain is known all the time.
        let deadline = Instant::now() + SOON;
        while monitors_in(&rig)? > 0 {
            ensure!(
                Instant::now() < deadline,
                "a monitor is left, and 'vm' is {}",
                rig.state("vm")?
            );
            rig.run(&["destroy", "vm"])?;
        }
        ensure!(rig.state("vm")? == "absent");
    }
    Ok(())
}

#[test]
fn a_monitor_whose_starter_fails_does_not_run_on_unseen() -> Result<()> {
    let mut rig = Rig::new("starter")?;
    rig.config("vm.json", "hello", "halt")?;
    // As if the process that waits for the monitor to daemonize had been killed.
    rig.by_script("\"$MONITOR\" \"$@\"; exit 1")?;
    let (what, _) = rig.refused(&["create", "vm.json"])?;
    ensure!(what.contains("'vm' does not start"), "{what}");
    ensure!(monitors_in(&rig)? == 0 && rig.state("vm")? == "absent");
    rig.ok(&["new", "vm.json"])?;
    rig.refused(&["start", "vm"])?;
    ensure!(monitors_in(&rig)? == 0 && rig.state("vm")? == "registered");
    Ok(())
}

/// Processes that work in the registry.
pub fn monitors_in(rig: &Rig) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        // Some processes end meanwhile; other entries are not processes.
        if let Ok(directory) = fs::read_link(entry?.path().join("cwd")) {
            count += usize::from(directory.starts_with(rig.file("r")));
        }
    }
    Ok(count)
}

#[test]
fn a_registry_that_cannot_be_written_says_so() -> Result<()> {
    let rig = Rig::new("read-only")?;
    rig.config("vm.json", "hello", "halt")?;
    // A file in place of a directory stops every user, even root.
    fs::create_dir_all(rig.file("r"))?;
    fs::write(rig.file("r/state"), "in the way")?;
    let (what, _) = rig.refused(&["new", "vm.json"])?;
    ensure!(what.contains("r/state"), "{what}");
    rig.refused(&["list"])?;
    fs::remove_file(rig.file("r/state"))?;
    rig.ok(&["new", "vm.json"])?;
    let mode = fs::metadata(rig.file("r/state/vm"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "others may look in: {mode:o}");
    Ok(())
}

/// A function for scripts in [`in_a_namespace`]: `refused WORDS VERB..` checks that the verb is
/// refused with these words.
const SHELL: &str = r#"
    refused() {
        words=$1
        shift
        if "$ctl" "$@" 2>said; then exit 1; fi
        grep -q "$words" said || { cat said; exit 1; }
        grep -q r/ said || { cat said; exit 1; }
    }
"#;

/// Runs `script` with a shell in a new mount namespace, where `$ctl` is `stratoctl`.
fn in_a_namespace(rig: &Rig, script: &str) -> Result<()> {
    let ctl = rig.command(&[]);
    let mut command = Command::new("unshare");
    let root = fs::metadata("/proc/self")?.uid() == 0;
    command.arg(if root { "-m" } else { "-rm" }).args([
        "--",
        "sh",
        "-exc",
        &[SHELL, script].concat(),
    ]);
    command.envs(ctl.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.env("ctl", ctl.get_program()).current_dir(&rig.dir);
    let out = command.output().context("cannot run unshare")?;
    let said = [out.stdout, out.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    ensure!(out.status.success(), "{}: {}", out.status, said.concat());
    Ok(())
}

#[test]
fn a_full_disk_is_reported_and_costs_nothing() -> Result<()> {
    let rig = Rig::new("full")?;
    rig.config("vm.json", "hello", "halt")?;
    in_a_namespace(
        &rig,
        r#"
        mkdir -p r
        mount -t tmpfs -o size=256k full r
        $ctl new vm.json --name a
        if cat /dev/zero >r/ballast; then exit 1; fi
        refused 'No space left' new vm.json --name b
        refused 'No space left' create vm.json --name b
        refused 'No space left' start a
        test "$($ctl list | grep -c .)" = 2
        $ctl list | grep -q '^a .*registered'
        $ctl rename a c
        rm r/ballast
        $ctl rename c a
        $ctl new vm.json --name b
        $ctl delete b
        $ctl delete a
        test "$($ctl list | grep -c .)" = 1
        "#,
    )
}

#[test]
fn a_registry_that_is_read_only_can_be_looked_at() -> Result<()> {
    let rig = Rig::new("mounted-ro")?;
    rig.config("vm.json", "hello", "halt")?;
    rig.ok(&["new", "vm.json", "--name", "a"])?;
    rig.ok(&["create", "vm.json", "--name", "b"])?;
    in_a_namespace(
        &rig,
        r#"
        mount --bind r r
        mount -o remount,ro,bind r
        $ctl list | grep -q '^a .*registered'
        $ctl list | grep -q '^b .*running'
        $ctl info a b >/dev/null
        $ctl qmp b query-status | grep -q running
        for verb in "new vm.json" "start a" "pause b" "destroy b" "rename a c" "delete a"; do
            refused 'Read-only file system' $verb
        done
        "#,
    )?;
    ensure!(rig.state("a")? == "registered" && rig.state("b")? == "running");
    Ok(())
}

#[test]
fn a_socket_is_taken_over_from_the_dead_and_not_from_the_living() -> Result<()> {
    let rig = Rig::new("sockets")?;
    let path = rig.config("vm.json", "hello", "halt")?;
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let console = json!([{ "console_id": "c", "socket_path": rig.file("c.sock") }]);
    config.as_object_mut().context("no object")?.insert("console".into(), console);
    fs::write(&path, config.to_string())?;
    rig.ok(&["create", "vm.json", "--name", "a"])?;
    let (what, _) = rig.refused(&["create", "vm.json", "--name", "b"])?;
    ensure!(what.contains("c.sock"), "{what}");
    ensure!(rig.state("a")? == "running" && rig.state("b")? == "absent");
    rig.kill("a")?;
    ensure!(rig.file("c.sock").exists() && rig.state("a")? == "killed");
    rig.ok(&["create", "vm.json", "--name", "b"])?;
    // The same holds for the domain's own sockets.
    rig.ok(&["new", "vm.json", "--name", "c"])?;
    rig.ok(&["destroy", "b"])?;
    rig.ok(&["start", "c"])?;
    rig.kill("c")?;
    ensure!(rig.file("r/state/c/run/qmp.sock").exists());
    rig.ok(&["start", "c"])?;
    ensure!(rig.state("c")? == "running");
    Ok(())
}

#[test]
fn a_clock_that_has_jumped_back_changes_nothing() -> Result<()> {
    let rig = Rig::new("clock")?;
    rig.config("vm.json", "count", "plain 1")?;
    // Everything that was written before the jump seems to come from the future.
    let jump = || -> Result<()> {
        let find = ["r", "kept", "-exec", "touch", "-hd", "2100-01-01", "{}", "+"];
        ensure!(Command::new("find").args(find).current_dir(&rig.dir).status()?.success());
        Ok(())
    };
    fs::create_dir_all(rig.file("kept"))?;
    rig.ok(&["new", "vm.json"])?;
    rig.ok(&["start", "vm"])?;
    for _ in 0..2 {
        jump()?;
        let row = rig.listed("vm")?.context("not listed")?;
        let uptime = row.get("uptime").and_then(Value::as_f64).context("no uptime")?;
        ensure!(row.get("state") == Some(&json!("running")) && uptime < 3600.0, "{row}");
        rig.ok(&["save", "vm", "kept", "-c"])?;
        rig.ok(&["suspend", "vm"])?;
        jump()?;
        ensure!(rig.state("vm")? == "suspended");
        rig.ok(&["check", "kept"])?;
        rig.ok(&["restore", "kept", "--name", "other"])?;
        rig.ok(&["destroy", "other"])?;
        rig.ok(&["resume", "vm"])?;
    }
    rig.kill("vm")?;
    jump()?;
    ensure!(rig.state("vm")? == "killed");
    rig.ok(&["start", "vm"])?;
    Ok(())
}
