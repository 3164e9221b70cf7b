//! The registry: a directory for each domain, and no daemon.
//!
//! ```text
//! state/NAME/            a registered domain
//!   domain.json            its description; while this exists, the domain is registered
//!   saved/                 its suspended state; `saved/state` is complete, or absent
//!   run -> run/.managed/UUID
//!   remus.json, fence.json of a protected domain: its witness and peer; the mark of a fence
//! state/.witness/        the witness of domains whose two sides are on this host
//! state/.disks/UUID/     disks that were made for an unmanaged domain when it was restored
//! run/NAME/              all other files of an unmanaged domain
//!   domain.json            its description
//! run/.managed/UUID/     a registered domain's run-time part; these in both kinds:
//!   start.json             its number
//!   up                     its monitor has answered
//!   config.json            what the monitor was started with
//!   pid, log, qmp.sock, console.sock, replica.sock
//!                          made by the monitor, whose working directory this is
//!   agent                  held by the process that answers a protected domain's monitor
//! run/.lock/NAME.lock    held while a process acts on the name
//! run/.lock/NAME.save    held while the domain is saved
//! ```
//! A rename is one rename of a directory, for both kinds. The state of a domain is not stored
//! anywhere: see [`crate::domain`].
mod disk;
mod lock;
mod name;
mod record;
mod roots;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::Value;

pub use disk::{Disk, Real};
pub use lock::Lock;
pub use name::{BadName, Name};
pub use record::{Description, RecordError, Saved, Start};
#[cfg(feature = "testing")]
pub use record::{parse, text};
pub use record::{read, write};

/// The paths of a domain.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its name.
    pub name: Name,
    /// Whether it is registered; an unmanaged domain is gone when it ends.
    pub managed: bool,
    /// Directory that contains `domain.json`.
    pub home: PathBuf,
    /// Directory of the monitor's files; may not exist.
    pub run: PathBuf,
}

impl Place {
    /// Path of its record.
    pub fn record(&self) -> PathBuf {
        self.home.join(RECORD)
    }

    /// Directory of its suspended state.
    pub fn saved(&self) -> PathBuf {
        self.home.join("saved")
    }

    /// Whether it has a complete suspended state.
    pub fn is_saved(&self) -> bool {
        self.saved().join("state").exists()
    }

    /// Its description.
    ///
    /// # Errors
    /// When its record is damaged.
    pub fn description(&self) -> Result<Description, RecordError> {
        read(&self.record())
    }

    /// Whether a start was prepared whose files have not been removed yet.
    pub fn has_begun(&self) -> bool {
        self.run.join(START).exists()
    }

    /// Whether the monitor that was started has answered.
    pub fn has_been_up(&self) -> bool {
        self.run.join(UP).exists()
    }

    /// Its number, if it was started.
    pub fn id(&self) -> Option<u32> {
        read::<Start>(&self.run.join(START)).ok().map(|start| start.id)
    }
}

const RECORD: &str = "domain.json";
/// Directory beside the domains' own; it is not a valid name of a domain.
const DISKS: &str = ".disks";
/// Likewise.
const WITNESS: &str = ".witness";
const START: &str = "start.json";
const UP: &str = "up";
/// More time than it takes to check whether a lock is held.
const LOCK_CHECK: Duration = Duration::from_millis(100);
/// The monitor's configuration, in its working directory.
pub const CONFIG: &str = "config.json";

/// Both parts of the registry.
pub struct Registry {
    run: PathBuf,
    state: PathBuf,
    disk: Box<dyn Disk + Sync>,
}

impl Registry {
    /// The registry below `root`, or else the system's or the user's. It is created when it is
    /// needed.
    ///
    /// # Errors
    /// When there is no place for it.
    pub fn open(root: Option<&Path>) -> anyhow::Result<Self> {
        let (run, state) = roots::find(root)?;
        Ok(Self { run, state, disk: Box::new(Real) })
    }

    /// The disk that it writes to.
    pub fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Lock `name`: no other process acts on it while the lock exists.
    ///
    /// # Errors
    /// When the directory of locks cannot be written.
    pub fn lock(&self, name: &Name) -> anyhow::Result<Lock> {
        let path = self.lock_path(name, "lock")?;
        Lock::wait(&path).with_context(|| format!("cannot lock {}", path.display()))
    }

    /// Lock two names; no deadlock if another process locks them in the other order.
    ///
    /// # Errors
    /// See [`Self::lock`].
    pub fn lock_both(&self, one: &Name, other: &Name) -> anyhow::Result<(Lock, Option<Lock>)> {
        let (first, second) = if one < other { (one, other) } else { (other, one) };
        let lock = self.lock(first)?;
        Ok((lock, if first == second { None } else { Some(self.lock(second)?) }))
    }

    /// The lock on `name`, unless it is held already.
    pub fn try_lock(&self, name: &Name) -> Option<Lock> {
        Lock::attempt_once(&self.lock_path(name, "lock").ok()?).ok().flatten()
    }

    /// Lock held for as long as the domain is saved: other verbs see that it is.
    ///
    /// # Errors
    /// See [`Self::lock`].
    pub fn lock_save(&self, name: &Name) -> anyhow::Result<Option<Lock>> {
        let path = self.lock_path(name, "save")?;
        let deadline = Instant::now() + LOCK_CHECK;
        loop {
            // A process that only checks whether the lock is held has it for a moment.
            let lock = Lock::attempt_once(&path)
                .with_context(|| format!("cannot lock {}", path.display()))?;
            if lock.is_some() || Instant::now() >= deadline {
                return Ok(lock);
            }
            thread::sleep(LOCK_CHECK / 50);
        }
    }

    /// Whether the domain is being saved.
    pub fn is_being_saved(&self, name: &Name) -> bool {
        Lock::is_held(&self.locks().join(format!("{name}.save")))
    }

    fn locks(&self) -> PathBuf {
        self.run.join(".lock")
    }

    fn lock_path(&self, name: &Name, what: &str) -> anyhow::Result<PathBuf> {
        let locks = self.locks();
        self.disk.mkdir(&locks).with_context(|| format!("cannot make {}", locks.display()))?;
        Ok(locks.join(format!("{name}.{what}")))
    }

    /// The place of `name`, if there is such a domain. An unmanaged one may have ended.
    pub fn find(&self, name: &Name) -> Option<Place> {
        let managed = self.state.join(name.as_str());
        if fs::symlink_metadata(managed.join(RECORD)).is_ok() {
            let run = managed.join("run");
            return Some(Place { name: name.clone(), managed: true, home: managed, run });
        }
        let home = self.run.join(name.as_str());
        fs::symlink_metadata(home.join(RECORD)).ok()?;
        Some(Place { name: name.clone(), managed: false, run: home.clone(), home })
    }

    /// All names, sorted. Unmanaged domains among them may have ended.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn names(&self) -> anyhow::Result<BTreeSet<Name>> {
        let mut names = BTreeSet::new();
        for dir in [&self.run, &self.state] {
            let entries = match fs::read_dir(dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                other => other.with_context(|| format!("cannot read {}", dir.display()))?,
            };
            for entry in entries {
                let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
                names.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()));
            }
        }
        names.retain(|name: &Name| self.find(name).is_some());
        Ok(names)
    }

    /// Add a registered or an unmanaged domain. The caller holds the lock, and no domain of that
    /// name exists.
    ///
    /// # Errors
    /// When the disk is full or cannot be written; nothing is registered then.
    pub fn add(
        &self,
        name: &Name,
        managed: bool,
        description: &Description,
    ) -> anyhow::Result<Place> {
        let home = if managed { &self.state } else { &self.run }.join(name.as_str());
        let cannot = || format!("cannot register domain {name} in {}", home.display());
        // Left by a stratoctl that was killed.
        self.disk.remove_tree(&home).with_context(cannot)?;
        self.disk.mkdir(&home).with_context(cannot)?;
        let added = write(&*self.disk, &home.join(RECORD), description)
            .and_then(|()| disk::sync_parent(&*self.disk, &home));
        if added.is_err() {
            let _ = self.disk.remove_tree(&home);
        }
        added.with_context(cannot)?;
        let run = if managed { home.join("run") } else { home.clone() };
        Ok(Place { name: name.clone(), managed, home, run })
    }

    /// Directory in which the domain `uuid` may have disks of its own: it is removed with the
    /// domain, and stays in place when that is renamed. Its parent directory is created.
    ///
    /// # Errors
    /// When the parent cannot be created.
    pub fn place_for_disks(&self, uuid: &str) -> anyhow::Result<PathBuf> {
        let all = self.state.join(DISKS);
        self.disk.mkdir(&all).with_context(|| format!("cannot make {}", all.display()))?;
        Ok(all.join(uuid))
    }

    /// Directory of the witness of domains whose two sides are on this host; it is created.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn place_for_witness(&self) -> anyhow::Result<PathBuf> {
        let path = self.state.join(WITNESS);
        self.disk.mkdir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The disks that were made for the domain `uuid`, sorted.
    pub fn own_disks(&self, uuid: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state.join(DISKS).join(uuid)).into_iter().flatten();
        let mut disks: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        disks.sort();
        disks
    }

    /// Remove a domain that does not run, and the disks that were made for it.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn forget(&self, place: &Place) -> anyhow::Result<()> {
        let target = place.managed.then(|| fs::read_link(&place.run).ok()).flatten();
        let disks = place.description().ok().filter(|_| !place.managed);
        let disks = disks.map(|description| self.state.join(DISKS).join(description.uuid));
        // First what could no longer be found without the record.
        target
            .map_or(Ok(()), |run| self.disk.remove_tree(&run))
            .and_then(|()| disks.map_or(Ok(()), |disks| self.disk.remove_tree(&disks)))
            // From here on it is not registered, whatever is left.
            .and_then(|()| self.disk.remove(&place.record()))
            .and_then(|()| self.disk.sync(&place.home))
            .and_then(|()| self.disk.remove_tree(&place.home))
            .with_context(|| format!("cannot remove {}", place.home.display()))
    }

    /// Rename a domain. The caller holds both locks, and the new name is not in use.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn rename(&self, place: &Place, to: &Name) -> anyhow::Result<()> {
        let new = place.home.with_file_name(to.as_str());
        self.disk
            .remove_tree(&new)
            .and_then(|()| self.disk.rename(&place.home, &new))
            .and_then(|()| disk::sync_parent(&*self.disk, &new))
            .with_context(|| format!("cannot rename {}", place.home.display()))
    }

    /// Turn the monitor of a registered domain into an unmanaged domain called `to`, so that the
    /// registered one can be started again. The caller holds both locks, and the new name is not in
    /// use.
    ///
    /// # Errors
    /// When the disk is full or cannot be written.
    pub fn set_aside(&self, place: &Place, to: &Name) -> anyhow::Result<()> {
        let new = self.run.join(to.as_str());
        let old = fs::read_link(&place.run)
            .with_context(|| format!("cannot read {}", place.run.display()))?;
        let description = place.description()?;
        write(&*self.disk, &old.join(RECORD), &description)
            .and_then(|()| self.disk.remove_tree(&new))
            .and_then(|()| self.disk.rename(&old, &new))
            .and_then(|()| disk::sync_parent(&*self.disk, &new))
            .with_context(|| format!("cannot rename {}", old.display()))
    }

    /// Create the directory that a monitor is to be started in, with its configuration, and assign
    /// a number to the domain.
    ///
    /// # Errors
    /// When the disk is full or cannot be written.
    pub fn prepare(
        &self,
        place: &Place,
        description: &Description,
        config: &Value,
    ) -> anyhow::Result<u32> {
        let cannot = || format!("cannot prepare {}", place.run.display());
        if place.managed {
            let target = self.run.join(".managed").join(&description.uuid);
            self.disk.mkdir(&target).with_context(cannot)?;
            if fs::read_link(&place.run).ok().as_ref() != Some(&target) {
                self.disk
                    .remove(&place.run)
                    .and_then(|()| self.disk.link(&target, &place.run))
                    .with_context(cannot)?;
            }
        }
        self.clear(place)?;
        let config = serde_json::to_vec_pretty(config)?;
        self.disk.write(&place.run.join(CONFIG), &config).with_context(cannot)?;
        // One process at a time, so that numbers are unique.
        let path = self.lock_path(&place.name, "id")?.with_file_name(".id");
        let _numbers = Lock::wait(&path).with_context(cannot)?;
        let used = self.names()?.iter().filter_map(|name| self.find(name)?.id()).max();
        let id = used.unwrap_or(0).saturating_add(1);
        write(&*self.disk, &place.run.join(START), &Start { id }).with_context(cannot)?;
        Ok(id)
    }

    /// Record that the monitor that was started answers.
    ///
    /// # Errors
    /// When the disk is full or cannot be written.
    pub fn is_up(&self, place: &Place) -> io::Result<()> {
        self.disk.write(&place.run.join(UP), b"")
    }

    /// Remove what a monitor that has ended may have left, except its log.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn clear(&self, place: &Place) -> anyhow::Result<()> {
        for name in [START, UP, "qmp.sock", "console.sock", "replica.sock", "agent", "pid"] {
            let path = place.run.join(name);
            self.disk.remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Remove what an interrupted save has left in the domain's store, and a state that no longer
    /// counts.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn clear_store(&self, place: &Place) -> anyhow::Result<()> {
        if !place.managed {
            return Ok(());
        }
        if !place.is_saved() {
            let saved = place.saved();
            self.disk
                .remove_tree(&saved)
                .with_context(|| format!("cannot remove {}", saved.display()))?;
        }
        self.discard_invalid(place)
    }

    /// Make the suspended state no longer count. It still exists: see [`Self::revalidate`].
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn invalidate(&self, place: &Place) -> anyhow::Result<()> {
        let spent = place.home.join(INVALID);
        self.disk
            .remove_tree(&spent)
            .and_then(|()| self.disk.rename(&place.saved(), &spent))
            .and_then(|()| self.disk.sync(&place.home))
            .with_context(|| format!("cannot rename {}", place.saved().display()))
    }

    /// Make the suspended state count again: its guest has not run.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn revalidate(&self, place: &Place) -> anyhow::Result<()> {
        self.disk
            .rename(&place.home.join(INVALID), &place.saved())
            .and_then(|()| self.disk.sync(&place.home))
            .with_context(|| format!("cannot rename {} back", place.saved().display()))
    }

    /// Remove a suspended state that no longer counts.
    ///
    /// # Errors
    /// When the disk cannot be written.
    pub fn discard_invalid(&self, place: &Place) -> anyhow::Result<()> {
        let spent = place.home.join(INVALID);
        self.disk.remove_tree(&spent).with_context(|| format!("cannot remove {}", spent.display()))
    }
}

/// Name of a suspended state that no longer counts.
const INVALID: &str = "spent";
