mod hostile;
mod kept;
mod observed;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, bitmap::Bitmap};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{
    Device,
    backend::disk::{ATTRIBUTE, Aio, OpenOptions},
    bus::BusDevice,
    conformance,
    state::Section,
    testing::{Buffer, Guest, INDIRECT, RAM, WRITE},
};

const MIB: u64 = 1 << 20;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const USUAL: u64 = FLUSH | F_INDIRECT_DESC | F_EVENT_IDX;

/// A guest with a disk, and the image behind it.
struct Rig {
    guest: Guest,
    dir: TempDir,
}

fn rw() -> OpenOptions {
    OpenOptions { discard: true, ..OpenOptions::default() }
}

fn image(dir: &TempDir, bytes: u64) -> PathBuf {
    let path = dir.as_path().join("disk.img");
    let content: Vec<u8> = (0..bytes).map(|n| (n / 512) as u8 ^ n as u8).collect();
    fs::write(&path, content).unwrap();
    path
}

impl Rig {
    fn new(options: OpenOptions) -> Self {
        Self::with(options, USUAL, Settings::default())
    }

    fn with(options: OpenOptions, features: u64, settings: Settings) -> Self {
        let dir = TempDir::new().unwrap();
        let disk = Disk::open(&image(&dir, 4 * MIB), &options).unwrap();
        let block = Block::new("disk", settings, Some(disk.into()));
        let mut guest = Guest::new(Box::new(block));
        guest.start(features);
        Self { guest, dir }
    }

    fn limited(ops: Option<u64>, bytes: Option<u64>) -> Self {
        let dir = TempDir::new().unwrap();
        let disk = Disk::open(&image(&dir, MIB), &rw()).unwrap();
        let backend = Backend { ops_per_second: ops, bytes_per_second: bytes, ..disk.into() };
        let block = Block::new("disk", Settings::default(), Some(backend));
        let mut guest = Guest::new(Box::new(block));
        guest.start(USUAL);
        Self { guest, dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.as_path().join("disk.img")
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    fn block(&mut self) -> &mut Block {
        self.guest.device().unwrap()
    }

    fn stat(&mut self, of: impl Fn(&BlockStats) -> &AtomicU64) -> u64 {
        of(&self.block().stats()).load(Ordering::Relaxed)
    }

    /// Send a request in the usual layout; returns its status and what the device wrote before it.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, Vec<u8>, u32) {
        let g = &mut self.guest;
        let header = g.bytes(&header(kind, sector));
        let status = g.bytes(&[0xff]);
        let mut buffers: Vec<Buffer> = vec![(header, 16, false)];
        if !out.is_empty() {
            buffers.push((g.bytes(out), out.len() as u32, false));
        }
        let data = g.room(room);
        if room > 0 {
            buffers.push((data, room as u32, true));
        }
        buffers.push((status, 1, true));
        let head = g.request(0, &buffers);
        let (used, len) = g.completion(0);
        assert_eq!(used, head);
        (g.peek(status, 1)[0], g.peek(data, room), len)
    }

    fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let (status, data, used) = self.request(VIRTIO_BLK_T_IN, sector, &[], len);
        assert_eq!(used, if status == 0 { len as u32 + 1 } else { 1 });
        (status, data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let (status, _, used) = self.request(VIRTIO_BLK_T_OUT, sector, data, 0);
        assert_eq!(used, 1);
        status
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let range =
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.request(kind, 0, &range, 0).0
    }
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &0u32.to_le_bytes(), &sector.to_le_bytes()].concat()
}

/// How many descriptors this process has for a file.
fn descriptors_of(path: &std::path::Path) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == path)).count()
}

fn allocated(path: &std::path::Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

/// Every way of carrying requests out must look the same to the guest.
fn every_way() -> Vec<OpenOptions> {
    let mut ways = Vec::new();
    for aio in [Aio::Auto, Aio::Off] {
        for direct in [false, true] {
            ways.push(OpenOptions { aio, direct, ..rw() });
        }
    }
    ways
}

#[test]
fn every_rule_of_virtio_is_kept() {
    let dir = TempDir::new().unwrap();
    let made = AtomicU64::new(0);
    // Each device has an image of its own, as an image has one writer.
    let backend = |aio| {
        let path = dir.as_path().join(made.fetch_add(1, Ordering::Relaxed).to_string());
        let file = fs::File::create(&path).unwrap();
        file.set_len(MIB).unwrap();
        // Copies of one image, so that a device can take over from another.
        rustix::fs::fsetxattr(&file, ATTRIBUTE, &[1; 16], rustix::fs::XattrFlags::empty()).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        Some(Backend::from(Disk::open(&path, &OpenOptions { aio, ..rw() }).unwrap()))
    };
    let block = |queues, backend| -> Box<dyn VirtioDevice> {
        let settings = Settings { queues, ..Settings::default() };
        Box::new(Block::new("disk", settings, backend))
    };
    conformance::run(|| block(1, backend(Aio::IoUring)));
    conformance::run(|| block(2, backend(Aio::Off)));
    conformance::run(|| block(1, None));
}

#[test]
fn reads_and_writes_whichever_way_it_is_opened() {
    for way in every_way() {
        let mut r = Rig::new(way);
        let before = r.image();
        let (status, data) = r.read(3, 8192);
        assert_eq!((status, &data[..]), (OK, &before[3 * 512..3 * 512 + 8192]), "{way:?}");
        assert_eq!(r.write(8, &[0x5a; 4096]), OK);
        assert_eq!(r.write(17, &[0xa5; 512]), OK);
        assert_eq!(r.read(8, 4096).1, [0x5a; 4096]);
        assert_eq!(r.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
        let after = r.image();
        assert_eq!(&after[8 * 512..16 * 512], [0x5a; 4096]);
        assert_eq!(&after[17 * 512..18 * 512], [0xa5; 512]);
        assert_eq!(after[18 * 512..], before[18 * 512..]);
        assert_eq!(r.stat(|s| &s.rd_operations), 2);
        assert_eq!(r.stat(|s| &s.rd_bytes), 8192 + 4096);
        assert_eq!(r.stat(|s| &s.wr_bytes), 4096 + 512);
        assert_eq!(r.stat(|s| &s.flush_operations), 1);
    }
}

#[test]
fn data_read_is_marked_dirty_for_a_migration() {
    for way in every_way() {
        let mut r = Rig::new(way);
        let memory = r.guest.memory.clone();
        let region: &vm_memory::MmapRegion<_> = memory.iter().next().unwrap();
        let dirty = |at: u64| region.bitmap().dirty_at(at as usize);
        let at = r.guest.room(16384).next_multiple_of(4096) + 4096;
        let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
        region.bitmap().reset();
        let status = RAM - 1;
        r.guest.request(0, &[(header, 16, false), (at, 4096, true), (status, 1, true)]);
        r.guest.completion(0);
        assert!(dirty(at) && dirty(status), "{way:?}");
        assert!(!dirty(at - 4096) && !dirty(at + 4096));
    }
}

#[test]
fn reports_its_size_layout_and_serial_number() {
    let dir = TempDir::new().unwrap();
    let disk = Disk::open(&image(&dir, MIB + 700), &rw()).unwrap();
    let backend = Backend { serial: "a serial number of more than 20 bytes".into(), ..disk.into() };
    let settings = Settings { queues: 4, queue_size: 128, on_error: None };
    let mut block = Block::new("disk", settings, Some(backend));
    let config = block.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config.len(), 60);
    assert_eq!((word(0), word(4)), (2049, 0), "capacity, the half sector left out");
    assert_eq!(word(12), 126, "seg_max");
    assert_eq!((word(20), config[24]), (512, 3), "blocks of 512 bytes, 8 to a physical one");
    assert_eq!((config[32], config[34]), (1, 4), "write-back, queues");
    assert_eq!((word(36), word(40), word(48), word(52)), (1 << 17, 1, 1 << 17, 1));
    assert_eq!(block.queue_sizes(), [128; 4]);
    block.write_config(32, &[0]);
    assert_eq!(block.config()[32], 0);
    block.write_config(0, &[9; 8]);
    block.write_config(u64::MAX, &[9; 8]);
    assert_eq!(block.config()[..32], config[..32]);

    let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
    r.guest.start(USUAL | 1 << VIRTIO_BLK_F_MQ);
    let (status, id, used) = r.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..], used), (OK, &b"a serial number of m"[..], 21));
    let (status, id, used) = r.request(VIRTIO_BLK_T_GET_ID, 0, &[], 4);
    assert_eq!((status, &id[..], used), (OK, &b"a se"[..], 5));
}

#[test]
fn discards_and_zeroes() {
    for way in every_way() {
        let mut r = Rig::new(way);
        let full = allocated(&r.path());
        assert_eq!(r.range(VIRTIO_BLK_T_DISCARD, 2048, 2048, 0), OK, "{way:?}");
        assert!(allocated(&r.path()) <= full - MIB, "{way:?}: space given back");
        assert_eq!(r.range(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), OK);
        assert_eq!(r.range(VIRTIO_BLK_T_WRITE_ZEROES, 32, 8, 1), OK);
        let image = r.image();
        assert_eq!(image.len() as u64, 4 * MIB, "the size stays");
        assert!(image[8 * 512..16 * 512].iter().all(|b| *b == 0));
        assert!(image[32 * 512..40 * 512].iter().all(|b| *b == 0));
        assert!(image[16 * 512..32 * 512].iter().any(|b| *b != 0));
        assert_eq!(r.stat(|s| &s.unmap_operations), 1);
    }
}

#[test]
fn what_a_slot_offered_when_it_was_empty_does_not_harm_any_disk() {
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for way in every_way() {
        for (readonly, discards) in [(false, true), (false, false), (true, false)] {
            let dir = TempDir::new().unwrap();
            let path = image(&dir, 4 * MIB);
            let block = Block::new("slot", Settings::default(), None);
            let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
            let offered = r.guest.offered();
            for feature in [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
                assert_ne!(offered & 1 << feature, 0);
            }
            r.guest.start(offered);
            let disk = Disk::open(&path, &OpenOptions { readonly, discard: discards, ..way });
            let disk = disk.unwrap();
            r.guest.update(|b: &mut Block| b.plug(disk.into())).unwrap().unwrap();
            let (before, full) = (r.image(), allocated(&path));

            let expected = if readonly { IOERR } else { OK };
            assert_eq!(r.range(discard, 2048, 2048, 0), expected, "{way:?}");
            if !discards {
                assert!(r.image() == before && allocated(&path) == full, "{way:?}: ignored");
            }
            assert_eq!(r.stat(|s| &s.unmap_operations), u64::from(!readonly));
            assert_eq!(r.stat(|s| &s.failed_unmap_operations), 0);
            for flags in [0, 1] {
                assert_eq!(r.range(zeroes, 4096, 2048, flags), expected);
            }
            let zeroed = r.image()[2 << 20..3 << 20].iter().all(|b| *b == 0);
            assert_eq!(zeroed, !readonly);
            if !discards {
                assert_eq!(allocated(&path), full, "{way:?}: space is kept");
            }
        }
    }
}

#[test]
fn the_parts_of_a_request_may_lie_in_descriptors_as_the_driver_likes() {
    let mut r = Rig::new(rw());
    let image = r.image();
    let g = &mut r.guest;
    // Header in 1 + 15 bytes, data in 100 + 412, status at the end of the data.
    let header_at = g.bytes(&header(VIRTIO_BLK_T_IN, 5));
    let data = g.room(513);
    let parts = [(header_at, 1, false), (header_at + 1, 15, false)];
    g.request(0, &[parts[0], parts[1], (data, 100, true), (data + 100, 413, true)]);
    assert_eq!(g.completion(0).1, 513);
    assert_eq!(g.peek(data, 512), image[5 * 512..6 * 512]);
    assert_eq!(g.peek(data + 512, 1), [OK]);
    // Header and data in one.
    let all = g.bytes(&[header(VIRTIO_BLK_T_OUT, 9), vec![7; 512]].concat());
    let status = g.bytes(&[0xff]);
    g.request(0, &[(all, 528, false), (status, 1, true)]);
    g.completion(0);
    assert_eq!(g.peek(status, 1), [OK]);
    assert_eq!(r.image()[9 * 512..10 * 512], [7; 512]);
}

#[test]
fn an_indirect_table_carries_a_large_request() {
    for way in every_way() {
        let mut r = Rig::new(way);
        let image = r.image();
        let g = &mut r.guest;
        let n = 254u16;
        let table = g.room(16 * (usize::from(n) + 2));
        let header = g.bytes(&header(VIRTIO_BLK_T_IN, 16));
        let data = g.room(4096 * (usize::from(n) + 1)).next_multiple_of(4096);
        let status = g.bytes(&[0xff]);
        let q = &mut g.queues[0];
        q.descriptor_at(table, 0, header, 16, 1, 1);
        for i in 0..n {
            // Backwards, so that nothing is contiguous.
            let at = data + 4096 * u64::from(n - 1 - i);
            q.descriptor_at(table, i + 1, at, 4096, WRITE | 1, i + 2);
        }
        q.descriptor_at(table, n + 1, status, 1, WRITE, 0);
        q.descriptor(0, table, 16 * (u32::from(n) + 2), INDIRECT, 0);
        q.publish(0);
        g.kick(0);
        assert_eq!(g.completion(0), (0, u32::from(n) * 4096 + 1), "{way:?}");
        assert_eq!(g.peek(status, 1), [OK]);
        for i in 0..usize::from(n) {
            let at = data + 4096 * (usize::from(n) - 1 - i) as u64;
            assert!(g.peek(at, 4096) == image[8192 + 4096 * i..][..4096], "{way:?} {i}");
        }
    }
}

#[test]
fn one_interrupt_is_decided_for_a_batch() {
    let mut r = Rig::new(rw());
    while r.guest.interrupted() {}
    let q = &mut r.guest.queues[0];
    q.set_used_event(7);
    let mut heads = Vec::new();
    for _ in 0..8 {
        let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
        let (data, status) = (r.guest.room(512), r.guest.bytes(&[0xff]));
        let chain = [(header, 16, false), (data, 512, true), (status, 1, true)];
        heads.push(r.guest.queues[0].chain(&chain));
    }
    for head in &heads[..7] {
        r.guest.queues[0].publish(*head);
    }
    r.guest.kick(0);
    assert!(!r.guest.interrupted(), "the driver has requested it for the eighth");
    r.guest.queues[0].publish(heads[7]);
    r.guest.kick(0);
    assert!(r.guest.interrupted());
}

#[test]
fn a_driver_without_event_idx_can_turn_interrupts_off() {
    let mut r = Rig::with(rw(), FLUSH, Settings::default());
    while r.guest.interrupted() {}
    let at = GuestAddress(r.guest.queues[0].available);
    r.guest.memory.write_obj(1u16, at).unwrap();
    assert_eq!(r.read(0, 512).0, OK);
    assert!(!r.guest.interrupted());
    r.guest.memory.write_obj(0u16, at).unwrap();
    assert_eq!(r.read(0, 512).0, OK);
    assert!(r.guest.interrupted());
}

#[test]
fn an_empty_slot_is_filled_and_emptied_while_the_guest_runs() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, MIB);
    let block = Block::new("slot", Settings::default(), None);
    let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
    r.guest.start(USUAL);
    assert_eq!(r.guest.load(0x100), 0);
    assert_eq!(r.read(0, 512).0, IOERR);
    assert_eq!(r.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, IOERR);
    for _ in 0..3 {
        let disk = Disk::open(&path, &rw()).unwrap();
        while r.guest.interrupted() {}
        let backend = Backend { serial: "hot".into(), ..disk.into() };
        r.guest.update(|b: &mut Block| b.plug(backend)).unwrap().unwrap();
        assert!(r.guest.interrupted(), "the driver is notified");
        assert_eq!(r.guest.load(0x100), 2048);
        assert_eq!(r.read(1, 512), (OK, r.image()[512..1024].to_vec()));
        assert_eq!(&r.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20).1[..4], b"hot\0");
        let other = r.dir.as_path().join("other");
        fs::write(&other, [0; 512]).unwrap();
        let second = Disk::open(&other, &rw()).unwrap();
        assert!(matches!(r.block().plug(second.into()), Err(PlugError::Occupied(_))));
        let disk = r.guest.update(Block::unplug).unwrap();
        assert_eq!(disk.unwrap().disk.path(), path);
        assert_eq!(r.guest.load(0x100), 0);
        assert_eq!(r.read(0, 512).0, IOERR);
        assert_eq!(descriptors_of(&path), 0, "the machine has closed it");
    }
    assert!(r.block().unplug().is_none());
}

fn resized(r: &mut Rig, bytes: u64) -> Result<u64, DiskError> {
    let image = r.guest.update(|block: &mut Block| block.begin_resize(bytes));
    let size = image.unwrap()?.unwrap().resize(bytes)?;
    r.guest.update(|_: &mut Block| ());
    Ok(size)
}

#[test]
fn the_guest_sees_a_resized_image() {
    let mut r = Rig::new(rw());
    assert_eq!(r.read(8192, 512).0, IOERR, "the image has not grown yet");
    while r.guest.interrupted() {}
    // The open image, even if its name now refers to another file.
    fs::rename(r.path(), r.path().with_extension("moved")).unwrap();
    fs::write(r.path(), "somebody else's").unwrap();
    assert_eq!(resized(&mut r, 6 * MIB).unwrap(), 6 * MIB);
    assert_eq!(fs::read(r.path()).unwrap(), b"somebody else's");
    assert!(r.guest.interrupted());
    assert_eq!(r.guest.load(0x100), 6 * 2048);
    assert_eq!(r.read(8192, 512), (OK, vec![0; 512]));
}

#[test]
fn a_read_only_image_keeps_its_size() {
    let mut r = Rig::new(OpenOptions { readonly: true, ..rw() });
    let before = fs::metadata(r.path()).unwrap().len();
    assert!(matches!(resized(&mut r, 512), Err(DiskError::ReadOnly { .. })));
    assert_eq!(fs::metadata(r.path()).unwrap().len(), before);
}

#[test]
fn host_errors_reach_the_hook_and_the_guest() {
    // The image shrinks under the device: the one host error that needs no special mount.
    let dir = TempDir::new().unwrap();
    let path = image(&dir, MIB);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let sink = heard.clone();
    let hook: OnError = Arc::new(move |id, e, write| {
        sink.lock().push((id.to_owned(), e.kind(), write));
    });
    let settings = Settings { on_error: Some(hook), ..Settings::default() };
    let disk = Disk::open(&path, &rw()).unwrap();
    let block = Block::new("disk", settings, Some(disk.into()));
    let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
    r.guest.start(USUAL);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(r.read(0, 512).0, IOERR);
    let eof = (String::from("disk"), io::ErrorKind::UnexpectedEof, false);
    assert_eq!(*heard.lock(), [eof]);
    assert_eq!(r.read(0, 512).0, IOERR);
    assert_eq!(r.stat(|s| &s.failed_rd_operations), 2, "all are counted");
}

#[test]
fn a_limit_holds_requests_back_and_lets_them_all_through_in_the_end() {
    for (ops, bytes) in [(Some(20), None), (None, Some(20 * 512)), (Some(u64::MAX), Some(20 * 512))]
    {
        let mut r = Rig::limited(ops, bytes);
        let mut sent = Vec::new();
        for _ in 0..8 {
            let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
            let (data, status) = (r.guest.room(512), r.guest.bytes(&[0xff]));
            let chain = [(header, 16, false), (data, 512, true), (status, 1, true)];
            let head = r.guest.queues[0].chain(&chain);
            r.guest.queues[0].publish(head);
            sent.push(head);
        }
        r.guest.transport.notifiers()[0].write(1).unwrap();
        r.guest.thread.turn(std::time::Duration::ZERO);
        assert!(r.guest.queues[0].used_index() < 8, "held back");
        for head in sent {
            assert_eq!(r.guest.completion(0), (head, 513));
        }
    }
}

#[test]
fn a_limit_on_bytes_counts_ranges() {
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for (kind, discards, limited) in [
        (zeroes, true, true),
        (zeroes, false, true),
        (discard, true, true),
        (discard, false, false),
    ] {
        let dir = TempDir::new().unwrap();
        let options = OpenOptions { discard: discards, ..rw() };
        let disk = Disk::open(&image(&dir, MIB), &options).unwrap();
        // The first range takes an hour's worth of bytes.
        let backend = Backend { bytes_per_second: Some(MIB / 3600), ..disk.into() };
        let block = Block::new("disk", Settings::default(), Some(backend));
        let mut r = Rig { guest: Guest::new(Box::new(block)), dir };
        r.guest.start(USUAL);
        assert_eq!(r.range(kind, 0, 2048, 0), OK);
        let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
        let (data, status) = (r.guest.room(512), r.guest.bytes(&[0xff]));
        r.guest.request(0, &[(header, 16, false), (data, 512, true), (status, 1, true)]);
        r.guest.thread.settle();
        let held_back = r.guest.peek(status, 1) == [0xff];
        assert_eq!(held_back, limited, "{kind}, discard {discards}");
    }
}

#[test]
fn a_limited_disk_can_be_parked_and_reset_while_requests_are_held_back() {
    let mut r = Rig::limited(None, Some(1));
    assert_eq!(r.read(0, 512).0, OK);
    let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 0));
    let status = r.guest.bytes(&[0xff]);
    r.guest.request(0, &[(header, 16, false), (status, 1, true)]);
    r.guest.transport.pause();
    r.guest.transport.resume();
    r.guest.store(0x70, 0);
    assert_eq!(r.guest.thread.workers(), 0);
    assert_eq!(r.guest.peek(status, 1), [0xff], "never carried out");
}

#[test]
fn reset_and_pause_wait_for_what_is_in_flight() {
    let mut r = Rig::new(OpenOptions { direct: true, ..rw() });
    for round in 0..20 {
        let mut statuses = Vec::new();
        let data = r.guest.room(4096 * 9).next_multiple_of(4096);
        for n in 0..8 {
            let header = r.guest.bytes(&header(VIRTIO_BLK_T_IN, 8 * n));
            let status = r.guest.bytes(&[0xff]);
            let chain = [(header, 16, false), (data + 4096 * n, 4096, true), (status, 1, true)];
            let head = r.guest.queues[0].chain(&chain);
            r.guest.queues[0].publish(head);
            statuses.push(status);
        }
        r.guest.transport.notifiers()[0].write(1).unwrap();
        r.guest.thread.turn(std::time::Duration::ZERO);
        if round % 2 == 0 {
            r.guest.transport.pause();
            for status in statuses {
                assert_eq!(r.guest.peek(status, 1), [OK], "answered before pause returns");
            }
            r.guest.transport.resume();
            r.guest.thread.settle();
        } else {
            r.guest.store(0x70, 0);
            for status in statuses {
                assert_eq!(r.guest.peek(status, 1), [OK], "no I/O outlives the reset");
            }
            r.guest.start(USUAL);
        }
    }
}

#[test]
fn a_saved_disk_continues_where_it_stopped() {
    let mut r = Rig::with(rw(), USUAL | 1 << VIRTIO_BLK_F_CONFIG_WCE, Settings::default());
    assert_eq!(r.write(0, &[1; 512]), OK);
    r.guest.transport.write(0x120, &[0]);
    let image = r.path();
    r.guest.transport.pause();
    // The old device has to release the image before the new one can lock it.
    let section = r.guest.transport.save().unwrap();
    r.block().unplug().unwrap();
    let disk = Disk::open(&image, &rw()).unwrap();
    let block = Block::new("disk", Settings::default(), Some(disk.into()));
    let mut to = Guest::with_memory(Box::new(block), r.guest.memory.clone());
    to.transport.restore(&section).unwrap();
    to.queues.clone_from(&r.guest.queues);
    to.transport.resume();
    r.guest = to;
    assert_eq!(r.guest.load(0x120) & 0xff, 0, "write-through is remembered");
    r.guest.room(1 << 20);
    assert_eq!(r.write(1, &[2; 512]), OK);
    assert_eq!(&r.image()[..1024], [[1; 512], [2; 512]].concat());
}

#[test]
fn several_queues_share_the_disk() {
    let settings = Settings { queues: 4, queue_size: 16, on_error: None };
    let mut r = Rig::with(rw(), USUAL | 1 << VIRTIO_BLK_F_MQ, settings);
    for round in 0..10u64 {
        for queue in 0..4u16 {
            let sector = round * 4 + u64::from(queue);
            let header = r.guest.bytes(&header(VIRTIO_BLK_T_OUT, sector));
            let data = r.guest.bytes(&[sector as u8 ^ 0xff; 512]);
            let status = r.guest.bytes(&[0xff]);
            let chain = [(header, 16, false), (data, 512, false), (status, 1, true)];
            r.guest.request(queue, &chain);
            r.guest.completion(queue);
        }
    }
    let image = r.image();
    for sector in 0..40 {
        assert_eq!(image[sector * 512], sector as u8 ^ 0xff);
    }
}

#[test]
fn without_flush_every_write_is_durable_when_it_is_answered() {
    // This tests that the path works; durability would only show in a power cut.
    for way in every_way() {
        let mut r = Rig::with(way, F_EVENT_IDX, Settings::default());
        assert_eq!(r.write(1, &[3; 4096]), OK, "{way:?}");
        assert_eq!(r.range(VIRTIO_BLK_T_WRITE_ZEROES, 2, 1, 0), OK, "{way:?}");
        let mut sector = [9; 512];
        fs::File::open(r.path()).unwrap().read_exact_at(&mut sector, 1024).unwrap();
        assert_eq!(sector, [0; 512]);
    }
}
