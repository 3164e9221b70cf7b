//! The system-call filters of a real monitor, and of a process that makes forbidden calls.
#![expect(clippy::unwrap_used, reason = "a test")]
use std::{
    env, fs,
    net::UdpSocket,
    os::unix::{net::UnixListener, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use qmp::client::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm::seccomp::{Confinement, Kind};

const TIMEOUT: Duration = Duration::from_secs(30);

/// A 64-bit ELF kernel that writes `!` to the first serial port and halts.
fn kernel() -> Vec<u8> {
    const CODE: &[u8] = &[
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'!', // mov al, '!'
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ];
    const AT: u64 = 0x20_0000;
    const HEADERS: u64 = 64 + 56;
    let len = CODE.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1u32.to_le_bytes());
    for word in [AT, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for half in [1u32, 5] {
        file.extend(half.to_le_bytes()); // PT_LOAD, readable code
    }
    for word in [HEADERS, AT, AT, len, len, 1] {
        file.extend(word.to_le_bytes());
    }
    file.extend(CODE);
    file
}

/// A monitor with the kernel above, in a directory of its own. Killed when dropped.
struct Monitor {
    dir: TempDir,
    child: Child,
    qmp: Client,
}

impl Monitor {
    fn start(args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("kernel"), kernel()).unwrap();
        fs::File::create(at("disk")).unwrap().set_len(1 << 20).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_stratovirt"))
            .arg("-kernel")
            .arg(at("kernel"))
            .arg("-qmp")
            .arg(format!("unix:{},server,nowait", at("qmp").display()))
            .arg("-serial")
            .arg(format!("file,path={}", at("serial").display()))
            .args(["-smp", "2", "-m", "128", "-iothread", "id=t0"])
            .args(args)
            // Warnings about this host are no failure.
            .env("STRATOVIRT_LOG_LEVEL", "error")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut qmp = Client::connect(&at("qmp"), TIMEOUT).unwrap();
        qmp.execute_raw("qmp_capabilities", json!({})).unwrap();
        Self { dir, child, qmp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute_raw(command, arguments).unwrap()
    }

    /// Waits until the kernel has started `times` times.
    fn booted(&self, times: usize) {
        let deadline = Instant::now() + TIMEOUT;
        while fs::read(self.path("serial")).unwrap_or_default() != b"!".repeat(times) {
            assert!(Instant::now() < deadline, "the kernel has not started {times} times");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Mode and number of filters of its threads: one entry for each distinct pair.
    fn filters(&self) -> Vec<(String, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let tasks = tasks.map(|task| task.unwrap().path());
        let mut all: Vec<_> = tasks.filter(|task| !is_kernel(task)).map(|t| filters(&t)).collect();
        // Main thread, two vCPUs, the default I/O thread and t0, the thread that writes the serial
        // port's file, checkpoint, files0, files1.
        assert!(all.len() >= 9, "{all:?}");
        all.sort();
        all.dedup();
        all
    }

    fn ended(mut self) -> ExitStatus {
        self.qmp.wait_closed(TIMEOUT).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a thread is one of the kernel's own, for io_uring or KVM, which never run in user mode.
fn is_kernel(task: &Path) -> bool {
    /// `PF_IO_WORKER` and `PF_USER_WORKER` (linux/sched.h).
    const WORKER: u32 = 0x10 | 0x4000;
    let stat = fs::read_to_string(task.join("stat")).unwrap();
    // The name, in parentheses, may contain spaces; the flags are the seventh field after it.
    let flags = stat.rsplit(')').next().unwrap().split_whitespace().nth(6).unwrap();
    flags.parse::<u32>().unwrap() & WORKER != 0
}

/// `Seccomp` and `Seccomp_filters` of the thread at `task` in /proc.
fn filters(task: &Path) -> (String, String) {
    let status = fs::read_to_string(task.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    (field("Seccomp:"), field("Seccomp_filters:"))
}

#[test]
fn a_confined_monitor_does_all_that_it_is_asked_to() {
    let mut vm = Monitor::start(&[]);
    vm.booted(1);
    // One filter more than this process has.
    let (_, ours) = filters(Path::new("/proc/self"));
    let more = (ours.parse::<u32>().unwrap() + 1).to_string();
    assert_eq!(vm.filters(), [("2".to_owned(), more)]);

    vm.ask("stop", json!({}));
    assert_eq!(vm.ask("query-status", json!({}))["status"], "paused");
    vm.ask("cont", json!({}));
    for query in ["query-cpus", "query-block", "query-chardev", "query-iothreads"] {
        vm.ask(query, json!({}));
    }
    let file = json!({"driver": "file", "filename": vm.path("disk")});
    let direct = json!({"direct": false});
    vm.ask("blockdev-add", json!({"node-name": "new", "file": file, "cache": direct}));
    let device = json!({"id": "new", "driver": "virtio-blk-mmio", "addr": "1", "drive": "new"});
    vm.ask("device_add", device);
    vm.ask("block_resize", json!({"device": "new", "size": 2 << 20}));
    assert_eq!(fs::metadata(vm.path("disk")).unwrap().len(), 2 << 20);
    vm.ask("system_reset", json!({}));
    vm.booted(2);
    vm.ask("device_del", json!({"id": "new"}));
    // A failure comes from the operation's own error, not from the filter.
    let missing = json!({"driver": "file", "filename": vm.path("missing")});
    let refused = vm.qmp.execute_raw("blockdev-add", json!({"node-name": "no", "file": missing}));
    assert!(refused.unwrap_err().to_string().contains("does not exist"));
    let tap = json!({"id": "n", "type": "tap", "ifname": "no such tap"});
    assert!(vm.qmp.execute_raw("netdev_add", tap).is_err());
    let tap = json!({"id": "n", "type": "tap", "ifname": "sv-no-such-tap"});
    let refused = vm.qmp.execute_raw("netdev_add", tap).unwrap_err();
    assert!(refused.to_string().contains("does not exist"), "{refused}");
    vm.ask("quit", json!({}));
    assert_eq!(vm.ended().code(), Some(0));
}

#[test]
fn a_confined_monitor_ends_by_sigterm_and_takes_its_names_away() {
    let dir = TempDir::new().unwrap();
    let (pid, log) = (dir.path().join("pid"), dir.path().join("log"));
    let vm = Monitor::start(&["-pidfile", pid.to_str().unwrap(), "-D", log.to_str().unwrap()]);
    vm.booted(1);
    let socket = vm.path("qmp");
    let process = rustix::process::Pid::from_child(&vm.child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    // The directory is removed with the monitor, so the socket is checked first.
    let gone = Instant::now() + TIMEOUT;
    while (socket.exists() || pid.exists()) && Instant::now() < gone {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(!socket.exists() && !pid.exists());
    assert_eq!(vm.ended().code(), Some(0));
    assert_eq!(fs::read_to_string(log).unwrap(), "");
}

#[test]
fn a_paused_monitor_is_confined_before_the_guest_starts() {
    let mut vm = Monitor::start(&["-S"]);
    assert!(vm.filters().iter().all(|(mode, _)| mode == "2"));
    vm.ask("cont", json!({}));
    vm.booted(1);
}

#[test]
fn disable_seccomp_leaves_the_monitor_as_free_as_its_parent() {
    let vm = Monitor::start(&["-disable-seccomp"]);
    vm.booted(1);
    assert_eq!(vm.filters(), [filters(Path::new("/proc/self"))]);
}

/// Says which forbidden operation this process, a copy of the test, is to carry out.
const CRIME: &str = "STRATOVIRT_TEST_CRIME";
const LOG: &str = "STRATOVIRT_TEST_LOG";

/// Forbidden operations for each kind of thread, and the call that the filter catches. For some of
/// them the C library blocks all signals first, so that the kernel ends the process without a
/// report.
const CRIMES: [(&str, Kind, Option<i64>); 16] = [
    ("internet", Kind::Main, Some(libc::SYS_socket)),
    ("deaf", Kind::Main, Some(libc::SYS_rt_sigaction)),
    ("kill", Kind::Main, Some(libc::SYS_kill)),
    ("thread", Kind::Main, None),
    ("program", Kind::Main, None),
    ("rename", Kind::Main, Some(libc::SYS_rename)),
    ("open", Kind::Vcpu, Some(libc::SYS_openat)),
    ("unlink", Kind::Vcpu, Some(libc::SYS_unlink)),
    ("open", Kind::Io, Some(libc::SYS_openat)),
    ("open", Kind::Writer, Some(libc::SYS_openat)),
    ("listen", Kind::Checkpoint, Some(libc::SYS_bind)),
    ("rename", Kind::Files, Some(libc::SYS_rename)),
    ("listen", Kind::Files, Some(libc::SYS_socket)),
    ("open", Kind::Memory, Some(libc::SYS_openat)),
    ("open", Kind::Stream, Some(libc::SYS_openat)),
    ("deaf", Kind::Stream, Some(libc::SYS_rt_sigaction)),
];

fn commit(crime: &str) {
    match crime {
        "internet" => drop(UdpSocket::bind("127.0.0.1:0")),
        "deaf" => drop(signal_hook::flag::register(
            signal_hook::consts::SIGSYS,
            Arc::new(AtomicBool::new(false)),
        )),
        "kill" => {
            let this = rustix::process::getpid();
            let _ = rustix::process::kill_process(this, rustix::process::Signal::TERM);
        }
        "thread" => drop(thread::spawn(|| {})),
        "program" => drop(Command::new("/bin/true").status()),
        "open" => drop(fs::File::open("/dev/null")),
        "unlink" => drop(fs::remove_file("/no/such/file")),
        "rename" => drop(fs::rename("/no/such/file", "/no/other/file")),
        "listen" => drop(UnixListener::bind("/no/such/directory/socket")),
        other => unreachable!("{other}"),
    }
}

/// Carries out a forbidden operation on a thread of the kind that belongs to it.
fn commit_as(index: usize) {
    let (crime, kind, _) = *CRIMES.get(index).unwrap();
    let confinement = Confinement::begin(false).unwrap();
    let log = PathBuf::from(env::var_os(LOG).unwrap());
    vmm::logging::start(Some(&log), &confinement.thread_start()).unwrap();
    if kind == Kind::Main {
        confinement.finish().unwrap();
        return commit(crime);
    }
    let first_step = confinement.first_step(kind, "thief");
    let thief = thread::spawn(move || {
        first_step().unwrap();
        commit(crime);
    });
    confinement.finish().unwrap();
    thief.join().unwrap();
}

/// Runs the test called `test` once more, in a process of its own that finds `crime`.
fn again(test: &str, crime: &str, log: &Path) -> Output {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "--nocapture", test])
        .env(CRIME, crime)
        .env(LOG, log)
        .output()
        .unwrap()
}

#[test]
fn the_main_thread_waits_for_threads_that_are_just_starting() {
    const TEST: &str = "the_main_thread_waits_for_threads_that_are_just_starting";
    if env::var_os(CRIME).is_some() {
        let confinement = Confinement::begin(false).unwrap();
        let start = |n| {
            let first_step = confinement.first_step(Kind::Vcpu, "vcpu");
            thread::spawn(move || {
                first_step().unwrap();
                n
            })
        };
        let threads: Vec<_> = (0..64).map(start).collect();
        confinement.finish().unwrap();
        assert!(threads.into_iter().map(|t| t.join().unwrap()).eq(0..64));
        return;
    }
    for _ in 0..5 {
        let output = again(TEST, "none", Path::new(""));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
    }
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    const TEST: &str = "a_forbidden_call_ends_the_process_and_is_named";
    if let Some(index) = env::var_os(CRIME) {
        return commit_as(index.to_str().unwrap().parse().unwrap());
    }
    for (index, (crime, kind, number)) in CRIMES.into_iter().enumerate() {
        let dir = TempDir::new().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "before\n").unwrap();
        let output = again(TEST, &index.to_string(), &log);
        let said = String::from_utf8(output.stderr).unwrap();
        let ended = output.status.signal();
        assert_eq!(ended, Some(libc::SIGSYS), "{crime} by {kind:?}: {said}");
        let Some(number) = number else { continue };
        let line = format!("Received a bad system call, number: {number}.");
        assert!(said.contains(&line), "{crime} by {kind:?}: {said}");
        let logged = fs::read_to_string(&log).unwrap();
        let complete = logged.starts_with("before\n") && logged.contains(&line);
        assert!(complete, "{crime} by {kind:?}: {logged}");
    }
}
