//! The copies of disks that a save keeps beside its memory.
use std::{
    fs::File,
    io,
    path::{Component, Path, PathBuf},
};

use crate::{
    Config,
    config::{Contents, KeptDisk},
    device::Mark,
    regular_file::open_regular,
};

/// Why a kept disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum KeptDiskError {
    #[error("disk '{id}': {name:?} is not a file name in the save's directory")]
    Name { id: String, name: String },
    #[error("disk '{id}': cannot open {}, which the save keeps", path.display())]
    Open { id: String, path: PathBuf, source: io::Error },
    #[error(
        "disk '{id}': {} is not as it was saved: {what}. If it is the right one nevertheless, confirm with \
         --force (-incoming ...,force=on)",
        path.display()
    )]
    Changed { id: String, path: PathBuf, what: &'static str },
}

/// The disks that a save keeps: the indices of their slots, and their ids.
pub fn kept(config: &Config) -> impl Iterator<Item = (usize, &str, &KeptDisk)> {
    config.slots.iter().filter_map(|slot| match &slot.contents {
        Contents::Disk(Some(disk)) => {
            let slot = slot.id.strip_prefix("disk")?.parse().ok()?;
            Some((slot, disk.id.as_str(), disk.kept.as_ref()?))
        }
        _ => None,
    })
}

/// Check that the disks kept by the save `config` in the directory `save` are unchanged.
///
/// # Errors
/// The first one that has changed.
pub fn check(save: &Path, config: &Config) -> Result<(), KeptDiskError> {
    kept(config).try_for_each(|(_, id, kept)| open(id, kept, save, false).map(drop))
}

/// Open a kept disk, and check that it is unchanged; with `force`, only its size is checked.
///
/// # Errors
/// When it has changed, or cannot be opened.
pub fn open(
    id: &str,
    kept: &KeptDisk,
    save: &Path,
    force: bool,
) -> Result<(PathBuf, File), KeptDiskError> {
    let mut parts = Path::new(&kept.file).components();
    let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
        return Err(KeptDiskError::Name { id: id.into(), name: kept.file.clone() });
    };
    let path = save.join(&kept.file);
    let failed = |source| KeptDiskError::Open { id: id.into(), path: path.clone(), source };
    let file = open_regular(&path, File::options().read(true)).map_err(failed)?;
    let (found, then) = (Mark::of(&file).map_err(failed)?, &kept.mark);
    let what = match () {
        () if found.size != then.size => Some("it has another size"),
        () if force => None,
        () if found.mtime_ns != then.mtime_ns => {
            Some("it has been written since, or its modification time was lost")
        }
        // If the file system has no extended attributes now, there is nothing to compare.
        () if found.generation.is_some() && found.generation != then.generation => {
            Some("it has another mark")
        }
        () => None,
    };
    match what {
        Some(what) => Err(KeptDiskError::Changed { id: id.into(), path, what }),
        None => Ok((path, file)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_names_no_file_outside_of_its_directory() {
        let mark = Mark { generation: None, size: 0, mtime_ns: 0 };
        for name in ["", ".", "..", "/etc/passwd", "../other/disk", "a/b"] {
            let kept = KeptDisk { file: name.into(), mark };
            let refused = open("root", &kept, Path::new("/tmp"), true);
            assert!(matches!(refused, Err(KeptDiskError::Name { .. })), "{name:?}: {refused:?}");
        }
    }
}
