//! What a checkpoint holds beside memory, and its way into frames and out of them.
use std::{
    io::{self, Read, Write},
    ops::Range,
    path::PathBuf,
};

use machine::{
    Clock, Machine, MachineState,
    config::{MachineConfig, Occupancy},
    memory::image::PAGE_SIZE,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::stream::{self, Kind, Reader, StreamError, Writer};
use crate::lifecycle::Halt;

/// Most ranges of memory in one incremental save; they are joined rather than exceed it.
pub const RANGES: usize = 1 << 16;

/// First frame: what a machine has to be like before the rest can be poured into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The same in the memory that belongs to it, and in no other.
    pub id: u128,
    /// What it was made from at its start.
    pub machine: MachineConfig,
    /// What is in its slots.
    pub occupied: Occupancy,
    /// Bytes of the disks in the slots; 0 for an empty slot.
    pub disk_sizes: Vec<u64>,
    /// Why its guest cannot go on, if it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub halted: Option<Halt>,
    /// The save that has the rest of its memory, when this one holds changes only.
    pub base: Option<Base>,
}

impl Config {
    /// That of `machine` now. `halted` says why its guest cannot go on.
    pub fn of(machine: &Machine, id: u128, halted: Option<Halt>) -> Self {
        let (config, occupied) = machine.made_of();
        let disk_sizes = machine.disk_sizes();
        Self { id, machine: config.clone(), occupied, disk_sizes, halted, base: None }
    }
}

/// Another save, on which one builds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory, seen from the directory of the one that builds on it.
    pub path: PathBuf,
    /// Its id.
    pub id: u128,
    /// CRC-32 of its state file.
    pub state: u32,
}

/// All of it.
pub struct Content {
    /// What the machine is made of.
    pub config: Config,
    /// Its state but for memory.
    pub state: MachineState,
    /// The ranges of memory that are here and not where the base says; none without a base.
    pub changed: Vec<Range<u64>>,
    /// CRC-32 of each block of 2 MiB of memory.
    pub sums: Vec<u32>,
}

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ContentError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{what} comes where {expected} should be")]
    Order { what: String, expected: &'static str },
    #[error("{what} says something that no machine can be like")]
    Malformed { what: String, source: serde_json::Error },
    #[error("{what} has something missing, or more in it than belongs there")]
    Incomplete { what: String },
    #[error("the checksums of memory are {bytes} bytes long: no multiple of 4")]
    Sums { bytes: usize },
    #[error("range {index} of the list of changes is none of {pages} pages in ascending order")]
    Changed { index: usize, pages: u64 },
    #[error("it changes {0} ranges of memory, and {RANGES} are the most")]
    Ranges(usize),
    #[error("there is more after its end")]
    Trailing,
}

const CPU: &str = "cpu";
const VCPU: &str = "vcpu";
const CHIPS: &str = "interrupt controllers";
const CLOCK: &str = "clock";
/// Not in states of older versions.
const DATE: &str = "date";
const DEVICE: &str = "device";

/// Write all of it.
///
/// # Errors
/// When `to` does not take it.
pub fn write(to: impl Write, content: &Content) -> io::Result<()> {
    let mut to = Writer::begin(to)?;
    write_machine(&mut to, &content.config, &content.state)?;
    if content.config.base.is_some() {
        let bytes = |r: &Range<u64>| [r.start.to_le_bytes(), r.end.to_le_bytes()].concat();
        let changed: Vec<u8> = content.changed.iter().flat_map(bytes).collect();
        to.frame(Kind::Changed, &[&changed])?;
    }
    let sums: Vec<u8> = content.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    to.frame(Kind::Sums, &[&sums])?;
    to.end(0)
}

/// Write what a machine is made of.
///
/// # Errors
/// When `to` does not take it.
pub fn write_config(to: &mut Writer<impl Write>, config: &Config) -> io::Result<()> {
    to.frame(Kind::Config, &[&serde_json::to_vec(config)?])
}

/// Write what a machine is made of, and all of its state but memory.
///
/// # Errors
/// When `to` does not take it.
pub fn write_machine(
    to: &mut Writer<impl Write>,
    config: &Config,
    state: &MachineState,
) -> io::Result<()> {
    write_config(to, config)?;
    part(to, CPU, &state.cpu)?;
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        part(to, &format!("{VCPU} {index}"), vcpu)?;
    }
    part(to, CHIPS, &state.chips)?;
    part(to, CLOCK, &state.clock.nanoseconds)?;
    if let Some(date) = &state.clock.date {
        part(to, DATE, date)?;
    }
    for (index, device) in state.devices.iter().enumerate() {
        part(to, &format!("{DEVICE} {index} {}", device.id), device)?;
    }
    Ok(())
}

fn part(to: &mut Writer<impl Write>, name: &str, value: &impl Serialize) -> io::Result<()> {
    let body = stream::section(name, &serde_json::to_vec(value)?);
    to.frame(Kind::Section, &[&body])
}

/// Read all of it. Sizes and counts that it claims are not yet compared with each other.
///
/// # Errors
/// The first thing that is wrong.
pub fn read(from: impl Read) -> Result<Content, ContentError> {
    let mut frames = Frames::begin(from)?;
    let config = frames.config()?;
    let state = frames.state()?;
    let mut changed = Vec::new();
    if config.base.is_some() {
        changed = ranges(&frames.body(Kind::Changed)?, config.machine.memory.size)?;
    }
    let body = frames.body(Kind::Sums)?;
    let (sums, []) = body.as_chunks::<4>() else {
        return Err(ContentError::Sums { bytes: body.len() });
    };
    let sums = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
    frames.body(Kind::End)?;
    if !frames.reader.exhausted()? {
        return Err(ContentError::Trailing);
    }
    Ok(Content { config, state, changed, sums })
}

/// Ranges of whole pages in `size` bytes of memory, ascending and apart.
fn ranges(body: &[u8], size: u64) -> Result<Vec<Range<u64>>, ContentError> {
    let (words, rest) = body.as_chunks::<8>();
    let (pairs, odd) = words.as_chunks::<2>();
    if pairs.len() > RANGES {
        return Err(ContentError::Ranges(pairs.len()));
    }
    let failed = |index| ContentError::Changed { index, pages: size / PAGE_SIZE };
    if !rest.is_empty() || !odd.is_empty() {
        return Err(failed(pairs.len()));
    }
    let mut before = 0;
    let mut all = Vec::with_capacity(pairs.len());
    for (index, pair) in pairs.iter().enumerate() {
        let [start, end] = pair.map(u64::from_le_bytes);
        let whole = start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
        if !whole || start < before || start >= end || end > size {
            return Err(failed(index));
        }
        all.push(start..end);
        before = end;
    }
    Ok(all)
}

/// Frames, with one looked at in advance.
pub struct Frames<R> {
    reader: Reader<R>,
    next: Option<(Kind, Vec<u8>)>,
}

impl<R: Read> Frames<R> {
    /// Of a stream that begins.
    ///
    /// # Errors
    /// When it is none.
    pub fn begin(from: R) -> Result<Self, StreamError> {
        Ok(Self { reader: Reader::begin(from)?, next: None })
    }

    /// The next frame; its body replaces what is in `body`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn take(&mut self, body: &mut Vec<u8>) -> Result<Kind, StreamError> {
        match self.next.take() {
            Some((kind, next)) => {
                *body = next;
                Ok(kind)
            }
            None => self.reader.next(body),
        }
    }

    /// Give one back that was taken.
    pub fn put_back(&mut self, kind: Kind, body: Vec<u8>) {
        self.next = Some((kind, body));
    }

    fn body(&mut self, expected: Kind) -> Result<Vec<u8>, ContentError> {
        let mut body = Vec::new();
        match self.take(&mut body)? {
            kind if kind == expected => Ok(body),
            kind => Err(order(kind, &body, expected.name())),
        }
    }

    /// The configuration that must come next.
    ///
    /// # Errors
    /// When it does not, or is none.
    pub fn config(&mut self) -> Result<Config, ContentError> {
        parse(Kind::Config.name(), &self.body(Kind::Config)?)
    }

    /// The sections of a machine's state, which must come next.
    ///
    /// # Errors
    /// When they do not, or are none.
    pub fn state(&mut self) -> Result<MachineState, ContentError> {
        Ok(MachineState {
            cpu: self.section(CPU)?,
            vcpus: self.sections(VCPU)?,
            chips: self.section(CHIPS)?,
            clock: Clock { nanoseconds: self.section(CLOCK)?, date: self.date()? },
            devices: self.sections(DEVICE)?,
        })
    }

    fn date(&mut self) -> Result<Option<u64>, ContentError> {
        match self.sections(DATE)?.as_slice() {
            [] => Ok(None),
            [date] => Ok(Some(*date)),
            _ => Err(ContentError::Incomplete { what: format!("section {DATE:?}") }),
        }
    }

    /// The end, which must come next.
    ///
    /// # Errors
    /// When it does not.
    pub fn end(&mut self) -> Result<(), ContentError> {
        self.body(Kind::End).map(drop)
    }

    /// The section that must come next.
    fn section<T: DeserializeOwned + Serialize>(
        &mut self,
        name: &'static str,
    ) -> Result<T, ContentError> {
        let mut body = Vec::new();
        let kind = self.take(&mut body)?;
        match stream::split_section(&body) {
            Some((found, rest)) if kind == Kind::Section && found == name => {
                parse(&format!("section {name:?}"), rest)
            }
            _ => Err(order(kind, &body, name)),
        }
    }

    /// The sections that come next and whose names begin with `word`.
    fn sections<T: DeserializeOwned + Serialize>(
        &mut self,
        word: &str,
    ) -> Result<Vec<T>, ContentError> {
        let mut all = Vec::new();
        loop {
            let mut body = Vec::new();
            let kind = self.take(&mut body)?;
            match stream::split_section(&body) {
                Some((name, rest))
                    if kind == Kind::Section && name.split(' ').next() == Some(word) =>
                {
                    all.push(parse(&format!("section {name:?}"), rest)?);
                }
                _ => {
                    self.put_back(kind, body);
                    return Ok(all);
                }
            }
        }
    }
}

/// What was written here is written again in the same way. Anything else, such as a list of registers
/// that is too short, would be filled up with zeros without a word.
fn parse<T: DeserializeOwned + Serialize>(what: &str, body: &[u8]) -> Result<T, ContentError> {
    let malformed = |source| ContentError::Malformed { what: what.into(), source };
    let value = serde_json::from_slice(body).map_err(malformed)?;
    match serde_json::to_vec(&value).map_err(malformed)? == body {
        true => Ok(value),
        false => Err(ContentError::Incomplete { what: what.into() }),
    }
}

fn order(kind: Kind, body: &[u8], expected: &'static str) -> ContentError {
    let what = match (kind, stream::split_section(body)) {
        (Kind::Section, Some((name, _))) => format!("section {name:?}"),
        (kind, _) => kind.name().to_owned(),
    };
    ContentError::Order { what, expected }
}
