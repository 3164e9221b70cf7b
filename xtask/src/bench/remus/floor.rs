//! The bare loop (`epochs.c`): what the pause of a checkpoint takes at least on this host, in one
//! thread, and with nothing but KVM.
use std::process::Command;

use anyhow::{Context, Result, ensure};
use stories::debian::output;

use super::{Load, MIB, sampler};
use crate::bench::compiled::compiled;
use crate::bench::measure::send;
use crate::bench::rig::Rig;
use crate::bench::{Message, Metric};

/// Its name in the figures.
pub const NAME: &str = "bare loop";
const SOURCE: &str = include_str!("epochs.c");
/// How long it runs.
const SECONDS: u128 = 2;

/// Measures it with the pages and the period of `load`, unless that adapts.
///
/// # Errors
/// There is no C compiler, or KVM's headers are missing.
pub fn measure(rig: &Rig, load: &Load) -> Result<()> {
    if load.adapts {
        return Ok(());
    }
    rig.interrupt.check()?;
    send(&Message::Step(format!("{}: {NAME}", load.scenario.title())))?;
    let period = load.period.as_micros();
    let epochs = SECONDS * 1_000_000 / period;
    let mut command = Command::new(compiled(&rig.dir, "epochs", SOURCE)?);
    command.args([u128::from(load.pages), period, epochs, u128::from(MIB)].map(|n| n.to_string()));
    let sample = sampler(load.scenario, NAME);
    for line in output(&mut command).context("the bare loop")?.lines() {
        let words: Vec<f64> =
            line.split(' ').map(str::parse).collect::<Result<_, _>>().context("the bare loop")?;
        ensure!(words.len() == 4, "the bare loop says '{line}'");
        let metrics = [Metric::DirtyPages, Metric::Pause, Metric::PauseHarvest, Metric::PauseCopy];
        for (metric, value) in metrics.into_iter().zip(words) {
            sample(metric, if metric == Metric::DirtyPages { value } else { value / 1e3 })?;
        }
    }
    Ok(())
}
