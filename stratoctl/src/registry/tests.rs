//! The registry when its disk fails, and when its process is killed before any step.
use std::{
    any,
    cell::Cell,
    env, fs, io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use rustix::process::{Signal, getpid, kill_process};

use serde_json::json;

use super::*;
use crate::policy::Policy;

/// A disk that does some steps and then no more: it is full, or the process is killed.
struct Failing {
    steps: Mutex<u32>,
    /// The failing step leaves half a file behind.
    torn: bool,
    /// The process is killed at that step.
    killed: bool,
}

impl Failing {
    fn step(&self, last: impl FnOnce(), whole: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut steps = self.steps.lock().expect("a lock");
        match steps.checked_sub(1) {
            Some(left) => {
                *steps = left;
                whole()
            }
            None => {
                if std::mem::take(&mut *steps) == 0 {
                    last();
                }
                if self.killed {
                    kill_process(getpid(), Signal::KILL).expect("a signal");
                }
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }
}

impl Disk for Failing {
    fn mkdir(&self, path: &Path) -> io::Result<()> {
        self.step(|| (), || Real.mkdir(path))
    }

    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let half = contents.get(..contents.len() / 2).unwrap_or_default();
        let tear = || {
            if self.torn {
                fs::write(path, half).expect("half a file");
            }
        };
        self.step(tear, || Real.write(path, contents))
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.step(|| (), || Real.sync(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(|| (), || Real.rename(from, to))
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        self.step(|| (), || Real.link(target, path))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(|| (), || Real.remove(path))
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.step(|| (), || Real.remove_tree(path))
    }
}

/// A registry in a directory of its own, as it is before the step.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    fn registry(&self, disk: impl Disk + Sync + 'static) -> Registry {
        below(self.dir.path(), disk)
    }

    fn real(&self) -> Registry {
        self.registry(Real)
    }
}

fn below(root: &Path, disk: impl Disk + Sync + 'static) -> Registry {
    Registry { run: root.join("run"), state: root.join("state"), disk: Box::new(disk) }
}

fn name(word: &str) -> Name {
    word.parse().expect("a name")
}

fn description(vcpus: u64) -> Description {
    Description {
        uuid: format!("uuid-{vcpus}"),
        vcpus,
        memory: 32 << 20,
        policy: Policy::default(),
        config: json!({ "boot-source": { "kernel_image_path": "/vmlinux" } }),
    }
}

/// Environment variable of a process that is to be killed: the change, the directory, the number of
/// steps before, and whether the next one is torn.
const KILLED: &str = "STRATOCTL_TEST_KILLED";

/// Makes `change` on a disk that fails after 0, 1, 2 ... steps until it succeeds, and in processes
/// that are killed there, each time starting from what `before` makes. `status` reads what is left,
/// which must be as before or as after the change. `what` tells two changes of one test apart.
fn at_every_step<T: PartialEq + std::fmt::Debug, B: Fn(&Registry)>(
    what: &str,
    before: B,
    change: impl Fn(&Registry) -> anyhow::Result<()>,
    status: impl Fn(&Registry) -> T,
) {
    if let Ok(task) = env::var(KILLED) {
        let words: Vec<&str> = task.split_whitespace().collect();
        let [it, dir, steps, torn] = words[..] else { panic!("{task}") };
        if it == what {
            let _held = below(Path::new(dir), Real).lock(&name("a")).expect("a lock");
            let steps = Mutex::new(steps.parse().expect("a number"));
            let disk = Failing { steps, torn: torn == "true", killed: true };
            change(&below(Path::new(dir), disk)).expect("it comes to its end");
        }
        return;
    }
    // This very test, by the name of a type in it.
    let test = any::type_name::<B>();
    let test = test.split("::").skip(1).filter(|part| !part.starts_with('{'));
    let test = test.collect::<Vec<_>>().join("::");
    let plain = Bench::new();
    before(&plain.real());
    let old = status(&plain.real());
    change(&plain.real()).expect("it works on a disk that does");
    let new = status(&plain.real());
    assert_ne!(old, new, "it changes something");
    for (torn, killed) in [(false, false), (true, false), (false, true), (true, true)] {
        let news = Cell::new(0);
        for steps in 0.. {
            let bench = Bench::new();
            before(&bench.real());
            let done = if killed {
                let mut child = Command::new(env::current_exe().expect("this program"));
                let task = format!("{what} {} {steps} {torn}", bench.dir.path().display());
                let child = child.args([test.as_str(), "--exact"]).env(KILLED, task);
                let out = child.output().expect("a process");
                assert!(out.status.success() || out.status.signal() == Some(9), "{out:?}");
                let ran = String::from_utf8_lossy(&out.stdout).contains("running 1 test");
                assert!(ran, "there is no test {test}");
                out.status.success()
            } else {
                let steps = Mutex::new(steps);
                change(&bench.registry(Failing { steps, torn, killed })).is_ok()
            };
            let left = status(&bench.real());
            assert!(left == old || left == new, "after {steps} steps: {left:?}");
            // Once the new contents are there they stay.
            assert!(news.get() == 0 || left == new, "after {steps} steps: {left:?}");
            news.set(news.get() + u32::from(left == new));
            if done {
                assert_eq!(left, new, "it says that it is done");
                assert!(steps > 1, "there are steps to fail at");
                break;
            }
            // Trying again succeeds.
            let _held = bench.real().try_lock(&name("a")).expect("the lock is free");
            if left == old {
                change(&bench.real()).expect("the second time");
                assert_eq!(status(&bench.real()), new);
            }
        }
    }
}

fn everything(registry: &Registry) -> Vec<(Name, bool, Description)> {
    let names = registry.names().expect("names");
    names
        .into_iter()
        .map(|name| {
            let place = registry.find(&name).expect("a place");
            let description = place.description().expect("a whole record");
            (name, place.managed, description)
        })
        .collect()
}

#[test]
fn a_domain_is_registered_or_not_whenever_it_is_killed() {
    for managed in [true, false] {
        at_every_step(
            if managed { "managed" } else { "unmanaged" },
            |_| (),
            |registry| registry.add(&name("a"), managed, &description(1)).map(drop),
            everything,
        );
    }
}

#[test]
fn a_domain_is_removed_or_not_whenever_it_is_killed() {
    for managed in [true, false] {
        at_every_step(
            if managed { "managed" } else { "unmanaged" },
            |registry| {
                let place = registry.add(&name("a"), managed, &description(1)).expect("added");
                registry.prepare(&place, &description(1), &json!({})).expect("prepared");
            },
            |registry| registry.find(&name("a")).map_or(Ok(()), |place| registry.forget(&place)),
            |registry| {
                let left = fs::read_dir(registry.run.join(".managed")).into_iter().flatten();
                let listed = everything(registry);
                assert!(!listed.is_empty() || left.count() == 0, "it is not listed any more");
                listed
            },
        );
    }
}

#[test]
fn a_domain_has_the_old_name_or_the_new_one_and_its_monitor_with_it() {
    let status = |registry: &Registry| {
        let with_ids = |(name, managed, _): (Name, bool, Description)| {
            let id = registry.find(&name).expect("a place").id();
            (name, managed, id)
        };
        everything(registry).into_iter().map(with_ids).collect::<Vec<_>>()
    };
    for managed in [true, false] {
        at_every_step(
            if managed { "managed" } else { "unmanaged" },
            |registry| {
                let place = registry.add(&name("a"), managed, &description(1)).expect("added");
                registry.prepare(&place, &description(1), &json!({})).expect("prepared");
            },
            |registry| {
                let place = registry.find(&name("a"));
                place.map_or(Ok(()), |place| registry.rename(&place, &name("b")))
            },
            status,
        );
    }
}

#[test]
fn a_suspended_state_counts_or_not_whenever_it_is_killed() {
    let suspended = |registry: &Registry| {
        let place = registry.add(&name("a"), true, &description(1)).expect("added");
        fs::create_dir(place.saved()).expect("a directory");
        fs::write(place.saved().join("state"), "whole").expect("a state");
    };
    let status = |registry: &Registry| registry.find(&name("a")).expect("a place").is_saved();
    let place = |registry: &Registry| registry.find(&name("a")).expect("a place");
    at_every_step(
        "spend",
        suspended,
        |registry| match status(registry) {
            true => registry.invalidate(&place(registry)),
            false => Ok(()),
        },
        status,
    );
    let spent = |registry: &Registry| {
        suspended(registry);
        registry.invalidate(&place(registry)).expect("spent");
    };
    at_every_step(
        "unspend",
        spent,
        |registry| match status(registry) {
            true => Ok(()),
            false => registry.revalidate(&place(registry)),
        },
        status,
    );
}

#[test]
fn what_is_kept_belongs_to_one_domain_whenever_it_is_killed() {
    at_every_step(
        "set-aside",
        |registry| {
            let place = registry.add(&name("a"), true, &description(1)).expect("added");
            registry.prepare(&place, &description(1), &json!({})).expect("prepared");
        },
        |registry| match registry.find(&name("a-1")) {
            Some(_) => Ok(()),
            None => registry.set_aside(&registry.find(&name("a")).expect("a"), &name("a-1")),
        },
        |registry| {
            let id = |word| registry.find(&name(word)).map(|place| place.id());
            (id("a"), id("a-1"))
        },
    );
}

#[test]
fn a_start_that_was_not_prepared_to_the_end_can_be_prepared_again() {
    at_every_step(
        "prepare",
        |registry| {
            registry.add(&name("a"), true, &description(1)).expect("added");
        },
        |registry| {
            let place = registry.find(&name("a")).expect("a place");
            registry.prepare(&place, &description(1), &json!({})).map(drop)
        },
        |registry| registry.find(&name("a")).expect("a place").id(),
    );
}

/// Messages of `list` and other verbs about a record.
fn said_of(contents: &[u8]) -> String {
    let bench = Bench::new();
    let registry = bench.real();
    let place = registry.add(&name("a"), true, &description(1)).expect("added");
    fs::write(place.record(), contents).expect("written");
    let place = registry.find(&name("a")).expect("it is still there");
    let error = anyhow::Error::from(place.description().expect_err("not a record"));
    registry.forget(&place).expect("it can be forgotten");
    assert_eq!(registry.find(&name("a")).map(|place| place.home), None);
    format!("{error:#}")
}

#[test]
fn a_record_truncated_anywhere_is_refused_by_name_and_can_be_removed() {
    let bench = Bench::new();
    let place = bench.real().add(&name("a"), true, &description(1)).expect("added");
    let whole = fs::read(place.record()).expect("a record");
    let text = whole.trim_ascii_end().len();
    for length in 0..text {
        let said = said_of(&whole[..length]);
        assert!(said.contains("domain.json is damaged"), "{length}: {said}");
    }
}

#[test]
fn a_record_of_another_version_or_shape_is_refused() {
    let said = said_of(br#"{"version": 2, "vcpus": "many"}"#);
    assert!(said.contains("has version 2; this stratoctl knows 1"), "{said}");
    assert!(said_of(b"{}").contains("version null"));
    assert!(said_of(b"[]").contains("damaged"));
    assert!(said_of(br#"{"version": 1, "surplus": 1}"#).contains("damaged"));
    assert!(said_of(&b"[".repeat(100_000)).contains("damaged"));
    assert!(said_of(&vec![b' '; 2 << 20]).contains("longer than"));
    assert!(said_of(&[0xff; 10]).contains("damaged"));
}

#[test]
fn a_record_that_is_no_file_is_refused() {
    let bench = Bench::new();
    let registry = bench.real();
    let place = registry.add(&name("a"), true, &description(1)).expect("added");
    fs::remove_file(place.record()).expect("removed");
    fs::create_dir(place.record()).expect("a directory");
    assert!(place.description().is_err());
    fs::remove_dir(place.record()).expect("removed");
    std::os::unix::fs::symlink("/dev/zero", place.record()).expect("a link");
    let said = format!("{:?}", place.description().expect_err("endless"));
    assert!(said.contains("not a regular file"), "{said}");
}

#[test]
fn what_does_not_fit_on_the_disk_leaves_nothing_behind() {
    let bench = Bench::new();
    bench.real().add(&name("a"), true, &description(1)).expect("added");
    let full = bench.registry(Full);
    let error = full.add(&name("b"), true, &description(1)).expect_err("the disk is full");
    assert!(format!("{error:#}").contains("'b'") || format!("{error:#}").contains("domain b"));
    let left: Vec<_> = fs::read_dir(bench.dir.path().join("state")).expect("a directory").collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

/// A disk on which no file can be written; everything else works.
struct Full;

impl Disk for Full {
    fn mkdir(&self, path: &Path) -> io::Result<()> {
        Real.mkdir(path)
    }

    fn write(&self, path: &Path, _: &[u8]) -> io::Result<()> {
        Real.write(path, b"")?;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        Real.sync(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Real.rename(from, to)
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        Real.link(target, path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Real.remove(path)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        Real.remove_tree(path)
    }
}

#[test]
fn numbers_are_small_and_unique() {
    let bench = Bench::new();
    let registry = bench.real();
    let ids: Vec<u32> = ["a", "b", "c"]
        .map(|word| {
            let place = registry.add(&name(word), word == "b", &description(1)).expect("added");
            registry.prepare(&place, &description(1), &json!({})).expect("prepared")
        })
        .into();
    assert_eq!(ids, [1, 2, 3]);
    let c = registry.find(&name("c")).expect("a place");
    registry.forget(&c).expect("forgotten");
    let a = registry.find(&name("a")).expect("a place");
    assert_eq!(registry.prepare(&a, &description(1), &json!({})).expect("prepared"), 3);
}

#[test]
fn a_lock_is_one_process_at_a_time_and_leaves_no_file() {
    let bench = Bench::new();
    let registry = bench.real();
    let held = registry.lock(&name("a")).expect("a lock");
    assert!(registry.try_lock(&name("a")).is_none());
    assert!(registry.try_lock(&name("b")).is_some());
    drop(held);
    assert!(registry.try_lock(&name("a")).is_some());
    let locks: Vec<PathBuf> = fs::read_dir(registry.locks())
        .expect("a directory")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(locks, Vec::<PathBuf>::new());
    // Many at once: only one at a time holds it.
    let alone = Mutex::new(());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let _held = registry.lock(&name("a")).expect("a lock");
                    drop(alone.try_lock().expect("the lock is free"));
                }
            });
        }
    });
}
