//! The JSON file.
use super::*;

const MINIMAL: &str = r#"{"boot-source":{"kernel_image_path":"/path/to/kernel","boot_args":"console=ttyS0 reboot=k panic=1 pci=off tsc=reliable ipv6.disable=1 root=/dev/vda"},
 "machine-config":{"vcpu_count":1,"mem_size":268435456},
 "drive":[{"drive_id":"rootfs","path_on_host":"/path/to/rootfs/image","direct":false,"read_only":false}],
 "serial":{"stdio":true}}"#;

#[test]
fn the_documented_file_is_the_documented_command_line() {
    let by_file = file(MINIMAL, "-api-channel unix:s").unwrap();
    let by_flags = run("-kernel /path/to/kernel -append console=ttyS0 reboot=k panic=1 pci=off \
         tsc=reliable ipv6.disable=1 root=/dev/vda -smp 1 -m 268435456 \
         -drive id=rootfs,file=/path/to/rootfs/image,direct=off,readonly=off -serial stdio \
         -api-channel unix:s");
    // They differ only in the place of the request.
    assert_ne!(by_file.places, by_flags.places);
    assert_eq!(Invocation { places: by_flags.places.clone(), ..by_file }, by_flags);
}

#[test]
fn every_example_is_a_machine() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../config-examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let args = [OsString::from("-config"), path.clone().into()];
        let answer = parse(args.into_iter().chain(words("-api-channel unix:s")));
        let Ok(Action::Run(i)) = answer else { panic!("{}: {answer:?}", path.display()) };
        assert_eq!(i.warnings, [] as [String; 0], "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 5, "{seen} examples");
}

#[test]
fn every_key_has_its_meaning() {
    let text = r#"{
      "boot-source":{"kernel_image_path":"k","boot_args":"a=b=c","initrd_fs_path":"i"},
      "machine-config":{"name":"n","type":"microvm","vcpu_count":"3","mem_size":"1G",
        "mem_path":"/h","mem-share":"true","dump_guest_core":false,"omit_vm_memory":false},
      "drive":[{"drive_id":"d","path_on_host":"p","read_only":true,"direct":true,
        "serial_num":"s","iothread":"t","iops":5,"bps":6,"num_queues":2,"queue_size":"64","discard":true}],
      "net":[{"iface_id":"n0","host_dev_name":"tap0","mac":"0e:90:df:9f:a8:88","tap_fd":9,
        "iothread":"t","pps":7,"bps":8,"queue_size":512}],
      "console":[{"console_id":"c","socket_path":"cs"}],
      "serial":{"stdio":false},
      "iothread":[{"id":"t"}],
      "rng":{"random_file":"/dev/random","bytes_per_sec":"100"}}"#;
    let m = file(text, "-api-channel unix:s").unwrap().machine;
    assert_eq!((m.name.as_str(), m.cpus.get(), m.memory.size.bytes()), ("n", 3, 1 << 30));
    assert!(m.memory.shared && !m.memory.dump);
    assert_eq!(m.memory.path.as_ref().unwrap().to_str(), Some("/h"));
    assert_eq!(
        (m.boot.cmdline.as_str(), m.boot.initrd.as_ref().unwrap().to_str()),
        ("a=b=c", Some("i"))
    );
    let d = &m.disks[0];
    assert_eq!((d.queues.get(), d.queue_size.get()), (2, 64));
    assert_eq!((d.iops.unwrap().get(), d.bps.unwrap().get()), (5, 6));
    assert!(d.readonly && d.direct && d.discard);
    assert_eq!(d.iothread.as_deref(), Some("t"));
    let n = &m.nics[0];
    assert_eq!((&n.tap, n.queue_size.get()), (&Tap::Fds(vec![9]), 512));
    assert_eq!((n.pps.unwrap().get(), n.bps.unwrap().get()), (7, 8));
    assert_eq!((&m.serial, m.console().unwrap().id.as_str()), (&None, "c"));
    assert_eq!(m.rng().unwrap().bps.unwrap().get(), 100);
}

#[test]
fn memory_in_huge_pages_is_a_key_and_a_flag_replaces_it() {
    let text = r#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"mem_thp":"off"}}"#;
    let thp = |line| file(text, line).unwrap().machine.memory.thp;
    assert_eq!(thp("-api-channel unix:s"), crate::Thp::Off);
    assert_eq!(thp("-api-channel unix:s -m 1G"), crate::Thp::Off);
    assert_eq!(thp("-api-channel unix:s -m 1G,thp=on"), crate::Thp::On);
}

#[test]
fn the_first_generations_core_dump_key() {
    let text =
        r#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"omit_vm_memory":true}}"#;
    assert!(!file(text, "-api-channel unix:s").unwrap().machine.memory.dump);
    let line = "-api-channel unix:s -machine microvm,dump-guest-core=on";
    assert!(file(text, line).unwrap().machine.memory.dump);
    assert_eq!(
        file_problems(
            r#"{"boot-source":{"kernel_image_path":"k"},
                "machine-config":{"omit_vm_memory":true,"dump_guest_core":true}}"#
        ),
        ["machine-config.omit_vm_memory: dump_guest_core contradicts it; give one of them"]
    );
}

#[test]
fn discarded_space_in_words_and_truth_values() {
    let of = |value: &str| {
        let drive = r#"{"drive_id":"d","path_on_host":"p","read_only":false,"direct":true"#;
        let text = format!(
            r#"{{"boot-source":{{"kernel_image_path":"k"}},"drive":[{drive},"discard":{value}}}]}}"#
        );
        file(&text, "-api-channel unix:s").map(|i| i.machine.disks[0].discard)
    };
    for (value, discards) in [("\"unmap\"", true), ("\"ignore\"", false), ("true", true)] {
        assert_eq!(of(value), Ok(discards), "{value}");
    }
    let said = of("\"trim\"").unwrap_err().to_string();
    assert!(said.ends_with("'trim': must be unmap|true|on|yes or ignore|false|off|no"), "{said}");
}

#[test]
fn a_section_of_the_wrong_kind_is_the_only_complaint() {
    assert_eq!(file_problems(r#"{"boot-source":null}"#), ["boot-source: null; must be an object"]);
}

#[test]
fn flags_replace_values_and_add_to_lists() {
    let i = file(
        MINIMAL,
        "-api-channel unix:s -m 1G -smp 2 -append quiet -kernel other -serial pty -name x \
         -drive id=data,file=d -machine mem-share=on",
    )
    .unwrap();
    let m = i.machine;
    assert_eq!(
        (m.memory.size.bytes(), m.cpus.get(), m.boot.cmdline.as_str()),
        (1 << 30, 2, "quiet")
    );
    assert_eq!((m.boot.kernel.to_str(), m.serial), (Some("other"), Some(CharBackend::Pty)));
    let ids: Vec<_> = m.disks.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["rootfs", "data"]);
    assert!(m.memory.shared);
}

#[test]
fn the_file_comes_first_wherever_it_stands() {
    let path = std::env::temp_dir().join(format!("stratovirt-cli-order-{}", std::process::id()));
    std::fs::write(&path, MINIMAL).unwrap();
    let i = run(&format!("-m 1G -api-channel unix:s -config {}", path.display()));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(i.machine.memory.size.bytes(), 1 << 30, "and any file name will do");
}

#[test]
fn an_id_of_the_file_is_taken() {
    let e = file(MINIMAL, "-api-channel unix:s -drive id=rootfs,file=x").unwrap_err().to_string();
    assert!(
        e.ends_with(
            "-drive id=rootfs,file=x: Input id 'rootfs' for drive repeat: ids must be unique"
        ),
        "{e}"
    );
}

#[test]
fn problems_of_file_and_flags_come_together_with_their_places() {
    let text = r#"{
      "boot-source":{"kernel_image_path":"k\u0000l","bootargs":"x"},
      "machine-config":{"vcpu_count":255,"mem_size":true,"type":"q35","name":null},
      "drive":[{"drive_id":"a","path_on_host":"p","read_only":"maybe"},
               {"drive_id":"b","path_on_host":7,"read_only":false,"direct":false,"iops":-1,"zz":1},
               5],
      "net":{"iface_id":"n"},
      "vsock":{"vsock_id":"v","guest_cid":4},
      "balloon":{"deflate-on-oom":true},
      "drives":[]}"#;
    let problems = file(text, "-api-channel unix:s -smp 0").unwrap_err();
    let all: Vec<_> = problems
        .iter()
        .map(|line| line.split_once(".json: ").map_or(line, |(_, rest)| rest))
        .collect();
    assert_eq!(
        all,
        [
            "boot-source.kernel_image_path: 'k\\u{0}l': must not contain a NUL character",
            "boot-source.bootargs: unknown; did you mean 'boot_args'? allowed: kernel_image_path, \
             boot_args, initrd_fs_path",
            "machine-config.name: null; must be a string",
            "machine-config.type: 'q35': machine type 'q35' is not supported; use microvm",
            "machine-config.vcpu_count: '255': not in 1..=254",
            "machine-config.mem_size: 'true': a truth value; must be a number or a string",
            "drive[0].direct: missing",
            "drive[0].read_only: 'maybe': must be on|true|yes or off|false|no",
            "drive[1].path_on_host: '7': a number; must be a string",
            "drive[1].iops: '-1': must be a number in 0..=1000000",
            "drive[1].zz: unknown; allowed: drive_id, path_on_host, read_only, direct, serial_num, \
             iothread, num_queues, queue_size, iops, bps, discard, format",
            "drive[2]: a number; must be an object",
            "net: an object; must be a list of objects",
            "vsock: virtio-vsock is not supported: leave it out",
            "balloon.deflate_on_oom: missing",
            "balloon.deflate-on-oom: unknown; did you mean 'deflate_on_oom'? allowed: deflate_on_oom, \
             free_page_reporting",
            "drives: unknown; did you mean 'drive'? allowed: boot-source, machine-config, domain, serial, \
             iothread, drive, net, console, rng, balloon",
            "-smp 0: cpus: '0': not in 1..=254",
        ]
    );
    let first = problems.iter().next().unwrap();
    assert!(first.contains("stratovirt-cli-"), "names the file: {first}");
}

#[test]
fn keys_given_twice() {
    let all = file_problems(
        r#"{"boot-source":{"kernel_image_path":"a","kernel_image_path":"b"},
            "serial":{"stdio":true},"serial":{"stdio":false},
            "machine-config":{"mem_share":true,"mem-share":true}}"#,
    );
    assert_eq!(
        all,
        [
            "boot-source.kernel_image_path: given more than once",
            "serial: given more than once",
            "machine-config.mem-share: the same as mem_share; give one of them",
        ]
    );
}

#[test]
fn vhost_is_refused_by_name() {
    let all = file_problems(
        r#"{"boot-source":{"kernel_image_path":"a"},"net":[{"iface_id":"n","host_dev_name":"t",
            "vhost_type":"vhost-kernel","vhost_fd":4}]}"#,
    );
    assert_eq!(
        all,
        [
            "net[0].vhost_type: vhost-net is not supported: leave it out",
            "net[0].vhost_fd: vhost-net is not supported: leave it out",
        ]
    );
}

#[test]
fn a_file_that_is_no_description() {
    for (text, said) in [
        ("", "not JSON: EOF"),
        ("{", "not JSON: EOF"),
        ("[]", "a list; must be an object"),
        ("null", "null; must be an object"),
        ("{} x", "not JSON: trailing characters"),
        ("\u{feff}{}", "not JSON: expected value"),
        (r#"{"serial":{"stdio":"\ud800"}}"#, "not JSON: "),
    ] {
        let all = file_problems(text);
        assert_eq!(all.len(), 1, "{text}: {all:?}");
        assert!(all[0].starts_with(said), "{text}: {all:?}");
    }
    let all = problems("-config /nowhere/vm.json -api-channel unix:s");
    assert_eq!(all.len(), 1, "{all:?}");
    assert!(
        all[0]
            .starts_with("-config: /nowhere/vm.json: Failed to open config file by: No such file"),
        "{all:?}"
    );
    let all = problems("-config / -api-channel unix:s");
    assert!(all[0].contains("Failed to open config file by: Is a directory"), "{all:?}");
}

#[test]
fn deep_and_large_files() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(file_problems(&deep)[0].contains("recursion limit exceeded"));
    let deep = format!(r#"{{"drive":{{"x":{}}}}}"#, "{\"a\":".repeat(40_000));
    assert!(file_problems(&deep)[0].contains("recursion limit exceeded"));
    let large = " ".repeat(300 << 10);
    assert!(problems_of_large(&large).contains("too large, at most 262144 bytes"));
    let many =
        format!("{{{}}}", (0..20_000).map(|n| format!("\"k{n}\":1")).collect::<Vec<_>>().join(","));
    assert_eq!(file_problems(&many).len(), 20_001, "each of them, and that there is no kernel");
}

fn problems_of_large(text: &str) -> String {
    file(text, "-api-channel unix:s").unwrap_err().to_string()
}
