//! The command line of `cargo compare`.
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::density::Counts;
use super::{Scenario, builds, monitors, remus};

/// How it is used.
pub const USAGE: &str = "\
Runs the same guests under this monitor and under every other one on PATH, in turns.

Usage: cargo compare [-- OPTIONS]
  -n RUNS      runs of each monitor on this machine's own KVM (default 7)
  --peer NAME  only beside this one of the others, or these; NAME is its program's
  --quick      two short runs
  --native     only on this machine's own KVM
  --emulated   only in the emulated host
  --payload    no Linux: only payloads of a few instructions
  --scattered  only the pauses of saves while Linux writes all over its memory (10 of each kind
               in a run, 5 runs)
  --builds A B only two builds of this monitor: programs, or directories with a `stratovirt`; 200
               runs of each for what takes milliseconds, 20 for block and network, or RUNS.
               Fails if B is certainly slower or larger than A by more than 3 %.
  --remus      only what protecting Linux costs it: pauses, and work that it does not get done
               (5 turns, or RUNS; 7 minutes)
  --only PART  of --remus only this, or these: few, many, auto, unpack, database, hosts, held, local
  --seconds N  how long --remus counts checkpoints between two hosts (15)
  --density    only many machines at once: 100 that start, 50 that are restored from one save
               (15 runs). Needs 64 MiB of free memory for each
  --machines N, --clones N
               so many, 1 to 300, instead
  --goals      only what docs/compare.md has goals for (20 to 40 turns, 15 of --density, or RUNS;
               4 minutes). Fails if one is missed, or cannot be measured here
  --held       only how this monitor answers (50 times, or RUNS) while a file, a disk or the guest
               holds what it needs. Needs root. Fails if an answer comes too late.
  -h           this text

STRATOVIRT_GUEST_KERNEL names a kernel that runs natively where an unmodified one does not.
The figures go to target/compare: figures.json and chart.svg, density.json and
density.svg, goals.json, goals.svg and goals.md, remus.json and remus.svg, builds.json,
held.json.
";

/// What is compared.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// This monitor with the others, in everything.
    Monitors,
    /// Saves of Linux that writes all over its memory.
    Scattered,
    /// What protecting Linux costs.
    Remus,
    /// Many machines at once.
    Density,
    /// The figures that have goals.
    Goals,
    /// Two builds of this monitor.
    Builds([PathBuf; 2]),
    /// How this monitor answers while something is blocked.
    Held,
}

/// The command line.
#[derive(Debug)]
pub struct Options {
    /// What is compared.
    pub what: What,
    /// Runs, if not the default.
    pub runs: Option<usize>,
    /// Two short runs.
    pub quick: bool,
    /// On this machine's own KVM.
    pub native: bool,
    /// In the emulated host.
    pub emulated: bool,
    /// Without Linux.
    pub payload: bool,
    /// How many machines at once.
    pub counts: Counts,
    /// The only other monitors, by their programs' names; all, if there are none.
    pub peers: Vec<String>,
    /// The only parts of [`What::Remus`]; all, if there are none.
    pub only: Vec<Scenario>,
    /// For how many seconds its checkpoints between two hosts are counted.
    pub seconds: u64,
}

impl Options {
    /// Parses the command line; `None` if it asks for help.
    ///
    /// # Errors
    /// It is invalid.
    pub fn parse(mut words: VecDeque<String>) -> Result<Option<Self>> {
        let mut options = Self {
            what: What::Monitors,
            runs: None,
            quick: false,
            native: true,
            emulated: true,
            payload: false,
            counts: Counts::default(),
            peers: Vec::new(),
            only: Vec::new(),
            seconds: remus::SECONDS,
        };
        while let Some(word) = words.pop_front() {
            match word.as_str() {
                "-n" => {
                    let runs = words.pop_front().and_then(|runs| runs.parse().ok());
                    let runs = runs.filter(|&runs| runs > 0);
                    options.runs = Some(runs.context("-n takes a number of runs, 1 or more")?);
                }
                "--quick" => options.quick = true,
                "--native" => options.emulated = false,
                "--emulated" => options.native = false,
                "--payload" => (options.payload, options.emulated) = (true, false),
                "--scattered" => options.only(What::Scattered)?,
                "--remus" => options.only(What::Remus)?,
                "--only" => {
                    let part = words.pop_front();
                    let part = remus::PARTS.iter().find(|(name, _)| Some(*name) == part.as_deref());
                    let names = remus::PARTS.map(|(name, _)| name).join(", ");
                    let (_, part) = part.with_context(|| format!("--only takes one of {names}"))?;
                    options.only.push(*part);
                }
                "--seconds" => {
                    let seconds = words.pop_front().and_then(|seconds| seconds.parse().ok());
                    let seconds = seconds.filter(|seconds| (1..=3600).contains(seconds));
                    options.seconds = seconds.context("--seconds takes a number, 1 to 3600")?;
                }
                "--peer" => {
                    let known = monitors::PEERS_KNOWN.map(|monitor| monitor.program);
                    let peer = words.pop_front().filter(|peer| known.contains(&peer.as_str()));
                    let peer =
                        peer.with_context(|| format!("--peer takes one of {}", known.join(", ")))?;
                    options.peers.push(peer);
                }
                "--goals" => options.only(What::Goals)?,
                "--density" => options.only(What::Density)?,
                "--machines" => {
                    options.counts.machines = Counts::parse(&word, words.pop_front().as_deref())?;
                }
                "--clones" => {
                    options.counts.clones = Counts::parse(&word, words.pop_front().as_deref())?;
                }
                "--builds" => {
                    let (a, b) = words.pop_front().zip(words.pop_front()).context(
                        "--builds takes two builds of stratovirt, each a program or the directory that it is in",
                    )?;
                    let [a, b] = [a, b].map(|build| builds::program(Path::new(&build)));
                    options.only(What::Builds([a?, b?]))?;
                }
                "--held" => options.only(What::Held)?,
                "-h" | "--help" => return Ok(None),
                // The alias ends with -- already.
                "--" => {}
                _ => bail!("{word} is not an option\n\n{USAGE}"),
            }
        }
        Ok(Some(options))
    }

    fn only(&mut self, what: What) -> Result<()> {
        ensure!(
            self.what == What::Monitors,
            "--scattered, --remus, --density, --goals, --builds and --held are mutually exclusive"
        );
        self.what = what;
        Ok(())
    }

    /// The number of runs; `usual` by default.
    #[must_use]
    pub fn runs(&self, usual: usize) -> usize {
        self.runs.unwrap_or(if self.quick { 2 } else { usual })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Options>> {
        Options::parse(line.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn a_crowd_is_as_large_as_it_says() {
        let options = parse("--density --machines 8 --clones 4 --peer firecracker -n 3").unwrap();
        let options = options.unwrap();
        assert_eq!(options.what, What::Density);
        assert_eq!(options.counts, Counts { machines: 8, clones: 4 });
        assert_eq!((options.peers[0].as_str(), options.runs(7)), ("firecracker", 3));
        assert_eq!(parse("--density").unwrap().unwrap().counts, Counts::default());
    }

    #[test]
    fn parts_of_remus_are_named() {
        let options = parse("--remus --only few --only held --seconds 60").unwrap().unwrap();
        assert_eq!(options.only, [Scenario::RemusFew, Scenario::RemusHeld]);
        assert_eq!(options.seconds, 60);
        assert!(parse("--remus").unwrap().unwrap().only.is_empty());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let error = |line| parse(line).unwrap_err().to_string();
        assert!(error("--density --goals").ends_with("are mutually exclusive"));
        assert!(error("--machines 0").contains("1 to 300"));
        assert!(error("--peer nobody").starts_with("--peer takes one of qemu-system-x86_64, "));
        assert!(error("-n 0").contains("1 or more"));
        assert!(error("--remus --only pauses").starts_with("--only takes one of few, many, "));
        assert!(error("--remus --seconds 0").contains("1 to 3600"));
        assert!(error("--faster").starts_with("--faster is not an option"));
        assert!(parse("-h").unwrap().is_none());
    }
}
