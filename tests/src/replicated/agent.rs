//! The agent of a replicated machine: it answers what the monitor asks, out of a [`Witness`], and
//! keeps what it reports.
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qmp::client::{Client, ClientError, ReceivedEvent};
use serde_json::json;

use super::witness::Witness;
use crate::lab::hosts::Side;
use crate::monitor::SOON;

/// How often it looks whether it is to end.
const TURN: Duration = Duration::from_millis(20);

/// An agent in a thread of its own; ended when dropped.
pub struct Agent {
    heard: Arc<Heard>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Heard {
    log: Mutex<Log>,
    changed: Condvar,
}

#[derive(Default)]
struct Log {
    events: Vec<(Instant, ReceivedEvent)>,
    /// Why nothing more comes.
    ended: Option<String>,
    stop: bool,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Connects to the control socket of a monitor in that host.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn start(socket: &Path, side: Side, witness: &Arc<Witness>) -> Result<Self> {
        let mut client = Client::connect(socket, SOON)?;
        client.execute_raw("qmp_capabilities", json!({}))?;
        let heard = Arc::new(Heard::default());
        let (theirs, witness) = (Arc::clone(&heard), Arc::clone(witness));
        let thread = thread::Builder::new().name("agent".to_owned()).spawn(move || {
            let end = serve(&mut client, side, &witness, &theirs);
            theirs.lock().ended =
                Some(end.map_or_else(|e| e.to_string(), |()| "stopped".to_owned()));
            theirs.changed.notify_all();
        })?;
        Ok(Self { heard, thread: Some(thread) })
    }

    /// Waits for the first event for which `find` returns something.
    ///
    /// # Errors
    /// It does not come within `limit`, or the monitor ends.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        find: impl Fn(&ReceivedEvent) -> Option<T>,
    ) -> Result<(Instant, T)> {
        let deadline = Instant::now() + limit;
        let mut log = self.heard.lock();
        loop {
            let found = log.events.iter().find_map(|(at, event)| Some((*at, find(event)?)));
            if let Some(found) = found {
                return Ok(found);
            }
            if let Some(end) = &log.ended {
                bail!("{what}: the monitor has ended ({end}), after {:?}", log.events);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{what}: not within {limit:?}, only {:?}", log.events);
            let waited = self.heard.changed.wait_timeout(log, left);
            log = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// When and which events it has heard so far.
    #[must_use]
    pub fn heard(&self) -> Vec<(Instant, ReceivedEvent)> {
        self.heard.lock().events.clone()
    }

    /// The state of replication that it has heard of last.
    #[must_use]
    pub fn state(&self) -> Option<String> {
        self.heard
            .lock()
            .events
            .iter()
            .rev()
            .find_map(|(_, event)| states(event))
            .map(str::to_owned)
    }

    /// Forgets what it has heard.
    pub fn forget(&self) {
        self.heard.lock().events.clear();
    }

    /// Waits until replication is in that state.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_state(&self, state: &str, limit: Duration) -> Result<Instant> {
        self.wait(state, limit, |event| states(event).filter(|now| *now == state).map(|_| ()))
            .map(|(at, ())| at)
    }

    /// Waits until replication is in one of these states, and returns that.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_one_of(&self, wanted: &[&str], limit: Duration) -> Result<String> {
        let is_one = |event: &ReceivedEvent| {
            states(event).filter(|now| wanted.contains(now)).map(str::to_owned)
        };
        Ok(self.wait(&wanted.join(" or "), limit, is_one)?.1)
    }
}

/// The state that an event reports.
fn states(event: &ReceivedEvent) -> Option<&str> {
    let state = event.data.get("state").and_then(|state| state.as_str());
    state.filter(|_| event.event == "REPLICATION_STATE")
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.heard.lock().stop = true;
        // A panic there has been printed.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn serve(client: &mut Client, side: Side, witness: &Witness, heard: &Heard) -> Result<()> {
    while !heard.lock().stop {
        let event = match client.next_event(TURN) {
            Ok(event) => event,
            Err(ClientError::Timeout { .. }) => continue,
            Err(error) => return Err(error).context("the monitor is gone"),
        };
        let at = Instant::now();
        // The dialer connects.
        let connects = event.data.get("need") == Some(&json!("connect"));
        if event.event == "REPLICATION_NEEDS" && !connects {
            let answer = witness.answer(side, &event.data);
            match client.execute_raw("replication-answer", answer) {
                // The question may have been answered by somebody else.
                Ok(_) | Err(ClientError::Refused { .. }) => {}
                Err(error) => return Err(error).context("the monitor is gone"),
            }
        }
        heard.lock().events.push((at, event));
        heard.changed.notify_all();
    }
    Ok(())
}
