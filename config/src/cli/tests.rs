//! Command lines of users and programs, and their results.
use std::ffi::OsString;

use crate::{CharBackend, ConsoleConfig, DeviceConfig, MachineConfig, RngConfig, Tap};

use super::{Action, Control, Invocation, Log, Problems, parse};

mod action;
mod documented;
mod faults;
mod file;
mod hostile;
mod meaning;

impl MachineConfig {
    /// The console, if there is one.
    fn console(&self) -> Option<&ConsoleConfig> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Console(console) => Some(console),
            _ => None,
        })
    }

    /// The source of randomness, if there is one.
    fn rng(&self) -> Option<&RngConfig> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Rng(rng) => Some(rng),
            _ => None,
        })
    }
}

/// A command line as a shell splits it, with double quotes.
fn words(line: &str) -> Vec<OsString> {
    let mut words = vec![];
    for (index, piece) in line.split('"').enumerate() {
        if index % 2 == 1 {
            words.push(piece.into());
        } else {
            words.extend(piece.split_whitespace().map(OsString::from));
        }
    }
    words
}

fn run(line: &str) -> Invocation {
    match parse(words(line).into_iter()) {
        Ok(Action::Run(invocation)) => *invocation,
        Ok(other) => panic!("{line}: {other:?}"),
        Err(problems) => panic!("{line}:\n{problems}"),
    }
}

/// The machine of a command line, with a kernel and a control socket added.
fn machine(line: &str) -> MachineConfig {
    run(&format!("-kernel k -api-channel unix:s {line}")).machine
}

fn problems(line: &str) -> Vec<String> {
    match parse(words(line).into_iter()) {
        Ok(action) => panic!("{line}: accepted: {action:?}"),
        Err(problems) => problems.iter().map(str::to_owned).collect(),
    }
}

/// The only problem of a command line, with a kernel and a control socket added.
fn problem(line: &str) -> String {
    let all = problems(&format!("-kernel k -api-channel unix:s {line}"));
    assert_eq!(all.len(), 1, "{line}: {all:#?}");
    all.into_iter().next().unwrap()
}

/// The result of a file, with a control socket given by flag.
fn file(text: &str, line: &str) -> Result<Invocation, Problems> {
    let path = std::env::temp_dir().join(format!(
        "stratovirt-cli-{}-{:?}.json",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&path, text).unwrap();
    let args = [OsString::from("-config"), path.clone().into()];
    let answer = parse(args.into_iter().chain(words(line)));
    std::fs::remove_file(&path).unwrap();
    match answer {
        Ok(Action::Run(invocation)) => Ok(*invocation),
        Ok(other) => panic!("{other:?}"),
        Err(problems) => Err(problems),
    }
}

/// The problems of a file, without the file's name.
fn file_problems(text: &str) -> Vec<String> {
    let problems = file(text, "-api-channel unix:s").expect_err(text);
    problems
        .iter()
        .map(|line| line.split_once(".json: ").map_or(line, |(_, rest)| rest).to_owned())
        .collect()
}
