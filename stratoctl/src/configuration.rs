//! Reads the configuration file of a domain: it is checked by the monitor's own parser, and its
//! paths are made absolute.
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use config::cli::{self, Action, FileKey};
use serde_json::Value;

use crate::{
    failure::Failure,
    policy::Policy,
    registry::{Description, Name},
    verbs::Described,
};

/// Read and check the file that `described` names.
///
/// # Errors
/// All errors found in it.
pub fn read(described: &Described) -> anyhow::Result<(Name, Description)> {
    let path = &described.config;
    let words = ["-config".into(), path.into(), "-api-channel".into(), "unix:qmp.sock".into()];
    let machine = match cli::parse(words.into_iter().map(|word: OsString| word)) {
        Ok(Action::Run(invocation)) => invocation.machine,
        Ok(_) => anyhow::bail!(Failure::new(format!("{} is not a configuration", path.display()))),
        Err(problems) => anyhow::bail!(Failure::new(problems.to_string())),
    };
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut config: Value =
        serde_json::from_slice(&text).with_context(|| format!("in {}", path.display()))?;
    let directory = std::path::absolute(path).context("the configuration's directory")?;
    make_absolute(&mut config, directory.parent().unwrap_or(Path::new("/")));
    let name = name(described, &config)?;
    let policy =
        policy(described, &mut config).with_context(|| format!("{}: domain", path.display()))?;
    let description = Description {
        uuid: uuid()?,
        vcpus: u64::from(machine.cpus.get()),
        memory: machine.memory.size.bytes(),
        policy,
        config,
    };
    Ok((name, description))
}

/// A new random UUID.
///
/// # Errors
/// When the host has no random numbers to give.
pub fn uuid() -> anyhow::Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random numbers")?;
    Ok(uuid.trim().to_owned())
}

/// Check that the files exist that a start needs.
///
/// # Errors
/// The missing ones.
pub fn check_files(config: &Value) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for_paths(&mut config.clone(), |key, path| {
        if key.needed
            && let Err(e) = fs::metadata(&*path)
        {
            missing.push(format!("{}: {path}: {e}", key.key));
        }
    });
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(missing.join("\n")).into()),
    }
}

fn name(described: &Described, config: &Value) -> anyhow::Result<Name> {
    if let Some(name) = &described.name {
        return Ok(name.clone());
    }
    let own = config.pointer("/machine-config/name").and_then(Value::as_str);
    let stem = described.config.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let word = own.map(str::to_owned).or(stem).unwrap_or_default();
    word.parse().map_err(|e: crate::registry::BadName| {
        Failure::hint(e.to_string(), "give the domain a name: --name NAME").into()
    })
}

/// The policy: `domain` of the file, as modified by the command line.
fn policy(described: &Described, config: &mut Value) -> anyhow::Result<Policy> {
    let own = config.as_object_mut().and_then(|object| object.shift_remove("domain"));
    let mut policy: Policy = own.map(serde_json::from_value).transpose()?.unwrap_or_default();
    policy.on_poweroff = described.on_poweroff.unwrap_or(policy.on_poweroff);
    policy.on_reboot = described.on_reboot.unwrap_or(policy.on_reboot);
    policy.on_crash = described.on_crash.unwrap_or(policy.on_crash);
    Ok(policy)
}

fn make_absolute(config: &mut Value, directory: &Path) {
    for_paths(config, |_, path| {
        let whole: PathBuf = directory.join(&*path);
        if let Some(whole) = whole.to_str() {
            whole.clone_into(path);
        }
    });
}

fn for_paths(config: &mut Value, mut each: impl FnMut(FileKey, &mut String)) {
    for (section, key) in cli::files() {
        let items = match config.get_mut(section) {
            Some(Value::Array(items)) => items.iter_mut().collect(),
            Some(object) => vec![object],
            None => vec![],
        };
        for item in items {
            if let Some(Value::String(path)) = item.get_mut(key.key)
                && !path.is_empty()
            {
                each(key, path);
            }
        }
    }
}
