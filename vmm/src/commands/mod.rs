//! Every QMP command, when it may run, and the function that runs it.
mod balloon;
mod block;
mod device;
mod human;
mod introspect;
mod migrate;
pub mod net;
mod probe;
mod replication;
mod run_state;

use std::fmt::Display;

use config::types::{Id, ValueError};
use machine::PlugError;
use qmp::{
    Error, ErrorClass,
    table::{Host, Table},
};

use crate::{
    bare::{self, Bare},
    lifecycle::{State, States},
    vmm::Vmm,
};

const ANY: States = States::ANY;
const GUEST: States = States::GUEST;
const ALIVE: States = States::ALIVE;
/// States in which a machine can be protected.
const PROTECTABLE: States = States::of(&[State::Running, State::Paused]);

/// The command table.
pub fn table() -> Table<Vmm> {
    probing(ANY)
        .on(States::GUEST_OR_MIGRATED, run_state::cont)
        .on(States::OR_MIGRATED, run_state::stop)
        .on(States::OR_SAVING, run_state::quit)
        .on_ticket(States::OR_MIGRATED, migrate::migrate)
        .on(ANY, migrate::migrate_cancel)
        .on(ANY, migrate::migrate_set_capabilities)
        .on(ANY, migrate::migrate_set_parameters)
        .on(ANY, migrate::query_migrate)
        .on(ANY, migrate::query_migrate_capabilities)
        .on(ANY, migrate::query_migrate_parameters)
        .on_ticket(PROTECTABLE, replication::replication_start)
        .on(ANY, replication::replication_stop)
        .on(ANY, replication::replication_failover)
        .on_ticket(ANY, replication::replication_answer)
        .on_ticket(ANY, replication::replication_heartbeat_path)
        .on(ANY, replication::query_replication)
        .on(ANY, replication::query_replication_epochs)
        .on(ALIVE, run_state::system_reset)
        .on(GUEST, run_state::system_powerdown)
        .on(ANY, run_state::query_status)
        .on_ticket(ALIVE, block::blockdev_add)
        .on_ticket(ALIVE, block::blockdev_del)
        .on_ticket(ALIVE, block::block_resize)
        .on_ticket(ANY, block::query_block)
        .on(ANY, block::query_blockstats)
        .on_ticket(ANY, block::query_named_block_nodes)
        .on_ticket(ALIVE, |vmm, command, ticket| net::getfd(&mut vmm.servers, command, ticket))
        .on_ticket(ALIVE, |vmm, command, ticket| net::closefd(&mut vmm.servers, command, ticket))
        .on_ticket(ALIVE, net::netdev_add)
        .on(ALIVE, net::netdev_del)
        .on(ALIVE, net::set_link)
        .on(States::of(&[State::Running]), net::announce_self)
        .on(GUEST, run_state::send_key)
        .on_after(ALIVE, device::known_driver, device::device_add)
        .on_ticket(ALIVE, device::device_del)
        .on(ANY, human::human_monitor_command)
        .on(ALIVE, balloon::balloon)
        .on(ANY, balloon::query_balloon)
        .on(ANY, balloon::qom_get)
        .on(ANY, balloon::qom_set)
        .on(ANY, introspect::query_chardev)
        .on(ANY, introspect::query_cpus)
        .on(ANY, introspect::query_cpus_fast)
        .on(ANY, introspect::query_hotpluggable_cpus)
        .on(ANY, introspect::query_iothreads)
        .on(ANY, introspect::query_kvm)
        .on(ANY, introspect::query_name)
        .on(ANY, introspect::query_uuid)
        .on(ANY, introspect::query_vm_generation_id)
}

/// Whether the command acts on the machine, and has to wait while that comes to rest. All others
/// are possible while its state is saved, too: queries, `quit`, and the commands that control a
/// save.
pub(crate) fn needs_machine(table: &Table<Vmm>, name: &str) -> bool {
    table.when(name).is_some_and(|when| !when.contains(State::Saving))
}

/// The commands where there is no machine. Those about a machine are refused, but listed for
/// clients that query the commands.
pub(crate) fn bare_table() -> Table<Bare> {
    probing(true)
        .on(true, bare::quit)
        .on(true, bare::query_status)
        .on(true, bare::query_kvm)
        .on(true, probe::query_migrate_capabilities)
        .listing(&table(), false)
}

/// The commands that need no machine; they are available in the states `always`.
pub(crate) fn probing<H: Host + 'static>(always: H::When) -> Table<H> {
    Table::new(always)
        .on(always, probe::device_list_properties)
        .on(always, probe::qom_list_types)
        .on(always, probe::query_accelerators)
        .on(always, probe::query_command_line_options)
        .on(always, probe::query_cpu_definitions)
        .on(always, probe::query_machines)
        .on(always, probe::query_target)
}

/// An invalid member; `allowed` says what is valid.
fn invalid(key: &str, value: impl Display, allowed: impl Display) -> Error {
    Error::text(format!("Invalid parameter '{key}': '{value}': {allowed}"))
}

/// Parse `word`, the value of `key`, as an id.
fn id(key: &str, word: &str) -> Result<Id, Error> {
    word.parse().map_err(|rule: ValueError| invalid(key, word, rule))
}

/// QEMU's error class for a missing device; else the whole chain of causes.
fn plug_error(error: &PlugError) -> Error {
    match error {
        PlugError::NoDevice(_) => Error::new(ErrorClass::DeviceNotFound, error.to_string()),
        _ => Error::generic(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_and_quit_never_wait_for_the_machine() {
        let table = table();
        let mut questions = table.names().filter(|name| name.starts_with("query-"));
        assert_eq!(questions.find(|name| needs_machine(&table, name)), None);
        for name in ["quit", "migrate_cancel", "human-monitor-command", "no such command"] {
            assert!(!needs_machine(&table, name), "{name}");
        }
        for name in ["stop", "cont", "system_reset", "device_del", "migrate", "block_resize"] {
            assert!(needs_machine(&table, name), "{name}");
        }
    }

    #[test]
    fn every_command_of_the_schema_has_a_handler() {
        assert!(super::table().names().eq(qmp::schema::NAMES.iter().copied()));
        assert!(super::bare_table().names().eq(qmp::schema::NAMES.iter().copied()));
    }
}
