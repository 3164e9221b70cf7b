//! Measures the speed of a disk's worker with a driver that sleeps between interrupts like a guest,
//! but without VM exits. Run it with: cargo run --release --example blk_rate [IMAGE]
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a measurement that goes wrong may end"
)]
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
    time::{Duration, Instant},
};

use devices::{
    backend::disk::{Disk, OpenOptions},
    testing::{Buffer, Guest},
    virtio::{
        F_EVENT_IDX, F_INDIRECT_DESC,
        blk::{Block, Settings},
    },
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const IMAGE: u64 = 256 << 20;
const LASTS: Duration = Duration::from_millis(1000);

struct Load {
    name: &'static str,
    write: bool,
    len: u32,
    depth: usize,
    random: bool,
    /// How long the driver computes between an interrupt and its next request.
    think: Duration,
}

fn main() {
    let given = std::env::args().nth(1).map(PathBuf::from);
    let path = given.clone().unwrap_or_else(|| {
        let path = std::env::temp_dir().join(format!("blk_rate.{}", std::process::id()));
        std::fs::write(&path, vec![1; IMAGE as usize])
            .expect("an image in the temporary directory");
        path
    });
    let load = |name, write, len, depth, random| {
        let think = Duration::ZERO;
        Load { name, write, len, depth, random, think }
    };
    let loads = [
        load("4 KiB random read, depth 1", false, 4096, 1, true),
        Load {
            think: Duration::from_micros(30),
            ..load("the same, 30 us of thought", false, 4096, 1, true)
        },
        load("4 KiB random read, depth 32", false, 4096, 32, true),
        load("4 KiB random write, depth 32", true, 4096, 32, true),
        load("1 MiB sequential read, depth 1", false, 1 << 20, 1, false),
        load("1 MiB sequential read, depth 4", false, 1 << 20, 4, false),
        load("1 MiB sequential write, depth 4", true, 1 << 20, 4, false),
    ];
    println!("{:<34}{:>10}{:>10}{:>8}{:>8}", "", "requests/s", "MB/s", "kicks", "irqs");
    for direct in [false, true] {
        println!("{}", if direct { "O_DIRECT" } else { "page cache" });
        for load in &loads {
            let options = OpenOptions { direct, ..OpenOptions::default() };
            let disk = Disk::open(&path, &options).expect("the image can be opened");
            run(load, disk);
        }
    }
    if given.is_none() {
        let _ = std::fs::remove_file(&path);
    }
}

fn run(load: &Load, disk: Disk) {
    let blocks = disk.size() / u64::from(load.len);
    let block = Block::new("disk", Settings::default(), Some(disk.into()));
    let mut guest = Guest::new(Box::new(block));
    guest.start(F_INDIRECT_DESC | F_EVENT_IDX | 1 << 9);
    let stop = Arc::new(AtomicBool::new(false));
    let io_thread = std::thread::spawn({
        let (thread, stop) = (guest.thread.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                thread.turn(Duration::from_millis(100));
            }
        }
    });
    let interrupt = Epoll::new().expect("an epoll");
    let event = EpollEvent::new(EventSet::IN, 0);
    let line = std::os::fd::AsRawFd::as_raw_fd(guest.transport.line());
    interrupt.ctl(ControlOperation::Add, line, event).expect("a descriptor to watch");

    let kind = [u32::from(load.write).to_le_bytes(), [0; 4]].concat();
    let mut headers = Vec::new();
    let mut heads = Vec::new();
    for _ in 0..load.depth {
        let header = guest.bytes(&[&kind[..], &[0; 8]].concat());
        let mut chain: Vec<Buffer> = vec![(header, 16, false)];
        // Depth 4 of 1 MiB fits into guest memory.
        let data = guest.room(load.len as usize + 4096).next_multiple_of(4096);
        let pages = load.len / 4096;
        let step = pages.div_ceil(60);
        for page in (0..pages).step_by(step as usize) {
            let n = step.min(pages - page);
            chain.push((data + u64::from(page) * 4096, n * 4096, !load.write));
        }
        chain.push((guest.room(1), 1, true));
        heads.push(guest.queues[0].chain(&chain));
        headers.push(header);
    }
    let (mut kicks, mut interrupts, mut done, mut seed, mut next) = (0u64, 0u64, 0u64, 1u64, 0);
    let mut free: Vec<u16> = heads.clone();
    let size = guest.queues[0].size;
    let avail_event = GuestAddress(guest.queues[0].used + 4 + 8 * u64::from(size));
    let begin = Instant::now();
    while begin.elapsed() < LASTS {
        let before = guest.queues[0].available_index();
        for head in free.drain(..) {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            next = if load.random { (seed >> 33) % blocks } else { (next + 1) % blocks };
            let sector = next * u64::from(load.len) / 512;
            let slot = heads.iter().position(|h| *h == head).expect("one of ours");
            guest.memory.write_obj(sector, GuestAddress(headers[slot] + 8)).expect("in RAM");
            guest.queues[0].publish(head);
        }
        let after = guest.queues[0].available_index();
        fence(Ordering::SeqCst);
        let event: u16 = guest.memory.read_obj(avail_event).expect("in RAM");
        if after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before) {
            guest.transport.notifiers()[0].write(1).expect("a notification");
            kicks += 1;
        }
        loop {
            while let Some((head, _)) = guest.queues[0].next_used() {
                free.push(head);
                done += 1;
            }
            if !free.is_empty() {
                break;
            }
            // As Linux does: request an interrupt for the next buffer, check again, sleep.
            let used = guest.queues[0].used_index();
            guest.queues[0].set_used_event(used);
            fence(Ordering::SeqCst);
            if guest.queues[0].used_index() == used {
                let _ = interrupt.wait(1000, &mut [EpollEvent::default()]);
                interrupts += u64::from(guest.interrupted());
            }
        }
        let until = Instant::now() + load.think;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let _ = io_thread.join();
    let rate = done as f64 / seconds;
    let megabytes = rate * f64::from(load.len) / 1e6;
    let each = |n: u64| n as f64 / done as f64;
    println!(
        "  {:<32}{rate:>10.0}{megabytes:>10.0}{:>8.2}{:>8.2}",
        load.name,
        each(kicks),
        each(interrupts)
    );
}
