//! `cargo demo`: one machine from its configuration file to its end. Boots Linux, mounts a disk,
//! pings over the network, and controls it over QMP as a user would.
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, bail, ensure};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};
use stories::agent::{monitor, pass_on, prepare, prepare_with, tell_outcome};
use stories::archive::make_ext4;
use stories::debian::Debian;
use stories::guest::Kernel;
use stories::host::{Host, Job};
use stories::monitor::{BOOT, Monitor, SOON, Vm};
use stories::net::Tap;
use stories::paths::{GUEST_KERNEL, Paths};
use stories::progress::Step;
use xtask::bench::smaps::shares;
use xtask::protected;

const USAGE: &str = "\
Boots an unmodified Linux with a disk and a network, and controls it over QMP.

Usage: cargo demo [-- OPTION]
  --shell   stay in the guest's shell instead
  --remus   protect a guest by a second monitor instead, and kill its own
  -h        this text
";
/// The argument of the part of this program that runs on the host.
const INSIDE: &str = "--inside";
/// The argument after it that requests a shell.
const SHELL: &str = "shell";
/// The argument after it for a protected guest.
const REMUS: &str = "remus";
/// The guest's RAM, MiB.
const RAM_MIB: u64 = 256;
/// How long the machine is paused.
const PAUSE: Duration = Duration::from_secs(3);
/// How long the program on the host may be silent.
const TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> Result<ExitCode> {
    let args: Vec<String> = env::args().skip(1).collect();
    // The alias ends with -- already; cargo's users are used to giving one themselves.
    let args: Vec<&str> = args.iter().map(String::as_str).filter(|arg| *arg != "--").collect();
    match args.as_slice() {
        [] => outside(What::Tour),
        ["--shell"] => outside(What::Shell),
        ["--remus"] => outside(What::Remus),
        ["-h" | "--help"] => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        [INSIDE, what @ ..] => {
            let result = inside(what);
            tell_outcome(&result)?;
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("cargo demo does not know '{}'\n\n{USAGE}", args.join(" ")),
    }
}

/// What is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Tour,
    Shell,
    Remus,
}

/// Prepares everything and passes on the output of the program on the host.
fn outside(what: What) -> Result<ExitCode> {
    let shell = what == What::Shell;
    // With a kernel for this machine's own KVM, whatever that can do.
    let native = what == What::Remus && env::var_os(GUEST_KERNEL).is_some();
    let (host, paths, debian) = match native {
        true => {
            prepare_with(&monitor()?).map(|(_, paths, debian)| (Host::Native, paths, debian))?
        }
        false => prepare()?,
    };
    let size = window_size().map(|size| format!("rows={} cols={}", size.ws_row, size.ws_col));
    let job = match what {
        What::Shell => Job::this_program(&[INSIDE, SHELL, &size.unwrap_or_default()])?,
        What::Remus => Job::this_program(&[INSIDE, REMUS])?,
        What::Tour => Job::this_program(&[INSIDE])?,
    };
    if shell {
        // Before the terminal is switched to raw mode, where a newline no longer returns the
        // cursor.
        heading("A shell in the guest. Ctrl-a x ends the machine, so does poweroff -f. To try:");
        println!("  mount /dev/vda /mnt; cat /mnt/hello.txt");
        println!("  ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 10.9.0.1\n");
    }
    let mut booting =
        matches!(host, Host::Emulated(_)).then(|| Step::spinner("Booting the emulated host"));
    let mut running = host.start(&paths, &debian, &job)?;
    let mut input = if shell { Some(running.take_input().context("no input")?) } else { None };
    let mut raw = None;
    let result = loop {
        // The user of a shell may be idle for any time.
        let timeout = if shell { Duration::from_secs(24 * 3600) } else { TIMEOUT };
        let said = running.next(Instant::now() + timeout);
        if let Some(step) = booting.take() {
            step.done();
        }
        if let Some(input) = input.take() {
            raw = forward(input)?;
        }
        if let Some(result) = pass_on(said, &running)? {
            break result;
        }
    };
    drop(raw);
    running.finish(Instant::now() + SOON)?;
    match result {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => bail!("{error}"),
    }
}

/// Passes what is typed on to the program on the host. Dropping the returned value restores the
/// terminal.
fn forward(mut input: ChildStdin) -> Result<Option<Raw>> {
    let raw = if io::stdin().is_terminal() { Some(Raw::enter()?) } else { None };
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
            let typed = buffer.get(..length).unwrap_or_default();
            if input.write_all(typed).and_then(|()| input.flush()).is_err() {
                return;
            }
        }
    });
    Ok(raw)
}

/// Of the terminal, if there is one.
fn window_size() -> Option<Winsize> {
    tcgetwinsize(io::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0)
}

/// This program's terminal, in raw mode.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context("cannot set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The error cannot be reported any more.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The demonstration, on a host that runs Linux guests: the presentation, or a shell in the guest,
/// with additional kernel arguments.
fn inside(what: &[&str]) -> Result<()> {
    let paths = Paths::from_env()?;
    let debian = Debian::unpacked(&paths);
    if what == [REMUS] {
        return protected::show(&paths, &debian);
    }
    let dir = paths.fresh_scratch("demo")?;
    let disk = dir.join("disk.ext4");
    let content = dir.join("content");
    fs::create_dir_all(&content)?;
    fs::write(content.join("hello.txt"), "Hello from a file on the disk.\n")?;
    make_ext4(&debian, &disk, 64 << 20, Some(&content))?;
    let _tap = Tap::create(&debian, "tap0", "10.9.0.1/24")?;
    let vm = Vm::linux(&paths, Kernel::Elf)
        .machine("mem_size", format!("{RAM_MIB}M"))
        .disk("disk", &disk, false)
        .nic("net0", "tap0", "52:54:00:12:34:56");
    match what {
        [SHELL, more] => leave_in_shell(&paths, &dir, &vm, more),
        _ => show(&paths, &dir, &vm),
    }
}

fn leave_in_shell(paths: &Paths, dir: &Path, vm: &Vm, more: &str) -> Result<()> {
    let vm = vm.clone().append("story=shell").append(more);
    let file = vm.write(dir)?;
    let status = Command::new(&paths.stratovirt)
        .arg("-config")
        .arg(file)
        .arg("-api-channel")
        .arg(format!("unix:{}", dir.join("qmp.sock").display()))
        .status()
        .context("cannot start the monitor")?;
    ensure!(status.success(), "the monitor ended with {status}");
    Ok(())
}

fn show(paths: &Paths, dir: &Path, vm: &Vm) -> Result<()> {
    // Notices and worse: enough to see it boot.
    let vm = vm.clone().append("loglevel=6").shown_by(guest_line);
    let socket = dir.join("qmp.sock");
    heading(&format!("stratovirt -config vm.json -api-channel unix:{}", socket.display()));
    let mut guest = vm.start(paths, dir)?;
    drop(guest.qmp()?);
    let built = guest.started().elapsed();
    guest.wait_for("guest: init", BOOT)?;
    let booted = guest.started().elapsed();
    guest.wait_ready()?;

    heading("In the guest: the disk");
    run(&mut guest, "mount /dev/vda /mnt")?;
    run(&mut guest, "cat /mnt/hello.txt")?;
    run(&mut guest, "df -h /mnt")?;

    heading("In the guest: the network");
    run(&mut guest, "ip addr add 10.9.0.2/24 dev eth0")?;
    run(&mut guest, "ip link set eth0 up")?;
    run(&mut guest, "ping -c 3 10.9.0.1")?;

    heading(&format!("ncat -U {}, while the guest shows its clock", socket.display()));
    let mut qmp = Typed::connect(&socket)?;
    guest.sh(
        "while sleep 0.5; do echo \"clock $(cut -d ' ' -f 1 /proc/uptime)\"; done > /dev/console &",
    )?;
    qmp.types("query-status")?;
    guest.wait_for("clock", SOON)?;
    guest.wait_for("clock", SOON)?;
    qmp.types("stop")?;
    qmp.types("query-status")?;
    thread::sleep(PAUSE);
    println!("    ({} seconds later)", PAUSE.as_secs());
    guest.forget();
    qmp.types("cont")?;
    guest.wait_for("clock", SOON)?;
    guest.wait_for("clock", SOON)?;
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid()))?;
    let beyond = shares(&smaps, RAM_MIB << 10)?.private;
    qmp.types("quit")?;
    qmp.hears_the_end()?;
    let status = guest.wait_exit()?;
    println!("    (the process is gone: {status})");

    let kernel = booted.saturating_sub(built);
    println!(
        "\nInit after {booted:.2?} ({built:.2?} the monitor's until it answered, {kernel:.2?} the guest's); \
         the monitor's memory beyond the guest's: {beyond} KiB."
    );
    Ok(())
}

fn heading(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m\n");
}

/// A line of the guest's console, without the marks that end commands.
fn guest_line(line: &str) {
    if !(line.starts_with('<') && line.ends_with(":0>")) {
        println!("  | {line}");
    }
}

/// Types a command into the guest's console and shows its output.
fn run(guest: &mut Monitor, command: &str) -> Result<()> {
    println!("  $ {command}");
    guest.sh(command).map(drop)
}

/// A conversation on the control socket as in ncat: bytes, shown line by line.
struct Typed {
    stream: BufReader<UnixStream>,
}

impl Typed {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("cannot connect to the control socket")?;
        stream.set_read_timeout(Some(SOON))?;
        let mut typed = Self { stream: BufReader::new(stream) };
        typed.hears()?.context("no greeting")?;
        Ok(typed)
    }

    /// Sends a command and shows everything up to its answer.
    fn types(&mut self, command: &str) -> Result<()> {
        let line = format!("{{\"execute\":\"{command}\"}}");
        println!("\x1b[36m{line}\x1b[0m");
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        loop {
            let line = self.hears()?.context("the monitor hung up")?;
            if line.starts_with("{\"return\"") {
                return Ok(());
            }
            ensure!(line.starts_with("{\"event\""), "{command} failed");
        }
    }

    /// Shows the remaining output until the server disconnects.
    fn hears_the_end(&mut self) -> Result<()> {
        while self.hears()?.is_some() {}
        Ok(())
    }

    /// Shows the next line, if one comes before the end.
    fn hears(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("the monitor prints nothing")? == 0 {
            return Ok(None);
        }
        println!("{}", line.trim_end());
        Ok(Some(line))
    }
}
