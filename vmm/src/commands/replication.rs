//! Protecting the machine by a backup.
use qmp::{
    Error,
    schema::{Command as _, *},
    server::Ticket,
    table::Host,
};
use replication::Command;

use crate::{files::Job, replication::Bound, vmm::Vmm};

pub fn replication_start(
    vmm: &mut Vmm,
    command: ReplicationStart,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let Some(images) = vmm.unread_sidecars() else {
        vmm.protect(&command, None)?;
        return Ok(Some(Empty {}));
    };
    let protect = move |vmm: &mut Vmm, bound: Result<Option<Bound>, Error>| {
        // Other clients' commands were carried out meanwhile.
        vmm.admit(ReplicationStart::NAME, super::PROTECTABLE)?;
        vmm.protect(&command, bound?)?;
        Ok(Empty {})
    };
    let what = "reading the sidecars of the disks".to_owned();
    vmm.with_files(Job::new(what, move || Bound::read(&images), protect), ticket);
    Ok(None)
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

pub fn query_replication(vmm: &mut Vmm, _: QueryReplication) -> Result<ReplicationInfo, Error> {
    Ok(vmm.replication_info())
}
