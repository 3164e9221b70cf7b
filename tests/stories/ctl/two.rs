//! Two registries, as on two hosts, between which a domain goes back and forth.
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use stories::monitor::{SOON, install};

use crate::disks::describe;
use crate::remus::running;
use crate::rig::Rig;

/// The two. The registered domain `web` runs here, and its guest counts aloud.
pub struct Two {
    pub here: Rig,
    pub there: Rig,
    disk: bool,
}

impl Two {
    pub fn new(story: &str) -> Result<Self> {
        Self::begin(story, false)
    }

    /// The guest counts on its disk, which has an image in each registry's directory.
    pub fn with_disk(story: &str) -> Result<Self> {
        Self::begin(story, true)
    }

    fn begin(story: &str, disk: bool) -> Result<Self> {
        let here = Rig::new(story)?;
        let there = Rig::new(&format!("{story}-there"))?;
        let guest = if disk { "diary" } else { "hello" };
        let config = here.config("web.json", guest, "tally")?;
        if disk {
            let image = here.file("image");
            File::create(&image)?.set_len(1 << 20)?;
            describe(
                &config,
                &json!([{
                    "drive_id": "root", "path_on_host": image, "read_only": false, "direct": false,
                }]),
            )?;
        }
        here.ok(&["new", "web.json"])?;
        here.ok(&["start", "web"])?;
        Ok(Self { here, there, disk })
    }

    /// A directory that both reach, as the option that makes it the witness.
    pub fn witness(&self) -> Result<[String; 2]> {
        let dir = self.here.file("witness");
        fs::create_dir_all(&dir)?;
        Ok(["--witness".to_owned(), format!("dir:{}", dir.display())])
    }

    /// Protects the domain of one by the other, where the option `decides` is the same at both.
    pub fn protect(&self, from: &Rig, to: &Rig, decides: &[String; 2]) -> Result<Value> {
        self.protect_through(from, decides, &self.receiver(to, decides))
    }

    /// The same by a command that leads to the receiver.
    pub fn protect_through(
        &self,
        from: &Rig,
        [option, value]: &[String; 2],
        command: &str,
    ) -> Result<Value> {
        let words = ["remus", "-i", "25", "--timeout", "300", option, value, "-s", ""];
        let said = from.ok(&[&words[..], &["web", command]].concat())?;
        self.other(from).wait_replication("web", "state", "standby")?;
        Ok(said)
    }

    /// The command that receives.
    pub fn receiver(&self, to: &Rig, [option, value]: &[String; 2]) -> String {
        let disk = match self.disk {
            true => format!("--disk root='{}'", to.file("image").display()),
            false => String::new(),
        };
        to.receiver(&format!("{option} '{value}' {disk}"))
    }

    fn other(&self, one: &Rig) -> &Rig {
        if std::ptr::eq(one, &raw const self.here) { &self.there } else { &self.here }
    }
}

/// Stops the process that answers for the domain, or that is the link to its backup.
pub struct Stopped<'a> {
    rig: &'a Rig,
    pids: Vec<i32>,
}

impl<'a> Stopped<'a> {
    pub fn agent(rig: &'a Rig) -> Result<Self> {
        Self::of(rig, "\0remus-agent\0web\0")
    }

    /// The process at the backup that carries what the two monitors say to each other.
    pub fn link(rig: &'a Rig) -> Result<Self> {
        Self::of(rig, "\0remus-receive\0")
    }

    fn of(rig: &'a Rig, words: &str) -> Result<Self> {
        let pids = running(&rig.file("r"), words)?;
        ensure!(pids.len() == 1, "{pids:?}");
        let this = Self { rig, pids };
        this.signal(Signal::STOP)?;
        Ok(this)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.pids.iter().try_for_each(|pid| self.rig.signal(*pid, signal))
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.signal(Signal::CONT);
    }
}

/// A script of the test's own in the rig's directory.
pub fn script(rig: &Rig, name: &str, text: &str) -> Result<PathBuf> {
    let (from, program) = (rig.file(&format!("{name}.sh")), rig.file(name));
    fs::write(&from, format!("#!/bin/sh\n{text}\n"))?;
    install(&from, &program)?;
    Ok(program)
}

/// Waits until that is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What `list` shows of the domain's replication; null if there is none, or no domain.
pub fn replication(rig: &Rig) -> Result<Value> {
    let row = rig.listed("web")?;
    Ok(row.and_then(|row| row.get("replication").cloned()).unwrap_or_default())
}
