//! Makes what guests read: cpio archives for an initramfs, and ext4 images. Also reads files from
//! such images.
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::fs::XattrFlags;

use crate::debian::{Debian, output};

/// Type bits and permissions of a directory, a program, a file, a symbolic link.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// Writes a cpio archive in the "newc" format (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
pub struct Cpio<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// An archive without entries.
    pub const fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// A directory; its parents must exist already.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// A file that may be executed.
    ///
    /// # Errors
    /// See [`Self::directory`].
    pub fn program(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, PROGRAM, content)
    }

    /// A file.
    ///
    /// # Errors
    /// See [`Self::directory`].
    pub fn file(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.entry(name, PLAIN, content)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// See [`Self::directory`].
    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, LINK, target.as_bytes())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// See [`Self::directory`].
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other("a file of more than 4 GiB"))?;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size,
        // checksum
        let name_size = name.len() as u32 + 1;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let zeroes = [0; 3];
        self.out.write_all(zeroes.get(..written.wrapping_neg() % 4).unwrap_or_default())
    }
}

/// A copy of a disk's image that can replace the image for a saved state: it has the extended
/// attribute by which the state recognises it, as `cp --preserve=xattr` makes it.
///
/// # Errors
/// The image cannot be read or the copy written, or the image has no such attribute.
pub fn copy_image(image: &Path, copy: &Path) -> Result<()> {
    const GENERATION: &str = "user.stratovirt.generation";
    fs::copy(image, copy)?;
    let mut generation = [0; 16];
    rustix::fs::getxattr(image, GENERATION, &mut generation)
        .with_context(|| format!("{} has no {GENERATION}", image.display()))?;
    Ok(rustix::fs::setxattr(copy, GENERATION, &generation, XattrFlags::empty())?)
}

/// Makes an ext4 image of `bytes` at `image`, sparse, with the files of `content`, if given.
///
/// # Errors
/// The image cannot be written or `mke2fs` fails (too small, for instance).
pub fn make_ext4(debian: &Debian, image: &Path, bytes: u64, content: Option<&Path>) -> Result<()> {
    let file = File::create(image).with_context(|| format!("cannot make {}", image.display()))?;
    file.set_len(bytes)
        .with_context(|| format!("cannot extend {} to {bytes} bytes", image.display()))?;
    let mut mke2fs = debian.program("sbin/mke2fs")?;
    // It does not find its configuration file, so the options that matter are given.
    mke2fs
        .env("MKE2FS_CONFIG", "/dev/null")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0"]);
    mke2fs.args([
        "-O",
        "extent,dir_index,filetype,sparse_super,large_file,has_journal,metadata_csum,64bit,flex_bg",
    ]);
    mke2fs.args(["-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard"]);
    if let Some(content) = content {
        mke2fs.arg("-d").arg(content);
    }
    output(mke2fs.arg(image)).map(drop)
}

/// The content of the file `name` in an ext4 image that is not mounted.
///
/// # Errors
/// No such file, or no such image.
pub fn read_ext4(debian: &Debian, image: &Path, name: &str) -> Result<String> {
    let mut debugfs = debian.program("sbin/debugfs")?;
    let content = output(debugfs.arg("-R").arg(format!("cat {name}")).arg(image))?;
    // debugfs ends with status 0 whatever happens; without the file it prints nothing.
    ensure!(!content.is_empty(), "no {name} in {}", image.display());
    Ok(content)
}

/// What `e2fsck` finds in an ext4 image that is not mounted: with `mend`, after replaying the
/// journal as the next mount would; otherwise in the image as it is.
///
/// # Errors
/// The file system is damaged, or there is none.
pub fn check_ext4(debian: &Debian, image: &Path, mend: bool) -> Result<String> {
    let mut e2fsck = debian.program("sbin/e2fsck")?;
    e2fsck.arg("-f").arg(if mend { "-p" } else { "-n" }).arg(image);
    let out = e2fsck.output().context("cannot run e2fsck")?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let said = said + &String::from_utf8_lossy(&out.stderr);
    // 1: errors were corrected.
    let good = out.status.code().is_some_and(|code| code == 0 || (mend && code == 1));
    ensure!(good, "{} is damaged ({}):\n{said}", image.display(), out.status);
    Ok(said)
}

/// Links or copies `from` to `to`, creating `to`'s parent directories, unless `to` exists. Makes a
/// hard link where that is possible.
///
/// # Errors
/// `from` cannot be read or `to` not be written.
pub fn place(from: &Path, to: &Path) -> Result<()> {
    if to.exists() { Ok(()) } else { replace(from, to) }
}

/// As [`place`], but replaces an existing file. Other processes may do the same at the same time.
///
/// # Errors
/// As [`place`].
pub fn replace(from: &Path, to: &Path) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let from = fs::canonicalize(from).with_context(|| format!("cannot find {}", from.display()))?;
    // Under a temporary name first: copying onto a link to the same file would empty it.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = to.file_name().context("a path without a name")?.to_string_lossy();
    let own = to.with_file_name(format!("{name}.{}.{count}", std::process::id()));
    if fs::hard_link(&from, &own).is_err() {
        fs::copy(&from, &own).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    fs::rename(&own, to).with_context(|| format!("cannot make {}", to.display()))?;
    // Where both are links to one file, a rename does nothing.
    match fs::remove_file(&own) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The names of a busybox's applets.
///
/// # Errors
/// It cannot be run.
pub fn applets(busybox: &Path) -> Result<Vec<String>> {
    let list = output(std::process::Command::new(busybox).arg(OsStr::new("--list")))?;
    Ok(list.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_placed_again_and_again_stays_whole() {
        let dir = std::env::temp_dir().join(format!("place.{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (from, to) = (dir.join("from"), dir.join("there/to"));
        fs::write(&from, "whole").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| replace(&from, &to).unwrap()));
            }
        });
        assert_eq!(fs::read_to_string(&from).unwrap(), "whole");
        assert_eq!(fs::read_to_string(&to).unwrap(), "whole");
        assert_eq!(fs::read_dir(dir.join("there")).unwrap().count(), 1, "nothing else is left");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_archive_is_made_of_headers_names_and_contents_each_padded_to_four_bytes() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.directory("etc").unwrap();
        cpio.file("etc/motd", b"hello").unwrap();
        let archive = cpio.finish().unwrap();
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        assert!(text.starts_with("07070100000001000041ed"), "{text}");
        assert!(text.contains("etc/motd\0"));
        assert!(text.contains("hello\x00\x00\x00070701"), "{text}");
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
