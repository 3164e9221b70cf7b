//! The guest has a disk: what it was told to be on it is there after a failover.
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stories::agent::Story;
use stories::lab::hosts::{Hosts, Side};
use stories::monitor::{BOOT, SOON};
use stories::replicated::client::{Client, records_in};
use stories::replicated::pair::{Machine, Pair, Protection};
use stories::replicated::recorder::Recorder;

/// From one checkpoint to the next, and without a byte from the primary until it is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(400) };
/// Bytes of the disk.
const DISK: usize = 24 << 20;

/// kill -9 of the primary while the guest writes and flushes; then the other way around, with the
/// image that was left behind as the backup's.
pub fn nothing_is_lost(story: &Story) -> Result<()> {
    let hosts = Hosts::new(&story.debian, 1)?;
    // Something in all of its pieces, so that the images differ where nothing is copied.
    let contents: Vec<u8> = (0..DISK).map(|at| (at >> 9) as u8 | 1).collect();
    let pair = Pair::new(&hosts, &story.paths, &story.dir)?;
    let mut pair = pair.with_disk(Side::Left, &contents)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, BOOT)?;
    // Not so fast that the disk is full before the guest is protected.
    let recorder = Recorder::start(&hosts.outside, Duration::from_millis(3))?;
    recorder.wait(20, SOON)?;

    for _ in 0..2 {
        let backup = pair.protect(&mut primary, PROTECTION)?;
        recorder.wait(20, SOON)?;
        let side = primary.side;
        let failover = Pair::kill(primary, &backup, SOON)?;
        recorder.wait(20, SOON)?;
        let acknowledged = recorder.acknowledged();
        let found = client.check_records(SOON)?;
        ensure!(found >= acknowledged, "{found} records of {acknowledged}");
        println!("{acknowledged} records; lost {side:?}; {failover:?}");
        primary = backup;
    }

    let backup = pair.protect(&mut primary, PROTECTION)?;
    let acknowledged = recorder.finish();
    // The guest is idle now, and both images are the same once the last checkpoint is applied.
    let image = |side| Ok::<_, anyhow::Error>(fs::read(pair.image(side).context("no image")?)?);
    let same = || -> Result<bool> { Ok(image(Side::Left)? == image(Side::Right)?) };
    let deadline = Instant::now() + SOON;
    while !same()? {
        ensure!(Instant::now() < deadline, "the images differ");
        sleep(Duration::from_millis(50));
    }
    ensure!(records_in(&image(backup.side)?) >= acknowledged);
    drop::<Machine>(backup);
    Ok(())
}
