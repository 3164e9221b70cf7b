//! The control queue (virtio 1.3, section 5.1.6.5): queue pairs and offloads.
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::{
    chain::{self, Chain},
    ring::{Broken, Popped, Ring},
};

/// A request of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Receive on this many queue pairs.
    Pairs(u16),
    /// Use exactly these offloads.
    Offloads(u64),
    /// Anything else.
    Unknown,
}

pub(super) struct Control {
    pub(super) ring: Ring,
    chain: Chain,
}

impl Control {
    pub(super) fn new(ring: Ring) -> Self {
        let chain = Chain::with_capacity(ring.size().into());
        Self { ring, chain }
    }

    /// Carry out one command with `obey`, which returns whether it has succeeded. Only one, because
    /// the host can take milliseconds for it, under a lock that all its interfaces share. Returns
    /// true when there may be more.
    pub(super) fn run(&mut self, obey: impl FnOnce(Command) -> bool) -> Result<bool, Broken> {
        self.ring.ignore()?;
        let used = match self.ring.pop(&mut self.chain)? {
            Popped::Nothing => return self.ring.listen(),
            Popped::Malformed => 0,
            Popped::Chain => self.answer(obey),
        };
        self.ring.put_used(0, self.chain.head(), used)?;
        self.ring.publish(1)?;
        Ok(true)
    }

    fn answer(&self, obey: impl FnOnce(Command) -> bool) -> u32 {
        if self.chain.writable().is_empty() {
            // There is no room for an answer, so the driver cannot rely on anything.
            return 0;
        }
        let mut bytes = [0; 2 + 8];
        let n = chain::read(self.ring.memory(), self.chain.readable(), 0, &mut bytes);
        let done = obey(parse(bytes.get(..n).unwrap_or_default()));
        let status = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8;
        chain::write(self.ring.memory(), self.chain.writable(), 0, &[status]) as u32
    }
}

fn parse(bytes: &[u8]) -> Command {
    let Some((&[class, command], data)) = bytes.split_first_chunk() else {
        return Command::Unknown;
    };
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            data.first_chunk().map_or(Command::Unknown, |b| Command::Pairs(u16::from_le_bytes(*b)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => data
            .first_chunk()
            .map_or(Command::Unknown, |b| Command::Offloads(u64::from_le_bytes(*b))),
        _ => Command::Unknown,
    }
}
