//! The entry functions of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
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
    mutate::hammer(&seeds, &[], 2000, virtio::entry);
}
