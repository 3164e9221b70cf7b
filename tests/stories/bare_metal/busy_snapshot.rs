//! Machines that are saved in the middle of their work, in unusual states, or restored many times.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use stories::monitor::SOON;

use crate::hostile_snapshot::{checked, contents, resumes, saved};
use crate::snapshot::{counters, restore, save};
use crate::stage::{Stage, quits, simple};

#[test]
fn one_file_carries_several_machines_at_once() -> Result<()> {
    let (stage, saved) = saved("hostile-several")?;
    let before = (contents(&saved)?, counters(&saved, 1)?);
    let stages = ["hostile-first", "hostile-second", "hostile-third"];
    let stages = stages.into_iter().map(Stage::new).collect::<Result<Vec<_>>>()?;
    let mut machines =
        stages.iter().map(|own| restore(own, &saved, &[])).collect::<Result<Vec<_>>>()?;
    for (_, qmp) in &mut machines {
        simple(qmp, "cont")?;
    }
    for ((monitor, qmp), own) in machines.iter_mut().zip(&stages) {
        let again = own.file("again");
        save(qmp, &again, false)?;
        ensure!(counters(&again, 1)? >= before.1);
        ensure!(!monitor.unseen().contains("WRONG"), "{}", monitor.unseen());
        quits(own, monitor, qmp)?;
    }
    ensure!(contents(&saved)? == before.0, "the template was written to");
    resumes(&stage, &saved, &before.1)
}

#[test]
fn a_disk_in_use_is_saved_again_and_again() -> Result<()> {
    let stage = Stage::new("hostile-disk")?;
    let image = stage.file("image");
    File::create(&image)?.set_len(1 << 20)?;
    let vm = stage.vm("blk", "busy")?.disk("vda", &image, false);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let mut before = 0;
    for round in 0..200 {
        if round >= 20 && before > 0 {
            break;
        }
        // The guest checks that it reads what it has written, over and over.
        thread::sleep(Duration::from_micros(300 * round));
        let saved = stage.file(&format!("saved{}", round % 2));
        save(&mut qmp, &saved, false)?;
        ensure!(!monitor.shown().contains("WRONG"), "{}", monitor.shown());
        quits(&stage, &mut monitor, &mut qmp)?;
        let rounds = counters(&saved, 1)?;
        ensure!(rounds[0] >= before, "round {} became {rounds:?}", before);
        before = rounds[0];
        (monitor, qmp) = restore(&stage, &saved, &[])?;
        simple(&mut qmp, "cont")?;
    }
    quits(&stage, &mut monitor, &mut qmp)?;
    ensure!(before > 0, "the guest has done nothing");
    Ok(())
}

/// In the middle of a byte, between a byte and the interrupt that follows it: no byte is lost and
/// none comes twice.
#[test]
fn a_guest_that_prints_is_saved_in_the_middle_of_its_lines() -> Result<()> {
    let stage = Stage::new("hostile-print")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("type", "")?)?;
    let mut printed = String::new();
    for round in 0..25_u64 {
        monitor.wait_for("\n", SOON)?;
        thread::sleep(Duration::from_micros(500 + 700 * round));
        let saved = stage.file(&format!("saved{}", round % 2));
        save(&mut qmp, &saved, false)?;
        quits(&stage, &mut monitor, &mut qmp)?;
        printed.push_str(&monitor.shown_to_its_end()?);
        (monitor, qmp) = restore(&stage, &saved, &[])?;
        simple(&mut qmp, "cont")?;
    }
    // It continues, to the end of a line.
    monitor.wait_for("xyz\n", SOON)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    printed.push_str(&monitor.shown_to_its_end()?);
    let lines: Vec<_> = printed.split_inclusive('\n').collect();
    ensure!(lines.len() >= 25, "the guest printed {} lines", lines.len());
    for (number, line) in (1..).zip(&lines) {
        let whole = format!("line {number:08x}abcdefghijklmnopqrstuvwxyz\n");
        let last = number == lines.len();
        ensure!(
            *line == whole || (last && whole.starts_with(line)),
            "line {number} of {} is '{line}'",
            lines.len()
        );
    }
    Ok(())
}

#[test]
fn memory_above_4_gib_and_a_guest_that_has_not_begun_are_saved_as_well() -> Result<()> {
    let stage = Stage::new("hostile-high")?;
    let vm = stage.vm("hello", "high")?.machine("mem_size", 4608_u64 << 20);
    let mut monitor = vm.args(&["-S"]).start(&stage.paths, &stage.dir)?;
    let mut qmp = monitor.qmp()?;
    // Before its first instruction.
    let early = stage.file("early");
    save(&mut qmp, &early, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let (mut monitor, mut qmp) = restore(&stage, &early, &[])?;
    simple(&mut qmp, "cont")?;
    monitor.wait_for("high memory holds 600df00d12345678\nhalts\n", SOON)?;
    let late = stage.file("late");
    save(&mut qmp, &late, true)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    // What lies at 4 GiB in the guest lies at 3 GiB in the file.
    let word = |saved: &Path| -> Result<u64> {
        let mut word = [0; 8];
        let at = (3 << 30) + (5 << 21) + 0x1238;
        File::open(saved.join("memory"))?.read_exact_at(&mut word, at)?;
        Ok(u64::from_le_bytes(word))
    };
    ensure!(word(&early)? == 0 && word(&late)? == 0x600d_f00d_1234_5678);
    for late in [&late, &checked(&late)] {
        let (mut monitor, mut qmp) = restore(&stage, late, &[])?;
        let again = stage.file("again");
        save(&mut qmp, &again, false)?;
        ensure!(word(&again)? == 0x600d_f00d_1234_5678);
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}
