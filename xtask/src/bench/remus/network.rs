//! Two hosts, joined as the stories join them, and a client outside: how much later the answer to a
//! lone request comes, and how long the guest is away when its host is lost.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stories::debian::Debian;
use stories::lab::hosts::{Hosts, Side};
use stories::monitor::SOON;
use stories::replicated::client::Client;
use stories::replicated::pair::{ADAPTS, Pair, Protection};

use super::Manner;
use crate::bench::measure::send;
use crate::bench::rig::Rig;
use crate::bench::{Message, Metric, Scenario};

/// Lone requests in each manner in each turn.
const REQUESTS: u64 = 25;
const PROTECTION: Protection = Protection { interval: ADAPTS, timeout: Duration::from_millis(200) };
/// How long a failover may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Measures, in `turns` turns: at the end of each the guest changes its host.
///
/// # Errors
/// The guest is not protected, does not go on, or has lost what it had acknowledged.
pub fn measure(rig: &Rig, debian: &Debian, turns: usize) -> Result<()> {
    let dir = rig.dir.join("hosts");
    std::fs::create_dir_all(&dir)?;
    let hosts = Hosts::new(debian, 1)?;
    let mut pair = Pair::new(&hosts, &rig.paths, &dir)?;
    let mut primary = pair.boot(Side::Left)?;
    let mut client = Client::connect(&hosts, SOON)?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut last = 0;
    let sample = |manner: Manner, metric, time: Duration| {
        send(&Message::Sample {
            scenario: Scenario::RemusHosts,
            metric,
            monitor: manner.name().to_owned(),
            value: time.as_secs_f64() * 1e3,
        })
    };
    for _ in 0..turns {
        let mut backup = None;
        for manner in [Manner::Nothing, Manner::Backup] {
            rig.interrupt.check()?;
            send(&Message::Step(format!("{}: {}", Scenario::RemusHosts.title(), manner.name())))?;
            if manner == Manner::Backup {
                backup = Some(pair.protect(&mut primary, PROTECTION)?);
            }
            for _ in 0..REQUESTS {
                thread::sleep(Duration::from_millis(random.u64(60..140)));
                let began = Instant::now();
                let answer = client.get("next x", SOON)?;
                sample(manner, Metric::LoneRequest, began.elapsed())?;
                let number: u64 = answer.split(' ').next().unwrap_or_default().parse()?;
                ensure!(number == last + 1, "after {last} came {number}: something was lost");
                last = number;
            }
        }
        if let Some(backup) = backup {
            let failover = Pair::kill(primary, &backup, LIMIT)?;
            sample(Manner::Backup, Metric::Failover, failover.all)?;
            sample(Manner::Backup, Metric::FailoverDetect, failover.detect)?;
            sample(Manner::Backup, Metric::FailoverApply, failover.apply)?;
            sample(Manner::Backup, Metric::FailoverRun, failover.run)?;
            primary = backup;
        } else {
            return Ok(());
        }
    }
    Ok(())
}
