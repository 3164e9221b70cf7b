//! Saved states without a machine: which damage to their files is tolerated, and which is refused.
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use config::{MemoryConfig, incoming::Mapping, saved::check};
use machine::{
    MachineState, Memory,
    memory::{allocate, image as ram, staging::Staging},
};
use state::{
    State,
    chips::Clock,
    config::Base,
    directory::{self, MEMORY, NEW_MEMORY, NEW_STATE, STATE},
    file::RANGES,
    hex::Hex,
};

use super::{
    backing_memory,
    job::{Checkpointer, First, Order, Step},
    load::{LoadError, load},
    memory_file::Progress,
    save::{Directory, Finished, SaveError, Saved, Sink, Source, Target},
};

pub const MIB: u64 = 1 << 20;
/// Not a multiple of a block.
pub const SIZE: u64 = state::testing::MEMORY;

pub use state::testing::config;

/// A state whose clock is `clock`.
pub fn state(clock: u64) -> MachineState {
    let mut sections = state::testing::sections();
    sections.clock = Clock { nanoseconds: clock, date: Some(clock + 1) };
    sections.try_into().unwrap()
}

fn memory_config() -> MemoryConfig {
    MemoryConfig::new(SIZE.try_into().unwrap())
}

/// Memory with `mark` at the first, a middle and the last byte.
pub fn memory(mark: u8) -> Memory {
    let memory = allocate(&memory_config()).unwrap();
    for at in [0, 5 * MIB + 3, SIZE - 1] {
        ram::write(&memory, at, &[mark]).unwrap();
    }
    memory
}

pub fn marks(memory: &Memory) -> [u8; 3] {
    [0, 5 * MIB + 3, SIZE - 1].map(|at| {
        let mut byte = [0];
        ram::read(memory, at, &mut byte).unwrap();
        byte[0]
    })
}

fn save(directory: &Path, mark: u8, cancelled: bool) -> Result<(), SaveError> {
    save_on(directory, mark, cancelled, None).map(drop)
}

/// Saves all of memory; on a base, the first page.
pub fn save_on(
    directory: &Path,
    mark: u8,
    cancelled: bool,
    base: Option<Saved>,
) -> Result<Saved, SaveError> {
    let memory = memory(mark);
    let first = std::slice::from_ref(&(0..4096));
    let used = ram::used(&memory, &[]).unwrap();
    let ranges = if base.is_some() { first } else { &used };
    let mut sink = Box::new(Directory::create(directory, memory, SIZE, base)?);
    let progress = Progress::default();
    sink.copy(&Source::Guest(ranges), &progress)?;
    if cancelled {
        progress.cancel();
    }
    sink.copy(&Source::Guest(first), &progress)?;
    Ok(over(sink.finish(config(mark.into()), state(mark.into()), &progress)?).unwrap())
}

/// What a later save may build on.
fn over(finished: Finished) -> Option<Saved> {
    match finished {
        Finished::Over(saved) => saved,
        Finished::HandOver(_) => panic!("there is somebody to hand it over to"),
    }
}

/// The memory restored from `directory`.
pub fn restored(directory: &Path, mapped: bool) -> Result<Memory, LoadError> {
    let loaded = load(directory)?;
    let mapped = if mapped { Mapping::On } else { Mapping::Off };
    let (config, report) = (memory_config(), Arc::new(|_| {}) as _);
    let memory =
        backing_memory::memory(loaded.memory, &config, mapped, &report, &Default::default());
    Ok(memory?.memory)
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
pub fn why(error: &dyn std::error::Error) -> String {
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
    assert_eq!(loaded.state.config, config(7));
    assert_eq!(loaded.state.sections.clock, Clock { nanoseconds: 7, date: Some(8) });
    assert_eq!(loaded.state.sections.devices, state(7).devices);
    for mapped in [true, false] {
        assert_eq!(marks(&restored(&directory, mapped).unwrap()), [7; 3]);
    }
    let on_disk = fs::metadata(directory.join(MEMORY)).unwrap().blocks() * 512;
    assert!(on_disk < SIZE / 2, "zero pages are holes, and yet it takes {on_disk} bytes");
}

#[test]
fn a_save_that_fails_leaves_the_old_one() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    assert!(matches!(save(&directory, 1, true), Err(SaveError::Cancelled)));
    assert!(!directory.exists(), "what the failed save has created is removed");
    save(&directory, 1, false).unwrap();
    assert!(matches!(save(&directory, 2, true), Err(SaveError::Cancelled)));
    assert_eq!(names(&directory), [MEMORY, STATE]);
    check(&directory).unwrap();
    assert_eq!(marks(&restored(&directory, true).unwrap()), [1; 3]);
    save(&directory, 3, false).unwrap();
    assert_eq!(marks(&restored(&directory, true).unwrap()), [3; 3]);
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
    assert_eq!(marks(&restored(&old, true).unwrap()), [1; 3]);
    // Between the renames.
    fs::rename(old.join(NEW_STATE), old.join(STATE)).unwrap();
    check(&old).unwrap();
    assert_eq!(marks(&restored(&old, true).unwrap()), [2; 3]);
    // The next save, itself cancelled, repairs that and leaves it complete.
    assert!(matches!(save(&old, 3, true), Err(SaveError::Cancelled)));
    assert_eq!(names(&old), [MEMORY, STATE]);
    assert_eq!(marks(&restored(&old, true).unwrap()), [2; 3]);
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
        let error = why(&restored(&one, false).unwrap_err());
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
    let (config, sections) = (config(9), state(9).into());
    State { config, sections, changed: vec![], sums }.write(&mut bytes).unwrap();
    bytes
}

/// Reads it, or returns the error.
fn read(bytes: &[u8]) -> Result<(), String> {
    State::read(bytes).map(drop).map_err(|e| why(&e))
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
    assert!(read(&[&whole[..], b"x"].concat()).unwrap_err().contains("more data after its end"));
}

#[test]
fn a_state_with_any_one_bit_flipped_is_refused() {
    let mut bytes = bytes();
    for at in 0..bytes.len() {
        // Any single flipped bit changes the checksum.
        let bit = at % 8;
        bytes[at] ^= 1 << bit;
        assert!(read(&bytes).is_err(), "byte {at}, bit {bit}");
        bytes[at] ^= 1 << bit;
    }
    let name = bytes.windows(14).position(|w| w == b"\"kind\":\"clock\"").unwrap();
    bytes[name + 40] ^= 1;
    let error = read(&bytes).unwrap_err();
    assert_eq!(error, "section \"clock\" is damaged (checksum)");
}

#[test]
fn a_false_length_costs_nothing() {
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
    assert!(error.contains("version 2; this program reads version 3"), "{error}");
    let error = read(b"#!/bin/sh\nexit 1\n").unwrap_err();
    assert!(error.contains("it is not a saved state"), "{error}");
}

#[test]
fn the_thread_ends_a_save_that_is_given_up() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    let (thread, save) = Checkpointer::new(Arc::new(|| {}));
    std::thread::spawn(save);
    let memory = memory(1);
    let (path, copied) = (directory.clone(), memory.clone());
    let open = move |_: &Progress| {
        Ok(Box::new(Directory::create(&path, copied, SIZE, None)?) as Box<dyn Sink>)
    };
    let (open, place) = (Box::new(open), String::new());
    let order = Order { open, memory, cancel: None, place, resume: true, patient: false };
    let mut job = thread.save(order).unwrap();
    let wait = Duration::from_secs(20);
    assert!(matches!(job.wait(wait), Some(Step::Opened)));
    job.copy(First::All(Arc::default()));
    assert!(matches!(job.wait(wait), Some(Step::Round)));
    job.changed(std::iter::once(0..4096).collect());
    let Some(Step::Ready(left)) = job.wait(wait) else { panic!("it is not ready") };
    assert!(left.staging.is_some() && left.ranges.len() == 1);
    job.give_up();
    let Some(Step::Done(result)) = job.wait(wait) else { panic!("it is still running") };
    assert!(matches!(result, Err(SaveError::Cancelled)));
    assert!(!directory.exists());
}

#[test]
fn an_incremental_save_holds_what_has_changed_and_is_restored_with_its_base() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |n: u32| scratch.path().join(format!("saved{n}"));
    let mut base = save_on(&at(0), 1, false, None).unwrap();
    for n in 1..4 {
        let mark = u8::try_from(n).unwrap() + 1;
        base = save_on(&at(n), mark, false, Some(base)).unwrap();
        // The first page is of this save, the others of the first one.
        for mapped in [true, false] {
            assert_eq!(marks(&restored(&at(n), mapped).unwrap()), [mark, 1, 1]);
        }
        check(&at(n)).unwrap();
        let on_disk = fs::metadata(at(n).join(MEMORY)).unwrap().blocks() * 512;
        assert!(on_disk <= 16 << 10, "two pages, and yet it takes {on_disk} bytes");
    }
    // All of them may be moved, as long as they stay side by side.
    let moved = scratch.path().join("moved");
    fs::create_dir(&moved).unwrap();
    for n in 0..4 {
        fs::rename(at(n), moved.join(format!("saved{n}"))).unwrap();
    }
    check(&moved.join("saved3")).unwrap();

    let damage = |n: u32, offset: u64| {
        let file = fs::File::options().write(true).open(moved.join(format!("saved{n}/memory")));
        file.unwrap().write_all_at(b"damage", offset).unwrap();
    };
    damage(2, 0);
    check(&moved.join("saved3")).unwrap_or_else(|e| panic!("a page that does not count: {e}"));
    damage(0, 5 * MIB);
    let error = why(&check(&moved.join("saved3")).unwrap_err());
    assert!(error.contains("0x400000 to 0x600000") && error.contains("saved0/memory"), "{error}");
}

#[test]
fn a_base_that_has_changed_or_gone_or_is_none_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let base = save_on(&at("base"), 1, false, None).unwrap();
    let middle = save_on(&at("middle"), 2, false, Some(base.clone())).unwrap();
    save_on(&at("top"), 3, false, Some(middle.clone())).unwrap();
    // A save that another one builds on is not overwritten.
    for needed in ["base", "middle"] {
        let error = save_on(&at(needed), 4, false, Some(middle.clone())).unwrap_err();
        assert!(matches!(error, SaveError::Needed { .. }), "{}", why(&error));
    }
    save_on(&at("base"), 9, false, None).unwrap();
    for name in ["middle", "top"] {
        let error = why(&check(&at(name)).unwrap_err());
        assert!(error.contains("base has been replaced by a later save"), "{error}");
        assert!(error.contains("middle"), "what builds on it is named: {error}");
    }
    let error = save_on(&at("other"), 4, false, Some(base)).unwrap_err();
    assert!(matches!(error, SaveError::BaseChanged { .. }), "{}", why(&error));
    assert!(!at("other").exists());
    fs::remove_dir_all(at("middle")).unwrap();
    let error = why(&check(&at("top")).unwrap_err());
    assert!(error.contains("cannot open") && error.contains("middle/state"), "{error}");
}

#[test]
fn a_chain_that_is_too_long_or_leads_to_itself_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |n: u8| scratch.path().join(format!("{n}"));
    let mut base = save_on(&at(0), 0, false, None).unwrap();
    for n in 1..64 {
        base = save_on(&at(n), n, false, Some(base)).unwrap();
    }
    check(&at(63)).unwrap();
    let error = save_on(&at(64), 64, false, Some(base)).unwrap_err();
    assert!(matches!(error, SaveError::TooDeep), "{}", why(&error));
    assert!(!at(64).exists());
    // A forged state: it builds on itself.
    let (mut content, sum) = directory::read(&at(1).join(STATE)).unwrap();
    content.config.base =
        Some(Base { path: "../1".into(), id: content.config.id, state: Hex(sum) });
    let mut bytes = Vec::new();
    content.write(&mut bytes).unwrap();
    fs::write(at(1).join(STATE), bytes).unwrap();
    let error = why(&check(&at(1)).unwrap_err());
    assert!(error.contains("builds on itself"), "{error}");
}

#[test]
fn a_false_list_of_changes_is_refused() {
    let page = 4096;
    let many = (0..RANGES as u64 + 1).map(|n| (n * 2 * page, (n * 2 + 1) * page));
    let many: Vec<_> = many.collect();
    let cases: [(&[(u64, u64)], bool); 9] = [
        (&[(0, page), (page, 2 * page), (SIZE - page, SIZE)], false),
        (&[(0, page), (SIZE - page, SIZE + page)], true),
        (&[(0, page), (0, page)], true),
        (&[(page, page)], true),
        (&[(1, page)], true),
        (&[(0, page + 1)], true),
        (&[(2 * page, 3 * page), (0, page)], true),
        (&[(u64::MAX - page + 1, u64::MAX)], true),
        (&many, true),
    ];
    for (changed, refused) in cases {
        let changed: Vec<_> = changed.iter().map(|(start, end)| *start..*end).collect();
        let mut config = config(1);
        config.base = Some(Base { path: "b".into(), id: 1.into(), state: Hex(1) });
        let (sections, changed_too) = (state(1).into(), changed.clone());
        let content = State { config, sections, changed: changed_too, sums: vec![] };
        let mut bytes = Vec::new();
        content.write(&mut bytes).unwrap();
        assert_eq!(read(&bytes).is_err(), refused, "{:?}", &changed[..1]);
    }
}

#[test]
fn what_was_copied_aside_is_saved_whatever_the_guest_writes_afterwards() {
    let scratch = tempfile::tempdir().unwrap();
    let (mut base, mut number) = (None, 0);
    for based in [false, true] {
        let path = scratch.path().join(based.to_string());
        let memory = memory(1);
        let pages = |marked: &[u64]| {
            marked.iter().map(|page| page * 4096..(page + 1) * 4096).collect::<Vec<_>>()
        };
        let mark = |pages: &[std::ops::Range<u64>], mark: u8| {
            for page in pages {
                ram::write(&memory, page.start, &[mark; 4096]).unwrap();
            }
        };
        // Scattered over several blocks: some pages are written once, some twice, some become zero.
        let (first, later) = (pages(&[0, 3, 600, 601, 1200]), pages(&[3, 7, 600, 2000]));
        mark(&first, 2);
        let mut sink =
            Box::new(Directory::create(&path, memory.clone(), SIZE, base.take()).unwrap());
        let progress = Progress::default();
        let all = ram::used(&memory, &[]).unwrap();
        let copied = if based { &first } else { &all };
        sink.copy(&Source::Guest(copied), &progress).unwrap();
        mark(&later, 3);
        ram::write(&memory, 600 * 4096, &[0; 4096]).unwrap();
        let mut staging = Staging::touched(4096).unwrap();
        staging.fill(&memory, &later).unwrap();
        // The guest runs again.
        mark(&first, 9);
        mark(&later, 9);
        sink.copy(&Source::Staged(&staging), &progress).unwrap();
        number += 1;
        base = over(sink.finish(config(number), state(1), &progress).unwrap());
        check(&path).unwrap();
        let memory = restored(&path, false).unwrap();
        let byte = |page: u64| {
            let mut byte = [0];
            ram::read(&memory, page * 4096 + 9, &mut byte).unwrap();
            byte[0]
        };
        let seen = [0, 3, 7, 600, 601, 1200, 2000].map(byte);
        assert_eq!(seen, [2, 3, 3, 0, 2, 2, 3], "with a base: {based}");
    }
}

#[test]
fn more_ranges_than_are_kept_are_joined_and_all_there() {
    let scratch = tempfile::tempdir().unwrap();
    let base = save_on(&scratch.path().join("base"), 1, false, None).unwrap();
    let memory = memory(2);
    // Every second page of a few, and later every third page of these and of many more.
    let pages = |to: u64, step| {
        (0..to).step_by(step).map(|page| page * 4096..(page + 1) * 4096).collect::<Vec<_>>()
    };
    let (first, later) = (pages(64, 2), pages(SIZE / 4096, 6));
    let path = scratch.path().join("many");
    let mut sink = Box::new(Directory::create(&path, memory.clone(), SIZE, Some(base)).unwrap());
    sink.most = 100;
    let progress = Progress::default();
    sink.copy(&Source::Guest(&first), &progress).unwrap();
    for at in (0..SIZE).step_by(4096) {
        ram::write(&memory, at, &[2]).unwrap();
    }
    sink.copy(&Source::Guest(&later), &progress).unwrap();
    sink.finish(config(2), state(2), &progress).unwrap();
    let (content, _) = directory::read(&path.join(STATE)).unwrap();
    assert!(content.changed.len() <= 100, "{}", content.changed.len());
    let file = fs::File::open(path.join(MEMORY)).unwrap();
    for at in content.changed.iter().flat_map(|range| range.clone().step_by(4096)) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte, [2], "{at:#x}");
    }
    let there = |page: &std::ops::Range<u64>| {
        content.changed.iter().any(|range| range.start <= page.start && page.end <= range.end)
    };
    assert!(first.iter().chain(&later).all(there));
}

/// What a save writes is what a restore reads: a save that could not be restored does not count,
/// and the earlier save stays.
#[test]
fn a_state_that_no_machine_would_take_is_not_saved() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("saved");
    save(&directory, 1, false).unwrap();
    let before = fs::read(directory.join(STATE)).unwrap();
    type Spoil = fn(&mut state::Config, &mut state::Sections);
    let spoil: [(&str, Spoil); 4] = [
        ("vCPUs", |config, _| config.machine.vcpus = 2),
        ("disk1", |config, _| config.slots[0].id = "disk1".into()),
        ("disk0", |_, sections| {
            let spoiled = sections.devices.pop().unwrap();
            let json = spoiled.state.get().replace("\"status\":0", "\"status\":4");
            sections.devices.push(spoiled.with(json).unwrap());
        }),
        ("no section for pvpanic", |_, sections| drop(sections.devices.remove(3))),
    ];
    for (says, spoil) in spoil {
        let (memory, progress) = (memory(2), Progress::default());
        let mut sink = Box::new(Directory::create(&directory, memory, SIZE, None).unwrap());
        sink.copy(&Source::Guest(std::slice::from_ref(&(0..4096))), &progress).unwrap();
        let (mut config, mut sections) = (config(2), state(2).into());
        spoil(&mut config, &mut sections);
        let error = sink.finish(config, sections.try_into().unwrap(), &progress);
        let error = error.map(drop).unwrap_err();
        let why = why(&error);
        assert!(why.contains("could not be restored") && why.contains(says), "{says}: {why}");
        assert_eq!(names(&directory), [MEMORY, STATE]);
        assert_eq!(fs::read(directory.join(STATE)).unwrap(), before);
    }
    check(&directory).unwrap();
}
