//! Network back-ends, and the descriptors that clients pass for them.
use std::{collections::BTreeMap, ops::RangeInclusive, os::fd::OwnedFd, time::Duration};

use config::{
    NicConfig, Tap,
    types::{NicQueuePairs, NicQueueSize, TapName},
};
use qmp::{
    Error,
    schema::*,
    server::{Servers, Ticket},
};

use super::{invalid, plug_error};
use crate::{announce::Schedule, vmm::Vmm};

/// Most named descriptors that are kept for one client.
const MAX_NAMED: usize = 32;

pub fn getfd(
    servers: &mut Servers,
    command: Getfd,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let Some(fd) = servers.take_fd(ticket) else {
        return Err(Error::text("Invalid SCM message: no descriptor came with this command"));
    };
    let name = command.fdname;
    super::id("fdname", &name)?;
    if name.starts_with(|first: char| first.is_ascii_digit()) || name.contains(':') {
        return Err(invalid("fdname", &name, "must not begin with a digit or contain ':'"));
    }
    let Some(named) = servers.named_fds(ticket) else { return Ok(None) };
    if named.len() >= MAX_NAMED && !named.contains_key(&name) {
        return Err(Error::text(format!(
            "{MAX_NAMED} descriptors are named already; close some with closefd"
        )));
    }
    named.insert(name, fd);
    Ok(Some(Empty {}))
}

pub fn closefd(
    servers: &mut Servers,
    command: Closefd,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let closed = servers.named_fds(ticket).and_then(|named| named.remove(&command.fdname));
    closed
        .map(|_| Some(Empty {}))
        .ok_or_else(|| Error::text(format!("File descriptor named '{}' not found", command.fdname)))
}

pub fn netdev_add(
    vmm: &mut Vmm,
    command: NetdevAdd,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    if let Some(other) = command.r#type.as_deref().filter(|t| *t != "tap") {
        return Err(Error::text(format!(
            "Invalid parameter 'type': '{other}' is not supported; only 'tap'"
        )));
    }
    let vhost = command.vhost == Some(true)
        || command.vhostfd.is_some()
        || command.vhostfds.is_some()
        || command.chardev.is_some();
    if vhost {
        return Err(Error::text("vhost-net and vhost-user are not supported: leave vhost out"));
    }
    let id = super::id("id", &command.id)?;
    let ifname = command
        .ifname
        .as_deref()
        .map(|name| name.parse::<TapName>().map_err(|rule| invalid("ifname", name, rule)));
    let ifname = ifname.transpose()?;
    for (key, script) in [("script", &command.script), ("downscript", &command.downscript)] {
        if let Some(script) = script.as_ref().filter(|script| *script != "no") {
            return Err(invalid(key, script, "no script is run for a tap device; must be 'no'"));
        }
    }
    if command.macnat == Some(true) {
        let allowed = "MAC address translation is not supported; must be false";
        return Err(invalid("macnat", true, allowed));
    }
    if let Some(domains) = &command.dnssearch {
        return Err(invalid("dnssearch", domains, "not available for a tap device: leave it out"));
    }
    let queues = command.queues.map(|queues| {
        NicQueuePairs::try_from(queues).map_err(|rule| invalid("queues", queues, rule))
    });
    let queues = queues.transpose()?;
    let names: Vec<&str> = match (&command.fd, &command.fds) {
        (Some(_), Some(_)) => {
            return Err(Error::text("Parameters 'fd' and 'fds' exclude each other"));
        }
        (Some(fd), None) => vec![fd.as_str()],
        (None, Some(fds)) => fds.split(':').collect(),
        (None, None) => Vec::new(),
    };
    let count = names.len();
    let pairs = match count {
        0 => queues.unwrap_or_default(),
        _ => NicQueuePairs::try_from(count)
            .map_err(|rule| invalid("fds", format!("{count} descriptors"), rule))?,
    };
    if let Some(queues) = queues.filter(|queues| *queues != pairs) {
        return Err(invalid("queues", queues, format!("there are {count} descriptors")));
    }
    let (tap, fds) = match (ifname, names.is_empty()) {
        (Some(name), true) => (Tap::Name(name), Vec::new()),
        (None, false) => take_fds(vmm.servers.named_fds(ticket), &names)?,
        (Some(_), false) => {
            return Err(Error::text("Parameters 'ifname' and 'fd' exclude each other"));
        }
        (None, true) => {
            return Err(Error::text(
                "Tap device is missing, use 'ifname' or 'fd' to configure a tap device",
            ));
        }
    };
    let config = NicConfig {
        id,
        tap,
        mac: None,
        queue_pairs: pairs,
        // The slot has its own queues.
        queue_size: NicQueueSize::default(),
        pps: None,
        bps: None,
        iothread: None,
        backend: None,
    };
    vmm.machine.add_nic_backend(config, fds).map_err(|e| plug_error(&e))?;
    Ok(Some(Empty {}))
}

/// Descriptors by the names that `getfd` gave them, else by the numbers that this process was
/// started with. The named ones are used up; if one name is wrong, none is.
fn take_fds(
    named: Option<&mut BTreeMap<String, OwnedFd>>,
    names: &[&str],
) -> Result<(Tap, Vec<OwnedFd>), Error> {
    if let Some(named) = named
        && names.iter().all(|name| named.contains_key(*name))
    {
        let mut unique = names.to_vec();
        unique.sort_unstable();
        unique.dedup();
        if unique.len() != names.len() {
            return Err(Error::text("Parameter 'fds' names a descriptor twice"));
        }
        let fds = names.iter().filter_map(|name| named.remove(*name)).collect();
        return Ok((Tap::Fds(Vec::new()), fds));
    }
    let numbers = names.iter().map(|name| name.parse::<i32>()).collect::<Result<Vec<_>, _>>();
    numbers.map(|numbers| (Tap::Fds(numbers), Vec::new())).map_err(|_| {
        Error::text(format!(
            "no descriptor is called '{}': pass it with getfd first",
            names.join(":")
        ))
    })
}

pub fn set_link(vmm: &mut Vmm, command: SetLink) -> Result<Empty, Error> {
    vmm.machine.set_link(&command.name, command.up).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

pub fn announce_self(vmm: &mut Vmm, command: AnnounceSelf) -> Result<Empty, Error> {
    // QEMU's limits.
    let limits: [(&str, u32, RangeInclusive<u32>); 4] = [
        ("initial", command.initial, 0..=100_000),
        ("max", command.max, 0..=100_000),
        ("rounds", command.rounds, 1..=1000),
        ("step", command.step, 0..=10_000),
    ];
    for (name, value, allowed) in limits {
        if !allowed.contains(&value) {
            let (least, most) = allowed.into_inner();
            return Err(Error::text(format!(
                "Invalid parameter '{name}': {value}; must be {least} to {most}"
            )));
        }
    }
    let of = |milliseconds: u32| Duration::from_millis(milliseconds.into());
    let schedule = Schedule {
        rounds: command.rounds,
        initial: of(command.initial),
        max: of(command.max),
        step: of(command.step),
    };
    vmm.announce(schedule, command.interfaces).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

pub fn netdev_del(vmm: &mut Vmm, command: NetdevDel) -> Result<Empty, Error> {
    vmm.machine.remove_nic_backend(&command.id).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}
