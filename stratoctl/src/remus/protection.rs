//! What the registry keeps of a protected domain, on either side: `remus.json` beside the domain's
//! description, from the verb that protects it until it is unprotected.
use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    dial::Dial,
    fence::{self, InRegistry},
    uuid::Uuid,
    wire::SideText,
    witness,
};
use crate::{
    failure::Failure,
    registry::{self, Lock, Place, RecordError, Registry},
};

/// A protected domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protection {
    /// The part that it had when it was protected; after a failover the backup runs the guest.
    pub side: SideText,
    /// What the two sides have in common: the UUID of the domain that was protected first.
    pub lineage: Uuid,
    /// The witness, as a URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<String>,
    /// Its identity, which both sides have agreed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// The fence, as a URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<String>,
    /// How the primary reaches its backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dial: Option<Dial>,
    /// The domain is to be handed over to its backup, and not to be protected then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moves: bool,
    /// The monitor's own number among those that the witness knows, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Uuid>,
    /// What the guest writes to its disks is not replicated: both hosts have the same ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares_disks: bool,
    /// The guest continues at the other side.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moved: bool,
}

impl Protection {
    /// One of this side, without anything else.
    pub fn new(side: SideText, lineage: Uuid) -> Self {
        Self {
            side,
            lineage,
            witness: None,
            identity: None,
            fence: None,
            dial: None,
            moves: false,
            incarnation: None,
            shares_disks: false,
            moved: false,
        }
    }

    fn path(place: &Place) -> PathBuf {
        place.home.join("remus.json")
    }

    /// That of the domain at `place`, if it is protected.
    ///
    /// # Errors
    /// Its record is damaged.
    pub fn of(place: &Place) -> Result<Option<Self>, RecordError> {
        match registry::read(&Self::path(place)) {
            Ok(this) => Ok(Some(this)),
            Err(e) if e.is_absent() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Record that the domain at `place` is protected.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn record(&self, registry: &Registry, place: &Place) -> io::Result<()> {
        registry::write(registry.disk(), &Self::path(place), self)
    }

    /// Forget that the domain at `place` was protected.
    ///
    /// # Errors
    /// The disk cannot be written.
    pub fn forget(registry: &Registry, place: &Place) -> io::Result<()> {
        registry.disk().remove(&Self::path(place))
    }

    /// Its witness.
    ///
    /// # Errors
    /// The record does not name one as it should.
    pub fn witness(&self) -> Result<Option<witness::Uri>, String> {
        self.witness.as_deref().map(str::parse).transpose()
    }

    /// The kind of its fence, if that decides which side continues: where there is a witness, a
    /// fence only frees what the loser holds.
    ///
    /// # Errors
    /// The record does not name one as it should.
    pub fn arbitrating_fence(&self) -> Result<Option<&'static str>, Failure> {
        let fence = self.fence().map_err(Failure::new)?;
        Ok(fence.filter(|_| self.identity.is_none()).map(|fence| fence.kind()))
    }

    /// Its fence.
    ///
    /// # Errors
    /// The record does not name one as it should.
    pub fn fence(&self) -> Result<Option<fence::Uri>, String> {
        self.fence.as_deref().map(str::parse).transpose()
    }
}

/// The lock that is held by the process that answers for the monitor at `place`.
pub fn agent_lock(place: &Place) -> PathBuf {
    place.run.join("agent")
}

/// Whether a process answers for the monitor at `place`.
pub fn has_agent(place: &Place) -> bool {
    Lock::is_held(&agent_lock(place))
}

/// The mark of the domain at `place`. To be used under the lock [`lock_marks`].
pub fn marks<'a>(registry: &'a Registry, place: &Place) -> InRegistry<'a> {
    InRegistry::new(registry.disk(), &place.home)
}

/// Held while a process reads and then writes the mark of the domain at `place`.
///
/// # Errors
/// It cannot be locked.
pub fn lock_marks(place: &Place) -> io::Result<Lock> {
    Lock::wait(&place.home.join("fence.lock"))
}
