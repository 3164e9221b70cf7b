//! The system-call filter around a real monitor, and around a process that does what it must not.
#![expect(clippy::unwrap_used, reason = "a test")]
use std::{
    env, fs,
    net::UdpSocket,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use qmp::client::Client;
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

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
            // What there is to say of this host is no error.
            .env("STRATOVIRT_LOG_LEVEL", "error")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut qmp = Client::connect(&at("qmp"), PATIENCE).unwrap();
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
        let deadline = Instant::now() + PATIENCE;
        while fs::read(self.path("serial")).unwrap_or_default() != b"!".repeat(times) {
            assert!(Instant::now() < deadline, "the kernel has not started {times} times");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Mode and number of filters of its threads: as many entries as there are differences.
    fn filters(&self) -> Vec<(String, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let mut all: Vec<_> = tasks.map(|task| filters(&task.unwrap().path())).collect();
        // Main thread, two vCPUs, the default I/O thread and t0; KVM may add its own.
        assert!(all.len() >= 5, "{all:?}");
        all.sort();
        all.dedup();
        all
    }

    fn ended(mut self) -> ExitStatus {
        self.qmp.wait_closed(PATIENCE).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
    // What fails does so by its own error, not by the filter's.
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
    // The directory goes with the monitor, so the socket is looked at first.
    let gone = Instant::now() + PATIENCE;
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

/// Says which crime this process, a copy of the test, is to commit.
const CRIME: &str = "STRATOVIRT_TEST_CRIME";
const LOG: &str = "STRATOVIRT_TEST_LOG";

fn commit(crime: &str) {
    let log = PathBuf::from(env::var_os(LOG).unwrap());
    vmm::logging::start(Some(&log)).unwrap();
    vmm::seccomp::confine(&vmm::seccomp::filter(false)).unwrap();
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
        other => unreachable!("{other}"),
    }
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
fn threads_that_are_just_starting_go_on() {
    if env::var_os(CRIME).is_some() {
        let threads: Vec<_> = (0..64).map(|n| thread::spawn(move || n)).collect();
        vmm::seccomp::confine(&vmm::seccomp::filter(false)).unwrap();
        assert!(threads.into_iter().map(|t| t.join().unwrap()).eq(0..64));
        return;
    }
    for _ in 0..5 {
        let output = again("threads_that_are_just_starting_go_on", "none", Path::new(""));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", output.status);
    }
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    if let Some(crime) = env::var_os(CRIME) {
        return commit(crime.to_str().unwrap());
    }
    let crimes = [
        ("internet", Some(libc::SYS_socket)),
        ("deaf", Some(libc::SYS_rt_sigaction)),
        ("kill", Some(libc::SYS_kill)),
        // For these the C library blocks all signals, so the kernel ends the process unheard.
        ("thread", None),
        ("program", None),
    ];
    for (crime, number) in crimes {
        let dir = TempDir::new().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "before\n").unwrap();
        let output = again("a_forbidden_call_ends_the_process_and_is_named", crime, &log);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{crime}: {said}");
        let Some(number) = number else { continue };
        let line = format!("Received a bad system call, number: {number}.");
        assert!(said.contains(&line), "{crime}: {said}");
        let logged = fs::read_to_string(&log).unwrap();
        assert!(logged.starts_with("before\n") && logged.contains(&line), "{crime}: {logged}");
    }
}
