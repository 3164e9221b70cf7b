//! The set-up of every measurement: a disk, a tap, a peer that answers there, kernels in every
//! format.
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::density::Counts;
use super::guests::{HOST_ADDRESS, payload_elf, serve_peer, small_talker_elf, talker_elf};
use super::interrupt::Interrupt;
use super::measure::{INITRAMFS, Task};
use super::monitors::{FLAT_MIN, Form, Found, Guest};
use stories::debian::Debian;
use stories::net::Tap;
use stories::paths::Paths;
use stories::{guest, kernel};

/// RAM of every guest but the large ones, MiB.
pub const MIB: u64 = 256;
/// Kernel arguments of every Linux guest: its console, and to reboot on a panic instead of hanging.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet";
/// Bytes of the disk; all of it fits into the host's page cache.
const DISK: u64 = 256 << 20;
/// The tap.
const TAP: &str = "compare0";
/// The congestion control of this namespace's TCP, and the file that sets it.
const CONGESTION_CONTROL: (&str, &str) = ("/proc/sys/net/ipv4/tcp_congestion_control", "reno");

/// Everything that a measurement uses.
pub struct Rig {
    /// The paths of this process.
    pub paths: Paths,
    /// Where the monitors' files are.
    pub dir: PathBuf,
    /// Seconds for each figure that a guest measures.
    pub seconds: f64,
    /// How many machines there are where many run at once.
    pub counts: Counts,
    /// Whether to end early.
    pub interrupt: Interrupt,
    disk: PathBuf,
    _tap: Tap,
}

impl Rig {
    /// Sets everything up, in this network namespace.
    ///
    /// # Errors
    /// There is no room for the disk, or this process may not create a tap.
    pub fn new(paths: &Paths, debian: &Debian, task: &Task, interrupt: Interrupt) -> Result<Self> {
        let dir = paths.fresh_scratch("compare")?;
        let disk = dir.join("disk.raw");
        // Written, not sparse, so that later reads come from the page cache.
        let mut file = File::create(&disk)?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..DISK >> 20 {
            file.write_all(&block).context("no room for the disk")?;
        }
        file.sync_all()?;
        let tap = Tap::create(debian, TAP, HOST_ADDRESS)?;
        // BBR, where it is the host's default, paces with a timer: the result would measure that
        // timer, at less than half of the rate that the monitors can receive.
        let (file, reno) = CONGESTION_CONTROL;
        fs::write(file, reno).with_context(|| format!("cannot write {reno} to {file}"))?;
        serve_peer()?;
        let &Task { seconds, counts, .. } = task;
        Ok(Self { paths: paths.clone(), dir, seconds, counts, interrupt, disk, _tap: tap })
    }

    /// Removes the files.
    ///
    /// # Errors
    /// The file system does not let it.
    pub fn clean_up(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).context("cannot clean up")
    }

    /// The guest that reports that it runs, and does nothing more; with disk and NIC.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn payload(&self, found: &Found) -> Result<Guest> {
        Ok(Guest { devices: Some(self.devices()), ..self.halting(found)? })
    }

    /// The same without devices.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn halting(&self, found: &Found) -> Result<Guest> {
        self.bare(found, self.payload_elf()?)
    }

    /// The guest that reports repeatedly that it runs; without devices.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn talker(&self, found: &Found) -> Result<Guest> {
        self.bare(found, self.written("talker.elf", talker_elf)?)
    }

    /// The same without filling memory.
    ///
    /// # Errors
    /// Its file cannot be written.
    pub fn small_talker(&self, found: &Found) -> Result<Guest> {
        self.bare(found, self.written("small-talker.elf", small_talker_elf)?)
    }

    fn bare(&self, found: &Found, elf: PathBuf) -> Result<Guest> {
        Ok(Guest {
            kernel: self.kernel(found, elf)?,
            initramfs: None,
            cmdline: String::new(),
            vcpus: 1,
            mib: MIB,
            acpi: true,
            devices: None,
        })
    }

    /// Linux with one processor, without devices, with the init's task `what`: Debian's kernel
    /// (`distribution`), or the given one.
    ///
    /// # Errors
    /// Its file does not exist.
    pub fn linux(&self, found: &Found, distribution: bool, what: &str) -> Result<Guest> {
        let [bare, modules] = INITRAMFS.map(|name| self.paths.cache.join(name));
        let common = format!("{CMDLINE} printk.devkmsg=on bench={what} seconds={}", self.seconds);
        let (kernel, initramfs, cmdline) = if distribution {
            (guest::Kernel::Elf, modules, common)
        } else {
            // Needed by a kernel without kvm-clock; harmless for others.
            let khz = tsc_khz().context("this host's KVM does not report the TSC frequency")?;
            let cmdline = format!("{common} tsc_early_khz={khz} tsc=reliable idle=halt nopti");
            (guest::Kernel::Given, bare, cmdline)
        };
        // So that the first read from the host's disk is not measured.
        fs::read(&initramfs)?;
        Ok(Guest {
            kernel: self.kernel(found, kernel.path(&self.paths))?,
            initramfs: Some(initramfs),
            cmdline,
            vcpus: 1,
            mib: MIB,
            acpi: distribution,
            devices: None,
        })
    }

    /// The payload as a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn payload_elf(&self) -> Result<PathBuf> {
        self.written("payload.elf", payload_elf)
    }

    /// The output of `make` as a file, written at the first call.
    fn written(&self, name: &str, make: fn() -> Vec<u8>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.exists() {
            fs::write(&path, make()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(path)
    }

    /// Reads the disk into the page cache in the same way for every guest. Otherwise the previous
    /// guest's writes would decide the size of its folios there, and so how fast it is read.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn cache_disk(&self) -> Result<()> {
        read_again(&self.disk)
    }

    /// The disk's image, and the tap.
    #[must_use]
    pub fn devices(&self) -> (PathBuf, String) {
        (self.disk.clone(), TAP.to_owned())
    }

    /// A kernel in the format that a monitor boots, made at the first call, and in the page cache.
    fn kernel(&self, found: &Found, elf: PathBuf) -> Result<PathBuf> {
        let image = fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
        if found.monitor.form == Form::Elf {
            return Ok(elf);
        }
        let name = elf.file_name().context("a kernel without a name")?;
        let flat = self.dir.join(name).with_extension("flat");
        if !flat.exists() {
            let mut image = kernel::flat_entered_at_start(&image)?;
            image.resize(image.len().max(FLAT_MIN), 0);
            fs::write(&flat, image)?;
        }
        Ok(flat)
    }
}

/// Reads a file into the page cache from its beginning to its end, even if parts of it were cached.
///
/// # Errors
/// It cannot be read.
pub fn read_again(path: &Path) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    io::copy(&mut file, &mut io::sink())?;
    Ok(())
}

fn tsc_khz() -> Result<u32> {
    Ok(kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz()?)
}
