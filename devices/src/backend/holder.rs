//! Which process holds an exclusive resource, as its open files show. Asks only the kernel, never a
//! file's storage, which may hang.
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The first other process with a thread for which `holds` returns true; `holds` is given the
/// thread's directory in /proc. `None` when none can be found, for example because it is another
/// user's.
pub fn find(holds: impl Fn(&Path) -> bool) -> Option<u32> {
    let processes =
        entries(Path::new("/proc")).filter_map(|(name, path)| Some((name.parse().ok()?, path)));
    processes
        .filter(|(pid, _)| *pid != std::process::id())
        .find(|(_, process)| {
            // After the first thread of a process has ended, only its other threads show the
            // descriptors.
            let threads = entries(&process.join("task")).map(|(_, thread)| thread);
            std::iter::once(process.clone()).chain(threads).any(|thread| holds(&thread))
        })
        .map(|(pid, _)| pid)
}

/// Names and paths of the entries of `directory`.
pub fn entries(directory: &Path) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}
