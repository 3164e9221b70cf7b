//! Command lines of documents and container runtimes, verbatim.
use crate::Aio;

use super::*;

#[test]
fn quick_start_of_the_first_generation() {
    let i =
        run("-kernel vmlinux.bin -append console=ttyS0 pci=off reboot=k panic=1 root=/dev/vda \
                 -drive file=rootfs.ext4,id=rootfs,readonly=off -api-channel unix:/tmp/s.sock \
                 -serial stdio");
    assert_eq!(i.machine.boot.cmdline, "console=ttyS0 pci=off reboot=k panic=1 root=/dev/vda");
    assert_eq!(i.machine.boot.kernel.to_str(), Some("vmlinux.bin"));
    assert_eq!(i.control, [Control { path: "/tmp/s.sock".into(), connects: false }]);
    assert_eq!(i.machine.serial, Some(CharBackend::Stdio));
    let [disk] = i.machine.disks.as_slice() else { panic!() };
    assert_eq!((disk.id.as_str(), disk.readonly, disk.direct), ("rootfs", false, true));
    assert_eq!((disk.queues.get(), disk.queue_size.get(), disk.aio), (1, 256, Aio::Auto));
    assert_eq!((i.machine.cpus.get(), i.machine.memory.size.bytes()), (1, 256 << 20));
    assert_eq!(i.machine.name, "StratoVirt");
    assert!(i.machine.memory.dump && !i.machine.memory.shared);
    assert!(!i.paused && !i.disable_seccomp);
    assert_eq!(i.log, Log::Off);
}

#[test]
fn quick_start_of_the_second_generation() {
    let i = run("-machine microvm -kernel K \
                 -append \"console=ttyS0 root=/dev/vda reboot=k panic=1\" \
                 -drive file=R,id=rootfs,readonly=off \
                 -device virtio-blk-device,drive=rootfs,id=rootfs \
                 -qmp unix:/tmp/s,server,nowait -serial stdio");
    let [disk] = i.machine.disks.as_slice() else { panic!("one disk: {:?}", i.machine.disks) };
    assert_eq!((disk.id.as_str(), disk.path.to_str()), ("rootfs", Some("R")));
    assert_eq!(i.machine.boot.cmdline, "console=ttyS0 root=/dev/vda reboot=k panic=1");
}

const KATA_PARAMETERS: &str = "systemd.unit=kata-containers.target \
    systemd.mask=systemd-networkd.service root=/dev/vda1 \
    rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 reboot=k panic=1 net.ifnames=0 \
    ramdom.trust_cpu=on pci=off iommu=off acpi=off quiet 8250.nr_uarts=0 agent.log_vport=1025";

fn kata(devices: &str) -> String {
    format!(
        "-name sandbox-0123 -uuid 8C3E7B1A-0d2f-4b5c-9e6f-112233445566 -smp 1 -m 2048 \
         -kernel /usr/share/kata-containers/vmlinux.bin -append \"{KATA_PARAMETERS}\" \
         -qmp unix:/run/vc/vm/0123/qmp.socket,server,nowait -D -disable-seccomp \
         -machine type=microvm,dump-guest-core=off,mem-share=on \
         -object rng-random,id=objrng0,filename=/dev/urandom \
         -device virtio-rng-device,rng=objrng0,id=virtio-rng0 \
         -drive id=rootfs,file=/usr/share/kata-containers/kata.img,readonly=on,direct=off \
         -device virtio-blk-device,drive=rootfs,id=virtio-blk0 {devices} \
         -netdev tap,id=tap0_kata,fds=4 \
         -device virtio-net-device,netdev=tap0_kata,id=tap0_kata,mac=02:42:ac:11:00:02"
    )
}

#[test]
fn kata_without_what_is_not_supported() {
    let i = run(&kata(""));
    let m = &i.machine;
    assert_eq!(m.boot.cmdline, KATA_PARAMETERS, "kernel parameters pass through untouched");
    assert_eq!((m.memory.size.bytes(), m.memory.shared, m.memory.dump), (2048 << 20, true, false));
    assert_eq!(m.name, "sandbox-0123");
    assert_eq!(m.uuid, "8c3e7b1a-0d2f-4b5c-9e6f-112233445566");
    let [disk] = m.disks.as_slice() else { panic!() };
    assert_eq!((disk.id.as_str(), disk.readonly, disk.direct), ("virtio-blk0", true, false));
    let [nic] = m.nics.as_slice() else { panic!() };
    assert_eq!((&nic.tap, nic.queue_pairs.get()), (&Tap::Fds(vec![4]), 1));
    assert_eq!(nic.mac, Some([0x02, 0x42, 0xac, 0x11, 0x00, 0x02]));
    let rng = m.rng().unwrap();
    assert_eq!((rng.id.as_str(), rng.path.to_str()), ("virtio-rng0", Some("/dev/urandom")));
    assert_eq!((i.log, i.disable_seccomp), (Log::Stderr, true));
    let [warning] = i.warnings.as_slice() else { panic!("{:?}", i.warnings) };
    assert!(warning.starts_with("no serial port and no console"), "{warning}");
}

#[test]
fn kata_for_debugging_has_a_console() {
    let i = run(&kata(
        "-device virtio-serial-device,id=virtio-serial0 \
         -chardev socket,id=charconsole0,path=/run/vc/vm/0123/console.socket,server,nowait \
         -device virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
    ));
    let console = i.machine.console().unwrap();
    assert_eq!(console.id, "charconsole0");
    assert_eq!(
        console.backend,
        CharBackend::Socket { path: "/run/vc/vm/0123/console.socket".into(), replay: 0 }
    );
}

#[test]
fn kata_with_vsock_and_shared_directories_is_refused_by_name_all_at_once() {
    let all = problems(&kata(
        "-device vhost-vsock-device,id=vsock-id,guest-cid=3,vhostfd=3 \
         -chardev socket,id=virtio_fs,path=/run/vc/vm/0123/virtiofs_kata.socket,server,nowait \
         -device vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0",
    ));
    assert_eq!(
        all,
        [
            "-device vhost-vsock-device,id=vsock-id,guest-cid=3,vhostfd=3: virtio-vsock is not \
             supported: leave it out",
            "-device vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0: \
             vhost-user-fs is not supported: leave it out",
        ]
    );
}

fn kuasar(machine: &str, more: &str) -> String {
    format!(
        "-name sandbox-k -uuid 8c3e7b1a-0d2f-4b5c-9e6f-112233445566 -machine {machine},mem-share=on \
         -qmp unix:/run/k-qmp.sock,server,nowait -kernel K -initrd I \
         -append \"console=hvc0 console=hvc1 iommu=off panic=1 pcie_ports=native \
         task.log_level=debug task.sharefs_type=virtiofs\" -smp cpus=1 -m 1024M \
         -pidfile /run/k/sandbox-k.pid -D /run/k/sandbox-k.log \
         -global pcie-root-port.fast-unplug=1 -daemonize -disable-seccomp -mem-prealloc \
         -object rng-random,id=rng0,filename=/dev/urandom \
         -device virtio-rng-device,id=virtio-rng0,rng=rng0 \
         -device virtio-serial-device,id=virtio-serial0 \
         -chardev socket,id=charconsole0,path=/run/k/console.sock,server,nowait \
         -device virtconsole,id=virtio-console0,chardev=charconsole0 \
         -netdev tap,id=net-tap0,fds=5 \
         -device virtio-net-device,id=virtio-net0,netdev=net-tap0,mac=52:54:00:12:34:56,mq=off,vectors=4 \
         {more}"
    )
}

#[test]
fn kuasar_on_a_microvm() {
    let i = run(&kuasar("microvm", ""));
    assert!(i.machine.memory.prealloc && i.machine.memory.shared);
    assert_eq!(i.pidfile.unwrap().to_str(), Some("/run/k/sandbox-k.pid"));
    assert_eq!(i.log, Log::File("/run/k/sandbox-k.log".into()));
    assert_eq!(i.machine.memory.size.bytes(), 1 << 30);
    assert_eq!(i.machine.nics[0].id, "virtio-net0");
    assert_eq!(i.machine.boot.initrd.unwrap().to_str(), Some("I"));
}

#[test]
fn kuasar_on_a_standard_machine_gets_every_reason() {
    let all = problems(&kuasar(
        "q35",
        "-drive file=OVMF_CODE.fd,if=pflash,format=raw,unit=0,readonly=on \
         -device pcie-root-port,port=0x0,addr=0x1.0x0,bus=pcie.0,id=pcie.1 \
         -device vhost-vsock-pci,id=vsock-5,guest-cid=5,vhostfd=3",
    ));
    assert_eq!(
        all,
        [
            "-machine q35,mem-share=on: type: 'q35': machine type 'q35' is not supported; use \
             microvm",
            "-drive file=OVMF_CODE.fd,if=pflash,format=raw,unit=0,readonly=on: if: 'pflash': a \
             firmware flash (pflash) is not supported; use none",
            "-device pcie-root-port,port=0x0,addr=0x1.0x0,bus=pcie.0,id=pcie.1: PCI is not \
             supported: leave it out",
            "-device vhost-vsock-pci,id=vsock-5,guest-cid=5,vhostfd=3: virtio-vsock is not \
             supported: leave it out",
        ]
    );
}

#[test]
fn older_netdev_drive_chardev_and_rng_are_devices_by_themselves() {
    let m = machine(
        "-netdev id=net0,netdev=tap0,mac=0e:90:df:9f:a8:88,iothread=io1 -iothread id=io1 \
         -drive id=d0,file=a.img,serial=abc,iothread=io1,iops=100 \
         -chardev id=charconsole0,path=/tmp/c -rng random_file=/dev/random,bytes_per_sec=64",
    );
    assert_eq!(m.nics[0].tap, Tap::Name("tap0".parse().unwrap()));
    assert_eq!((m.nics[0].id.as_str(), m.nics[0].iothread.as_deref()), ("net0", Some("io1")));
    assert_eq!((m.disks[0].serial.as_deref(), m.disks[0].iops.unwrap().get()), (Some("abc"), 100));
    assert_eq!(
        m.console().unwrap().backend,
        CharBackend::Socket { path: "/tmp/c".into(), replay: 0 }
    );
    assert_eq!(m.rng().unwrap().bps.unwrap().get(), 64);
    assert_eq!(m.iothreads, ["io1"]);
}

#[test]
fn a_tap_before_the_older_keys_as_v0_1_0_has_it() {
    let m = machine("-netdev tap,id=net0,netdev=tap0,fds=7");
    assert_eq!(m.nics[0].tap, Tap::Fds(vec![7]));
}

#[test]
fn version_and_help_need_nothing_else_and_win_over_mistakes() {
    for line in ["-version", "-V", "-bogus -V", "-V -name"] {
        let answer = parse(words(line).into_iter());
        let Ok(Action::PrintVersion(text)) = answer else { panic!("{line}: {answer:?}") };
        assert!(text.starts_with("StratoVirt 0."), "{text}");
    }
    for line in ["-h", "-help", "-m 0 -h"] {
        assert!(matches!(parse(words(line).into_iter()), Ok(Action::PrintHelp(_))), "{line}");
    }
}

#[test]
fn help_names_every_flag_of_the_table_and_every_model() {
    let Ok(Action::PrintHelp(text)) = parse(words("-h").into_iter()) else { panic!() };
    let shown: Vec<_> = text.split([' ', ',', '\n']).collect();
    for flag in crate::cli::flags::TABLE {
        for name in flag.names {
            assert!(shown.contains(&format!("-{name}").as_str()), "-{name}");
        }
    }
    for model in crate::cli::kinds::models() {
        assert!(text.contains(model.name), "{}", model.name);
    }
    assert!(text.lines().all(|line| line.len() <= 160), "lines a terminal can show:\n{text}");
}

#[test]
fn names_of_flags_are_unique_and_conflicts_name_flags() {
    let table = crate::cli::flags::TABLE;
    let names: Vec<_> = table.iter().flat_map(|flag| flag.names).collect();
    let unique: std::collections::HashSet<_> = names.iter().collect();
    assert_eq!(names.len(), unique.len());
    for conflict in table.iter().flat_map(|flag| flag.conflicts) {
        assert!(names.contains(&conflict), "{conflict}");
    }
}

#[test]
fn flags_of_habit_have_no_effect_whatever_follows_them() {
    let plain = machine("");
    let habit = machine(
        "-overcommit mem-lock=off -no-user-config -nodefaults -nographic \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -msg timestamp=on -rtc base=utc,driftfix=slew -boot strict=on -display none -usb \
         -global a.b=c -global d.e=f -realtime mlock=off -fsdev local -vga none",
    );
    assert_eq!(plain, habit);
}
