//! Error messages about what the host lacks name the place in the configuration that asked for it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test"
)]
use std::ffi::OsString;

use config::{
    MachineConfig, MemoryConfig,
    cli::{Action, Invocation, parse},
    slots::SlotsError,
};
use machine::{BuildError, memory, preflight};
use vmm::explain::explain;

/// The words of `line`, after `first`.
fn invocation(first: &[OsString], line: &str) -> Invocation {
    let words = line.split_whitespace().map(OsString::from);
    match parse(first.iter().cloned().chain(words)) {
        Ok(Action::Run(invocation)) => *invocation,
        Ok(other) => panic!("{line}: {other:?}"),
        Err(problems) => panic!("{line}:\n{problems}"),
    }
}

fn run(line: &str) -> Invocation {
    invocation(&[], line)
}

/// The machine of a command line, to which a kernel and a control socket are added.
fn machine(line: &str) -> MachineConfig {
    run(&format!("-kernel k -api-channel unix:s {line}")).machine
}

/// The invocation with the configuration file `text`, and flags after it.
fn file(text: &str, line: &str) -> Invocation {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, text).unwrap();
    invocation(&["-config".into(), path.into()], line)
}

/// The error messages for a machine that cannot be built, without the file's directory.
fn explained(invocation: &Invocation) -> Vec<String> {
    let config = &invocation.machine;
    // Any error about the whole machine will do; KVM's own errors do not matter here.
    let first = BuildError::Slots(SlotsError::Disks { slots: 1, disks: 2 });
    let problems = explain(&invocation.places, preflight(config, first), config);
    let short = |line: &str| match line.split_once(".json: ") {
        Some((_, rest)) => format!("FILE: {rest}"),
        None => line.to_owned(),
    };
    problems.iter().map(short).collect()
}

/// There is one line for each pair, in this order: it begins with the place and continues with the
/// text.
fn tells(invocation: &Invocation, expected: &[(&str, &str)]) {
    let said = explained(invocation);
    assert_eq!(
        said[0],
        "stratovirt: 1 slots for disks are fewer than the disks that are configured (2)"
    );
    assert_eq!(said.len(), expected.len() + 1, "{said:#?}");
    for (line, (place, words)) in said[1..].iter().zip(expected) {
        let rest = line.strip_prefix(&format!("{place}: ")).unwrap_or_else(|| panic!("{said:#?}"));
        assert!(rest.contains(words), "{words}: {said:#?}");
    }
}

const FILE: &str = r#"{
  "boot-source":{"kernel_image_path":"/no/kernel","initrd_fs_path":"/no/initrd"},
  "machine-config":{"mem_path":"/no/ram"},
  "drive":[{"drive_id":"a","path_on_host":"/no/a","read_only":false,"direct":true},
           {"drive_id":"b","path_on_host":"/no/b","read_only":false,"direct":true}],
  "net":[{"iface_id":"n","host_dev_name":"no-tap"}],
  "console":[{"console_id":"c","socket_path":"/no/console"}],
  "rng":{"random_file":"/no/rng"}}"#;

#[test]
fn of_a_file_each_key_is_named() {
    tells(
        &file(FILE, "-api-channel unix:s"),
        &[
            ("FILE: boot-source.kernel_image_path", "/no/kernel"),
            ("FILE: boot-source.initrd_fs_path", "/no/initrd"),
            ("FILE: machine-config.mem_path", "/no/ram"),
            ("FILE: drive[0].path_on_host", "disk a: /no/a"),
            ("FILE: drive[1].path_on_host", "disk b: /no/b"),
            ("FILE: net[0].host_dev_name", "NIC n: tap device 'no-tap'"),
            ("FILE: console[0].socket_path", "console c: cannot open /no/console"),
            ("FILE: rng.random_file", "/no/rng"),
        ],
    );
}

#[test]
fn a_flag_that_replaces_the_files_value_is_named() {
    let line = "-api-channel unix:s -kernel /no/other -mem-path /dev/null -rng random_file=/no/r \
                -drive id=z,file=/no/z -serial file,path=/no/s";
    tells(
        &file(FILE, line),
        &[
            ("-kernel", "/no/other"),
            ("FILE: boot-source.initrd_fs_path", "/no/initrd"),
            ("-mem-path", "/dev/null is neither a file nor a directory"),
            ("FILE: drive[0].path_on_host", "disk a"),
            ("FILE: drive[1].path_on_host", "disk b"),
            ("-drive id=z,file=/no/z: file", "disk z"),
            ("FILE: net[0].host_dev_name", "no-tap"),
            ("-serial file,path=/no/s", "cannot connect the serial port: cannot open /no/s"),
            ("FILE: console[0].socket_path", "/no/console"),
            ("-rng random_file=/no/r: random_file", "/no/r"),
        ],
    );
}

#[test]
fn a_device_is_found_by_the_back_end_that_names_the_file() {
    tells(
        &run("-kernel /no/k\u{1b} -api-channel unix:s -drive id=d,file=/no/d \
              -device virtio-blk-device,drive=d,id=x -chardev file,id=c,path=/no/c \
              -device virtio-serial-device,id=s -device virtconsole,id=y,chardev=c \
              -chardev file,id=e,path=/no/e -serial chardev:e \
              -object rng-random,id=r,filename=/no/r -device virtio-rng-device,rng=r,id=z"),
        &[
            ("-kernel", "/no/k\\u{1b}"),
            ("-drive id=d,file=/no/d: file", "disk x: /no/d"),
            ("-chardev file,id=e,path=/no/e", "serial port: cannot open /no/e"),
            ("-chardev file,id=c,path=/no/c", "console c: cannot open /no/c"),
            ("-object rng-random,id=r,filename=/no/r: filename", "rng z: cannot open /no/r"),
        ],
    );
}

#[test]
fn what_is_about_a_number_names_it_too() {
    let size = MemoryConfig { size: (1u64 << 50).try_into().unwrap(), ..machine("").memory };
    let error = || BuildError::from(memory::allocate(&size).unwrap_err());
    let said = |text: &str, line: &str| {
        let invocation = file(text, line);
        let problems = explain(&invocation.places, vec![error()], &invocation.machine);
        problems.iter().next().unwrap().to_owned()
    };
    let text = r#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"mem_size":"1G"}}"#;
    let by_file = said(text, "-api-channel unix:s");
    assert!(by_file.contains(".json: machine-config.mem_size: 1073741824 MiB"), "{by_file}");
    let by_flag = said(text, "-api-channel unix:s -m 2G");
    assert!(by_flag.starts_with("-m 2G: size: 1073741824 MiB"), "{by_flag}");
}

/// The usual case: the kernel lies beside the file, and the monitor is started elsewhere.
#[test]
fn what_is_beside_the_file_is_found_there_and_suggested() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["kernel", "root"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let text = r#"{"boot-source":{"kernel_image_path":"kernel","initrd_fs_path":"initrd"},
        "drive":[{"drive_id":"r","path_on_host":"root","read_only":false,"direct":false}]}"#;
    let path = dir.path().join("vm.json");
    std::fs::write(&path, text).unwrap();
    let invocation = run(&format!("-config {} -api-channel unix:s", path.display()));
    let said = explained(&invocation);
    for (name, hinted) in [("kernel", true), ("root", true), ("initrd", false)] {
        let there = dir.path().join(name);
        let beside = format!("and the file is beside this one: {}", there.display());
        let line = said.iter().find(|line| line.contains(&format!("{name} "))).unwrap();
        assert_eq!(line.ends_with(&beside), hinted, "{line}");
    }
}
