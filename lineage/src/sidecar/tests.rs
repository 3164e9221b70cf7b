use tempfile::TempDir;

use super::*;

fn words() -> Vec<Mark> {
    let term = Term(u64::MAX - 1);
    let pair = Pair { primary: Incarnation(u128::MAX), backup: Incarnation(2) };
    let bonds = [Side::Primary, Side::Backup].map(|side| Bond { term, pair, side });
    let mut words = vec![
        Mark::Free { term },
        Mark::Fenced { term },
        Mark::Running { term, promoted: None },
        Mark::Running { term, promoted: Some(Incarnation(0)) },
        Mark::Running { term, promoted: Some(Incarnation(9 << 100)) },
        Mark::Outdated { term },
        Mark::Inconsistent { term: Term(0) },
    ];
    words.extend(bonds.map(Mark::Protected));
    words.extend(bonds.map(Mark::Fencing));
    words
}

fn entry(mark: Mark) -> Entry {
    Entry { lineage: Lineage(u128::MAX / 3), mark, arbiter: "etcd:https://a:2379".into() }
}

fn sidecar(dir: &TempDir) -> Sidecar {
    let image = dir.path().join("disk.img");
    fs::write(&image, "").unwrap();
    Sidecar::beside(&image).unwrap()
}

#[test]
fn every_word_is_read_as_it_was_written() {
    let dir = TempDir::new().unwrap();
    let sidecar = sidecar(&dir);
    assert_eq!(sidecar.read().unwrap(), None);
    assert!(sidecar.mark(Mark::Free { term: Term(1) }).is_err(), "of which guest?");
    for mark in words() {
        let written = sidecar.update(|_| Some(entry(mark))).unwrap();
        assert_eq!(written, Some(entry(mark)));
        assert_eq!(sidecar.read().unwrap(), Some(entry(mark)));
        assert_eq!(Sidecar::at(sidecar.path()).update(|_| None).unwrap(), Some(entry(mark)));
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    sidecar.mark(Mark::Outdated { term: Term(3) }).unwrap();
    assert_eq!(sidecar.read().unwrap(), Some(entry(Mark::Outdated { term: Term(3) })));
}

#[test]
fn a_decision_sees_the_last_word() {
    let dir = TempDir::new().unwrap();
    let sidecar = sidecar(&dir);
    sidecar.update(|_| Some(entry(Mark::Free { term: Term(0) }))).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let next = |last: Option<&Entry>| {
                        let Some(Entry { mark: Mark::Free { term }, .. }) = last else { panic!() };
                        Some(entry(Mark::Free { term: term.next() }))
                    };
                    sidecar.update(next).unwrap();
                }
            });
        }
    });
    assert_eq!(sidecar.read().unwrap(), Some(entry(Mark::Free { term: Term(80) })));
}

/// What a file may contain when the power fails while `to` is written over `from`: in the sector that
/// is being written, a part of either or something else.
fn mixtures(from: &[u8], to: &[u8]) -> Vec<Vec<u8>> {
    let first = from.iter().zip(to).position(|(a, b)| a != b).unwrap();
    let sector = first / SLOT * SLOT;
    assert_eq!(from[..sector], to[..sector]);
    assert_eq!(from[sector + SLOT..], to[sector + SLOT..], "one sector is written");
    let mut mixtures = Vec::new();
    for cut in (0..=SLOT).step_by(16) {
        let mut front = from.to_vec();
        front[sector..sector + cut].copy_from_slice(&to[sector..sector + cut]);
        let mut back = to.to_vec();
        back[sector..sector + cut].copy_from_slice(&from[sector..sector + cut]);
        mixtures.extend([front, back]);
    }
    for byte in [0, 0xff, 0x5a] {
        let mut lost = to.to_vec();
        lost[sector..sector + SLOT].fill(byte);
        mixtures.push(lost);
    }
    mixtures
}

#[test]
fn a_power_cut_during_a_write_leaves_one_word_or_the_other() {
    let dir = TempDir::new().unwrap();
    let sidecar = sidecar(&dir);
    let words = words();
    sidecar.update(|_| Some(entry(words[0]))).unwrap();
    let (mut old, mut new) = (0, 0);
    for pair in words.windows(2) {
        let before = fs::read(sidecar.path()).unwrap();
        sidecar.mark(pair[1]).unwrap();
        let after = fs::read(sidecar.path()).unwrap();
        for torn in mixtures(&before, &after) {
            fs::write(sidecar.path(), &torn).unwrap();
            match sidecar.read().unwrap().unwrap().mark {
                mark if mark == pair[0] => old += 1,
                mark if mark == pair[1] => new += 1,
                mark => panic!("{mark:?} was never written"),
            }
            // The next word is written over the torn slot.
            sidecar.mark(pair[1]).unwrap();
            assert_eq!(sidecar.read().unwrap(), Some(entry(pair[1])));
        }
        fs::write(sidecar.path(), &after).unwrap();
    }
    assert!(old > 100 && new > 10, "{old} {new}");
}

#[test]
fn a_sidecar_without_a_whole_slot_allows_nothing() {
    let dir = TempDir::new().unwrap();
    let sidecar = sidecar(&dir);
    sidecar.update(|_| Some(entry(Mark::Free { term: Term(1) }))).unwrap();
    let good = fs::read(sidecar.path()).unwrap();
    for at in 0..SLOT {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(sidecar.path(), &bad).unwrap();
        assert!(matches!(sidecar.read(), Err(SidecarError::Damaged { .. })), "byte {at}");
        assert!(sidecar.mark(Mark::Free { term: Term(1) }).is_err());
    }
    for length in [0, 1, 511] {
        fs::write(sidecar.path(), &good[..length]).unwrap();
        assert!(matches!(sidecar.read(), Err(SidecarError::Damaged { .. })), "{length} bytes");
    }
    // A valid checksum of something that is never written.
    for (at, value) in [(32, 0), (32, 8), (33, 1), (34, 1), (64, 1), (300, 1), (37, 2)] {
        let mut bad = good.clone();
        bad[at] = value;
        let crc = crc32fast::hash(&bad[..CRC]);
        bad[CRC..SLOT].copy_from_slice(&crc.to_le_bytes());
        fs::write(sidecar.path(), &bad).unwrap();
        assert!(matches!(sidecar.read(), Err(SidecarError::Damaged { .. })), "{at}: {value}");
    }
}

#[test]
fn it_lies_beside_the_image_itself() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, "").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let sidecar = Sidecar::beside(&link).unwrap();
    assert_eq!(sidecar, Sidecar::beside(&image).unwrap());
    assert!(sidecar.path().ends_with("disk.img.sidecar"));
    assert!(Sidecar::beside(&dir.path().join("none")).is_err());
    let long = Entry { arbiter: "x".repeat(ARBITER_LIMIT + 1), ..entry(words()[0]) };
    assert!(matches!(sidecar.update(|_| Some(long)), Err(SidecarError::Arbiter(_))));
    let longest = Entry { arbiter: "x".repeat(ARBITER_LIMIT), ..entry(words()[0]) };
    sidecar.update(|_| Some(longest.clone())).unwrap();
    assert_eq!(sidecar.read().unwrap(), Some(longest));
}
