//! Frames as events: the receiving side.
use std::ops::Range;

use crc32fast::Hasher;

use super::{
    Bounds, Counts, LONGEST_NAME, Operation, PAGE, PIECE, Page, Refused,
    frame::{
        self, BEGIN, Body, CRC, DELTA, DISK, HEADER, NUMBERS, OPTIONAL, PAGES_KIND, SECTION, ZEROS,
    },
    lz4::unpack,
    rounds::Rounds,
};
use crate::{
    identity::{Digest, Epoch, Term},
    message::{Frame, Message},
    wire,
};

/// Something that the guest did to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write<'a> {
    /// The number of the disk.
    pub disk: u16,
    /// What was done.
    pub operation: Operation,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; more than 0.
    pub length: u64,
    /// As long as `length` for [`Operation::Write`], else empty.
    pub data: &'a [u8],
}

/// What has come. Nothing of it is final before [`Event::Close`], except while the receiver is
/// being filled.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// One of the other messages. An [`Message::End`] follows [`Event::Close`] of its epoch.
    Message(Frame),
    /// An epoch begins; or its next round, while the receiver is being filled.
    Begin {
        /// The epoch.
        epoch: Epoch,
        /// The most pages that come.
        pages: u64,
        /// The sender's clock, in ns since 1970: for people.
        wall_time: u64,
    },
    /// New contents of the page at a guest-physical address.
    Page {
        /// The address.
        address: u64,
        /// The contents.
        page: &'a Page,
    },
    /// The page becomes the exclusive or of this, and of what it is when all earlier epochs are
    /// applied.
    Delta {
        /// The guest-physical address.
        address: u64,
        /// The difference.
        difference: &'a Page,
    },
    /// Pages become zero.
    Zeros {
        /// The guest-physical address of the first.
        address: u64,
        /// How many; one or more, all in one piece of memory.
        pages: u64,
    },
    /// A piece of a section. The pieces of one section come in order, with no other section between
    /// them.
    Section {
        /// Its place in [`Bounds::sections`].
        name: usize,
        /// The length of the whole section.
        total: u32,
        /// Where the piece belongs.
        offset: u32,
        /// The piece.
        bytes: &'a [u8],
    },
    /// Something that the guest did to a disk. These are in order.
    Disk(Write<'a>),
    /// All of the epoch has come, undamaged.
    Close(Counts),
}

/// An event, with places instead of bytes.
enum Found {
    Message(Frame),
    Begin { epoch: Epoch, pages: u64, wall_time: u64 },
    Page { address: u64, at: Range<usize> },
    Unpacked { address: u64 },
    Delta { address: u64 },
    Zeros { address: u64, pages: u64 },
    Section { name: usize, total: u32, offset: u32, at: Range<usize> },
    Disk { disk: u16, operation: Operation, offset: u64, length: u64, at: Range<usize> },
    Close(Counts),
}

/// A frame of which more is read.
#[derive(Debug, Clone, Copy)]
enum Now {
    /// The beginning or the rest of a frame.
    Frame,
    /// The records of a frame that is complete; the next one is at this place.
    Records(usize),
    /// A frame that is skipped: this many bytes are left of it, its crc not counted.
    Skip(usize),
}

/// Reads what comes from a peer, in pieces of any size. It keeps one frame, and 4 bytes for each
/// page of guest memory: allocated once, whatever the peer sends.
pub struct Reader {
    rounds: Rounds,
    now: Now,
    /// What has come of the frame.
    frame: Vec<u8>,
    skipped: Hasher,
    page: Box<Page>,
    refused: Option<Refused>,
}

impl Reader {
    /// A reader for a new connection; contents are refused until [`Reader::accept`].
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            rounds: Rounds::new(bounds),
            now: Now::Frame,
            frame: Vec::with_capacity(HEADER + frame::LONGEST + CRC),
            skipped: Hasher::new(),
            page: Box::new([0; PAGE]),
            refused: None,
        }
    }

    /// The connection was accepted: contents of the epochs after `last` may come, in this term. With
    /// `filling`, the first of them may have several rounds, and is applied as it comes.
    pub fn accept(&mut self, term: Term, last: Epoch, filling: bool) {
        self.rounds.accept(term, last, filling);
    }

    /// The next event of `input`, which is shortened by what was read. `None` when all of it was,
    /// and more is needed.
    ///
    /// # Errors
    /// When the peer breaks a rule. From then on, each call returns the same error.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Event<'_>>, Refused> {
        if let Some(refused) = self.refused {
            return Err(refused);
        }
        match self.find(input) {
            Ok(found) => Ok(found.and_then(|found| self.event(found))),
            Err(refused) => {
                self.refused = Some(refused);
                Err(refused)
            }
        }
    }

    fn event(&self, found: Found) -> Option<Event<'_>> {
        Some(match found {
            Found::Message(frame) => Event::Message(frame),
            Found::Begin { epoch, pages, wall_time } => Event::Begin { epoch, pages, wall_time },
            Found::Page { address, at } => {
                Event::Page { address, page: self.frame.get(at)?.first_chunk()? }
            }
            Found::Unpacked { address } => Event::Page { address, page: &self.page },
            Found::Delta { address } => Event::Delta { address, difference: &self.page },
            Found::Zeros { address, pages } => Event::Zeros { address, pages },
            Found::Section { name, total, offset, at } => {
                Event::Section { name, total, offset, bytes: self.frame.get(at)? }
            }
            Found::Disk { disk, operation, offset, length, at } => {
                let data = self.frame.get(at)?;
                Event::Disk(Write { disk, operation, offset, length, data })
            }
            Found::Close(counts) => Event::Close(counts),
        })
    }

    fn find(&mut self, input: &mut &[u8]) -> Result<Option<Found>, Refused> {
        loop {
            match self.now {
                Now::Records(at) => {
                    if at + CRC < self.frame.len() {
                        return self.record(at).map(Some);
                    }
                    self.frame.clear();
                    self.now = Now::Frame;
                }
                Now::Skip(left) => {
                    if !self.skip(left, input)? {
                        return Ok(None);
                    }
                }
                Now::Frame => match self.fill(input)? {
                    None => return Ok(None),
                    Some(kind) if kind & OPTIONAL != 0 => {}
                    Some(kind) => {
                        if let Some(found) = self.complete(kind)? {
                            return Ok(Some(found));
                        }
                    }
                },
            }
        }
    }

    /// Read more of the frame; its kind once it is complete, or is to be skipped.
    fn fill(&mut self, input: &mut &[u8]) -> Result<Option<u32>, Refused> {
        self.take(HEADER, input);
        let mut header = Body::new(&self.frame, 0);
        let (Some(kind), Some(length)) = (header.u32(), header.u32()) else { return Ok(None) };
        let is_long = frame::KINDS.contains(&kind) || kind & OPTIONAL != 0;
        let most = if is_long { frame::LONGEST } else { wire::LONGEST - HEADER - CRC };
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > most {
            return Err(Refused::TooLong { kind, length });
        }
        if kind & OPTIONAL != 0 {
            self.skipped = Hasher::new();
            self.skipped.update(&self.frame);
            self.now = Now::Skip(size);
            return Ok(Some(kind));
        }
        let all = HEADER + size + CRC;
        self.take(all, input);
        Ok((self.frame.len() == all).then_some(kind))
    }

    /// Read until the frame has `length` bytes.
    fn take(&mut self, length: usize, input: &mut &[u8]) {
        let missing = length.saturating_sub(self.frame.len()).min(input.len());
        let (taken, rest) = input.split_at(missing);
        self.frame.extend_from_slice(taken);
        *input = rest;
    }

    /// Skip more of an optional frame. Returns whether that was all of it.
    fn skip(&mut self, left: usize, input: &mut &[u8]) -> Result<bool, Refused> {
        let (taken, rest) = input.split_at(left.min(input.len()));
        self.skipped.update(taken);
        *input = rest;
        let left = left - taken.len();
        self.now = Now::Skip(left);
        if left > 0 {
            return Ok(false);
        }
        self.take(HEADER + CRC, input);
        if self.frame.len() < HEADER + CRC {
            return Ok(false);
        }
        let mut header = Body::new(&self.frame, 0);
        let (kind, length) = (header.u32().unwrap_or(0), header.u32().unwrap_or(0));
        let crc = self.skipped.clone().finalize();
        if header.u32() != Some(crc) {
            return Err(Refused::Checksum(kind));
        }
        self.rounds.covers(kind, crc);
        self.rounds.need(length.into())?;
        self.frame.clear();
        self.now = Now::Frame;
        Ok(true)
    }

    /// A frame of a known kind is complete; a message, or the only event of its frame.
    fn complete(&mut self, kind: u32) -> Result<Option<Found>, Refused> {
        if !frame::KINDS.contains(&kind) {
            let (message, _) = wire::decode(&self.frame)?;
            if let Message::End { .. } = message.message {
                self.rounds.end(message.term, message.epoch)?;
            }
            self.frame.clear();
            return Ok(Some(Found::Message(message)));
        }
        let end = self.frame.len() - CRC;
        let crc = crc32fast::hash(self.frame.get(..end).unwrap_or_default());
        if Body::new(&self.frame, end).u32() != Some(crc) {
            return Err(Refused::Checksum(kind));
        }
        let mut body = Body::new(&self.frame, HEADER);
        let numbers = body.u64().zip(body.u64());
        let (term, epoch) = numbers.filter(|_| body.left() > CRC).ok_or(Refused::Body(kind))?;
        self.rounds.check(kind, Term(term), Epoch(epoch))?;
        self.now = Now::Records(HEADER + NUMBERS);
        if kind != BEGIN {
            self.rounds.covers(kind, crc);
            return Ok(None);
        }
        let found = self.begin(Epoch(epoch)).map(Some);
        self.rounds.covers(kind, crc);
        found
    }

    fn begin(&mut self, epoch: Epoch) -> Result<Found, Refused> {
        let mut body = Body::new(&self.frame, HEADER + NUMBERS);
        let fields = (body.u32(), body.u64(), body.u64(), body.left());
        let (Some(serial), Some(pages), Some(wall_time), CRC) = fields else {
            return Err(Refused::Body(BEGIN));
        };
        self.now = Now::Records(body.at());
        self.rounds.begin(epoch, serial, pages)?;
        Ok(Found::Begin { epoch, pages, wall_time })
    }

    /// The record at this place of the frame.
    fn record(&mut self, at: usize) -> Result<Found, Refused> {
        let end = self.frame.len() - CRC;
        let mut body = Body::new(self.frame.get(..end).unwrap_or_default(), at);
        let kind = Body::new(&self.frame, 0).u32().unwrap_or(0);
        let (rounds, unpacked) = (&mut self.rounds, &mut *self.page);
        let found = match kind {
            PAGES_KIND | DELTA => page(&mut body, kind == DELTA, rounds, unpacked),
            ZEROS => zeros(&mut body, rounds),
            SECTION => section(&mut body, rounds),
            DISK => disk(&mut body, rounds),
            _ => close(&mut body, rounds),
        };
        self.now = Now::Records(body.at());
        found.and_then(|found| found.ok_or(Refused::Body(kind)))
    }
}

type Record = Result<Option<Found>, Refused>;

fn page(body: &mut Body<'_>, is_delta: bool, rounds: &mut Rounds, unpacked: &mut Page) -> Record {
    let Some(address) = body.u64() else { return Ok(None) };
    let base = if is_delta { body.u32() } else { None };
    let Some(length) = body.u16().map(usize::from).filter(|length| *length <= PAGE) else {
        return Ok(None);
    };
    let Some((at, bytes)) = body.bytes(length) else { return Ok(None) };
    if is_delta && base.is_none() {
        return Ok(None);
    }
    rounds.pages(address, 1, base)?;
    rounds.need(PAGE as u64)?;
    rounds.count(1, 0);
    if !is_delta && length == PAGE {
        return Ok(Some(Found::Page { address, at }));
    }
    if !unpack(bytes, unpacked) {
        return Err(Refused::Packed(address));
    }
    Ok(Some(if is_delta { Found::Delta { address } } else { Found::Unpacked { address } }))
}

fn zeros(body: &mut Body<'_>, rounds: &mut Rounds) -> Record {
    let Some((address, pages)) = body.u64().zip(body.u64()) else { return Ok(None) };
    rounds.pages(address, pages, None)?;
    rounds.need(0)?;
    rounds.count(0, pages);
    Ok(Some(Found::Zeros { address, pages }))
}

fn section(body: &mut Body<'_>, rounds: &mut Rounds) -> Record {
    let Some(length) = body.u8().map(usize::from) else { return Ok(None) };
    if length > LONGEST_NAME {
        return Err(Refused::SectionName);
    }
    let Some((_, name)) = body.bytes(length) else { return Ok(None) };
    let Some((total, offset)) = body.u32().zip(body.u32()) else { return Ok(None) };
    let Some((at, bytes)) = body.bytes(body.left()).filter(|(_, bytes)| bytes.len() <= PIECE)
    else {
        return Ok(None);
    };
    let name = rounds.section(name, total, offset, bytes.len() as u32)?;
    rounds.need(bytes.len() as u64)?;
    Ok(Some(Found::Section { name, total, offset, at }))
}

fn disk(body: &mut Body<'_>, rounds: &mut Rounds) -> Record {
    let fields = (body.u16(), body.u8(), body.u32(), body.u64(), body.u64());
    let (Some(disk), Some(operation), Some(sequence), Some(offset), Some(length)) = fields else {
        return Ok(None);
    };
    let Some(operation) = Rounds::operation(operation) else { return Ok(None) };
    let data = if operation == Operation::Write { length } else { 0 };
    let Some((at, bytes)) = body.bytes(body.left()).filter(|(_, bytes)| bytes.len() <= PIECE)
    else {
        return Ok(None);
    };
    if bytes.len() as u64 != data {
        return Ok(None);
    }
    rounds.disk(disk, sequence, (offset, length))?;
    rounds.need(data)?;
    Ok(Some(Found::Disk { disk, operation, offset, length, at }))
}

fn close(body: &mut Body<'_>, rounds: &mut Rounds) -> Record {
    let fields = (body.u64(), body.u64(), body.u32(), body.u32(), body.u64(), body.left());
    let (Some(pages), Some(zeros), Some(sections), Some(writes), Some(digest), 0) = fields else {
        return Ok(None);
    };
    let counts = Counts { pages, zeros, sections, writes };
    rounds.close(counts, Digest(digest))?;
    Ok(Some(Found::Close(counts)))
}
