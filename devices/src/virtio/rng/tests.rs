use std::io::Write;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::conformance;
use crate::testing::{Guest, INDIRECT, NEXT, RAM, WRITE};

fn rng(bps: Option<u64>) -> Box<Rng> {
    Box::new(Rng::new("rng0", Path::new("/dev/urandom"), bps).unwrap())
}

fn guest(bps: Option<u64>) -> Guest {
    let mut guest = Guest::new(rng(bps));
    guest.start(F_INDIRECT_DESC);
    guest
}

#[test]
fn conforms() {
    conformance::run(|| rng(None));
}

#[test]
fn fills_buffers_with_randomness_and_interrupts() {
    let mut g = guest(None);
    let (a, b) = (g.room(4096), g.room(64));
    let head = g.request(0, &[(a, 4096, true), (b, 64, true)]);
    assert_eq!(g.completion(0), (head, 4160));
    assert!(g.interrupted());
    let bytes = [g.peek(a, 4096), g.peek(b, 64)].concat();
    let ones: u32 = bytes.iter().map(|b| b.count_ones()).sum();
    assert!((15_000..18_000).contains(&ones), "{ones} of 33,280 bits set");
}

#[test]
fn a_request_of_gigabytes_is_cut() {
    let mut g = guest(None);
    let table = g.room(256 * 16);
    for index in 0..256 {
        let flags = if index < 255 { WRITE | NEXT } else { WRITE };
        g.queues[0].descriptor_at(
            table,
            index,
            8 << 20,
            (RAM - (8 << 20)) as u32,
            flags,
            index + 1,
        );
    }
    g.queues[0].descriptor(0, table, 256 * 16, INDIRECT, 0);
    g.queues[0].publish(0);
    g.kick(0);
    assert_eq!(g.completion(0), (0, MAX_REQUEST as u32));
}

#[test]
fn hostile_chains_come_back_empty() {
    let mut g = guest(None);
    let room = g.room(16);
    for buffers in [&[(room, 16, false)][..], &[(RAM, 16, true)], &[(room, 0, true)]] {
        let head = g.request(0, buffers);
        assert_eq!(g.completion(0), (head, 0));
    }
    let head = g.request(0, &[(room, 16, true)]);
    assert_eq!(g.completion(0), (head, 16), "still not done");
}

#[test]
fn a_broken_ring_needs_a_reset_and_nothing_spins() {
    let mut g = guest(None);
    g.queues[0].set_available_index(30_000);
    g.kick(0);
    assert!(g.needs_reset());
    g.kick(0);
    g.start(0);
    let room = g.room(16);
    g.request(0, &[(room, 16, true)]);
    assert_eq!(g.completion(0).1, 16);
}

#[test]
fn a_source_with_nothing_to_give_makes_the_guest_wait() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    let mut g = Guest::new(Box::new(Rng::new("rng0", &path, None).unwrap()));
    g.start(0);
    let room = g.room(16);
    let head = g.request(0, &[(room, 16, true)]);
    assert_eq!(g.queues[0].next_used(), None);
    // The request moves with the device and is served there.
    let mut g = g.migrate(Box::new(Rng::new("rng0", &path, None).unwrap()));
    let mut writer = File::options().write(true).open(&path).unwrap();
    writer.write_all(b"truly random").unwrap();
    assert_eq!(g.completion(0), (head, 12));
    assert_eq!(g.peek(room, 12), b"truly random");
    let head = g.request(0, &[(room, 4, true)]);
    drop(writer);
    g.thread.settle();
    assert_eq!(g.queues[0].next_used(), None);
    File::options().write(true).open(&path).unwrap().write_all(b"more").unwrap();
    assert_eq!(g.completion(0), (head, 4));
}

#[test]
fn a_limit_delays_requests_and_loses_none() {
    let mut g = guest(Some(10_000));
    let room = g.room(1024);
    let begin = std::time::Instant::now();
    for _ in 0..8 {
        g.request(0, &[(room, 1024, true)]);
    }
    for _ in 0..8 {
        assert_eq!(g.completion(0).1, 1024);
    }
    // 8 KiB at 10,000 bytes a second, of which 100 ms worth may pass at once and one request on
    // credit.
    assert!(begin.elapsed() > std::time::Duration::from_millis(500));
}

#[test]
fn a_wait_for_the_source_is_not_charged() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    // The requested amount would take hours at this rate; the amount returned does not.
    let mut g = Guest::new(Box::new(Rng::new("rng0", &path, Some(4)).unwrap()));
    g.start(0);
    let room = g.room(MAX_REQUEST);
    g.request(0, &[(room, MAX_REQUEST as u32, true)]);
    File::options().write(true).open(&path).unwrap().write_all(b"more").unwrap();
    assert_eq!(g.completion(0).1, 4);
}

#[test]
fn sources_that_end_or_are_missing_are_refused() {
    let dir = TempDir::new().unwrap();
    let file = dir.as_path().join("file");
    std::fs::write(&file, "four").unwrap();
    for path in [file.as_path(), dir.as_path()] {
        assert!(matches!(Rng::new("r", path, None), Err(RngError::NotASource { .. })));
    }
    let missing = dir.as_path().join("missing");
    assert!(matches!(Rng::new("r", &missing, None), Err(RngError::Open { .. })));
}
