//! Who holds the lock on an image: the kernel's list of locks does not tell the process for those that
//! belong to open files.
use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// The process that has a lock on what `file` leads to; `None` when that cannot be found out, as of
/// another user's process. Asks the kernel alone and never the file's storage, which may hang.
pub(super) fn of(file: &File) -> Option<u32> {
    let target = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let processes =
        entries(Path::new("/proc")).filter_map(|(name, path)| Some((name.parse().ok()?, path)));
    processes
        .filter(|(pid, _)| *pid != std::process::id())
        .find(|(_, process)| {
            // A process whose first thread has ended shows its descriptors in the others alone.
            let threads = entries(&process.join("task")).map(|(_, thread)| thread);
            std::iter::once(process.clone()).chain(threads).any(|thread| holds(&thread, &target))
        })
        .map(|(pid, _)| pid)
}

fn holds(thread: &Path, target: &Path) -> bool {
    entries(&thread.join("fd")).any(|(number, link)| {
        let locked = || fs::read_to_string(thread.join("fdinfo").join(number));
        fs::read_link(link).is_ok_and(|found| found == target)
            && locked().is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}

fn entries(directory: &Path) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}
