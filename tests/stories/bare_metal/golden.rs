//! States that released programs have saved are restored and run here. The parts that depend on the
//! CPU of the saving host are replaced by this host's; the guests use only registers that every CPU
//! has.
use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use state::State;
use state::cpu::Vcpu;
use stories::monitor::SOON;
use stories::paths::workspace;

use crate::hostile_snapshot::resumes;
use crate::plug::{found, marked, with_taps};
use crate::snapshot::{counters, restore, save};
use crate::stage::{Stage, quits, simple};

/// The directories of golden files whose names have that suffix, one for each release that saved
/// them.
fn golden(name: &str) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(workspace().join("state/tests/golden"))? {
        let path = entry?.path();
        if path.is_dir() && path.to_string_lossy().ends_with(&format!("-{name}")) {
            all.push(path);
        }
    }
    ensure!(!all.is_empty(), "there is no golden file -{name}");
    Ok(all)
}

/// Copies all of `from` into `to`, with its memory unpacked.
fn unpack(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let name = path.file_name().context("no name")?;
        if path.is_dir() {
            unpack(&path, &to.join(name))?;
        } else if name == "memory.xz" {
            let mut packed = BufReader::new(File::open(&path)?);
            let mut memory = BufWriter::new(File::create(to.join("memory"))?);
            lzma_rs::xz_decompress(&mut packed, &mut memory).map_err(|e| anyhow!("{e:?}"))?;
        } else {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// Gives the state in `saved` the CPU of a machine on this host.
fn with_the_cpu_of(here: &State, saved: &Path) -> Result<()> {
    let path = saved.join("state");
    let mut state = State::read(BufReader::new(File::open(&path)?))?;
    let own = here.sections.vcpus.first().context("no vCPU")?;
    state.sections.cpu = here.sections.cpu.clone();
    for vcpu in &mut state.sections.vcpus {
        let Vcpu { xsave, xcrs, msrs, tsc_khz, nested, .. } = own.clone();
        *vcpu = Vcpu { xsave, xcrs, msrs, tsc_khz, nested, ..vcpu.clone() };
    }
    Ok(state.write(BufWriter::new(File::create(&path)?))?)
}

/// A state saved on this host by this build.
fn state_of_this_host(story: &str) -> Result<State> {
    let stage = Stage::new(story)?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("count", "registers 1")?)?;
    monitor.wait_for("processors 1", SOON)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    Ok(State::read(BufReader::new(File::open(saved.join("state"))?))?)
}

#[test]
fn a_machine_with_everything_in_it_is_restored_as_it_was_released() -> Result<()> {
    let here = state_of_this_host("golden-here-all")?;
    for (number, from) in golden("everything")?.iter().enumerate() {
        let mut stage = Stage::new(&format!("golden-all{number}"))?;
        with_taps(&mut stage, "")?;
        let saved = stage.file("saved");
        unpack(from, &saved)?;
        with_the_cpu_of(&here, &saved)?;
        let root = marked(&stage, "root", 0xa0, 64)?;
        let plugged = marked(&stage, "plugged", 0xa1, 64)?;
        let root = format!("id=root,file={},readonly=on,direct=off", root.display());
        let plugged = format!("id=plugged,file={},direct=off", plugged.display());
        let console =
            format!("socket,id=console,path={},server,nowait", stage.file("console").display());
        let keeps = fs::read_dir(&saved)?.flatten();
        let keeps = keeps.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("disk-"));
        let mut flags = vec![
            ["-drive", &root],
            ["-netdev", "tap,id=net,ifname=tap0"],
            ["-chardev", &console],
            ["-device", "virtio-serial-device"],
            ["-device", "virtconsole,chardev=console,id=console"],
        ];
        // The images are made here and lack the marks of the saved ones.
        let mut saved = format!("{},force=on", saved.display());
        if keeps {
            saved.push_str(&format!(",disks={}", stage.file("own").display()));
        } else {
            flags.push(["-drive", &plugged]);
        }
        let saved = PathBuf::from(saved);
        let (mut monitor, mut qmp) = restore(&stage, &saved, &flags.concat())
            .with_context(|| format!("{}", from.display()))?;
        simple(&mut qmp, "cont")?;
        for (key, says) in [
            ("0", found(0, 0xa0, 64)),
            ("1", found(1, 0xa1, 64)),
            ("a", "nic 0 is up 525400000001\n".to_owned()),
        ] {
            monitor.type_in(key)?;
            monitor.wait_for(&says, SOON).with_context(|| format!("{}", from.display()))?;
        }
        ensure!(!monitor.shown().contains("WRONG"), "{}", monitor.shown());
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn a_save_that_builds_on_another_is_restored_as_it_was_released() -> Result<()> {
    let here = state_of_this_host("golden-here-chain")?;
    for (number, from) in golden("chain")?.iter().enumerate() {
        let stage = Stage::new(&format!("golden-chain{number}"))?;
        unpack(from, &stage.file("chain"))?;
        let top = stage.file("chain/top");
        with_the_cpu_of(&here, &top)?;
        let before = counters(&top, 1)?;
        resumes(&stage, &top, &before).with_context(|| format!("{}", from.display()))?;
    }
    Ok(())
}
