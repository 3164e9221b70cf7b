//! A busy guest is saved and resumes in other processes: no record that it acknowledged is lost,
//! its file system is intact, its clocks and counters continue, its connections survive.
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::archive::{check_ext4, copy_image, make_ext4, read_ext4};
use stories::guest::Kernel;
use stories::monitor::{BOOT, Monitor, SOON, Vm};
use stories::net::Tap;
use stories::paths::SEED;
use stories::stream::{PACE, Tally, exchange};

/// The parameters of the guest and its machine.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// With the given kernel on this machine's own KVM; else Debian's.
    pub native: bool,
    /// vCPUs.
    pub cpus: u64,
    /// MiB of RAM.
    pub mib: u64,
    /// How often each save is restored.
    pub restores: usize,
}

impl Shape {
    /// Milliseconds that a step of `load` takes: an emulated host is a hundred times slower.
    fn pace(self) -> u64 {
        if self.native { 1 } else { 10 }
    }
}

const MAC: &str = "52:54:00:12:34:56";
const HOST: &str = "10.9.0.1/24";
const PEER: &str = "10.9.0.1:7000";
/// Kernel messages when something has gone wrong.
const BAD: &str = "soft lockup|BUG:|Oops|Call Trace|I/O error|EXT4-fs error|detected stall|\
                   blocked for more than|clocksource: Marking|NETDEV WATCHDOG";

impl Shape {
    /// The machine.
    pub fn vm(self, story: &Story) -> Result<Vm> {
        let vm = match self.native {
            true => Vm::native(&story.paths)?,
            false => Vm::linux(&story.paths, Kernel::Elf),
        };
        Ok(vm.machine("vcpu_count", self.cpus).machine("mem_size", self.mib << 20))
    }
}

/// The progress of `load` in the guest.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    count: u64,
    /// Milliseconds since the guest's boot.
    clock: u64,
    received: u64,
    record: u64,
}

/// Parses the output of `load`. Lines that a save cut in two do not count.
fn done(console: &str) -> Result<Done> {
    let mut done = Done::default();
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let Some(said) = line.trim_end().strip_prefix("load: ") else { continue };
        let words: Vec<_> = said.split(' ').collect();
        match words.as_slice() {
            ["record", number] => done.record = number.parse()?,
            ["count", count, "clock", clock, "sent", _, "received", received] => {
                let (before, now) = ((done.count, done.clock), (count.parse()?, clock.parse()?));
                ensure!(now.0 > before.0 && now.1 >= before.1, "{before:?} became {now:?}");
                (done.count, done.clock, done.received) = (now.0, now.1, received.parse()?);
            }
            ["connection:", ..] => println!("{line}"),
            _ => bail!("the guest says: {line}"),
        }
    }
    Ok(done)
}

/// Waits until the guest's progress satisfies `enough`.
fn until(guest: &mut Monitor, what: &str, enough: impl Fn(Done) -> bool) -> Result<Done> {
    let deadline = Instant::now() + SOON;
    loop {
        let done = done(&guest.shown())?;
        if enough(done) {
            return Ok(done);
        }
        ensure!(Instant::now() < deadline, "{what}: the guest stays at {done:?}");
        guest.wait_for("load: count", SOON).with_context(|| what.to_owned())?;
    }
}

/// Runs a command in a guest that prints all the time.
fn ask(guest: &mut Monitor, command: &str) -> Result<String> {
    let shown = guest.sh(&format!(
        "({command}) > /tmp/said 2>&1; status=$?; sed 's/^/said: /' /tmp/said; (exit $status)"
    ))?;
    let lines = shown.lines().filter_map(|line| line.trim_end().strip_prefix("said: "));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// A guest that counts, writes, reads and has a connection, on a tap of its own.
struct Busy {
    guest: Monitor,
    image: PathBuf,
    tap: Tap,
    tally: Arc<Tally>,
}

impl Busy {
    fn start(story: &Story, shape: Shape) -> Result<Self> {
        let image = story.dir.join("data.img");
        make_ext4(&story.debian, &image, 32 << 20, None)?;
        let tap = Tap::create(&story.debian, "saved0", HOST)?;
        let tally = Arc::new(Tally::default());
        let (listener, ours) = (TcpListener::bind(PEER)?, Arc::clone(&tally));
        let pause = Duration::from_millis(shape.pace()) * PACE;
        thread::spawn(move || {
            let connected =
                listener.accept().and_then(|(stream, _)| exchange(&stream, &ours, pause));
            if let Err(error) = connected {
                let _ = ours.ended.set(error.to_string());
            }
        });
        let vm = shape.vm(story)?.disk("data", &image, false).nic("net0", "saved0", MAC);
        let mut guest = vm.start(&story.paths, &story.dir)?;
        guest.wait_ready()?;
        guest
            .sh("mount /dev/vda /mnt && ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up")?;
        guest.sh(&format!("load /mnt/records {PEER} {} &", shape.pace()))?;
        let mut this = Self { guest, image, tap, tally };
        until(&mut this.guest, "work begins", |d| d.record > 20)?;
        this.talks("before the save")?;
        Ok(this)
    }

    /// The connection carries more than is in any buffer, in both directions.
    fn talks(&mut self, when: &str) -> Result<()> {
        let enough = 16 << 10;
        let ours = self.tally.received.load(Ordering::Relaxed) + enough;
        let theirs = done(&self.guest.shown())?.received + enough;
        until(&mut self.guest, when, |d| {
            d.received > theirs && self.tally.received.load(Ordering::Relaxed) > ours
        })?;
        let ended = self.tally.ended.get();
        ensure!(ended.is_none(), "{when}: the connection ended: {ended:?}");
        Ok(())
    }
}

/// Saves into `directory`; returns how long the guest was stopped, if it runs on.
fn save(qmp: &mut Client, directory: &Path, resume: bool) -> Result<Value> {
    let uri = format!("file:{}", directory.display());
    qmp.execute_raw("migrate", json!({ "uri": uri, "resume": resume }))?;
    let info = qmp.execute_raw("query-migrate", json!({}))?;
    ensure!(info.get("status") == Some(&json!("completed")), "{info}");
    Ok(info)
}

/// A new process that resumes from `saved`, with `image` as its disk and on the given tap.
fn restore(story: &Story, saved: &Path, number: usize, image: &Path, tap: &str) -> Result<Monitor> {
    let dir = story.dir.join(number.to_string());
    fs::create_dir_all(&dir)?;
    let incoming = format!("file:{}", saved.display());
    let drive = format!("id=data,file={},direct=on", image.display());
    let netdev = format!("tap,id=net0,ifname={tap}");
    let args = ["-incoming", &incoming, "-drive", &drive, "-netdev", &netdev];
    Vm::described(json!({})).args(&args).start(&story.paths, &dir)
}

/// Every record that the guest acknowledged, up to `last`, is in its place in the image.
fn has_records(story: &Story, image: &Path, last: u64) -> Result<()> {
    let records = read_ext4(&story.debian, image, "/records")?;
    let mut found = 0;
    for (number, record) in (1..).zip(records.lines()) {
        let text = format!("record {number:>10}");
        // The last records may have been in flight: they are complete, or zero.
        if record.trim_end_matches('.') != text {
            break;
        }
        found = number;
    }
    ensure!(found >= last, "{last} records were acknowledged, {found} are in {}", image.display());
    Ok(())
}

/// The file system in `image` is consistent, as it is or after its journal has been replayed.
fn is_whole(story: &Story, image: &Path, unmounted: bool) -> Result<()> {
    if !unmounted {
        check_ext4(&story.debian, image, true)?;
    }
    check_ext4(&story.debian, image, false).map(drop)
}

/// The guest has noticed nothing, except from the wall clock.
fn is_well(guest: &mut Monitor, name: &str) -> Result<()> {
    let log = ask(guest, &format!("dmesg | grep -E '{BAD}' || true"))?;
    ensure!(log.is_empty(), "{name}: the kernel says\n{log}");
    let times = ask(guest, "cat /proc/uptime; date -u '+%F %T'")?;
    println!("{name}: uptime and date are {}", times.replace('\n', " and "));
    Ok(())
}

/// Resumes from `saved` as often as `shape` says; each time with a copy of `image` and on another
/// tap. With a peer, the first one is still connected to it; each runs `prepare` first.
fn again_and_again(
    story: &Story,
    shape: Shape,
    saved: &Path,
    image: &Path,
    before: Done,
    mut peer: Option<Arc<Tally>>,
    prepare: &str,
) -> Result<()> {
    for number in 0..shape.restores {
        let name = format!("restored {number}");
        let own = story.dir.join("own.img");
        copy_image(image, &own)?;
        let tap_name = format!("again{number}");
        // Only one of them can have the peer's address; the others have no peer.
        let address = if number == 0 { HOST.to_owned() } else { format!("10.8.{number}.1/24") };
        let tap = Tap::create(&story.debian, &tap_name, &address)?;
        let guest = restore(story, saved, number, &own, &tap_name)?;
        let tally = peer.take();
        let mut busy = Busy { guest, image: own, tap, tally: tally.clone().unwrap_or_default() };
        let first = until(&mut busy.guest, &name, |d| d.count > 0)?;
        ensure!(
            first.count >= before.count && first.clock >= before.clock,
            "{name}: {before:?} became {first:?}"
        );
        if tally.is_some() {
            busy.talks(&name)?;
        }
        if !prepare.is_empty() {
            ask(&mut busy.guest, prepare)?;
        }
        let after = until(&mut busy.guest, &name, |d| d.record > before.record + 5)?;
        is_well(&mut busy.guest, &name)?;
        // Every second one is killed without an unmount.
        let unmounted = number % 2 == 0;
        if unmounted {
            let stop = "killall load; while pidof load > /dev/null; do usleep 10000; done";
            ask(&mut busy.guest, &format!("{stop}; umount /mnt"))?;
        }
        let Busy { guest, image: own, tap, .. } = busy;
        drop((guest, tap));
        is_whole(story, &own, unmounted).with_context(|| name.clone())?;
        has_records(story, &own, after.record).with_context(|| name)?;
    }
    Ok(())
}

/// A plain save: the guest stays stopped, and the first restored one replaces it.
pub fn stopped(story: &Story, shape: Shape) -> Result<()> {
    let mut busy = Busy::start(story, shape)?;
    let mut qmp = busy.guest.qmp()?;
    let (saved, image) = (story.dir.join("saved"), story.dir.join("at-save.img"));
    let info = save(&mut qmp, &saved, false)?;
    copy_image(&busy.image, &image)?;
    println!("saved: {info}");
    let before = done(&busy.guest.shown())?;
    println!("saved at {before:?}");
    let Busy { guest, tap, tally, .. } = busy;
    drop((guest, tap));

    let look = story.dir.join("look.img");
    fs::copy(&image, &look)?;
    is_whole(story, &look, false)?;
    has_records(story, &look, before.record)?;
    again_and_again(story, shape, &saved, &image, before, Some(tally), "")
}

/// Saved while it runs on. Its file system is frozen, which copying a disk in use requires; reads,
/// the network and the counting continue.
pub fn live(story: &Story, shape: Shape) -> Result<()> {
    let mut busy = Busy::start(story, shape)?;
    let mut qmp = busy.guest.qmp()?;
    let (saved, image) = (story.dir.join("saved"), story.dir.join("at-save.img"));
    ask(&mut busy.guest, "fsfreeze --freeze /mnt")?;
    let before = done(&busy.guest.shown())?;
    let info = save(&mut qmp, &saved, true)?;
    println!("saved: {info}");
    let downtime = info.get("downtime").and_then(Value::as_u64).context("no downtime")?;
    println!("the guest was stopped for {downtime} ms");
    copy_image(&busy.image, &image)?;
    busy.talks("after the save")?;
    ask(&mut busy.guest, "fsfreeze --unfreeze /mnt")?;
    let after = until(&mut busy.guest, "after the save", |d| d.record > before.record + 5)?;
    is_well(&mut busy.guest, "saved")?;
    let Busy { guest, tap, image: own, .. } = busy;
    drop((guest, tap));
    is_whole(story, &own, false)?;
    has_records(story, &own, after.record)?;
    again_and_again(story, shape, &saved, &image, before, None, "fsfreeze --unfreeze /mnt")
}

/// Saved at `times` moments of its boot; whatever it was doing, it finishes booting in another
/// process.
pub fn any_moment(story: &Story, shape: Shape, times: usize) -> Result<()> {
    let image = story.dir.join("data.img");
    make_ext4(&story.debian, &image, 16 << 20, None)?;
    let seed = stories::seed::get()?;
    println!("{SEED}={seed}: {times} moments");
    let began = Instant::now();
    let (tap, mut whole) = boots(story, shape, &image)?;
    whole.wait_ready()?;
    let boot = began.elapsed();
    drop((whole, tap));
    let mut random = seed;
    for number in 0..times {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        // The first save is before the first instruction, the last some time after the last line.
        let part = if number == 0 { 0.0 } else { (random >> 40) as f64 / f64::from(1 << 24) };
        let moment = boot.mul_f64(part * 1.1);
        resumes(story, shape, &image, number, moment)
            .with_context(|| format!("moment {number}: {moment:?} of {boot:?}, {SEED}={seed}"))?;
    }
    Ok(())
}

fn boots(story: &Story, shape: Shape, image: &Path) -> Result<(Tap, Monitor)> {
    let tap = Tap::create(&story.debian, "boot0", HOST)?;
    let vm = shape.vm(story)?.disk("data", image, false).nic("net0", "boot0", MAC);
    Ok((tap, vm.start(&story.paths, &story.dir)?))
}

fn resumes(
    story: &Story,
    shape: Shape,
    image: &Path,
    number: usize,
    moment: Duration,
) -> Result<()> {
    let saved = story.dir.join("saved");
    let (tap, mut guest) = boots(story, shape, image)?;
    let mut qmp = guest.qmp()?;
    thread::sleep(moment);
    save(&mut qmp, &saved, false)?;
    let before = guest.shown();
    drop((guest, tap));

    let _tap = Tap::create(&story.debian, "boot1", HOST)?;
    let mut guest = restore(story, &saved, number, image, "boot1")?;
    let deadline = Instant::now() + BOOT;
    // The line itself may have been cut in two.
    while !format!("{before}{}", guest.shown()).contains("guest: ready") {
        ensure!(Instant::now() < deadline, "it does not come up; it said {}", guest.shown());
        thread::sleep(Duration::from_millis(5));
    }
    guest.sh("test -b /dev/vda && test -e /sys/class/net/eth0")?;
    let log = guest.sh(&format!("dmesg | grep -E '{BAD}' || true"))?;
    ensure!(log.is_empty(), "the kernel says\n{log}");
    guest.type_in("poweroff -f\n")?;
    ensure!(guest.wait_exit()?.code() == Some(0));
    fs::remove_dir_all(&saved)?;
    Ok(())
}
