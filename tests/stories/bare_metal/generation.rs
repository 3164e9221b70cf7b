//! A machine that resumes from a saved state is a new one: it has a new generation id, and
//! announces itself to its network.
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON};

use crate::plug::with_taps;
use crate::snapshot::{restore, save};
use crate::stage::{Stage, quits, simple};

/// What the guest reads, in the format of `query-vm-generation-id`.
fn generation_id(monitor: &mut Monitor) -> Result<String> {
    let line = monitor.wait_for("\n", SOON)?;
    let words = line.strip_prefix("generation ").with_context(|| line.clone())?;
    let bytes = words.split_whitespace().map(|word| u8::from_str_radix(word, 16));
    let bytes: [u8; 16] = bytes.collect::<Result<Vec<_>, _>>()?.try_into().ok().context("16")?;
    // A GUID in memory: the first three fields are little-endian.
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    let fields = [vec![d, c, b, a], vec![f, e], vec![h, g]];
    let (fourth, fifth) = rest.split_at(2);
    let fields = fields.iter().map(Vec::as_slice).chain([fourth, fifth]);
    let text = |field: &[u8]| field.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Ok(fields.map(text).collect::<Vec<_>>().join("-"))
}

fn asked(qmp: &mut Client) -> Result<String> {
    let info = qmp.execute_raw("query-vm-generation-id", json!({}))?;
    Ok(info.get("guid").and_then(Value::as_str).context("no guid")?.to_owned())
}

#[test]
fn each_restored_machine_has_a_new_generation_id_and_is_notified() -> Result<()> {
    let stage = Stage::new("generation")?;
    let vm = stage.vm("generation", "")?.args(&["-action", "reboot=reset"]);
    let (mut monitor, mut qmp) = stage.start(vm)?;
    let first = generation_id(&mut monitor)?;
    ensure!(first == asked(&mut qmp)?, "{first}");
    simple(&mut qmp, "system_reset")?;
    ensure!(generation_id(&mut monitor)? == first, "a reset keeps the generation");
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    simple(&mut qmp, "cont")?;
    ensure!(asked(&mut qmp)? == first, "it has run on here");
    quits(&stage, &mut monitor, &mut qmp)?;
    ensure!(monitor.unseen().is_empty(), "notified without need: {}", monitor.unseen());

    let mut seen = BTreeSet::from([first]);
    for _ in 0..3 {
        let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
        simple(&mut qmp, "cont")?;
        monitor.wait_for("events 2\n", SOON)?;
        let now = generation_id(&mut monitor)?;
        ensure!(now == asked(&mut qmp)?, "{now}");
        ensure!(seen.insert(now), "the same as before");
        // Restored again from its own state, before it is notified.
        quits(&stage, &mut monitor, &mut qmp)?;
    }
    Ok(())
}

#[test]
fn news_that_were_saved_unread_arrive() -> Result<()> {
    let stage = Stage::new("generation-twice")?;
    let (mut monitor, mut qmp) = stage.start(stage.vm("generation", "")?)?;
    let first = generation_id(&mut monitor)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    // Restored, but not run.
    let (mut monitor, mut qmp) = restore(&stage, &saved, &[])?;
    let second = asked(&mut qmp)?;
    let again = stage.file("again");
    save(&mut qmp, &again, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;
    let (mut monitor, mut qmp) = restore(&stage, &again, &[])?;
    simple(&mut qmp, "cont")?;
    monitor.wait_for("events 2\n", SOON)?;
    let third = generation_id(&mut monitor)?;
    ensure!(BTreeSet::from([&first, &second, &third]).len() == 3, "{first} {second} {third}");
    quits(&stage, &mut monitor, &mut qmp)
}

/// Receives all frames in the monitor's network namespace.
fn listen(monitor: &Monitor) -> Result<OwnedFd> {
    /// ETH_P_ALL of linux/if_ether.h, in network order.
    const ALL: u32 = (3_u16.to_be()) as u32;
    let namespace = File::open(format!("/proc/{}/ns/net", monitor.pid()))?;
    // This changes one thread only, and this one ends.
    let there = thread::spawn(move || -> Result<OwnedFd> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let all = Protocol::from_raw(ALL.try_into()?);
        Ok(socket(AddressFamily::PACKET, SocketType::RAW, Some(all))?)
    });
    let socket = there.join().ok().context("its thread has panicked")??;
    set_socket_timeout(&socket, Timeout::Recv, Some(SOON))?;
    Ok(socket)
}

/// Waits for a RARP broadcast, and returns its sender.
fn announcement(socket: &OwnedFd) -> Result<[u8; 6]> {
    let mut frame = [0; 2048];
    loop {
        let (length, _) = retry_on_intr(|| recv(socket, &mut frame, RecvFlags::empty()))
            .context("no announcement")?;
        let frame = frame.get(..length).unwrap_or_default();
        if frame.get(12..14) != Some(&[0x80, 0x35]) {
            continue;
        }
        let part = |from: usize| frame.get(from..from + 6).context("a frame that is cut off");
        let sender = part(6)?;
        ensure!(part(0)? == [0xff; 6] && part(22)? == sender && part(32)? == sender, "{frame:x?}");
        return Ok(sender.try_into()?);
    }
}

#[test]
fn its_network_hears_where_it_is_now() -> Result<()> {
    let mut stage = Stage::new("announce")?;
    with_taps(&mut stage, "")?;
    let mac = "52:54:00:00:00:01";
    let (mut monitor, mut qmp) =
        stage.start(stage.vm("generation", "")?.nic("net0", "tap0", mac))?;
    generation_id(&mut monitor)?;
    let saved = stage.file("saved");
    save(&mut qmp, &saved, false)?;
    quits(&stage, &mut monitor, &mut qmp)?;

    // On another tap.
    let tap = ["-netdev", "tap,id=net0,ifname=tap1"];
    let (mut monitor, mut qmp) = restore(&stage, &saved, &tap)?;
    let socket = listen(&monitor)?;
    let twice = json!({ "initial": 10, "max": 20, "rounds": 2, "step": 5 });
    let with = |key: &str, value: Value| {
        let mut arguments = twice.clone();
        arguments[key] = value;
        arguments
    };
    ensure!(qmp.execute_raw("announce-self", twice.clone()).is_err(), "the guest is paused");
    simple(&mut qmp, "cont")?;
    for _ in 0..5 {
        ensure!(announcement(&socket)? == [0x52, 0x54, 0, 0, 0, 1]);
    }
    for wrong in
        [with("rounds", json!(0)), with("step", json!(10_001)), with("interfaces", json!(["net1"]))]
    {
        ensure!(qmp.execute_raw("announce-self", wrong.clone()).is_err(), "{wrong} was accepted");
    }
    for arguments in [twice.clone(), with("interfaces", json!(["net0"]))] {
        ensure!(qmp.execute_raw("announce-self", arguments)? == json!({}));
        for _ in 0..2 {
            ensure!(announcement(&socket)? == [0x52, 0x54, 0, 0, 0, 1]);
        }
    }
    quits(&stage, &mut monitor, &mut qmp)
}
