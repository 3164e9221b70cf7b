//! `human-monitor-command`: those few lines of QEMU's human monitor that programs parse, in QEMU's
//! format.
use std::fmt::Write;

use config::Tap;
use qmp::{Error, schema::*};

use super::{balloon::query_balloon, block, introspect, run_state};
use crate::vmm::Vmm;

/// A line of the human monitor, and the function that answers it.
type Line = (&'static str, fn(&mut Vmm) -> Result<String, Error>);

const LINES: [Line; 8] = [
    ("info balloon", balloon),
    ("info block", disks),
    ("info cpus", cpus),
    ("info name", name),
    ("info network", network),
    ("info snapshots", snapshots),
    ("info status", status),
    ("info version", version),
];

pub fn human_monitor_command(vmm: &mut Vmm, command: HumanMonitorCommand) -> Result<String, Error> {
    let words: Vec<_> = command.command_line.split_whitespace().collect();
    let line = words.join(" ");
    match LINES.iter().find(|(known, _)| *known == line) {
        Some((_, answer)) => answer(vmm),
        None => {
            let known: Vec<_> = LINES.iter().map(|(known, _)| *known).collect();
            let known = known.join(", ");
            Err(Error::text(format!("Unsupported command: {line}; supported are: {known}")))
        }
    }
}

fn balloon(vmm: &mut Vmm) -> Result<String, Error> {
    let BalloonInfo { actual } = query_balloon(vmm, QueryBalloon {})?;
    Ok(format!("balloon: actual={}\r\n", actual >> 20))
}

fn status(vmm: &mut Vmm) -> Result<String, Error> {
    let status = run_state::query_status(vmm, QueryStatus {})?;
    let word = serde_json::to_value(status.status).map_err(|e| Error::generic(&e))?;
    Ok(match (status.running, status.status) {
        (true, _) => "VM status: running\r\n".into(),
        (_, RunState::Paused) => "VM status: paused\r\n".into(),
        _ => format!("VM status: paused ({})\r\n", word.as_str().unwrap_or_default()),
    })
}

fn name(vmm: &mut Vmm) -> Result<String, Error> {
    Ok(format!("{}\r\n", vmm.machine.config().name))
}

fn version(_: &mut Vmm) -> Result<String, Error> {
    let VersionInfo { qemu, package } = VersionInfo::own();
    Ok(format!("{}.{}.{} ({package})\r\n", qemu.major, qemu.minor, qemu.micro))
}

fn snapshots(_: &mut Vmm) -> Result<String, Error> {
    Ok("There is no snapshot available.\r\n".into())
}

fn cpus(vmm: &mut Vmm) -> Result<String, Error> {
    let cpus = introspect::query_cpus_fast(vmm, QueryCpusFast {})?;
    let line = |cpu: &CpuInfoFast| {
        // The first vCPU is the human monitor's own default.
        let current = if cpu.cpu_index == 0 { '*' } else { ' ' };
        format!("{current} CPU #{}: thread_id={}\r\n", cpu.cpu_index, cpu.thread_id)
    };
    Ok(cpus.iter().map(line).collect())
}

fn disks(vmm: &mut Vmm) -> Result<String, Error> {
    let mut text = String::new();
    for disk in block::block_info(vmm, &block::Used::new())? {
        let Some(inserted) = disk.inserted else { continue };
        let node = inserted.node_name.unwrap_or_default();
        let readonly = if inserted.ro { ", read-only" } else { "" };
        let direct = if inserted.cache.direct { ", direct" } else { "" };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{device} ({node}): {file} ({format}{readonly})\r\n    \
             Attached to:      {device}\r\n    \
             Cache mode:       writeback{direct}\r\n",
            device = disk.device,
            file = inserted.file,
            format = inserted.drv,
        );
    }
    Ok(text)
}

fn network(vmm: &mut Vmm) -> Result<String, Error> {
    let mut text = String::new();
    for (nic, mac) in vmm.machine.nics().map_err(|e| Error::generic(&e))? {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let tap = match &nic.tap {
            Tap::Name(name) => format!("ifname={name}"),
            Tap::Fds(_) => format!("queues={}", nic.queue_pairs),
        };
        let _ = write!(
            text,
            "{}: index=0,type=nic,model=virtio-net-device,macaddr={mac}\r\n \\ {}: \
             index=0,type=tap,{tap},script=no,downscript=no\r\n",
            nic.id,
            nic.backend(),
        );
    }
    Ok(text)
}
