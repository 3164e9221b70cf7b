//! Consoles: on a terminal and on a pipe, before and after the guest has ended.
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::OFlags;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use stories::monitor::SOON;

use crate::rig::Rig;

/// Wait until the domain's guest has printed `text` since it started.
pub fn said(rig: &Rig, name: &str, text: &str) -> Result<()> {
    let mut command = rig.command(&["console", name]);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = child.spawn()?;
    let heard = Heard::by(child.stdout.take().context("no output")?);
    let result = heard.wait_for(text);
    child.stdin.take().context("no input")?.write_all(b"\x1d")?;
    ensure!(child.wait()?.success());
    result
}

/// What a thread has read so far.
pub struct Heard {
    all: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Heard {
    pub fn by(mut from: impl Read + Send + 'static) -> Self {
        let all = Arc::<Mutex<Vec<u8>>>::default();
        let heard = all.clone();
        let reader = thread::spawn(move || {
            let mut chunk = [0; 1024];
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.extend_from_slice(chunk.get(..length).unwrap_or_default());
            }
        });
        Self { all, reader }
    }

    /// All of it, once the output has ended.
    pub fn whole(self) -> Result<String> {
        self.reader.join().map_err(|_| anyhow!("the reader has panicked"))?;
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(String::from_utf8_lossy(&all).into_owned())
    }

    pub fn text(&self) -> String {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&all).into_owned()
    }

    pub fn wait_for(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while !self.text().contains(text) {
            ensure!(Instant::now() < deadline, "{text:?} is not in {:?}", self.text());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// A program on a terminal of its own.
struct AtTerminal {
    child: Child,
    keys: File,
    screen: Heard,
    line: OwnedFd,
}

impl AtTerminal {
    fn start(mut command: Command) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let line =
            rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty())?;
        command.stdin(line.try_clone()?).stdout(line.try_clone()?).stderr(line.try_clone()?);
        let child = command.spawn()?;
        let keys = File::from(master);
        let screen = Heard::by(keys.try_clone()?);
        Ok(Self { child, keys, screen, line })
    }

    /// Whether the terminal is in raw mode.
    fn is_raw(&self) -> Result<bool> {
        let modes = tcgetattr(&self.line)?.local_modes;
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        ensure!(modes & cooked == cooked || !modes.intersects(cooked), "half raw: {modes:?}");
        Ok(!modes.intersects(cooked))
    }

    /// The program exits with that status, and the terminal is as it was.
    fn ends(&mut self, status: i32) -> Result<()> {
        let ended = self.child.wait()?;
        ensure!(ended.code() == Some(status), "{ended}: {}", self.screen.text());
        ensure!(!self.is_raw()?, "the terminal is left raw");
        Ok(())
    }
}

#[test]
fn a_terminal_is_raw_while_it_is_attached_and_ctrl_bracket_leaves() -> Result<()> {
    let rig = Rig::new("terminal")?;
    rig.config("web.json", "hello", "obey")?;
    let mut first = AtTerminal::start(rig.command(&["create", "-c", "web.json"]))?;
    first.screen.wait_for("waits\n")?;
    ensure!(first.is_raw()?);
    // Ctrl-C goes to the guest, which echoes it.
    first.keys.write_all(b"\x03typed")?;
    first.screen.wait_for("\x03typed")?;
    first.keys.write_all(b"\x1dnot for the guest\n")?;
    first.ends(0)?;
    ensure!(rig.state("web")? == "running");
    // The next console begins with the earlier output.
    let mut second = AtTerminal::start(rig.command(&["console", "web"]))?;
    second.screen.wait_for("hello\nwaits\n\x03typed")?;
    ensure!(!second.screen.text().contains("not for the guest"));
    second.keys.write_all(b"\x1d")?;
    second.ends(0)
}

#[test]
fn a_terminal_is_put_back_when_the_domain_ends_and_when_a_signal_does() -> Result<()> {
    let rig = Rig::new("putback")?;
    rig.config("web.json", "hello", "obey")?;
    rig.ok(&["new", "web.json"])?;
    let mut attached = AtTerminal::start(rig.command(&["start", "web", "-c"]))?;
    attached.screen.wait_for("waits\n")?;
    rig.ok(&["shutdown", "-w", "web"])?;
    attached.screen.wait_for("'web' has ended: it is registered")?;
    attached.ends(0)?;
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130)] {
        rig.ok(&["start", "web"])?;
        let mut attached = AtTerminal::start(rig.command(&["console", "web"]))?;
        attached.screen.wait_for("waits\n")?;
        ensure!(attached.is_raw()?);
        rig.signal(i32::try_from(attached.child.id())?, signal)?;
        attached.ends(status)?;
        rig.ok(&["destroy", "web"])?;
    }
    rig.ok(&["start", "web"])?;
    let mut attached = AtTerminal::start(rig.command(&["console", "web"]))?;
    attached.screen.wait_for("waits\n")?;
    rig.kill("web")?;
    attached.screen.wait_for("'web' has ended: it is killed")?;
    attached.ends(0)
}

#[test]
fn a_pipe_is_a_console_too() -> Result<()> {
    let rig = Rig::new("pipe")?;
    rig.config("web.json", "hello", "obey")?;
    rig.ok(&["create", "web.json"])?;
    said(&rig, "web", "waits\n")?;
    let text = "x".repeat(5000);
    let mut child = rig
        .command(&["console", "web"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    // The input has ended, but the domain has not: the guest echoes the input, a byte at a time.
    let heard = Heard::by(child.stdout.take().context("no output")?);
    heard.wait_for(&text)?;
    rig.ok(&["shutdown", "-w", "web"])?;
    let out = child.wait_with_output()?;
    let heard = heard.whole()?;
    ensure!(out.status.success() && heard.ends_with("button\n"), "{heard}");
    let reported = String::from_utf8(out.stderr)?;
    ensure!(reported.contains("'web' has ended: it is absent"), "{reported}");
    Ok(())
}

#[test]
fn a_console_of_a_paused_domain_begins_with_it() -> Result<()> {
    let rig = Rig::new("paused")?;
    rig.config("web.json", "hello", "obey")?;
    let mut attached = AtTerminal::start(rig.command(&["create", "-p", "-c", "web.json"]))?;
    attached.screen.wait_for("'web' is paused")?;
    rig.ok(&["unpause", "web"])?;
    attached.screen.wait_for("waits\n")?;
    attached.keys.write_all(b"\x1d")?;
    attached.ends(0)
}
