//! The first frame of each connection: the machine that the primary offers, and all that it has to
//! have in common with the backup's host. The backup says which process it is, and checks that before
//! it answers the greeting that follows. If something differs, it says what before it refuses;
//! likewise if a frame is not valid, before it closes the connection.
//!
//! ```text
//! kind u32 = 31  length u32  timeout u32, in ms  length u32  JSON
//!                            a stream with only the configuration  crc u32
//! kind u32 = 30  length u32  why not, as text  crc u32
//! kind u32 = 29  length u32  JSON: which process the backup is  crc u32
//! ```
use std::{io, time::Duration};

use config::incoming::Arbiter;
use machine::Tsc;
use replication::wire::{self, WireError};
use serde::{Deserialize, Serialize};
use state::{Config, Frames, Section, cpu::Cpu, file::write_config, frame::Writer};

use super::{beside::Key, process::Process};
use crate::durations::milliseconds;

/// The version of what the two sides exchange.
const VERSION: u64 = 3;
const KIND: u32 = 31;
const REASON: u32 = 30;
const PROCESS: u32 = 29;
/// Longest body, in bytes: a configuration of all devices is far smaller.
const LONGEST: usize = 1 << 20;
/// Longest reason, in bytes.
const LONGEST_REASON: usize = 4096;

/// What the primary offers.
pub struct Offer {
    /// Silence after which the other side is suspected, at both sides.
    pub timeout: Duration,
    /// Time from one sign of life to the next, at both sides, if that is not a tenth.
    pub heartbeat: Option<Duration>,
    /// What authenticates signs of life on the second path.
    pub key: Option<Key>,
    /// What the guest writes to its disks is replicated.
    pub disks: bool,
    /// What is compared.
    pub host: Host,
    /// The machine.
    pub config: Config,
}

/// What a backup's host has to have in common with the primary's.
pub struct Host {
    /// Of what is exchanged.
    pub version: u64,
    /// Who decides.
    pub arbiter: Arbiter,
    /// How the guest's TSC ticks.
    pub tsc: Tsc,
    /// The CPU that the guest was promised.
    pub cpu: Option<Cpu>,
    /// Which process the primary is, if it knows that.
    pub process: Option<Process>,
}

impl Host {
    /// That of a primary, which is this process.
    pub fn of(arbiter: Arbiter, tsc: Tsc, cpu: Option<Cpu>) -> Self {
        Self { version: VERSION, arbiter, tsc, cpu, process: Process::own() }
    }

    /// How this, a primary's, differs from a backup that is decided by `arbiter`.
    pub fn differs(&self, arbiter: &Arbiter) -> Option<String> {
        let shown = |arbiter: &Arbiter| match arbiter {
            Arbiter::Witness(identity) => format!("the witness {identity:?} decides"),
            Arbiter::Fence(kind) => format!("a fence of the kind {kind:?} decides"),
            Arbiter::None => "neither witness nor fence decides".to_owned(),
        };
        if self.version != VERSION {
            return Some(format!(
                "the primary speaks version {}, the backup version {VERSION}: use the same release",
                self.version
            ));
        }
        (self.arbiter != *arbiter).then(|| {
            let (there, here) = (shown(&self.arbiter), shown(arbiter));
            format!("for the primary, {there}; for the backup, {here}")
        })
    }
}

/// The offer as JSON, but for the time-out and the machine.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shown {
    version: u64,
    witness: Option<String>,
    fence: Option<String>,
    tsc_khz: u32,
    tsc: u64,
    tsc_is_own: bool,
    cpu: Option<Section>,
    process: Option<Process>,
    heartbeat_ms: Option<u64>,
    key: Option<Key>,
    disks: bool,
}

impl Shown {
    fn of(offer: &Offer) -> io::Result<Self> {
        let Offer { heartbeat, ref key, disks, ref host, .. } = *offer;
        let (witness, fence) = match &host.arbiter {
            Arbiter::Witness(identity) => (Some(identity.clone()), None),
            Arbiter::Fence(kind) => (None, Some(kind.clone())),
            Arbiter::None => (None, None),
        };
        let cpu = host.cpu.as_ref().map(|cpu| Section::of("", cpu)).transpose();
        let Tsc { khz, ticks, own } = host.tsc.as_of_now();
        Ok(Self {
            version: host.version,
            witness,
            fence,
            tsc_khz: khz,
            tsc: ticks,
            tsc_is_own: own,
            cpu: cpu.map_err(io::Error::other)?,
            process: host.process.clone(),
            heartbeat_ms: heartbeat.map(milliseconds),
            key: key.clone(),
            disks,
        })
    }

    fn host(self) -> Option<Host> {
        let arbiter = match (self.witness, self.fence) {
            (Some(identity), None) => Arbiter::Witness(identity),
            (None, Some(kind)) => Arbiter::Fence(kind),
            (None, None) => Arbiter::None,
            (Some(_), Some(_)) => return None,
        };
        Some(Host {
            version: self.version,
            arbiter,
            tsc: Tsc { khz: self.tsc_khz, ticks: self.tsc, own: self.tsc_is_own },
            cpu: self.cpu.map(|section| section.read()).transpose().ok()?,
            process: self.process,
        })
    }
}

/// Why bytes are no offer.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum OfferError {
    #[error("the connection does not begin with an offer: the other side is no primary")]
    Kind,
    #[error("the offer is not whole")]
    Frame(#[source] WireError),
    #[error("the offer is not valid")]
    Body(#[from] state::FileError),
    #[error("the offer does not say what its host has")]
    Host,
}

impl Offer {
    /// Its frame.
    ///
    /// # Errors
    /// When the configuration has no saved form.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut to = Writer::begin(Vec::new())?;
        write_config(&mut to, &self.config)?;
        to.end(0)?;
        let timeout = u32::try_from(self.timeout.as_millis()).unwrap_or(u32::MAX);
        let host = serde_json::to_vec(&Shown::of(self)?).map_err(io::Error::other)?;
        let length = u32::try_from(host.len()).map_err(io::Error::other)?;
        let parts = [&timeout.to_le_bytes()[..], &length.to_le_bytes(), &host, &to.into_inner()];
        Ok(wire::frame(KIND, &parts.concat()))
    }

    /// Read an offer from the beginning of `bytes`, and return its length, too; `None` when more
    /// bytes are needed.
    ///
    /// # Errors
    /// When these are not the beginning of an offer.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, OfferError> {
        let (body, all) = match unframe(bytes, LONGEST) {
            Ok(None) => return Ok(None),
            Ok(Some((KIND, body, all))) => (body, all),
            Ok(Some(_)) | Err(WireError::Kind(_)) => return Err(OfferError::Kind),
            Err(e) => return Err(OfferError::Frame(e)),
        };
        let (timeout, rest) = body.split_first_chunk::<4>().ok_or(OfferError::Host)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(OfferError::Host)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| OfferError::Host)?;
        let (host, stream) = rest.split_at_checked(length).ok_or(OfferError::Host)?;
        let host: Shown = serde_json::from_slice(host).map_err(|_| OfferError::Host)?;
        let heartbeat = host.heartbeat_ms.map(Duration::from_millis);
        let (key, disks) = (host.key.clone(), host.disks);
        let host = host.host().ok_or(OfferError::Host)?;
        let mut frames = Frames::begin(stream).map_err(state::FileError::from)?;
        let config = frames.config()?;
        frames.end()?;
        let timeout = Duration::from_millis(u32::from_le_bytes(*timeout).into());
        Ok(Some((Self { timeout, heartbeat, key, disks, host, config }, all)))
    }
}

/// The frame that says why an offer is refused.
pub fn reason(why: &str) -> Vec<u8> {
    let end = (0..=LONGEST_REASON.min(why.len())).rev().find(|end| why.is_char_boundary(*end));
    let why = end.and_then(|end| why.get(..end)).unwrap_or_default();
    wire::frame(REASON, why.as_bytes())
}

/// The frame that says which process a backup is, if it knows that.
pub fn process(process: Option<&Process>) -> Vec<u8> {
    let body = serde_json::to_vec(&process).unwrap_or_default();
    wire::frame(PROCESS, &body)
}

/// What a backup says besides the protocol.
#[derive(Debug, PartialEq, Eq)]
pub enum Aside {
    /// Why it refuses.
    Reason(String),
    /// Which process it is.
    Process(Option<Process>),
}

/// Read such a frame from the beginning of `bytes`, and return its length, too; `None` if there is
/// none, or not all of it.
pub fn read_aside(bytes: &[u8]) -> Option<(Aside, usize)> {
    let (kind, body, all) = unframe(bytes, LONGEST_REASON).ok()??;
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let aside = match kind {
        REASON => Aside::Reason(String::from_utf8_lossy(body).chars().map(plain).collect()),
        PROCESS => Aside::Process(serde_json::from_slice(body).ok()?),
        _ => return None,
    };
    Some((aside, all))
}

/// Whether `bytes` are the beginning of one.
pub fn may_be_aside(bytes: &[u8]) -> bool {
    [REASON, PROCESS].iter().any(|kind| bytes.starts_with(&kind.to_le_bytes()))
        && unframe(bytes, LONGEST_REASON).is_ok_and(|it| it.is_none())
}

/// The kind and the body of a frame, and its length with both.
type Framed<'a> = (u32, &'a [u8], usize);

/// The frame at the beginning of `bytes`; `None` when more bytes are needed.
fn unframe(bytes: &[u8], longest: usize) -> Result<Option<Framed<'_>>, WireError> {
    match wire::unframe(bytes, PROCESS..=KIND, longest) {
        Err(WireError::Truncated) => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_said_in_words() {
        let tsc = Tsc { khz: 1, ticks: 2, own: true };
        let here = Host::of(Arbiter::Witness("dir:1".into()), tsc, None);
        assert_eq!(here.differs(&Arbiter::Witness("dir:1".into())), None);
        let differs = here.differs(&Arbiter::Fence("ssh".into())).unwrap();
        assert_eq!(
            differs,
            "for the primary, the witness \"dir:1\" decides; for the backup, a fence of the kind \
             \"ssh\" decides"
        );
        let old = Host { version: 1, ..here };
        assert!(old.differs(&Arbiter::None).unwrap().contains("version 1"));
    }

    #[test]
    fn a_reason_is_read_whole_and_harms_no_terminal() {
        let bytes = reason("no tap \u{1b}[2J");
        assert!(may_be_aside(&bytes[..5]) && !may_be_aside(&bytes) && !may_be_aside(&[]));
        assert_eq!(read_aside(&bytes), Some((Aside::Reason("no tap  [2J".into()), bytes.len())));
        assert_eq!(read_aside(&bytes[..bytes.len() - 1]), None);
        let Some((Aside::Reason(long), _)) = read_aside(&reason(&"\u{e4}".repeat(3000))) else {
            panic!("no reason");
        };
        assert_eq!(long.len(), LONGEST_REASON);
    }

    #[test]
    fn a_backup_says_which_process_it_is() {
        for own in [Process::own(), None] {
            let bytes = process(own.as_ref());
            assert_eq!(read_aside(&bytes), Some((Aside::Process(own), bytes.len())));
            assert!(may_be_aside(&bytes[..9]));
        }
        let nonsense = wire::frame(PROCESS, b"7");
        assert!(read_aside(&nonsense).is_none() && !may_be_aside(&nonsense));
    }
}
