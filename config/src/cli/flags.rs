//! The one table of flags: parsing, `-h`, required flags and conflicts derive from it.
use super::kinds::KINDS;
use super::table::Group::{Boot, Characters, Control, Information, Machine, Other, Process};
use super::table::Shape::{self, Optional, Plain, Properties, Switch, Words};
use super::table::{Effect, Era, Flag, Need, flag, ignored, refused, row};
use super::{action, chars, device, json, objects, process, system};

/// All flags: those of the table, and those of the kinds of devices.
pub(crate) fn flags() -> impl Iterator<Item = &'static Flag> {
    TABLE.iter().chain(KINDS.iter().flat_map(|kind| kind.flags))
}

/// The flags that do not belong to one kind of device.
#[rustfmt::skip]
pub(crate) static TABLE: &[Flag] = &[
    flag(&["config"], Plain("FILE"), Control, json::config,
         "JSON file that describes the machine; flags override its values and add to its lists").only(Era::Old),
    flag(&["api-channel"], Plain("unix:PATH"), Control, chars::api_channel,
         "serve QMP on this Unix socket").only(Era::Old).needed(Need::ControlSocket).against(&["qmp"]),
    flag(&["qmp"], Properties("unix:PATH[,server,nowait]", Some("address")), Control, chars::qmp,
         "serve QMP on this Unix socket; without server, connect to it").only(Era::New).needed(Need::ControlSocket),
    flag(&["mon"],
         Properties("chardev=ID[,id=ID],mode=control", Some("chardev")),
         Control, chars::mon,
         "serve QMP on the socket of a -chardev").repeatable().only(Era::New).needed(Need::ControlSocket),
    flag(&["name"], Plain("NAME"), Machine, system::name,
         "shown by query-name"),
    flag(&["uuid"], Plain("UUID"), Machine, system::uuid,
         "shown by query-uuid"),
    flag(&["machine"],
         Properties("[type=]microvm|none[,dump-guest-core=on|off][,mem-share=on|off][,disk-slots=N][,nic-slots=N]", Some("type")),
         Machine, system::machine,
         "machine type; dump-guest-core (on): guest memory in core dumps; mem-share (off): memory \
          that other processes can map; slots for disks (4, or as many as are configured) and NICs \
          (2, likewise), hot-plug included; none: no machine, only queries that need none"),
    flag(&["accel"], Plain("kvm"), Machine, system::accel,
         "accelerator").only(Era::New),
    flag(&["cpu"], Properties("host", Some("model")), Machine, system::cpu,
         "CPU model"),
    flag(&["smp"],
         Properties("[cpus=]N[,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]", Some("cpus")),
         Machine, system::smp,
         "vCPUs, 1 to 254 (1)"),
    flag(&["m"], Properties("[size=]N[K|M|G][,thp=on|off|auto]", Some("size")), Machine, system::memory,
         "guest memory, at least 16M (256M); a bare number is in MiB, from 1048576 on in bytes; thp (auto): use transparent huge pages; auto: unless the guest's image is smaller than one"),
    flag(&["mem-path"], Plain("PATH"), Machine, system::mem_path,
         "file, or directory of a hugetlbfs mount, that backs guest memory"),
    flag(&["mem-prealloc"], Switch, Machine, system::mem_prealloc,
         "touch all guest memory before the guest runs").only(Era::New),
    flag(&["omit_vm_memory"], Switch, Machine, system::omit_vm_memory,
         "the same as -machine dump-guest-core=off").only(Era::Old),
    flag(&["kernel"], Plain("FILE"), Boot, system::kernel,
         "ELF vmlinux, bzImage or flat vmlinux.bin"),
    flag(&["append"], Words("WORDS"), Boot, system::append,
         "kernel command line: all words up to the next flag").repeatable(),
    flag(&["initrd"], Plain("FILE"), Boot, system::initrd,
         "initial RAM disk"),
    flag(&["device"], Properties("MODEL,id=ID[,...]", Some("driver")), Other, device::device,
         "virtual device: one of the models below").repeatable(),
    flag(&["chardev"],
         Properties("stdio|pty|file|socket,id=ID[,path=PATH][,server,nowait][,replay=SIZE]", Some("backend")),
         Characters, chars::chardev,
         "character device; older form id=ID,path=SOCKET: a console by itself; replay=N[K|M], at \
          most 1M: each new connection gets the last N bytes of output first").repeatable(),
    flag(&["serial"],
         Properties("stdio|pty|chardev:ID|file,path=PATH|socket,path=PATH,server,nowait[,replay=SIZE]", Some("backend")),
         Characters, chars::serial,
         "back-end of the first serial port"),
    flag(&["object"],
         Properties("iothread,id=ID | rng-random,id=ID,filename=PATH", Some("qom-type")),
         Other, objects::object,
         "I/O thread; source of randomness").repeatable(),
    flag(&["iothread"], Properties("id=ID", None), Other, objects::iothread,
         "I/O thread, up to 8").repeatable().only(Era::Old),
    flag(&["pidfile"], Plain("FILE"), Process, process::pidfile,
         "write the process id to this file"),
    flag(&["daemonize"], Switch, Process, process::daemonize,
         "run in the background"),
    flag(&["S", "freeze"], Switch, Process, process::freeze,
         "do not start the vCPUs until QMP's cont"),
    flag(&["incoming"], Plain("file:DIR[,mapped=on|off|uffd][,disks=DIR][,HOW] | unix:SOCKET[,HOW] \
                               | fd:NUMBER[,HOW] | exec:COMMAND | replicate:PLACE[,JUDGE][,TLS]"),
         Process, process::incoming,
         "restore the snapshot in this directory, or receive a live migration from this stream; \
          mapped (on): map its memory, unchecked; off: copy and verify it; uffd: the same while \
          the guest runs; disks: directory for the machine's own copies of the disks in the \
          snapshot; HOW: clock=realtime: kvm-clock advances by the time since the save (by default \
          it resumes at the time of the save); force=on: use the disks even if they have changed \
          since; other flags may give new paths and taps; replicate: be the backup of the machine \
          that a primary (QMP: replication-start) replicates to this place; PLACE: unix:SOCKET or tcp:HOST:PORT; \
          JUDGE: witness=ID or fence=KIND, which decides whether it may run the guest; TLS: tls=DIR (certificates) or \
          tls=off, needed where the primary is on another host").only(Era::New),
    flag(&["action"],
         Properties("[shutdown=poweroff|pause|reset][,reboot=shutdown|exit-failure|pause|reset]\
                     [,panic=shutdown|exit-failure|pause|reset]", None),
         Process, action::action,
         "reaction to a guest's power-off (poweroff), reboot (exit) and panic (exit-failure): \
          poweroff: exit; pause: keep the halted machine; reset: reboot; reboot=shutdown and \
          panic=shutdown: as for shutdown; exit-failure: exit with status 1").repeatable(),
    flag(&["no-shutdown"], Switch, Process, action::no_shutdown,
         "the same as -action shutdown=pause"),
    flag(&["D"], Optional("FILE"), Process, process::log,
         "log to a file, or to standard error; STRATOVIRT_LOG_LEVEL=error|warn|info|debug|trace"),
    flag(&["disable-seccomp"], Switch, Process, process::disable_seccomp,
         "install no system call filter"),
    flag(&["sandbox"], Properties("on|off[,spawn=allow|deny]", Some("enable")), Process, process::sandbox,
         "off: as -disable-seccomp; spawn (deny): let migrate start programs (exec:)").only(Era::New),
    Flag { help: "print the version", ..row(&["V", "version"], Shape::Any, Information, Effect::Action) },
    Flag { help: "print this", ..row(&["h", "help"], Shape::Any, Information, Effect::Action) },
    ignored(&["overcommit"], Era::New),
    ignored(&["no-user-config"], Era::Both),
    ignored(&["nodefaults"], Era::Both),
    ignored(&["nographic"], Era::Both),
    ignored(&["msg"], Era::New),
    ignored(&["rtc"], Era::New),
    ignored(&["boot"], Era::New),
    ignored(&["realtime"], Era::New),
    ignored(&["display"], Era::New),
    ignored(&["usb"], Era::New),
    ignored(&["global"], Era::Both),
    ignored(&["fsdev"], Era::Old),
    ignored(&["vga"], Era::Old),
    refused(&["numa"], "NUMA for the guest"),
    refused(&["smbios"], "SMBIOS"),
    refused(&["hardware-signature"], "the ACPI hardware signature"),
    refused(&["battery"], "a battery"),
    refused(&["trace"], "tracing"),
    refused(&["mod-test"], "StratoVirt's module test mode"),
    refused(&["vnc"], "VNC"),
    refused(&["cameradev"], "a camera"),
    refused(&["windows_emu_pid"], "watching another process"),
];
