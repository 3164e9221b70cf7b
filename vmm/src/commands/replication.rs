//! Protecting the machine by a backup.
use qmp::{Error, schema::*, server::Ticket};
use replication::Command;

use crate::vmm::Vmm;

pub fn replication_start(vmm: &mut Vmm, command: ReplicationStart) -> Result<Empty, Error> {
    vmm.protect(&command)?;
    Ok(Empty {})
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
