//! What the registry writes down: JSON with a version of its own.
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use state::regular_file::open_regular;

use super::disk::{self, Disk};
use crate::policy::Policy;

/// The version of all records.
const VERSION: u64 = 1;
/// Longest record, bytes: a configuration has at most 256 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// What a domain is: written when it is made, read when it is started or saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Stays the same for its whole life, renamed or not.
    pub uuid: String,
    /// vCPUs.
    pub vcpus: u64,
    /// Bytes.
    pub memory: u64,
    /// What to do when the guest ends.
    pub policy: Policy,
    /// The monitor's configuration file, every path absolute.
    pub config: Value,
}

/// What a start is: written before the monitor is started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The domain's number, until it ends.
    pub id: u32,
}

/// What lies beside a saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Name that the domain had.
    pub name: super::Name,
    /// What it was.
    pub domain: Description,
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is longer than {MAX_BYTES} bytes: it is damaged", path.display())]
    Long { path: PathBuf },
    #[error("{} is damaged: {source}", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{} has version {found}; this stratoctl knows {VERSION}", path.display())]
    Version { path: PathBuf, found: Value },
}

impl RecordError {
    /// There is none.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u64,
    #[serde(flatten)]
    record: T,
}

/// The record at `path`.
///
/// # Errors
/// When it is not there, not whole, or of another version.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, RecordError> {
    let failed = |source| RecordError::Io { path: path.into(), source };
    let mut text = Vec::new();
    let file = open_regular(path, File::options().read(true)).map_err(failed)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(RecordError::Long { path: path.into() });
    }
    parse(&text, path)
}

/// The record in `text`, which is what `path` holds.
///
/// # Errors
/// When it is not whole, or of another version.
pub fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, RecordError> {
    let damaged = |source| RecordError::Damaged { path: path.into(), source };
    // The version first: of another one nothing else is known.
    let mut value: serde_json::Map<String, Value> =
        serde_json::from_slice(text).map_err(damaged)?;
    let found = value.shift_remove("version").unwrap_or_default();
    if found != VERSION {
        return Err(RecordError::Version { path: path.into(), found });
    }
    serde_json::from_value(Value::Object(value)).map_err(damaged)
}

/// Put `record` at `path`, whole or not at all.
///
/// # Errors
/// When the disk is full or cannot be written.
pub fn write(disk: &dyn Disk, path: &Path, record: &impl Serialize) -> io::Result<()> {
    disk::replace(disk, path, &text(record)?)
}

/// What is written of `record`.
///
/// # Errors
/// When it holds something that JSON does not have.
pub fn text(record: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(&Versioned { version: VERSION, record })?;
    text.push(b'\n');
    Ok(text)
}
