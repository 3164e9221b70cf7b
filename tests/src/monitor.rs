//! A monitor under test: its configuration, its process, the guest's console and the control
//! socket.
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::Client;
use serde_json::{Value, json};

use crate::guest::{Kernel, initramfs};
use crate::output::{Output, Show};
use crate::paths::Paths;

/// How long a Linux guest may take to reach its init, on the slowest host.
pub const BOOT: Duration = Duration::from_secs(120);
/// How long anything else may take.
pub const SOON: Duration = Duration::from_secs(60);
/// Kernel arguments of every guest: its console, and to reboot on a panic instead of hanging.
const CMDLINE: &str = "console=ttyS0 reboot=t panic=-1 quiet";

/// A virtual machine to be started: the builder of its configuration file.
#[derive(Debug, Clone)]
pub struct Vm {
    config: Value,
    cmdline: String,
    args: Vec<String>,
    show: Show,
}

impl Vm {
    /// One vCPU, 256 MiB, the initramfs, and the console on standard input and output.
    #[must_use]
    pub fn linux(paths: &Paths, kernel: Kernel) -> Self {
        Self {
            config: json!({
                "boot-source": { "kernel_image_path": kernel.path(paths), "initrd_fs_path": initramfs(paths) },
                "machine-config": { "vcpu_count": 1, "mem_size": 256 << 20 },
                "serial": { "stdio": true },
            }),
            cmdline: CMDLINE.to_owned(),
            args: Vec::new(),
            show: Show::AsItIs,
        }
    }

    /// The kernel that `STRATOVIRT_GUEST_KERNEL` names, set up to run natively on any KVM: with the
    /// TSC's frequency on its command line, and a virtio console. One vCPU, 256 MiB, and the
    /// initramfs.
    ///
    /// # Errors
    /// No KVM.
    pub fn native(paths: &Paths) -> Result<Self> {
        let kvm = kvm_ioctls::Kvm::new().context("cannot use /dev/kvm")?;
        let khz = kvm.create_vm()?.create_vcpu(0)?.get_tsc_khz()?;
        let mut vm = Self::linux(paths, Kernel::Given);
        if let Value::Object(config) = &mut vm.config {
            config.remove("serial");
        }
        vm.cmdline = vm.cmdline.replace("console=ttyS0", "console=hvc0");
        let console = "-chardev stdio,id=outside -device virtio-serial-device,id=bus \
                       -device virtconsole,id=console,chardev=outside";
        let words = format!("tsc_early_khz={khz} tsc=reliable idle=halt nopti nogbpages");
        Ok(vm.append(&words).args(&console.split_whitespace().collect::<Vec<_>>()))
    }

    /// A machine described by a configuration file.
    #[must_use]
    pub fn described(config: Value) -> Self {
        let cmdline =
            config.pointer("/boot-source/boot_args").and_then(Value::as_str).unwrap_or_default();
        Self { cmdline: cmdline.to_owned(), config, args: Vec::new(), show: Show::AsItIs }
    }

    /// Sets a member of `machine-config`.
    #[must_use]
    pub fn machine(mut self, key: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, "machine-config", key, value.into());
        self
    }

    /// Boots with another initramfs.
    #[must_use]
    pub fn initramfs(mut self, file: &Path) -> Self {
        let file = Value::from(file.display().to_string());
        set(&mut self.config, "boot-source", "initrd_fs_path", file);
        self
    }

    /// Adds to the kernel's command line.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(self, id: &str, image: &Path, read_only: bool) -> Self {
        self.add("drive", json!({ "drive_id": id, "path_on_host": image, "read_only": read_only, "direct": true, "serial_num": id }))
    }

    /// Adds a NIC on a tap.
    #[must_use]
    pub fn nic(self, id: &str, tap: &str, mac: &str) -> Self {
        self.add("net", json!({ "iface_id": id, "host_dev_name": tap, "mac": mac }))
    }

    /// Adds an item to one of the configuration's lists.
    #[must_use]
    pub fn add(mut self, list: &str, item: Value) -> Self {
        if let Value::Object(config) = &mut self.config {
            let list = config.entry(list).or_insert_with(|| json!([]));
            if let Value::Array(items) = list {
                items.push(item);
            }
        }
        self
    }

    /// Adds arguments to the monitor's command line.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Shows what the console prints line by line.
    #[must_use]
    pub const fn shown_by(mut self, show: fn(&str)) -> Self {
        self.show = Show::Lines(show);
        self
    }

    /// The resulting kernel command line.
    #[must_use]
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }

    /// Writes `vm.json` into `dir` and starts the monitor with it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(self, paths: &Paths, dir: &Path) -> Result<Monitor> {
        let file = self.write(dir)?;
        Monitor::start(paths, &file, &dir.join("qmp.sock"), &self.args, self.show)
    }

    /// Writes `vm.json` into `dir`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        let mut config = self.config.clone();
        set(&mut config, "boot-source", "boot_args", self.cmdline.clone().into());
        let file = dir.join("vm.json");
        fs::write(&file, serde_json::to_string_pretty(&config)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }
}

fn set(config: &mut Value, table: &str, key: &str, value: Value) {
    if let Value::Object(config) = config
        && let Value::Object(table) = config.entry(table).or_insert_with(|| json!({}))
    {
        table.insert(key.to_owned(), value);
    }
}

/// Copies `script` to `program` and makes it executable, in another process. A child that another
/// thread of this process has just forked holds every file that is open for writing here, and a
/// file that is open for writing cannot be executed.
///
/// # Errors
/// It cannot be written.
pub fn install(script: &Path, program: &Path) -> Result<()> {
    let done = Command::new("install").args(["-m", "755"]).arg(script).arg(program).output()?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// A running monitor. Killed when dropped.
pub struct Monitor {
    child: Child,
    input: ChildStdin,
    console: Arc<Output>,
    log: Arc<Output>,
    /// How much of the console's output earlier calls have consumed.
    seen: usize,
    commands: usize,
    socket: PathBuf,
    /// It was started with `-incoming`.
    incoming: bool,
    started: Instant,
}

impl Monitor {
    /// Starts `stratovirt -config FILE -api-channel unix:SOCKET` and `args`.
    ///
    /// # Errors
    /// The binary cannot be started.
    pub fn start(
        paths: &Paths,
        config: &Path,
        socket: &Path,
        args: &[String],
        show: Show,
    ) -> Result<Self> {
        let started = Instant::now();
        let mut child = Command::new(&paths.stratovirt)
            .arg("-config")
            .arg(config)
            .arg("-api-channel")
            .arg(format!("unix:{}", socket.display()))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", paths.stratovirt.display()))?;
        let input = child.stdin.take().context("no standard input")?;
        let console = Output::of(child.stdout.take().context("no standard output")?, show);
        let log = Output::of(child.stderr.take().context("no standard error")?, show);
        let socket = socket.to_owned();
        let incoming = args.iter().any(|arg| arg == "-incoming");
        Ok(Self { child, input, console, log, seen: 0, commands: 0, socket, incoming, started })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    #[must_use]
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// Connects to the control socket as soon as it exists; with `-incoming`, waits for the
    /// machine, too.
    ///
    /// # Errors
    /// It does not appear in time, or the monitor ends.
    pub fn qmp(&mut self) -> Result<Client> {
        let deadline = Instant::now() + SOON;
        while !self.socket.exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("the monitor ended ({status})");
            }
            ensure!(Instant::now() < deadline, "the control socket does not appear");
            thread::sleep(Duration::from_micros(200));
        }
        let mut client = Client::connect(&self.socket, SOON)?;
        // A save waits for the host's disk, which other processes may keep busy.
        client.set_timeout(SOON * 3);
        while self.incoming
            && client.execute_raw("query-status", json!({}))?.get("status")
                == Some(&json!("inmigrate"))
        {
            ensure!(Instant::now() < deadline, "the machine does not arrive");
            thread::sleep(Duration::from_micros(200));
        }
        Ok(client)
    }

    /// Waits until the console shows `text`, after the output consumed so far. Returns the output
    /// up to the end of `text`.
    ///
    /// # Errors
    /// It does not come in time, or the monitor ends.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<String> {
        let (shown, seen) = self
            .console
            .wait_for(text, self.seen, limit)
            .with_context(|| format!("it said: {}", self.said()))
            .with_context(|| format!("its threads:\n{}", threads(self.child.id())))
            .context("the guest's console")?;
        self.seen = seen;
        Ok(shown)
    }

    /// Waits until the guest takes commands.
    ///
    /// # Errors
    /// It does not do so in time, or the monitor ends.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.wait_for("guest: ready", BOOT).map(drop)
    }

    /// Runs a command in the guest and returns its output.
    ///
    /// # Errors
    /// It does not end in time, or ends with a status other than 0.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.sh_within(command, BOOT)
    }

    /// Runs a command in the guest, which may take `limit`.
    ///
    /// # Errors
    /// See [`Self::sh`].
    pub fn sh_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.commands += 1;
        let mark = format!("<{}:", self.commands);
        self.seen = self.console.length();
        let end = if command.ends_with('&') { "" } else { ";" };
        self.type_in(&format!(
            "{{ {command}{end} }} < /dev/null 2>&1; echo \"<{}:$?>\"\n",
            self.commands
        ))?;
        let shown =
            self.wait_for(&mark, limit).with_context(|| format!("in the guest: {command}"))?;
        let status = self.wait_for(">", SOON)?;
        // The rest of a line consumed before may come first.
        let shown = shown.strip_suffix(&mark).unwrap_or_default().trim();
        ensure!(
            status == "0>",
            "in the guest: {command}: status {}\n{shown}",
            status.trim_end_matches('>')
        );
        Ok(shown.to_owned())
    }

    /// Types into the console.
    ///
    /// # Errors
    /// The monitor has ended.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.input
            .write_all(text.as_bytes())
            .and_then(|()| self.input.flush())
            .context("cannot type into the console")
    }

    /// All console output that was not consumed yet.
    #[must_use]
    pub fn unseen(&self) -> String {
        self.console.text().get(self.seen..).unwrap_or_default().to_owned()
    }

    /// Everything that the console has shown.
    #[must_use]
    pub fn shown(&self) -> String {
        self.console.text()
    }

    /// Everything that the console has shown, once the monitor has ended.
    ///
    /// # Errors
    /// Another process holds its output open.
    pub fn shown_to_its_end(&self) -> Result<String> {
        self.console.to_its_end(SOON)
    }

    /// The monitor's own output so far: its standard error, which is separate from the guest's
    /// console.
    #[must_use]
    pub fn said(&self) -> String {
        self.log.text()
    }

    /// Waits until the monitor itself has printed `text`. Returns its output up to the end of
    /// `text`.
    ///
    /// # Errors
    /// It does not come in time, or the monitor ends.
    pub fn wait_said(&self, text: &str) -> Result<String> {
        Ok(self.log.wait_for(text, 0, SOON)?.0)
    }

    /// Everything that the monitor itself has printed, once it has ended.
    ///
    /// # Errors
    /// Another process holds its output open.
    pub fn said_to_its_end(&self) -> Result<String> {
        self.log.to_its_end(SOON)
    }

    /// Skips the console output so far.
    pub fn forget(&mut self) {
        self.seen = self.console.length();
    }

    /// Waits for the monitor's end.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait_exit(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(2));
        }
        bail!("the monitor has not ended")
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What each thread of a process is doing, to find out why it makes no progress.
fn threads(pid: u32) -> String {
    let mut text = String::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        // After the name in parentheses: the state, ten numbers, ticks in user and in system mode.
        let fields: Vec<_> =
            stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let field = |index: usize| fields.get(index).copied().unwrap_or("?");
        let (state, user, system) = (field(0), field(11), field(12));
        let stack: Vec<_> = read("stack").lines().take(4).map(str::to_owned).collect();
        text.push_str(&format!(
            "  {} {state}, ticks {user}+{system}, {}\n",
            read("comm").trim(),
            stack.join(" < ")
        ));
    }
    text
}
