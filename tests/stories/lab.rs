//! Tests of the network that tests make: what passes through its switch, and how. They need root
//! and /dev/net/tun, and fail with a message where those are missing.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test's own mistakes end the test"
)]
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use stories::debian::{Debian, output};
use stories::lab::hosts::{Hosts, OUTSIDE, Side};
use stories::lab::line::Impairment;
use stories::lab::namespace::Namespace;
use stories::lab::switch::{Direction, Switch};
use stories::paths::Paths;

const MS: Duration = Duration::from_millis(1);
/// How much later than asked for something may come on a busy machine.
const LATE: Duration = Duration::from_millis(400);

fn debian() -> Debian {
    let paths = Paths::on_this_machine().unwrap();
    let _lock = paths.lock().unwrap();
    Debian::get(&paths).unwrap()
}

/// Two hosts and a switch: 10.9.0.1 at port 0, 10.9.0.2 at port 1.
struct Two {
    debian: Debian,
    hosts: [Namespace; 2],
    switch: Switch,
}

impl Two {
    fn new() -> Self {
        let debian = debian();
        let hosts = [(); 2].map(|()| Namespace::new(&debian).unwrap());
        let taps = hosts.iter().zip(1..).map(|(host, number)| {
            let tap = host.tap("eth0").unwrap();
            host.ip(&debian, &format!("addr add 10.9.0.{number}/24 dev eth0")).unwrap();
            host.ip(&debian, "link set eth0 up").unwrap();
            tap
        });
        let switch = Switch::new(taps.collect(), 42).unwrap();
        Self { debian, hosts, switch }
    }

    /// Answers to `count` pings from the first host to the second, one every 10 ms; the least and
    /// the mean round trip in milliseconds.
    fn ping(&self, count: usize) -> (usize, Option<(f64, f64)>) {
        let mut ping = Command::new(self.debian.file("bin/busybox").unwrap());
        let count = count.to_string();
        ping.args(["ping", "-A", "-c", &count, "-i", "0.01", "-W", "1", "10.9.0.2"]);
        // It fails when no answer comes.
        let said = self.hosts[0].enter(|| ping.output()).unwrap().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        let received = said.split(", ").find(|part| part.ends_with("packets received"));
        let received = received.unwrap_or_else(|| panic!("{said}"));
        let received = received.split(' ').next().unwrap().parse().unwrap();
        let times = said.split("= ").nth(1).map(|times| {
            let times: Vec<f64> = times.split('/').flat_map(str::parse).collect();
            (times[0], times[1])
        });
        (received, times)
    }

    /// A connection from the first host to the second.
    fn connected(&self) -> (TcpStream, TcpStream) {
        let listener = self.hosts[1].enter(|| TcpListener::bind("10.9.0.2:7000")).unwrap().unwrap();
        let near = self.hosts[0].enter(|| TcpStream::connect("10.9.0.2:7000")).unwrap().unwrap();
        near.set_nodelay(true).unwrap();
        let far = listener.accept().unwrap().0;
        for end in [&near, &far] {
            end.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        }
        (near, far)
    }

    /// Sends `bytes` bytes from the first host to the second; returns how long that takes.
    fn transfer(&self, bytes: usize) -> Duration {
        let (mut near, mut far) = self.connected();
        let content: Vec<u8> = (0..bytes as u32 / 4).flat_map(u32::to_le_bytes).collect();
        let began = Instant::now();
        let sent = content.clone();
        let sender = thread::spawn(move || near.write_all(&sent));
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        sender.join().unwrap().unwrap();
        assert!(got == content, "something else arrived");
        began.elapsed()
    }
}

#[test]
fn a_ping_takes_as_long_as_both_links_delay_it() {
    let two = Two::new();
    let (received, times) = two.ping(5);
    assert_eq!(received, 5);
    let (least, _) = times.unwrap();
    assert!(least < 20.0, "{least} ms without any delay");
    // There and back: 10 ms up and 5 ms down, twice.
    for port in [0, 1] {
        two.switch.set(port, Direction::Up, Impairment::delay(10 * MS)).unwrap();
        two.switch.set(port, Direction::Down, Impairment::delay(5 * MS)).unwrap();
    }
    let (received, times) = two.ping(10);
    assert_eq!(received, 10);
    let (least, mean) = times.unwrap();
    assert!((30.0..50.0).contains(&least), "{least} ms instead of 30");
    assert!((30.0..100.0).contains(&mean), "{mean} ms instead of 30");
}

#[test]
fn frames_are_lost_at_the_rate_asked_for_and_counted() {
    let two = Two::new();
    // So that no neighbour has to be found meanwhile.
    assert_eq!(two.ping(1).0, 1);
    let before = two.switch.counts(0, Direction::Up).unwrap();
    two.switch.set(0, Direction::Up, Impairment::loss(0.3)).unwrap();
    let (received, _) = two.ping(60);
    assert!((25..60).contains(&received), "{received} of 60");
    let after = two.switch.counts(0, Direction::Up).unwrap();
    let lost = after.lost - before.lost;
    assert!((3..=35).contains(&lost), "{lost} frames were lost");
    assert_eq!(after.sent - before.sent, after.arrived - before.arrived + lost);
}

#[test]
fn a_cut_in_either_direction_stops_everything_until_it_is_mended() {
    let two = Two::new();
    assert_eq!(two.ping(2).0, 2);
    for (port, direction) in [(0, Direction::Up), (0, Direction::Down), (1, Direction::Down)] {
        two.switch.set(port, direction, Impairment::cut()).unwrap();
        let before = two.switch.counts(1, Direction::Down).unwrap().arrived;
        assert_eq!(two.ping(2).0, 0, "{port} {direction:?}");
        let arrived = two.switch.counts(1, Direction::Down).unwrap().arrived - before;
        // Cut one way, the request arrives and only its answer is missing.
        assert_eq!(arrived > 0, direction == Direction::Down && port == 0);
        two.switch.set(port, direction, Impairment::default()).unwrap();
        assert_eq!(two.ping(2).0, 2, "mended");
    }
}

#[test]
fn tcp_is_as_fast_as_the_link_and_whole_through_a_bad_one() {
    let two = Two::new();
    two.transfer(4 << 20);
    // 8 Mbit/s are 1 MiB in about a second.
    two.switch.set(1, Direction::Down, Impairment::rate(8 << 20)).unwrap();
    let took = two.transfer(1 << 20);
    assert!((1000 * MS..1100 * MS + 2 * LATE).contains(&took), "{took:?}");
    let bad = Impairment {
        delay: 2 * MS,
        jitter: MS,
        loss: 0.01,
        reorder: 0.05,
        ..Impairment::default()
    };
    two.switch.set_both(0, bad).unwrap();
    two.switch.set(1, Direction::Down, Impairment::default()).unwrap();
    two.transfer(1 << 20);
    let counts = two.switch.counts(0, Direction::Up).unwrap();
    assert!(counts.lost > 0 && counts.reordered > 0, "{counts:?}");
}

#[test]
fn a_connection_survives_a_cut() {
    let two = Two::new();
    let (mut near, mut far) = two.connected();
    let mut got = [0; 5];
    near.write_all(b"first").unwrap();
    far.read_exact(&mut got).unwrap();
    two.switch.set_both(1, Impairment::cut()).unwrap();
    near.write_all(b"later").unwrap();
    far.set_read_timeout(Some(300 * MS)).unwrap();
    assert!(far.read(&mut got).is_err());
    two.switch.set_both(1, Impairment::default()).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    far.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"later");
}

#[test]
fn the_switch_follows_who_moves_from_one_host_to_the_other() {
    let debian = debian();
    let hosts = Hosts::new(&debian, 1).unwrap();
    // A stand-in for the guest: an interface in each host with the same addresses, one at a time.
    let mac = [2, 0, 0, 0, 0, 9];
    let listen = |side: Side| {
        let host = hosts.host(side);
        host.ip(&debian, "link set br0 address 02:00:00:00:00:09").unwrap();
        host.ip(&debian, "addr add 10.9.0.2/24 dev br0").unwrap();
        host.enter(|| TcpListener::bind("10.9.0.2:7000")).unwrap().unwrap()
    };
    let connect = || {
        hosts
            .outside
            .enter(|| TcpStream::connect_timeout(&"10.9.0.2:7000".parse().unwrap(), 300 * MS))
    };
    let first = listen(Side::Left);
    connect().unwrap().unwrap();
    drop(first.accept().unwrap());
    assert_eq!(hosts.front.port_of(mac), Some(Side::Left.port()));
    hosts.host(Side::Left).ip(&debian, "addr del 10.9.0.2/24 dev br0").unwrap();
    hosts.host(Side::Left).ip(&debian, "link set br0 address 02:00:00:00:00:08").unwrap();
    let second = listen(Side::Right);
    assert!(connect().unwrap().is_err(), "the switch sends it to the other side still");
    // The new one announces itself, as a promoted guest does.
    hosts
        .host(Side::Right)
        .enter(|| TcpStream::connect_timeout(&"10.9.0.1:9".parse().unwrap(), 300 * MS))
        .unwrap()
        .unwrap_err();
    assert_eq!(hosts.front.port_of(mac), Some(Side::Right.port()));
    connect().unwrap().unwrap();
    drop(second.accept().unwrap());
    assert!(hosts.front.counts(OUTSIDE, Direction::Up).unwrap().arrived > 0);
}

#[test]
fn a_host_that_nobody_uses_is_silent() {
    let hosts = Hosts::new(&debian(), 1).unwrap();
    // The kernel spreads what it announces of an interface over its first second.
    thread::sleep(1500 * MS);
    for side in [Side::Left, Side::Right] {
        assert_eq!(hosts.front.counts(side.port(), Direction::Up).unwrap().arrived, 0);
    }
}

#[test]
fn hosts_reach_each_other_by_their_link_only() {
    let debian = debian();
    let hosts = Hosts::new(&debian, 1).unwrap();
    let listener = hosts
        .host(Side::Right)
        .enter(|| TcpListener::bind((Side::Right.address(), 7)))
        .unwrap()
        .unwrap();
    let there = (Side::Right.address(), 7).into();
    let connect =
        |from: &Namespace| from.enter(|| TcpStream::connect_timeout(&there, 500 * MS)).unwrap();
    connect(hosts.host(Side::Left)).unwrap();
    drop(listener.accept().unwrap());
    assert!(connect(&hosts.outside).is_err());
    hosts.link.set_both(Side::Left.port(), Impairment::cut()).unwrap();
    assert!(connect(hosts.host(Side::Left)).is_err());
}

#[test]
fn a_namespace_ends_with_what_uses_it() {
    let debian = debian();
    let inode = |namespace: &Namespace| {
        namespace.enter(|| std::fs::read_link("/proc/thread-self/ns/net")).unwrap().unwrap()
    };
    let (first, second) = (Namespace::new(&debian).unwrap(), Namespace::new(&debian).unwrap());
    assert_ne!(inode(&first), inode(&second));
    let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    assert_ne!(inode(&first), own, "this thread is where it was");
    let mut ip = debian.program("bin/ip").unwrap();
    ip.args(["-o", "link"]);
    let links = first.enter(|| output(&mut ip)).unwrap().unwrap();
    assert_eq!(links.lines().count(), 1, "{links}");
}
