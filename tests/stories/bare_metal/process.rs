//! The process: its messages when it cannot start, and `-daemonize`.
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::SOON;

use crate::stage::{Stage, exists, simple, status};

/// Runs the monitor to its end.
fn run(stage: &Stage, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(&stage.paths.stratovirt);
    command.args(args).stdin(Stdio::null()).current_dir(&stage.dir);
    command.output().context("cannot run the monitor")
}

/// Started with `args`, the monitor exits with status 1 and prints all of `says`, on standard error
/// only.
fn refuses(stage: &Stage, args: &[&str], says: &[&str]) -> Result<()> {
    let out = run(stage, args)?;
    let text = String::from_utf8(out.stderr)?;
    ensure!(out.status.code() == Some(1), "{args:?} ended with {}: {text}", out.status);
    ensure!(!text.contains("panicked") && out.stdout.is_empty(), "{args:?}: {text}");
    for words in says {
        ensure!(text.contains(words), "{args:?} does not say '{words}': {text}");
    }
    ensure!(!exists(&stage.socket()), "{args:?} leaves a socket behind");
    Ok(())
}

/// A configuration with one table replaced or added.
fn written(stage: &Stage, key: &str, value: Value) -> Result<()> {
    let mut config = stage.config("hello", "halt")?;
    config.as_object_mut().context("no object")?.insert(key.to_owned(), value);
    Ok(fs::write(stage.file("vm.json"), config.to_string())?)
}

const START: [&str; 4] = ["-config", "vm.json", "-api-channel", "unix:qmp.sock"];

#[test]
fn help_and_version() -> Result<()> {
    let stage = Stage::new("help")?;
    for word in ["-h", "-help"] {
        let out = run(&stage, &[word])?;
        let text = String::from_utf8(out.stdout)?;
        ensure!(out.status.success() && out.stderr.is_empty());
        for flag in ["-config", "-api-channel", "-qmp", "-kernel", "-daemonize", "-pidfile"] {
            ensure!(text.contains(flag), "the help does not mention {flag}");
        }
    }
    for word in ["-V", "-version"] {
        let out = run(&stage, &[word])?;
        ensure!(out.status.success() && String::from_utf8(out.stdout)?.starts_with("StratoVirt "));
    }
    Ok(())
}

#[test]
fn kernels_that_are_none() -> Result<()> {
    let stage = Stage::new("kernels")?;
    let elf = fs::read(stage.kernel("hello")?)?;
    let cut = elf.get(..elf.len() / 2).context("a short guest")?.to_owned();
    let mut foreign = elf.clone();
    *foreign.get_mut(18).context("a short guest")? = 183;
    let script = b"#!/bin/sh\nexit 0\n".to_vec();
    let files: [(&str, Vec<u8>, &[&str]); 5] = [
        ("empty", vec![], &["it is"]),
        ("byte", vec![0x7f], &["it is"]),
        ("script", script, &["it is"]),
        ("cut", cut, &["truncated ELF"]),
        ("foreign", foreign, &["aarch64"]),
    ];
    for (name, contents, says) in files {
        fs::write(stage.file(name), contents)?;
        written(&stage, "boot-source", json!({ "kernel_image_path": name }))?;
        let mut says = says.to_vec();
        says.push(name);
        refuses(&stage, &START, &says)?;
    }
    for name in ["missing", ".", "/dev/zero"] {
        written(&stage, "boot-source", json!({ "kernel_image_path": name }))?;
        refuses(&stage, &START, &[name])?;
    }
    Ok(())
}

#[test]
fn all_errors_of_a_file_come_at_once() -> Result<()> {
    let stage = Stage::new("errors")?;
    let config = json!({
        "boot-source": { "kernel_image_path": "k", "kernel": "k" },
        "machine-config": { "vcpu_count": 255, "mem_size": 1 },
        "drive": [{ "drive_id": "a", "path_on_host": "b", "read_only": "maybe", "direct": true }],
        "serials": {},
    });
    fs::write(stage.file("vm.json"), config.to_string())?;
    refuses(
        &stage,
        &START,
        &[
            "vm.json",
            "boot-source",
            "kernel",
            "vcpu_count",
            "255",
            "254",
            "mem_size",
            "read_only",
            "maybe",
            "serials",
        ],
    )?;
    for (text, says) in [("", "vm.json"), ("{", "vm.json"), ("[]", "vm.json"), ("\u{0}", "vm.json")]
    {
        fs::write(stage.file("vm.json"), text)?;
        refuses(&stage, &START, &[says])?;
    }
    fs::remove_file(stage.file("vm.json"))?;
    refuses(&stage, &START, &["vm.json", "No such file"])?;
    refuses(&stage, &["--config", "vm.json"], &["--config"])?;
    refuses(&stage, &["-smp", "1", "-smp", "2"], &["smp"])?;
    refuses(&stage, &["-kernel", "k"], &["api-channel", "qmp"])
}

/// The monitor refuses to start, with one line for each of `expected`: the line begins with the
/// place and contains the words. No files are left behind.
fn refuses_all(stage: &Stage, args: &[&str], expected: &[(&str, &[&str])]) -> Result<()> {
    let before = names(&stage.dir)?;
    let out = run(stage, args)?;
    let text = String::from_utf8(out.stderr)?;
    ensure!(out.status.code() == Some(1) && out.stdout.is_empty(), "{}: {text}", out.status);
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == expected.len(), "not {} lines: {text}", expected.len());
    for (line, (place, words)) in lines.iter().zip(expected) {
        ensure!(line.starts_with(&format!("{place}: ")), "not of {place}: {line}");
        for word in *words {
            ensure!(line.contains(word), "'{word}' is missing: {line}");
        }
    }
    let after = names(&stage.dir)?;
    ensure!(after == before, "left behind: {after:?}, before: {before:?}");
    Ok(())
}

fn names(dir: &Path) -> Result<BTreeSet<OsString>> {
    Ok(fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?)
}

#[test]
fn all_that_a_file_names_and_that_cannot_be_had_comes_at_once() -> Result<()> {
    let stage = Stage::new("nothing_there")?;
    fs::write(stage.file("notes"), "not to be lost")?;
    let disk = |id: &str, path: &str| json!({ "drive_id": id, "path_on_host": path, "read_only": false, "direct": false });
    let config = json!({
        "boot-source": { "kernel_image_path": "no-kernel", "initrd_fs_path": "no-initrd" },
        "machine-config": { "mem_path": "notes" },
        "drive": [disk("root", "no-image"), disk("data", ".")],
        "net": [{ "iface_id": "net0", "host_dev_name": "no-tap" }],
        "console": [{ "console_id": "con0", "socket_path": "notes" }],
        "rng": { "random_file": "no-rng" },
    });
    fs::write(stage.file("vm.json"), config.to_string())?;
    let tap: &[&str] = &["no-tap", "ip tuntap add dev no-tap mode tap vnet_hdr && ip link set"];
    let devices: [(&str, &[&str]); 5] = [
        ("vm.json: drive[0].path_on_host", &["root", "no-image", "truncate -s 1G no-image"]),
        ("vm.json: drive[1].path_on_host", &["data", ". is a directory", "regular file"]),
        ("vm.json: net[0].host_dev_name", tap),
        ("vm.json: console[0].socket_path", &["con0", "notes", "rm notes"]),
        ("vm.json: rng.random_file", &["no-rng", "/dev/urandom"]),
    ];
    let boot: [(&str, &[&str]); 3] = [
        ("vm.json: boot-source.kernel_image_path", &["no-kernel", "No such file"]),
        ("vm.json: boot-source.initrd_fs_path", &["no-initrd", "No such file"]),
        ("vm.json: machine-config.mem_path", &["notes is not empty", "rm notes"]),
    ];
    refuses_all(&stage, &START, &[&boot[..], &devices].concat())?;
    ensure!(fs::read(stage.file("notes"))? == b"not to be lost");

    // Errors in values that flags replace name the flags. Memory and the serial port were available
    // and are released.
    let kernel = stage.kernel("hello")?;
    let flags = ["-kernel", kernel.to_str().context("no text")?, "-initrd", "vm\n.json"];
    let flags = [&flags[..], &["-mem-path", "ram", "-serial", "socket,path=serial,server,nowait"]];
    let boot: [(&str, &[&str]); 1] = [("-initrd", &["cannot load the initrd vm\\n.json"])];
    let all = [&START[..], &flags.concat()].concat();
    refuses_all(&stage, &all, &[&boot[..], &devices].concat())
}

#[test]
fn files_that_the_monitor_makes_go_again_when_there_is_no_machine() -> Result<()> {
    let stage = Stage::new("made")?;
    fs::write(stage.file("old"), "")?;
    for made in ["new", "old"] {
        let serial = format!("file,path={made}");
        let socket = ["-chardev", "id=c,path=console", "-qmp", "unix:qmp.sock,server,nowait"];
        let args = [&["-kernel", "none", "-mem-path", "ram", "-serial", &serial], &socket[..]];
        refuses_all(&stage, &args.concat(), &[("-kernel", &["none", "No such file"])])?;
    }
    let log = ["-D", ".", "-kernel", "k", "-api-channel", "unix:qmp.sock"];
    refuses_all(&stage, &log, &[("stratovirt", &["-D", "cannot log to .", "directory"])])
}

#[test]
fn a_broken_kvm_is_reported_together_with_errors_of_the_file() -> Result<()> {
    let mut stage = Stage::new("no_kvm")?;
    stage.prepare("-m", "mount --bind /dev/null /dev/kvm")?;
    written(&stage, "boot-source", json!({ "kernel_image_path": "no-kernel" }))?;
    let kvm: &[&str] = &["/dev/kvm", "is not KVM", "mknod /dev/kvm c 10 232"];
    let kernel: &[&str] = &["no-kernel", "No such file"];
    let all = [("stratovirt", kvm), ("vm.json: boot-source.kernel_image_path", kernel)];
    refuses_all(&stage, &START, &all)
}

#[test]
fn what_cannot_be_had_is_named() -> Result<()> {
    let stage = Stage::new("wants")?;
    let disk = |path: &str| json!([{ "drive_id": "vda", "path_on_host": path, "read_only": false, "direct": false }]);
    written(&stage, "drive", disk("no-such-image"))?;
    refuses(&stage, &START, &["vda", "no-such-image"])?;
    written(&stage, "drive", disk("/dev/null"))?;
    refuses(&stage, &START, &["vda", "/dev/null"])?;
    written(&stage, "net", json!([{ "iface_id": "net0", "host_dev_name": "no-such-tap" }]))?;
    refuses(&stage, &START, &["net0", "ip tuntap add", "no-such-tap"])?;
    written(&stage, "machine-config", json!({ "mem_size": 512_u64 << 30 }))?;
    refuses(&stage, &START, &["-m"])
}

#[test]
fn in_the_background() -> Result<()> {
    let stage = Stage::new("daemon")?;
    let mut config = stage.config("count", "registers 1")?;
    config.as_object_mut().context("no object")?.remove("serial");
    fs::write(stage.file("vm.json"), config.to_string())?;
    let background = [&START[..], &["-daemonize", "-pidfile", "pid"]].concat();
    let began = Instant::now();
    let out = run(&stage, &background)?;
    ensure!(out.status.code() == Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    // At once, without retries: the first process exits when the second one answers.
    let mut qmp = Client::connect(&stage.socket(), SOON)?;
    ensure!(status(&mut qmp)? == "running");

    let text = fs::read_to_string(stage.file("pid"))?;
    let process: u32 = text.parse().with_context(|| format!("the pid file holds '{text}'"))?;
    let mode = fs::metadata(stage.file("pid"))?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the pid file's mode is {mode:o}");
    let cmdline = fs::read_to_string(format!("/proc/{process}/cmdline"))?;
    ensure!(cmdline.contains("stratovirt"), "process {process} is {cmdline}");
    let cpus = qmp.execute_raw("query-cpus", json!({}))?;
    let vcpu = cpus.pointer("/0/thread_id").context("no thread")?;
    ensure!(exists(Path::new(&format!("/proc/{process}/task/{vcpu}"))));
    for descriptor in 0..3 {
        let to = fs::read_link(format!("/proc/{process}/fd/{descriptor}"))?;
        ensure!(to == Path::new("/dev/null"), "descriptor {descriptor} is still {}", to.display());
    }
    // A second one with the same pid file is refused and does not disturb the first.
    let mut second = background.clone();
    if let Some(socket) = second.get_mut(3) {
        *socket = "unix:other.sock";
    }
    let refused = run(&stage, &second)?;
    ensure!(refused.status.code() == Some(1));
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("pid"));
    ensure!(fs::read_to_string(stage.file("pid"))? == text);

    simple(&mut qmp, "quit")?;
    ensure!(qmp.wait_event("SHUTDOWN", SOON)?.data.get("reason") == Some(&json!("host-qmp-quit")));
    while exists(Path::new(&format!("/proc/{process}/exe"))) && began.elapsed() < SOON * 2 {
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(!exists(&stage.file("pid")) && !exists(&stage.socket()), "files are left behind");
    Ok(())
}

#[test]
fn what_fails_in_the_background_is_reported_in_the_foreground() -> Result<()> {
    let stage = Stage::new("no_daemon")?;
    let mut config = stage.config("hello", "halt")?;
    config.as_object_mut().context("no object")?.remove("serial");
    fs::write(stage.file("vm.json"), config.to_string())?;
    fs::remove_file(stage.file("hello"))?;
    let background = [&START[..], &["-daemonize", "-pidfile", "pid"]].concat();
    refuses(&stage, &background, &["cannot boot the kernel", "No such file"])?;
    ensure!(!exists(&stage.file("pid")), "the pid file is left behind");

    fs::write(stage.file("vm.json"), stage.config("hello", "halt")?.to_string())?;
    refuses(&stage, &background, &["daemonize", "stdio"])
}

#[test]
fn a_configuration_from_a_pipe_in_the_background() -> Result<()> {
    let stage = Stage::new("daemon_pipe")?;
    let mut config = stage.config("count", "registers 1")?;
    config.as_object_mut().context("no object")?.remove("serial");
    let mut child = Command::new(&stage.paths.stratovirt)
        .args(["-config", "/dev/stdin", "-api-channel", "unix:qmp.sock", "-daemonize"])
        .current_dir(&stage.dir)
        .stdin(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no input")?.write_all(config.to_string().as_bytes())?;
    let status_of_starter = child.wait()?;
    ensure!(status_of_starter.success(), "it ended with {status_of_starter}");
    let mut qmp = Client::connect(&stage.socket(), SOON)?;
    ensure!(status(&mut qmp)? == "running");
    simple(&mut qmp, "quit")
}

#[test]
fn no_client_that_reads_a_refusal() -> Result<()> {
    let stage = Stage::new("unheard")?;
    fs::write(stage.file("vm.json"), stage.config("hello", "halt")?.to_string())?;
    fs::remove_file(stage.file("hello"))?;
    for args in [&["-bogus"][..], &START] {
        let mut command = Command::new(&stage.paths.stratovirt);
        command.args(args).current_dir(&stage.dir).stdin(Stdio::null());
        let full = fs::File::options().write(true).open("/dev/full")?;
        let status = command.stderr(full).status()?;
        ensure!(status.code() == Some(1), "{args:?} ended with {status}");
    }
    Ok(())
}
