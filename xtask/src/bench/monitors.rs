//! The monitors that are compared: the name of each, and its arguments to run a guest.
mod configure;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};

use super::compiled::compiled;
use super::control::Protocol;
use super::snapshots::Way;
use stories::debian::{Debian, libraries, output};
use stories::paths::Paths;

/// Where the other monitors are under [`Paths::cache`] inside an emulated host.
const PEERS: &str = "compare/peers";
/// QEMU's firmware: what `-M microvm` reads.
const FIRMWARE: [&str; 6] = [
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/kvmvapic.bin",
];
/// Where Debian's packages have QEMU.
const QEMU: &str = "usr/bin/qemu-system-x86_64";

/// Minimum length of a flat image in bytes: StratoVirt reads as many to find out whether it is a
/// bzImage.
pub const FLAT_MIN: usize = 8 << 10;

/// A guest to run.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel, in the format that the monitor boots.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// Processors.
    pub vcpus: u32,
    /// RAM in MiB.
    pub mib: u64,
    /// Whether the kernel finds its devices by ACPI and not on its command line. Some monitors need
    /// to know.
    pub acpi: bool,
    /// A raw image to write to, and a tap.
    pub devices: Option<(PathBuf, String)>,
}

/// Kernel formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An ELF file.
    Elf,
    /// A flat image for address 16 MiB that is entered at its beginning, at least [`FLAT_MIN`]
    /// long.
    Flat,
}

/// Everything that the comparison needs to know about a monitor.
#[derive(Debug)]
pub struct Monitor {
    /// Its name in tables.
    pub name: &'static str,
    /// The name of its program on PATH.
    pub program: &'static str,
    /// The argument that makes it print its version.
    version: &'static str,
    /// How it is controlled.
    pub protocol: Protocol,
    /// What it boots.
    pub form: Form,
    /// How it saves a guest.
    pub way: Way,
    /// Its standard input and output have to be a terminal.
    pub terminal: bool,
    /// Adds the arguments that make it run a guest with its serial port on standard output and its
    /// control socket at the path. May write files into the directory.
    configure: fn(&mut Command, &Guest, socket: &Path, dir: &Path) -> Result<()>,
}

/// This monitor.
pub const OURS: Monitor = Monitor {
    name: "this monitor",
    program: "stratovirt",
    version: "-V",
    protocol: Protocol::Qmp,
    form: Form::Elf,
    way: Way::Ours,
    terminal: false,
    configure: configure::ours,
};

/// This monitor with one slot for disks and one for NICs.
pub const FEW_SLOTS: Monitor =
    Monitor { name: "this monitor, 1 + 1 slots", configure: configure::few_slots, ..OURS };

/// `bare.c`: not a monitor, but the minimum that any monitor has to do.
pub const BARE: Monitor = Monitor {
    name: "bare C program",
    program: "bare",
    version: "--version",
    protocol: Protocol::Qmp,
    form: Form::Flat,
    way: Way::None,
    terminal: false,
    configure: configure::bare,
};
/// Its source.
const BARE_SOURCE: &str = include_str!("bare.c");

/// The other monitors.
pub const PEERS_KNOWN: [Monitor; 4] = [
    Monitor {
        name: "QEMU microvm",
        program: "qemu-system-x86_64",
        version: "--version",
        protocol: Protocol::Qmp,
        form: Form::Elf,
        way: Way::Qemu,
        terminal: false,
        configure: configure::qemu,
    },
    Monitor {
        name: "Firecracker",
        program: "firecracker",
        version: "--version",
        protocol: Protocol::Http {
            ready: ("GET", "/", ""),
            status: ("GET", "/", ""),
            stop: ("PATCH", "/vm", r#"{"state":"Paused"}"#),
            cont: ("PATCH", "/vm", r#"{"state":"Resumed"}"#),
        },
        form: Form::Elf,
        way: Way::Firecracker,
        terminal: false,
        configure: configure::firecracker,
    },
    Monitor {
        name: "Cloud Hypervisor",
        program: "cloud-hypervisor",
        version: "--version",
        protocol: Protocol::Http {
            ready: ("GET", "/api/v1/vmm.ping", ""),
            status: ("GET", "/api/v1/vm.info", ""),
            stop: ("PUT", "/api/v1/vm.pause", ""),
            cont: ("PUT", "/api/v1/vm.resume", ""),
        },
        form: Form::Elf,
        way: Way::CloudHypervisor,
        terminal: false,
        configure: configure::cloud_hypervisor,
    },
    Monitor {
        name: "StratoVirt",
        program: "stratovirt",
        version: "-version",
        protocol: Protocol::Qmp,
        form: Form::Flat,
        way: Way::StratoVirt,
        terminal: true,
        configure: configure::stratovirt,
    },
];

/// How a monitor is started here.
#[derive(Debug)]
enum Program {
    /// A file.
    File(PathBuf),
    /// A file with the dynamic linker and libraries beside it.
    Carried { file: PathBuf, libraries: PathBuf },
    /// QEMU from Debian's packages.
    DebianQemu(Debian),
}

/// A monitor that was found.
#[derive(Debug)]
pub struct Found {
    /// Its name in this comparison.
    pub name: String,
    /// The monitor.
    pub monitor: Monitor,
    program: Program,
}

impl Found {
    fn new(monitor: Monitor, program: Program) -> Self {
        Self { name: monitor.name.to_owned(), monitor, program }
    }

    /// A build of this monitor, under a name of its own.
    #[must_use]
    pub fn build(name: &str, file: PathBuf) -> Self {
        Self { name: name.to_owned(), monitor: OURS, program: Program::File(file) }
    }

    /// This monitor with one slot for disks and one for NICs.
    #[must_use]
    pub fn few_slots(paths: &Paths) -> Self {
        Self::new(FEW_SLOTS, Program::File(paths.stratovirt.clone()))
    }

    /// `bare.c`, compiled into `dir`.
    ///
    /// # Errors
    /// There is no C compiler, or the KVM headers are missing.
    pub fn bare(dir: &Path) -> Result<Self> {
        let program = compiled(dir, "bare", BARE_SOURCE)?;
        Ok(Self::new(BARE, Program::File(program)))
    }

    /// Whether it is this monitor.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(self.monitor.way, Way::Ours)
    }

    /// The command that runs `guest`.
    ///
    /// # Errors
    /// A configuration file cannot be written.
    pub fn command(&self, guest: &Guest, socket: &Path, dir: &Path) -> Result<Command> {
        let mut command = self.program()?;
        (self.monitor.configure)(&mut command, guest, socket, dir)?;
        Ok(command)
    }

    /// Its version, as it prints it.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn version(&self) -> Result<String> {
        let said = output(self.program()?.arg(self.monitor.version))?;
        Ok(said.lines().next().unwrap_or_default().trim().to_owned())
    }

    /// The program without arguments.
    ///
    /// # Errors
    /// QEMU from Debian's packages is incomplete.
    pub fn program(&self) -> Result<Command> {
        match &self.program {
            Program::File(file) => Ok(Command::new(file)),
            Program::Carried { file, libraries } => {
                let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
                command.arg("--library-path").arg(libraries).arg(file);
                Ok(command)
            }
            Program::DebianQemu(debian) => debian.qemu(),
        }
    }
}

/// This monitor and every other that is on PATH or was copied into this host; QEMU from Debian's
/// packages if PATH has none. Also returns the names of those that were not found.
#[must_use]
pub fn find(paths: &Paths, debian: &Debian) -> (Vec<Found>, Vec<&'static str>) {
    let mut found = vec![Found::new(OURS, Program::File(paths.stratovirt.clone()))];
    let mut missing = Vec::new();
    for monitor in PEERS_KNOWN {
        let carried = paths.cache.join(PEERS).join(monitor.program);
        let libraries = carried.with_extension("lib");
        let program = if libraries.exists() {
            Some(Program::Carried { file: carried, libraries })
        } else if carried.exists() {
            Some(Program::File(carried))
        } else {
            on_path(&monitor, paths).map(Program::File).or_else(|| {
                let qemu = monitor.program == "qemu-system-x86_64" && debian.file(QEMU).is_ok();
                qemu.then(|| Program::DebianQemu(debian.clone()))
            })
        };
        match program {
            Some(program) => found.push(Found::new(monitor, program)),
            None => missing.push(monitor.program),
        }
    }
    (found, missing)
}

/// The files of this machine's other monitors that an emulated host needs, each with its name under
/// [`Paths::cache`]. QEMU is always Debian's there: the firmware of another one may be anywhere.
///
/// # Errors
/// Debian's packages lack a part of QEMU.
pub fn files(paths: &Paths, debian: &Debian) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for found in find(paths, debian).0 {
        let name = found.monitor.program;
        match found.program {
            Program::File(file) if file != paths.stratovirt && name != "qemu-system-x86_64" => {
                // ldd fails for a static program, which has no libraries.
                let needed = output(Command::new("ldd").arg(&file)).unwrap_or_default();
                for library in libraries(&needed) {
                    let base = library.file_name().unwrap_or_default().to_string_lossy();
                    let name = Path::new(PEERS).join(name).with_extension("lib").join(&*base);
                    files.push((library.clone(), name.to_string_lossy().into_owned()));
                }
                files.push((file, format!("{PEERS}/{name}")));
            }
            _ => {}
        }
    }
    let qemu = debian.program_files(QEMU)?;
    let firmware = FIRMWARE.iter().filter_map(|name| debian.file(name).ok());
    for file in qemu.into_iter().chain(firmware) {
        let name = file.strip_prefix(&paths.cache).context("a package outside of the cache")?;
        let name = name.to_string_lossy().into_owned();
        files.push((file, name));
    }
    Ok(files)
}

/// Another program that PATH has under the monitor's name: this monitor's is also called
/// `stratovirt`.
fn on_path(monitor: &Monitor, paths: &Paths) -> Option<PathBuf> {
    let ours = fs::canonicalize(&paths.stratovirt).ok();
    let version = |program: &Path, argument: &str| {
        output(Command::new(program).arg(argument)).unwrap_or_default()
    };
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(monitor.program)).find(|path| {
        let runs = |meta: fs::Metadata| meta.is_file() && meta.permissions().mode() & 0o111 != 0;
        fs::metadata(path).is_ok_and(runs)
            && fs::canonicalize(path).ok() != ours
            && (monitor.program != OURS.program
                || version(path, monitor.version) != version(&paths.stratovirt, OURS.version))
    })
}
