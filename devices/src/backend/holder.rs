//! Which process has what only one can have, as its open files tell. Asks the kernel alone and never a
//! file's storage, which may hang.
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The first other process with a thread of which `holds` says so: it is given the thread's directory in
/// /proc. `None` when none can be found, as one of another user.
pub fn find(holds: impl Fn(&Path) -> bool) -> Option<u32> {
    let processes =
        entries(Path::new("/proc")).filter_map(|(name, path)| Some((name.parse().ok()?, path)));
    processes
        .filter(|(pid, _)| *pid != std::process::id())
        .find(|(_, process)| {
            // A process whose first thread has ended shows its descriptors in the others alone.
            let threads = entries(&process.join("task")).map(|(_, thread)| thread);
            std::iter::once(process.clone()).chain(threads).any(|thread| holds(&thread))
        })
        .map(|(pid, _)| pid)
}

/// Names and paths of what is in `directory`.
pub fn entries(directory: &Path) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}
