// UNSAFETY: two system calls that no safe library has: one gives the test a network namespace of
// its own, the other opens a tap device as a monitor's launcher would, to hand it over.
#![expect(unsafe_code)]
//! A NIC on a tap: datagrams are sent to the guest and echoed, through both queues.
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::UdpSocket;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use stories::debian::output;
use stories::monitor::SOON;

use crate::plug::refused;
use crate::stage::{Stage, cont, descriptors, quits, status, stop};

const MAC: &str = "52:54:00:00:00:07";
/// The largest payload for an MTU of 1500 bytes.
const LARGEST: usize = 1500 - 20 - 8;

fn ip(arguments: &str) -> Result<()> {
    output(Command::new("ip").args(arguments.split_whitespace())).map(drop)
}

/// Runs `story` in a thread, and the processes that it starts, with a tap `tap0` of its own. The
/// host is 10.9.0.1 there, the guest 10.9.0.2.
fn with_a_tap(story: fn() -> Result<()>) -> Result<()> {
    let reported = thread::spawn(move || {
        // SAFETY: changes this thread alone, which ends with the test.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error()).context("this needs root (CAP_SYS_ADMIN)");
        }
        ip("tuntap add mode tap name tap0 vnet_hdr")?;
        ip("addr add 10.9.0.1/24 dev tap0")?;
        ip("link set tap0 up")?;
        ip(&format!("neigh replace 10.9.0.2 lladdr {MAC} dev tap0 nud permanent"))?;
        story()
    });
    reported.join().map_err(|_| anyhow!("the test has panicked"))?
}

/// Waits until the host really sends: the kernel notices asynchronously that a process has opened
/// the tap, and silently drops packets until then.
fn carries() -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let link = output(Command::new("ip").args(["-o", "link", "show", "tap0"]))?;
        if link.contains(" state UP ") {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the tap is not open: {link}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Opens `tap0` as a launcher does.
fn open_tap() -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data; zero is a value of each of its fields.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = libc::c_char::try_from(*from)?;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags)?;
    // SAFETY: TUNSETIFF reads and writes an ifreq, and `request` is one.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot open tap0");
    }
    Ok(file)
}

/// A datagram that differs from every other.
fn datagram(number: usize) -> Vec<u8> {
    let length = 8 + number * 97 % (LARGEST - 8);
    let number = number as u64;
    number.to_le_bytes().into_iter().chain((0..).map(|at: usize| at as u8)).take(length).collect()
}

struct Echo(UdpSocket);

impl Echo {
    /// Call it once a monitor has opened the tap.
    fn new() -> Result<Self> {
        carries()?;
        let socket = UdpSocket::bind("10.9.0.1:7000")?;
        socket.set_read_timeout(Some(SOON))?;
        socket.connect("10.9.0.2:7")?;
        Ok(Self(socket))
    }

    fn send(&self, numbers: Range<usize>) -> Result<()> {
        for number in numbers {
            self.0.send(&datagram(number))?;
        }
        Ok(())
    }

    /// They come back unchanged, each once.
    fn receive(&self, numbers: Range<usize>) -> Result<()> {
        let mut missing: HashSet<_> = numbers.map(datagram).collect();
        let mut bytes = [0; 2048];
        while !missing.is_empty() {
            let length = match self.0.recv(&mut bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                received => received
                    .with_context(|| format!("{} datagrams did not come back", missing.len()))?,
            };
            let came = bytes.get(..length).context("a datagram that is too long")?;
            ensure!(missing.remove(came), "{length} bytes came that were not sent");
        }
        Ok(())
    }
}

#[test]
fn datagrams_go_in_and_come_back() -> Result<()> {
    with_a_tap(|| {
        let stage = Stage::new("echo")?;
        let vm = stage.vm("net", "")?.nic("net0", "tap0", MAC);
        let (mut monitor, mut qmp) = stage.start(vm)?;
        monitor.wait_for("ready\n", SOON)?;
        let echo = Echo::new()?;
        // More than either ring holds, and past the wrap of their indexes in the tables.
        for batch in 0..50 {
            let numbers = batch * 12..(batch + 1) * 12;
            echo.send(numbers.clone())?;
            echo.receive(numbers)?;
        }
        // Packets that arrive while the machine is stopped are delivered afterwards.
        for time in 0..20 {
            let first = time * 8;
            echo.send(first..first + 4)?;
            stop(&mut qmp)?;
            echo.send(first + 4..first + 8)?;
            ensure!(status(&mut qmp)? == "paused");
            cont(&mut qmp)?;
            echo.receive(first..first + 8)?;
        }
        ensure!(monitor.unseen().is_empty(), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)
    })
}

#[test]
fn a_tap_that_is_handed_over_through_the_control_socket() -> Result<()> {
    with_a_tap(|| {
        let stage = Stage::new("getfd")?;
        let (mut monitor, mut qmp) = stage.start(stage.vm("net", "")?)?;
        monitor.wait_for("ready\n", SOON)?;
        let before = descriptors(&monitor)?;
        refused(&mut qmp, "getfd", json!({ "fdname": "tap" }), "no descriptor came")?;
        let backend = json!({ "id": "net-0", "fd": "tap" });
        refused(&mut qmp, "netdev_add", backend.clone(), "pass it with getfd first")?;
        let nothing = File::open("/dev/null")?;
        let handed =
            qmp.execute_with_fds("getfd", json!({ "fdname": "tap" }), &[nothing.as_fd()])?;
        ensure!(handed == json!({}));
        refused(&mut qmp, "netdev_add", backend.clone(), "is not an open tap device")?;

        // Twice: the descriptors are consumed, and finally closed.
        for _ in 0..2 {
            let tap = open_tap()?;
            let handed =
                qmp.execute_with_fds("getfd", json!({ "fdname": "tap" }), &[tap.as_fd()])?;
            ensure!(handed == json!({}));
            drop(tap);
            ensure!(qmp.execute_raw("netdev_add", backend.clone())? == json!({}));
            let device =
                json!({ "id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0", "mac": MAC });
            ensure!(qmp.execute_raw("device_add", device)? == json!({}));
            let echo = Echo::new()?;
            echo.send(0..20)?;
            echo.receive(0..20)?;
            ensure!(open_tap().is_err(), "two have the same tap");
            ensure!(qmp.execute_raw("device_del", json!({ "id": "net-0" }))? == json!({}));
            qmp.wait_event("DEVICE_DELETED", SOON)?;
        }
        let after = descriptors(&monitor)?;
        ensure!(after <= before, "{before} descriptors became {after}");
        ensure!(monitor.unseen().is_empty(), "{}", monitor.unseen());
        quits(&stage, &mut monitor, &mut qmp)
    })
}
