//! Restoring from a stream. Its sender is not trusted: no byte outside guest memory is written, no
//! more is stored than the machine needs, and nothing starts before the end of the stream.
use std::{
    io::{self, BufReader, Read},
    sync::atomic::Ordering,
};

use config::{Description, DescriptionError};
use machine::{Memory, memory::image as ram};
use state::{
    Config, FileError, Frames, SectionError, Sections,
    frame::{Kind, StreamError},
};

use super::{OverrideError, dialogue::GO_LIMIT, memory_file::Progress, send::PIECE};

/// How many times all of memory may be sent: more than the rounds of any sender.
const TIMES: u64 = 64;

/// Why a machine cannot be received from a stream.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum ReceiveError {
    #[error("the stream cannot be restored")]
    Read(#[from] FileError),
    #[error("the stream cannot be restored")]
    Description(#[from] DescriptionError),
    #[error(
        "the stream cannot be restored: it has pages at {at:#x}, {length} bytes, in {size} bytes of memory"
    )]
    Pages { at: u64, length: u64, size: u64 },
    #[error("the stream cannot be restored: it has sent all of memory more than {TIMES} times")]
    Endless,
    #[error("the stream cannot be restored: its second configuration describes another machine")]
    Other,
    #[error("the stream cannot be restored: it is incremental")]
    Incremental,
    #[error("{0}")]
    NoRoom(String),
    #[error("the stream cannot be restored: its Hello message is malformed")]
    Greeting,
    #[error(
        "the stream cannot be restored: its sender supports formats {oldest} to {newest}, and this \
         program none of them"
    )]
    Versions { oldest: u32, newest: u32 },
    #[error("the stream cannot be restored: its Hello message is malformed")]
    Cpu(#[source] SectionError),
    #[error(
        "the machine is still at its source, which has not handed it over within {} seconds of the \
         receiver being ready",
        GO_LIMIT.as_secs()
    )]
    NoGo,
    #[error("the machine is still at its source, which did not hand it over: it sent {said}")]
    NotHandedOver { said: &'static str },
    #[error("the source does not read answers")]
    Deaf(#[source] io::Error),
    #[error("cannot write guest memory")]
    Write(#[source] io::Error),
    #[error("the backup of a replicated machine has ended: {0}")]
    Replica(String),
    #[error(transparent)]
    Override(#[from] OverrideError),
}

impl From<StreamError> for ReceiveError {
    fn from(error: StreamError) -> Self {
        Self::Read(error.into())
    }
}

/// A machine that was received completely.
pub struct Received {
    /// Its configuration at the end of the stream.
    pub config: Config,
    /// Its state.
    pub sections: Sections,
    /// Its memory, filled.
    pub memory: Memory,
}

/// Receive a machine, to the end of the stream. `overrides` changes its configuration to what is
/// wanted here; `allocate` gives its memory, once the configuration is known.
///
/// # Errors
/// The first error found.
pub fn receive(
    from: impl Read,
    overrides: impl Fn(&mut Description) -> Result<(), OverrideError>,
    allocate: impl FnOnce(&Description) -> Result<Memory, ReceiveError>,
    progress: &Progress,
) -> Result<Received, ReceiveError> {
    let mut frames = Frames::begin(BufReader::with_capacity(64 << 10, from))?;
    receive_frames(&mut frames, overrides, allocate, progress)
}

/// Like [`receive`], for a stream whose greeting has been read.
///
/// # Errors
/// As [`receive`].
pub fn receive_frames(
    frames: &mut Frames<impl Read>,
    overrides: impl Fn(&mut Description) -> Result<(), OverrideError>,
    allocate: impl FnOnce(&Description) -> Result<Memory, ReceiveError>,
    progress: &Progress,
) -> Result<Received, ReceiveError> {
    let first = frames.config()?;
    let mut description = Description::try_from(&first)?;
    overrides(&mut description)?;
    let size = first.machine.memory.size;
    progress.total.store(size, Ordering::Relaxed);
    let memory = allocate(&description)?;
    let mut left = size.saturating_mul(TIMES);
    let mut body = Vec::new();
    let zeros = vec![0; PIECE as usize];
    loop {
        let kind = frames.take(&mut body)?;
        let (at, bytes) = match (kind, body.split_first_chunk::<8>()) {
            (Kind::Pages, Some((at, bytes))) => (at, bytes),
            (Kind::Zeros, Some((at, length))) => {
                let length = length.try_into().map_or(u64::MAX, u64::from_le_bytes);
                let zeros = usize::try_from(length).ok().and_then(|length| zeros.get(..length));
                let at = u64::from_le_bytes(*at);
                let zeros = zeros.ok_or(ReceiveError::Pages { at, length, size })?;
                (&at.to_le_bytes(), zeros)
            }
            (Kind::Pages | Kind::Zeros, None) => {
                return Err(ReceiveError::Pages { at: 0, length: 0, size });
            }
            _ => {
                frames.put_back(kind, body);
                break;
            }
        };
        let (at, length) = (u64::from_le_bytes(*at), bytes.len() as u64);
        let pages = at.is_multiple_of(ram::PAGE_SIZE) && length.is_multiple_of(ram::PAGE_SIZE);
        let inside = at.checked_add(length).is_some_and(|end| end <= size);
        if !pages || !inside || length == 0 || length > PIECE {
            return Err(ReceiveError::Pages { at, length, size });
        }
        left = left.checked_sub(length).ok_or(ReceiveError::Endless)?;
        ram::write(&memory, at, bytes).map_err(ReceiveError::Write)?;
        progress.written.fetch_add(length, Ordering::Relaxed);
        progress.done.fetch_max(at + length, Ordering::Relaxed);
    }
    let config = frames.config()?;
    if config.id != first.id || config.machine != first.machine {
        return Err(ReceiveError::Other);
    }
    if config.base.is_some() {
        return Err(ReceiveError::Incremental);
    }
    let sections = frames.sections()?;
    frames.end()?;
    Ok(Received { config, sections, memory })
}

#[cfg(test)]
mod tests;
