use replication::Pair;
use tempfile::TempDir;

use super::*;

const GUEST: Lineage = Lineage(7);

fn bond(term: u64) -> Bond {
    let pair = Pair { primary: Incarnation(1), backup: Incarnation(2) };
    Bond { term: Term(term), pair, side: Side::Backup }
}

/// Images with these words.
fn images(words: &[Option<Mark>], arbiter: &str) -> (TempDir, Images) {
    let dir = TempDir::new().unwrap();
    let mut paths = Vec::new();
    for (n, word) in words.iter().enumerate() {
        let path = dir.path().join(format!("{n}.img"));
        std::fs::write(&path, "").unwrap();
        if let Some(mark) = *word {
            let entry = Entry { lineage: GUEST, mark, arbiter: arbiter.into() };
            Sidecar::beside(&path).unwrap().update(|_| Some(entry)).unwrap();
        }
        paths.push(path);
    }
    let images = Images::read(paths.iter().map(PathBuf::as_path)).unwrap();
    (dir, images)
}

fn refused(images: &Images) -> (Denial, String) {
    let error = images.permission().unwrap_err();
    let text = error.to_string();
    match error {
        ImagesError::Refused { denial, .. } => (denial, text),
        other => panic!("{other}"),
    }
}

#[test]
fn every_word_allows_what_it_says() {
    let term = Term(5);
    let run = |term, promoted| Permission::Run { term: Term(term), promoted };
    assert_eq!(images(&[], "").1.permission().unwrap(), Permission::Unbound);
    assert_eq!(images(&[None], "").1.permission().unwrap(), Permission::Unbound);
    for arbiter in ["", "dir:/shared"] {
        let with = |mark| images(&[Some(mark)], arbiter);
        assert_eq!(with(Mark::Free { term }).1.permission().unwrap(), run(5, None));
        let promoted = Some(Incarnation(2));
        let running = Mark::Running { term, promoted };
        assert_eq!(with(running).1.permission().unwrap(), run(5, promoted));
        for (mark, denial) in [
            (Mark::Outdated { term }, Denial::Outdated),
            (Mark::Fenced { term }, Denial::Outdated),
            (Mark::Inconsistent { term }, Denial::Inconsistent),
        ] {
            let (dir, images) = with(mark);
            let (found, text) = refused(&images);
            assert_eq!(found, denial);
            let path = dir.path().join("0.img");
            assert!(text.starts_with(&path.display().to_string()), "{text}");
            assert!(text.contains("lineage 00000000000000000000000000000007, term 5"), "{text}");
            let forced = images.permission_by_force();
            match denial {
                Denial::Inconsistent => assert!(forced.is_err(), "not even by force"),
                _ => assert_eq!(forced.unwrap(), run(6, None)),
            }
        }
        for mark in [Mark::Protected(bond(5)), Mark::Fencing(bond(5))] {
            let (_dir, images) = with(mark);
            match arbiter {
                "" => assert_eq!(refused(&images).0, Denial::NoArbiter),
                _ => {
                    let Permission::Claim(entry) = images.permission().unwrap() else { panic!() };
                    assert_eq!((entry.mark, &*entry.arbiter), (mark, arbiter));
                    let text = images.check().unwrap_err().to_string();
                    assert!(
                        text.contains("dir:/shared") && text.contains("0.img.sidecar"),
                        "{text}"
                    );
                }
            }
            assert_eq!(images.permission_by_force().unwrap(), run(6, None));
        }
    }
}

#[test]
fn of_several_images_the_strictest_word_counts() {
    let free = Some(Mark::Free { term: Term(9) });
    let order = [
        Mark::Running { term: Term(8), promoted: None },
        Mark::Protected(bond(7)),
        Mark::Outdated { term: Term(6) },
        Mark::Inconsistent { term: Term(5) },
    ];
    for (n, mark) in order.into_iter().enumerate() {
        let weaker = order.get(n.saturating_sub(1)).copied();
        let (dir, images) = images(&[free, None, weaker, Some(mark), free], "");
        let (path, entry) = images.strictest().unwrap();
        assert_eq!(entry.mark, mark);
        assert!(n == 0 || path.path == dir.path().join("3.img"));
    }
}

#[test]
fn all_images_get_a_word() {
    let (dir, images) = images(&[None, Some(Mark::Free { term: Term(1) })], "");
    let read = |n: u8| {
        let path = dir.path().join(format!("{n}.img"));
        Sidecar::beside(&path).unwrap().read().unwrap()
    };
    images.mark(Mark::Outdated { term: Term(2) }).unwrap();
    assert_eq!(read(0), None);
    assert_eq!(read(1).unwrap().mark, Mark::Outdated { term: Term(2) });
    let mark = Mark::Protected(bond(3));
    let entry = Entry { lineage: GUEST, mark, arbiter: "fence:x".into() };
    images.bind(&entry).unwrap();
    assert_eq!((read(0), read(1)), (Some(entry.clone()), Some(entry)));
}

#[test]
fn of_two_fences_the_primarys_wins() {
    for (side, primary_first) in
        [(Side::Primary, true), (Side::Primary, false), (Side::Backup, true), (Side::Backup, false)]
    {
        let own = Bond { side, ..bond(5) };
        let protected = Some(Mark::Protected(own));
        let (_dir, images) = images(&[protected, None, protected], "fence:x");
        let marks = || -> Vec<Mark> {
            let entries = images.images.iter().filter_map(|i| i.sidecar.read().unwrap());
            entries.map(|entry| entry.mark).collect()
        };
        if primary_first {
            assert!(images.fencing(own).unwrap());
            assert_eq!(marks(), [Mark::Fencing(own); 2]);
            // A backup obeys although it has begun.
            let obeys = side == Side::Backup;
            assert_eq!(images.fenced(Term(5)).unwrap(), obeys);
            let expected = if obeys { Mark::Fenced { term: Term(5) } } else { Mark::Fencing(own) };
            assert_eq!(marks(), [expected; 2]);
            assert!(images.fenced(Term(6)).unwrap(), "of another term");
        } else {
            assert!(images.fenced(Term(5)).unwrap());
            assert!(!images.fencing(own).unwrap());
            assert_eq!(marks(), [Mark::Fenced { term: Term(5) }; 2]);
            assert!(images.fencing(Bond { term: Term(6), ..own }).unwrap());
        }
    }
}

#[test]
fn images_of_two_guests_are_refused() {
    let (dir, _) = images(&[None, Some(Mark::Free { term: Term(1) }), None], "");
    let path = |n: u8| dir.path().join(format!("{n}.img"));
    let mark = Mark::Free { term: Term(1) };
    let entry = Entry { lineage: Lineage(8), mark, arbiter: String::new() };
    Sidecar::beside(&path(2)).unwrap().update(|_| Some(entry)).unwrap();
    let all: Vec<_> = (0..3).map(path).collect();
    let error = Images::read(all.iter().map(PathBuf::as_path)).unwrap_err().to_string();
    assert!(error.contains("1.img") && error.contains("2.img"), "{error}");
}
