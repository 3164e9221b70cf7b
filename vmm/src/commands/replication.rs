//! Protecting the machine by a backup.
use std::path::PathBuf;

use qmp::{
    Error,
    schema::{Command as _, *},
    server::Ticket,
    table::Host,
};
use replication::Command;
use rustls::pki_types::ServerName;
use transport::{Names, Security};

use crate::{files::Job, replication::Bound, vmm::Vmm};

pub fn replication_start(
    vmm: &mut Vmm,
    command: ReplicationStart,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let names = names(&command)?;
    let plain = Security::Plain(command.tls.is_some());
    let directory = command.tls.as_deref().filter(|tls| *tls != "off").map(PathBuf::from);
    let images = vmm.unread_sidecars();
    let what = match (&directory, &images) {
        (None, None) => {
            vmm.protect(&command, None, plain)?;
            return Ok(Some(Empty {}));
        }
        (Some(directory), _) => format!("reading the certificates in {}", directory.display()),
        (None, Some(_)) => "reading the sidecars of the disks".to_owned(),
    };
    let read = move || -> Result<(Option<Bound>, Security), Error> {
        let security = match directory.as_deref().map(transport::client).transpose() {
            Ok(Some(config)) => Security::Client(config, names),
            Ok(None) => plain,
            Err(e) => return Err(Error::generic(&e)),
        };
        let bound = images.map(|images| Bound::read(&images)).transpose()?;
        Ok((bound.flatten(), security))
    };
    let protect = move |vmm: &mut Vmm, read: Result<_, Error>| {
        let (bound, security) = read?;
        // Other clients' commands were carried out meanwhile.
        vmm.admit(ReplicationStart::NAME, super::PROTECTABLE)?;
        vmm.protect(&command, bound, security)?;
        Ok(Empty {})
    };
    vmm.with_files(Job::new(what, read, protect), ticket);
    Ok(None)
}

/// Whose certificate the backup has to have.
fn names(command: &ReplicationStart) -> Result<Names, Error> {
    let Some(name) = &command.tls_hostname else { return Ok(Names::OfAddress) };
    if command.tls.as_deref().is_none_or(|tls| tls == "off") {
        return Err(Error::text(
            "Parameter 'tls-hostname' is not allowed without 'tls', a directory with certificates",
        ));
    }
    let name = ServerName::try_from(name.clone());
    name.map(Names::Of).map_err(|_| {
        let desc = "Invalid parameter 'tls-hostname': must be the name or the address of a host";
        Error::text(desc)
    })
}

pub fn replication_stop(vmm: &mut Vmm, stop: ReplicationStop) -> Result<Empty, Error> {
    vmm.replication_command(Command::Unprotect, stop.force == Some(true))?;
    Ok(Empty {})
}

pub fn replication_failover(vmm: &mut Vmm, failover: ReplicationFailover) -> Result<Empty, Error> {
    vmm.replication_command(Command::Failover, failover.force == Some(true))?;
    Ok(Empty {})
}

pub fn replication_answer(
    vmm: &mut Vmm,
    answer: ReplicationAnswer,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    vmm.replication_answer(&answer, ticket)?;
    Ok(Some(Empty {}))
}

pub fn replication_heartbeat_path(
    vmm: &mut Vmm,
    path: ReplicationHeartbeatPath,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    vmm.replication_heartbeat_path(&path, ticket)?;
    Ok(Some(Empty {}))
}

pub fn query_replication_epochs(
    vmm: &mut Vmm,
    query: QueryReplicationEpochs,
) -> Result<ReplicationEpochs, Error> {
    Ok(vmm.replication_epochs(query.after.unwrap_or(0)))
}

pub fn query_replication(vmm: &mut Vmm, _: QueryReplication) -> Result<ReplicationInfo, Error> {
    Ok(vmm.replication_info())
}
