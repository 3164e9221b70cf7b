//! Saves that keep the guest's disks: when copying starts, and when it is given up.
use std::sync::Arc;

use machine::disk::{Disk, DiskCopy};
use qmp::Error;

use super::{Failed, How, Saving, status::UnderWay};
use crate::{bounds, vmm::Vmm};

/// A disk's id, and its copy in the making.
pub(super) type Named = (String, Arc<DiskCopy>);

impl Saving {
    /// Whether the disk `id` is being copied.
    pub(crate) fn copies(&self, id: &str) -> bool {
        self.under_way().is_some_and(|save| save.disks.iter().any(|(disk, _)| disk == id))
    }

    /// Whether disks are being copied.
    pub(crate) fn keeps_disks(&self) -> bool {
        self.under_way().is_some_and(|save| save.how.disks)
    }
}

impl UnderWay {
    /// Let the guest write to its disks freely: the copies under way are given up.
    pub(super) fn abandon_disks(&self) {
        self.disks.iter().for_each(|(_, copy)| copy.abandon());
    }
}

impl Vmm {
    /// The copies to be made: of all disks in slots that the guest can write to.
    pub(super) fn copies_of_disks(&self) -> Result<Vec<Named>, Error> {
        let disks = self.machine.writable_disks();
        let copied = |(id, disk): (String, Arc<Disk>)| match disk.logical_block() {
            512 => Ok((id, DiskCopy::new(disk))),
            block => Err(Error::text(format!(
                "disk '{id}' has blocks of {block} bytes, but a copy in a save has blocks of 512: \
                 leave 'disks' out, and copy {} by other means",
                disk.path().display()
            ))),
        };
        disks.into_iter().map(copied).collect()
    }

    /// Start copying the disks as they are now, while no request is in flight.
    pub(super) fn begin_disks(&mut self) -> Result<(), Failed> {
        let Some(UnderWay { disks, how: How { disks: true, .. }, .. }) = self.saving.under_way()
        else {
            return Ok(());
        };
        let now = self.machine.writable_disks();
        let same = |(id, copy): &Named, (now, disk): &(String, Arc<_>)| {
            id == now && Arc::ptr_eq(copy.disk(), disk)
        };
        if disks.len() != now.len() || !disks.iter().zip(&now).all(|(then, now)| same(then, now)) {
            return Err(Failed::Disks);
        }
        disks.iter().for_each(|(_, copy)| copy.begin());
        Ok(())
    }

    /// Give up a save whose storage blocks the guest's writes to its disks.
    pub(super) fn end_stalled_save(&mut self) {
        let Some(save) = self.saving.under_way_mut() else { return };
        let stalled = |copy: &DiskCopy| copy.stalled().is_some_and(|time| time > bounds::DISK_COPY);
        let Some((id, _)) = save.disks.iter().find(|(_, copy)| stalled(copy)) else { return };
        let why = format!(
            "disk '{id}' was not copied for {} seconds, while the guest waited to write to it: the storage \
             of the save or of the disk is too slow, or hangs",
            bounds::DISK_COPY.as_secs()
        );
        log::error!("the save is abandoned: {why}");
        save.fail(why);
        self.cancel_save();
    }
}
