use std::{
    fs::File,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::PathBuf,
    sync::Arc,
    thread,
};

use config::MemoryConfig;

use super::*;
use crate::memory::{allocate, clear, fault, image};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

fn config(size: u64) -> MemoryConfig {
    let size = size.try_into().unwrap();
    MemoryConfig::new(size)
}

fn fill(memory: &Memory, with: u8) {
    let bytes = vec![with; MIB as usize];
    for at in (0..super::super::size(memory)).step_by(bytes.len()) {
        image::write(memory, at, &bytes).unwrap();
    }
}

fn byte(memory: &Memory, at: u64) -> u8 {
    let mut byte = [0];
    image::read(memory, at, &mut byte).unwrap();
    byte[0]
}

/// Whether all of `range` is `value`.
fn is_all(memory: &Memory, range: Range<u64>, value: u8) -> bool {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    image::read(memory, range.start, &mut bytes).unwrap();
    bytes.iter().all(|byte| *byte == value)
}

/// The ranges that devices have written since the last call.
fn dirty(memory: &Memory) -> Vec<Range<u64>> {
    let words = |r: &Region| vec![0; (r.len() / PAGE_SIZE).div_ceil(64) as usize];
    image::dirty(memory, &memory.iter().map(words).collect::<Vec<_>>()).unwrap()
}

/// Bytes of `memory` that are resident, according to the kernel's list of mappings.
fn resident(memory: &Memory) -> u64 {
    let list = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut bytes) = (false, 0);
    for line in list.lines() {
        let start = line.split_once('-').map(|(start, _)| u64::from_str_radix(start, 16));
        if let Some(Ok(start)) = start {
            inside = memory.iter().any(|r| {
                let first = r.as_ptr().addr() as u64;
                (first..first + r.len()).contains(&start)
            });
        } else if let Some(rss) = line.strip_prefix("Rss:").filter(|_| inside) {
            bytes += rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
        }
    }
    bytes
}

/// A file that holds `value` everywhere.
fn file_of(size: u64, value: u8) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    for at in (0..size).step_by(MIB as usize) {
        file.write_all_at(&vec![value; MIB as usize], at).unwrap();
    }
    file
}

/// Gives back 4 MiB of `memory`, which is filled with 7; the range begins and ends in the middle of
/// a page.
fn gives_back(kind: &str, memory: &Memory, config: &MemoryConfig, origin: Origin) {
    let reclaimer = Reclaimer::new(memory, config, origin);
    image::forget_dirty(memory);
    let range = 4 * MIB..8 * MIB;
    reclaimer.discard(GuestAddress(range.start - 5), range.end - range.start + 10);
    assert!(is_all(memory, range.clone(), 0), "{kind}");
    assert!(is_all(memory, range.start - MIB..range.start, 7), "{kind}");
    assert!(is_all(memory, range.end..range.end + MIB, 7), "{kind}");
    assert_eq!(dirty(memory), std::slice::from_ref(&range), "{kind}");
    assert_eq!(reclaimer.counts(), Counts { taken: 4 * MIB, refused: 0 }, "{kind}");
    // It is ordinary memory afterwards, also the second time.
    for _ in 0..2 {
        image::write(memory, range.start, &[9; 8192]).unwrap();
        assert_eq!(byte(memory, range.start + 8191), 9, "{kind}");
        reclaimer.discard(GuestAddress(range.start), 2 * MIB);
        assert!(is_all(memory, range.clone(), 0), "{kind}");
    }
    // There is no memory, which is not an error.
    reclaimer.discard(GuestAddress(SIZE - 100), u64::MAX);
    reclaimer.discard(GuestAddress(u64::MAX), u64::MAX);
    reclaimer.withhold(GuestAddress(SIZE), PAGE_SIZE);
    reclaimer.release(GuestAddress(u64::MAX - 5), 5);
    assert_eq!(reclaimer.counts().refused, 0, "{kind}");
}

#[test]
fn memory_of_each_kind_reads_as_zero_afterwards_and_is_noted_as_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| Some(dir.path().join(name));
    for (kind, shared, path) in [
        ("anonymous", false, None),
        ("memfd", true, None),
        ("private file", false, path("private")),
        ("shared file", true, path("shared")),
    ] {
        let config = MemoryConfig { shared, path, ..config(SIZE) };
        let memory = allocate(&config).unwrap();
        fill(&memory, 7);
        gives_back(kind, &memory, &config, Origin::Written);
        if shared {
            let reclaimer = Reclaimer::new(&memory, &config, Origin::Written);
            reclaimer.discard(GuestAddress(4 * MIB), 4 * MIB);
            let file = memory.iter().next().unwrap().file_offset().unwrap();
            let bytes = file.file().metadata().unwrap().blocks() * 512;
            assert!(bytes <= 13 * MIB, "{kind}: {bytes} bytes are still there");
        }
    }
    let file = file_of(SIZE, 7);
    let memory = image::map(&config(SIZE), &file, &[]).unwrap();
    gives_back("mapped", &memory, &config(SIZE), Origin::Mapped);
    assert_eq!(std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()[5 << 20], 7);
}

/// Reserves huge pages of 2 MiB; releases them on drop.
struct HugePages {
    before: u64,
    /// One test at a time changes the number, whichever process it is in.
    _lock: std::fs::File,
}

impl HugePages {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: u64) -> Option<Self> {
        let read = || std::fs::read_to_string(Self::POOL).ok()?.trim().parse::<u64>().ok();
        let lock = std::fs::File::open(Self::POOL).ok()?;
        lock.lock().ok()?;
        let this = Self { before: read()?, _lock: lock };
        this.add(count);
        (read()? == this.before + count).then_some(this)
    }

    /// Add `count` pages to those that were there before.
    fn add(&self, count: u64) {
        let _ = std::fs::write(Self::POOL, (self.before + count).to_string());
    }

    /// Take away all pages that are neither used nor reserved.
    fn take_away(&self) {
        let _ = std::fs::write(Self::POOL, "0");
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::POOL, self.before.to_string());
    }
}

#[test]
fn huge_pages_are_not_given_back_and_stay_reserved_when_they_are_cleared() {
    let Some(pages) = HugePages::reserve(SIZE / (2 * MIB)) else {
        println!("This host gives no huge pages: not run.");
        return;
    };
    for shared in [true, false] {
        let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("huge", flags).unwrap());
        let path = Some(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
        let config = MemoryConfig { shared, path, ..config(SIZE) };
        let memory = allocate(&config).unwrap();
        fill(&memory, 7);
        let reclaimer = Reclaimer::new(&memory, &config, Origin::Written);
        reclaimer.discard(GuestAddress(0), 4 * MIB);
        reclaimer.withhold(GuestAddress(4 * MIB), 4 * MIB);
        assert_eq!(reclaimer.counts(), Counts { taken: 0, refused: 8 * MIB });
        assert!(is_all(&memory, 0..SIZE, 7));
        clear(&memory, &config).unwrap();
        // Unreserved pages leave the pool; touching a page that is gone would be SIGBUS.
        pages.take_away();
        fill(&memory, 8);
        assert!(is_all(&memory, 0..SIZE, 8), "shared: {shared}");
        drop((memory, file));
        pages.add(SIZE / (2 * MIB));
    }
}

#[test]
fn half_of_a_mapped_memory_withheld_page_by_page_is_given_back() {
    let file = file_of(2 * SIZE, 7);
    let config = MemoryConfig { dump: false, ..config(2 * SIZE) };
    let memory = image::map(&config, &file, &[]).unwrap();
    // One half is a private copy, the other the file's.
    for at in (0..2 * SIZE).step_by(2 * MIB as usize) {
        image::write(&memory, at, &vec![8; MIB as usize]).unwrap();
        assert_eq!(byte(&memory, at + MIB), 7);
        is_all(&memory, at..at + 2 * MIB, 7);
    }
    let before = resident(&memory);
    assert!(before >= 2 * SIZE, "{before}");
    let reclaimer = Reclaimer::new(&memory, &config, Origin::Mapped);
    let withheld = SIZE / 2..SIZE / 2 + SIZE;
    for page in (withheld.start / PAGE_SIZE..withheld.end / PAGE_SIZE).rev() {
        reclaimer.withhold(GuestAddress(page * PAGE_SIZE), PAGE_SIZE);
    }
    let given = before - resident(&memory);
    assert!(given >= SIZE / 100 * 95, "{given} bytes of {SIZE} given back");
    assert_eq!(reclaimer.counts(), Counts { taken: SIZE, refused: 0 });
    assert!(is_all(&memory, withheld.clone(), 0));
    assert_eq!((byte(&memory, withheld.start - 1), byte(&memory, withheld.end)), (7, 8));

    // The replacement is excluded from core dumps and uses huge pages, as the rest does.
    let list = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let first = memory.iter().next().unwrap().as_ptr().addr() as u64;
    let mut flags = Vec::new();
    let mut inside = false;
    for line in list.lines() {
        if let Some(Ok(start)) = line.split_once('-').map(|(s, _)| u64::from_str_radix(s, 16)) {
            inside = (first..first + 2 * SIZE).contains(&start);
        } else if let Some(of) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            flags.push(of.to_owned());
        }
    }
    assert!(flags.len() <= 4, "{flags:?}");
    for of in flags {
        let has = |flag: &str| of.split_ascii_whitespace().any(|f| f == flag);
        assert!(has("dd") && (has("hg") || has("nh")), "{of}");
    }
}

#[test]
fn a_page_that_is_used_again_keeps_its_unit() {
    let memory = image::map(&config(SIZE), &file_of(SIZE, 7), &[]).unwrap();
    let reclaimer = Reclaimer::new(&memory, &config(SIZE), Origin::Mapped);
    let page = |n: u64| GuestAddress(4 * MIB + n * PAGE_SIZE);
    (0..15).for_each(|n| reclaimer.withhold(page(n), PAGE_SIZE));
    // One byte of the page suffices.
    reclaimer.release(GuestAddress(page(3).0 + 17), 1);
    image::write(&memory, page(3).0, &[9]).unwrap();
    reclaimer.withhold(page(15), PAGE_SIZE);
    assert_eq!((byte(&memory, page(3).0), byte(&memory, page(15).0)), (9, 7));
    // Pages that were only discarded may be used again without a release.
    (0..16).for_each(|n| reclaimer.discard(page(n), PAGE_SIZE));
    assert_eq!(byte(&memory, page(3).0), 9);
    // The device was reset: no page is withheld.
    reclaimer.release_all();
    reclaimer.withhold(page(3), PAGE_SIZE);
    assert_eq!(byte(&memory, page(3).0), 9);
    (0..16).for_each(|n| reclaimer.withhold(page(n), PAGE_SIZE));
    assert!(is_all(&memory, page(0).0..page(16).0, 0));
    // By now it is memory that is given back page by page.
    image::write(&memory, page(0).0, &[9; 16 * PAGE_SIZE as usize]).unwrap();
    reclaimer.discard(page(5), PAGE_SIZE);
    assert_eq!([4, 5, 6].map(|n| byte(&memory, page(n).0)), [9, 0, 9]);
}

/// Number of anonymous mappings in `memory`.
fn anonymous_mappings(memory: &Memory) -> usize {
    let list = std::fs::read_to_string("/proc/self/maps").unwrap();
    let is_ours = |line: &&str| {
        let start = line.split_once('-').and_then(|(s, _)| u64::from_str_radix(s, 16).ok());
        let inside = |r: &Region| {
            let first = r.as_ptr().addr() as u64;
            (first..first + r.len()).contains(&start.unwrap())
        };
        line.split_ascii_whitespace().nth(4) == Some("0") && memory.iter().any(inside)
    };
    list.lines().filter(is_ours).count()
}

#[test]
fn a_guest_cannot_use_up_the_mappings_of_the_process() {
    let size = 1024 * MIB;
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let memory = image::map(&config(size), &file, &[]).unwrap();
    let reclaimer = Reclaimer::new(&memory, &config(size), Origin::Mapped);
    let unit = |n: u64| GuestAddress(n * MAPPED_UNIT);
    let every_other = |from: u64| (from..size / MAPPED_UNIT).step_by(2);
    for n in every_other(0) {
        image::write(&memory, unit(n).0, &[9]).unwrap();
        reclaimer.discard(unit(n), MAPPED_UNIT);
    }
    // 8,192 were requested.
    let taken = MAX_PIECES as u64 * MAPPED_UNIT;
    assert_eq!(reclaimer.counts().taken, taken);
    assert_eq!(reclaimer.counts().refused, taken);
    let (last, first) = (unit(2 * MAX_PIECES as u64 - 2), unit(2 * MAX_PIECES as u64));
    assert_eq!((byte(&memory, last.0), byte(&memory, first.0)), (0, 9));
    assert!(!dirty(&memory).iter().any(|r| r.contains(&(first.0 + PAGE_SIZE))));
    assert!(anonymous_mappings(&memory) <= MAX_PIECES + 1);

    // A range that adds no piece is taken; touched on both sides before, it does not merge them.
    for n in every_other(0) {
        image::write(&memory, unit(n).0, &[9]).unwrap();
    }
    for n in every_other(1) {
        reclaimer.discard(unit(n), MAPPED_UNIT);
        image::write(&memory, unit(n).0, &[9]).unwrap();
    }
    assert!(reclaimer.counts().taken > taken);
    let most = MAX_PIECES + 1024 + 1;
    assert!(anonymous_mappings(&memory) <= most, "{}", anonymous_mappings(&memory));
    for n in every_other(0) {
        reclaimer.discard(unit(n), MAPPED_UNIT);
    }
    assert!(anonymous_mappings(&memory) <= most, "{}", anonymous_mappings(&memory));
    // A reset merges all pieces into one.
    clear(&memory, &config(size)).unwrap();
    reclaimer.note_cleared();
    let refused = reclaimer.counts().refused;
    reclaimer.discard(unit(0), size);
    assert_eq!(reclaimer.counts().refused, refused);
}

#[test]
fn saves_have_what_was_given_back_and_not_what_the_file_has() {
    let base = file_of(SIZE, 7);
    let memory = image::map(&config(SIZE), &base, &[]).unwrap();
    let reclaimer = Reclaimer::new(&memory, &config(SIZE), Origin::Mapped);
    image::forget_dirty(&memory);
    reclaimer.discard(GuestAddress(4 * MIB), 4 * MIB);
    // A full save, or a stream: the used pages are copied.
    let copy = |ranges: &[Range<u64>]| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        for range in ranges {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            image::read(&memory, range.start, &mut bytes).unwrap();
            file.write_all_at(&bytes, range.start).unwrap();
        }
        file
    };
    let whole = copy(&image::used(&memory, &[]).unwrap());
    let whole = image::map(&config(SIZE), &whole, &[]).unwrap();
    // An incremental save: the dirty pages are overlaid on the base.
    let written = dirty(&memory);
    let changed = copy(&written);
    let overlays: Vec<_> = written.iter().map(|range| (range.clone(), &changed)).collect();
    let layered = image::map(&config(SIZE), &base, &overlays).unwrap();
    for restored in [whole, layered] {
        assert!(is_all(&restored, 4 * MIB..8 * MIB, 0));
        assert!(is_all(&restored, 8 * MIB..SIZE, 7));
        // Also in the restored machine.
        let reclaimer = Reclaimer::new(&restored, &config(SIZE), Origin::Mapped);
        reclaimer.discard(GuestAddress(6 * MIB), 4 * MIB);
        assert!(is_all(&restored, 4 * MIB..10 * MIB, 0));
        assert!(is_all(&restored, 10 * MIB..SIZE, 7));
    }
}

fn missing(config: &MemoryConfig, ranges: &[Range<u64>]) -> Option<(Memory, Arc<fault::Filler>)> {
    // If the host does not permit it, another test checks the message.
    let (memory, filler) = fault::allocate_missing(config, ranges).ok()?;
    Some((memory, Arc::new(filler)))
}

#[test]
fn memory_that_is_filled_when_touched_stays_zero_whether_it_was_filled_or_not() {
    // On both sides of the boundary of the huge page advice, which splits mappings.
    let ranges = [MIB..6 * MIB, 7 * MIB..12 * MIB];
    let Some((memory, filler)) = missing(&config(SIZE), &ranges) else { return };
    let origin = Origin::Missing(ranges.to_vec(), Arc::downgrade(&filler));
    let reclaimer = Reclaimer::new(&memory, &config(SIZE), origin);
    let full = vec![7; MIB as usize];
    filler.fill(4 * MIB, &full).unwrap();
    image::write(&memory, 6 * MIB + 5, &[9]).unwrap();
    image::forget_dirty(&memory);
    let range = MIB / 2..9 * MIB;
    reclaimer.discard(GuestAddress(range.start), range.end - range.start);
    assert_eq!(dirty(&memory), std::slice::from_ref(&range));
    assert!(is_all(&memory, range.clone(), 0), "it does not wait for anything");
    assert_eq!(filler.fault().unwrap(), None);
    for at in [1, 2, 3, 5, 8, 9, 10, 11].map(|mib| mib * MIB) {
        filler.fill(at, &full).unwrap();
    }
    assert!(is_all(&memory, range.clone(), 0), "it is not filled later");
    assert!(is_all(&memory, 9 * MIB..12 * MIB, 7));
    image::write(&memory, 4 * MIB, &full).unwrap();
    reclaimer.discard(GuestAddress(4 * MIB + PAGE_SIZE), PAGE_SIZE);
    let bytes = [0, 1, 2].map(|page| byte(&memory, 4 * MIB + page * PAGE_SIZE));
    assert_eq!(bytes, [7, 0, 7], "it is memory like any other");
    // All missing memory was filled.
    drop(filler);
    reclaimer.discard(GuestAddress(4 * MIB), 6 * MIB);
    assert!(is_all(&memory, 4 * MIB..10 * MIB, 0));
    assert_eq!(reclaimer.counts().refused, 0);
}

#[test]
fn memory_that_is_being_filled_meanwhile_stays_zero() {
    let whole = 0..SIZE;
    for round in 0..20 {
        let Some((memory, filler)) = missing(&config(SIZE), std::slice::from_ref(&whole)) else {
            return;
        };
        let origin = Origin::Missing(vec![whole.clone()], Arc::downgrade(&filler));
        let reclaimer = Reclaimer::new(&memory, &config(SIZE), origin);
        let filling = thread::spawn(move || {
            // Dropped when all is filled.
            let filler = filler;
            let block = vec![7; MIB as usize / 2];
            for at in (0..SIZE).step_by(block.len()) {
                filler.fill(at, &block).unwrap();
            }
        });
        let step = [PAGE_SIZE, MIB / 4, 5 * MIB][round % 3];
        for at in (0..12 * MIB).step_by(step as usize) {
            reclaimer.discard(GuestAddress(at), step.min(12 * MIB - at));
        }
        filling.join().unwrap();
        assert!(is_all(&memory, 0..12 * MIB, 0));
        assert!(is_all(&memory, 12 * MIB..SIZE, 7));
        assert_eq!(reclaimer.counts(), Counts { taken: 12 * MIB, refused: 0 });
    }
}

#[test]
fn a_reset_while_memory_is_filled_leaves_plain_memory() {
    let whole = 0..SIZE;
    let Some((memory, filler)) = missing(&config(SIZE), std::slice::from_ref(&whole)) else {
        return;
    };
    let origin = Origin::Missing(vec![whole.clone()], Arc::downgrade(&filler));
    let reclaimer = Reclaimer::new(&memory, &config(SIZE), origin);
    reclaimer.discard(GuestAddress(0), MIB);
    clear(&memory, &config(SIZE)).unwrap();
    reclaimer.note_cleared();
    fill(&memory, 7);
    reclaimer.discard(GuestAddress(MIB), MIB);
    filler.fill(MIB, &vec![8; MIB as usize]).unwrap();
    assert!(is_all(&memory, MIB..2 * MIB, 0));
    assert!(is_all(&memory, 2 * MIB..SIZE, 7));
}

#[test]
fn the_filler_itself_takes_ranges_that_a_reset_has_replaced() {
    let whole = 0..SIZE;
    let Some((memory, filler)) = missing(&config(SIZE), std::slice::from_ref(&whole)) else {
        return;
    };
    clear(&memory, &config(SIZE)).unwrap();
    fill(&memory, 7);
    filler.discard(&(MIB..4 * MIB)).unwrap();
    assert!(is_all(&memory, MIB..4 * MIB, 0));
    assert!(filler.discard(&(SIZE..SIZE + MIB)).is_err());
}
