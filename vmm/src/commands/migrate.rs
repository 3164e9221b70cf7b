//! Saving the machine's state.
use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use machine::inherited;
use qmp::{Error, schema::*, server::Ticket};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::{
    checkpoint::Peer,
    saving::{How, To},
    vmm::Vmm,
};

/// The answer comes when the state has been saved, as with StratoVirt; other clients are served
/// meanwhile.
pub fn migrate(vmm: &mut Vmm, command: Migrate, ticket: &Ticket) -> Result<Option<Empty>, Error> {
    let how = How {
        resume: command.resume == Some(true),
        incremental: command.incremental == Some(true),
        track: command.track == Some(true),
    };
    vmm.files.check_sizes()?;
    let (kind, place) = command.uri.split_once(':').unwrap_or_default();
    if kind != "file" && (how.incremental || how.track) {
        let desc = "Parameters 'incremental' and 'track' are for file:DIRECTORY";
        return Err(Error::text(desc));
    }
    let failed = |e: io::Error| Error::text(format!("cannot save to {}: {e}", command.uri));
    let stream = |fd: OwnedFd| Peer::new(fd).map(To::Stream).map_err(failed);
    let to = match (kind, place) {
        ("tcp", _) => return Err(Error::text("MicroVM does not support migration")),
        (_, place) if place.is_empty() || place.contains('\0') => {
            return Err(invalid(&command.uri));
        }
        ("file", path) => To::Directory(PathBuf::from(path)),
        ("unix", path) => stream(connected(Path::new(path)).map_err(failed)?)?,
        ("fd", name) => match (vmm.named_fds.remove(name), name.parse()) {
            (Some(fd), _) => stream(fd)?,
            (None, Ok(number)) => stream(inherited::take(number).map_err(failed)?)?,
            (None, Err(_)) => {
                let desc =
                    format!("no descriptor is called '{name}': hand it over with getfd first");
                return Err(Error::text(desc));
            }
        },
        ("exec", program) => {
            let fd = vmm.spawner.run(program).map_err(|e| Error::generic(&e))?;
            To::Stream(Peer::command(fd).map_err(failed)?)
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

/// A connection to the socket at `path`. Does not wait for a listener with many others in line.
fn connected(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

pub fn migrate_cancel(vmm: &mut Vmm, _: MigrateCancel) -> Result<Empty, Error> {
    vmm.cancel_save();
    Ok(Empty {})
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
        base,
        error_desc: saving.error().map(str::to_owned),
    })
}
