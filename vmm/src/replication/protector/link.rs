//! The connection of a primary.
use std::time::Instant;

use qmp::Error;
use replication::{Connection as Number, Epoch, Frame, Input, Message, Refusal, Term, wire};

use super::super::{
    READS, SLICE, blackhole,
    copier::Work,
    offer::{self, Aside},
    outgoing::Next,
    process::{self, Watched},
};
use super::{HIGH_WATER, Incoming, MOST_QUEUED, Protector, Report};
use transport::Descriptors;

use crate::checkpoint::connected;

impl<R: Fn(Report)> Protector<R> {
    pub(super) fn send(&mut self, number: Number, frame: &Frame) {
        if self.task.manner.blackhole.is_some() {
            return self.swallow(number, frame);
        }
        if let Message::Hello(_) = frame.message
            && let Some(new) = self.offered.take_if(|(new, _)| *new == number)
        {
            self.disconnect();
            (self.reason, self.backup) = (None, None);
            self.connection = Some(new);
            self.outgoing.restart(self.task.primary.term());
        }
        let Some((current, connection)) = &mut self.connection else { return };
        if *current != number {
            return;
        }
        let bytes = wire::encode(frame);
        match frame.message {
            // A sign of life does not wait behind pages, and nothing comes before the greeting.
            Message::Hello(_) => connection.send(bytes),
            Message::Beat { .. } => {
                if connection.queued() < MOST_QUEUED {
                    connection.send(bytes);
                }
            }
            Message::End { .. } => {
                if let Some(staged) = self.staged.iter().find(|one| one.epoch == frame.epoch) {
                    self.outgoing.epoch(staged.clone());
                }
                self.outgoing.frame(bytes);
            }
            _ => self.outgoing.frame(bytes),
        }
    }

    /// Send it nowhere.
    fn swallow(&mut self, number: Number, frame: &Frame) {
        match frame.message {
            Message::Hello(_) => {
                self.blackhole = Some((number, 0));
                self.outgoing.restart(self.task.primary.term());
            }
            Message::End { .. } => {
                if let Some(staged) = self.staged.iter().find(|one| one.epoch == frame.epoch) {
                    self.outgoing.epoch(staged.clone());
                    self.ends.push_back(*frame);
                }
            }
            _ => {}
        }
        if let Some(answer) = blackhole::answer(frame) {
            self.inputs.push_back(Input::Received(number, answer));
        }
    }

    /// Encode a little, and drop it.
    fn drop_some(&mut self) {
        for _ in 0..READS {
            match self.outgoing.next() {
                Ok(Some(Next::Bytes(bytes))) => {
                    if let Some((_, dropped)) = &mut self.blackhole {
                        *dropped += bytes.len() as u64;
                    }
                }
                Ok(Some(Next::RoundOver)) => self.ask(Report::Harvest),
                Ok(None) => return,
                Err(e) => return self.breaks(&format_args!("cannot encode memory: {e}")),
            }
            self.note_encoded();
        }
    }

    /// Remember what an epoch cost that has just been encoded.
    fn note_encoded(&mut self) {
        let Some(encoded) = self.outgoing.take_encoded() else { return };
        self.task.history.lock().encoded(self.task.primary.term(), &encoded);
        if let Some((number, _)) = self.blackhole
            && let Some(end) = self.ends.pop_front_if(|end| end.epoch == encoded.epoch)
        {
            let ack = blackhole::ack(end, encoded.epoch);
            self.task.history.lock().acknowledged(ack.term, ack.epoch);
            self.inputs.push_back(Input::Received(number, ack));
        }
    }

    pub(super) fn dial(&mut self) {
        if self.broken == Some(self.task.primary.term()) {
            return;
        }
        if self.task.manner.blackhole.is_some() {
            self.connections += 1;
            return self.inputs.push_back(Input::Connected(Number(self.connections)));
        }
        match &self.task.way.peer {
            Some(path) => match connected(path) {
                Ok(fd) => self.connected(Descriptors::accepted(fd, None)),
                Err(e) => log::info!("replication: cannot connect to {}: {e}", path.display()),
            },
            None => (self.report)(Report::Connect),
        }
    }

    /// There is a connection, which the state machine may want by now, or not any more.
    pub(super) fn connected(&mut self, descriptors: Descriptors) {
        if self.broken == Some(self.task.primary.term()) {
            return;
        }
        let mut connection = match self.task.way.security.link(descriptors, Instant::now()) {
            Ok(connection) => connection,
            Err(e) => return log::error!("replication: {}", Error::generic(&e)),
        };
        match self.task.offer.encode() {
            Ok(offer) => connection.send(offer),
            Err(e) => return log::error!("replication: {e}"),
        }
        self.connections += 1;
        let number = Number(self.connections);
        self.offered = Some((number, connection));
        self.inputs.push_back(Input::Connected(number));
    }

    pub(super) fn disconnect(&mut self) {
        (self.connection, self.blackhole) = (None, None);
        self.ends.clear();
        self.reader = Incoming::default();
        if self.first_copy.take().is_some() {
            self.leave_disks();
        }
    }

    /// The connection has ended by itself, or carries nonsense.
    pub(super) fn lost(&mut self, why: &dyn std::fmt::Display) {
        if let Some(number) = self.current() {
            match &self.connection {
                Some((_, connection)) => log::info!("replication: {}: {why}", connection.peer()),
                None => log::info!("replication: {why}"),
            }
            self.inputs.push_back(Input::Closed(number));
            self.disconnect();
        }
    }

    /// Whether the backup's process has ended. What it has sent comes first.
    pub(super) fn look_for_backup(&mut self) {
        if self.connection.is_none() && self.backup.as_mut().is_some_and(Watched::tells_end) {
            self.inputs.push_back(Input::PeerGone);
        }
    }

    /// The connection in use.
    pub(super) fn current(&self) -> Option<Number> {
        let nowhere = self.blackhole.map(|(number, _)| number);
        self.connection.as_ref().map(|(number, _)| *number).or(nowhere)
    }

    pub(super) fn read(&mut self) {
        let Some((number, connection)) = &mut self.connection else { return };
        let number = *number;
        for _ in 0..READS {
            match connection.receive(Instant::now(), &mut self.reader.0) {
                Ok(0) => return,
                Ok(_) => self.inputs.push_back(Input::Heard(number)),
                Err(e) => return self.lost(&Error::generic(&e)),
            }
            let mut at = 0;
            loop {
                let rest = self.reader.0.get(at..).unwrap_or_default();
                if let Some((aside, length)) = offer::read_aside(rest) {
                    at += length;
                    match aside {
                        Aside::Reason(why) => {
                            log::warn!("replication: the backup says: {why}");
                            self.reason = Some(why);
                        }
                        Aside::Process(said) => {
                            let host = &self.task.offer.host;
                            let own = host.process.as_ref();
                            let found = process::find(connection, own, said.as_ref());
                            if let (Err(why), true) = (&found, process::is_needed(&host.arbiter)) {
                                self.reason = Some(process::refusal(why));
                                let term = self.task.primary.term();
                                self.inputs.push_back(Input::Received(number, refused(term)));
                            }
                            self.backup = found.ok();
                        }
                    }
                    continue;
                }
                match wire::decode(rest) {
                    Ok((Frame { message: Message::Piece { disk, piece, hash }, .. }, length)) => {
                        at += length;
                        if let Some(disks) = &self.task.disks {
                            disks.ask(Work::Answer { disk, piece, hash });
                        }
                    }
                    Ok((frame, length)) => {
                        at += length;
                        if frame.message == Message::Ack {
                            self.task.history.lock().acknowledged(frame.term, frame.epoch);
                        }
                        self.inputs.push_back(Input::Received(number, frame));
                    }
                    Err(wire::WireError::Truncated) => break,
                    // Not all of it has come.
                    Err(_) if offer::may_be_aside(rest) => break,
                    Err(e) => return self.lost(&e),
                }
            }
            self.reader.0.drain(..at);
        }
    }

    /// Encode and send as much as the connection takes.
    pub(super) fn pump(&mut self) {
        if self.blackhole.is_some() {
            self.drop_some();
            return;
        }
        let until = Instant::now() + SLICE;
        loop {
            let Some((_, connection)) = &mut self.connection else { return };
            if connection.queued() >= HIGH_WATER || Instant::now() >= until {
                break;
            }
            match self.outgoing.next() {
                Ok(Some(Next::Bytes(bytes))) => connection.send(bytes),
                Ok(Some(Next::RoundOver)) => self.ask(Report::Harvest),
                Ok(None) => break,
                Err(e) => return self.breaks(&format_args!("cannot send memory: {e}")),
            }
            self.note_encoded();
        }
        if let Some((_, connection)) = &mut self.connection
            && let Err(e) = connection.flush()
        {
            // What the backup has said last counts.
            self.read();
            self.lost(&Error::generic(&e));
        }
    }
}

/// What a backup would say that does not agree.
fn refused(term: Term) -> Frame {
    let message = Message::Refuse(Refusal::Agreement);
    Frame { term, epoch: Epoch::default(), message }
}
