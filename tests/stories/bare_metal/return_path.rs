//! A machine migrates with a return path: whichever process is killed, and whenever, the machine
//! runs in exactly one of them.
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::stage::{Stage, quits, simple, status};
use crate::stream::until_it_listens_by;

/// Numbers of frames, as they are on the wire.
const CONFIG: u32 = 1;
const END: u32 = 4;
const PAGES: u32 = 5;
const HELLO: u32 = 8;
const ACCEPT: u32 = 9;
const READY: u32 = 11;
const GO: u32 = 12;
const RUNNING: u32 = 13;

/// A machine with a disk, and in a network namespace of its own with a tap.
pub fn source(story: &str) -> Result<(Stage, Monitor, Client)> {
    let mut stage = Stage::new(story)?;
    stage.prepare("-n", "ip tuntap add dev t0 mode tap vnet_hdr\nip link set t0 up")?;
    let image = stage.file("image");
    File::create(&image)?.set_len(1 << 20)?;
    let drive = format!("id=d,file={},direct=off", image.display());
    let vm = stage.vm("count", "rings 1")?;
    let vm = vm.args(&[
        "-drive",
        &drive,
        "-netdev",
        "tap,id=n,ifname=t0",
        "-device",
        "virtio-net-device,netdev=n,id=nic",
    ]);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    Ok((stage, monitor, qmp))
}

/// A process in the namespace of `pid` that waits for a machine, and its socket.
fn receiver(story: &str, pid: u32) -> Result<(Stage, Monitor, String)> {
    let mut stage = Stage::new(story)?;
    stage.run_by(&format!("nsenter -t {pid} -n"))?;
    let socket = stage.file("in");
    let uri = format!("unix:{}", socket.display());
    let args = ["-incoming", &uri];
    let monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
    until_it_listens_in(&monitor, &socket)?;
    Ok((stage, monitor, uri))
}

/// Waits until `monitor`, which sees the sockets of its network namespace, listens at `socket`.
pub fn until_it_listens_in(monitor: &Monitor, socket: &Path) -> Result<()> {
    until_it_listens_by(&format!("/proc/{}/net/unix", monitor.pid()), socket)
}

#[test]
fn a_machine_with_a_disk_and_a_tap_moves_inside_one_host() -> Result<()> {
    let (first, mut monitor, mut qmp) = source("return")?;
    // Its namespace lives as long as a process in it, so each receiver enters it by the source.
    let (stage, mut there, uri) = receiver("return1", monitor.pid())?;
    let capabilities = qmp.execute_raw("query-migrate-capabilities", json!({}))?;
    let on = json!([{ "capability": "return-path", "state": true }]);
    ensure!(capabilities == on, "{capabilities}");
    simple_migrate(&mut qmp, &uri)?;
    ensure!(status(&mut qmp)? == "postmigrate");
    let mut other = there.qmp()?;
    ensure!(status(&mut other)? == "running");
    // The receiver holds both: this monitor says so, and stays.
    let said = qmp.execute_raw("cont", json!({})).err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(said.contains("in use by another"), "{said}");
    ensure!(status(&mut qmp)? == "postmigrate");
    ensure!(!there.unseen().contains("WRONG"), "{}", there.unseen());
    simple(&mut other, "quit")?;
    other.wait_closed(SOON)?;
    ensure!(there.wait_exit()?.code() == Some(0));
    simple(&mut qmp, "cont")?;
    ensure!(status(&mut qmp)? == "running");
    // A receiver that cannot run the machine returns it, before a page is sent or at the last
    // moment.
    drop(stage);
    for (story, args, says) in [
        ("return2", vec!["-m", "64M"], "leave -m out"),
        ("return3", vec!["-netdev", "tap,id=nic,ifname=t9"], "t9"),
    ] {
        let mut stage = Stage::new(story)?;
        stage.run_by(&format!("nsenter -t {} -n", monitor.pid()))?;
        let uri = format!("unix:{}", stage.file("in").display());
        let args = [vec!["-incoming", &uri], args].concat();
        let mut there = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        until_it_listens_in(&there, &stage.file("in"))?;
        let said = qmp.execute_raw("migrate", json!({ "uri": uri })).err().map(|e| e.to_string());
        let said = said.context("it was taken")?;
        ensure!(said.contains("refused the machine") && said.contains(says), "{said}");
        ensure!(status(&mut qmp)? == "running");
        ensure!(there.wait_exit()?.code() == Some(1));
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&first, &mut monitor, &mut qmp)
}

fn simple_migrate(qmp: &mut Client, uri: &str) -> Result<()> {
    let returned = qmp.execute_raw("migrate", json!({ "uri": uri }))?;
    ensure!(returned == json!({}), "{returned}");
    Ok(())
}

#[test]
fn a_receiver_that_does_not_answer_is_reported() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("mute")?;
    let path = stage.file("mute");
    let listener = UnixListener::bind(&path)?;
    let uri = json!({ "uri": format!("unix:{}", path.display()) });
    let said = qmp.execute_raw("migrate", uri).err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(said.contains("does not answer") && said.contains("return-path off"), "{said}");
    ensure!(status(&mut qmp)? == "running");
    drop(listener);
    quits(&stage, &mut monitor, &mut qmp)
}

/// Passes frames on until one of the kind `last` arrives, which it passes on or drops.
fn pass(mut from: UnixStream, mut to: UnixStream, last: u32, passed: bool) -> io::Result<bool> {
    let mut header = [0; 16];
    if from.read_exact(&mut header).is_err() {
        return Ok(false);
    }
    to.write_all(&header)?;
    loop {
        let mut head = [0; 8];
        if from.read_exact(&mut head).is_err() {
            return Ok(false);
        }
        let [kind, length] = [&head[..4], &head[4..]]
            .map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default()));
        let mut rest = vec![0; length as usize + 4];
        from.read_exact(&mut rest)?;
        if kind != last || passed {
            to.write_all(&head)?;
            to.write_all(&rest)?;
        }
        if kind == last {
            return Ok(true);
        }
    }
}

/// Which process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dies {
    Source,
    Receiver,
}

/// A migration in which one process is killed at the frame `kind`, before or after it arrives.
fn killed(story: &str, dies: Dies, kind: u32, arrives: bool) -> Result<()> {
    let (stage, mut here, mut qmp) = source(story)?;
    // The namespace has to outlive the source.
    let (there_stage, mut there, uri) = receiver(&format!("{story}t"), here.pid())?;
    let between = stage.file("between");
    let listener = UnixListener::bind(&between)?;
    let mut caller = Client::connect(&stage.socket(), SOON)?;
    let arguments = json!({ "uri": format!("unix:{}", between.display()) });
    let migrating = thread::spawn(move || {
        caller.execute_raw("migrate", arguments).err().map(|e| e.to_string())
    });
    let (near, _) = listener.accept()?;
    let far = UnixStream::connect(Path::new(uri.strip_prefix("unix:").unwrap_or_default()))?;
    let by_source = matches!(kind, HELLO | CONFIG | PAGES | END | GO);
    let ways = [(near.try_clone()?, far.try_clone()?, by_source), (far, near, !by_source)];
    let [one, other] = ways.map(|(from, to, this)| {
        let ends = [from.try_clone(), to.try_clone()];
        let last = if this { kind } else { 0 };
        let passes = thread::spawn(move || pass(from, to, last, arrives));
        (passes, ends)
    });
    let came = one.0;
    let (speaks, listens) = if by_source { (came, other.0) } else { (other.0, came) };
    let found = speaks.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))??;
    ensure!(found, "no such frame came");
    let pid = if dies == Dies::Source { here.pid() } else { there.pid() };
    if arrives && kind == GO && dies == Dies::Source {
        // The machine is about to run there.
        let mut qmp = there.qmp()?;
        ensure!(status(&mut qmp)? == "running");
    }
    ensure!(Command::new("kill").args(["-9", &pid.to_string()]).status()?.success());
    for end in one.1.into_iter().chain(other.1) {
        let _ = end?.shutdown(std::net::Shutdown::Both);
    }
    let _ = listens.join();

    match dies {
        Dies::Source => {
            here.wait_exit()?;
            // If it was sent `Go`, it has the machine; else it never had it, and ends.
            let has_it = (kind == GO && arrives) || kind == RUNNING;
            // `Ready` may have been answered by `Go` before the source was dead.
            let either = kind == READY && arrives;
            let running = if has_it || either { there.qmp().and_then(runs) } else { Ok(None) };
            if let Some(mut qmp) = if either { running.unwrap_or(None) } else { running? } {
                ensure!(!there.unseen().contains("WRONG"), "{}", there.unseen());
                quits(&there_stage, &mut there, &mut qmp)?;
            } else {
                ensure!(!has_it, "the machine is nowhere");
                let code = there.wait_exit()?.code();
                ensure!(code == Some(1), "it ended with {code:?}");
            }
            let _ = migrating.join();
        }
        Dies::Receiver => {
            there.wait_exit()?;
            let said = migrating.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))?;
            // `Go` may have been answered by `Running` before the receiver was dead.
            if arrives && (kind == RUNNING || (kind == GO && said.is_none())) {
                ensure!(said.is_none(), "{said:?}");
                ensure!(status(&mut qmp)? == "postmigrate");
                // `End` may have been answered by `Ready`, and that by `Go`, before the receiver
                // was dead.
            } else if matches!(kind, GO | RUNNING)
                || (matches!(kind, END | READY) && arrives && status(&mut qmp)? == "postmigrate")
            {
                // It may have run there: a user who knows that it no longer does resumes it here.
                let said = said.context("it has got an outcome that was not reported")?;
                ensure!(
                    said.contains("outcome unknown") && said.contains("cont resumes"),
                    "{said}"
                );
                ensure!(status(&mut qmp)? == "postmigrate");
                let info = qmp.execute_raw("query-migrate", json!({}))?;
                let why = info.get("error-desc").and_then(Value::as_str).unwrap_or_default();
                ensure!(why.contains("outcome unknown"), "{info}");
            } else {
                ensure!(said.is_some(), "it was taken by a process that was killed");
                ensure!(status(&mut qmp)? == "running");
            }
            if status(&mut qmp)? == "postmigrate" {
                simple(&mut qmp, "cont")?;
            }
            ensure!(status(&mut qmp)? == "running");
            ensure!(!here.unseen().contains("WRONG"), "{}", here.unseen());
            quits(&stage, &mut here, &mut qmp)?;
        }
    }
    Ok(())
}

/// The client, if its machine runs.
fn runs(mut qmp: Client) -> Result<Option<Client>> {
    let running = status(&mut qmp)? == "running";
    Ok(running.then_some(qmp))
}

/// Every message, before and after it arrives, each several times.
fn whichever_side_is_killed(dies: Dies, times: usize) -> Result<()> {
    for time in 0..times {
        for kind in [HELLO, CONFIG, PAGES, END, GO, ACCEPT, READY, RUNNING] {
            for arrives in [false, true] {
                let story =
                    format!("kill{}{kind}{}", u8::from(dies == Dies::Source), u8::from(arrives));
                killed(&story, dies, kind, arrives).with_context(|| {
                    format!(
                        "{dies:?} is killed at frame {kind}, which arrives: {arrives} (time {time})"
                    )
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_receiver_killed_at_any_message_leaves_the_machine_to_its_source() -> Result<()> {
    whichever_side_is_killed(Dies::Receiver, 2)
}

#[test]
fn a_source_killed_at_any_message_leaves_one_machine_or_a_reported_loss() -> Result<()> {
    whichever_side_is_killed(Dies::Source, 2)
}
