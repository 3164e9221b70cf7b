//! The disks of a machine restored from a save that keeps disks: copies of its own, so that one
//! save can be restored any number of times, also concurrently.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use config::{Description, Expect};
use machine::{disk::data_after, sparse};
use state::{
    Config,
    kept_disks::{self, KeptDiskError},
};

use super::Progress;

/// Bytes copied in one step.
const PIECE: u64 = 1 << 20;

/// Why the disks of a restored machine cannot be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum ChildError {
    #[error(
        "disk '{id}' is part of the save: name a directory for this machine's own copies with \
         -incoming file:DIR,disks=DIR, or give an image with -drive id={id},file=PATH"
    )]
    NoPlace { id: String },
    #[error(transparent)]
    Kept(#[from] KeptDiskError),
    #[error("cannot create the directory {}: its parent must exist", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "disk '{id}': cannot create {}; each machine needs a directory (disks=) of its \
         own", path.display()
    )]
    Create { id: String, path: PathBuf, source: io::Error },
    #[error("disk '{id}': cannot copy {} to {}", kept.display(), path.display())]
    Copy { id: String, kept: PathBuf, path: PathBuf, source: io::Error },
}

/// The disks that were made for a machine. They are removed if this is dropped without
/// [`Children::keep`].
#[derive(Debug, Default)]
pub struct Children {
    /// The index of the slot, and the image.
    made: Vec<(usize, PathBuf)>,
    directory: Option<PathBuf>,
    kept: bool,
}

/// Where the disks come from, and where they are made.
pub struct Wanted<'a> {
    /// Directory of the save.
    pub save: &'a Path,
    /// Directory for the copies, if one was named.
    pub place: Option<&'a Path>,
    /// Whether the disk with this id comes from elsewhere.
    pub given: &'a dyn Fn(&str) -> bool,
    /// The user vouches for the files in the save.
    pub force: bool,
}

impl Children {
    /// Make an image for each disk that the save of `config` keeps and that is not given otherwise,
    /// and put its path into `description`.
    ///
    /// # Errors
    /// The first error; no image is left then.
    pub fn make(
        config: &Config,
        description: &mut Description,
        wanted: &Wanted<'_>,
        progress: &Progress,
    ) -> Result<Self, ChildError> {
        let mut this = Self::default();
        let mut copies = Vec::new();
        for (slot, _, kept) in kept_disks::kept(config) {
            let disk = description.occupied.disks.get(slot).and_then(Option::as_ref);
            let Some(disk) = disk.filter(|disk| !(wanted.given)(&disk.id)) else { continue };
            let id = disk.id.to_string();
            let Some(place) = wanted.place else { return Err(ChildError::NoPlace { id }) };
            let (path, file) = kept_disks::open(&id, kept, wanted.save, wanted.force)?;
            progress.total.fetch_add(kept.mark.size, Ordering::Relaxed);
            copies.push((slot, id, place, path, file, kept.mark.size));
        }
        for (slot, id, place, kept, from, size) in copies {
            this.make_directory(place)?;
            let path = place.join(format!("{id}.img"));
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            let to = options.open(&path).map_err(|source| ChildError::Create {
                id: id.clone(),
                path: path.clone(),
                source,
            })?;
            this.made.push((slot, path.clone()));
            copy(&from, &to, size, progress).map_err(|source| ChildError::Copy {
                id,
                kept,
                path,
                source,
            })?;
        }
        for (slot, path) in &this.made {
            if let Some(Some(disk)) = description.occupied.disks.get_mut(*slot) {
                disk.path.clone_from(path);
                // It was copied from the save just now.
                (disk.expect, disk.probe) = (Expect::Any, false);
            }
        }
        Ok(this)
    }

    /// The machine uses the disks: keep them.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn make_directory(&mut self, place: &Path) -> Result<(), ChildError> {
        match DirBuilder::new().mode(0o700).create(place) {
            Ok(()) => self.directory = Some(place.into()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(ChildError::Directory { path: place.into(), source }),
        }
        Ok(())
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        if !self.kept {
            for (_, path) in &self.made {
                let _ = fs::remove_file(path);
            }
            if let Some(directory) = &self.directory {
                let _ = fs::remove_dir(directory);
            }
        }
    }
}

/// Copy `from` to `to`: by sharing blocks where the file system can, else with the same holes.
fn copy(from: &File, to: &File, size: u64, progress: &Progress) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        progress.done.fetch_add(size, Ordering::Relaxed);
        return Ok(());
    }
    to.set_len(size)?;
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    while at < size {
        progress.check()?;
        let data = data_after(from, at, size)?;
        let length = PIECE.min(size - data);
        let bytes = usize::try_from(length).ok().and_then(|length| buffer.get_mut(..length));
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        from.read_exact_at(bytes, data)?;
        let written = sparse::write(to, bytes, data)?;
        progress.written.fetch_add(written, Ordering::Relaxed);
        progress.done.fetch_add(data + length - at, Ordering::Relaxed);
        at = data + length;
    }
    Ok(())
}
