//! Saving the machine's state.
use std::{io, path::PathBuf, sync::atomic::Ordering, time::Duration};

use machine::inherited;
use qmp::{Error, schema::*, server::Ticket};

use super::probe::return_path;
use crate::{
    checkpoint,
    durations::{microseconds, milliseconds},
    saving::{How, To},
    vmm::Vmm,
};

/// Longest `downtime-limit`, in milliseconds, as with QEMU.
const MAX_DOWNTIME_LIMIT: u64 = 2_000_000;

/// The answer comes when the state has been saved, as with StratoVirt; other clients are served
/// meanwhile.
pub fn migrate(vmm: &mut Vmm, command: Migrate, ticket: &Ticket) -> Result<Option<Empty>, Error> {
    let how = How {
        resume: command.resume == Some(true),
        incremental: command.incremental == Some(true),
        track: command.track == Some(true),
        disks: command.disks == Some(true),
    };
    vmm.files.check_sizes()?;
    let (kind, place) = command.uri.split_once(':').unwrap_or_default();
    if kind != "file" && (how.incremental || how.track || how.disks) {
        let desc = "Parameters 'incremental', 'track' and 'disks' are for file:DIRECTORY";
        return Err(Error::text(desc));
    }
    let failed = |e: io::Error| Error::text(format!("cannot save to {}: {e}", command.uri));
    let answers = vmm.saving().return_path.unwrap_or(kind == "unix");
    let stream = |to| To::Stream(to, command.uri.clone(), answers);
    let to = match (kind, place) {
        ("tcp", _) => return Err(Error::text("MicroVM does not support migration")),
        (_, place) if place.is_empty() || place.contains('\0') => {
            return Err(invalid(&command.uri));
        }
        ("file", path) => To::Directory(PathBuf::from(path)),
        ("unix", path) => stream(checkpoint::To::Socket(PathBuf::from(path))),
        ("fd", name) => {
            match (vmm.servers.named_fds(ticket).and_then(|fds| fds.remove(name)), name.parse()) {
                (Some(fd), _) => stream(checkpoint::To::Fd(fd)),
                (None, Ok(number)) => {
                    stream(checkpoint::To::Fd(inherited::take(number).map_err(failed)?))
                }
                (None, Err(_)) => {
                    let desc =
                        format!("no descriptor is called '{name}': pass it with getfd first");
                    return Err(Error::text(desc));
                }
            }
        }
        ("exec", program) => {
            let fd = vmm.spawner.run(program).map_err(|e| Error::generic(&e))?;
            stream(checkpoint::To::Command(fd))
        }
        _ => return Err(invalid(&command.uri)),
    };
    vmm.save(to, how, ticket)?;
    Ok(None)
}

fn invalid(uri: &str) -> Error {
    let desc =
        format!("Invalid uri: {uri}: must be file:DIRECTORY, unix:SOCKET, fd:NAME or exec:COMMAND");
    Error::text(desc)
}

pub fn migrate_cancel(vmm: &mut Vmm, _: MigrateCancel) -> Result<Empty, Error> {
    vmm.cancel_save();
    Ok(Empty {})
}

pub fn migrate_set_parameters(
    vmm: &mut Vmm,
    command: MigrateSetParameters,
) -> Result<Empty, Error> {
    if let Some(limit) = command.downtime_limit {
        if limit > MAX_DOWNTIME_LIMIT {
            let allowed = format!("must be 0 to {MAX_DOWNTIME_LIMIT} milliseconds");
            return Err(super::invalid("downtime-limit", limit, allowed));
        }
        vmm.saving().thread().limit_downtime(Duration::from_millis(limit));
    }
    Ok(Empty {})
}

pub fn query_migrate_parameters(
    vmm: &mut Vmm,
    _: QueryMigrateParameters,
) -> Result<MigrationParameters, Error> {
    Ok(MigrationParameters { downtime_limit: milliseconds(vmm.saving().thread().downtime_limit()) })
}

pub fn migrate_set_capabilities(
    vmm: &mut Vmm,
    command: MigrateSetCapabilities,
) -> Result<Empty, Error> {
    let known = return_path(true).capability;
    for wanted in &command.capabilities {
        if wanted.capability != known {
            let allowed = format!("must be '{known}'");
            return Err(super::invalid("capability", &wanted.capability, allowed));
        }
    }
    if let Some(last) = command.capabilities.last() {
        vmm.set_return_path(last.state);
    }
    Ok(Empty {})
}

pub fn query_migrate_capabilities(
    vmm: &mut Vmm,
    _: QueryMigrateCapabilities,
) -> Result<Vec<MigrationCapabilityStatus>, Error> {
    Ok(vec![return_path(vmm.saving().return_path.unwrap_or(true))])
}

pub fn query_migrate(vmm: &mut Vmm, _: QueryMigrate) -> Result<MigrationInfo, Error> {
    let saving = vmm.saving();
    let Some(job) = saving.job() else {
        // None yet, or one that could not begin.
        let error_desc = saving.error().map(str::to_owned);
        return Ok(MigrationInfo { status: saving.status(), error_desc, ..Default::default() });
    };
    let base = saving.base().map(|path| path.to_string_lossy().into_owned());
    let progress = job.progress();
    let load = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    let (total, done, transferred) =
        (load(&progress.total), load(&progress.done), load(&progress.written));
    Ok(MigrationInfo {
        status: saving.status(),
        ram: Some(MigrationStats {
            transferred,
            remaining: total.saturating_sub(done),
            total,
            duplicate: load(&progress.zero_pages),
            normal: transferred / 4096,
            page_size: 4096,
        }),
        disk: (load(&progress.disks_total) > 0).then(|| MigrationStats {
            transferred: load(&progress.disks_written),
            remaining: load(&progress.disks_total).saturating_sub(load(&progress.disks_done)),
            total: load(&progress.disks_total),
            duplicate: 0,
            normal: load(&progress.disks_written) / 4096,
            page_size: 4096,
        }),
        total_time: Some(milliseconds(job.time())),
        downtime: saving.downtime().map(milliseconds),
        downtime_us: saving.downtime().map(microseconds),
        converging: Some(!progress.diverges.load(Ordering::Relaxed)),
        base,
        error_desc: saving.error().map(str::to_owned),
    })
}
