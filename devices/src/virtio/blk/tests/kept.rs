//! A disk that is parked with requests in flight, and another one that carries them out again.
use std::{collections::BTreeMap, time::Duration};

use virtio_queue::QueueT;

use super::*;
use crate::{
    backend::disk::{Change, Contents, Logged, Observer, Verdict, WriteLog},
    testing::{self, DriverQueue},
    worker::{Park, Worker},
};

/// Every read and write goes through the kernel's ring and stays in flight until the next turn.
fn slow() -> OpenOptions {
    OpenOptions { direct: true, ..rw() }
}

/// A guest with such a disk, whose image has its next generation already: writes do not wait for it.
fn rig(settings: Settings) -> Rig {
    let features = USUAL | u64::from(settings.queues > 1) << VIRTIO_BLK_F_MQ;
    let mut r = Rig::with(slow(), features, settings);
    let disk = r.block().disk().unwrap();
    disk.resize(disk.size()).unwrap();
    r
}

/// A request of one block of 4 KiB that was made available.
#[derive(Clone, Copy)]
struct Sent {
    head: u16,
    status: u64,
    data: u64,
}

fn send(guest: &mut Guest, queue: u16, kind: u32, block: u64, value: u8) -> Sent {
    let header = guest.bytes(&header(kind, block * 8));
    let data = guest.room(8191).next_multiple_of(4096);
    guest.poke(data, &[value; 4096]);
    let status = guest.bytes(&[0xff]);
    let (header, last) = ((header, 16, false), (status, 1, true));
    let chain = match kind {
        VIRTIO_BLK_T_FLUSH => vec![header, last],
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            guest.poke(data, &(block * 8).to_le_bytes());
            guest.poke(data + 8, &[8, 0, 0, 0, 0, 0, 0, 0]);
            vec![header, (data, 16, false), last]
        }
        _ => vec![header, (data, 4096, kind == VIRTIO_BLK_T_IN), last],
    };
    let ring = &mut guest.queues[usize::from(queue)];
    let head = ring.chain(&chain);
    ring.publish(head);
    Sent { head, status, data }
}

fn notify(guest: &Guest, queue: usize) {
    guest.transport.notifiers()[queue].write(1).unwrap();
}

/// Start what was sent, without waiting for it.
fn start(guest: &mut Guest, queue: usize) {
    notify(guest, queue);
    guest.thread.turn(Duration::ZERO);
}

/// Park the device as for an epoch of replication, and save it.
fn capture(guest: &mut Guest) -> Section {
    guest.thread.parks(Park::Keep);
    guest.transport.pause();
    guest.thread.parks(Park::Drain);
    guest.transport.save().unwrap()
}

/// Another machine at the moment of the capture: its memory, and its disk at `path`.
fn backup(from: &mut Guest, section: &Section, settings: Settings, backend: Backend) -> Guest {
    let memory = testing::memory();
    // The rings and the data; the rest is empty.
    for (at, end) in [(MIB, 2 * MIB), (RAM / 2, from.room(0))] {
        memory.write_slice(&from.peek(at, (end - at) as usize), GuestAddress(at)).unwrap();
    }
    let backend = Backend { expect: Expect::Any, ..backend };
    let block = Block::new("disk", settings, Some(backend));
    let mut to = Guest::with_memory(Box::new(block), memory.clone());
    to.transport.restore(section).unwrap();
    for queue in &from.queues {
        to.queues.push(DriverQueue::over(queue, &memory));
    }
    to.room((from.room(0) - RAM / 2) as usize);
    to
}

/// The answers that queue `index` has not reported yet.
fn answers(guest: &mut Guest, index: usize) -> Vec<u16> {
    std::iter::from_fn(|| guest.queues[index].next_used()).map(|(head, _)| head).collect()
}

/// Let the device work until queue `index` has given `count` answers; returns their heads.
fn wait_for(guest: &mut Guest, index: usize, count: usize) -> Vec<u16> {
    let thread = guest.thread.clone();
    let mut heads = Vec::new();
    thread.until("all requests are answered", || {
        heads.extend(answers(guest, index));
        heads.len() >= count
    });
    thread.settle();
    heads.extend(answers(guest, index));
    heads
}

fn in_flight(section: &Section) -> Vec<(u16, u16)> {
    let slot: ::state::device::VirtioMmio = section.read().unwrap();
    slot.device.read::<::state::device::Disk>().unwrap().in_flight
}

fn sorted(mut heads: Vec<u16>) -> Vec<u16> {
    heads.sort_unstable();
    heads
}

#[test]
fn both_machines_answer_each_request_once() {
    let mut r = rig(Settings::default());
    let before = r.image();
    let sent: Vec<Sent> = (0..32)
        .map(|n| {
            let kind = if n % 2 == 0 { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
            send(&mut r.guest, 0, kind, n, n as u8)
        })
        .collect();
    start(&mut r.guest, 0);
    let section = capture(&mut r.guest);
    let heads: Vec<u16> = sent.iter().map(|s| s.head).collect();
    let expected: Vec<_> = heads.iter().map(|head| (0, *head)).collect();
    assert_eq!(in_flight(&section), expected, "in the order in which they were sent");
    assert!(sent.iter().all(|s| r.guest.peek(s.status, 1) == [0xff]), "nothing was waited for");

    // Its disk never saw any of the writes.
    let path = r.dir.as_path().join("other.img");
    fs::write(&path, &before).unwrap();
    let disk = Disk::open(&path, &slow()).unwrap();
    let mut other = backup(&mut r.guest, &section, Settings::default(), disk.into());
    r.guest.transport.resume();
    other.transport.resume();
    for guest in [&mut r.guest, &mut other] {
        assert_eq!(sorted(wait_for(guest, 0, 32)), sorted(heads.clone()), "each once");
        for (n, s) in sent.iter().enumerate() {
            assert_eq!(guest.peek(s.status, 1), [OK]);
            if n % 2 == 1 {
                assert_eq!(guest.peek(s.data, 4096), before[n * 4096..][..4096], "read {n}");
            }
        }
        let block: &mut Block = guest.device().unwrap();
        assert_eq!(block.stats().in_flight.load(Ordering::Relaxed), 0);
    }
    assert_eq!(fs::read(&path).unwrap(), r.image());
    for n in (0..32).step_by(2) {
        assert_eq!(r.image()[n * 4096..][..4096], [n as u8; 4096]);
    }
    // Later requests are served as ever.
    other.queues[0].set_used_event(0);
    let later = send(&mut other, 0, VIRTIO_BLK_T_IN, 2, 0);
    notify(&other, 0);
    assert_eq!(wait_for(&mut other, 0, 1), [later.head]);
    assert_eq!(other.peek(later.data, 4096), [2; 4096]);
}

#[test]
fn an_ordinary_save_has_the_form_that_it_had() {
    let mut r = rig(Settings::default());
    send(&mut r.guest, 0, VIRTIO_BLK_T_OUT, 1, 1);
    start(&mut r.guest, 0);
    // Kept and running again: it is not a state that a later save would continue.
    capture(&mut r.guest);
    r.guest.transport.resume();
    r.guest.transport.pause();
    let text = r.guest.transport.save().unwrap().state.get().to_owned();
    assert!(text.contains("\"in_flight\":[],\"mark\":{"), "{text}");
    assert!(text.contains("\"next_avail\":1,\"next_used\":1"), "{text}");
}

/// Delays every change until it is opened.
#[derive(Default)]
struct Gate(AtomicBool);

impl Observer for Gate {
    fn before(&self, _: &Change) -> io::Result<Verdict> {
        Ok(if self.0.load(Ordering::SeqCst) { Verdict::Start } else { Verdict::Wait })
    }

    fn after(&self, _: &Change, _: &io::Result<()>) {}
}

#[test]
fn nothing_overtakes_the_requests_that_are_carried_out_again() {
    for aio in [Aio::Auto, Aio::Off] {
        let settings = Settings { queues: 2, ..Settings::default() };
        let mut r = rig(settings.clone());
        let before = r.image();
        let first = send(&mut r.guest, 1, VIRTIO_BLK_T_OUT, 1, 1);
        let flush = send(&mut r.guest, 0, VIRTIO_BLK_T_FLUSH, 0, 0);
        let second = send(&mut r.guest, 0, VIRTIO_BLK_T_OUT, 1, 2);
        notify(&r.guest, 1);
        start(&mut r.guest, 0);
        let section = capture(&mut r.guest);
        let listed = in_flight(&section);
        assert_eq!(listed, [(1, first.head), (0, flush.head), (0, second.head)]);
        let late = send(&mut r.guest, 1, VIRTIO_BLK_T_IN, 1, 0);

        let path = r.dir.as_path().join("other.img");
        fs::write(&path, &before).unwrap();
        let disk = Disk::open(&path, &OpenOptions { aio, ..slow() }).unwrap();
        disk.resize(disk.size()).unwrap();
        let gate = Arc::new(Gate::default());
        disk.observe(gate.clone());
        let waker = disk.waker();
        let mut other = backup(&mut r.guest, &section, settings.clone(), disk.into());
        other.transport.resume();
        other.thread.settle();
        for queue in [0, 1] {
            assert!(answers(&mut other, queue).is_empty(), "all wait for the first one");
        }

        // A pause does not wait for what the gate delays.
        other.transport.pause();
        let again = other.transport.save().unwrap();
        assert_eq!(in_flight(&again), listed);
        other.transport.restore(&again).unwrap();
        other.transport.resume();
        gate.0.store(true, Ordering::SeqCst);
        waker.wake();
        let both = sorted(vec![flush.head, second.head]);
        assert_eq!(sorted(wait_for(&mut other, 0, 2)), both);
        assert_eq!(wait_for(&mut other, 1, 2), [first.head, late.head]);
        assert_eq!(other.peek(late.data, 4096), [2; 4096], "after all of them");
        r.guest.transport.resume();
    }
}

#[test]
fn flushes_and_later_requests_wait_until_those_before_them_are_complete() {
    for kinds in [&[VIRTIO_BLK_T_OUT][..], &[VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH]] {
        let mut r = rig(Settings::default());
        for kind in kinds {
            send(&mut r.guest, 0, *kind, 1, 1);
        }
        start(&mut r.guest, 0);
        let section = capture(&mut r.guest);
        send(&mut r.guest, 0, VIRTIO_BLK_T_IN, 1, 0);
        let path = r.dir.as_path().join("other.img");
        fs::write(&path, vec![0; 4 * MIB as usize]).unwrap();
        let disk = Disk::open(&path, &slow()).unwrap();
        disk.resize(disk.size()).unwrap();
        let mut other = backup(&mut r.guest, &section, Settings::default(), disk.into());
        let block: &mut Block = other.device().unwrap();
        let worker = block.worker.parked_mut().unwrap();
        // The write is in flight until the worker looks for completions, which this does not.
        assert!(!worker.redo());
        worker.ready(0);
        assert_eq!((worker.redo.started, worker.redo.waiting.len()), (1, kinds.len() - 1));
        assert_eq!(usize::from(worker.queues[0].ring.next_avail()), kinds.len());
        other.transport.resume();
        assert_eq!(wait_for(&mut other, 0, kinds.len() + 1).len(), kinds.len() + 1);
        r.guest.transport.resume();
    }
}

#[test]
fn a_request_that_waits_for_the_limiter_is_not_in_flight() {
    let dir = TempDir::new().unwrap();
    let disk = Disk::open(&image(&dir, MIB), &slow()).unwrap();
    disk.resize(disk.size()).unwrap();
    let backend = Backend { ops_per_second: Some(1), ..disk.into() };
    let block = Block::new("disk", Settings::default(), Some(backend));
    let mut guest = Guest::new(Box::new(block));
    guest.start(USUAL);
    let first = send(&mut guest, 0, VIRTIO_BLK_T_OUT, 0, 1);
    let second = send(&mut guest, 0, VIRTIO_BLK_T_OUT, 1, 2);
    start(&mut guest, 0);
    let section = capture(&mut guest);
    assert_eq!(in_flight(&section), [(0, first.head)]);
    let path = dir.as_path().join("other.img");
    fs::write(&path, vec![0; MIB as usize]).unwrap();
    let disk = Disk::open(&path, &slow()).unwrap();
    let mut other = backup(&mut guest, &section, Settings::default(), disk.into());
    other.transport.resume();
    assert_eq!(wait_for(&mut other, 0, 2), [first.head, second.head]);
    assert_eq!(fs::read(&path).unwrap()[..8192], [[1; 4096], [2; 4096]].concat());
    guest.transport.resume();
}

#[test]
fn a_read_dirties_its_page_when_it_is_complete() {
    let mut r = rig(Settings::default());
    let sent = send(&mut r.guest, 0, VIRTIO_BLK_T_IN, 1, 0);
    let memory = r.guest.memory.clone();
    let region: &vm_memory::MmapRegion<_> = memory.iter().next().unwrap();
    start(&mut r.guest, 0);
    capture(&mut r.guest);
    // The epoch has taken what was dirty.
    region.bitmap().reset();
    assert!(!region.bitmap().dirty_at(sent.data as usize));
    r.guest.transport.resume();
    wait_for(&mut r.guest, 0, 1);
    assert!(region.bitmap().dirty_at(sent.data as usize), "so that a later epoch has it");
}

#[test]
fn requests_in_flight_that_cannot_exist_are_refused() {
    let mut r = rig(Settings::default());
    let sent = send(&mut r.guest, 0, VIRTIO_BLK_T_OUT, 0, 1);
    start(&mut r.guest, 0);
    r.guest.thread.parks(Park::Keep);
    r.guest.transport.pause();
    r.guest.thread.parks(Park::Drain);
    let good = r.block().save().unwrap();
    let text = good.state.get();
    let path = r.dir.as_path().join("other.img");
    fs::write(&path, vec![0; 4 * MIB as usize]).unwrap();
    let mut other = Rig {
        guest: Guest::new(Box::new(Block::new(
            "disk",
            Settings::default(),
            Some(Disk::open(&path, &rw()).unwrap().into()),
        ))),
        dir: TempDir::new().unwrap(),
    };
    other.guest.start(USUAL);
    other.guest.transport.pause();
    let mut refuse = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        let section = good.with(text.replace(from, to)).unwrap();
        assert!(other.block().restore(&section).is_err(), "{to}");
    };
    assert_eq!(sent.head, 0);
    refuse("\"in_flight\":[[0,0]]", "\"in_flight\":[]");
    refuse("\"in_flight\":[[0,0]]", "\"in_flight\":[[0,0],[0,0]]");
    refuse("\"in_flight\":[[0,0]]", "\"in_flight\":[[0,256]]");
    refuse("\"in_flight\":[[0,0]]", "\"in_flight\":[[1,0]]");
    refuse("\"in_flight\":[[0,0]]", "\"in_flight\":[[0,0]],\"needs_reset\":[1]");
    refuse("\"next_used\":0", "\"next_used\":1");
    other.block().restore(&good).unwrap();
    r.guest.transport.resume();
}

#[test]
fn a_broken_queue_stays_broken() {
    let mut r = rig(Settings::default());
    r.guest.queues[0].set_available_index(1000);
    r.guest.kick(0);
    assert!(r.guest.needs_reset());
    let section = capture(&mut r.guest);
    let path = r.dir.as_path().join("other.img");
    fs::write(&path, vec![0; 4 * MIB as usize]).unwrap();
    let disk = Disk::open(&path, &slow()).unwrap();
    let mut other = backup(&mut r.guest, &section, Settings::default(), disk.into());
    assert!(other.needs_reset());
    // The ring is put right, but that is not what the specification demands of the driver.
    other.queues[0].set_available_index(0);
    send(&mut other, 0, VIRTIO_BLK_T_IN, 0, 0);
    other.transport.resume();
    notify(&other, 0);
    other.thread.settle();
    assert!(answers(&mut other, 0).is_empty());
}

/// What the driver knows of one block, and what it waits for.
#[derive(Clone, Default)]
struct Known {
    contents: u8,
    /// What the driver has requested: kind, value to be written, and where.
    pending: Option<(u32, u8, Sent)>,
}

/// The driver's side of a random run.
#[derive(Clone)]
struct Model {
    blocks: Vec<Known>,
    /// Heads in flight of each queue, with their number in that queue, and their block; flushes have
    /// none.
    flying: BTreeMap<(u16, u16), (usize, Option<usize>)>,
}

impl Model {
    /// Check the answers that have arrived.
    fn collect(&mut self, guest: &mut Guest) {
        for queue in 0..guest.queues.len() as u16 {
            for head in answers(guest, queue.into()) {
                let block = self.flying.remove(&(queue, head));
                let block = block.unwrap_or_else(|| panic!("{head} was answered twice"));
                let Some(block) = block.1.map(|n| &mut self.blocks[n]) else { continue };
                let (kind, value, sent) = block.pending.take().unwrap();
                assert_eq!(guest.peek(sent.status, 1), [OK]);
                match kind {
                    VIRTIO_BLK_T_IN => {
                        assert_eq!(guest.peek(sent.data, 4096), [block.contents; 4096]);
                    }
                    VIRTIO_BLK_T_OUT => block.contents = value,
                    _ => block.contents = 0,
                }
            }
        }
    }
}

#[test]
fn whatever_is_in_flight_when_it_is_captured_both_machines_end_alike() {
    const BLOCKS: usize = 64;
    const KINDS: [u32; 6] = [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_T_FLUSH,
    ];
    let (mut captured, mut redone) = (0, 0);
    for seed in 0..16 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let settings = Settings { queues: 1 + (seed % 3) as u16, queue_size: 64, on_error: None };
        let way = OpenOptions { direct: rng.u8(..4) != 0, ..rw() };
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("disk.img");
        fs::write(&path, vec![0; BLOCKS * 4096]).unwrap();
        let disk = Disk::open(&path, &way).unwrap();
        // What the backup's image is made of.
        let log = WriteLog::new(1 << 20);
        disk.log_writes(&log, 0);
        log.record();
        let mut image = vec![0; BLOCKS * 4096];
        let mut epoch = 0;
        let block = Block::new("disk", settings.clone(), Some(disk.into()));
        let mut guest = Guest::new(Box::new(block));
        guest.start(USUAL | u64::from(settings.queues > 1) << VIRTIO_BLK_F_MQ);
        let mut model = Model { blocks: vec![Known::default(); BLOCKS], flying: BTreeMap::new() };
        let mut numbers = [0; 3];
        let mut free = 400;
        while free > 0 {
            match rng.u8(..32) {
                0..20 => {
                    free -= 1;
                    let queue = rng.u16(..settings.queues);
                    let (n, kind) = (rng.usize(..BLOCKS), KINDS[rng.usize(..KINDS.len())]);
                    let mine = model.flying.iter().filter(|((of, _), _)| *of == queue);
                    let number = numbers[usize::from(queue)];
                    let oldest = mine.map(|(_, (number, _))| *number).min().unwrap_or(number);
                    // Chains take three descriptors of 64, in turn.
                    if number - oldest >= 20 || model.blocks[n].pending.is_some() {
                        continue;
                    }
                    let value = rng.u8(1..);
                    let sent = send(&mut guest, queue, kind, n as u64, value);
                    let block = (kind != VIRTIO_BLK_T_FLUSH).then_some(n);
                    let taken = model.flying.insert((queue, sent.head), (number, block));
                    assert!(taken.is_none());
                    numbers[usize::from(queue)] += 1;
                    if block.is_some() {
                        model.blocks[n].pending = Some((kind, value, sent));
                    }
                }
                20..31 => {
                    notify(&guest, rng.u16(..settings.queues).into());
                    guest.thread.turn(Duration::ZERO);
                }
                _ => {
                    let section = capture(&mut guest);
                    model.collect(&mut guest);
                    captured += 1;
                    redone += in_flight(&section).len();
                    epoch += 1;
                    log.mark(epoch);
                    for Logged { offset, contents, .. } in log.take(epoch).iter().cloned() {
                        let at = &mut image[offset as usize..];
                        match contents {
                            Contents::Bytes(copied) => {
                                at[..copied.bytes().len()].copy_from_slice(copied.bytes());
                            }
                            Contents::Zeroes(len) => at[..len as usize].fill(0),
                        }
                    }
                    // Whatever is answered is in it, and nothing else.
                    for (n, block) in model.blocks.iter().enumerate() {
                        assert_eq!(image[n * 4096..][..4096], [block.contents; 4096], "{seed}");
                    }
                    let there = dir.as_path().join("other.img");
                    fs::write(&there, &image).unwrap();
                    let disk = Disk::open(&there, &way).unwrap();
                    let mut other = backup(&mut guest, &section, settings.clone(), disk.into());
                    let mut model_there = model.clone();
                    other.transport.resume();
                    (0..usize::from(settings.queues)).for_each(|queue| notify(&other, queue));
                    let thread = other.thread.clone();
                    thread.until("all are answered", || {
                        model_there.collect(&mut other);
                        model_there.flying.is_empty()
                    });
                    let image = fs::read(&there).unwrap();
                    for (n, block) in model_there.blocks.iter().enumerate() {
                        assert_eq!(image[n * 4096..][..4096], [block.contents; 4096], "{seed}");
                    }
                    guest.transport.resume();
                }
            }
            model.collect(&mut guest);
        }
    }
    assert!(captured > 100 && redone > 200, "{captured} captures, {redone} requests in flight");
}

#[test]
#[ignore = "measures the pause; run it alone, optimized, with --nocapture"]
fn the_pause_with_requests_in_flight() {
    for park in [Park::Drain, Park::Keep] {
        let mut took = Vec::new();
        for _ in 0..10 {
            let mut r = rig(Settings::default());
            for _ in 0..10 {
                for n in 0..32 {
                    send(&mut r.guest, 0, VIRTIO_BLK_T_OUT, n, 1);
                }
                start(&mut r.guest, 0);
                r.guest.thread.parks(park);
                let begin = std::time::Instant::now();
                r.guest.transport.pause();
                took.push(begin.elapsed());
                r.guest.transport.resume();
                wait_for(&mut r.guest, 0, 32);
            }
        }
        took.sort_unstable();
        let (median, p99, most) = (took[50], took[98], took[99]);
        println!("{park:?}: median {median:?}, p99 {p99:?}, most {most:?}, n = {}", took.len());
    }
}
