//! Messages for wrong input.
use super::*;

#[test]
fn everything_wrong_is_said_at_once() {
    let all = problems("-smp 0 -m 1 -bogus x y -drive id=a -netdev tap,id=n -serial tty -smp 2");
    assert_eq!(
        all,
        [
            "Found argument '-bogus' which wasn't expected, or isn't valid in the context. Use '-h' \
             or '-help' to get usage.",
            "The argument 'smp' was provided more than once: -smp may be given once",
            "-smp 0: cpus: '0': not in 1..=254",
            "-m 1: size: '1': 1048576 bytes, at least 16M are required",
            "-drive id=a: file: missing",
            "-netdev tap,id=n: Tap device is missing, use 'ifname' or 'fd' to configure a tap device",
            "-serial tty: backend: 'tty': must be stdio|pty|file|socket; did you mean 'pty'?",
            "Argument 'api-channel' or 'qmp' required, but not found: a control socket is \
             required, one of -api-channel unix:PATH | -qmp unix:PATH[,server,nowait] | -mon \
             chardev=ID[,id=ID],mode=control",
            "kernel file is required for microvm machine type, which is not provided: give -kernel \
             FILE, or boot-source.kernel_image_path in the file of -config",
        ]
    );
}

#[test]
fn unknown_flags() {
    for line in ["--config x", "-bogus", "-freeze_cpu", "-initrd-file x", "-vsock a", "-", "-net n"]
    {
        let said = problem(line);
        assert!(said.starts_with("Found argument '-"), "{said}");
        assert!(said.ends_with("Use '-h' or '-help' to get usage."), "{said}");
    }
    assert!(problem("-kernal x").contains("; did you mean '-kernel'?"));
    assert!(problem("--initrd x").contains("; did you mean '-initrd'?"));
    let all = problems("stray -kernel k -api-channel unix:s");
    assert_eq!(all.len(), 1);
    assert!(all[0].starts_with("Found argument 'stray' which wasn't expected"), "{all:?}");
}

#[test]
fn values_too_few_and_too_many() {
    assert_eq!(
        problem("-name"),
        "The argument 'name' requires a value, but none was supplied: -name NAME"
    );
    assert_eq!(
        problem("-daemonize yes"),
        "The value 'yes' is illegel for argument 'daemonize': -daemonize takes no value"
    );
    assert_eq!(
        problem("-initrd a b"),
        "Found argument 'b' which wasn't expected, or isn't valid in the context: -initrd takes \
         one value (quote it if it holds a space)"
    );
}

#[test]
fn words_that_are_no_text() {
    use std::os::unix::ffi::OsStringExt;
    for flag in ["-kernel", "-config", "-initrd"] {
        let line = words(&format!("-api-channel unix:s {flag}"));
        let line = line.into_iter().chain([OsString::from_vec(b"\xff".to_vec())]);
        let kernel = if flag == "-initrd" { "-kernel k" } else { "" };
        let said = parse(line.chain(words(kernel))).unwrap_err().to_string();
        assert_eq!(said, format!("{flag}: Argument '\u{fffd}' is not UTF-8"));
    }
}

#[test]
fn flags_that_exclude_each_other() {
    assert_eq!(
        problem("-qmp unix:q,server,nowait"),
        "The argument 'api-channel' cannot be used with 'qmp': give -api-channel or -qmp"
    );
}

#[test]
fn what_is_not_supported_is_named() {
    for (line, name) in [
        ("-numa node,nodeid=0", "NUMA"),
        ("-vnc 0.0.0.0:0", "VNC"),
        ("-machine Q35", "machine type 'q35'"),
        ("-machine virt", "machine type 'virt'"),
        ("-machine microvm,accel=tcg", "accelerator 'tcg'"),
        ("-accel tcg", "accelerator 'tcg'"),
        ("-cpu host,pmu=on", "performance counters"),
        ("-device vsock,id=v,guest-cid=3", "virtio-vsock"),
        ("-device virtio-balloon-pci,id=b", "PCI (use virtio-balloon-device)"),
        ("-device virtio-mem-device,id=m", "virtio-mem"),
        ("-device virtio-pmem-device,id=m", "virtio-pmem"),
        ("-device virtserialport,id=m", "virtio-serial port other than the console"),
        ("-device virtio-blk-pci,id=m", "PCI (use virtio-blk-device)"),
        ("-device vfio-pci,host=0000:00:01.0,id=v", "VFIO"),
        ("-drive id=a,file=b,format=qcow2", "format 'qcow2'"),
        ("-drive id=a,file=b,media=cdrom", "media 'cdrom'"),
        ("-drive id=a,file=b,detect-zeroes=unmap", "detecting zeroes"),
        ("-drive file=b,if=pflash,unit=0", "pflash"),
        ("-netdev tap,id=n,ifname=t,vhost=on", "vhost-net"),
        ("-netdev tap,id=n,ifname=t,vhostfd=5", "vhost-net"),
        ("-netdev vhost-user,id=n,chardev=c", "vhost-user"),
        ("-object memory-backend-ram,id=m,size=1G", "memory back-end"),
        ("-object tls-creds-x509,id=t,dir=/x", "TLS"),
        ("-serial socket,port=1,server,nowait", "TCP"),
        ("-chardev socket,id=c,port=1,server,nowait", "TCP"),
        ("-chardev socket,id=c,path=/x,nowait", "connecting to a socket"),
        ("-chardev socket,id=c,path=/x,server", "waiting for a client"),
    ] {
        let said = problem(line);
        assert!(said.contains("is not supported") && said.contains(name), "{line}: {said}");
        assert!(said.starts_with(line.split(' ').next().unwrap()), "names the flag: {said}");
    }
}

#[test]
fn a_refused_device_gives_no_second_complaint_about_its_back_end() {
    let said =
        problem("-netdev tap,id=n,ifname=tap0 -device virtio-net-pci,netdev=n,id=n,bus=pcie.0");
    assert!(said.contains("PCI (use virtio-net-device) is not supported"), "{said}");
}

#[test]
fn properties_must_be_well_formed() {
    for (line, said) in [
        ("-drive id=a,file=b,", "-drive id=a,file=b,: a comma with nothing before or after it"),
        ("-drive ,id=a,file=b", "-drive ,id=a,file=b: a comma with nothing before or after it"),
        ("-drive id=a,file=b,id=a", "-drive id=a,file=b,id=a: id: given more than once"),
        ("-drive id=a,file=b,=c", "-drive id=a,file=b,=c: '=c': must be key=value"),
        ("-drive id=a,file=", "-drive id=a,file=: file: '': must not be empty"),
        ("-drive id=a,file", "-drive id=a,file: file: needs a value, file=..."),
        ("-smp sockets=1", "-smp sockets=1: cpus: missing"),
        ("-device virtio-blk-device,id=a", "-device virtio-blk-device,id=a: drive: missing"),
        (
            "-device driver=virtio-rng-device,id=a",
            "-device driver=virtio-rng-device,id=a: rng: missing",
        ),
        ("-iothread id=", "-iothread id=: id: '': must not be empty"),
    ] {
        assert_eq!(problem(line), said);
    }
    let said = problem("-drive id=a,file=b,read_only=on");
    assert!(
        said.contains("read_only: unknown; did you mean 'readonly'? allowed: if, id, file"),
        "{said}"
    );
    let said = problem("-drive id=a,file=b,colour=red");
    assert!(said.contains("colour: unknown; allowed: if, id, file, readonly, direct"), "{said}");
    let said = problem("-device virtio-blk-devise,id=a");
    assert!(said.contains("did you mean 'virtio-blk-device'? allowed:"), "{said}");
}

#[test]
fn every_device_has_an_id_of_its_own() {
    let drives = "-drive id=a,file=a -drive id=b,file=b";
    let said = problem(&format!("{drives} -device virtio-blk-device,drive=a"));
    assert_eq!(said, "-device virtio-blk-device,drive=a: id: missing");
    let said = problem(&format!(
        "{drives} -device virtio-blk-device,drive=a,id=x -device virtio-blk-device,drive=b,id=x"
    ));
    assert!(said.contains("Input id 'x' for device repeat"), "{said}");
    let said = problem("-drive id=a,file=a -drive id=a,file=b -iothread id=z");
    assert!(said.contains("Input id 'a' for drive repeat"), "{said}");
    let said = problem("-drive id=a,file=a -netdev id=a,netdev=tap0");
    assert!(said.contains("Input id 'a' for device repeat"), "{said}");
}

#[test]
fn names_must_lead_somewhere_and_once() {
    let d = "-drive id=a,file=a";
    for (line, said) in [
        (format!("{d} -device virtio-blk-device,drive=z,id=x"), "drive: 'z': no -drive has this id"),
        (
            format!("{d} -device virtio-blk-device,drive=a,id=x -device virtio-blk-device,drive=a,id=y"),
            "drive: 'a': another -device uses this drive",
        ),
        ("-device virtio-net-device,netdev=z,id=x".into(), "netdev: 'z': no -netdev has this id"),
        ("-device virtio-rng-device,rng=z,id=x".into(), "rng: 'z': no -object rng-random has this id"),
        (format!("{d},iothread=io9"), "iothread: 'io9': no I/O thread has this id; there are: none"),
        (
            "-device virtio-serial-device,id=s -device virtconsole,id=x,chardev=z".into(),
            "chardev: 'z': no -chardev has this id",
        ),
        (
            "-chardev pty,id=c -device virtconsole,id=x,chardev=c".into(),
            "needs a -device virtio-serial-device,id=ID",
        ),
        (
            "-chardev pty,id=c -device virtio-serial-device,id=s -device virtconsole,id=x,chardev=c \
             -serial chardev:c".into(),
            "chardev: 'c': already in use",
        ),
        ("-chardev pty,id=c -mon chardev=c,mode=control".into(), "must be a -chardev socket"),
        ("-netdev id=n,netdev=t -netdev id=m,netdev=t".into(), "'t': Tap device already in use"),
        ("-netdev tap,id=n,fd=4 -netdev tap,id=m,fds=4".into(), "'4': another queue uses this descriptor"),
        ("-serial socket,path=s,server,nowait".into(), "'s': another socket uses this path"),
    ] {
        let all = problem(&line);
        assert!(all.ends_with(said), "{line}: {all}");
    }
}

#[test]
fn there_are_so_many_of_each() {
    let many =
        |n: usize, one: &dyn Fn(usize) -> String| (0..n).map(one).collect::<Vec<_>>().join(" ");
    let disks = |n| many(n, &|i| format!("-drive id=d{i},file=f{i}"));
    let nics = |n| many(n, &|i| format!("-netdev id=n{i},netdev=tap{i}"));
    assert_eq!(machine(&disks(16)).disks.len(), 16);
    assert_eq!(machine(&nics(14)).nics.len(), 14);
    assert!(problem(&disks(17)).starts_with("19 virtio devices and slots, at most 18 are allowed"));
    assert!(problem(&nics(15)).contains("4 for disks (0 configured), 15 for NICs (15 configured)"));
    let threads = |n| many(n, &|i| format!("-iothread id=a{i} -object iothread,id=b{i}"));
    assert_eq!(machine(&threads(4)).iothreads.len(), 8);
    assert!(problem(&threads(5)).contains("10 I/O threads, at most 8 are allowed"));
    assert!(problem("-chardev id=a,path=/a -chardev id=b,path=/b").contains("one virtio-console"));
}

#[test]
fn the_background_has_no_standard_streams() {
    assert!(
        problem("-daemonize -serial stdio")
            .starts_with("Serial with stdio and daemonize can't be set together")
    );
    let console =
        "-chardev stdio,id=c -device virtio-serial-device,id=s -device virtconsole,id=x,chardev=c";
    assert!(
        problem(&format!("-daemonize {console}")).starts_with("Console with stdio and daemonize")
    );
    assert!(problem(&format!("-serial stdio {console}")).contains("both use stdio"));
}

#[test]
fn control_sockets_are_unix_sockets_that_listen() {
    for (line, said) in [
        (
            "-api-channel tcp:1.2.3.4:5",
            "-api-channel: 'tcp:1.2.3.4:5': tcp type is not support yet! must be unix:PATH",
        ),
        ("-api-channel /tmp/x", "-api-channel: '/tmp/x': Failed to parse path: must be unix:PATH"),
        ("-api-channel unix:", "-api-channel: 'unix:': must not be empty"),
        (
            "-qmp unix:/x,server",
            "-qmp unix:/x,server: nowait: must be given: waiting for a client is not supported",
        ),
        (
            "-qmp unix:/x,nowait",
            "-qmp unix:/x,nowait: server: must be given: connecting to a socket is not supported",
        ),
        (
            "-qmp unix:/x,server,nowait,iothread=i",
            "-qmp unix:/x,server,nowait,iothread=i: iothread: QMP on an I/O thread is not supported: leave it out",
        ),
    ] {
        assert_eq!(problems(&format!("-kernel k {line}")), [said]);
    }
    let long = problems(&format!("-kernel k -api-channel unix:/{}", "x".repeat(107)));
    assert!(long[0].ends_with("108 bytes long, at most 107 are allowed"), "{long:?}");
}

#[test]
fn single_values_out_of_bounds() {
    let long = "x".repeat(256);
    for line in [
        format!("-name {long}"),
        format!("-iothread id={long}"),
        format!("-drive id={long},file=a"),
        "-drive id=a,file=b,serial=123456789012345678901".into(),
        format!("-drive id=a,file={}", "x".repeat(4097)),
        "-netdev id=n,netdev=sixteencharacter".into(),
    ] {
        let said = problem(&line);
        assert!(said.contains("bytes long, at most"), "{said}");
        assert!(said.len() < 600, "{said}");
    }
    for mac in [
        "0e:90:df:9f:a8",
        "0e:90:df:9f:a8:88:00",
        "0e-90-df-9f-a8-88",
        "0e:90:df:9f:a8:8g",
        "+e:90:df:9f:a8:88",
        "é:90:df:9f:a8:88",
    ] {
        let said = problem(&format!("-netdev id=n,netdev=t,mac={mac}"));
        assert!(said.contains("Mac address is illegal"), "{said}");
    }
    assert!(problem("-netdev id=n,netdev=t,mac=01:00:5e:00:00:01").contains("a group's"));
    for bad in ["2", "x", "4:", ":4", "4:-5", "99999999999"] {
        assert!(
            problem(&format!("-netdev tap,id=n,fds={bad}"))
                .contains("descriptor numbers of 3 or more")
        );
    }
    assert!(
        problem("-netdev tap,id=n,fds=4:5,queues=3")
            .contains("queues: 3, but there are 2 descriptors")
    );
    assert!(problem("-netdev tap,id=n,fd=4,ifname=t").contains("mutually exclusive"));
    assert!(problem("-netdev tap,id=n,ifname=t,queues=17").contains("'17': not in 1..=16"));
    assert!(problem("-netdev tap,id=n,ifname=../x").contains("not an interface name"));
    assert!(
        problem(
            "-netdev tap,id=n,ifname=t,queues=2 -device virtio-net-device,netdev=n,id=d,mq=off"
        )
        .contains("mq: must be on with 2 queues")
    );
    assert!(problem("-uuid 1234").contains("must be like"));
    let blk = "-drive id=a,file=b -device virtio-blk-device,drive=a,id=d";
    assert!(
        problem(&format!("{blk},queue-size=100"))
            .contains("power of two: 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024")
    );
    assert!(problem(&format!("{blk},num-queues=33")).contains("'33': not in 1..=32"));
    assert!(problem(&format!("{blk},bus=pcie.0")).contains("bus: unknown"));
}

#[test]
fn what_needs_no_host_is_said_with_everything_else() {
    let text = r#"{"boot-source":{"kernel_image_path":"k","boot_args":"a\nb"},
                   "machine-config":{"vcpu_count":0}}"#;
    let all = file_problems(text);
    assert_eq!(all.len(), 2, "{all:#?}");
    assert!(all[0].starts_with("boot-source.boot_args: 'a\\nb': it has a line break at byte 1"));
    assert_eq!(
        problem("-smp 252,sockets=84,cores=3"),
        "-smp 252,sockets=84,cores=3: this topology needs APIC ids above 254: use fewer sockets or \
         powers of two"
    );
    assert!(problem("-append é").contains("-append: 'é': it has \"é\" at byte 0"));
    let said = problem(&format!("-append {}", "x".repeat(65536)));
    assert!(said.ends_with("it has 65536 bytes; the kernel takes at most 65535"), "{said}");
}
