//! What a checkpoint holds beside memory, and its way into frames and out of them.
use std::io::{self, Read, Write};

use machine::{
    MachineState,
    config::{MachineConfig, Occupancy},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::lifecycle::Halt;

use super::stream::{self, Kind, Reader, StreamError};

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
}

/// All of it.
pub struct Content {
    pub config: Config,
    pub state: MachineState,
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
    #[error("there is more after its end")]
    Trailing,
}

const CPU: &str = "cpu";
const VCPU: &str = "vcpu";
const CHIPS: &str = "interrupt controllers";
const CLOCK: &str = "clock";
const DEVICE: &str = "device";

/// Write all of it.
///
/// # Errors
/// When `to` does not take it.
pub fn write(to: &mut impl Write, content: &Content) -> io::Result<()> {
    stream::begin(to)?;
    stream::frame(to, Kind::Config, &serde_json::to_vec(&content.config)?)?;
    let state = &content.state;
    part(to, CPU, &state.cpu)?;
    for (index, vcpu) in state.vcpus.iter().enumerate() {
        part(to, &format!("{VCPU} {index}"), vcpu)?;
    }
    part(to, CHIPS, &state.chips)?;
    part(to, CLOCK, &state.clock)?;
    for (index, device) in state.devices.iter().enumerate() {
        part(to, &format!("{DEVICE} {index} {}", device.id), device)?;
    }
    let sums: Vec<u8> = content.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    stream::frame(to, Kind::Sums, &sums)?;
    stream::frame(to, Kind::End, &[])
}

fn part(to: &mut impl Write, name: &str, value: &impl Serialize) -> io::Result<()> {
    let body = stream::section(name, &serde_json::to_vec(value)?);
    stream::frame(to, Kind::Section, &body)
}

/// Read all of it. Sizes and counts that it claims are not yet compared with each other.
///
/// # Errors
/// The first thing that is wrong.
pub fn read(from: impl Read) -> Result<Content, ContentError> {
    let mut frames = Frames { reader: Reader::begin(from)?, next: None };
    let (kind, body) = frames.take()?;
    if kind != Kind::Config {
        return Err(order(kind, &body, "the configuration"));
    }
    let config = parse("the configuration", &body)?;
    let cpu = frames.section(CPU)?;
    let vcpus = frames.sections(VCPU)?;
    let chips = frames.section(CHIPS)?;
    let clock = frames.section(CLOCK)?;
    let devices = frames.sections(DEVICE)?;
    let (kind, body) = frames.take()?;
    if kind != Kind::Sums {
        return Err(order(kind, &body, "the checksums of memory"));
    }
    let (sums, []) = body.as_chunks::<4>() else {
        return Err(ContentError::Sums { bytes: body.len() });
    };
    let sums = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
    let (kind, body) = frames.take()?;
    if kind != Kind::End || !body.is_empty() {
        return Err(order(kind, &body, "the end"));
    }
    if !frames.reader.exhausted()? {
        return Err(ContentError::Trailing);
    }
    Ok(Content { config, state: MachineState { cpu, vcpus, chips, clock, devices }, sums })
}

/// Frames, with one looked at in advance.
struct Frames<R> {
    reader: Reader<R>,
    next: Option<(Kind, Vec<u8>)>,
}

impl<R: Read> Frames<R> {
    fn take(&mut self) -> Result<(Kind, Vec<u8>), StreamError> {
        match self.next.take() {
            Some(frame) => Ok(frame),
            None => self.reader.next(),
        }
    }

    /// The section that must come next.
    fn section<T: DeserializeOwned + Serialize>(
        &mut self,
        name: &'static str,
    ) -> Result<T, ContentError> {
        let (kind, body) = self.take()?;
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
            let (kind, body) = self.take()?;
            match stream::split_section(&body) {
                Some((name, rest))
                    if kind == Kind::Section && name.split(' ').next() == Some(word) =>
                {
                    all.push(parse(&format!("section {name:?}"), rest)?);
                }
                _ => {
                    self.next = Some((kind, body));
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
        (kind, _) => format!("{kind:?}"),
    };
    ContentError::Order { what, expected }
}
