//! Repeated driver errors do not flood the log. This is a test binary of its own, because a process
//! has one log.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use devices::{
    backend::char::Char,
    testing::Guest,
    virtio::{
        VirtioDevice,
        blk::{Block, Settings},
        console::Console,
        net::{Net, NetSettings},
        rng::Rng,
    },
};

struct Counting(AtomicUsize);

static LOG: Counting = Counting(AtomicUsize::new(0));

impl log::Log for Counting {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, _: &log::Record<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn flush(&self) {}
}

#[test]
fn a_storm_of_mistakes_is_a_line_a_second() {
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let settings = NetSettings { queue_pairs: 1, queue_size: 256, ..NetSettings::default() };
    let devices: [Box<dyn VirtioDevice>; 4] = [
        Box::new(Block::new("disk", Settings::default(), None)),
        Box::new(Console::new("console", Char::null().unwrap())),
        Box::new(Net::new("net", settings, None).unwrap()),
        Box::new(Rng::new("rng", "/dev/urandom".as_ref(), None).unwrap()),
    ];
    for device in devices {
        let id = device.id().to_owned();
        let mut g = Guest::new(device);
        // The transmit queue, where there is one: an interface without link processes no other.
        let queue = u16::from(g.queue_max(1) > 0);
        let begin = Instant::now();
        let before = LOG.0.load(Ordering::Relaxed);
        for _ in 0..100 {
            g.start(0);
            g.queues[usize::from(queue)].set_available_index(30_000);
            g.kick(queue);
            assert!(g.needs_reset(), "{id} gives up a broken queue");
            assert!(g.negotiate(1 << 32));
            g.place_all();
            g.store(0x30, queue.into());
            g.store(0x44, 0);
            [0x84, 0x94, 0xa4].into_iter().for_each(|high| g.store(high, 0xff));
            g.store(0x44, 1);
            g.store(0x70, 15);
            assert!(g.needs_reset(), "{id} refuses rings outside memory");
        }
        let lines = LOG.0.load(Ordering::Relaxed) - before;
        // Two mistakes, each reported in two places.
        let most = 2 * (2 + begin.elapsed().as_secs() as usize);
        assert!((1..=most).contains(&lines), "{lines} lines from {id}, at most {most}");
    }
}
