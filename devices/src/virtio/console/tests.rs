use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    Device, conformance,
    testing::{Buffer, Guest, NEXT, RAM, WRITE},
    virtio::mmio::registers::CONFIG,
};

/// A guest whose console back-end is a socket.
struct Terminal {
    guest: Guest,
    path: PathBuf,
    _dir: TempDir,
}

impl Terminal {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("console");
        let console = Console::new("console0", Char::socket(&path, 0).unwrap());
        Self { guest: Guest::new(Box::new(console)), path, _dir: dir }
    }

    fn started(features: u64) -> Self {
        let mut terminal = Self::new();
        terminal.guest.start(features);
        terminal
    }

    fn connect(&mut self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.guest.thread.settle();
        stream
    }

    fn print(&mut self, bytes: &[u8]) {
        let at = self.guest.bytes(bytes);
        self.guest.request(TX, &[(at, bytes.len() as u32, false)]);
    }

    fn printed(&mut self) -> usize {
        let queue = &mut self.guest.queues[usize::from(TX)];
        std::iter::from_fn(|| queue.next_used()).count()
    }

    fn offer(&mut self, len: u32) -> u64 {
        let at = self.guest.room(len as usize);
        self.guest.request(RX, &[(at, len, true)]);
        at
    }
}

fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    // WouldBlock at the end.
    let _ = stream.read_to_end(&mut all);
    all
}

#[test]
fn every_rule_of_virtio_is_kept() {
    conformance::run(|| Box::new(Console::new("console0", Char::null().unwrap())));
}

#[test]
fn what_the_guest_prints_and_what_is_typed_arrive() {
    for features in [0, F_EVENT_IDX | F_INDIRECT_DESC] {
        let mut terminal = Terminal::started(features);
        let at = terminal.offer(64);
        let mut stream = terminal.connect();
        terminal.print(b"login: ");
        assert_eq!(read(&mut stream), b"login: ");
        assert_eq!(terminal.guest.completion(TX).1, 0);
        assert!(terminal.guest.interrupted());
        stream.write_all(b"root\n").unwrap();
        terminal.guest.thread.settle();
        assert_eq!(terminal.guest.completion(RX).1, 5);
        assert_eq!(terminal.guest.peek(at, 5), b"root\n");
        assert!(terminal.guest.interrupted());
    }
}

#[test]
fn output_without_a_reader_costs_nothing() {
    let mut terminal = Terminal::started(0);
    for _ in 0..300 {
        terminal.print(&[b'x'; 4000]);
    }
    assert_eq!(terminal.printed(), 300);
    let mut stream = terminal.connect();
    terminal.print(b"now");
    assert_eq!(read(&mut stream), b"now", "output without a client is dropped");
}

#[test]
fn a_slow_reader_gets_every_byte() {
    let mut terminal = Terminal::started(F_EVENT_IDX);
    let mut stream = terminal.connect();
    let text: Vec<u8> = (0..2_000_000u32).map(|n| (n % 251) as u8).collect();
    let at = terminal.guest.bytes(&text);
    for chunk in 0..200 {
        let queue = &mut terminal.guest.queues[usize::from(TX)];
        let head = queue.chain(&[(at + chunk * 10_000, 10_000, false)]);
        queue.publish(head);
    }
    terminal.guest.kick(TX);
    assert!(terminal.printed() < 200, "held back");
    let mut seen = Vec::new();
    let thread = terminal.guest.thread.clone();
    thread.until("the whole text", || {
        let mut piece = [0; 3000];
        if let Ok(n) = stream.read(&mut piece) {
            seen.extend_from_slice(&piece[..n]);
        }
        seen.len() == text.len()
    });
    assert_eq!(seen, text);
    assert!(terminal.guest.interrupted());
}

#[test]
fn a_reader_that_stops_for_good_does_not_stop_the_guest() {
    let mut terminal = Terminal::started(0);
    let mut stream = terminal.connect();
    let at = terminal.guest.room(100_000);
    for _ in 0..20 {
        let queue = &mut terminal.guest.queues[usize::from(TX)];
        let head = queue.chain(&[(at, 100_000, false)]);
        queue.publish(head);
    }
    terminal.guest.kick(TX);
    let mut printed = terminal.printed();
    assert!(printed < 20);
    let thread = terminal.guest.thread.clone();
    thread.until("the time limit has expired", || {
        printed += terminal.printed();
        printed == 20
    });
    terminal.print(b"dropped at once");
    assert_eq!(terminal.printed(), 1);
    // The reader resumes.
    thread.until("the backlog is read", || {
        thread.settle();
        read(&mut stream).is_empty()
    });
    terminal.print(b"welcome back");
    assert_eq!(read(&mut stream), b"welcome back");
}

#[test]
fn typing_waits_while_the_driver_has_no_buffers() {
    let mut terminal = Terminal::started(0);
    let mut stream = terminal.connect();
    stream.write_all(b"typed ahead").unwrap();
    terminal.guest.thread.settle();
    let first = terminal.offer(5);
    assert_eq!(terminal.guest.completion(RX).1, 5);
    assert_eq!(terminal.guest.peek(first, 5), b"typed");
    let second = terminal.offer(100);
    assert_eq!(terminal.guest.completion(RX).1, 6);
    assert_eq!(terminal.guest.peek(second, 6), b" ahead");
}

#[test]
fn the_next_connection_is_served_after_a_hang_up() {
    let mut terminal = Terminal::started(0);
    for n in 0..5u8 {
        let at = terminal.offer(16);
        let mut stream = terminal.connect();
        stream.write_all(&[n]).unwrap();
        assert_eq!(terminal.guest.completion(RX), (n.into(), 1));
        assert_eq!(terminal.guest.peek(at, 1), [n]);
        terminal.print(&[n + 100]);
        assert_eq!(read(&mut stream), [n + 100]);
    }
}

#[test]
fn a_reset_console_starts_over_with_the_same_connection() {
    let mut terminal = Terminal::started(0);
    let mut stream = terminal.connect();
    terminal.print(b"one");
    for _ in 0..3 {
        terminal.guest.start(0);
    }
    terminal.print(b" two");
    assert_eq!(read(&mut stream), b"one two");
}

#[test]
fn a_saved_console_continues_in_the_middle_of_a_text() {
    let mut terminal = Terminal::started(0);
    let mut stream = terminal.connect();
    let text: Vec<u8> = (0..1_500_000u32).map(|n| (n % 253) as u8).collect();
    let at = terminal.guest.bytes(&text);
    terminal.guest.request(TX, &[(at, text.len() as u32, false)]);
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("elsewhere");
    let console = Console::new("console0", Char::socket(&path, 0).unwrap());
    let mut second = UnixStream::connect(&path).unwrap();
    second.set_nonblocking(true).unwrap();
    let mut there = terminal.guest.migrate(Box::new(console));
    let first = read(&mut stream);
    assert!(text.starts_with(&first));
    let mut rest = Vec::new();
    let thread = there.thread.clone();
    let queue = &mut there.queues[usize::from(TX)];
    thread.until("the rest", || {
        rest.extend(read(&mut second));
        queue.next_used().is_some()
    });
    thread.until("the end", || {
        let more = read(&mut second);
        rest.extend(&more);
        more.is_empty() && thread.turn(std::time::Duration::ZERO) == 0
    });
    assert!(text.ends_with(&rest));
    let kept = text.len() - first.len() - rest.len();
    assert!(kept <= 256 << 10, "output that the first process accepted is delivered by it");
}

#[test]
fn hostile_chains_are_given_back_or_cost_the_device() {
    let mut terminal = Terminal::started(F_INDIRECT_DESC);
    let mut stream = terminal.connect();
    let at = terminal.guest.room(4096);
    let bad: [&[Buffer]; 5] = [
        &[(RAM - 1, 2, false)],
        &[(at, 0, false)],
        &[(at, 5, true)],
        &[(at, 5, true), (at, 5, false)],
        &[(u64::MAX, 5, false)],
    ];
    for chain in bad {
        terminal.guest.request(TX, chain);
        assert_eq!(terminal.guest.completion(TX).1, 0);
    }
    for chain in [&[(at, 5, false)][..], &[(RAM, 5, true)]] {
        terminal.guest.request(RX, chain);
    }
    stream.write_all(b"x").unwrap();
    let good = terminal.offer(9);
    let used = [0; 3].map(|_| terminal.guest.completion(RX).1);
    assert_eq!((used, terminal.guest.peek(good, 1)), ([0, 0, 1], b"x".to_vec()));
    terminal.guest.queues[0].descriptor(200, at, 5, NEXT | WRITE, 200);
    terminal.guest.queues[0].publish(200);
    terminal.guest.kick(RX);
    assert_eq!(terminal.guest.completion(RX), (200, 0));
    assert!(!terminal.guest.needs_reset());
    for queue in [RX, TX] {
        terminal.guest.start(0);
        terminal.guest.queues[usize::from(queue)].set_available_index(257);
        terminal.guest.kick(queue);
        assert!(terminal.guest.needs_reset());
        terminal.guest.kick(queue);
    }
}

#[test]
fn an_emergency_needs_no_driver() {
    let mut terminal = Terminal::new();
    terminal.guest.start(F_EMERGENCY_WRITE);
    let mut stream = terminal.connect();
    for byte in b"panic" {
        terminal.guest.store(CONFIG + 8, u32::from(*byte));
    }
    assert_eq!(read(&mut stream), b"panic");
    terminal.guest.store(CONFIG, 0x41);
    terminal.guest.store(CONFIG + 4, 0x41);
    assert_eq!(read(&mut stream), b"");
}

#[test]
fn states_of_something_else_are_refused() {
    let mut terminal = Terminal::started(0);
    terminal.guest.transport.pause();
    let console = terminal.guest.device::<Console>().unwrap();
    let good = Device::save(console).unwrap();
    let idle = good.with("{\"active\":null}").unwrap();
    assert!(console.restore(&idle).is_err());
    console.restore(&good).unwrap();
    let mut unused = Console::new("c", Char::null().unwrap());
    assert!(unused.restore(&good).is_err());
    unused.restore(&idle).unwrap();
}
