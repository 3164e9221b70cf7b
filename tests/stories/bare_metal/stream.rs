//! A machine is sent to another process over a socket, a pipe or a file, and resumes there; or it
//! stays where it is, because the peer has ended, sends garbage or does not read.
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use qmp::client::Client;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};

use crate::snapshot::{counters, save};
use crate::stage::{Stage, cont, exists, quits, simple, status};

/// A process with a machine in it.
struct Here {
    stage: Stage,
    monitor: Monitor,
    qmp: Client,
}

impl Here {
    /// Two processors that write through rings of pages, in `mib` MiB of memory.
    fn start(story: &str, word: &str, mib: u64) -> Result<Self> {
        let stage = Stage::new(story)?;
        let vm = stage.vm("count", &format!("{word} 2"))?;
        let vm = vm.machine("vcpu_count", 2).machine("mem_size", mib << 20);
        let (mut monitor, qmp) = stage.start(vm)?;
        monitor.wait_for("processors 2", SOON)?;
        Ok(Self { stage, monitor, qmp })
    }

    fn migrate(&mut self, uri: &str, more: &Value) -> Result<Value> {
        let returned = self.qmp.execute_raw("migrate", with(json!({ "uri": uri }), more))?;
        ensure!(returned == json!({}), "{returned}");
        let info = self.qmp.execute_raw("query-migrate", json!({}))?;
        ensure!(info.get("status") == Some(&json!("completed")), "{info}");
        Ok(info)
    }

    /// Lets it run for a while, and checks that it runs and finds in memory what it wrote.
    fn runs_on(&mut self) -> Result<Vec<u64>> {
        let (one, other) = (self.stage.file("one"), self.stage.file("other"));
        save(&mut self.qmp, &one, true)?;
        let deadline = Instant::now() + SOON;
        loop {
            save(&mut self.qmp, &other, true)?;
            let (before, now) = (counters(&one, 2)?, counters(&other, 2)?);
            self.all_is_well()?;
            // Every page of the rings has been visited.
            if now.iter().zip(&before).all(|(now, before)| *now > before + 300) {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "counters go from {before:?} to {now:?}");
        }
    }

    fn all_is_well(&self) -> Result<()> {
        let shown = self.monitor.unseen();
        ensure!(!shown.contains("WRONG"), "{shown}");
        Ok(())
    }

    fn quits(mut self) -> Result<()> {
        self.all_is_well()?;
        quits(&self.stage, &mut self.monitor, &mut self.qmp)
    }
}

fn with(mut arguments: Value, more: &Value) -> Value {
    if let (Some(to), Some(from)) = (arguments.as_object_mut(), more.as_object()) {
        to.extend(from.clone());
    }
    arguments
}

/// Waits until a process listens at `socket`. Its name exists a moment before that; a flag in
/// /proc/net/unix shows when it listens.
pub fn until_it_listens(socket: &Path) -> Result<()> {
    until_it_listens_by("/proc/net/unix", socket)
}

/// As [`until_it_listens`], with the sockets listed in `table`.
pub fn until_it_listens_by(table: &str, socket: &Path) -> Result<()> {
    let deadline = Instant::now() + SOON;
    let ends = format!(" {}", socket.display());
    let listens = |line: &str| line.ends_with(&ends) && line.contains(" 00010000 ");
    while !fs::read_to_string(table)?.lines().any(listens) {
        ensure!(Instant::now() < deadline, "no process listens at {}", socket.display());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A process that waits for a machine.
struct There {
    stage: Stage,
    monitor: Monitor,
}

impl There {
    fn start(story: &str, incoming: &str, args: &[&str]) -> Result<Self> {
        let stage = Stage::new(story)?;
        let args = [&["-S", "-incoming", incoming], args].concat();
        let monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        Ok(Self { stage, monitor })
    }

    /// It listens at a socket, which exists already.
    fn listen(story: &str) -> Result<(Self, String)> {
        let stage = Stage::new(story)?;
        let socket = stage.file("in");
        let uri = format!("unix:{}", socket.display());
        let args = ["-S", "-incoming", &uri];
        let monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        until_it_listens(&socket)?;
        Ok((Self { stage, monitor }, uri))
    }

    /// It has received the machine, and resumes it.
    fn resumes(mut self) -> Result<Here> {
        let mut qmp = self.monitor.qmp()?;
        ensure!(!exists(&self.stage.file("in")), "its socket is left behind");
        ensure!(status(&mut qmp)? == "paused");
        cont(&mut qmp)?;
        Ok(Here { stage: self.stage, monitor: self.monitor, qmp })
    }

    /// It exits without having started anything; returns its messages.
    fn gives_up(mut self) -> Result<String> {
        let status = self.monitor.wait_exit()?;
        ensure!(status.code() == Some(1), "it ended with {status}");
        ensure!(!exists(&self.stage.socket()) && !exists(&self.stage.file("in")));
        self.monitor.said_to_its_end()
    }
}

/// Sent from process to process while it runs, and never notices.
fn moves(story: &str, word: &str, mib: u64) -> Result<()> {
    let mut here = Here::start(story, word, mib)?;
    let mut before = vec![0; 2];
    for n in 0..3 {
        let (there, uri) = There::listen(&format!("{story}{n}"))?;
        let info = here.migrate(&uri, &json!({}))?;
        ensure!(status(&mut here.qmp)? == "postmigrate", "{info}");
        let next = there.resumes()?;
        here.quits()?;
        here = next;
        let now = here.runs_on()?;
        ensure!(now.iter().zip(&before).all(|(now, before)| now > before), "{now:?}");
        before = now;
    }
    here.quits()
}

#[test]
fn a_running_machine_moves_three_times() -> Result<()> {
    moves("moves", "rings", 64)
}

#[test]
fn a_running_machine_moves_with_memory_above_four_gibibytes() -> Result<()> {
    moves("moves-far", "far", 4608)
}

#[test]
fn a_stopped_machine_moves_and_resumes_where_its_disk_is_free() -> Result<()> {
    let stage = Stage::new("moves-disk")?;
    let image = stage.file("image");
    File::create(&image)?.set_len(1 << 20)?;
    let drive = format!("id=d,file={},direct=off", image.display());
    let vm = stage.vm("count", "rings 1")?.args(&["-drive", &drive]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    simple(&mut qmp, "stop")?;
    let mut here = Here { stage, monitor, qmp };
    let (there, uri) = There::listen("moves-disk1")?;
    here.migrate(&uri, &json!({}))?;
    ensure!(status(&mut here.qmp)? == "postmigrate");
    let there = there.resumes()?;
    let refused = here.qmp.execute_raw("cont", json!({})).err().map(|e| e.to_string());
    ensure!(refused.as_ref().is_some_and(|e| e.contains("in use by another")), "{refused:?}");
    ensure!(status(&mut here.qmp)? == "postmigrate");
    there.quits()?;
    cont(&mut here.qmp)?;
    ensure!(status(&mut here.qmp)? == "running");
    here.quits()
}

#[test]
fn a_machine_that_is_sent_may_also_continue_where_it_is() -> Result<()> {
    let mut here = Here::start("copies", "rings", 64)?;
    let (there, uri) = There::listen("copies1")?;
    here.migrate(&uri, &json!({ "resume": true }))?;
    ensure!(status(&mut here.qmp)? == "running");
    let mut copy = there.resumes()?;
    copy.runs_on()?;
    here.runs_on()?;
    copy.quits()?;
    here.quits()
}

/// Hands a descriptor over.
pub fn getfd(qmp: &mut Client, name: &str, fd: impl AsFd) -> Result<()> {
    let arguments = json!({ "fdname": name });
    let returned = qmp.execute_with_fds("getfd", arguments, &[fd.as_fd()])?;
    ensure!(returned == json!({}), "{returned}");
    Ok(())
}

/// Makes the descriptor inheritable by processes that are started from now on.
pub fn inherited(fd: &(impl AsFd + AsRawFd)) -> Result<String> {
    fcntl_setfd(fd, FdFlags::empty())?;
    Ok(format!("fd:{}", fd.as_raw_fd()))
}

#[test]
fn a_machine_goes_through_a_pipe() -> Result<()> {
    let mut here = Here::start("pipe", "rings", 64)?;
    let (read, write) = std::io::pipe()?;
    let there = There::start("pipe1", &inherited(&read)?, &[])?;
    drop(read);
    getfd(&mut here.qmp, "out", &write)?;
    drop(write);
    here.migrate("fd:out", &json!({}))?;
    let mut there = there.resumes()?;
    here.quits()?;
    there.runs_on()?;
    there.quits()
}

#[test]
fn a_machine_lies_in_a_file_as_a_stream() -> Result<()> {
    let mut here = Here::start("file", "rings", 64)?;
    let path = here.stage.file("stream");
    getfd(&mut here.qmp, "out", File::create(&path)?)?;
    here.migrate("fd:out", &json!({}))?;
    let refused_twice = here.qmp.execute_raw("migrate", json!({ "uri": "fd:out" })).err();
    ensure!(refused_twice.is_some_and(|e| e.to_string().contains("getfd")), "used up");
    for n in 0..2 {
        let file = File::open(&path)?;
        let there = There::start(&format!("file{n}"), &inherited(&file)?, &[])?;
        let mut there = there.resumes()?;
        there.runs_on()?;
        there.quits()?;
    }
    // A command may provide it, too.
    let command = format!("exec:cat {} | cat; : a,b=c", path.display());
    let there = There::start("file2", &command, &[])?;
    there.resumes()?.quits()?;

    // A truncated stream starts nothing.
    let length = fs::metadata(&path)?.len();
    File::options().write(true).open(&path)?.set_len(length - 1)?;
    let file = File::open(&path)?;
    let said = There::start("file3", &inherited(&file)?, &[])?.gives_up()?;
    ensure!(said.contains("it ends at byte"), "{said}");
    here.quits()
}

#[test]
fn a_program_takes_it_where_programs_are_allowed() -> Result<()> {
    for (n, (sandbox, allowed)) in [
        ("-disable-seccomp", true),
        ("on,spawn=allow", true),
        ("off", true),
        ("on,spawn=deny", false),
        ("on", false),
    ]
    .into_iter()
    .enumerate()
    {
        let stage = Stage::new(&format!("exec{n}"))?;
        let vm = stage.vm("count", "rings 1")?;
        let vm = match sandbox {
            "-disable-seccomp" => vm.args(&[sandbox]),
            _ => vm.args(&["-sandbox", sandbox]),
        };
        let (mut monitor, qmp) = stage.start(vm)?;
        monitor.wait_for("processors 1", SOON)?;
        let mut here = Here { stage, monitor, qmp };
        let path = here.stage.file("stream");
        let uri = format!("exec:exec cat > {}", path.display());
        if !allowed {
            let said = here.qmp.execute_raw("migrate", json!({ "uri": uri }));
            let said = said.err().map(|e| e.to_string()).unwrap_or_default();
            ensure!(said.contains("-sandbox on,spawn=allow") && said.contains("unix:"), "{said}");
            here.quits()?;
            continue;
        }
        for (command, status) in [("cat > /dev/null; exit 3", 3), ("kill $$", 255)] {
            let uri = json!({ "uri": format!("exec:{command}") });
            let said = here.qmp.execute_raw("migrate", uri).err().map(|e| e.to_string());
            let said = said.unwrap_or_default();
            let ended = said.contains(&format!("ended with status {status}"));
            ensure!(ended || said.contains("the peer has closed the stream"), "{command}: {said}");
        }
        ensure!(crate::stage::status(&mut here.qmp)? == "running");
        here.migrate(&uri, &json!({}))?;
        let file = File::open(&path)?;
        let there = There::start(&format!("exec-{n}"), &inherited(&file)?, &[])?.resumes()?;
        there.quits()?;
        here.quits()?;
    }
    Ok(())
}

#[test]
fn a_client_that_never_reads_blocks_nothing() -> Result<()> {
    let mut here = Here::start("deaf", "rings", 64)?;
    let deaf = here.stage.file("deaf");
    let uri = json!({ "uri": format!("unix:{}", deaf.display()) });
    let listener = UnixListener::bind(&deaf)?;
    for n in 0..10u64 {
        let mut other = Client::connect(&here.stage.socket(), SOON)?;
        let pause = Duration::from_millis(n * n);
        let caller = thread::spawn({
            let uri = uri.clone();
            move || other.execute_raw("migrate", uri).err().map(|e| e.to_string())
        });
        let (accepted, _) = listener.accept()?;
        thread::sleep(pause);
        // It may run or be stopped; it answers.
        status(&mut here.qmp)?;
        simple(&mut here.qmp, "migrate_cancel")?;
        let said = caller.join().map_err(|_| anyhow::anyhow!("the caller has panicked"))?;
        ensure!(said.as_ref().is_some_and(|s| s.contains("cancelled")), "{said:?}");
        let info = here.qmp.execute_raw("query-migrate", json!({}))?;
        ensure!(info.get("status") == Some(&json!("canceled")), "{info}");
        ensure!(status(&mut here.qmp)? == "running");
        drop(accepted);
    }
    here.runs_on()?;
    here.quits()
}

#[test]
fn a_peer_that_goes_away_or_was_never_there_is_reported() -> Result<()> {
    let mut here = Here::start("gone", "rings", 64)?;
    let gone = here.stage.file("gone");
    let uri = json!({ "uri": format!("unix:{}", gone.display()) });
    let said = here.qmp.execute_raw("migrate", uri.clone()).err().map(|e| e.to_string());
    ensure!(said.as_ref().is_some_and(|s| s.contains("No such file")), "{said:?}");
    let listener = UnixListener::bind(&gone)?;
    let hangs_up = thread::spawn(move || listener.accept().map(drop));
    let said = here.qmp.execute_raw("migrate", uri).err().map(|e| e.to_string());
    ensure!(
        said.as_ref().is_some_and(|s| s.contains("the peer has closed the stream")),
        "{said:?}"
    );
    hangs_up.join().map_err(|_| anyhow::anyhow!("the listener has panicked"))??;
    for uri in ["unix:", "fd:", "fd:nobody", "fd:1", "fd:-1", "fd:99999"] {
        let said = here.qmp.execute_raw("migrate", json!({ "uri": uri }));
        ensure!(said.is_err(), "{uri} was accepted");
    }
    ensure!(status(&mut here.qmp)? == "running");
    here.runs_on()?;
    here.quits()
}

#[test]
fn nonsense_starts_nothing() -> Result<()> {
    for (n, (nonsense, says)) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "it is not a saved state"),
        (b"", "it ends at byte 0"),
        (b"STRATOCP", "it ends at byte 8"),
        (&[0xff; 1 << 16], "it is not a saved state"),
    ]
    .into_iter()
    .enumerate()
    {
        let (there, uri) = There::listen(&format!("nonsense{n}"))?;
        let path = uri.strip_prefix("unix:").unwrap_or_default();
        let mut to = UnixStream::connect(Path::new(path))?;
        // The receiver may have ended before the end of the stream.
        let _ = to.write_all(nonsense);
        drop(to);
        let said = there.gives_up()?;
        ensure!(said.contains(says), "{said}");
    }
    Ok(())
}

/// Queries a monitor that waits for its machine; its control socket exists before the machine does.
fn waiting(there: &There) -> Result<Client> {
    let deadline = Instant::now() + SOON;
    while !exists(&there.stage.socket()) {
        ensure!(Instant::now() < deadline, "the control socket does not appear");
        thread::sleep(Duration::from_millis(1));
    }
    let mut qmp = Client::connect(&there.stage.socket(), SOON)?;
    ensure!(status(&mut qmp)? == "inmigrate");
    Ok(qmp)
}

#[test]
fn one_who_waits_answers_and_ends_by_a_signal_and_leaves_nothing() -> Result<()> {
    let ends = |mut there: There, mut qmp: Client, reason: &str| -> Result<()> {
        let data = qmp.wait_event("SHUTDOWN", SOON)?.data;
        ensure!(data == json!({ "guest": false, "reason": reason }), "{data}");
        ensure!(there.monitor.wait_exit()?.code() == Some(0));
        ensure!(!exists(&there.stage.socket()) && !exists(&there.stage.file("in")));
        Ok(())
    };
    let kill = |there: &There| -> Result<()> {
        ensure!(Command::new("kill").arg(there.monitor.pid().to_string()).status()?.success());
        Ok(())
    };
    let (there, uri) = There::listen("waits")?;
    let mut qmp = waiting(&there)?;
    // Commands that need a machine are refused, but the lists name them.
    let said = qmp.execute_raw("query-cpus", json!({})).err().map(|e| e.to_string());
    ensure!(said.as_ref().is_some_and(|s| s.contains("has not arrived yet")), "{said:?}");
    let commands = qmp.execute_raw("query-commands", json!({}))?;
    ensure!(commands.as_array().is_some_and(|all| all.len() > 40), "{commands}");
    kill(&there)?;
    ends(there, qmp, "host-signal")?;
    // And in the middle of the transfer.
    let (there, again) = There::listen("waits1")?;
    ensure!(uri != again);
    let mut qmp = waiting(&there)?;
    let to = UnixStream::connect(Path::new(again.strip_prefix("unix:").unwrap_or_default()))?;
    (&to).write_all(b"STRATO")?;
    simple(&mut qmp, "quit")?;
    ends(there, qmp, "host-qmp-quit")?;
    drop(to);
    let (there, uri) = There::listen("waits2")?;
    let mut qmp = waiting(&there)?;
    let to = UnixStream::connect(Path::new(uri.strip_prefix("unix:").unwrap_or_default()))?;
    simple(&mut qmp, "migrate_cancel")?;
    qmp.wait_closed(SOON)?;
    ensure!(there.gives_up()?.contains("the restore was cancelled"));
    drop(to);
    Ok(())
}

/// Commands that clients send while the machine arrives take effect when it is complete; the
/// monitor answers all that time, however slowly the peer sends.
#[test]
fn a_machine_that_comes_in_runs_or_not_as_it_was_said_meanwhile() -> Result<()> {
    let mut here = Here::start("meanwhile", "rings", 64)?;
    let path = here.stage.file("stream");
    getfd(&mut here.qmp, "out", File::create(&path)?)?;
    here.migrate("fd:out", &json!({}))?;
    let sent = fs::read(&path)?;
    here.quits()?;
    for (said, ends) in [("cont", "running"), ("stop", "paused")] {
        let (there, uri) = There::listen(&format!("meanwhile-{said}"))?;
        let mut qmp = waiting(&there)?;
        let mut to = UnixStream::connect(Path::new(uri.strip_prefix("unix:").unwrap_or_default()))?;
        let (first, rest) = sent.split_at(sent.len() / 2);
        to.write_all(first)?;
        let deadline = Instant::now() + SOON;
        loop {
            ensure!(status(&mut qmp)? == "inmigrate");
            let info = qmp.execute_raw("query-migrate", json!({}))?;
            let got = info.pointer("/ram/transferred").and_then(Value::as_u64).unwrap_or(0);
            if got > 64 << 10 {
                ensure!(info.get("status") == Some(&json!("active")), "{info}");
                break;
            }
            ensure!(Instant::now() < deadline, "{info}");
        }
        simple(&mut qmp, "cont")?;
        simple(&mut qmp, said)?;
        to.write_all(rest)?;
        let mut there = there;
        drop(there.monitor.qmp()?);
        ensure!(status(&mut qmp)? == ends, "after {said}");
        if ends == "paused" {
            cont(&mut qmp)?;
        }
        let mut here = Here { stage: there.stage, monitor: there.monitor, qmp };
        here.runs_on()?;
        here.quits()?;
    }
    Ok(())
}

/// With `-daemonize`, the command returns when the machine is complete, or fails with the reason.
#[test]
fn a_monitor_in_the_background_is_ready_when_its_machine_is() -> Result<()> {
    let stage = Stage::new("behind1")?;
    let path = stage.file("stream");
    let mut here = Here::start("behind", "rings", 64)?;
    getfd(&mut here.qmp, "out", File::create(&path)?)?;
    here.migrate("fd:out", &json!({}))?;
    here.quits()?;
    let start = |incoming: &str| {
        let mut command = Command::new(&stage.paths.stratovirt);
        command.args(["-daemonize", "-S", "-serial", "pty", "-incoming", incoming, "-pidfile"]);
        command.arg(stage.file("pid")).arg("-qmp");
        command.arg(format!("unix:{},server,nowait", stage.socket().display())).output()
    };
    let good = start(&format!("exec:cat {}", path.display()))?;
    ensure!(good.status.success(), "{good:?}");
    let mut qmp = Client::connect(&stage.socket(), SOON)?;
    ensure!(status(&mut qmp)? == "paused");
    simple(&mut qmp, "quit")?;
    qmp.wait_closed(SOON)?;
    let deadline = Instant::now() + SOON;
    while exists(&stage.file("pid")) {
        ensure!(Instant::now() < deadline, "it does not end");
        thread::sleep(Duration::from_millis(1));
    }
    let bad = start(&format!("exec:head -c 100000 {}", path.display()))?;
    let said = String::from_utf8_lossy(&bad.stderr);
    ensure!(bad.status.code() == Some(1) && said.contains("it ends at byte 100000"), "{bad:?}");
    ensure!(!exists(&stage.socket()) && !exists(&stage.file("pid")));
    Ok(())
}
