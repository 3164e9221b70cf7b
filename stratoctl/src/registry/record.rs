//! The registry's records: JSON with a version of their own.
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
/// Longest record, in bytes: a configuration has at most 256 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// Description of a domain: written when it is created, read when it is started or saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Constant for its whole life, also across renames.
    pub uuid: String,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Memory in bytes.
    pub memory: u64,
    /// What to do when the guest ends.
    pub policy: Policy,
    /// The monitor's configuration file, with all paths absolute.
    pub config: Value,
}

/// Record of a start: written before the monitor is started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The domain's number, until it ends.
    pub id: u32,
}

/// Record that lies beside a saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Name that the domain had.
    pub name: super::Name,
    /// Description of the domain.
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
    /// Whether there is no such file.
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
/// When it does not exist, is damaged, or has another version.
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

/// The record in `text`, the contents of the file `path`.
///
/// # Errors
/// When it is damaged, or has another version.
pub fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, RecordError> {
    let damaged = |source| RecordError::Damaged { path: path.into(), source };
    // The version first: the format of other versions is not known.
    let mut value: serde_json::Map<String, Value> =
        serde_json::from_slice(text).map_err(damaged)?;
    let found = value.shift_remove("version").unwrap_or_default();
    if found != VERSION {
        return Err(RecordError::Version { path: path.into(), found });
    }
    serde_json::from_value(Value::Object(value)).map_err(damaged)
}

/// Write `record` to `path`, completely or not at all.
///
/// # Errors
/// When the disk is full or cannot be written.
pub fn write(disk: &dyn Disk, path: &Path, record: &impl Serialize) -> io::Result<()> {
    disk::replace(disk, path, &text(record)?)
}

/// The text of `record`, as it is written.
///
/// # Errors
/// When it contains a value that JSON cannot represent.
pub fn text(record: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(&Versioned { version: VERSION, record })?;
    text.push(b'\n');
    Ok(text)
}
