//! Who holds the lock on an image: the kernel's list of locks does not tell the process for those that
//! belong to open files.
use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::Path,
};

use crate::backend::holder::{entries, find};

/// The process that has a lock on what `file` leads to; `None` when that cannot be found out, as of
/// another user's process.
pub(super) fn of(file: &File) -> Option<u32> {
    let target = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    find(|thread| holds(thread, &target))
}

fn holds(thread: &Path, target: &Path) -> bool {
    entries(&thread.join("fd")).any(|(number, link)| {
        let locked = || fs::read_to_string(thread.join("fdinfo").join(number));
        fs::read_link(link).is_ok_and(|found| found == target)
            && locked().is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}
