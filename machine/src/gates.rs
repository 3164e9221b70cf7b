//! The gates of a machine's output, all together: of its NICs and its character devices.
use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use devices::backend::{
    char::gated::CharKeeper,
    gate::{Backlog, Marker},
    net::gated::NetKeeper,
};

use crate::{Captured, RunError};

/// The outer sides of all gates, which release output.
pub struct Gates {
    nics: Vec<NetKeeper>,
    consoles: Vec<CharKeeper>,
}

/// Shuts all gates and marks their epochs, while the machine is paused.
pub struct Markers(Vec<Marker>);

impl Captured<'_> {
    /// Put new, open gates in front of all back-ends that output leaves by.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn gates(&mut self) -> Result<(Gates, Markers), RunError> {
        let nics = self.gate_nics()?;
        let outputs = self.machine().outputs.iter().cloned();
        let consoles = outputs.map(CharKeeper::new).collect::<io::Result<Vec<_>>>()?;
        let markers = nics.iter().map(NetKeeper::marker);
        let markers = markers.chain(consoles.iter().map(CharKeeper::marker)).collect();
        Ok((Gates { nics, consoles }, Markers(markers)))
    }
}

impl Markers {
    /// Hold all output from now on.
    pub fn shut(&self) {
        self.0.iter().for_each(Marker::shut);
    }

    /// The checkpoint `epoch` covers all output so far. Epochs ascend.
    pub fn mark(&self, epoch: u64) {
        self.0.iter().for_each(|marker| marker.mark(epoch));
    }
}

impl Gates {
    /// Release, in order, the output that the checkpoints up to and including `epoch` cover. Waits
    /// at most 20 ms for each NIC's interface.
    pub fn release(&mut self, epoch: u64) {
        self.nics.iter_mut().for_each(|nic| nic.release(epoch));
        self.consoles.iter_mut().for_each(|console| console.release(epoch));
    }

    /// Release everything, and hold nothing any more.
    pub fn open(&mut self) {
        self.nics.iter_mut().for_each(NetKeeper::open);
        self.consoles.iter_mut().for_each(CharKeeper::open);
    }

    /// Throw away the network's held frames, which no peer misses for longer than any lost ones.
    pub fn discard_frames(&mut self) {
        self.nics.iter_mut().for_each(NetKeeper::discard);
    }

    /// Throw away everything that is held.
    pub fn discard(&mut self) {
        self.discard_frames();
        self.consoles.iter_mut().for_each(CharKeeper::discard);
    }

    /// What the gates of the character devices hold of checkpoints up to and including `epoch`, in
    /// the machine's order.
    pub fn output(&self, epoch: u64) -> Vec<Vec<u8>> {
        self.consoles.iter().map(|console| console.held(epoch)).collect()
    }

    /// Signal this eventfd whenever one of them holds a first piece that no checkpoint covers.
    pub fn signal(&self, waits: &Arc<OwnedFd>) {
        self.nics.iter().for_each(|nic| nic.signal(waits.clone()));
        self.consoles.iter().for_each(|console| console.signal(waits.clone()));
    }

    /// Whether one of them holds output that no checkpoint covers.
    pub fn wait(&self) -> bool {
        self.nics.iter().any(NetKeeper::waits) || self.consoles.iter().any(CharKeeper::waits)
    }

    /// What all of them hold together, and how long the oldest piece has waited.
    pub fn backlog(&self) -> Backlog {
        let each = self.nics.iter().map(NetKeeper::backlog);
        let each = each.chain(self.consoles.iter().map(CharKeeper::backlog));
        let none = Backlog { bytes: 0, pieces: 0, oldest: Duration::ZERO };
        each.fold(none, |all, one| Backlog {
            bytes: all.bytes + one.bytes,
            pieces: all.pieces + one.pieces,
            oldest: all.oldest.max(one.oldest),
        })
    }
}
