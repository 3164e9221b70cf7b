//! Saved states that were damaged, moved to another host or forged, and files that change while a
//! machine uses them: each is reported by name.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::{Cap, Kvm};
use qmp::client::Client;
use serde::de::IgnoredAny;
use serde_json::json;
use stories::monitor::{Monitor, SOON, Vm};

use crate::plug::with_taps;
use crate::snapshot::{counters, counting, refusal, restore, save};
use crate::stage::{Stage, quits, simple, status};

/// The `state` file, as its parts: the kind of each frame and its body.
struct State {
    version: u32,
    frames: Vec<(u32, Vec<u8>)>,
}

const CONFIG: u32 = 1;
const SECTION: u32 = 2;
const SUMS: u32 = 3;
const END: u32 = 4;

impl State {
    fn read(saved: &Path) -> Result<Self> {
        let bytes = fs::read(saved.join("state"))?;
        let word = |at: usize| -> Result<u32> {
            let bytes = bytes.get(at..at + 4).context("a short state")?;
            Ok(u32::from_le_bytes(bytes.try_into()?))
        };
        let (version, mut at, mut frames) = (word(8)?, 16, Vec::new());
        while at < bytes.len() {
            let (kind, length) = (word(at)?, usize::try_from(word(at + 4)?)?);
            let body = bytes.get(at + 8..at + 8 + length).context("a short state")?;
            frames.push((kind, body.to_vec()));
            at += 12 + length;
        }
        Ok(Self { version, frames })
    }

    /// Writes it with correct checksums, whatever the contents.
    fn write(&self, saved: &Path) -> Result<()> {
        let mut bytes = b"STRATOCP".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut all = crc32fast::Hasher::new();
        for (kind, body) in &self.frames {
            let mut frame = kind.to_le_bytes().to_vec();
            frame.extend(u32::try_from(body.len())?.to_le_bytes());
            frame.extend(body);
            // The end has a checksum over all.
            if let (END, Some(sum)) = (*kind, frame.last_chunk_mut::<4>()) {
                *sum = all.clone().finalize().to_le_bytes();
            }
            let sum = crc32fast::hash(&frame).to_le_bytes();
            all.update(&sum);
            bytes.extend(frame);
            bytes.extend(sum);
        }
        Ok(fs::write(saved.join("state"), bytes)?)
    }

    /// Where each frame begins, and the end.
    fn borders(&self) -> Vec<usize> {
        let mut borders = vec![16];
        for (_, body) in &self.frames {
            borders.push(borders.last().copied().unwrap_or(0) + body.len() + 12);
        }
        borders
    }

    /// Changes one value in the section of that kind and id; the configuration is "config". The
    /// value is the one that follows `path`: each word of it is searched for after the one before.
    fn edit(&mut self, name: &str, path: &[&str], change: impl Fn(&str) -> String) -> Result<()> {
        let (kind, id) = name.split_once(' ').unwrap_or((name, ""));
        let begins = format!(r#"{{"kind":"{kind}","id":"{id}""#);
        for (number, body) in &mut self.frames {
            if ![CONFIG, SECTION].contains(number) || !body.starts_with(begins.as_bytes()) {
                continue;
            }
            let mut at = 0;
            let mut rest = str::from_utf8(body.get(at..).unwrap_or_default())?;
            for word in path {
                let found = rest.find(word).with_context(|| format!("no {word} in {name}"))?;
                at += found + word.len();
                rest = rest.get(found + word.len()..).unwrap_or_default();
            }
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<IgnoredAny>();
            values.next().context("no value")??;
            let length = values.byte_offset();
            let new = change(rest.get(..length).unwrap_or_default());
            body.splice(at..at + length, new.into_bytes());
            return Ok(());
        }
        bail!("no section {name}")
    }
}

/// A saved state of a guest that counts, and its directory.
pub fn saved(story: &str) -> Result<(Stage, PathBuf)> {
    let (stage, mut monitor, mut qmp) = counting(story, 1)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    Ok((stage, saved))
}

/// Everything in `saved`, as it is now.
pub fn contents(saved: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    fs::read_dir(saved)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
        })
        .collect()
}

/// It resumes from `saved`, and nothing is lost since `before`.
pub fn resumes(stage: &Stage, saved: &Path, before: &[u64]) -> Result<()> {
    let (mut monitor, mut qmp) = restore(stage, saved, &[])?;
    simple(&mut qmp, "cont")?;
    let again = stage.file("again");
    save(&mut qmp, &again, false)?;
    ensure!(counters(&again, 1)?.as_slice() >= before);
    ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
    quits(stage, &mut monitor, &mut qmp)
}

/// The restore is refused, with a message that contains all of `says`.
fn refused(stage: &Stage, saved: &Path, args: &[&str], says: &[&str]) -> Result<()> {
    let said = refusal(stage, saved, args)?;
    for words in says {
        ensure!(said.contains(words), "it does not say '{words}': {said}");
    }
    Ok(())
}

/// The same state, with its memory copied and checked rather than mapped.
pub fn checked(saved: &Path) -> PathBuf {
    let mut saved = saved.as_os_str().to_owned();
    saved.push(",mapped=off");
    saved.into()
}

/// Pseudo-random numbers.
struct Chance(u64);

impl Chance {
    fn new() -> Self {
        let seed = RandomState::new().hash_one(0);
        println!("seed {seed:#x}");
        Self(seed)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as usize % end
    }
}

#[test]
fn what_another_host_or_version_has_saved_is_refused_by_name() -> Result<()> {
    let (stage, saved) = saved("hostile-host")?;
    let whole = fs::read(saved.join("state"))?;
    let version = State::read(&saved)?.version;
    let refuses = |change: &dyn Fn(&mut State) -> Result<()>, says: &[&str]| -> Result<()> {
        let mut state = State::read(&saved)?;
        change(&mut state)?;
        state.write(&saved)?;
        refused(&stage, &saved, &[], says)?;
        Ok(fs::write(saved.join("state"), &whole)?)
    };
    for other in [version + 1, version - 1, u32::MAX] {
        let set = |state: &mut State| {
            state.version = other;
            Ok(())
        };
        let (found, known) = (format!("version {other};"), format!("reads version {version}"));
        refuses(&set, &["state", &found, &known])?;
    }
    let leaf = |state: &mut State, function: &str, word: &str, value: u32| {
        state.edit("cpu", &[function, word], |_| format!("\"{value:#x}\""))
    };
    // "GenuineTMx86", which this host is not.
    let vendor = |state: &mut State| {
        leaf(state, "\"function\":\"0x0\"", "\"ebx\":", 0x756e_6547)?;
        leaf(state, "\"function\":\"0x0\"", "\"edx\":", 0x5465_6e69)?;
        leaf(state, "\"function\":\"0x0\"", "\"ecx\":", 0x3638_784d)
    };
    refuses(&vendor, &["CPU by", "GenuineTMx86"])?;
    // No CPU has all of them: bit 16 is reserved.
    let features = |state: &mut State| leaf(state, "\"function\":\"0x1\"", "\"ecx\":", u32::MAX);
    refuses(&features, &["CPU feature", "CPUID 0x1.0 ECX bit", "this host"])?;
    // Another architecture's vCPU has other registers.
    let foreign =
        |state: &mut State| state.edit("vcpu 0", &["\"state\":"], |_| r#"{"x0":0,"pc":0}"#.into());
    refuses(&foreign, &["section \"vcpu 0\"", "unknown field `x0`"])?;
    // KVM accepts a guest clock faster than the host's everywhere, a slower one only where it can
    // scale.
    let slower = |state: &mut State| {
        let half = |khz: &str| (khz.parse().unwrap_or(0) / 2).to_string();
        state.edit("vcpu 0", &["\"tsc_khz\":"], half)
    };
    if Kvm::new()?.check_extension(Cap::TscControl) {
        let mut state = State::read(&saved)?;
        slower(&mut state)?;
        state.write(&saved)?;
        resumes(&stage, &saved, &counters(&saved, 1)?)?;
    } else {
        refuses(&slower, &["TSC ticks at", "kHz", "cannot scale"])?;
    }
    Ok(())
}

#[test]
fn a_state_cut_off_at_any_border_or_with_a_bit_flipped_is_refused_by_name() -> Result<()> {
    let (stage, saved) = saved("hostile-cut")?;
    let path = saved.join("state");
    let whole = fs::read(&path)?;
    for border in State::read(&saved)?.borders() {
        for length in [border.saturating_sub(1), border, border + 1] {
            if length < whole.len() {
                fs::write(&path, whole.get(..length).unwrap_or_default())?;
                refused(&stage, &saved, &[], &["state cannot be restored", "it ends at byte"])?;
            }
        }
    }
    let mut chance = Chance::new();
    for _ in 0..50 {
        let (at, bit) = (chance.below(whole.len()), chance.below(8));
        let mut flipped = whole.clone();
        *flipped.get_mut(at).context("beyond its end")? ^= 1 << bit;
        fs::write(&path, flipped)?;
        refused(&stage, &saved, &[], &["state cannot be restored"])
            .with_context(|| format!("byte {at}, bit {bit}"))?;
    }
    fs::write(&path, whole)?;
    // In memory, where it is copied and compared.
    let memory = File::options().read(true).write(true).open(saved.join("memory"))?;
    for _ in 0..10 {
        let at = chance.below(32 << 20) as u64;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at)?;
        memory.write_all_at(&[byte[0] ^ 0x20], at)?;
        refused(&stage, &checked(&saved), &[], &["memory cannot be used", "damaged"])?;
        memory.write_all_at(&byte, at)?;
    }
    resumes(&stage, &saved, &counters(&saved, 1)?)
}

#[test]
fn counts_and_lengths_that_lie_are_refused_by_name() -> Result<()> {
    let (stage, saved) = saved("hostile-lies")?;
    let whole = State::read(&saved)?;
    let many = |item: &str| format!("[{}]", vec![item; 100_000].join(","));
    let leaf = r#"{"function":"0x1","index":"0x0","flags":"0x0","eax":"0x0","ebx":"0x0","ecx":"0x0","edx":"0x0"}"#;
    let leaves = many(leaf);
    let (vcpu, serial) = ("section \"vcpu 0\"", "serial-16550 serial0");
    let chips = "interrupt-controllers";
    let lies: [(&str, &[&str], &str, &str); 23] = [
        ("config", &["\"size\":"], "4611686018427387904", "bytes of memory"),
        ("config", &["\"size\":"], "33554433", "bytes of memory"),
        ("config", &["\"size\":"], "67108864", "checksums for 32 blocks"),
        ("config", &["\"vcpus\":"], "0", "vCPUs"),
        ("config", &["\"vcpus\":"], "2", "topology"),
        ("config", &["\"threads\":"], "1048576", "the configuration"),
        ("config", &["\"machine\":"], r#"{"unknown":1}"#, "unknown field"),
        ("config", &["\"slots\":", "\"interrupt\":"], "9", "no slot is at address"),
        ("cpu", &["\"cpuid\":"], &leaves, "CPUID leaves"),
        ("cpu", &["\"cpuid\":"], "[]", "CPU by"),
        ("vcpu 0", &["\"msrs\":"], "[[\"0x1\"]]", vcpu),
        ("vcpu 0", &["\"lapic\":"], "\"00\"", "1024 were expected"),
        ("vcpu 0", &["\"lapic\":"], "[1,2]", vcpu),
        ("vcpu 0", &["\"xcrs\":"], "\"x\"", vcpu),
        ("vcpu 0", &["\"xsave\":"], "\"000102\"", "XSAVE area of 3 bytes"),
        ("vcpu 0", &["\"tsc_khz\":"], "-1", vcpu),
        (chips, &["\"redirtbl\":"], "[]", chips),
        (chips, &["\"channels\":"], "[]", chips),
        ("clock", &["\"nanoseconds\":"], "\"never\"", "section \"clock\""),
        (serial, &["\"version\":"], "77", "of version 77, and this program knows versions up to"),
        (serial, &["\"kind\":"], "\"toaster\"", "toaster"),
        (serial, &["\"state\":"], "[]", serial),
        ("cmos cmos", &["\"ram\":"], "\"00\"", "128 were expected"),
    ];
    for (section, path, lie, says) in lies {
        let mut state = State { version: whole.version, frames: whole.frames.clone() };
        state.edit(section, path, |_| lie.to_owned())?;
        state.write(&saved)?;
        refused(&stage, &saved, &[], &[says]).with_context(|| format!("{section} {path:?}"))?;
    }
    // One part more, one less, and sections before what they belong to.
    for (change, says) in [
        (0, "section \"vcpu 0\" is duplicated"),
        (1, "no section for nic1"),
        (2, "was expected"),
        (3, "section \"cpu\" is missing"),
        (4, "checksums"),
    ] {
        let mut state = State { version: whole.version, frames: whole.frames.clone() };
        let sums = state.frames.iter().position(|f| f.0 == SUMS).context("no checksums")?;
        let frames = &mut state.frames;
        match change {
            0 => frames.insert(2, frames.get(2).context("no vCPU")?.clone()),
            1 => drop(frames.remove(sums - 1)),
            2 => frames.swap(0, 1),
            3 => drop(frames.remove(1)),
            _ => frames.get_mut(sums).context("no checksums")?.1.truncate(5),
        }
        state.write(&saved)?;
        refused(&stage, &saved, &[], &[says]).with_context(|| format!("change {change}"))?;
    }
    Ok(())
}

/// Whatever numbers a state holds, it is refused, or gives a machine that answers and ends on
/// request; its guest may be unusable.
#[test]
fn made_up_numbers_do_no_harm() -> Result<()> {
    let (stage, saved) = saved("hostile-numbers")?;
    let whole = State::read(&saved)?;
    let mut chance = Chance::new();
    let (mut taken, mut refused) = (0, 0);
    for round in 0..150 {
        let mut state = State { version: whole.version, frames: whole.frames.clone() };
        for _ in 0..=chance.below(3) {
            let index = chance.below(state.frames.len() - 2);
            let Some((kind, body)) = state.frames.get_mut(index) else { continue };
            if ![CONFIG, SECTION].contains(kind) {
                continue;
            }
            // A number in the JSON becomes another one.
            let digits: Vec<_> = (1..body.len())
                .filter(|at| {
                    body.get(*at).is_some_and(u8::is_ascii_digit)
                        && body.get(at - 1).is_some_and(|b| b":,[x".contains(b))
                })
                .collect();
            let Some(at) = digits.get(chance.below(digits.len().max(1))) else { continue };
            let rest = body.get(*at..).unwrap_or_default();
            let length = rest.iter().take_while(|b| b.is_ascii_digit()).count();
            let numbers = ["0", "1", "255", "65535", "4294967295", "18446744073709551615", "4096"];
            let other = numbers.get(chance.below(numbers.len())).unwrap_or(&"0");
            body.splice(*at..at + length, other.bytes());
        }
        state.write(&saved)?;
        let incoming = format!("file:{}", saved.display());
        let vm = Vm::described(json!({})).args(&["-incoming", &incoming]);
        let mut monitor = vm.start(&stage.paths, &stage.dir)?;
        if let Ok(mut qmp) = monitor.qmp() {
            taken += 1;
            // The guest may have ended it already.
            let _ = qmp.execute_raw("query-status", json!({}));
            let _ = qmp.execute_raw("quit", json!({}));
        } else {
            refused += 1;
        }
        let status = monitor.wait_exit()?;
        let said = monitor.said_to_its_end()?;
        ensure!(
            matches!(status.code(), Some(0 | 1)) && !said.contains("panicked"),
            "round {round}: {status}: {said}"
        );
    }
    println!("{taken} were taken, {refused} refused");
    ensure!(taken > 0 && refused > 0, "{taken} were taken, {refused} refused");
    Ok(())
}

#[test]
fn memory_that_is_not_as_it_was_saved_is_refused_by_name() -> Result<()> {
    let (stage, saved) = saved("hostile-memory")?;
    let before = counters(&saved, 1)?;
    let (memory, aside) = (saved.join("memory"), saved.join("aside"));
    fs::rename(&memory, &aside)?;
    refused(&stage, &saved, &[], &["cannot open", "memory"])?;
    fs::create_dir(&memory)?;
    refused(&stage, &saved, &[], &["cannot open", "memory", "not a regular file"])?;
    fs::remove_dir(&memory)?;
    // The file is valid without its holes, or with more of them.
    fs::write(&memory, fs::read(&aside)?)?;
    resumes(&stage, &saved, &before)?;
    let length = fs::metadata(&memory)?.len();
    for other in [0, 1, length - 4096, length - 1, length + 1, 1 << 40] {
        File::options().write(true).open(&memory)?.set_len(other)?;
        let said = [format!("it has {other} bytes"), format!("needs {length}")];
        refused(&stage, &saved, &[], &["memory cannot be used", &said[0], &said[1]])?;
    }
    // Of the same length, and all holes.
    File::create(&memory)?.set_len(length)?;
    refused(&stage, &saved, &[], &["memory cannot be used", "another state"])?;
    fs::rename(&aside, &memory)?;
    resumes(&stage, &saved, &before)
}

/// A machine that has the memory file of a state mapped, and that file truncated to `left` bytes.
fn on_a_file_cut_off(stage: &Stage, left: u64) -> Result<(Monitor, Client, PathBuf)> {
    let image = stage.file("image");
    File::create(&image)?.set_len(1 << 20)?;
    let vm = stage.vm("blk", "race")?.machine("vcpu_count", 2).disk("vda", &image, true);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("capacity 800\n", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(stage, &mut monitor, &mut qmp)?;
    let (monitor, qmp) = restore(stage, &saved, &[])?;
    let memory = saved.join("memory");
    File::options().write(true).open(&memory)?.set_len(left)?;
    Ok((monitor, qmp, memory))
}

#[test]
fn a_memory_file_cut_off_under_a_vcpu_ends_the_machine_with_a_word() -> Result<()> {
    let stage = Stage::new("hostile-cut-vcpu")?;
    let (mut monitor, mut qmp, _) = on_a_file_cut_off(&stage, 0)?;
    // The connection may end before the answer.
    let _ = qmp.execute_raw("cont", json!({}));
    let status = monitor.wait_exit()?;
    let said = monitor.said_to_its_end()?;
    ensure!(status.code() == Some(1), "it ended with {status}: {said}");
    // The first access reports it: KVM for the vCPU, or a signal for its devices.
    ensure!(said.contains("guest memory") && said.contains("was truncated"), "{said}");
    Ok(())
}

#[test]
fn a_memory_file_cut_off_under_a_device_ends_the_machine_with_a_word() -> Result<()> {
    let stage = Stage::new("hostile-cut-device")?;
    // Only the disk reads the guest's SPARE_HEADER.
    let (mut monitor, mut qmp, memory) = on_a_file_cut_off(&stage, 8 << 20)?;
    let _ = qmp.execute_raw("cont", json!({}));
    let status = monitor.wait_exit()?;
    let said = monitor.said_to_its_end()?;
    ensure!(status.code() == Some(1), "it ended with {status}: {said}");
    let from = format!("cannot read a page of guest memory from {}", memory.display());
    ensure!(said.contains(&from), "{said}");
    Ok(())
}

#[test]
fn a_memory_file_cut_off_is_not_taken_for_memory_of_zeros() -> Result<()> {
    let stage = Stage::new("hostile-cut-save")?;
    let (mut monitor, mut qmp, _) = on_a_file_cut_off(&stage, 8 << 20)?;
    let other = stage.file("other");
    for resume in [false, true] {
        let uri = format!("file:{}", other.display());
        let error = match qmp.execute_raw("migrate", json!({ "uri": uri, "resume": resume })) {
            Ok(_) => bail!("memory that has gone was saved"),
            Err(error) => error.to_string(),
        };
        ensure!(error.contains("truncated: 8388608 of 33554432 bytes are left"), "{error}");
        ensure!(!other.exists() && status(&mut qmp)? == "paused");
    }
    quits(&stage, &mut monitor, &mut qmp)
}

#[test]
fn a_memory_file_overwritten_under_a_machine_harms_the_guest_alone() -> Result<()> {
    let (stage, saved) = saved("hostile-overwritten")?;
    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    let memory = File::options().write(true).open(saved.join("memory"))?;
    memory.write_all_at(&vec![0xff; 32 << 20], 0)?;
    let _ = qmp.execute_raw("cont", json!({}));
    // It executes garbage: a triple fault or an instruction that cannot be emulated.
    let status = monitor.wait_exit()?;
    ensure!(matches!(status.code(), Some(0 | 1)), "it ended with {status}: {}", monitor.said());
    // The next restore that checks memory reports it.
    refused(&stage, &checked(&saved), &[], &["memory cannot be used", "damaged"])
}

#[test]
fn a_tap_that_is_not_there_is_named_and_another_may_take_its_place() -> Result<()> {
    let mut stage = Stage::new("hostile-tap")?;
    with_taps(&mut stage, "")?;
    let vm = stage.vm("count", "registers 1")?.nic("net0", "tap0", "52:54:00:00:00:01");
    let (mut monitor, mut qmp) = stage.start(vm)?;
    monitor.wait_for("processors 1", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let missing = "tap,id=net0,ifname=tap7";
    let says = ["net0", "tap7", "ip tuntap add"];
    refused(&stage, &saved, &["-netdev", missing], &says)?;
    let stranger = "tap,id=net5,ifname=tap1";
    let two = ["-netdev", stranger, "-netdev", "tap,id=net0,ifname=tap0"];
    refused(&stage, &saved, &two, &["no NIC 'net5'", "net0"])?;
    for args in [&[][..], &["-netdev", "tap,id=net0,ifname=tap1"]] {
        let (mut monitor, mut qmp) = restore(&stage, &saved, args)?;
        simple(&mut qmp, "cont")?;
        simple(&mut qmp, "stop")?;
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}
