//! Before a machine is handed over, its receiver has checked everything that can be checked:
//! problems are reported before a page is sent, or at least before the source releases anything.
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, Vm};

use crate::return_path::{source, until_it_listens_in};
use crate::stage::{Stage, quits, status};

/// Numbers of frames, as they are on the wire.
const PAGES: u32 = 5;
const HELLO: u32 = 8;
const GO: u32 = 12;

/// Changes a frame in transit, or delays it.
type Edit = Box<dyn FnMut(u32, &mut Vec<u8>) + Send>;

/// Passes on the source's stream, frame by frame, and the receiver's answers.
struct Relay {
    /// Its socket, for the source.
    uri: String,
    /// The kinds of frames that the source has sent.
    source: JoinHandle<io::Result<Vec<u32>>>,
}

impl Relay {
    fn start(stage: &Stage, to: PathBuf, mut edit: Edit) -> Result<Self> {
        let path = stage.file("relay");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let source = thread::spawn(move || {
            let (mut near, _) = listener.accept()?;
            let far = UnixStream::connect(to)?;
            let (mut answers, mut back) = (far.try_clone()?, near.try_clone()?);
            let answers = thread::spawn(move || {
                let copied = io::copy(&mut answers, &mut back);
                let _ = back.shutdown(std::net::Shutdown::Write);
                copied
            });
            let kinds = frames(&mut near, &far, &mut edit);
            let _ = far.shutdown(std::net::Shutdown::Write);
            let _ = answers.join();
            kinds
        });
        Ok(Self { uri: format!("unix:{}", path.display()), source })
    }

    /// What the source has sent, once the migration has ended.
    fn kinds(self) -> Result<Vec<u32>> {
        Ok(self.source.join().map_err(|_| anyhow!("the relay has panicked"))??)
    }
}

/// Passes frames on to the end; their kinds.
fn frames(from: &mut UnixStream, mut to: &UnixStream, edit: &mut Edit) -> io::Result<Vec<u32>> {
    let (mut header, mut kinds) = ([0; 16], Vec::new());
    from.read_exact(&mut header)?;
    to.write_all(&header)?;
    let mut head = [0; 8];
    while from.read_exact(&mut head).is_ok() {
        let [kind, length] = [&head[..4], &head[4..]]
            .map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default()));
        kinds.push(kind);
        let mut body = vec![0; length as usize];
        from.read_exact(&mut body)?;
        from.read_exact(&mut [0; 4])?;
        edit(kind, &mut body);
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        let mut frame = [kind.to_le_bytes(), length.to_le_bytes()].concat();
        frame.extend(body);
        frame.extend(crc32fast::hash(&frame).to_le_bytes());
        if to.write_all(&frame).is_err() {
            // The receiver has ended; the source notices.
            break;
        }
    }
    Ok(kinds)
}

fn as_it_is() -> Edit {
    Box::new(|_, _| ())
}

/// A process in the network namespace of `pid` that waits for a machine, with these flags.
struct There {
    stage: Stage,
    monitor: Monitor,
    socket: PathBuf,
}

impl There {
    fn start(story: &str, pid: u32, env: &str, args: &[&str]) -> Result<Self> {
        let mut stage = Stage::new(story)?;
        stage.run_by(&format!("nsenter -t {pid} -n env {env}"))?;
        let socket = stage.file("in");
        let uri = format!("unix:{}", socket.display());
        let args = [&["-incoming", &uri], args].concat();
        let monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        until_it_listens_in(&monitor, &socket)?;
        Ok(Self { stage, monitor, socket })
    }

    /// The receiver refuses the machine, which stays at its source; returns what the source has
    /// sent until then, and its error.
    fn refuses(mut self, qmp: &mut Client, edit: Edit) -> Result<(Vec<u32>, String)> {
        let relay = Relay::start(&self.stage, self.socket.clone(), edit)?;
        let said = migrate(qmp, &relay.uri).err().context("it was taken")?.to_string();
        ensure!(status(qmp)? == "running", "the machine has not come back: {said}");
        let ended = self.monitor.wait_exit()?;
        ensure!(ended.code() == Some(1), "the receiver ended with {ended}");
        Ok((relay.kinds()?, said))
    }
}

fn migrate(qmp: &mut Client, uri: &str) -> Result<()> {
    let returned = qmp.execute_raw("migrate", json!({ "uri": uri }))?;
    ensure!(returned == json!({}), "{returned}");
    Ok(())
}

fn in_namespace_of(monitor: &Monitor, commands: &str) -> Result<()> {
    let pid = monitor.pid().to_string();
    let mut nsenter = Command::new("nsenter");
    let out = nsenter.args(["-t", &pid, "-n", "sh", "-ec", commands]).output()?;
    ensure!(out.status.success(), "{commands}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Another process in the namespace of `monitor` that holds a tap; killed when dropped.
struct Holder(Child);

impl Holder {
    fn of(tap: &str, monitor: &Monitor) -> Result<Self> {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &monitor.pid().to_string(), "-n", "python3", "-c"]);
        let script = format!(
            "import fcntl, struct, sys\ntun = open('/dev/net/tun', 'r+b', buffering=0)\n\
             fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'{tap}', 0x5002))\n\
             print('held', flush=True)\nsys.stdin.read()"
        );
        let child = nsenter.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut this = Self(child);
        let mut said = [0; 5];
        this.0.stdout.as_mut().context("no output")?.read_exact(&mut said)?;
        Ok(this)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_is_missing_is_reported_before_a_page_is_sent() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("untold")?;
    in_namespace_of(&monitor, "ip tuntap add dev tun0 mode tun")?;
    let image = stage.file("other");
    fs::write(&image, vec![0; 4096])?;
    let short = format!("id=d,file={},direct=off", image.display());
    for (number, (args, says)) in [
        (["-netdev", "tap,id=nic,ifname=t9"], "tap device 't9' does not exist"),
        (["-netdev", "tap,id=nic,ifname=lo"], "'lo' is not a tap device"),
        (["-netdev", "tap,id=nic,ifname=tun0"], "'tun0' is not a tap device"),
        (["-drive", &short], "had 1048576 bytes when it was saved"),
        (["-drive", "id=d,file=/nowhere,direct=off"], "/nowhere"),
    ]
    .into_iter()
    .enumerate()
    {
        let there = There::start(&format!("untold{number}"), monitor.pid(), "", &args)?;
        let (kinds, said) = there.refuses(&mut qmp, as_it_is())?;
        ensure!(said.contains("refused the machine") && said.contains(says), "{said}");
        ensure!(!kinds.contains(&PAGES), "{says}: {kinds:?}");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

/// The source first sends the CPU features that its guest may use; here with one more feature.
#[test]
fn a_cpu_that_the_receiver_lacks_is_reported_before_a_page_is_sent() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("lesser")?;
    let there = There::start("lesser1", monitor.pid(), "", &[])?;
    let edit = |kind, body: &mut Vec<u8>| {
        if kind == HELLO {
            *body = with_every_feature(body).expect("no greeting");
        }
    };
    let (kinds, said) = there.refuses(&mut qmp, Box::new(edit))?;
    ensure!(said.contains("the guest uses") && said.contains("host lacks"), "{said}");
    ensure!(!kinds.contains(&PAGES), "{kinds:?}");
    quits(&stage, &mut monitor, &mut qmp)
}

/// The greeting, with every feature in the leaf for structured extended ones.
fn with_every_feature(hello: &[u8]) -> Option<Vec<u8>> {
    let mut hello: Value = serde_json::from_slice(hello).ok()?;
    let leaves = hello.pointer_mut("/cpu/state/cpuid")?.as_array_mut()?;
    let structured = |leaf: &&mut Value| {
        let is = |key: &str, value: &str| leaf.get(key).is_some_and(|found| found == value);
        is("function", "0x7") && is("index", "0x0")
    };
    *leaves.iter_mut().find(structured)?.get_mut("edx")? = json!("0xffffffff");
    serde_json::to_vec(&hello).ok()
}

/// The machine is built and checked before the source releases it: a failure then costs nothing.
#[test]
fn a_machine_that_cannot_be_built_is_reported_before_the_source_lets_go() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("unbuilt")?;
    let refuse = stage.file("refuse");
    fs::write(&refuse, "nic0")?;
    let env = format!("STRATOVIRT_TEST_REFUSE={}", refuse.display());
    // Of the same size, and not the machine's.
    let image = stage.file("other");
    fs::write(&image, vec![0; 1 << 20])?;
    let other = format!("id=d,file={},direct=off", image.display());
    for (story, env, args, says) in [
        ("unbuilt1", &*env, vec![], "cannot restore nic0"),
        ("unbuilt2", "", vec!["-drive", &other], "another image"),
        ("unbuilt3", "", vec!["-serial", "file,path=/nowhere/f"], "/nowhere/f"),
    ] {
        let there = There::start(story, monitor.pid(), env, &args)?;
        let (kinds, said) = there.refuses(&mut qmp, as_it_is())?;
        ensure!(said.contains("refused the machine") && said.contains(says), "{said}");
        ensure!(!kinds.contains(&GO), "{story}: {kinds:?}");
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)
}

/// Whether another process holds a resource shows only when it is acquired. The machine returns to
/// its source, and the message names the process.
#[test]
fn a_tap_in_use_is_reported_with_the_process_that_uses_it() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("busy-tap")?;
    in_namespace_of(&monitor, "ip tuntap add dev t1 mode tap vnet_hdr")?;
    let holder = Holder::of("t1", &monitor)?;
    let netdev = ["-netdev", "tap,id=nic,ifname=t1"];
    let there = There::start("busy-tap1", monitor.pid(), "", &netdev)?;
    let (kinds, said) = there.refuses(&mut qmp, as_it_is())?;
    ensure!(kinds.last() == Some(&GO), "{kinds:?}");
    // `nsenter` has executed the program by now.
    let pid = holder.0.id();
    let names = format!("'t1' is in use by another process ({pid})");
    ensure!(said.contains(&names), "{said}");
    // The same message comes from a running machine, behind its filter.
    let netdev = json!({ "id": "n1", "ifname": "t1" });
    let said = qmp.execute_raw("netdev_add", netdev).err().context("it was taken")?.to_string();
    ensure!(said.contains(&names), "{said}");
    drop(holder);
    quits(&stage, &mut monitor, &mut qmp)
}

/// `Go` is lost. The receiver's wait for it is bounded, and it returns the machine; when `Go`
/// arrives after all, the receiver no longer exists.
#[test]
fn a_receiver_that_gets_no_go_gives_the_machine_back() -> Result<()> {
    let (stage, mut monitor, mut qmp) = source("lost-go")?;
    let there = There::start("lost-go1", monitor.pid(), "", &[])?;
    let (release, held): (Sender<()>, Receiver<()>) = channel();
    let edit = move |kind, _: &mut Vec<u8>| {
        if kind == GO {
            let _ = held.recv();
        }
    };
    let relay = Relay::start(&there.stage, there.socket.clone(), Box::new(edit))?;
    let said = migrate(&mut qmp, &relay.uri).err().context("it was taken")?.to_string();
    ensure!(said.contains("refused the machine") && said.contains("20 seconds"), "{said}");
    ensure!(status(&mut qmp)? == "running", "{said}");
    let There { monitor: mut other, stage: _there, .. } = there;
    ensure!(other.wait_exit()?.code() == Some(1));
    ensure!(other.said_to_its_end()?.contains("20 seconds"));
    drop(release);
    relay.kinds()?;
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(&stage, &mut monitor, &mut qmp)
}

/// The tests of this file depend on the proxy, so the move is also tested through one that changes
/// nothing.
#[test]
fn a_machine_that_can_be_taken_is() -> Result<()> {
    let (_stage, monitor, mut qmp) = source("taken")?;
    let mut there = There::start("taken1", monitor.pid(), "", &[])?;
    let relay = Relay::start(&there.stage, there.socket.clone(), as_it_is())?;
    migrate(&mut qmp, &relay.uri)?;
    ensure!(status(&mut qmp)? == "postmigrate");
    let mut other = there.monitor.qmp()?;
    ensure!(status(&mut other)? == "running");
    drop((monitor, qmp));
    ensure!(relay.kinds()?.ends_with(&[GO]));
    ensure!(!there.monitor.unseen().contains("WRONG"), "{}", there.monitor.unseen());
    let There { stage, mut monitor, .. } = there;
    quits(&stage, &mut monitor, &mut other)
}
