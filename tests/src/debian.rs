//! Packages of Debian or Ubuntu without installing them: a kernel, busybox, QEMU and a few tools,
//! each with the libraries it was built for, unpacked into the cache ([`crate::packages`]).
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::packages;
use crate::paths::{Paths, atomically};

/// Where both put libraries; the second is only needed before the `/usr` merge.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Unpacked packages.
#[derive(Debug, Clone)]
pub struct Debian {
    root: PathBuf,
}

impl Debian {
    /// The packages of the cache, fetched first if they are not there.
    ///
    /// # Errors
    /// No apt or dpkg, no network, or no sources that have the packages; says which.
    pub fn get(paths: &Paths) -> Result<Self> {
        let home = paths.cache.join("debian");
        let wanted = packages::wanted();
        if fs::read_to_string(home.join("packages")).is_ok_and(|have| have == wanted) {
            return Ok(Self::unpacked(paths));
        }
        for tool in ["apt-get", "dpkg"] {
            ensure!(
                works(Command::new(tool).arg("--version")),
                "{tool} not found: guests are made of the packages of Debian or Ubuntu, so this needs \
                 one of them or a system derived from it"
            );
        }
        atomically(&home, |home| {
            packages::fetch(home, None)?;
            fs::write(home.join("packages"), &wanted).context("cannot record what was fetched")
        })?;
        Ok(Self::unpacked(paths))
    }

    /// The packages in the cache, which must be there already.
    #[must_use]
    pub fn unpacked(paths: &Paths) -> Self {
        Self { root: paths.debian() }
    }

    /// A file of the packages, named from the root. Looks in `/` and `/usr`.
    ///
    /// # Errors
    /// It is in neither.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        let places = [self.root.join(name), self.root.join("usr").join(name)];
        match places.iter().find(|path| path.symlink_metadata().is_ok()) {
            Some(path) => Ok(path.clone()),
            None => bail!("no {name} in Debian's packages under {}", self.root.display()),
        }
    }

    /// A program of the packages with its own dynamic linker and libraries, independent of this
    /// machine's.
    ///
    /// # Errors
    /// No such program.
    pub fn program(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(self.linker()?);
        command.arg("--library-path").arg(self.library_path()).arg(self.file(name)?);
        Ok(command)
    }

    /// All files that [`Self::program`] needs for `name`: linker, program, libraries.
    ///
    /// # Errors
    /// No such program, or a library is missing.
    pub fn program_files(&self, name: &str) -> Result<Vec<PathBuf>> {
        let linker = self.linker()?;
        let program = self.file(name)?;
        let mut list = Command::new(&linker);
        list.arg("--library-path").arg(self.library_path()).arg("--list").arg(&program);
        let mut files = libraries(&output(&mut list)?);
        files.extend([linker, program]);
        Ok(files)
    }

    /// QEMU for x86_64, ready for its arguments.
    ///
    /// # Errors
    /// The packages have none.
    pub fn qemu(&self) -> Result<Command> {
        let mut command = self.program("usr/bin/qemu-system-x86_64")?;
        command.env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(firmware));
        }
        Ok(command)
    }

    /// The kernel as packaged.
    ///
    /// # Errors
    /// There is none.
    pub fn bzimage(&self) -> Result<PathBuf> {
        only_entry(&self.root.join("boot"), "vmlinuz-")
    }

    /// The directory of the kernel's modules.
    ///
    /// # Errors
    /// There is none.
    pub fn modules(&self) -> Result<PathBuf> {
        only_entry(&self.file("lib/modules")?, "")
    }

    fn linker(&self) -> Result<PathBuf> {
        // The link in /lib64 is absolute and would lead to this machine's linker.
        let name = "ld-linux-x86-64.so.2";
        LIBRARIES
            .iter()
            .map(|dir| self.root.join(dir).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("no {name} in Debian's packages"))
    }

    fn library_path(&self) -> String {
        LIBRARIES.map(|dir| self.root.join(dir).display().to_string()).join(":")
    }
}

/// The paths in what `ldd` or `ld.so --list` prints.
#[must_use]
pub fn libraries(listing: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let library = line.split_once("=> ").map_or(line, |(_, found)| found).trim();
        let path = library.split(" (").next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    listing.lines().filter_map(path).collect()
}

/// What a command prints.
///
/// # Errors
/// It cannot be started or fails; the error has its output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        let said = if said.trim().is_empty() { String::from_utf8_lossy(&out.stdout) } else { said };
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!("{name} {}: {}\n{}", args.join(" "), out.status, said.trim());
    }
    String::from_utf8(out.stdout)
        .with_context(|| format!("{name} printed something other than UTF-8"))
}

fn works(command: &mut Command) -> bool {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("nothing named {prefix}* in {}", dir.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_each_library_once_with_its_path() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibgone.so => not found\n";
        let found = libraries(listing);
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"),
                "/lib64/ld-linux-x86-64.so.2".into()
            ]
        );
    }
}
