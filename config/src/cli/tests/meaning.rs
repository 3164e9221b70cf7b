//! The meaning of values.
use crate::{Aio, BalloonConfig, DeviceConfig, Thp, Topology};

use super::*;

#[test]
fn socket_paths_may_hold_an_equals_sign() {
    for line in ["-qmp unix:/run/a=b/s,server,nowait", "-api-channel unix:/run/a=b/s"] {
        let i = run(&format!("-kernel k {line}"));
        assert_eq!(i.control, [Control { path: "/run/a=b/s".into(), connects: false }], "{line}");
    }
}

#[test]
fn a_bare_memory_size_counts_mib_when_it_is_too_small_for_bytes() {
    for (given, bytes) in [
        ("1024", 1024 << 20),
        ("268435456", 268_435_456),
        ("1048575", 1_048_575 << 20),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("1G", 1 << 30),
        ("size=1g", 1 << 30),
        ("16384K", 16 << 20),
        ("16", 16 << 20),
        ("2T", 2 << 40),
        ("512M,maxmem=512M", 512 << 20),
    ] {
        assert_eq!(machine(&format!("-m {given}")).memory.size.bytes(), bytes, "{given}");
    }
}

#[test]
fn memory_comes_in_huge_pages_or_not() {
    for (line, thp) in [("-m 64", Thp::Auto), ("-m 64,thp=off", Thp::Off), ("-m thp=on", Thp::On)] {
        let memory = machine(line).memory;
        assert_eq!(memory.thp, thp, "{line}");
        let mib = if line.contains("64") { 64 } else { 256 };
        assert_eq!(memory.size.bytes(), mib << 20, "{line}");
    }
    assert!(problem("-m 64,thp=yes").starts_with("-m 64,thp=yes: thp: 'yes'"));
}

#[test]
fn memory_sizes_that_cannot_be() {
    for (given, why) in [
        ("15M", "15728640 bytes, at least 16M are required"),
        ("0", "0 bytes, at least 16M are required"),
        ("16777215T", "18446742974197923840 bytes, at most 4194303G can be addressed"),
        ("268435457", "unaligned with 1048576 for memory"),
        ("18446744073709551615G", "does not fit into 64 bits"),
        ("99999999999999999999999", "does not fit into 64 bits"),
        ("17592186044416M", "does not fit into 64 bits"),
    ] {
        assert_eq!(problem(&format!("-m {given}")), format!("-m {given}: size: '{given}': {why}"));
    }
    for malformed in ["1X", "M", "+1G", "0x10M", "1.5G", "1Gé", "é"] {
        let said = problem(&format!("-m {malformed}"));
        assert!(said.contains("must be a number with the suffix K, M, G or T"), "{said}");
    }
}

#[test]
fn a_topology_is_completed_and_must_fit() {
    let topology = |line: &str| {
        let Topology { sockets, dies, clusters, cores, threads } = machine(line).topology;
        [sockets, dies, clusters, cores, threads]
    };
    assert_eq!(topology(""), [1, 1, 1, 1, 1]);
    assert_eq!(topology("-smp 4"), [1, 1, 1, 4, 1]);
    assert_eq!(topology("-smp cpus=4,sockets=2"), [2, 1, 1, 2, 1]);
    assert_eq!(topology("-smp 8,cores=2"), [4, 1, 1, 2, 1]);
    assert_eq!(topology("-smp 8,cores=2,sockets=2"), [2, 1, 1, 2, 2]);
    assert_eq!(topology("-smp 8,sockets=1,dies=2,clusters=2,cores=2,threads=1"), [1, 2, 2, 2, 1]);
    assert_eq!(topology("-smp 4,maxcpus=4"), [1, 1, 1, 4, 1]);
    let said = problem("-smp 4,sockets=3");
    assert!(
        said.contains(
            "sockets 3 x dies 1 x clusters 1 x cores 1 x threads 1 = 3; must equal cpus 4"
        ),
        "{said}"
    );
    let said = problem("-smp 4,maxcpus=8");
    assert!(said.contains("maxcpus: vCPU hot-plug is not supported; must be 4"), "{said}");
    let huge = "-smp 254,sockets=254,dies=254,clusters=254,cores=254,threads=254";
    assert!(problem(huge).contains("must equal cpus 254"));
}

#[test]
fn vcpus_from_1_to_254() {
    assert_eq!(machine("-smp 254").cpus.get(), 254);
    for bad in ["0", "255", "256", "99999999999999999999"] {
        assert_eq!(
            problem(&format!("-smp {bad}")),
            format!("-smp {bad}: cpus: '{bad}': not in 1..=254")
        );
    }
    assert_eq!(problem("-smp one"), "-smp one: cpus: 'one': must be a number in 1..=254");
}

#[test]
fn truth_has_three_spellings() {
    for (word, truth) in [
        ("on", true),
        ("true", true),
        ("yes", true),
        ("off", false),
        ("false", false),
        ("no", false),
    ] {
        assert_eq!(
            machine(&format!("-drive id=a,file=b,readonly={word}")).disks[0].readonly,
            truth
        );
    }
    assert_eq!(
        problem("-drive id=a,file=b,readonly=maybe"),
        "-drive id=a,file=b,readonly=maybe: readonly: 'maybe': must be on|true|yes or off|false|no"
    );
}

#[test]
fn kernel_parameters_pass_through_untouched() {
    let line = "root=UUID=0-1 rootflags=data=ordered,errors=remount-ro  a=b=c,d";
    assert_eq!(machine(&format!("-append \"{line}\"")).boot.cmdline, line);
    assert_eq!(machine("-append a b -append c").boot.cmdline, "a b c");
    assert_eq!(machine("-append \"\"").boot.cmdline, "");
}

#[test]
fn a_kernel_alone_is_a_machine() {
    let m = machine("");
    assert!(m.disks.is_empty() && m.boot.initrd.is_none());
}

#[test]
fn a_drive_named_by_a_device_is_one_disk_with_both_halves() {
    let m = machine(
        "-object iothread,id=io0 \
         -drive id=b,file=b.img,throttling.iops-total=1000,throttling.bps-total=5000,aio=io_uring,discard=unmap \
         -drive id=a,file=a.img,direct=off,aio=off,format=raw,if=none,media=disk,detect-zeroes=off \
         -device virtio-blk-device,drive=b,id=blk-b,serial=S,num-queues=4,queue-size=512,iothread=io0,bootindex=1",
    );
    let [a, b] = m.disks.as_slice() else { panic!("{:?}", m.disks) };
    assert_eq!((a.id.as_str(), a.aio, a.direct, a.queues.get()), ("a", Aio::Off, false, 1));
    assert_eq!((b.id.as_str(), b.aio, b.discard), ("blk-b", Aio::IoUring, true));
    assert_eq!((b.queues.get(), b.queue_size.get()), (4, 512));
    assert_eq!((b.iops.unwrap().get(), b.bps.unwrap().get()), (1000, 5000));
    assert_eq!((b.serial.as_deref(), b.iothread.as_deref()), (Some("S"), Some("io0")));
}

#[test]
fn no_requests_per_second_means_no_limit() {
    assert_eq!(machine("-drive id=a,file=b,iops=0").disks[0].iops, None);
    assert!(
        problem("-drive id=a,file=b,iops=1000001").contains("iops: '1000001': not in 0..=1000000")
    );
}

#[test]
fn taps_by_name_and_by_descriptors() {
    let nic = |line: &str| machine(line).nics.into_iter().next().unwrap();
    let device = "-device virtio-net-device,netdev=n,id=d,mq=on,queue-size=1024";
    let n = nic(&format!("-netdev tap,id=n,ifname=tap0,queues=4,vhost=off {device}"));
    assert_eq!((n.queue_pairs.get(), n.queue_size.get()), (4, 1024));
    assert_eq!(n.tap, Tap::Name("tap0".parse().unwrap()));
    let n = nic(&format!("-netdev tap,id=n,fds=5:6 {device}"));
    assert_eq!((&n.tap, n.queue_pairs.get()), (&Tap::Fds(vec![5, 6]), 2));
    let n = nic("-netdev tap,id=n,fd=3,throttling.pps-total=10,throttling.bps-total=20");
    let (pps, bps) = (n.pps.unwrap().get(), n.bps.unwrap().get());
    assert_eq!((n.tap, pps, bps, n.mac), (Tap::Fds(vec![3]), 10, 20, None));
}

#[test]
fn the_serial_port_leads_anywhere() {
    let serial = |line: &str| machine(line).serial;
    assert_eq!(serial(""), None);
    assert_eq!(serial("-serial pty"), Some(CharBackend::Pty));
    assert_eq!(serial("-serial file,path=/tmp/l"), Some(CharBackend::File("/tmp/l".into())));
    let socket = Some(CharBackend::Socket { path: "/tmp/x".into(), replay: 0 });
    assert_eq!(serial("-serial socket,path=/tmp/x,server,nowait"), socket);
    assert_eq!(serial("-serial socket,path=/tmp/x,server=on,wait=off"), socket);
    assert_eq!(serial("-chardev id=c,path=/tmp/x -serial chardev:c"), socket);
    assert_eq!(serial("-chardev pty,id=p -serial chardev:p"), Some(CharBackend::Pty));
    assert_eq!(
        problem("-serial chardev:nobody"),
        "-serial chardev:nobody: chardev: 'nobody': no -chardev has this id"
    );
}

#[test]
fn a_second_control_socket() {
    let i = run("-kernel k -serial pty -qmp unix:/a,server,nowait \
                 -chardev socket,path=/b,id=m,server,nowait -mon chardev=m,id=monitor,mode=control");
    assert_eq!(
        i.control.iter().map(|c| c.path.to_str().unwrap()).collect::<Vec<_>>(),
        ["/a", "/b"]
    );
    assert!(i.warnings.is_empty());
    let i = run("-kernel k -chardev socket,path=/b,id=m,server,nowait -mon chardev=m,mode=control");
    assert_eq!(i.control.len(), 1, "a monitor alone is enough");
    let i = run("-kernel k -api-channel unix:/a,nowait,whatever");
    assert_eq!(i.control[0].path.to_str(), Some("/a"));
}

#[test]
fn rates_of_randomness() {
    let rng = "-object rng-random,id=o,filename=/dev/urandom -device virtio-rng-device,rng=o,id=r";
    assert_eq!(machine(rng).rng().unwrap().bps, None);
    assert_eq!(
        machine(&format!("{rng},max-bytes=1000,period=500")).rng().unwrap().bps.unwrap().get(),
        2000
    );
    assert!(problem(&format!("{rng},max-bytes=1000")).contains("must be given together"));
    assert!(problem(&format!("{rng},max-bytes=1,period=1000")).contains("not in 64..=1000000000"));
    assert!(
        problem("-rng random_file=/r,bytes_per_sec=63").contains("'63': not in 64..=1000000000")
    );
}

#[test]
fn a_balloon_in_every_way() {
    let balloon = |line: &str| match machine(line).devices.as_slice() {
        [DeviceConfig::Balloon(balloon)] => balloon.clone(),
        other => panic!("{line}: {other:?}"),
    };
    let made = |id: &str, deflate_on_oom, free_page_reporting| BalloonConfig {
        id: id.parse().unwrap(),
        deflate_on_oom,
        free_page_reporting,
    };
    assert_eq!(balloon("-balloon"), made("balloon0", false, false));
    assert_eq!(balloon("-balloon deflate-on-oom=true"), made("balloon0", true, false));
    assert_eq!(balloon("-balloon free-page-reporting=on"), made("balloon0", false, true));
    let device = "-device virtio-balloon-device,id=b,deflate-on-oom=true,free-page-reporting=true";
    assert_eq!(balloon(device), made("b", true, true));
    let text = r#"{"boot-source":{"kernel_image_path":"k"},"balloon":{"deflate_on_oom":true}}"#;
    let of_file = super::file(text, "-api-channel unix:s").unwrap().machine;
    assert_eq!(of_file.devices, [DeviceConfig::Balloon(made("balloon0", true, false))]);
    let both = super::file(text, "-api-channel unix:s -balloon").unwrap().machine;
    assert_eq!(both.devices, [DeviceConfig::Balloon(made("balloon0", false, false))]);
    assert!(problem(&format!("{device} -balloon")).contains("there can be one virtio-balloon"));
    assert!(problem("-balloon deflate-on-oom=2").contains("must be on|true|yes"));
    assert!(problem("-balloon on").contains("-balloon on: on: unknown; allowed: deflate-on-oom"));
}

#[test]
fn a_character_device_for_nothing_is_a_warning() {
    let i = run("-kernel k -api-channel unix:s -serial pty -chardev pty,id=x");
    assert_eq!(i.warnings, ["-chardev pty,id=x: not used"]);
}

#[test]
fn process_flags() {
    let i = run("-kernel k -api-channel unix:s -freeze -D -pidfile p -daemonize -omit_vm_memory \
                 -machine dump-guest-core=on -mem-path /dev/hugepages -accel kvm -cpu host");
    assert!(i.paused && !i.machine.memory.dump);
    assert_eq!(i.machine.memory.path.unwrap().to_str(), Some("/dev/hugepages"));
    assert!(run("-kernel k -api-channel unix:s -S").paused);
}

#[test]
fn a_socket_replays_as_much_as_it_is_asked_to() {
    let replay = |line: &str| match machine(line).serial {
        Some(CharBackend::Socket { replay, .. }) => replay,
        other => panic!("{other:?}"),
    };
    let socket = "-serial socket,path=/tmp/x,server,nowait";
    for (said, bytes) in [("64K", 64 << 10), ("1M", 1 << 20), ("100", 100), ("0", 0)] {
        assert_eq!(replay(&format!("{socket},replay={said}")), bytes);
    }
    let chardev = "-chardev socket,id=c,path=/tmp/x,server,nowait,replay=2k";
    assert_eq!(replay(&format!("{chardev} -serial chardev:c")), 2048);
    assert_eq!(replay("-chardev id=c,path=/tmp/x,replay=1k -serial chardev:c"), 1024);
    for wrong in ["1025K", "2M", "1G", "-1", "", "K", "4194304K"] {
        let said = problem(&format!("{socket},replay={wrong}"));
        assert!(said.contains("at most 1024K"), "{said}");
    }
    assert!(problem("-serial stdio,replay=1K").contains("replay: unknown"));
    assert!(
        problem(&format!("{chardev} -mon chardev=c,mode=control"))
            .contains("replay is not available")
    );
}

#[test]
fn the_guest_agent_s_console_stands_beside_the_serial_port() {
    let m = machine(
        "-serial socket,path=/tmp/console,server,nowait,replay=64K \
         -chardev socket,id=org.qemu.guest_agent.0,path=/tmp/agent,server,nowait \
         -device virtio-serial-device,id=s -device virtconsole,chardev=org.qemu.guest_agent.0,id=a",
    );
    assert!(m.serial.is_some());
    assert_eq!(m.console().unwrap().id, "org.qemu.guest_agent.0");
    let text = r#"{"boot-source":{"kernel_image_path":"k"},"serial":{"stdio":true},
        "console":[{"console_id":"org.qemu.guest_agent.0","socket_path":"/tmp/agent"}]}"#;
    let m = super::file(text, "-api-channel unix:s").unwrap().machine;
    assert_eq!(m.console().unwrap().id, "org.qemu.guest_agent.0");
    assert!(m.serial.is_some());
}

#[test]
fn slots_are_as_many_as_devices_or_as_are_asked_for() {
    let slots = |line: &str| {
        let slots = machine(line).slots;
        (slots.disks(), slots.nics())
    };
    assert_eq!(slots(""), (4, 2), "as many as StratoVirt has");
    let five = "-drive id=a,file=a -drive id=b,file=b -drive id=c,file=c -drive id=d,file=d \
                -drive id=e,file=e";
    assert_eq!(slots(five), (5, 2));
    assert_eq!(slots(&format!("{five} -machine microvm,disk-slots=8,nic-slots=0")), (8, 0));
    assert_eq!(slots("-machine disk-slots=0,nic-slots=0"), (0, 0));
    let text = r#"{"boot-source":{"kernel_image_path":"k"},"machine-config":{"disk-slots":8,"nic-slots":1}}"#;
    let slots = file(text, "-api-channel unix:s -machine disk-slots=9").unwrap().machine.slots;
    assert_eq!((slots.disks(), slots.nics()), (9, 1), "the command line replaces the file's value");

    assert_eq!(
        problem(&format!("{five} -machine disk-slots=4")),
        "-machine disk-slots=4: disk-slots: 4 slots for disks are fewer than the disks that are configured \
         (5)"
    );
    let rng = "-rng random_file=/dev/urandom -chardev id=c,path=/c";
    assert_eq!(
        problem(&format!("{rng} -machine disk-slots=17,nic-slots=0")),
        "-machine disk-slots=17,nic-slots=0: disk-slots: 19 virtio devices and slots, at most 18 are allowed: 17 for disks (0 \
         configured), 0 for NICs (0 configured), 1 for the console, 1 for the rng; -machine \
         disk-slots=N,nic-slots=N, or keys of these names in machine-config, set lower numbers"
    );
    assert!(problem("-machine nic-slots=19").contains("nic-slots: '19'"));
}

#[test]
fn a_device_that_nothing_names_needs_no_id() {
    let line = "-object rng-random,id=o,filename=/dev/urandom -device virtio-rng-device,rng=o \
                -device virtio-serial-device -chardev pty,id=c -device virtconsole,id=v,chardev=c";
    let made = machine(line);
    assert_eq!(made.rng().unwrap().id, "rng0");
    assert_eq!(made.console().unwrap().id, "c");
    // A device of a later flag keeps its own id in any case.
    let line = format!("{line} -drive id=rng0,file=f");
    assert_eq!(machine(&line).rng().unwrap().id, "rng00");
    assert!(
        problem("-drive id=d,file=f -device virtio-blk-device,drive=d").contains("id: missing")
    );
}

#[test]
fn what_is_off_anyway_may_be_said() {
    machine("-cpu host,pmu=off,sve=off -netdev tap,id=n,ifname=t,macnat=off,vhost=off");
    assert!(problem("-cpu host,pmu=on").contains("pmu"));
    assert!(problem("-netdev tap,id=n,ifname=t,macnat=on").ends_with("not supported; use off"));
}

#[test]
fn without_server_the_monitor_connects() {
    let i = run("-kernel k -serial pty -qmp unix:/a");
    assert_eq!(i.control, [Control { path: "/a".into(), connects: true }]);
    for line in ["-qmp unix:/a,nowait", "-qmp unix:/a,server", "-qmp unix:/a,wait=off"] {
        assert!(!problems(&format!("-kernel k {line}")).is_empty(), "{line}");
    }
}

/// libvirt queries a monitor's features this way.
#[test]
fn no_machine_needs_no_kernel() {
    let i = run("-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg \
                 -qmp unix:/caps,server=on,wait=off -pidfile /p -daemonize");
    assert!(i.no_machine && i.warnings.is_empty());
    assert!(!run("-kernel k -qmp unix:/a,server,nowait -machine microvm").no_machine);
}
