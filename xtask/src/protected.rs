//! `cargo demo -- --remus`: a guest that a client counts with is protected by a second monitor; its
//! own is killed, and the client counts on.
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stories::debian::Debian;
use stories::lab::hosts::{Hosts, Side};
use stories::monitor::SOON;
use stories::paths::Paths;
use stories::replicated::counter::{Counter, Manner};
use stories::replicated::pair::{Failover, Pair, Protection};

/// Milliseconds between two checkpoints, and without a sign of life until the primary is suspected.
const PROTECTION: Protection =
    Protection { interval: Duration::from_millis(25), timeout: Duration::from_millis(200) };
/// Numbers that are waited for before and after the failover.
const NUMBERS: usize = 100;
/// How long a failover may take in an emulated host.
const LIMIT: Duration = Duration::from_secs(60);

/// Shows it.
///
/// # Errors
/// The guest is not protected, or does not go on.
pub fn show(paths: &Paths, debian: &Debian) -> Result<()> {
    let dir = paths.fresh_scratch("demo-remus")?;
    // What is random on its lines is not used here.
    let hosts = Hosts::new(debian, 0)?;
    let mut pair = Pair::new(&hosts, paths, &dir)?;

    heading("A guest at the left host, and a client that counts with it over TCP");
    let mut primary = pair.boot(Side::Left)?;
    println!("  monitor {}: running", primary.monitor.pid());
    let counter = Counter::start(&hosts.outside, Manner::default())?;
    counter.wait(NUMBERS, SOON)?;
    println!("  the client has counted to {}", counter.last());

    heading("A backup at the right host");
    println!("  stratovirt -incoming replicate:tcp:HOST:PORT,witness=ID,tls=DIR");
    println!("  {{\"execute\":\"replication-start\", ...}} to the first monitor:");
    println!(
        "    a checkpoint every {:?}; without a sign of life, suspected after {:?}",
        PROTECTION.interval, PROTECTION.timeout
    );
    let began = Instant::now();
    let backup = pair.protect(&mut primary, PROTECTION)?;
    println!("  monitor {}: protected after {:.0?}", primary.monitor.pid(), began.elapsed());
    counter.wait(NUMBERS, SOON)?;
    println!("  the client has counted to {}", counter.last());

    heading(&format!("kill -9 {}", primary.monitor.pid()));
    let before = counter.last();
    let killed = Instant::now();
    let failover = Pair::kill(primary, &backup, LIMIT)?;
    println!("  monitor {}: runs the guest", backup.monitor.pid());
    counter.wait(NUMBERS, LIMIT)?;
    println!("  the client has counted from {before} to {}", counter.last());

    let report = counter.finish()?;
    ensure!(report.reconnections == 0, "the client's connection did not survive");
    println!("\n{}", table(&failover, report.longest_gap(killed)));
    println!(
        "{} numbers in all, none lost and none given twice, over one TCP connection.",
        report.steps.len()
    );
    Ok(())
}

/// How long everything took.
fn table(failover: &Failover, gap: Duration) -> String {
    let rows = [
        ("detect", failover.detect, "from the last sign of life to the suspicion"),
        ("decide", failover.decide, "until the witness has granted the term"),
        ("apply", failover.apply, "of that: building the machine from the checkpoint"),
        ("run", failover.run, "from the decision to the guest's first step"),
        ("gap", gap, "without an answer for the client, with TCP's wait"),
    ];
    let row = |(name, time, what): (&str, Duration, &str)| {
        format!("  {name:<7}{:>8.1} ms  {what}\n", time.as_secs_f64() * 1e3)
    };
    rows.into_iter().map(row).collect()
}

fn heading(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_each_part_in_milliseconds() {
        let ms = Duration::from_millis;
        let failover =
            Failover { detect: ms(1), decide: ms(2), apply: ms(3), run: ms(4), all: ms(9) };
        let table = table(&failover, ms(1234));
        for (name, time) in [
            ("detect", "1.0"),
            ("decide", "2.0"),
            ("apply", "3.0"),
            ("run", "4.0"),
            ("gap", "1234.0"),
        ] {
            let row = table.lines().find(|row| row.split_whitespace().next() == Some(name));
            assert_eq!(row.and_then(|row| row.split_whitespace().nth(1)), Some(time), "{table}");
        }
    }
}
