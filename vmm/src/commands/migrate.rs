//! Saving the machine's state.
use std::{path::PathBuf, sync::atomic::Ordering};

use qmp::{Error, schema::*, server::Ticket};

use crate::vmm::Vmm;

/// The answer comes when the state has been saved, as with StratoVirt; other clients are served
/// meanwhile.
pub fn migrate(vmm: &mut Vmm, command: Migrate, ticket: &Ticket) -> Result<Option<Empty>, Error> {
    let directory = match command.uri.split_once(':') {
        Some(("file", path)) if !path.is_empty() && !path.contains('\0') => PathBuf::from(path),
        Some(("tcp", _)) => return Err(Error::text("MicroVM does not support migration")),
        Some(("unix" | "exec" | "fd", _)) => {
            return Err(Error::text(format!(
                "Invalid uri: {}: streams are not built yet; use file:DIRECTORY",
                command.uri
            )));
        }
        _ => {
            let desc = format!("Invalid uri: {}: must be file:DIRECTORY", command.uri);
            return Err(Error::text(desc));
        }
    };
    vmm.save(&directory, command.resume == Some(true), ticket)?;
    Ok(None)
}

pub fn migrate_cancel(vmm: &mut Vmm, _: MigrateCancel) -> Result<Empty, Error> {
    vmm.cancel_save();
    Ok(Empty {})
}

pub fn query_migrate(vmm: &mut Vmm, _: QueryMigrate) -> Result<MigrationInfo, Error> {
    let saving = vmm.saving();
    let Some(job) = saving.job() else { return Ok(MigrationInfo::default()) };
    let progress = job.progress();
    let load = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    let (total, done, transferred) =
        (load(&progress.total), load(&progress.done), load(&progress.written));
    let milliseconds = |t: std::time::Duration| u64::try_from(t.as_millis()).unwrap_or(u64::MAX);
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
        total_time: Some(milliseconds(job.time())),
        downtime: saving.downtime().map(milliseconds),
        error_desc: saving.error().map(str::to_owned),
    })
}
