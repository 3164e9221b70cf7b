//! What a primary has still to send, in order: a little of it is encoded whenever the connection
//! takes more, so that memory stays bounded and signs of life are not late.
use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use machine::{
    Memory, Pages,
    disk::{Contents, Logged, Taken},
    memory::{
        image::{self, PAGE_SIZE},
        staging,
    },
};
use qmp::schema::SyncProgress;
use replication::{
    Epoch, Term,
    contents::{self, Encoder, Operation, PAGE, Write},
};

use super::{history::Encoded, outside::OUTSIDE};

/// The section of a machine: its configuration and its state, as a stream.
pub const MACHINE: &str = "machine";
/// Most pages that are encoded at once.
const AT_ONCE: usize = 256;

/// An epoch that was captured and is not acknowledged yet.
pub struct Staged {
    /// Its number.
    pub epoch: Epoch,
    /// What has changed in memory.
    pub pages: Pages,
    /// The machine.
    pub state: Vec<u8>,
    /// What is known of the outside.
    pub outside: Vec<u8>,
    /// What was written to the disks.
    pub writes: Option<Taken>,
}

enum Item {
    Frame(Vec<u8>),
    /// Guest memory, of a guest that runs.
    Round {
        epoch: Epoch,
        pieces: VecDeque<Range<u64>>,
        begun: bool,
    },
    RoundOver,
    /// Of a disk.
    Piece {
        epoch: Epoch,
        disk: u16,
        offset: u64,
        data: Vec<u8>,
    },
    Epoch {
        staged: Arc<Staged>,
        /// The next piece, and how much of it was sent.
        piece: usize,
        offset: usize,
        begun: bool,
    },
    /// The rest of an epoch, from this write on, of which so much was sent.
    Writes {
        staged: Arc<Staged>,
        write: usize,
        offset: usize,
    },
}

/// The queue.
pub struct Outgoing {
    term: Term,
    memory: Memory,
    encoder: Encoder,
    items: VecDeque<Item>,
    buffer: Vec<u8>,
    rounds: SyncProgress,
    /// How long the epoch that is being encoded has taken so far, and its bytes.
    spent: (Duration, u64),
    /// The last one that was.
    encoded: Option<Encoded>,
}

/// What [`Outgoing::next`] gives.
pub enum Next {
    /// Bytes to be sent.
    Bytes(Vec<u8>),
    /// A round of the first copy has been sent.
    RoundOver,
}

impl Outgoing {
    /// An empty queue for a machine with this memory.
    pub fn new(memory: Memory, compress: bool) -> Self {
        Self {
            term: Term(0),
            memory,
            encoder: Encoder::new(compress, contents::CACHE),
            items: VecDeque::new(),
            buffer: vec![0; AT_ONCE * PAGE],
            rounds: SyncProgress::default(),
            spent: Default::default(),
            encoded: None,
        }
    }

    /// A new connection, in `term`: nothing was sent on it.
    pub fn restart(&mut self, term: Term) {
        self.term = term;
        self.encoder.forget();
        self.items.clear();
        self.rounds = SyncProgress::default();
        self.encoded = None;
    }

    /// How much of the rounds was encoded, in this connection.
    pub const fn rounds(&self) -> SyncProgress {
        self.rounds
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The epoch that was encoded since the last call, if one was.
    pub fn take_encoded(&mut self) -> Option<Encoded> {
        self.encoded.take()
    }

    /// Send a message.
    pub fn frame(&mut self, bytes: Vec<u8>) {
        self.items.push_back(Item::Frame(bytes));
    }

    /// Send these ranges of guest memory.
    pub fn round(&mut self, epoch: Epoch, ranges: Vec<Range<u64>>) {
        self.rounds.total += staging::bytes(&ranges);
        self.items.push_back(Item::Round { epoch, pieces: ranges.into(), begun: false });
    }

    /// Send a piece of a disk, before the first epoch.
    pub fn piece(&mut self, epoch: Epoch, disk: u16, offset: u64, data: Vec<u8>) {
        self.items.push_back(Item::Piece { epoch, disk, offset, data });
    }

    /// Send an epoch.
    pub fn epoch(&mut self, staged: Arc<Staged>) {
        self.items.push_back(Item::Epoch { staged, piece: 0, offset: 0, begun: false });
    }

    /// The next bytes, in order; `None` when nothing is left.
    ///
    /// # Errors
    /// When guest memory cannot be read, or the state of the machine is too long.
    pub fn next(&mut self) -> io::Result<Option<Next>> {
        let Some(item) = self.items.pop_front() else { return Ok(None) };
        let mut to = Vec::new();
        let next = match item {
            Item::Frame(bytes) => Next::Bytes(bytes),
            Item::Round { epoch, mut pieces, begun } => {
                if !begun {
                    let pages = pieces.iter().map(|range| (range.end - range.start) / PAGE_SIZE);
                    self.encoder.begin((self.term, epoch), pages.sum(), now(), &mut to);
                }
                self.round_piece(&mut pieces, &mut to)?;
                self.items.push_front(match pieces.is_empty() {
                    true => Item::RoundOver,
                    false => Item::Round { epoch, pieces, begun: true },
                });
                Next::Bytes(to)
            }
            Item::RoundOver => Next::RoundOver,
            Item::Piece { epoch, disk, offset, data } => {
                self.encoder.begin((self.term, epoch), 0, now(), &mut to);
                let (operation, length) = (Operation::Write, data.len() as u64);
                let write = Write { disk, operation, offset, length, data: &data };
                self.encoder.disk(&write, &mut to);
                Next::Bytes(to)
            }
            Item::Epoch { staged, mut piece, mut offset, begun } => {
                let began = Instant::now();
                if !begun {
                    self.spent = Default::default();
                    let pages = staging::bytes(&staged.pages.ranges()) / PAGE_SIZE;
                    self.encoder.begin((self.term, staged.epoch), pages, now(), &mut to);
                }
                let part = match &staged.pages {
                    Pages::Staged(staging) => staging.piece(piece)?.map(|(at, bytes)| {
                        let rest = bytes.get(offset..).unwrap_or_default();
                        let part = rest.get(..rest.len().min(AT_ONCE * PAGE)).unwrap_or_default();
                        (at, part, part.len() == rest.len())
                    }),
                    Pages::InPlace(ranges) => match ranges.get(piece) {
                        Some(range) => {
                            let at = range.start + offset as u64;
                            let rest = usize::try_from(range.end - at).unwrap_or(usize::MAX);
                            let length = rest.min(self.buffer.len());
                            let part =
                                self.buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
                            image::read(&self.memory, at, part)?;
                            Some((range.start, &*part, length == rest))
                        }
                        None => None,
                    },
                };
                match part {
                    Some((at, part, is_last)) => {
                        encode(&mut self.encoder, at + offset as u64, part, &mut to);
                        offset += part.len();
                        if is_last {
                            (piece, offset) = (piece + 1, 0);
                        }
                        self.items.push_front(Item::Epoch { staged, piece, offset, begun: true });
                    }
                    None => self.items.push_front(Item::Writes { staged, write: 0, offset: 0 }),
                }
                self.spend(began, to.len());
                Next::Bytes(to)
            }
            Item::Writes { staged, mut write, mut offset } => {
                let (began, epoch) = (Instant::now(), staged.epoch);
                let logged = staged.writes.as_ref().and_then(|writes| writes.get(write));
                if let Some(logged) = logged {
                    match self.write(logged, offset, &mut to) {
                        Some(next) => offset = next,
                        None => (write, offset) = (write + 1, 0),
                    }
                    self.items.push_front(Item::Writes { staged, write, offset });
                    self.spend(began, to.len());
                } else {
                    for (name, bytes) in [(MACHINE, &staged.state), (OUTSIDE, &staged.outside)] {
                        let section = self.encoder.section(name, bytes, &mut to);
                        section.map_err(io::Error::other)?;
                    }
                    self.encoder.close(&mut to);
                    self.spend(began, to.len());
                    let ((time, bytes), sent) = (self.spent, self.encoder.counters());
                    self.encoded = Some(Encoded { epoch, time, bytes, sent });
                }
                Next::Bytes(to)
            }
        };
        Ok(Some(next))
    }

    /// A part of an epoch was encoded since `began`, which is so many bytes.
    fn spend(&mut self, began: Instant, bytes: usize) {
        self.spent.0 += began.elapsed();
        self.spent.1 += bytes as u64;
    }

    /// Encode a little of what was written, from `from` on; where to go on, unless that was all.
    fn write(&mut self, logged: &Logged, from: usize, to: &mut Vec<u8>) -> Option<usize> {
        let disk = logged.disk;
        match &logged.contents {
            Contents::Zeroes(length) => {
                let (operation, offset, length) = (Operation::Zero, logged.offset, *length);
                if length > 0 {
                    let write = Write { disk, operation, offset, length, data: &[] };
                    self.encoder.disk(&write, to);
                }
                None
            }
            Contents::Bytes(copied) => {
                let rest = copied.bytes().get(from..).unwrap_or_default();
                let data = rest.get(..rest.len().min(contents::PIECE)).unwrap_or_default();
                let (offset, length) = (logged.offset + from as u64, data.len() as u64);
                if length > 0 {
                    let operation = Operation::Write;
                    self.encoder.disk(&Write { disk, operation, offset, length, data }, to);
                }
                (data.len() < rest.len()).then_some(from + data.len())
            }
        }
    }

    /// Encode a little of the first of `pieces`, and take that away.
    fn round_piece(
        &mut self,
        pieces: &mut VecDeque<Range<u64>>,
        to: &mut Vec<u8>,
    ) -> io::Result<()> {
        let Some(range) = pieces.front_mut() else { return Ok(()) };
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let length = length.min(self.buffer.len());
        let buffer = self.buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidInput)?;
        image::read(&self.memory, range.start, buffer)?;
        encode(&mut self.encoder, range.start, buffer, to);
        range.start += length as u64;
        self.rounds.done += length as u64;
        if range.is_empty() {
            pieces.pop_front();
        }
        Ok(())
    }
}

fn encode(encoder: &mut Encoder, address: u64, bytes: &[u8], to: &mut Vec<u8>) {
    let (pages, _) = bytes.as_chunks::<PAGE>();
    for (page, address) in pages.iter().zip((address..).step_by(PAGE)) {
        encoder.page(address, page, to);
    }
}

/// The host's date, in ns since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
