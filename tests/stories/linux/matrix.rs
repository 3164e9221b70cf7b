//! A change to the slots of a Linux guest survives every way of saving and of restoring it:
//! {plugged, unplugged, replaced, resized, link set, limited} x {running, stopped} x {saved,
//! suspended, incremental, streamed} x {mapped, copied, uffd}, the file system checked after each.
//! One guest goes through all of these: each round begins with the machine restored by the last.
use std::fmt;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::archive::{check_ext4, make_ext4};
use stories::monitor::{Monitor, Vm};
use stories::net::Tap;
use stories::paths::SEED;

use crate::plugged::{holds, plug_with, sees};
use crate::snapshot::Shape;

const MIB: u64 = 1 << 20;

/// What is done to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Plug,
    Unplug,
    /// A writable disk replaces a read-only one, and the other way round.
    Replace,
    Resize,
    SetLink,
    /// The disk is plugged again with other limits.
    Limit,
}

const CHANGES: [Change; 6] =
    [Change::Plug, Change::Unplug, Change::Replace, Change::Resize, Change::SetLink, Change::Limit];

/// How the guest is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The guest runs on, or stays stopped.
    Save,
    Suspend,
    Incremental,
    Stream,
}

/// The options of `-incoming` after the path, for each way. A stream is read in one way only.
const WAYS: [(Way, &[&str]); 4] =
    [(Way::Save, MAPPED), (Way::Suspend, MAPPED), (Way::Incremental, MAPPED), (Way::Stream, &[""])];
const MAPPED: &[&str] = &[",mapped=on", ",mapped=off", ",mapped=uffd"];

/// A random combination.
#[derive(Debug, Clone, Copy)]
struct Cell {
    change: Change,
    stopped: bool,
    way: Way,
    how: &'static str,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { change, stopped, way, how } = self;
        let state = if *stopped { "stopped" } else { "running" };
        write!(f, "{change:?} while {state}, {way:?}{how}")
    }
}

fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for change in CHANGES {
        for stopped in [false, true] {
            for (way, hows) in WAYS {
                cells.extend(hows.iter().map(|how| Cell { change, stopped, way, how }));
            }
        }
    }
    cells
}

/// The guest's disks by slot: one that is plugged and unplugged, one with the file system, one that
/// grows.
const FIRST: &str = "vda";
const GROWS: &str = "vdc";
const EXTRA: &str = "vdd";

/// The guest, and what its slots should show.
struct Guest<'a> {
    story: &'a Story,
    _tap: Tap,
    monitor: Monitor,
    qmp: Client,
    /// Numbers the images, so that each has its own name.
    images: u64,
    /// MiB of the disks in the first, third and fourth slot; 0 for an empty one.
    first: u64,
    grows: u64,
    extra: u64,
    link: bool,
    writable: bool,
    /// The limits of the disk in the fourth slot.
    limit: u64,
}

impl<'a> Guest<'a> {
    fn start(story: &'a Story, shape: Shape) -> Result<Self> {
        let image = |name: &str| story.dir.join(name);
        make_ext4(&story.debian, &image("data.img"), 16 * MIB, None)?;
        for name in ["first.img", "grows.img"] {
            File::create(image(name))?.set_len(MIB)?;
        }
        let tap = Tap::create(&story.debian, "matrix0", "10.7.0.1/24")?;
        let vm = shape.vm(story)?.disk("first", &image("first.img"), false);
        let mut monitor =
            vm.nic("net0", "matrix0", "52:54:00:12:34:57").start(&story.paths, &story.dir)?;
        monitor.wait_ready()?;
        let mut qmp = monitor.qmp()?;
        let discard = json!({ "discard": "unmap" });
        plug_with(&mut qmp, "data", &image("data.img"), "1", &discard)?;
        plug_with(&mut qmp, "grows", &image("grows.img"), "2", &discard)?;
        sees(&mut monitor, "vdb", 16 * MIB / 512)?;
        monitor.sh("ip link set eth0 up")?;
        monitor.sh("mount -o noatime,discard /dev/vdb /mnt && seq 1 20000 > /mnt/first && sync")?;
        let (first, grows, extra, link) = (1, 1, 0, true);
        let (images, writable, limit) = (0, true, 0);
        Ok(Self {
            story,
            _tap: tap,
            monitor,
            qmp,
            images,
            first,
            grows,
            extra,
            link,
            writable,
            limit,
        })
    }

    fn new_image(&mut self, mib: u64) -> Result<(String, PathBuf)> {
        self.images += 1;
        let id = format!("disk{}", self.images);
        let path = self.story.dir.join(format!("{id}.img"));
        File::create(&path)?.set_len(mib * MIB)?;
        Ok((id, path))
    }

    /// Unplugs the disk in slot `addr`, if there is one.
    fn unplug(&mut self, addr: u64) -> Result<()> {
        let all = self.qmp.execute_raw("query-block", json!({}))?;
        let all = all.as_array().context("no list")?;
        let id = |disk: &Value| disk.get("device").and_then(Value::as_str).map(str::to_owned);
        let names: Vec<String> = all.iter().filter_map(id).collect();
        // In the order of slots, of which the second and third are never empty.
        let first = u64::from(self.first > 0);
        let at = if addr == 0 { 0 } else { usize::try_from(addr - 1 + first)? };
        let name = names.get(at).with_context(|| format!("{names:?} has no disk {addr}"))?;
        self.qmp.execute_raw("device_del", json!({ "id": name }))?;
        Ok(())
    }

    fn plug(&mut self, addr: u64, mib: u64, how: &Value) -> Result<()> {
        let (id, path) = self.new_image(mib)?;
        plug_with(&mut self.qmp, &id, &path, &addr.to_string(), how)
    }

    /// Prepares what `change` needs, while the guest runs.
    fn prepare(&mut self, change: Change) -> Result<()> {
        let there = match change {
            Change::Plug => false,
            Change::Unplug | Change::Limit => true,
            _ => return Ok(()),
        };
        if there && self.extra == 0 {
            self.plug(3, 1, &json!({}))?;
            self.extra = 1;
        } else if !there && self.extra > 0 {
            self.unplug(3)?;
            self.extra = 0;
        }
        self.looks()
    }

    fn change(&mut self, change: Change) -> Result<()> {
        match change {
            Change::Plug => {
                self.extra = 2;
                self.plug(3, 2, &json!({ "discard": "unmap" }))?;
            }
            Change::Unplug => {
                self.unplug(3)?;
                self.extra = 0;
            }
            Change::Replace => {
                self.unplug(0)?;
                self.writable = !self.writable;
                self.first = if self.first == 1 { 2 } else { 1 };
                self.plug(0, self.first, &json!({ "read-only": !self.writable }))?;
            }
            Change::Resize => {
                let all = self.qmp.execute_raw("query-block", json!({}))?;
                let id = all.pointer("/2/device").cloned().context("no third disk")?;
                self.grows += 1;
                let size = json!({ "device": id, "size": self.grows * MIB });
                self.qmp.execute_raw("block_resize", size)?;
            }
            Change::SetLink => {
                self.link = !self.link;
                self.qmp.execute_raw("set_link", json!({ "name": "net0", "up": self.link }))?;
            }
            Change::Limit => {
                self.unplug(3)?;
                self.limit = if self.limit == 700 { 900 } else { 700 };
                self.extra = 3;
                self.plug(3, 3, &json!({ "throttling.iops-total": self.limit }))?;
            }
        }
        Ok(())
    }

    /// The guest finds its slots as they should be.
    fn looks(&mut self) -> Result<()> {
        for (disk, mib) in [(FIRST, self.first), (GROWS, self.grows), (EXTRA, self.extra)] {
            sees(&mut self.monitor, disk, mib * MIB / 512)?;
        }
        // The last sector of each can be read, and the first disk can be written if it is writable.
        let mut commands = vec![format!(
            "until [ $(cat /sys/class/net/eth0/carrier) = {} ]; do usleep 10000; done",
            u8::from(self.link)
        )];
        let last = |mib: u64| mib * MIB / 512 - 1;
        for (disk, mib) in [(FIRST, self.first), (GROWS, self.grows), (EXTRA, self.extra)] {
            if mib > 0 {
                let skip = last(mib);
                commands.push(format!("dd if=/dev/{disk} of=/dev/null bs=512 count=1 skip={skip}"));
            }
        }
        if self.writable {
            let seek = last(self.first);
            commands.push(format!(
                "dd if=/dev/zero of=/dev/{FIRST} bs=512 count=1 seek={seek} conv=fsync"
            ));
        }
        self.monitor.sh(&commands.join(" 2>/dev/null && "))?;
        if self.extra == 3 {
            let all = self.qmp.execute_raw("query-block", json!({}))?;
            let limits = all.pointer("/3/inserted/iops").cloned();
            ensure!(limits == Some(json!(self.limit)), "limited to {limits:?}, not {}", self.limit);
        }
        Ok(())
    }

    fn migrate(&mut self, arguments: Value) -> Result<()> {
        self.qmp.execute_raw("migrate", arguments)?;
        let info = self.qmp.execute_raw("query-migrate", json!({}))?;
        ensure!(info.get("status") == Some(&json!("completed")), "{info}");
        Ok(())
    }

    /// Changes the slot, saves the guest, and restores it.
    fn goes_through(&mut self, cell: Cell) -> Result<()> {
        let Cell { change, stopped, way, how } = cell;
        self.prepare(change)?;
        let saved = self.story.dir.join("saved");
        let base = self.story.dir.join("base");
        if way == Way::Incremental {
            let uri = format!("file:{}", base.display());
            self.migrate(json!({ "uri": uri, "track": true, "resume": true }))?;
        }
        // A guest that runs on after its save must not write: the restore needs its disk as of that
        // moment.
        self.monitor.sh("fsfreeze --freeze /mnt")?;
        if stopped {
            self.qmp.execute_raw("stop", json!({}))?;
        }
        self.change(change)?;
        if !stopped {
            self.looks()?;
        }
        let uri = format!("file:{}", saved.display());
        let mut incoming = format!("{uri}{how}");
        match way {
            Way::Save => self.migrate(json!({ "uri": uri, "resume": true }))?,
            Way::Suspend => self.migrate(json!({ "uri": uri }))?,
            Way::Incremental => self.migrate(json!({ "uri": uri, "incremental": true }))?,
            Way::Stream => {
                let fd = File::create(&saved)?;
                self.qmp.execute_with_fds("getfd", json!({ "fdname": "out" }), &[fd.as_fd()])?;
                self.migrate(json!({ "uri": "fd:out" }))?;
                incoming = format!("exec:cat {}", saved.display());
            }
        }
        self.qmp.execute_raw("quit", json!({}))?;
        self.monitor.wait_exit()?;
        let look = self.story.dir.join("look.img");
        fs::copy(self.story.dir.join("data.img"), &look)?;
        check_ext4(&self.story.debian, &look, true)?;

        let args = ["-S", "-incoming", &incoming];
        self.monitor =
            Vm::described(json!({})).args(&args).start(&self.story.paths, &self.story.dir)?;
        self.qmp = self.monitor.qmp()?;
        self.qmp.execute_raw("cont", json!({}))?;
        self.monitor.sh("fsfreeze --unfreeze /mnt")?;
        self.looks()?;
        holds(&mut self.monitor, "after")?;
        // Its memory file may still be mapped.
        for old in [saved, base] {
            let _ = if old.is_dir() { fs::remove_dir_all(old) } else { fs::remove_file(old) };
        }
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        self.monitor.sh("umount /mnt")?;
        let image = self.story.dir.join("data.img");
        let debian = self.story.debian.clone();
        drop(self);
        check_ext4(&debian, &image, false).map(drop)
    }
}

fn go(story: &Story, shape: Shape, cells: &[Cell]) -> Result<()> {
    let mut guest = Guest::start(story, shape)?;
    for cell in cells {
        guest.goes_through(*cell).with_context(|| cell.to_string())?;
    }
    guest.end()
}

/// All changes to the slots of a running guest, or of a stopped one.
pub fn whole(story: &Story, shape: Shape, stopped: bool) -> Result<()> {
    let cells: Vec<_> = cells().into_iter().filter(|cell| cell.stopped == stopped).collect();
    ensure!(cells.len() == 60, "{}", cells.len());
    go(story, shape, &cells)
}

/// `number` of these combinations, chosen at random.
pub fn sample(story: &Story, shape: Shape, stopped: bool, number: usize) -> Result<()> {
    let seed = stories::seed::get()?;
    println!("{SEED}={seed}: {number} of sixty ways");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cells: Vec<_> = cells().into_iter().filter(|cell| cell.stopped == stopped).collect();
    random.shuffle(&mut cells);
    cells.truncate(number);
    go(story, shape, &cells).with_context(|| format!("{SEED}={seed}"))
}
