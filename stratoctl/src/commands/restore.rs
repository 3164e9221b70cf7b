//! Restoring domains from saved states.
use std::{fs::File, io::BufReader, os::unix::fs::MetadataExt, path::Path};

use anyhow::Context as _;
use serde_json::{Value, json};
use state::{State, directory::STATE, regular_file::open_regular};

use super::{Answer, Context, LockedDomain, end, lifecycle, restart_policy};
use crate::{
    domain,
    failure::Failure,
    matrix::Verb,
    monitor::{self, More},
    policy::Policy,
    registry::{self, BadName, Description, Name, Saved},
    verbs::{Clock, MovedDisk, Restore, Resume},
};

/// Name of the record that lies beside the monitor's own files in a saved directory.
pub const RECORD_FILE: &str = "domain.json";

pub fn restore(ctx: &Context, args: &Restore) -> anyhow::Result<Answer> {
    let directory = directory(&args.file)?;
    let (name, mut description) = match registry::read::<Saved>(&directory.join(RECORD_FILE)) {
        Ok(saved) => (Ok(saved.name), saved.domain),
        Err(e) if e.is_absent() => by_another(&directory)?,
        Err(e) => return Err(Failure::new(format!("{:#}", anyhow::Error::from(e))).into()),
    };
    let name = args
        .name
        .clone()
        .map_or(name, Ok)
        .map_err(|e| Failure::hint(e.to_string(), "give the domain a name: --name NAME"))?;
    // Two domains restored from one state are two domains.
    description.uuid = crate::configuration::uuid()?;
    let lock = ctx.take(Verb::Restore, &name)?;
    let place = ctx.registry.add(&name, false, &description)?;
    let disks = ctx.registry.place_for_disks(&description.uuid)?;
    let mut more = incoming(&directory, args.verify, args.clock, args.force, Some(&disks))?;
    for MovedDisk { id, path, raw } in &args.disk {
        let path = std::path::absolute(path).context("--disk")?;
        let format = if *raw { ",format=raw" } else { "" };
        more.words.extend(["-drive".into(), format!("id={id},file={}{format}", text(&path)?)]);
    }
    for (id, tap) in &args.tap {
        more.words.extend(["-netdev".into(), format!("tap,id={id},ifname={tap}")]);
    }
    lifecycle::begin(ctx, &place, &description, &args.begin, &more, Some(lock))
}

pub fn resume(ctx: &Context, args: &Resume) -> anyhow::Result<Answer> {
    let held = ctx.hold(Verb::Resume, &args.domain)?;
    let description = lifecycle::described(&held.place)?;
    let more = incoming(&held.place.saved(), false, args.clock, args.force, None)?;
    // Paused at first: the suspended state counts until the guest runs.
    let place = held.place.clone();
    let started = monitor::start(&ctx.registry, &ctx.program, &place, &description, true, &more);
    let id = started.map_err(|e| {
        let (text, saved) = (format!("{e:#}"), place.saved());
        match text.contains("--disk ") || text.contains("--tap ") {
            true => {
                let hint = format!("`stratoctl restore {}` takes these flags", saved.display());
                Failure::hint(text, hint).into()
            }
            false => e,
        }
    })?;
    let mut held = LockedDomain { status: domain::query(&ctx.registry, &place), ..held };
    let watched = match restart_policy::needed(&description.policy) {
        true => restart_policy::spawn(ctx, &place),
        false => Ok(()),
    };
    let begun = watched.and_then(|()| match args.begin.paused {
        true => Ok(()),
        false => lifecycle::let_run(ctx, &mut held),
    });
    if let Err(e) = begun {
        end(ctx, &mut held)?;
        return Err(e);
    }
    lifecycle::begun(ctx, &place, &args.begin, id, held.lock, true)
}

/// The name and description for a state in `directory` that was not saved by stratoctl, but by a
/// monitor's own `migrate`.
fn by_another(directory: &Path) -> anyhow::Result<(Result<Name, BadName>, Description)> {
    let path = directory.join(STATE);
    let read =
        || Ok(State::read(BufReader::new(open_regular(&path, File::options().read(true))?))?);
    let state = read().map_err(|e: anyhow::Error| {
        let what = format!("{}: {e:#}", path.display());
        Failure::hint(what, "`stratoctl save DOMAIN FILE` makes such a directory")
    })?;
    let machine = state.config.machine;
    let description = Description {
        uuid: machine.uuid,
        vcpus: machine.vcpus.into(),
        memory: machine.memory.size,
        policy: Policy::default(),
        // The configuration that it was started with is not known.
        config: Value::Null,
    };
    Ok((machine.name.parse(), description))
}

fn incoming(
    directory: &Path,
    verify: bool,
    clock: Clock,
    force: bool,
    disks: Option<&Path>,
) -> anyhow::Result<More> {
    let mapped = if verify { "off" } else { "on" };
    let mut source = format!("file:{},mapped={mapped}", text(directory)?);
    if let Some(disks) = disks {
        source.push_str(",disks=");
        source.push_str(text(disks)?);
    }
    if clock == Clock::Realtime {
        source.push_str(",clock=realtime");
    }
    if force {
        source.push_str(",force=on");
    }
    let words = vec!["-incoming".into(), source];
    let entries = || std::fs::read_dir(directory).into_iter().flatten().flatten();
    let read = |name: &str| {
        let kept = disks.is_some() && name.starts_with("disk-");
        kept || verify && name == "memory"
    };
    // Holes are not read. The saves that it builds on are counted, too, if there are any.
    let reads = entries().filter(|entry| entry.file_name().to_str().is_some_and(read));
    let reads = reads.filter_map(|entry| Some(entry.metadata().ok()?.blocks() * 512)).sum();
    Ok(More { words, reads: Some(reads).filter(|reads| *reads > 0) })
}

/// `path` as the value of a monitor's option.
///
/// # Errors
/// When it cannot be one.
pub fn text(path: &Path) -> anyhow::Result<&str> {
    let text = path.to_str().filter(|text| !text.contains(','));
    text.ok_or_else(|| {
        let what = format!("{} cannot be passed to a monitor", path.display());
        Failure::hint(what, "use a path in UTF-8 without commas").into()
    })
}

/// The absolute path of a directory that is to hold a saved state.
///
/// # Errors
/// When it cannot be passed to a monitor.
pub fn directory(file: &Path) -> anyhow::Result<std::path::PathBuf> {
    let path = std::path::absolute(file).with_context(|| format!("{}", file.display()))?;
    text(&path)?;
    Ok(path)
}

pub fn check(file: &Path) -> anyhow::Result<Answer> {
    let directory = directory(file)?;
    config::saved::check(&directory)?;
    // It lies beside the state, and the monitor does not need it: absent if another tool has saved.
    match registry::read::<Saved>(&directory.join(RECORD_FILE)) {
        Err(e) if !e.is_absent() => return Err(e.into()),
        _ => {}
    }
    let text = format!("{} is intact", file.display());
    Ok(Answer::new(text, json!({ "file": directory, "whole": true })))
}
