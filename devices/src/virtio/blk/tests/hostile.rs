//! Errors of a driver, a host or a stream.
use super::*;

#[test]
fn checks_the_ranges_of_discards() {
    let mut r = Rig::new(rw());
    let before = r.image();
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for kind in [discard, zeroes] {
        assert_eq!(r.range(kind, 0, 0, 0), OK, "nothing to do");
        assert_eq!(r.range(kind, 0, (1 << 17) + 1, 0), IOERR, "above the maximum");
        assert_eq!(r.range(kind, 8191, 2, 0), IOERR, "beyond the end");
        assert_eq!(r.range(kind, u64::MAX, 1, 0), IOERR);
        assert_eq!(r.range(kind, u64::MAX / 512, u32::MAX, 0), IOERR);
        assert_eq!(r.range(kind, 0, 1, 2), UNSUPP, "unknown flag");
        assert_eq!(r.request(kind, 0, &[], 0).0, IOERR, "no range");
        assert_eq!(r.request(kind, 0, &[0; 15], 0).0, IOERR);
        assert_eq!(r.request(kind, 0, &[0; 32], 0).0, IOERR, "more ranges than offered");
        assert_eq!(r.request(kind, 0, &[0; 65536], 0).0, IOERR);
    }
    assert_eq!(r.range(discard, 0, 8, 1), UNSUPP, "unmap is for write-zeroes");
    assert!(r.image() == before);
}

#[test]
fn a_readonly_disk_is_never_written_whatever_the_driver_negotiated() {
    let mut r = Rig::new(OpenOptions { readonly: true, ..rw() });
    assert_ne!(r.guest.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    let before = r.image();
    assert_eq!(r.write(0, &[1; 512]), IOERR);
    assert_eq!(r.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
    assert_eq!(r.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(r.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    assert_eq!(r.read(0, 512), (OK, before[..512].to_vec()));
    assert!(r.image() == before);
}

#[test]
fn sectors_beyond_the_end_are_refused() {
    let mut r = Rig::new(rw());
    for sector in [8192, 8191, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(r.read(sector, 1024).0, IOERR, "{sector:#x}");
        assert_eq!(r.write(sector, &[1; 1024]), IOERR, "{sector:#x}");
    }
    assert_eq!(r.image().len() as u64, 4 * MIB);
    assert_eq!(r.read(8190, 1024).0, OK);
    assert_eq!(r.stat(|s| &s.invalid_operations), 12);
}

#[test]
fn lengths_that_are_no_sectors_are_refused() {
    let mut r = Rig::new(rw());
    for len in [1, 511, 513, 1000] {
        assert_eq!(r.read(0, len).0, IOERR, "{len}");
        assert_eq!(r.write(0, &vec![1; len]), IOERR, "{len}");
    }
    assert_eq!(r.read(0, 0).0, OK);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut r = Rig::new(rw());
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 16, u32::MAX, 1 << 31] {
        assert_eq!(r.request(kind, 0, &[0; 512], 0).0, UNSUPP, "{kind}");
    }
}

#[test]
fn requests_without_room_for_a_status_come_back_and_are_counted() {
    let mut r = Rig::new(rw());
    let header_at = r.guest.bytes(&header(VIRTIO_BLK_T_OUT, 0));
    let data = r.guest.bytes(&[9; 512]);
    let before = r.image();
    let head = r.guest.request(0, &[(header_at, 16, false), (data, 512, false)]);
    assert_eq!(r.guest.completion(0), (head, 0));
    assert_eq!(r.stat(|s| &s.invalid_operations), 1);
    // A header that is too short, or in the wrong place.
    let status = r.guest.bytes(&[0xff]);
    for len in [1, 15] {
        r.guest.request(0, &[(header_at, len, false), (status, 1, true)]);
        assert_eq!(r.guest.completion(0).1, 1);
        assert_eq!(r.guest.peek(status, 1), [IOERR]);
    }
    r.guest.request(0, &[(data, 512, true), (status, 1, true)]);
    r.guest.completion(0);
    assert!(r.image() == before);
    assert!(!r.guest.needs_reset());
    assert_eq!(r.read(0, 512).0, OK);
}

#[test]
fn malformed_chains_are_returned_unused_and_the_queue_works_on() {
    let mut r = Rig::new(rw());
    let header_at = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
    let q = r.guest.queues[0].clone();
    let mut send = |what: &str| {
        r.guest.queues[0].publish(200);
        r.guest.kick(0);
        assert_eq!(r.guest.completion(0), (200, 0), "{what}");
    };
    q.descriptor(200, header_at, 16, 1, 200);
    send("self loop");
    q.descriptor(200, header_at, 16, 1, 201);
    q.descriptor(201, header_at, 16, 1, 200);
    send("loop of two");
    q.descriptor(200, header_at, 16, 1, 256);
    send("next is the queue's size");
    q.descriptor(200, header_at, 16, 1, 0xffff);
    send("next is 0xffff");
    q.descriptor(200, RAM - 8, 16, 0, 0);
    send("beyond RAM");
    q.descriptor(200, u64::MAX - 8, 16, 0, 0);
    send("address wraps");
    q.descriptor(200, header_at, 0, 0, 0);
    send("empty");
    q.descriptor(200, header_at, 17, INDIRECT, 0);
    send("odd table");
    q.descriptor(200, header_at, 0, INDIRECT, 0);
    send("empty table");
    q.descriptor(200, header_at, !15, INDIRECT, 0);
    send("huge table");
    q.descriptor(200, header_at, 16, INDIRECT | 1, 1);
    send("table with next");
    q.descriptor(200, header_at, 16, WRITE | 1, 201);
    q.descriptor(201, header_at, 16, 0, 0);
    send("readable after writable");
    assert_eq!(r.stat(|s| &s.invalid_operations), 12);
    assert_eq!(r.read(0, 512).0, OK);
}

#[test]
fn a_broken_ring_needs_a_reset_and_gets_well_by_it() {
    for jump in [300, 0x8000, 0xffff] {
        let mut r = Rig::new(rw());
        r.guest.queues[0].set_available_index(jump);
        r.guest.kick(0);
        assert!(r.guest.needs_reset(), "{jump}");
        r.guest.kick(0);
        assert_eq!(r.stat(|s| &s.invalid_operations), 1, "examined only once");
        r.guest.start(USUAL);
        assert_eq!(r.read(0, 512).0, OK);
    }
}

#[test]
fn the_same_head_twice_in_a_batch_is_answered_twice() {
    let mut r = Rig::new(OpenOptions { direct: true, ..rw() });
    let header_at = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
    let (data, status) = (r.guest.room(512), r.guest.bytes(&[0xff]));
    let head =
        r.guest.queues[0].chain(&[(header_at, 16, false), (data, 512, true), (status, 1, true)]);
    for _ in 0..256 {
        r.guest.queues[0].publish(head);
    }
    r.guest.kick(0);
    for _ in 0..256 {
        assert_eq!(r.guest.completion(0), (head, 513));
    }
}

#[test]
fn overlapping_buffers_of_gibibytes_are_refused_quickly() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("sparse");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let disk = Disk::open(&path, &rw()).unwrap();
    let block = Block::new("disk", Settings::default(), Some(disk.into()));
    let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
    r.guest.start(USUAL);
    let header_at = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
    let status = r.guest.bytes(&[0xff]);
    let mut chain = vec![(header_at, 16, false)];
    chain.extend([(0, RAM as u32, true); 200]);
    chain.push((status, 1, true));
    r.guest.request(0, &chain);
    r.guest.completion(0);
    assert_eq!(r.guest.peek(status, 1), [IOERR]);
}

#[test]
fn a_state_that_no_quiet_disk_is_in_is_refused() {
    let mut r = Rig::new(rw());
    r.guest.transport.pause();
    let good = r.block().save().unwrap();
    r.block().restore(&good).unwrap();
    let text = good.state.get();
    let mut refuse = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        let section = good.with(text.replace(from, to)).unwrap();
        assert!(r.block().restore(&section).is_err(), "{to}");
    };
    refuse("4194304", "4194816");
    refuse("\"next_avail\":0", "\"next_avail\":1");
    refuse("\"next_avail\":0", "\"next_avail\":65536");
    refuse("\"index\":0", "\"index\":1");
    refuse("[{\"index\":0,\"next_avail\":0,\"next_used\":0}]", "[]");
    refuse("[{\"index\":0,\"next_avail\":0,\"next_used\":0}]", "null");
    refuse("\"in_flight\":[]", "\"in_flight\":[[0,0]]");
    refuse("{\"size\"", "{\"more\":1,\"size\"");
    let other = Section { kind: "virtio-net".into(), ..good.clone() };
    assert!(r.block().restore(&other).is_err());
    let newer = Section { version: 2, ..good.clone() };
    assert!(r.block().restore(&newer).is_err());
}

#[test]
fn an_image_cut_short_behind_our_back_gives_errors_not_stale_data() {
    for way in every_way() {
        let mut r = Rig::new(way);
        fs::OpenOptions::new().write(true).open(r.path()).unwrap().set_len(4096).unwrap();
        assert_eq!(r.read(0, 4096).0, OK);
        assert_eq!(r.read(8, 4096).0, IOERR, "{way:?}");
        assert_eq!(r.stat(|s| &s.failed_rd_operations), 1);
    }
}
