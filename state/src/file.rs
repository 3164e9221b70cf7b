//! All parts of a saved machine, encoded as frames and decoded from them.
//!
//! ```text
//! a file      Config Section.. [Changed] Sums End      memory lies in a file of its own
//! a stream    Config (Pages | Zeros).. Config Section.. End
//! ```
//! Sections are identified by their kind and id; their order is not significant.
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Write},
    ops::Range,
};

use crate::{
    chips::{Chips, Clock},
    config::Config,
    cpu::{Cpu, Vcpu},
    device,
    frame::{Kind, Reader, StreamError, Writer},
    section::{self, Saved, Section, SectionError},
};

/// Bytes of a page, the unit of changed memory.
pub const PAGE_SIZE: u64 = 4096;
/// Most ranges of memory in one incremental save; beyond that, ranges are merged.
pub const RANGES: usize = 1 << 16;

/// A saved machine without its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The configuration that it needs.
    pub config: Config,
    /// The state to restore.
    pub sections: Sections,
    /// The ranges of memory held by this save rather than by its base; empty without a base.
    pub changed: Vec<Range<u64>>,
    /// CRC-32 of each block of memory.
    pub sums: Vec<u32>,
}

/// The state to restore into a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sections {
    /// The features that its CPUs offer.
    pub cpu: Cpu,
    /// vCPUs, in order.
    pub vcpus: Vec<Vcpu>,
    /// Interrupt controllers and timer.
    pub chips: Chips,
    /// The guest's paravirtual clock.
    pub clock: Clock,
    /// Devices, in any order: slots are identified by their id, others by their kind.
    pub devices: Vec<Section>,
}

/// Why a saved machine cannot be read.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum FileError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("found {what} where {expected} was expected")]
    Order { what: String, expected: &'static str },
    #[error("{what} cannot be used")]
    Section { what: String, source: SectionError },
    #[error("section {what:?} is missing")]
    Missing { what: String },
    #[error("section {what:?} is duplicated")]
    Twice { what: String },
    #[error("the checksums of memory are {bytes} bytes long, which is not a multiple of 4")]
    Sums { bytes: usize },
    #[error(
        "range {index} of the list of changes is outside of the {pages} pages, or not in ascending order"
    )]
    Changed { index: usize, pages: u64 },
    #[error("it changes {0} ranges of memory; at most {RANGES} are allowed")]
    Ranges(usize),
    #[error("there is more data after its end")]
    Trailing,
}

impl State {
    /// Write all of it.
    ///
    /// # Errors
    /// When `to` does not take it.
    pub fn write(&self, to: impl Write) -> io::Result<()> {
        let mut to = Writer::begin(to)?;
        write_config(&mut to, &self.config)?;
        write_sections(&mut to, &self.sections)?;
        if self.config.base.is_some() {
            let bytes = |r: &Range<u64>| [r.start.to_le_bytes(), r.end.to_le_bytes()].concat();
            let changed: Vec<u8> = self.changed.iter().flat_map(bytes).collect();
            to.frame(Kind::Changed, &[&changed])?;
        }
        let sums: Vec<u8> = self.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        to.frame(Kind::Sums, &[&sums])?;
        to.end(0)
    }

    /// Read all of it. The sizes and counts in it are not yet checked against each other.
    ///
    /// # Errors
    /// The first error found.
    pub fn read(from: impl Read) -> Result<Self, FileError> {
        let mut frames = Frames::begin(from)?;
        let config = frames.config()?;
        let sections = frames.sections()?;
        let mut changed = Vec::new();
        if config.base.is_some() {
            changed = ranges(&frames.body(Kind::Changed)?, config.machine.memory.size)?;
        }
        let body = frames.body(Kind::Sums)?;
        let (sums, []) = body.as_chunks::<4>() else {
            return Err(FileError::Sums { bytes: body.len() });
        };
        let sums = sums.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
        frames.end()?;
        if !frames.reader.exhausted()? {
            return Err(FileError::Trailing);
        }
        Ok(Self { config, sections, changed, sums })
    }
}

/// Write a machine's configuration.
///
/// # Errors
/// When `to` does not take it.
pub fn write_config(to: &mut Writer<impl Write>, config: &Config) -> io::Result<()> {
    let section = Section::of("", config).map_err(io::Error::other)?;
    to.frame(Kind::Config, &[&serde_json::to_vec(&section)?])
}

/// Write a machine's sections.
///
/// # Errors
/// When `to` does not take it.
pub fn write_sections(to: &mut Writer<impl Write>, sections: &Sections) -> io::Result<()> {
    let Sections { cpu, vcpus, chips, clock, devices } = sections;
    let mut all = vec![Section::of("", cpu)];
    all.extend(
        (0..).zip(vcpus).map(|(index, vcpu): (u32, _)| Section::of(index.to_string(), vcpu)),
    );
    all.extend([Section::of("", chips), Section::of("", clock)]);
    for section in all {
        write_section(to, &section.map_err(io::Error::other)?)?;
    }
    devices.iter().try_for_each(|device| write_section(to, device))
}

fn write_section(to: &mut Writer<impl Write>, section: &Section) -> io::Result<()> {
    to.frame(Kind::Section, &[&serde_json::to_vec(section)?])
}

/// Ranges of whole pages in `size` bytes of memory, ascending and with gaps between them.
fn ranges(body: &[u8], size: u64) -> Result<Vec<Range<u64>>, FileError> {
    let (words, rest) = body.as_chunks::<8>();
    let (pairs, odd) = words.as_chunks::<2>();
    if pairs.len() > RANGES {
        return Err(FileError::Ranges(pairs.len()));
    }
    let failed = |index| FileError::Changed { index, pages: size / PAGE_SIZE };
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

/// A frame reader with one frame of look-ahead.
pub struct Frames<R> {
    reader: Reader<R>,
    next: Option<(Kind, Vec<u8>)>,
}

impl<R: Read> Frames<R> {
    /// Begin to read a stream.
    ///
    /// # Errors
    /// When it is not a valid stream.
    pub fn begin(from: R) -> Result<Self, StreamError> {
        Ok(Self { reader: Reader::begin(from)?, next: None })
    }

    /// The next frame; its body replaces the contents of `body`.
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

    /// Push a frame back, to be read again.
    pub fn put_back(&mut self, kind: Kind, body: Vec<u8>) {
        self.next = Some((kind, body));
    }

    fn body(&mut self, expected: Kind) -> Result<Vec<u8>, FileError> {
        let mut body = Vec::new();
        match self.take(&mut body)? {
            kind if kind == expected => Ok(body),
            kind => Err(order(kind, &body, expected.name())),
        }
    }

    /// Read the configuration, which must come next.
    ///
    /// # Errors
    /// When the next frame is another, or is invalid.
    pub fn config(&mut self) -> Result<Config, FileError> {
        let body = self.body(Kind::Config)?;
        let config = Section::from_bytes(&body).and_then(|section| section.read());
        config.map_err(|source| FileError::Section { what: Kind::Config.name().into(), source })
    }

    /// Read the end frame, which must come next.
    ///
    /// # Errors
    /// When the next frame is another.
    pub fn end(&mut self) -> Result<(), FileError> {
        self.body(Kind::End).map(drop)
    }

    /// Read the sections that come next, in any order.
    ///
    /// # Errors
    /// When one is missing, duplicate, unknown or malformed.
    pub fn sections(&mut self) -> Result<Sections, FileError> {
        let (mut cpu, mut chips, mut clock) = (None, None, None);
        let (mut vcpus, mut devices) = (BTreeMap::new(), Vec::new());
        let mut seen = BTreeSet::new();
        let mut body = Vec::new();
        loop {
            let kind = self.take(&mut body)?;
            if kind != Kind::Section {
                self.put_back(kind, body);
                break;
            }
            let name = || section::peek(&body).unwrap_or_else(|| "without a name".into());
            let failed =
                |source| FileError::Section { what: format!("section {:?}", name()), source };
            let section = Section::from_bytes(&body).map_err(failed)?;
            if !seen.insert(section.name()) {
                return Err(FileError::Twice { what: section.name() });
            }
            // Only the canonical form of each number: "01" would be a second vCPU 1.
            let index = section.id.parse::<u8>().ok().filter(|n| n.to_string() == section.id);
            match (section.kind.as_str(), section.id.as_str(), index) {
                (Cpu::KIND, "", _) => cpu = Some(section.read().map_err(failed)?),
                (Chips::KIND, "", _) => chips = Some(section.read().map_err(failed)?),
                (Clock::KIND, "", _) => clock = Some(section.read().map_err(failed)?),
                (Vcpu::KIND, _, Some(index)) => {
                    vcpus.insert(index, section.read::<Vcpu>().map_err(failed)?);
                }
                _ => {
                    device::check(&section).map_err(failed)?;
                    devices.push(section);
                }
            }
        }
        let missing = |kind: &str, id: &str| FileError::Missing { what: section::name(kind, id) };
        if let Some((index, _)) = (0u8..).zip(vcpus.keys()).find(|(index, key)| index != *key) {
            return Err(missing(Vcpu::KIND, &index.to_string()));
        }
        Ok(Sections {
            cpu: cpu.ok_or_else(|| missing(Cpu::KIND, ""))?,
            vcpus: vcpus.into_values().collect(),
            chips: chips.ok_or_else(|| missing(Chips::KIND, ""))?,
            clock: clock.ok_or_else(|| missing(Clock::KIND, ""))?,
            devices,
        })
    }
}

fn order(kind: Kind, body: &[u8], expected: &'static str) -> FileError {
    let what = match (kind, section::peek(body)) {
        (Kind::Section, Some(name)) => format!("section {name:?}"),
        (kind, _) => kind.name().to_owned(),
    };
    FileError::Order { what, expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::state;

    /// The bytes of `state`, with its sections changed by `change`.
    fn bytes(state: &State, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Vec<u8> {
        let mut whole = Vec::new();
        state.write(&mut whole).unwrap();
        let mut frames = Frames::begin(&whole[..]).unwrap();
        let mut to = Writer::begin(Vec::new()).unwrap();
        let (mut body, mut sections) = (Vec::new(), Vec::new());
        let mut change = Some(change);
        loop {
            let kind = frames.take(&mut body).unwrap();
            if kind == Kind::Section {
                sections.push(body.clone());
                continue;
            }
            if let Some(change) = change.take_if(|_| !sections.is_empty()) {
                change(&mut sections);
                for section in &sections {
                    to.frame(Kind::Section, &[section]).unwrap();
                }
            }
            if kind == Kind::End {
                to.end(0).unwrap();
                return to.into_inner();
            }
            to.frame(kind, &[&body]).unwrap();
        }
    }

    #[test]
    fn what_was_written_is_read_and_written_again_in_the_same_way() {
        let state = state();
        let (mut one, mut other) = (Vec::new(), Vec::new());
        state.write(&mut one).unwrap();
        let read = State::read(&one[..]).unwrap();
        assert_eq!(read, state);
        read.write(&mut other).unwrap();
        assert_eq!(one, other);
    }

    #[test]
    fn sections_are_known_by_kind_and_id_wherever_they_lie() {
        let state = state();
        let mut read = State::read(&bytes(&state, |sections| sections.reverse())[..]).unwrap();
        read.sections.devices.reverse();
        assert_eq!(read, state);
    }

    #[test]
    fn sections_that_are_missing_come_twice_or_are_not_known_are_refused() {
        let state = state();
        let count = 1 + state.sections.vcpus.len() + 2;
        // The configuration says how many vCPUs there must be.
        for index in [0, count - 2, count - 1] {
            let without = bytes(&state, |sections| drop(sections.remove(index)));
            let error = State::read(&without[..]).unwrap_err();
            assert!(matches!(error, FileError::Missing { .. }), "{index}: {error}");
        }
        for index in 0..count + state.sections.devices.len() {
            let twice = bytes(&state, |sections| sections.push(sections[index].clone()));
            let error = State::read(&twice[..]).unwrap_err();
            assert!(matches!(error, FileError::Twice { .. }), "{index}: {error}");
        }
        let vcpu = serde_json::to_string(&Section::of("0", &state.sections.vcpus[0]).unwrap());
        let vcpu = vcpu.unwrap();
        for (one, other) in [
            ("\"id\":\"0\"", "\"id\":\"00\""),
            ("\"id\":\"0\"", "\"id\":\"256\""),
            ("\"vcpu\"", "\"toaster\""),
            ("\"version\":1", "\"version\":2"),
            ("\"version\":1", "\"version\":0"),
            ("\"mp_state\":0", "\"mp_state\":0,\"more\":1"),
            ("\"mp_state\":0,", ""),
        ] {
            let other = vcpu.replacen(one, other, 1).into_bytes();
            let with = bytes(&state, |sections| sections[1] = other.clone());
            let error = State::read(&with[..]).unwrap_err();
            let text = str::from_utf8(&other[..60]).unwrap();
            assert!(matches!(error, FileError::Section { .. }), "{text}: {error}");
        }
    }
}
