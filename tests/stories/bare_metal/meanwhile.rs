//! A disk hangs, and one client's command has to wait for it. All other clients are answered first.
//! The command fails and names the disk, or is carried out when the storage answers.
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qmp::client::{Client, ClientError};
use serde_json::{Value, json};
use stories::bounds::COMMAND;
use stories::frozen::Frozen;
use stories::monitor::{Monitor, SOON};

use crate::counters::{Counters, counting};
use crate::held::{answer, send};
use crate::hung::{SAYS, until_it_hangs, with_a_file_system};
use crate::stage::{Stage, ends, exists, simple, status};

/// How many queries are sent while a command waits. A monitor whose main thread waited, too, would
/// answer at most one, which it may have read before.
pub const QUESTIONS: usize = 5;
/// Long enough to read an answer that has already arrived.
const A_LOOK: Duration = Duration::from_millis(1);

/// A machine whose disk hangs.
struct Hung {
    /// Thawed before the monitor is waited for.
    frozen: Option<Frozen>,
    monitor: Monitor,
    stage: Stage,
    qmp: Client,
    rounds: Counters,
}

impl Hung {
    /// With `direct` its writes wait in io_uring; otherwise they block the I/O thread itself. The
    /// guest runs `work` on it.
    fn new(story: &str, direct: bool, work: &str) -> Result<Self> {
        let mut stage = Stage::new(story)?;
        let disk = with_a_file_system(&mut stage)?;
        let place = disk.parent().context("no directory")?.to_string_lossy().into_owned();
        let drive = |id: &str, path: &std::path::Path| json!({ "drive_id": id, "path_on_host": path, "read_only": false, "direct": direct });
        let sound = stage.file("sound.img");
        std::fs::File::create(&sound)?.set_len(1 << 20)?;
        let vm = stage.vm("blk", work)?;
        let vm = vm.add("drive", drive("vda", &disk)).add("drive", drive("vdb", &sound));
        let (monitor, mut qmp, rounds) = counting(&stage, vm, 1)?;
        let frozen = Some(Frozen::new(monitor.pid(), &place)?);
        until_it_hangs(&mut qmp)?;
        Ok(Self { frozen, monitor, stage, qmp, rounds })
    }

    fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.stage.socket(), SOON)?)
    }

    /// One client has sent a command. Another client is answered before it.
    fn asks(&mut self, command: &str, arguments: &Value) -> Result<Client> {
        let mut client = self.client()?;
        send(&mut client, command, arguments)?;
        for _ in 0..QUESTIONS {
            ensure!(status(&mut self.qmp)? == "running", "during {command}");
        }
        let disks = self.qmp.execute_raw("query-block", json!({}))?;
        let size = disks.pointer("/0/inserted/image/virtual-size");
        ensure!(size == Some(&json!(1 << 20)), "during {command}: {disks}");
        is_unanswered(&mut client).with_context(|| format!("during {command}"))?;
        Ok(client)
    }

    /// The same, and the command finally fails because of the disk; the guest runs on.
    fn waits_and_is_refused(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let mut client = self.asks(command, arguments)?;
        let said = answer(&mut client)?;
        ensure!(why(&said).contains(SAYS), "{command}: {said}");
        ensure!(status(&mut self.qmp)? == "running", "after {command}");
        Ok(())
    }

    /// The storage answers again, and so does the guest.
    fn thaw(&mut self) -> Result<()> {
        let before = self.rounds.read()?;
        self.frozen.take().context("it is not frozen")?.thaw()?;
        self.rounds.wait_past(&before)?;
        ensure!(!self.monitor.unseen().contains("WRONG"), "{}", self.monitor.unseen());
        Ok(())
    }

    fn save(&self, resume: bool) -> Value {
        let uri = format!("file:{}", self.stage.file("saved").display());
        json!({ "uri": uri, "resume": resume })
    }
}

/// Why a command was refused.
pub fn why(answer: &Value) -> &str {
    answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or_default()
}

/// Only events have arrived so far.
pub fn is_unanswered(client: &mut Client) -> Result<()> {
    loop {
        match client.read_line(A_LOOK) {
            Err(ClientError::Timeout { .. }) => return Ok(()),
            line => ensure!(line?.starts_with("{\"event\""), "it was answered first"),
        }
    }
}

fn others_are_answered_meanwhile(story: &str, direct: bool) -> Result<()> {
    let mut hung = Hung::new(story, direct, "busy")?;
    hung.waits_and_is_refused("stop", &json!({}))?;
    for resume in [false, true] {
        hung.waits_and_is_refused("migrate", &hung.save(resume))?;
        let saved = hung.stage.file("saved");
        ensure!(!exists(&saved), "a save that did not begin has left {}", saved.display());
    }
    hung.waits_and_is_refused("device_del", &json!({ "id": "vda" }))?;
    hung.waits_and_is_refused("system_reset", &json!({}))?;
    hung.thaw()?;
    ends_by_quit(hung)
}

fn ends_by_quit(mut hung: Hung) -> Result<()> {
    hung.qmp.take_events();
    send(&mut hung.qmp, "quit", &json!({}))?;
    ensure!(answer(&mut hung.qmp)? == json!({ "return": {} }));
    ends(&mut hung.monitor, &mut hung.qmp, false, "host-qmp-quit", 0)
}

#[test]
fn other_clients_are_answered_while_a_command_waits_for_requests_in_flight() -> Result<()> {
    others_are_answered_meanwhile("meanwhile_direct", true)
}

#[test]
fn other_clients_are_answered_while_a_command_waits_for_an_i_o_thread() -> Result<()> {
    others_are_answered_meanwhile("meanwhile", false)
}

/// Its vCPU waits for the disk, and holds the device that the main thread would read.
#[test]
fn other_clients_are_answered_while_a_guest_resets_a_disk_that_hangs() -> Result<()> {
    for direct in [true, false] {
        let mut hung = Hung::new("meanwhile_reset", direct, "resets")?;
        hung.waits_and_is_refused("stop", &json!({}))?;
        hung.waits_and_is_refused("migrate", &hung.save(true))?;
        hung.waits_and_is_refused("device_del", &json!({ "id": "vda" }))?;
        hung.thaw()?;
        ends_by_quit(hung)?;
    }
    Ok(())
}

#[test]
fn a_save_that_waits_for_a_disk_can_be_cancelled() -> Result<()> {
    let mut hung = Hung::new("meanwhile_cancel", true, "busy")?;
    for resume in [false, true] {
        let save = hung.save(resume);
        let mut saves = hung.asks("migrate", &save)?;
        simple(&mut hung.qmp, "migrate_cancel")?;
        let said = answer(&mut saves)?;
        ensure!(why(&said).contains("the save was cancelled"), "{said}");
        ensure!(status(&mut hung.qmp)? == "running");
    }
    hung.thaw()?;
    ends_by_quit(hung)
}

/// Commands that need the machine wait, in order, for the one that is using it; if the storage
/// recovers in time, a stop succeeds as usual.
#[test]
fn what_needs_the_machine_waits_for_its_turn() -> Result<()> {
    let mut hung = Hung::new("meanwhile_turn", true, "busy")?;
    let mut stops = hung.asks("stop", &json!({}))?;
    let mut continues = hung.client()?;
    send(&mut continues, "cont", &json!({}))?;
    ensure!(status(&mut hung.qmp)? == "running");
    is_unanswered(&mut continues).context("cont did not wait for its turn")?;
    hung.qmp.take_events();
    hung.thaw()?;
    let stopped = answer(&mut stops)?;
    ensure!(answer(&mut continues)? == json!({ "return": {} }));
    if stopped == json!({ "return": {} }) {
        // All clients see the same order, that of execution.
        for event in ["STOP", "RESUME"] {
            ensure!(hung.qmp.next_event(SOON)?.event == event);
        }
    }
    ensure!(status(&mut hung.qmp)? == "running");
    hung.rounds.wait_past(&hung.rounds.read()?)?;
    ends_by_quit(hung)
}

/// Each has its own time limit from the start: one after the other, they would take three times as
/// long.
#[test]
fn commands_that_wait_behind_each_other_are_refused_in_their_own_time() -> Result<()> {
    let mut hung = Hung::new("meanwhile_queue", false, "busy")?;
    let mut clients = Vec::new();
    let asked = Instant::now();
    for command in ["stop", "system_reset", "stop"] {
        let mut client = hung.client()?;
        send(&mut client, command, &json!({}))?;
        clients.push(client);
    }
    for client in &mut clients {
        let said = answer(client)?;
        ensure!(why(&said).contains(SAYS), "{said}");
    }
    let took = asked.elapsed();
    ensure!(took < COMMAND * 2, "{took:?}");
    ensure!(status(&mut hung.qmp)? == "running");
    hung.thaw()?;
    ends_by_quit(hung)
}

/// Queries do not wait for a monitor that is ending, either, until it has announced its end.
#[test]
fn quit_does_not_wait_for_another_client_s_stop() -> Result<()> {
    let mut hung = Hung::new("meanwhile_quit", true, "busy")?;
    let mut stops = hung.asks("stop", &json!({}))?;
    let mut other = hung.client()?;
    send(&mut hung.qmp, "quit", &json!({}))?;
    ensure!(answer(&mut hung.qmp)? == json!({ "return": {} }));
    is_unanswered(&mut stops)?;
    for _ in 0..QUESTIONS {
        ensure!(status(&mut other)? == "running");
    }
    let refused = other.execute_raw("stop", json!({})).err().map(|e| e.to_string());
    ensure!(refused.as_ref().is_some_and(|e| e.contains("is ending")), "{refused:?}");
    for client in [&mut hung.qmp, &mut other, &mut stops] {
        let data = client.wait_event("SHUTDOWN", SOON)?.data;
        ensure!(data == json!({ "guest": false, "reason": "host-qmp-quit" }), "{data}");
        client.wait_closed(SOON)?;
    }
    hung.frozen.take().context("it is not frozen")?.thaw()?;
    ensure!(hung.monitor.wait_exit()?.code() == Some(0));
    Ok(())
}
