//! A stand-in for a monitor: it speaks QMP as far as `stratoctl` does, needs a connection to its
//! backup once it is protected, and remembers what it was told.
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;
use qmp::schema::{ReplicationInfo, ReplicationSide, ReplicationStatus};
use serde_json::{Value, json};

use crate::rig::Rig;

/// What `stratoctl` runs: it leaves a process in the domain's directory, and sockets that lead to
/// those of the test, by the domain's name.
const SCRIPT: &str = r#"
for word; do
    [ "$last" = -name ] && name=$word
    [ "$last" = -incoming ] && incoming=$word
    last=$word
done
sleep 1000 <&- >/dev/null 2>&1 &
echo $! >pid
echo "$incoming" >"DIR/$name.incoming"
ln -s "DIR/$name.replica" replica.sock
ln -s "DIR/$name.qmp" qmp.sock
"#;

#[derive(Default)]
struct State {
    protected: bool,
    clients: Vec<UnixStream>,
    told: Vec<(String, Value)>,
}

/// One stand-in.
#[derive(Clone, Default)]
pub struct StandIn(Arc<Mutex<State>>);

impl StandIn {
    /// Lets `rig` start stand-ins instead of monitors.
    pub fn install(rig: &mut Rig) -> Result<()> {
        rig.by_script(&SCRIPT.replace("DIR", &rig.dir.display().to_string()))
    }

    /// The one that is to be started as the domain `name`, and where it listens as a backup.
    pub fn new(dir: &Path, name: &str) -> Result<(Self, UnixListener)> {
        let listener = UnixListener::bind(dir.join(format!("{name}.qmp")))?;
        let this = Self::default();
        let server = this.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        Ok((this, UnixListener::bind(dir.join(format!("{name}.replica")))?))
    }

    /// The arguments of every `command` so far.
    pub fn told(&self, command: &str) -> Vec<Value> {
        let told = self.state().told.clone();
        told.into_iter().filter(|(known, _)| known == command).map(|(_, said)| said).collect()
    }

    /// Sends an event to every client.
    pub fn needs(&self, data: &Value) {
        let timestamp = json!({ "seconds": 0, "microseconds": 0 });
        let event = json!({ "event": "REPLICATION_NEEDS", "data": data, "timestamp": timestamp });
        for client in &mut self.state().clients {
            let _ = client.write_all(format!("{event}\n").as_bytes());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut stream: UnixStream) -> Result<()> {
        let version = json!({ "qemu": { "micro": 1, "minor": 0, "major": 5 }, "package": "" });
        writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } }))?;
        self.state().clients.push(stream.try_clone()?);
        for line in BufReader::new(stream.try_clone()?).lines() {
            let line: Value = serde_json::from_str(&line?)?;
            let command = line.get("execute").and_then(Value::as_str).unwrap_or_default();
            let arguments = line.get("arguments").cloned().unwrap_or_default();
            let mut state = self.state();
            let reply = match command {
                "query-status" => {
                    json!({ "status": "running", "running": true, "singlestep": false })
                }
                "query-migrate" => json!({ "status": "setup" }),
                "query-replication" if state.protected => json!(ReplicationInfo {
                    state: ReplicationStatus::Protected,
                    role: Some(ReplicationSide::Primary),
                    epoch: 9,
                    ..ReplicationInfo::default()
                }),
                "query-replication" => json!(ReplicationInfo::default()),
                _ => json!({}),
            };
            match command {
                "replication-start" => state.protected = true,
                "replication-stop" => state.protected = false,
                _ => {}
            }
            state.told.push((command.to_owned(), arguments));
            drop(state);
            let reply = match command {
                // It is killed at once then.
                "quit" => json!({ "error": { "class": "GenericError", "desc": "a stand-in" } }),
                _ => json!({ "return": reply }),
            };
            writeln!(stream, "{reply}")?;
        }
        Ok(())
    }
}

/// What the stand-in for `name` was told to receive.
pub fn incoming(rig: &Rig, name: &str) -> Result<String> {
    Ok(fs::read_to_string(rig.file(&format!("{name}.incoming")))?.trim().to_owned())
}
