//! Which process holds the lock on an image: for locks that belong to open files, the kernel's list
//! of locks does not name the process.
use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::Path,
};

use crate::backend::holder::{entries, find};

/// The process that has a lock on the file that `file` refers to; `None` when that cannot be found
/// out, for example for another user's process.
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
