//! Runs the entry functions of `fuzz/` with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/block.rs"]
mod block;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/legacy.rs"]
mod legacy;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/net_receive.rs"]
mod net_receive;
#[path = "../../fuzz/src/virtio.rs"]
mod virtio;

#[test]
fn drivers_that_do_anything() {
    let features = [0xff; 8];
    // A queue size each, then requests and notifications.
    let sizes = [3, 3, 3, 3];
    let busy = |phase: u8| -> Vec<u8> {
        let each = |n: u8| {
            let shape = 16 * (n & 8) + ((n + phase) & 3);
            let request = [4, n, n, n / 3, n / 9, n, n, n, n, shape];
            [&request[..], &[9, n, 13, n, 14, 255, 255, n]].concat()
        };
        (phase * 10..phase * 10 + 30).flat_map(each).collect()
    };
    let rings: Vec<u8> = (0..40)
        .flat_map(|n: u8| {
            let descriptors = [0, 0, n, n, 0, 5, n, 3, n, n + 1, 0, 0, 1, n, n, 0, 5, 7, 3, n, n];
            [&descriptors[..], &[5, 0, n, 9, 0, 5, 1, n, 9, 1]].concat()
        })
        .collect();
    let mut seeds = Vec::new();
    for kind in (0..6).flat_map(|kind| [kind, 0x40 + 2 + kind, 0xa0 + 2 + kind]) {
        for rest in [&busy(0), &busy(1), &busy(2), &busy(3), &rings] {
            seeds.push([&[kind][..], &features, &sizes, rest].concat());
        }
    }
    mutate::hammer("virtio", &seeds, 2000, virtio::entry);
}

#[test]
fn ports_that_are_read_and_written_in_any_way() {
    let mut seeds = Vec::new();
    for device in 0..8 {
        let writes = (0..9).flat_map(|offset: u8| {
            let step = [0, device, offset, 0, offset.wrapping_mul(29), 0, 0, 0, 0, 0, 0, 0];
            [&step[..], &[5, device, offset, 0, 8, 40, 9, offset, 10, device, 9, 0, 5]].concat()
        });
        seeds.push(writes.collect());
    }
    // Keyboard and RTC by their registers; loop-back and FIFO of the serial port.
    seeds.push(vec![0, 3, 4, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 5, 3, 0, 0, 0, 3, 4, 0, 0xd2, 0, 0]);
    seeds.push(vec![0, 5, 0, 0, 0x0b, 0, 0, 0, 0, 0, 0, 0, 5, 5, 1, 0, 11, 5, 5, 5, 1, 3]);
    seeds.push(vec![0, 0, 4, 0, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0xc7, 0, 0, 0, 8, 63]);
    mutate::hammer("legacy", &seeds, 3000, legacy::entry);
}

#[test]
fn frames_of_any_kind_for_buffers_of_any_kind() {
    let mut seeds = Vec::new();
    for flags in 0..4 {
        for shape in [0, 1, 2, 0x11, 0x13] {
            let mut seed = vec![flags, 200, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
            for n in 0..20 {
                // Two buffers, a frame, a notification; now and then a saved state.
                let buffers = [0, 1, shape, n * 2, 0, n, n, 5, n, n, 5];
                let frame = [4, n & 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n * 13, n, 0];
                seed.extend([&buffers[..], &frame, &[9]].concat());
                if n % 5 == 4 {
                    seed.extend([14, n * 9, 1, n, 13, 1, n, 0]);
                }
            }
            seeds.push(seed);
        }
    }
    mutate::hammer("net_receive", &seeds, 2000, net_receive::entry);
}

#[test]
fn requests_that_are_in_flight_when_anything_happens() {
    let mut seeds = Vec::new();
    // With a ring and without, limited or not, with discard.
    for flags in [0, 3, 4, 8, 16, 0x1c, 0x1f] {
        let mut seed = vec![flags];
        if flags & 8 != 0 {
            seed.extend([200, 0]);
        }
        if flags & 16 != 0 {
            seed.extend([0, 0, 16, 0]);
        }
        seed.push(0);
        for n in 0..40 {
            seed.extend([0, n, n / 2, n * 5, n * 3, n]);
            if n % 3 == 2 {
                seed.push(4);
            }
            if n % 7 == 6 {
                seed.extend([6, n & 2, 7, 6, 1, n, 0, n]);
            }
        }
        seeds.push(seed);
    }
    mutate::hammer("block", &seeds, 400, block::entry);
}
