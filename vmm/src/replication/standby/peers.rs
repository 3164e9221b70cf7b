//! The connections of a backup, and what arrives over them.
use std::time::Instant;

use config::Description;
use replication::{
    Backup, Connection as Number, Epoch, Frame, Identity, Input, Mark, Message, Rules, Settings,
    Term,
    backup::State,
    contents::{Bounds, Event, Reader},
};
use rustix::net::{SocketFlags, acceptfrom_with};

use super::super::{
    READS, SLICE,
    keeper::Work,
    offer::{self, Offer},
    process::{self, Watched},
    received::{SECTIONS, written},
    settings,
};
use super::{Accepted, Beats, Builder, Building, LONGEST_EPOCH, PEERS, Peer, Standby, Tell};
use transport::Descriptors;

impl<B: Builder, T: Fn(Tell)> Standby<B, T> {
    pub(super) fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok((fd, from)) = acceptfrom_with(&self.task.listener, flags) else { return };
        self.add(Descriptors::accepted(fd, from));
    }

    /// Somebody has connected.
    pub(super) fn add(&mut self, descriptors: Descriptors) {
        let connection = match self.task.security.link(descriptors, Instant::now()) {
            Ok(connection) => connection,
            Err(e) => return log::warn!("replication: {}", qmp::Error::generic(&e)),
        };
        self.connections += 1;
        let number = Number(self.connections);
        self.make_room();
        self.peers.push(Peer {
            number,
            connection,
            bytes: Vec::new(),
            reader: None,
            settings: None,
            process: None,
            came: Instant::now(),
            beats: Beats::default(),
        });
    }

    /// Close a connection if there are too many: of those that have not shown that they belong to a
    /// primary, the one that has waited longest, and of the others only if there is none.
    fn make_room(&mut self) {
        if self.peers.len() < PEERS {
            return;
        }
        let waiting = || self.peers.iter().filter(|peer| Some(peer.number) != self.current);
        let stranger = waiting().find(|peer| peer.settings.is_none());
        self.close(stranger.or_else(|| waiting().next()).map(|peer| peer.number));
    }

    /// Close what has not shown in time that it belongs to a primary.
    pub(super) fn close_strangers(&mut self) {
        self.peers.retain(|peer| peer.stays_until().is_none_or(|until| until > Instant::now()));
    }

    pub(super) fn close(&mut self, number: Option<Number>) {
        self.peers.retain(|peer| Some(peer.number) != number);
        self.current = self.current.filter(|current| Some(*current) != number);
    }

    /// Whether this connection is read. While the machine is being built in memory, nobody else may
    /// begin to fill that; and while memory is put back, what would change it waits.
    pub(super) fn reads(&self, number: Number) -> bool {
        let alone = matches!(self.building, Building::Machine | Building::Taking(_));
        match self.current == Some(number) {
            true => self.postponed.is_none() && self.kept.has_room(),
            false => !alone,
        }
    }

    /// The primary of this connection may send epochs.
    pub(super) fn accepted(&mut self, number: Number, term: Term, last: Epoch) {
        let filling = self.backup.as_ref().is_some_and(|b| b.state() == State::Syncing);
        self.accepted = Some(Accepted { number, term, last, filling });
        self.current = Some(number);
        let Some(peer) = self.peer(number) else { return };
        let (process, beats) = (peer.process.take(), std::mem::take(&mut peer.beats));
        self.primary = process;
        self.beside.set_key(beats.key);
        if let Some(backup) = &mut self.backup {
            backup.set_heartbeat(beats.heartbeat);
        }
        self.coming.clear();
    }

    pub(super) fn read(&mut self) {
        for number in self.peers.iter().map(|peer| peer.number).collect::<Vec<_>>() {
            // Timers must not wait for a peer that never stops sending.
            let until = Instant::now() + SLICE;
            (0..READS)
                .all(|_| self.reads(number) && self.read_some(number) && Instant::now() < until);
        }
    }

    /// Whether the primary's process has ended. What it has sent comes first.
    pub(super) fn look_for_primary(&mut self) {
        if self.current.is_none() && self.primary.as_mut().is_some_and(Watched::tells_end) {
            self.inputs.push_back(Input::PeerGone);
            // It will not connect again.
            self.builds_at = self.builds_at.map(|_| Instant::now());
        }
    }

    /// Take signs of life that come by the second path.
    pub(super) fn listen_beside(&mut self) {
        let Some(backup) = &self.backup else { return };
        if self.beside.receive(&backup.status()) {
            self.heard = Instant::now();
            self.inputs.push_back(Input::HeardBeside);
        }
    }

    pub(super) fn peer(&mut self, number: Number) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.number == number)
    }

    /// Read some of what a peer has sent; whether there may be more.
    pub(super) fn read_some(&mut self, number: Number) -> bool {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let read = self.read_into(number, &mut buffer);
        self.buffer = buffer;
        read.map_err(|why| self.refuse(number, &why)).unwrap_or(false)
    }

    fn read_into(&mut self, number: Number, buffer: &mut Vec<u8>) -> Result<bool, String> {
        let Some(peer) = self.peer(number) else { return Ok(false) };
        if peer.reader.is_some() && !peer.bytes.is_empty() {
            let rest = std::mem::take(&mut peer.bytes);
            return self.take_bytes(number, &rest).map(|()| true);
        }
        match peer.connection.receive(Instant::now(), buffer) {
            Ok(0) => Ok(false),
            Ok(_) => {
                self.heard = Instant::now();
                self.take_bytes(number, buffer).map(|()| true)
            }
            Err(e) => {
                self.lost(number, &qmp::Error::generic(&e).to_string());
                Ok(false)
            }
        }
    }

    /// A connection carries what is not valid.
    fn refuse(&mut self, number: Number, why: &str) {
        if let Some(peer) = self.peer(number) {
            peer.connection.send(offer::reason(why));
            // It may have ended.
            let _ = peer.connection.flush();
        }
        self.lost(number, why);
    }

    /// A connection has ended, or carries nonsense.
    pub(super) fn lost(&mut self, number: Number, why: &str) {
        let name = self.peer(number).map(|peer| peer.connection.peer()).unwrap_or_default();
        log::info!("replication: {name}: {why}");
        self.close(Some(number));
        self.inputs.push_back(Input::Closed(number));
        self.take_inputs();
    }

    pub(super) fn take_bytes(&mut self, number: Number, bytes: &[u8]) -> Result<(), String> {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.number == number) else {
            return Ok(());
        };
        let rest;
        let (mut reader, bytes) = match peer.reader.take() {
            Some(reader) => (reader, bytes),
            None => {
                peer.bytes.extend_from_slice(bytes);
                let offer = Offer::decode(&peer.bytes);
                match offer.map_err(|e| qmp::Error::generic(&e).to_string())? {
                    None => return Ok(()),
                    Some((offer, length)) => {
                        rest = peer.bytes.split_off(length);
                        peer.bytes = Vec::new();
                        let own = self.task.process.clone();
                        let said = offer.host.process.as_ref();
                        let process = process::find(&peer.connection, own.as_ref(), said);
                        let needed = process::is_needed(&self.task.arbiter);
                        let unknown = process.as_ref().err().filter(|_| needed);
                        let unknown = unknown.map(process::refusal);
                        let heartbeat = settings::heartbeat(offer.heartbeat, offer.timeout);
                        let beats = Beats { heartbeat, key: offer.key.clone() };
                        let (reader, settings, differs) = self.offered(offer, unknown)?;
                        if let Some(peer) = self.peer(number) {
                            peer.connection.send(offer::process(own.as_ref()));
                            (peer.settings, peer.process) = (Some(settings), process.ok());
                            peer.beats = beats;
                            if let Some(why) = &differs {
                                peer.connection.send(offer::reason(why));
                            }
                        }
                        (reader, &rest[..])
                    }
                }
            }
        };
        let read = self.read_frames(number, &mut reader, bytes);
        if let Some(peer) = self.peer(number) {
            peer.reader = Some(reader);
        }
        read
    }

    /// A primary offers a machine, which is refused if it `differs`.
    fn offered(
        &mut self,
        offer: Offer,
        mut differs: Option<String>,
    ) -> Result<(Reader, Settings, Option<String>), String> {
        let Offer { timeout, disks, host, config, .. } = offer;
        let description =
            Description::try_from(&config).map_err(|e| qmp::Error::generic(&e).to_string())?;
        let size = description.config.memory.size.bytes();
        if !self.is_offered(&config) {
            if !self.listens() {
                return Err("another machine is offered than the one that is here".into());
            }
            (self.offered, self.memory, self.filled) = (None, None, false);
            differs = differs.or_else(|| host.differs(&self.task.arbiter));
            if differs.is_none() {
                self.disks = disks;
                let opened = self.open_images(&description);
                let guest = Some((host.cpu, host.tsc));
                match opened.and_then(|()| self.builder.room(description, guest)) {
                    Ok(memory) => (self.offered, self.memory) = (Some(config), Some(memory)),
                    Err(why) => differs = Some(why),
                }
            }
        }
        if let Some(why) = &differs {
            log::warn!("replication: the machine is refused: {why}");
        }
        let runs_here = self.memory.is_some() && differs.is_none();
        let settings = settings::of_backup(&self.task.arbiter, timeout, runs_here);
        let bounds = Bounds {
            ram: self.memory.iter().map(|_| 0..size).collect(),
            disks: self.kept.sizes(),
            sections: SECTIONS.map(str::to_owned).to_vec(),
            max_epoch: if runs_here { size.max(LONGEST_EPOCH) } else { LONGEST_EPOCH },
        };
        Ok((Reader::new(bounds), settings, differs))
    }

    /// Whether no primary was accepted yet.
    pub(super) fn listens(&self) -> bool {
        self.backup.as_ref().is_none_or(|backup| backup.state() == State::Listening)
    }

    pub(super) fn read_frames(
        &mut self,
        number: Number,
        reader: &mut Reader,
        mut bytes: &[u8],
    ) -> Result<(), String> {
        self.inputs.push_back(Input::Heard(number));
        while let Some(event) = reader.next(&mut bytes).map_err(|e| e.to_string())? {
            if let Event::Message(frame) = event {
                if let Message::Compare { disk, piece } = frame.message {
                    self.compare(number, disk, piece)?;
                    continue;
                }
                self.greet(number, frame);
                self.inputs.push_back(Input::Received(number, frame));
                // What follows may depend on it.
                self.take_inputs();
                if let Some(Accepted { term, last, filling, .. }) =
                    self.accepted.take_if(|accepted| accepted.number == number)
                {
                    reader.accept(term, last, filling);
                }
                if self.postponed.is_some() && self.current == Some(number) {
                    if let Some(peer) = self.peer(number) {
                        peer.bytes = bytes.to_vec();
                    }
                    return Ok(());
                }
                if let Message::End { .. } = frame.message {
                    // What was not to be held.
                    self.coming.clear();
                }
                if self.peer(number).is_none() {
                    return Ok(());
                }
                continue;
            }
            let filling = self.backup.as_ref().is_some_and(|b| b.state() == State::Syncing);
            if let Event::Disk(write) = &event
                && filling
            {
                self.kept.ask(Work::Change(written(write)));
                continue;
            }
            let memory = self.memory.as_ref().filter(|_| filling);
            self.coming.take(&event, memory).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// The first greeting that is accepted says which domain this is the backup of.
    pub(super) fn greet(&mut self, number: Number, frame: Frame) {
        let settings = self.peer(number).and_then(|peer| peer.settings);
        let (Message::Hello(hello), Some(settings)) = (frame.message, settings) else { return };
        if !self.listens() {
            return;
        }
        self.settings = Some(settings);
        // Images of another guest are refused.
        let (lineage, word) =
            self.kept.bound().unwrap_or((hello.lineage, Mark::Free { term: Term(0) }));
        self.lineage = lineage;
        self.bind_images();
        let me = Identity { lineage, incarnation: self.task.incarnation };
        let (backup, outputs) = Backup::new(me, word, settings, Rules::ALL);
        self.backup = Some(backup);
        self.task.status.lock().lineage = Some(self.lineage.to_string());
        outputs.into_iter().for_each(|output| self.carry_out(output));
    }

    /// Send what can be sent. A connection that takes nothing any more has ended, once what it has
    /// said last is read.
    pub(super) fn flush(&mut self) {
        for number in self.push() {
            (0..READS).all(|_| self.reads(number) && self.read_some(number));
            if self.peer(number).is_some() {
                self.close(Some(number));
                self.inputs.push_back(Input::Closed(number));
            }
        }
    }

    /// Send what can be sent; the connections that take nothing any more.
    pub(super) fn push(&mut self) -> Vec<Number> {
        let ended = self.peers.iter_mut().filter_map(|Peer { number, connection, .. }| {
            connection.flush().is_err().then_some(*number)
        });
        ended.collect()
    }
}
