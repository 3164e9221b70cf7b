//! Opens regular files only, as another kind of file may have been put in their place.
use std::{
    fs::{File, FileType, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::OFlags;

/// Open the regular file at `path` with `options`. Never waits for a reader or writer, as opening a
/// FIFO would, and checks the type of the opened file. The options' custom flags are replaced.
///
/// # Errors
/// When it cannot be opened, or is not a regular file.
pub fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = options.custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() {
        true => Ok(file),
        false => Err(io::Error::other(format!("it is {}, not a regular file", name(kind)))),
    }
}

fn name(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_block_device() => "a block device",
        () if kind.is_char_device() => "a character device",
        () => "something unknown",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
        let dir = tempdir().unwrap();
        let (fifo, file) = (dir.path().join("fifo"), dir.path().join("file"));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::write(&file, "text").unwrap();
        let read = |path: &Path| open_regular(path, File::options().read(true));
        for (path, says) in [
            (fifo.as_path(), "it is a FIFO, not a regular file"),
            (dir.path(), "it is a directory, not a regular file"),
            (Path::new("/dev/null"), "it is a character device, not a regular file"),
        ] {
            assert_eq!(read(path).unwrap_err().to_string(), says);
        }
        assert!(open_regular(&fifo, File::options().append(true)).is_err());
        let mut text = String::new();
        read(&file).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }
}
