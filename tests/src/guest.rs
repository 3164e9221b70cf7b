//! The guests: Debian's kernel in three formats, an initramfs, and disks with ext4 file systems.
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::{Cpio, applets, make_ext4, place};
use crate::debian::{Debian, output};
use crate::kernel;
use crate::paths::{Paths, atomically, workspace};
use crate::progress::Step;

/// The kernel modules that a guest needs.
const MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "button",
    "evdev",
    "pvpanic_mmio",
];
/// Init of every guest.
const INIT: &str = include_str!("init/guest.sh");
/// Source of `load`, which keeps a guest busy, and of its module.
const LOAD: &str = "tests/src/init/load.rs";
const LOAD_SOURCE: [&str; 2] = [include_str!("init/load.rs"), include_str!("stream.rs")];

/// Source of the replicated guest's only program, and of its modules.
const REPLICATED: &str = "tests/src/init/replicated.rs";
const REPLICATED_SOURCE: [&str; 3] = [
    include_str!("init/replicated.rs"),
    include_str!("init/basics.rs"),
    include_str!("counted.rs"),
];
/// The modules that this guest needs.
const REPLICATED_MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "virtio_net"];

/// The format of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// ELF `vmlinux`.
    Elf,
    /// bzImage, as packaged.
    BzImage,
    /// Flat `vmlinux.bin`.
    Flat,
    /// The one that `STRATOVIRT_GUEST_KERNEL` names.
    Given,
}

impl Kernel {
    /// Its path.
    #[must_use]
    pub fn path(self, paths: &Paths) -> PathBuf {
        paths.guest(match self {
            Self::Elf => "vmlinux",
            Self::BzImage => "bzImage",
            Self::Flat => "vmlinux.bin",
            Self::Given => "given",
        })
    }
}

/// The initramfs.
#[must_use]
pub fn initramfs(paths: &Paths) -> PathBuf {
    paths.guest("initrd.cpio")
}

/// The initramfs of the replicated guest; `init/replicated.rs` says what it does.
#[must_use]
pub fn replicated_initramfs(paths: &Paths) -> PathBuf {
    paths.guest("replicated.cpio")
}

/// Makes kernels and both initramfs from Debian's packages, unless they exist and are up to date.
///
/// # Errors
/// A package is not as expected, or the cache cannot be written.
pub fn make(paths: &Paths, debian: &Debian) -> Result<()> {
    let dir = paths.cache.join("guest");
    let bzimage = debian.bzimage()?;
    let sources = [LOAD_SOURCE.concat(), REPLICATED_SOURCE.concat()].concat();
    let mark =
        format!("{}\n{INIT}\n{MODULES:?}\n{REPLICATED_MODULES:?}\n{sources}", bzimage.display());
    if fs::read_to_string(dir.join("mark")).is_ok_and(|have| have == mark) {
        return Ok(());
    }
    let step = Step::spinner("Making guest kernels and initramfs");
    atomically(&dir, |dir| {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let packed =
            fs::read(&bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
        let vmlinux = kernel::vmlinux(&packed)
            .with_context(|| format!("cannot unpack {}", bzimage.display()))?;
        fs::write(dir.join("vmlinux.bin"), kernel::flat(&vmlinux)?)?;
        fs::write(dir.join("vmlinux"), vmlinux)?;
        fs::write(dir.join("bzImage"), packed)?;
        let load = dir.join("load");
        static_program(LOAD, &load)?;
        let programs = [("bin/load", load.as_path())];
        fs::write(dir.join("initrd.cpio"), system(debian, INIT, MODULES, &[], &programs)?)?;
        let init = dir.join("replicated");
        static_program(REPLICATED, &init)?;
        let mut cpio = Cpio::new(Vec::new());
        cpio.program("init", &fs::read(&init)?)?;
        cpio.directory("modules")?;
        add_modules(&mut cpio, debian, REPLICATED_MODULES)?;
        fs::write(dir.join("replicated.cpio"), cpio.finish()?)?;
        fs::write(dir.join("mark"), mark)?;
        Ok(())
    })?;
    step.done();
    Ok(())
}

/// Builds the Rust program in `source`, a path in the workspace, as a static program.
///
/// # Errors
/// It does not build.
pub fn static_program(source: &str, program: &Path) -> Result<()> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let words = "--edition 2024 -O -C target-feature=+crt-static -C relocation-model=static -C panic=abort -C strip=symbols";
    output(Command::new(rustc).current_dir(workspace()).args(words.split(' ')).args([
        OsStr::new("-o"),
        program.as_os_str(),
        OsStr::new(source),
    ]))
    .with_context(|| format!("{source} does not build"))
    .map(drop)
}

/// An initramfs: busybox with all its applets, modules and their load order, an init, empty
/// directories, and more programs.
///
/// # Errors
/// The packages lack something.
pub fn system(
    debian: &Debian,
    init: &str,
    modules: &[&str],
    dirs: &[&str],
    programs: &[(&str, &Path)],
) -> Result<Vec<u8>> {
    let busybox = debian.file("bin/busybox")?;
    let mut cpio = Cpio::new(Vec::new());
    for dir in ["bin", "dev", "proc", "sys", "tmp", "mnt", "modules"].iter().chain(dirs) {
        cpio.directory(dir)?;
    }
    cpio.program("bin/busybox", &fs::read(&busybox)?)?;
    for name in applets(&busybox)?.iter().filter(|name| *name != "busybox") {
        cpio.link(&format!("bin/{name}"), "busybox")?;
    }
    for (name, program) in programs {
        cpio.program(name, &fs::read(program)?)?;
    }
    add_modules(&mut cpio, debian, modules)?;
    cpio.program("init", init.as_bytes())?;
    Ok(cpio.finish()?)
}

/// Adds modules with what they need, and a list of them in the order in which they load.
fn add_modules(cpio: &mut Cpio<Vec<u8>>, debian: &Debian, modules: &[&str]) -> Result<()> {
    let mut order = String::new();
    for module in kernel::modules(&debian.modules()?, modules)? {
        cpio.file(&format!("modules/{}", module.file), &module.content)?;
        order.push_str(&module.file);
        order.push('\n');
    }
    Ok(cpio.file("modules/order", order.as_bytes())?)
}

/// An ext4 image with a small system, for a root disk.
///
/// # Errors
/// The image cannot be made.
pub fn root_disk(debian: &Debian, image: &Path) -> Result<()> {
    let tree = image.with_extension("tree");
    for dir in ["bin", "dev", "proc", "sys", "tmp", "mnt"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let busybox = debian.file("bin/busybox")?;
    place(&busybox, &tree.join("bin/busybox"))?;
    for name in applets(&busybox)?.iter().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(name))?;
    }
    let init = tree.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    make_ext4(debian, image, 64 << 20, Some(&tree))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(())
}
