//! Where files are: on the user's machine under `target/stories`; inside the emulated host where
//! [`crate::host`] has put them, which three environment variables name.
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Names the cache on the host that tests run on.
pub const CACHE: &str = "STORIES_CACHE";
/// Names the scratch directory on the host that tests run on.
pub const SCRATCH: &str = "STORIES_SCRATCH";
/// Names the monitor's binary, which is built otherwise.
pub const BINARY: &str = "STRATOVIRT_BIN";
/// Names `stratoctl`'s binary, which is built otherwise.
pub const STRATOCTL: &str = "STRATOCTL_BIN";
/// Names one more guest kernel, for the tests that Debian's kernel cannot run.
pub const GUEST_KERNEL: &str = "STRATOVIRT_GUEST_KERNEL";

/// Seed of the tests' random choices: a number that an earlier run has printed.
pub const SEED: &str = "STORIES_SEED";

/// The three places a test needs.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Artefacts: Debian's files and the guests made from them. Tests only read them.
    pub cache: PathBuf,
    /// What tests write: sockets, disk images, logs. Supports `O_DIRECT`.
    pub scratch: PathBuf,
    /// The monitor.
    pub stratovirt: PathBuf,
}

impl Paths {
    /// The places that the environment names, for use in a test.
    ///
    /// # Errors
    /// One of the three variables is missing.
    pub fn from_env() -> Result<Self> {
        let path = |name| {
            env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set"))
        };
        Ok(Self { cache: path(CACHE)?, scratch: path(SCRATCH)?, stratovirt: path(BINARY)? })
    }

    /// Those of [`Self::from_env`] in a process that was given them, otherwise those of
    /// [`Self::on_this_machine`].
    ///
    /// # Errors
    /// As these.
    pub fn of_this_host() -> Result<Self> {
        match env::var_os(SCRATCH) {
            Some(_) => Self::from_env(),
            None => Self::on_this_machine(),
        }
    }

    /// The places on the user's machine, made if missing. Does not look for the monitor.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn on_this_machine() -> Result<Self> {
        let home = target_dir()?.join("stories");
        let paths = Self {
            cache: home.join("cache"),
            scratch: home.join("scratch"),
            stratovirt: PathBuf::new(),
        };
        for dir in [&paths.cache, &paths.scratch] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(paths)
    }

    /// The unpacked Debian packages.
    #[must_use]
    pub fn debian(&self) -> PathBuf {
        self.cache.join("debian/root")
    }

    /// Kernels and initramfs of the guests.
    #[must_use]
    pub fn guest(&self, name: &str) -> PathBuf {
        self.cache.join("guest").join(name)
    }

    /// An empty directory for one test.
    ///
    /// # Errors
    /// It cannot be emptied or made.
    pub fn fresh_scratch(&self, name: &str) -> Result<PathBuf> {
        let dir = self.scratch.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// Keeps other processes from changing the cache until the file is dropped.
    ///
    /// # Errors
    /// The lock file cannot be made or locked.
    pub fn lock(&self) -> Result<File> {
        let path = self.cache.join("lock");
        let file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// Cargo's target directory: the one above this executable with cargo's tag in it.
fn target_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("cannot determine the path of this executable")?;
    match exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()) {
        Some(dir) => Ok(dir.to_owned()),
        None => bail!("{} is not in a cargo target directory", exe.display()),
    }
}

/// Root of the workspace this was built from.
#[must_use]
pub fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Puts `make`'s result at `path`, atomically.
///
/// # Errors
/// `make` fails, or the file system does.
pub fn atomically(path: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().context("a path without a name")?.to_string_lossy();
    let unfinished = path.with_file_name(format!("{name}.part"));
    if unfinished.is_dir() {
        fs::remove_dir_all(&unfinished)
            .with_context(|| format!("cannot remove {}", unfinished.display()))?;
    }
    make(&unfinished)?;
    if path.is_dir() {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    fs::rename(&unfinished, path).with_context(|| format!("cannot rename to {}", path.display()))
}
