//! One client: its input, its output, and the descriptors it sent.
use std::{
    collections::{BTreeMap, VecDeque},
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, recv, recvmsg,
        send, shutdown,
    },
};

use super::ClientId;
use crate::{
    Error, Request,
    request::{Id, answer},
    stream::{Item, Splitter},
};

/// Bytes taken from the kernel at a time; also the bound on the work of one [`Connection::step`].
const CHUNK: usize = 4096;

/// Unread output, in bytes, from which on no more commands are taken: answers wait for the client.
const HIGH_WATER: usize = 64 << 10;

/// Unread output, in bytes, beyond which the client is dropped: events do not wait.
const MAX_OUTPUT: usize = 1 << 20;

/// Most memory, in bytes, for the input and output of all clients together; beyond it the client
/// that uses the most is dropped.
pub const MAX_MEMORY: usize = 16 << 20;

/// Most descriptors that the kernel sends with one message (`SCM_MAX_FD`).
const MAX_SENT: usize = 253;

/// Most descriptors kept for a client, one per message.
const MAX_FDS: usize = 8;

/// The client is lost: it hung up, or does not read.
#[derive(Debug, thiserror::Error)]
pub enum Gone {
    #[error("it has hung up")]
    HungUp,
    #[error("it has left more than {MAX_OUTPUT} bytes unread")]
    Overflow,
    #[error("all clients together need more than {MAX_MEMORY} bytes, and this one needs the most")]
    TooMuch,
    #[error(transparent)]
    Io(#[from] Errno),
}

pub struct Connection {
    pub id: ClientId,
    /// It is in the server's queue of connections with work.
    pub queued: bool,
    fd: OwnedFd,
    splitter: Splitter,
    /// Bytes received, and how many of them were processed.
    chunk: Vec<u8>,
    used: usize,
    /// Total bytes received.
    received: u64,
    /// The kernel may have more input.
    readable: bool,
    /// The client will send no more.
    ended: bool,
    /// A request has not been answered yet.
    busy: bool,
    output: VecDeque<u8>,
    /// Offset in the stream at which the last message ended.
    taken: u64,
    /// The last descriptor of each receive, with the stream offset of the end of the bytes that it
    /// came with.
    fds: VecDeque<(u64, OwnedFd)>,
    /// Descriptors that it has named; closed with the connection.
    pub named: BTreeMap<String, OwnedFd>,
    /// Bytes of memory that the server has accounted to it.
    pub counted: usize,
}

impl Connection {
    pub fn new(id: ClientId, fd: OwnedFd) -> Self {
        Self {
            id,
            queued: false,
            fd,
            splitter: Splitter::new(),
            chunk: Vec::new(),
            used: 0,
            received: 0,
            readable: true,
            ended: false,
            busy: false,
            output: VecDeque::new(),
            taken: 0,
            fds: VecDeque::new(),
            named: BTreeMap::new(),
            counted: 0,
        }
    }

    /// Bytes of memory used by its input and output.
    pub fn memory(&self) -> usize {
        self.splitter.memory() + self.chunk.capacity() + self.output.capacity()
    }

    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Note that the kernel has input.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// Whether [`Connection::step`] has work.
    pub fn has_work(&self) -> bool {
        let input = self.used < self.chunk.len() || (self.readable && !self.ended);
        input && !self.busy && self.output.len() < HIGH_WATER
    }

    /// Whether all its requests were answered and it sends no more.
    pub fn finished(&self) -> bool {
        self.ended && !self.busy && self.output.is_empty() && self.used == self.chunk.len()
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// One bounded piece of work: at most one receive and one request, which then waits for
    /// [`Connection::answer`].
    pub fn step(&mut self) -> Result<Option<(Request, Id)>, Gone> {
        if !self.has_work() || (self.used == self.chunk.len() && !self.receive()?) {
            return Ok(None);
        }
        let (used, item) = self.splitter.read(self.chunk.get(self.used..).unwrap_or_default());
        self.used += used;
        if item.is_some() {
            // Descriptors from before the end of the last message belonged to that message, and
            // were not used.
            self.fds.retain(|(end, _)| *end > self.taken);
            // The line end belongs to the message.
            let rest = self.chunk.get(self.used..).unwrap_or_default().trim_ascii_start();
            self.taken = self.received.saturating_sub(rest.len() as u64);
        }
        let (request, id) = match item {
            None => return Ok(None),
            Some(Item::Malformed(wrong)) => (Err(Error::text(wrong)), None),
            Some(Item::Object(text)) => Request::parse(&text),
        };
        match request {
            Ok(request) => {
                self.busy = true;
                Ok(Some((request, id)))
            }
            Err(error) => {
                self.queue(&answer(Err(error), &id))?;
                Ok(None)
            }
        }
    }

    /// Receive; returns whether bytes came.
    fn receive(&mut self) -> Result<bool, Gone> {
        self.chunk.resize(CHUNK, 0);
        self.used = CHUNK;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SENT))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let slices = &mut [IoSliceMut::new(&mut self.chunk)];
        let length = match recvmsg(&self.fd, slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message.bytes,
            Err(Errno::INTR) => return Ok(false),
            Err(Errno::AGAIN) => {
                self.readable = false;
                // Free the buffer: there may be many idle clients.
                (self.chunk, self.used) = (Vec::new(), 0);
                return Ok(false);
            }
            Err(Errno::CONNRESET) => return Err(Gone::HungUp),
            Err(e) => return Err(e.into()),
        };
        self.ended |= length == 0;
        self.chunk.truncate(length);
        self.used = 0;
        self.received = self.received.saturating_add(length as u64);
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        // All but the last one are closed.
        self.fds.extend(fds.flatten().last().map(|fd| (self.received, fd)));
        if self.fds.len() > MAX_FDS {
            self.fds.pop_front();
        }
        Ok(length > 0)
    }

    /// The descriptor that came with the current request, or after the previous one; the last one
    /// of a message with several.
    pub fn take_fd(&mut self) -> Option<OwnedFd> {
        Some(self.fds.pop_front()?.1)
    }

    /// Answer the current request.
    pub fn answer(&mut self, line: &[u8]) -> Result<(), Gone> {
        self.busy = false;
        self.queue(line)
    }

    /// Send `line`, as far as possible at once.
    pub fn queue(&mut self, line: &[u8]) -> Result<(), Gone> {
        self.hold(line)?;
        self.flush()
    }

    /// Send `line` with the next output.
    pub fn hold(&mut self, line: &[u8]) -> Result<(), Gone> {
        if self.output.len() > MAX_OUTPUT {
            return Err(Gone::Overflow);
        }
        self.output.extend(line);
        Ok(())
    }

    /// Send as much as the kernel accepts.
    pub fn flush(&mut self) -> Result<(), Gone> {
        // In one piece: some clients take the bytes of one read for one message and its answer.
        while let front @ [_, ..] = &*self.output.make_contiguous() {
            match send(&self.fd, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Gone::HungUp),
                Err(e) => return Err(e.into()),
            }
        }
        if self.output.capacity() > HIGH_WATER {
            self.output = VecDeque::new();
        }
        Ok(())
    }

    /// Close the connection. Unread input would turn the end of the stream into a reset.
    pub fn hang_up(self) {
        let mut scrap = [0; CHUNK];
        for _ in 0..HIGH_WATER / CHUNK {
            if !recv(&self.fd, &mut scrap[..], RecvFlags::DONTWAIT).is_ok_and(|(_, n)| n > 0) {
                break;
            }
        }
        // An error here means that the peer was faster.
        let _ = shutdown(&self.fd, Shutdown::Both);
    }
}
