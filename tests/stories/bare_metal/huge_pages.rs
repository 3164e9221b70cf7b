//! Guest memory in a hugetlbfs: the host has to have the pages, and keeps them for the guest.
use std::fs::{self, File};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use stories::monitor::{SOON, Vm};

use crate::stage::{Stage, patiently, quits};

/// Raises the kernel's number of huge pages by what a test needs; restored when dropped.
struct HugePages {
    before: u64,
    /// One test at a time changes the number, whichever process it is in.
    _lock: File,
}

impl HugePages {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn read() -> Result<u64> {
        Ok(fs::read_to_string(Self::POOL)?.trim().parse()?)
    }

    /// `None` when the host cannot provide that many.
    fn reserve(count: u64) -> Result<Option<Self>> {
        let lock = File::open(Self::POOL)?;
        lock.lock()?;
        let before = Self::read()?;
        let reserved = Self { before, _lock: lock };
        // The kernel allocates what it can, or refuses for lack of rights.
        if reserved.add(count).is_err() {
            return Ok(None);
        }
        Ok((Self::read()? == before + count).then_some(reserved))
    }

    /// Adds `count` pages to those that were there before.
    fn add(&self, count: u64) -> Result<()> {
        Ok(fs::write(Self::POOL, (self.before + count).to_string())?)
    }

    /// Removes all pages that are neither used nor reserved.
    fn take_away(&self) -> Result<()> {
        Ok(fs::write(Self::POOL, "0")?)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::POOL, self.before.to_string());
    }
}

#[test]
fn memory_of_huge_pages() -> Result<()> {
    let mut stage = Stage::new("huge")?;
    let dir = stage.file("pages");
    fs::create_dir(&dir)?;
    stage.prepare("-m", &format!("mount -t hugetlbfs none {}", dir.display()))?;
    let vm = stage.vm("hello", "halt")?.machine("mem_path", dir.to_string_lossy());
    // 32 MiB, in pages of 2 MiB. Without them the monitor does not start.
    let Some(_pages) = HugePages::reserve(16)? else {
        println!("This host gives no 32 MiB of huge pages: only the refusal is shown.");
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        monitor.wait_said("sysctl vm.nr_hugepages=16")?;
        ensure!(monitor.wait_exit()?.code() == Some(1));
        return Ok(());
    };
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("halts\n", SOON)?;
    let maps = fs::read_to_string(format!("/proc/{}/smaps", monitor.pid()))?;
    let huge = maps.split("VmFlags").filter(|map| map.contains("KernelPageSize:     2048 kB"));
    let sizes: Vec<_> =
        huge.filter_map(|map| map.lines().find(|l| l.starts_with("Size:"))).collect();
    ensure!(sizes == ["Size:              32768 kB"], "{sizes:?}");
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_guest_outlives_a_pool_of_huge_pages_that_others_have_emptied() -> Result<()> {
    const MIB: u64 = 32;
    let mut stage = Stage::new("huge-pool")?;
    let dir = stage.file("pages");
    fs::create_dir(&dir)?;
    stage.prepare("-m", &format!("mount -t hugetlbfs none {}", dir.display()))?;
    let Some(pages) = HugePages::reserve(MIB / 2)? else {
        println!("This host gives no {MIB} MiB of huge pages: not run.");
        return Ok(());
    };
    let mut config = stage.config("balloon", &MIB.to_string())?;
    let sections = config.as_object_mut().context("no object")?;
    sections.insert("balloon".into(), json!({ "deflate_on_oom": true }));
    // Shared: a private mapping keeps a reservation of its own.
    let vm = Vm::described(config)
        .machine("mem_size", MIB << 20)
        .machine("mem_path", dir.to_string_lossy())
        .args(&["-machine", "mem-share=on"]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    for resets in 0..2 {
        monitor.wait_for("filled", SOON)?;
        qmp.execute_raw("balloon", json!({ "value": (MIB << 20) - (8 << 20) }))?;
        monitor.wait_for("balloon 800\n", SOON)?;
        // Leaves only the pages that are used or reserved.
        pages.take_away()?;
        qmp.execute_raw("balloon", json!({ "value": MIB << 20 }))?;
        monitor.wait_for("balloon 0\n", SOON)?;
        monitor.type_in("c")?;
        monitor.wait_for("checked", SOON)?;
        if resets == 0 {
            // A reset frees all pages before it reserves them again, and what the pool has no room
            // for does not stay in it.
            pages.add(MIB / 2)?;
            patiently(&mut qmp, "system_reset", &json!({}))?;
        }
    }
    let property = json!({ "path": "balloon0", "property": "reclaimed-memory" });
    let reclaimed = qmp.execute_raw("qom-get", property)?;
    // What was in the balloon, before the reset and after it.
    ensure!(reclaimed == json!({ "returned": 0, "refused": 16 << 20 }), "{reclaimed}");
    quits(&stage, &mut monitor, &mut qmp)
}
