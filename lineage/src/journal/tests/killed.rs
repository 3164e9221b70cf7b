//! A real process that is killed at any moment, and its files.
use std::{
    env,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use super::*;

/// The directory of the process that is to be killed.
const DIRECTORY: &str = "LINEAGE_TEST_DIRECTORY";
const BLOCKS: u64 = 64;
const BLOCK: u64 = 4096;

/// Every byte of the image at the end of `epoch`: block `n` holds the last epoch that wrote it, and
/// epoch `e` writes blocks `e`, `e + 1` and `e + 2`.
fn expected(epoch: u64) -> Vec<u8> {
    let mut bytes = vec![0; (BLOCKS * BLOCK) as usize];
    for e in 1..=epoch {
        for n in e..e + 3 {
            let at = (n % BLOCKS * BLOCK) as usize;
            bytes[at..at + BLOCK as usize].fill(e as u8);
        }
    }
    bytes
}

fn open_image(dir: &Path) -> File {
    File::options().read(true).write(true).open(dir.join("image")).unwrap()
}

/// The process: a backup whose epochs come without a pause. It prints each one that it would
/// acknowledge. Without the variable, as in an ordinary run of all tests, there is nothing to do.
#[test]
fn process() {
    let Some(dir) = env::var_os(DIRECTORY) else { return };
    let dir = Path::new(&dir);
    let images = [open_image(dir)];
    let mut journal = JournalFile::open(&dir.join("journal"), GUEST, Term(1)).unwrap();
    let first = journal.settle(&images).unwrap().epoch.0 + 1;
    for epoch in first.. {
        let data = [epoch as u8; BLOCK as usize];
        let offset = |n: u64| n % BLOCKS * BLOCK;
        let changes = (epoch..epoch + 3).map(|n| write(offset(n), &data));
        match journal.append(Epoch(epoch), changes) {
            Err(JournalError::Full { .. }) => {
                journal.settle(&images).unwrap();
            }
            other => other.unwrap(),
        }
        if journal.order().last() != Epoch(epoch) {
            let changes = (epoch..epoch + 3).map(|n| write(offset(n), &data));
            journal.append(Epoch(epoch), changes).unwrap();
        }
        if epoch % 2 == 0 {
            journal.sync().unwrap();
            println!("acknowledged {epoch}");
            journal.apply(&images).unwrap();
        }
        if epoch % 7 == 0 {
            journal.sync_images(&images).unwrap();
            journal.trim().unwrap();
        }
    }
}

#[test]
fn a_process_that_is_killed_at_any_moment_leaves_one_epoch() {
    let dir = TempDir::new().unwrap();
    File::create(dir.path().join("image")).unwrap().set_len(BLOCKS * BLOCK).unwrap();
    let place = Place { term: Term(1), epoch: Epoch(0) };
    drop(JournalFile::create(&dir.path().join("journal"), GUEST, place, 100_000).unwrap());
    let mut rng = fastrand::Rng::with_seed(4);
    let (mut last, mut replayed) = (0, 0);
    for _ in 0..30 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "journal::tests::killed::process"])
            .env(DIRECTORY, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut left = rng.usize(1..60);
        for line in lines.map_while(Result::ok) {
            let Some(epoch) = line.split("acknowledged ").nth(1) else { continue };
            last = epoch.parse().unwrap();
            left = left.saturating_sub(1);
            if left == 0 {
                // SIGKILL; what it has printed by then is read, too.
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        let images = [open_image(dir.path())];
        let path = dir.path().join("journal");
        let mut journal = JournalFile::open(&path, GUEST, place.term).unwrap();
        replayed += u32::from(journal.used() > 0);
        let epoch = journal.settle(&images).unwrap().epoch.0;
        assert!(epoch >= last, "{epoch}, though {last} was acknowledged");
        let mut bytes = vec![0; (BLOCKS * BLOCK) as usize];
        images[0].read_at(0, &mut bytes).unwrap();
        assert!(bytes == expected(epoch), "epoch {epoch}");
        last = epoch;
    }
    assert!(last > 100 && replayed > 10, "{last} epochs, {replayed} replays");
}
