//! What is restored is what was saved, bit for bit: a guest is saved at each kind of exit,
//! restored, saved again at once, and both states and memories are compared. The differences that
//! are allowed are listed here.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::Value;
use stories::monitor::{Monitor, SOON};

use crate::snapshot::{counters, restore, save};
use crate::stage::{Stage, quits, simple};

/// Bytes of each guest's memory.
const MEMORY: usize = 32 << 20;

/// Where a saved state differs from the one it was restored from. `#` is any number.
const DIFFERS: [&str; 7] = [
    // Each save has its own id.
    "config/id",
    // The TSC, on a host whose guests read the host's.
    "vcpu #/msrs/0x10",
    // The current count, of a timer that runs.
    "vcpu #/timer",
    // When the counts of the PIT's channels were set, by the host's clock.
    "interrupt-controllers/pit/channels/#/count_load_time",
    // The generation id is new: the event, and its interrupt at both PICs.
    "acpi-power power/events",
    "interrupt-controllers/pic_master/irr",
    "interrupt-controllers/pic_slave/irr",
];

/// Where memory differs.
const BYTES: [Range<usize>; 4] = [
    // The generation id.
    0xdf010..0xdf020,
    // Version and flags of the guest's clock: KVM withdraws its promise that the clock is the same
    // on all CPUs, until it runs again.
    0x50_0000..0x50_0004,
    0x50_001d..0x50_001e,
    // The wall clock that the guest has requested: the time when its clock showed 0.
    0x50_1000..0x50_100c,
];

/// Every section of a state, as JSON.
fn sections(saved: &Path) -> Result<BTreeMap<String, Value>> {
    let bytes = fs::read(saved.join("state"))?;
    let mut rest = bytes.strip_prefix(b"STRATOCP").and_then(|r| r.get(8..)).context("no state")?;
    let mut sections = BTreeMap::new();
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let [kind, _, _, _, length @ ..] = *head;
        let length = usize::try_from(u32::from_le_bytes(length))?;
        let (body, tail) = tail.split_at_checked(length).context("a frame that is cut off")?;
        rest = tail.get(4..).context("a frame without its checksum")?;
        // The configuration, and sections.
        if ![1, 2].contains(&kind) {
            continue;
        }
        let mut section: Value = serde_json::from_slice(body)?;
        let word = |name: &str| section.get(name).and_then(Value::as_str).context("no name");
        let name = format!("{} {}", word("kind")?, word("id")?).trim_end().to_owned();
        let mut state = section.get_mut("state").context("no state")?.take();
        readable(&mut state)?;
        ensure!(sections.insert(name.clone(), state).is_none(), "two sections {name}");
    }
    Ok(sections)
}

/// Names the allowed differences.
fn readable(section: &mut Value) -> Result<()> {
    if let Some(Value::Array(pairs)) = section.get("msrs") {
        let named = pairs.iter().map(|pair| {
            let index = pair.get(0).and_then(Value::as_str).context("an MSR without number")?;
            Ok((index.to_owned(), pair.get(1).cloned().unwrap_or_default()))
        });
        section["msrs"] = named.collect::<Result<serde_json::Map<_, _>>>()?.into();
    }
    if let Some(Value::String(registers)) = section.get_mut("lapic") {
        // Two digits for each byte.
        let timer = registers.get(0x390 * 2..0x394 * 2).context("a short page")?.to_owned();
        registers.replace_range(0x390 * 2..0x394 * 2, "");
        section["timer"] = timer.into();
    }
    Ok(())
}

fn differences(path: &str, one: &Value, other: &Value, found: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            a.iter().zip(b.values()).for_each(|((key, a), b)| {
                differences(&format!("{path}/{key}"), a, b, found);
            });
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(at, (a, b))| {
                differences(&format!("{path}/{at}"), a, b, found);
            });
        }
        _ if one == other => {}
        _ => found.push(format!("{path}: {one} is now {other}")),
    }
}

/// Whether the difference is an allowed one.
fn allowed(difference: &str) -> bool {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let parts = |text: &str| text.split(['/', ' ']).map(str::to_owned).collect::<Vec<_>>();
    let path = parts(difference.split(':').next().unwrap_or_default());
    DIFFERS.iter().any(|pattern| {
        let pattern = parts(pattern);
        let same = |(p, part): (&String, &String)| p == part || (p == "#" && digits(part));
        path.len() == pattern.len() && pattern.iter().zip(&path).all(same)
    })
}

/// Both saved machines are the same.
fn same(before: &Path, after: &Path) -> Result<()> {
    let (one, other) = (sections(before)?, sections(after)?);
    ensure!(one.keys().eq(other.keys()), "{:?}\n{:?}", one.keys(), other.keys());
    let mut found = Vec::new();
    for (name, value) in &one {
        differences(name, value, other.get(name).context("no such section")?, &mut found);
    }
    found.retain(|difference| !allowed(difference));
    ensure!(found.is_empty(), "{}", found.join("\n"));

    let memory = |saved: &Path| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(saved.join("memory"))?.take(MEMORY as u64).read_to_end(&mut bytes)?;
        ensure!(bytes.len() == MEMORY);
        Ok(bytes)
    };
    let (one, other) = (memory(before)?, memory(after)?);
    let pages = (0..).step_by(4096).zip(one.chunks(4096).zip(other.chunks(4096)));
    let bytes = pages.filter(|(_, (a, b))| a != b).flat_map(|(page, (a, b))| {
        a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b).map(move |(at, _)| page + at)
    });
    let differ = bytes.filter(|at| !BYTES.iter().any(|range| range.contains(at)));
    let differ: Vec<usize> = differ.take(10).collect();
    ensure!(differ.is_empty(), "memory differs at {differ:#x?}");
    Ok(())
}

/// Saved, restored and saved again at once, twice; afterwards the guest still runs.
fn again_and_again(
    stage: &Stage,
    mut monitor: Monitor,
    mut qmp: Client,
    words: &str,
) -> Result<()> {
    let mut saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    for round in 0..2 {
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(stage, &mut monitor, &mut qmp)?;
        (monitor, qmp) = restore(stage, &saved, &["-append", words])?;
        let again = stage.file(&format!("again{round}"));
        save(&mut qmp, &again, false)?;
        same(&saved, &again).with_context(|| format!("round {round}"))?;
        saved = again;
    }
    let before = counters(&saved, 1)?;
    let last = stage.file("last");
    let deadline = Instant::now() + SOON;
    while !words.starts_with("sleep") {
        simple(&mut qmp, "cont")?;
        save(&mut qmp, &last, false)?;
        if counters(&last, 1)? > before {
            break;
        }
        ensure!(Instant::now() < deadline, "it does not continue");
    }
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(stage, &mut monitor, &mut qmp)
}

fn exact(story: &str, words: &str, cpus: u64) -> Result<()> {
    let stage = Stage::new(story)?;
    let vm = stage.vm("exits", words)?.machine("vcpu_count", cpus);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for("ready\n", SOON)?;
    // Into the middle of the operation.
    std::thread::sleep(Duration::from_millis(5));
    again_and_again(&stage, monitor, qmp, words)
}

#[test]
fn at_port_accesses() -> Result<()> {
    exact("exact-in", "port-in ", 1)?;
    exact("exact-out", "port-out ", 1)?;
    exact("exact-ins", "string-in ", 1)?;
    exact("exact-outs", "string-out ", 1)
}

#[test]
fn at_register_accesses() -> Result<()> {
    exact("exact-read", "register-read ", 1)?;
    exact("exact-write", "register-write ", 1)?;
    exact("exact-reads", "across-pages-read ", 1)?;
    exact("exact-writes", "across-pages-write ", 1)
}

#[test]
fn asleep_and_between_ticks() -> Result<()> {
    exact("exact-sleep", "sleep ", 1)?;
    exact("exact-wait", "wait ", 1)
}

#[test]
fn in_an_interrupt_handler() -> Result<()> {
    exact("exact-irq", "handler ", 1)
}

#[test]
fn without_any_exit() -> Result<()> {
    exact("exact-spin", "spin ", 1)
}

#[test]
fn with_others_that_run_and_others_that_were_never_begun() -> Result<()> {
    exact("exact-four", "register-read others", 4)?;
    exact("exact-sipi", "register-read ", 4)
}

#[test]
fn before_the_first_instruction() -> Result<()> {
    let stage = Stage::new("exact-first")?;
    let vm = stage.vm("exits", "spin ")?.machine("vcpu_count", 4);
    let mut monitor = vm.args(&["-S"]).start(&stage.paths, &stage.dir)?;
    let qmp = monitor.qmp()?;
    again_and_again(&stage, monitor, qmp, "spin ")
}
