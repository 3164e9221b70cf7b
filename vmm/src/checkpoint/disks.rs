//! Disks that a save keeps beside the memory.
//!
//! Each is a file of its own in the save's directory, called `disk-ID.SAVE` after the id of the
//! disk and the id of the save that it belongs to. So the disks of an earlier save stay unchanged
//! until the new save is complete, and a process killed in between leaves only files that belong to
//! no save.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use machine::disk::{CopyMethod, DiskCopy, Step};
use state::{
    Config,
    config::{Contents, Id, KeptDisk},
};

use super::{Progress, SaveError};

/// A clone that delays the guest's writes for longer than this is logged.
const LONG_CLONE: Duration = Duration::from_millis(5);

/// The disk copies of one save.
pub struct DiskCopies {
    directory: PathBuf,
    id: Id,
    files: Vec<Target>,
    done: bool,
}

struct Target {
    /// Id of the disk.
    id: String,
    name: String,
    path: PathBuf,
    file: File,
    copy: Arc<DiskCopy>,
}

impl DiskCopies {
    /// Create files in `directory` for copies of `disks`, each with its id, for the save `id`.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(
        directory: &Path,
        id: u128,
        disks: Vec<(String, Arc<DiskCopy>)>,
    ) -> Result<Self, SaveError> {
        let (id, files) = (Id::from(id), Vec::new());
        let mut this = Self { directory: directory.into(), id, files, done: false };
        for (id, copy) in disks {
            let name = format!("{PREFIX}{id}.{}", this.id);
            let path = directory.join(&name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            let file = options.open(&path).map_err(|source| SaveError::File {
                what: "create",
                path: path.clone(),
                source,
            })?;
            this.files.push(Target { id, name, path, file, copy });
        }
        Ok(this)
    }

    /// Flush what the guest has written so far to the media. Otherwise cloning would have to do so
    /// while the guest's writes wait.
    ///
    /// # Errors
    /// When a flush fails.
    pub fn sync(&self) -> Result<(), SaveError> {
        self.files.iter().try_for_each(|target| {
            let path = target.copy.disk().path().to_owned();
            target.copy.sync().map_err(|source| SaveError::File { what: "sync", path, source })
        })
    }

    /// Copy all disks, as they were when the guest was captured.
    ///
    /// # Errors
    /// When one cannot be read or written, or the save is cancelled.
    pub fn make(&self, progress: &Progress) -> Result<(), SaveError> {
        let total = self.files.iter().map(|target| target.copy.disk().size()).sum();
        progress.disks_total.store(total, Ordering::Relaxed);
        for Target { id, path, file, copy, .. } in &self.files {
            let made = copy.make(file, |Step { done, written }| {
                progress.disks_done.fetch_add(done, Ordering::Relaxed);
                progress.disks_written.fetch_add(written, Ordering::Relaxed);
                progress.check()
            });
            match made.map_err(|source| failed(path, copy.disk().size(), source))? {
                CopyMethod::Cloned(took) if took > LONG_CLONE => {
                    log::warn!(
                        "disk '{id}' was cloned; writes of its guest waited {took:?} for it"
                    );
                }
                CopyMethod::Cloned(took) => log::info!("disk '{id}' was cloned in {took:?}"),
                CopyMethod::Copied => log::info!("disk '{id}' was copied"),
            }
        }
        Ok(())
    }

    /// Make the copies durable, and record them in `config`.
    ///
    /// # Errors
    /// When a flush fails, or a disk has gone.
    pub fn record(&self, config: &mut Config) -> Result<(), SaveError> {
        for Target { id, name, path, file, copy } in &self.files {
            let failed = |source| SaveError::File { what: "sync", path: path.clone(), source };
            let mark = copy.seal(file).map_err(failed)?.into();
            let mut disks = config.slots.iter_mut().filter_map(|slot| match &mut slot.contents {
                Contents::Disk(disk) => disk.as_mut(),
                _ => None,
            });
            let disk = disks.find(|disk| disk.id == *id);
            let gone = || SaveError::DisksChanged { id: id.clone() };
            disk.ok_or_else(gone)?.kept = Some(KeptDisk { file: name.clone(), mark });
        }
        Ok(())
    }

    /// The save is complete: remove the disks of earlier saves in this directory.
    pub fn keep(mut self) {
        self.done = true;
        remove_others(&self.directory, Some(self.id));
    }
}

/// Remove the disks in `directory` that belong to other saves than `id`.
pub fn remove_others(directory: &Path, id: Option<Id>) {
    let id = id.map(|id| id.to_string());
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        if owner.is_some() && owner != id.as_deref() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

impl Drop for DiskCopies {
    fn drop(&mut self) {
        for Target { path, copy, .. } in &self.files {
            copy.abandon();
            if !self.done {
                let _ = fs::remove_file(path);
            }
        }
    }
}

const PREFIX: &str = "disk-";

/// Id of the save that a file of this name belongs to, if it is a kept disk.
fn owner(name: &str) -> Option<&str> {
    let (_, owner) = name.strip_prefix(PREFIX)?.rsplit_once('.')?;
    let id = owner.len() == 32 && owner.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    id.then_some(owner)
}

fn failed(path: &Path, bytes: u64, source: io::Error) -> SaveError {
    let path = path.into();
    match source.kind() {
        io::ErrorKind::Interrupted => SaveError::Cancelled,
        io::ErrorKind::StorageFull => {
            SaveError::Full { path, needed: bytes.div_ceil(1 << 20), source }
        }
        _ => SaveError::File { what: "copy a disk to", path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_saves_make_belong_to_one() {
        let id = "00112233445566778899aabbccddeeff";
        assert_eq!(owner(&format!("disk-root.{id}")), Some(id));
        assert_eq!(owner(&format!("disk-a.b.{id}")), Some(id));
        for other in
            ["disk-root.img", "disk-", "memory", "disk-root.00112233445566778899AABBCCDDEEFF"]
        {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
