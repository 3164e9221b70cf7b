//! A saved state without a machine: what its files survive and what they refuse.
use std::{
    fs,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use machine::{
    MachineState, Memory,
    config::{MachineConfig, Occupancy},
    memory::{allocate, image as ram},
};
use serde_json::json;

use super::{
    MEMORY, NEW_MEMORY, NEW_STATE, STATE, check,
    content::{self, Config, Content},
    image::Progress,
    load,
    save::{self, MemoryFile, SaveError, Target},
};

const MIB: u64 = 1 << 20;
/// Not a multiple of a block.
const SIZE: u64 = 17 * MIB;

fn config(id: u128) -> Config {
    let machine: MachineConfig = serde_json::from_value(json!({
        "name": "m", "uuid": "u", "cpus": 1,
        "topology": {"sockets": 1, "dies": 1, "clusters": 1, "cores": 1, "threads": 1},
        "memory": {"size": SIZE, "shared": false, "path": null, "prealloc": false, "dump": true},
        "boot": {"kernel": "k", "initrd": null, "cmdline": ""},
        "iothreads": [], "serial": null, "disks": [], "nics": [], "console": null, "rng": null,
    }))
    .unwrap();
    let occupied = Occupancy::at_start(&machine);
    Config { id, machine, occupied, disk_sizes: vec![], halted: None }
}

fn state(clock: u64) -> MachineState {
    MachineState {
        cpu: serde_json::from_value(json!({"leaves": []})).unwrap(),
        vcpus: vec![],
        chips: serde_json::from_value(json!({"irqchips": [[], [], []], "pit": []})).unwrap(),
        clock,
        devices: vec![
            serde_json::from_value(json!({
                "id": "serial0", "section": {"kind": "serial", "version": 1, "body": [1, 2]},
            }))
            .unwrap(),
        ],
    }
}

/// Memory with something at the first, a middle and the last byte.
fn memory(mark: u8) -> Memory {
    let memory = allocate(&config(0).machine.memory).unwrap();
    for at in [0, 5 * MIB + 3, SIZE - 1] {
        ram::write(&memory, at, &[mark]).unwrap();
    }
    memory
}

fn marks(memory: &Memory) -> [u8; 3] {
    [0, 5 * MIB + 3, SIZE - 1].map(|at| {
        let mut byte = [0];
        ram::read(memory, at, &mut byte).unwrap();
        byte[0]
    })
}

fn save(directory: &Path, mark: u8, cancelled: bool) -> Result<(), SaveError> {
    let memory = memory(mark);
    let target = Target::open(directory)?;
    let file = MemoryFile::create(&target, SIZE)?;
    let mut writer = file.writer(&memory)?;
    let progress = Progress::default();
    let used = ram::used(&memory).unwrap();
    file.copy(&mut writer, &used, &progress)?;
    progress.cancelled.store(cancelled, Ordering::Relaxed);
    file.copy(&mut writer, std::slice::from_ref(&(0..4096)), &progress)?;
    save::finish(target, &file, writer, config(mark.into()), state(mark.into()))
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The message with all its causes.
fn why(error: &dyn std::error::Error) -> String {
    qmp::Error::generic(error).to_string()
}

#[test]
fn what_was_saved_is_what_is_restored() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    save(&directory, 7, false).unwrap();
    assert_eq!(names(&directory), [MEMORY, STATE]);
    check(&directory).unwrap();
    let loaded = load(&directory).unwrap();
    assert_eq!(loaded.config, config(7));
    assert_eq!(loaded.state.clock, 7);
    assert_eq!(loaded.state.devices, state(7).devices);
    for mapped in [true, false] {
        assert_eq!(marks(&loaded.memory(mapped).unwrap()), [7; 3]);
    }
    use std::os::unix::fs::MetadataExt;
    let on_disk = fs::metadata(directory.join(MEMORY)).unwrap().blocks() * 512;
    assert!(on_disk < SIZE / 2, "zero pages are holes, and yet it takes {on_disk} bytes");
}

#[test]
fn a_save_that_fails_leaves_the_old_one() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    assert!(matches!(save(&directory, 1, true), Err(SaveError::Cancelled)));
    assert!(!directory.exists(), "what the failed save has made is gone again");
    save(&directory, 1, false).unwrap();
    assert!(matches!(save(&directory, 2, true), Err(SaveError::Cancelled)));
    assert_eq!(names(&directory), [MEMORY, STATE]);
    check(&directory).unwrap();
    assert_eq!(marks(&load(&directory).unwrap().memory(true).unwrap()), [1; 3]);
    save(&directory, 3, false).unwrap();
    assert_eq!(marks(&load(&directory).unwrap().memory(true).unwrap()), [3; 3]);
}

#[test]
fn a_save_that_was_killed_at_any_step_leaves_one_that_is_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let (old, new) = (scratch.path().join("old"), scratch.path().join("new"));
    save(&old, 1, false).unwrap();
    save(&new, 2, false).unwrap();
    // Before the first rename: the new files lie beside the old ones.
    fs::copy(new.join(MEMORY), old.join(NEW_MEMORY)).unwrap();
    fs::copy(new.join(STATE), old.join(NEW_STATE)).unwrap();
    assert_eq!(marks(&load(&old).unwrap().memory(true).unwrap()), [1; 3]);
    // Between the renames.
    fs::rename(old.join(NEW_STATE), old.join(STATE)).unwrap();
    check(&old).unwrap();
    assert_eq!(marks(&load(&old).unwrap().memory(true).unwrap()), [2; 3]);
    // The next save, itself given up, puts that right and leaves it whole.
    assert!(matches!(save(&old, 3, true), Err(SaveError::Cancelled)));
    assert_eq!(names(&old), [MEMORY, STATE]);
    assert_eq!(marks(&load(&old).unwrap().memory(true).unwrap()), [2; 3]);
}

#[test]
fn two_saves_into_one_directory_do_not_mix() {
    let scratch = tempfile::tempdir().unwrap();
    let first = Target::open(scratch.path()).unwrap();
    assert!(matches!(Target::open(scratch.path()), Err(SaveError::Busy { .. })));
    drop(first);
    save(scratch.path(), 1, false).unwrap();
}

#[test]
fn memory_that_is_damaged_short_or_anothers_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let (one, other) = (scratch.path().join("one"), scratch.path().join("other"));
    save(&one, 1, false).unwrap();
    save(&other, 2, false).unwrap();
    let path = one.join(MEMORY);
    let good = fs::read(&path).unwrap();
    for (at, block) in [(0, "0x0 to 0x200000"), (9 * MIB, "0x800000 to 0xa00000")] {
        let mut bad = good.clone();
        bad[usize::try_from(at).unwrap()] ^= 0x10;
        fs::write(&path, &bad).unwrap();
        let error = why(&check(&one).unwrap_err());
        assert!(error.contains(block) && error.contains("memory"), "{error}");
        let error = why(&load(&one).unwrap().memory(false).unwrap_err());
        assert!(error.contains(block), "{error}");
    }
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    let error = why(&check(&one).unwrap_err());
    assert!(error.contains("17829887") && error.contains("17829888"), "{error}");
    fs::copy(other.join(MEMORY), &path).unwrap();
    let error = why(&check(&one).unwrap_err());
    assert!(error.contains("belongs to another state"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = why(&check(&one).unwrap_err());
    assert!(error.contains("cannot open") && error.contains("memory"), "{error}");
}

fn bytes() -> Vec<u8> {
    let mut bytes = Vec::new();
    let sums = vec![1, 2, 3];
    content::write(&mut bytes, &Content { config: config(9), state: state(9), sums }).unwrap();
    bytes
}

/// Reads it, or says why not.
fn read(bytes: &[u8]) -> Result<(), String> {
    content::read(bytes).map(drop).map_err(|e| why(&e))
}

#[test]
fn a_state_cut_off_anywhere_is_refused_by_name() {
    let whole = bytes();
    read(&whole).unwrap();
    for length in 0..whole.len() {
        let error = read(&whole[..length]).unwrap_err();
        assert!(error.contains("it ends at byte"), "{length}: {error}");
    }
    let error = read(&whole[..whole.len() - 1]).unwrap_err();
    assert!(error.contains("the checksums of memory"), "what came before is named: {error}");
    assert!(read(&[&whole[..], b"x"].concat()).unwrap_err().contains("more after its end"));
}

#[test]
fn a_state_with_any_one_bit_flipped_is_refused() {
    let mut bytes = bytes();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes).is_err(), "byte {at}, bit {bit}");
            bytes[at] ^= 1 << bit;
        }
    }
    let name = bytes.windows(5).position(|w| w == b"clock").unwrap();
    bytes[name + 7] ^= 1;
    let error = read(&bytes).unwrap_err();
    assert_eq!(error, "section \"clock\" is damaged (checksum)");
}

#[test]
fn a_length_that_lies_costs_nothing() {
    let mut bytes = bytes();
    // The length of the first frame, behind header and kind.
    bytes[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = read(&bytes).unwrap_err();
    assert!(error.contains("claims 4294967295 bytes"), "{error}");
    bytes[20..24].copy_from_slice(&(16u32 << 20).to_le_bytes());
    let error = read(&bytes).unwrap_err();
    assert!(error.contains("it ends at byte"), "{error}");
}

#[test]
fn another_version_and_another_kind_of_file_are_told_apart() {
    let mut bytes = bytes();
    bytes[8] = 2;
    let crc = crc32fast::hash(&bytes[..12]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    let error = read(&bytes).unwrap_err();
    assert!(error.contains("version 2") && error.contains("version 1"), "{error}");
    let error = read(b"#!/bin/sh\nexit 1\n").unwrap_err();
    assert!(error.contains("it is no saved state"), "{error}");
}

#[test]
fn the_thread_ends_a_save_that_is_given_up() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    let thread = super::job::Checkpointer::spawn(Arc::new(|| {})).unwrap();
    let mut job = thread.save(&directory, memory(1), SIZE, true).unwrap();
    let wait = Duration::from_secs(20);
    assert!(matches!(job.wait(wait), Some(super::job::Step::Ready)));
    job.give_up();
    let Some(super::job::Step::Done(result)) = job.wait(wait) else { panic!("it goes on") };
    assert!(matches!(result, Err(SaveError::Cancelled)));
    assert!(!directory.exists());
}
