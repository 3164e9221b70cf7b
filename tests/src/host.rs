//! Where tests run: natively when this machine's KVM runs an unmodified kernel, otherwise inside an
//! emulated host. There QEMU emulates a processor with virtualisation, Debian's kernel on it offers
//! a real `/dev/kvm`, and the same program runs on it. Either way the program sees the same three
//! paths, may make tap devices without touching the machine's network, and communicates over its
//! standard input and output.
//!
//! ```text
//! this process --pipe--> [unshare -n] program                    native
//! this process --pipe--> qemu: hvc0 <-> init.sh -> program       emulated
//! ```
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::archive::{applets, make_ext4, place, replace};
use crate::debian::{Debian, libraries, output};
use crate::guest;
use crate::paths::{BINARY, CACHE, GUEST_KERNEL, Paths, SCRATCH, SEED, atomically};

/// Overrides what [`Host::detect`] finds: `native` or `emulated`.
const OVERRIDE: &str = "STRATOVIRT_HOST";
/// Begins a line that is meant for this program rather than for people.
pub const CONTROL: u8 = 0x1e;
/// What the emulated host needs to have a KVM, disks, taps, bridges, FUSE and a console.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "kvm_amd",
    "tun",
    "bridge",
    "fuse",
    "vhost_net",
    "vhost_vsock",
];
/// Init of the emulated host.
const INIT: &str = include_str!("init/host.sh");
/// Programs of Debian's packages that tests use.
const PROGRAMS: [&str; 4] = ["sbin/mke2fs", "sbin/e2fsck", "sbin/debugfs", "bin/ip"];
/// The log of its kernel, a file in its directory.
const CONSOLE: &str = "console.log";
/// Prefix of the name of its directory; the process id and a number follow.
const DIRECTORY: &str = "emulated-host.";
/// Bytes of the emulated host's scratch disk; the image is sparse.
const SCRATCH_DISK: u64 = 8 << 30;

/// Where tests run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// On this machine.
    Native,
    /// In QEMU, for the reason given.
    Emulated(String),
}

impl Host {
    /// Finds out what this machine's KVM can do.
    ///
    /// # Errors
    /// `STRATOVIRT_HOST` is neither `native` nor `emulated`.
    pub fn detect() -> Result<Self> {
        match env::var(OVERRIDE).as_deref() {
            Ok("native") => Ok(Self::Native),
            Ok("emulated") => Ok(Self::Emulated(format!("{OVERRIDE}=emulated asks for it"))),
            Ok(other) => bail!("{OVERRIDE}={other}: must be native or emulated"),
            Err(_) => Ok(unable().map_or(Self::Native, Self::Emulated)),
        }
    }

    /// One line for the user, if there is something to say.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Native => None,
            Self::Emulated(reason) => Some(format!("{reason}: running inside an emulated host")),
        }
    }

    /// Starts `job` there.
    ///
    /// # Errors
    /// Something it needs cannot be made or started.
    pub fn start(&self, paths: &Paths, debian: &Debian, job: &Job) -> Result<Running> {
        match self {
            Self::Native => native(paths, job),
            Self::Emulated(_) => emulated(paths, debian, job),
        }
    }
}

/// Why this machine's KVM cannot run an unmodified kernel; `None` if it can.
fn unable() -> Option<String> {
    if let Err(error) = kvm_ioctls::Kvm::new() {
        return Some(format!("This machine's /dev/kvm cannot be used ({error})"));
    }
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if hardware_virtualisation(&cpus) {
        return None;
    }
    // KVM without vmx or svm is PVM or the like: guests run in user mode, and their kernels'
    // privileged instructions are emulated one by one, as far as the emulator knows them.
    Some(
        "This machine's KVM cannot run an unmodified kernel (no vmx or svm, so it is PVM)"
            .to_owned(),
    )
}

fn hardware_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// A program to run on a host.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// The program; its libraries are brought with it.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables to set beside the three paths.
    pub env: Vec<(String, String)>,
    /// More files, each with the path it is found at under [`Paths::cache`].
    pub files: Vec<(PathBuf, String)>,
    /// Whether its mounts are removed when it ends.
    pub own_mounts: bool,
}

impl Job {
    /// This program with other arguments.
    ///
    /// # Errors
    /// The path of this program is not known.
    pub fn this_program(args: &[&str]) -> Result<Self> {
        let program = env::current_exe().context("cannot determine the path of this program")?;
        let mut job = Self {
            program,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..Self::default()
        };
        if let Some(kernel) = env::var_os(GUEST_KERNEL) {
            job.files.push((kernel.into(), "guest/given".to_owned()));
            job.env.push((GUEST_KERNEL.to_owned(), "given".to_owned()));
        }
        job.env.extend(env::var(SEED).map(|seed| (SEED.to_owned(), seed)));
        Ok(job)
    }
}

/// The output of a running job.
#[derive(Debug)]
pub enum Said {
    /// For the user, unchanged.
    Text(Vec<u8>),
    /// For this program: a line after [`CONTROL`].
    Control(Value),
    /// It has ended.
    End,
}

/// A running job. Ended when dropped.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    said: Receiver<Said>,
    emulated: Option<Emulated>,
}

impl Running {
    fn new(mut command: Command, emulated: Option<Emulated>) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let input = child.stdin.take();
        let out = child.stdout.take().context("a child without output")?;
        let (sender, said) = channel();
        thread::spawn(move || {
            let mut sort = Sort::default();
            let mut out = BufReader::new(out);
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = out.read(&mut buffer) {
                for said in sort.feed(buffer.get(..length).unwrap_or_default()) {
                    if sender.send(said).is_err() {
                        return;
                    }
                }
            }
            let _ = sender.send(Said::End);
        });
        Ok(Self { child, input, said, emulated })
    }

    /// Its next output, if there is some before `deadline`.
    #[must_use]
    pub fn next(&self, deadline: Instant) -> Option<Said> {
        match self.said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(said) => Some(said),
            Err(RecvTimeoutError::Disconnected) => Some(Said::End),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    /// Sends it a line.
    ///
    /// # Errors
    /// It no longer reads its input.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("its input is closed")?;
        input.write_all(bytes).and_then(|()| input.flush()).context(
            "it does not read its input \
                                                                     any more",
        )
    }

    /// Its input, for another thread to write to.
    pub const fn take_input(&mut self) -> Option<ChildStdin> {
        self.input.take()
    }

    /// The last lines of the emulated host's own console, to explain why it ended.
    #[must_use]
    pub fn console(&self) -> String {
        let text = self.whole_console();
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }

    /// Whether the kernel of the emulated host has reported a fault of its own: emulation is not
    /// perfect, and nothing that runs there can be trusted any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        let text = self.whole_console();
        ["BUG: ", "Oops: ", "Kernel panic"].iter().any(|word| text.contains(word))
    }

    fn whole_console(&self) -> String {
        let Some(emulated) = &self.emulated else { return String::new() };
        let text = fs::read(emulated.dir.join(CONSOLE)).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for its end until `deadline`; then ends it.
    ///
    /// # Errors
    /// The host's files cannot be removed.
    pub fn finish(mut self, deadline: Instant) -> Result<()> {
        self.input = None;
        while Instant::now() < deadline && self.child.try_wait()?.is_none() {
            thread::sleep(Duration::from_millis(10));
        }
        self.stop();
        match &self.emulated {
            Some(emulated) => fs::remove_dir_all(&emulated.dir)
                .with_context(|| format!("cannot remove {}", emulated.dir.display())),
            None => Ok(()),
        }
    }

    fn stop(&mut self) {
        // An error here means that it has gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Files of an emulated host. After a failure they are kept for inspection until the next one
/// starts.
struct Emulated {
    dir: PathBuf,
}

/// Sorts bytes into text and control lines.
#[derive(Default)]
struct Sort {
    control: Option<Vec<u8>>,
}

impl Sort {
    fn feed(&mut self, bytes: &[u8]) -> Vec<Said> {
        let mut said = Vec::new();
        let mut text = Vec::new();
        for &byte in bytes {
            match (&mut self.control, byte) {
                (None, CONTROL) => self.control = Some(Vec::new()),
                (None, _) => text.push(byte),
                (Some(line), b'\n') => {
                    if !text.is_empty() {
                        said.push(Said::Text(std::mem::take(&mut text)));
                    }
                    match serde_json::from_slice(line) {
                        Ok(value) => said.push(Said::Control(value)),
                        Err(_) => text.append(line),
                    }
                    self.control = None;
                }
                (Some(line), _) => line.push(byte),
            }
        }
        if !text.is_empty() {
            said.push(Said::Text(text));
        }
        said
    }
}

/// In a network namespace of its own; without root in a user namespace too, which has the same
/// effect.
fn native(paths: &Paths, job: &Job) -> Result<Running> {
    for (from, name) in &job.files {
        replace(from, &paths.cache.join(name))?;
    }
    let root =
        fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    let mut command = Command::new("unshare");
    command.arg(if root { "-n" } else { "-rn" });
    if job.own_mounts {
        command.arg("-m");
    }
    command.arg("--").arg(&job.program).args(&job.args);
    command.env(CACHE, &paths.cache).env(SCRATCH, &paths.scratch).env(BINARY, &paths.stratovirt);
    command.envs(job.env.iter().map(|(name, value)| (name, value)));
    Running::new(command, None)
}

fn emulated(paths: &Paths, debian: &Debian, job: &Job) -> Result<Running> {
    remove_dead(paths)?;
    let dir = own_directory(paths)?;
    let kernel = guest::Kernel::Elf.path(paths);
    let payload = dir.join("payload.img");
    let scratch = dir.join("scratch.img");
    let console = dir.join(CONSOLE);
    make_payload(paths, debian, job, &payload)?;
    make_ext4(debian, &scratch, SCRATCH_DISK, None)?;

    let mut qemu = debian.qemu()?;
    let drive = |path: &Path, more: &str| {
        format!(
            "file={},format=raw,if=virtio,cache=unsafe,{more}",
            path.display().to_string().replace(',', ",,")
        )
    };
    // One processor: with two, about every sixth guest of four vCPUs hung or crashed, the emulated
    // host with it; with one, none did, and booting took as long. Left out: x2APIC, which QEMU 7.2
    // does not emulate; XSAVE, because QEMU does not intercept the XSETBV of guests, so that KVM
    // never learns which features they have switched on; virtual GIF and VMLOAD, without which two
    // processors crashed less often.
    let machine = "-M pc -accel tcg,tb-size=512 -cpu max,-x2apic,-xsave,-vgif,-v-vmsave-vmload \
                   -smp 1 -m 6144 -nographic -nodefaults -no-reboot";
    qemu.args(machine.split_whitespace());
    qemu.arg("-kernel").arg(&kernel).arg("-initrd").arg(initramfs(paths));
    qemu.args(["-append", "console=ttyS0 reboot=t panic=-1 quiet mitigations=off"]);
    qemu.arg("-drive")
        .arg(drive(&payload, "readonly=on"))
        .arg("-drive")
        .arg(drive(&scratch, "discard=unmap"));
    qemu.arg("-serial").arg(format!("file:{}", console.display()));
    qemu.args(["-chardev", "stdio,id=outside,signal=off", "-device", "virtio-serial-pci"]);
    qemu.args(["-device", "virtconsole,chardev=outside"]);
    // QEMU's warnings are about processor features that TCG lacks; its errors are short.
    qemu.stderr(File::create(dir.join("qemu.log"))?);
    Running::new(qemu, Some(Emulated { dir }))
}

/// A directory that this process has not used yet: it may run several hosts.
fn own_directory(paths: &Paths) -> Result<PathBuf> {
    for number in 0_u32.. {
        let name = format!("{DIRECTORY}{}.{number}", std::process::id());
        let dir = paths.scratch.join(name);
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot make {}", dir.display()));
            }
        }
    }
    bail!("no directory is left for an emulated host")
}

/// Removes the files of hosts whose processes are gone.
fn remove_dead(paths: &Paths) -> Result<()> {
    for entry in fs::read_dir(&paths.scratch)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY));
        let process = name.and_then(|name| name.split('.').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // Another starting host may remove the same files. The next one removes what is left.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// The emulated host's initramfs.
fn initramfs(paths: &Paths) -> PathBuf {
    paths.cache.join("host/initrd.cpio")
}

/// Makes the emulated host's initramfs, unless it exists and is up to date.
///
/// # Errors
/// The packages lack something, or the cache cannot be written.
pub fn make_initramfs(paths: &Paths, debian: &Debian) -> Result<()> {
    let mark = paths.cache.join("host/mark");
    let now = format!("{}\n{INIT}\n{MODULES:?}\n", debian.modules()?.display());
    if fs::read_to_string(&mark).is_ok_and(|have| have == now) {
        return Ok(());
    }
    fs::create_dir_all(paths.cache.join("host"))?;
    atomically(&initramfs(paths), |part| {
        Ok(fs::write(part, guest::system(debian, INIT, MODULES, &["host"], &[])?)?)
    })?;
    fs::write(&mark, now).context("cannot record what was built")
}

/// The disk with all files that the job reads.
fn make_payload(paths: &Paths, debian: &Debian, job: &Job, image: &Path) -> Result<()> {
    let tree = image.with_extension("tree");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "scratch", "cache"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let inside = |path: &Path| tree.join(path.strip_prefix("/").unwrap_or(path));
    for program in [&job.program, &paths.stratovirt] {
        let name = program.file_name().context("a program without a name")?;
        place(program, &tree.join("bin").join(name))?;
        // A static program has no libraries: ldd fails then.
        let needed = output(Command::new("ldd").arg(program)).unwrap_or_default();
        for library in libraries(&needed) {
            place(&library, &inside(&library))?;
        }
    }
    let in_cache = |path: &Path| {
        Ok::<_, anyhow::Error>(tree.join("cache").join(path.strip_prefix(&paths.cache)?))
    };
    let busybox = debian.file("bin/busybox")?;
    for program in PROGRAMS {
        for file in debian.program_files(program)? {
            place(&file, &in_cache(&file)?)?;
        }
    }
    place(&busybox, &in_cache(&busybox)?)?;
    for name in ["vmlinux", "vmlinux.bin", "bzImage", "initrd.cpio", "replicated.cpio"] {
        let file = paths.guest(name);
        place(&file, &in_cache(&file)?)?;
    }
    for (from, name) in &job.files {
        place(from, &tree.join("cache").join(name))?;
    }
    for name in applets(&busybox)? {
        let link = tree.join("bin").join(&name);
        if !link.exists() {
            if name == "busybox" {
                place(&busybox, &link)?;
            } else {
                std::os::unix::fs::symlink("busybox", link)?;
            }
        }
    }
    fs::write(tree.join("run-me"), run_me(paths, job)?)?;
    make_ext4(debian, image, size_of_tree(&tree)? * 5 / 4 + (64 << 20), Some(&tree))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))
}

/// The shell script that execs the job.
fn run_me(paths: &Paths, job: &Job) -> Result<Vec<u8>> {
    let name = |path: &Path| -> Result<String> {
        let name: OsString = path.file_name().context("a program without a name")?.to_owned();
        Ok(format!("/bin/{}", name.to_string_lossy()))
    };
    let mut env = vec![
        ("PATH".to_owned(), "/bin".to_owned()),
        ("TERM".to_owned(), env::var("TERM").unwrap_or_default()),
        (CACHE.to_owned(), "/cache".to_owned()),
        (SCRATCH.to_owned(), "/scratch".to_owned()),
        (BINARY.to_owned(), name(&paths.stratovirt)?),
    ];
    env.extend(job.env.iter().cloned());
    let mut script = String::from("cd /scratch\n");
    for (name, value) in env {
        script.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    let command: Vec<_> = std::iter::once(name(&job.program)?)
        .chain(job.args.clone())
        .map(|word| quoted(&word))
        .collect();
    script.push_str(&format!("exec {}\n", command.join(" ")));
    Ok(script.into_bytes())
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn size_of_tree(dir: &Path) -> Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        size += if kind.is_dir() {
            size_of_tree(&entry.path())?
        } else {
            entry.metadata()?.len() + 4096
        };
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_with_vmx_or_svm_virtualises_and_no_other_word_counts() {
        assert!(hardware_virtualisation("processor\t: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(hardware_virtualisation("flags\t\t: fpu svm\nbugs\t: svmx\n"));
        assert!(!hardware_virtualisation("flags\t\t: fpu svm_lock\nbugs\t\t: vmx\n"));
        assert!(!hardware_virtualisation(""));
    }

    #[test]
    fn control_lines_are_told_from_text_however_they_arrive() {
        let mut sort = Sort::default();
        let mut text = Vec::new();
        let mut control = Vec::new();
        for chunk in [b"be".as_slice(), b"fore\n\x1e{\"do", b"ne\":1}", b"\nafter\n\x1enot json\n"]
        {
            for said in sort.feed(chunk) {
                match said {
                    Said::Text(bytes) => text.extend(bytes),
                    Said::Control(value) => control.push(value),
                    Said::End => {}
                }
            }
        }
        assert_eq!(String::from_utf8(text).unwrap(), "before\nafter\nnot json");
        assert_eq!(control, [serde_json::json!({"done": 1})]);
    }

    #[test]
    fn words_reach_the_shell_as_they_are() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }
}
