//! What a side has noted about fences in its current term.
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    registry::{self, Disk},
    remus::{Unknown, uuid::Uuid},
};

/// What is noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// This side has begun to fence the other one: it will not be fenced.
    Fencing,
    /// This side was fenced: it does not start, and does not fence.
    Fenced,
}

/// A mark, and in which term it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    /// The protected domain.
    pub lineage: Uuid,
    /// The term.
    pub term: u64,
    /// What.
    pub mark: Mark,
}

/// Where a side keeps its mark. The caller holds the lock that all who read and then write it
/// hold.
pub trait Marks {
    /// The mark, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&self) -> Result<Option<Stored>, Unknown>;

    /// Replace it, durably.
    ///
    /// # Errors
    /// It cannot be written.
    fn write(&self, stored: &Stored) -> Result<(), Unknown>;
}

/// A mark in a record of the registry.
pub struct InRegistry<'a> {
    disk: &'a dyn Disk,
    path: PathBuf,
}

impl<'a> InRegistry<'a> {
    pub fn new(disk: &'a dyn Disk, home: &Path) -> Self {
        Self { disk, path: home.join("fence.json") }
    }

    /// Remove it.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self) -> Result<(), Unknown> {
        let failed = |e| Unknown::new(format!("cannot remove {}: {e}", self.path.display()));
        self.disk.remove(&self.path).map_err(failed)
    }
}

impl Marks for InRegistry<'_> {
    fn read(&self) -> Result<Option<Stored>, Unknown> {
        match registry::read(&self.path) {
            Ok(stored) => Ok(Some(stored)),
            Err(e) if e.is_absent() => Ok(None),
            Err(e) => Err(Unknown::new(format!("{:#}", anyhow::Error::from(e)))),
        }
    }

    fn write(&self, stored: &Stored) -> Result<(), Unknown> {
        registry::write(self.disk, &self.path, stored)
            .map_err(|e| Unknown::new(format!("cannot write {}: {e}", self.path.display())))
    }
}
