//! Spot checks of a machine's block devices: ordered when the machine is captured, made afterwards,
//! and compared before it is restored.
use config::{Description, Expect, places::DISK};
use devices::backend::disk::{DiskError, SpotCheck};
use state::{
    Section, SectionError,
    device::{Disk, VirtioMmio},
    hex::HexArray,
};

use crate::MachineState;

/// The spot checks that belong to a captured machine, by slot.
#[derive(Debug, Default)]
pub struct SpotChecks(pub(crate) Vec<(String, SpotCheck)>);

/// Why a disk is not accepted as the one that was saved.
#[derive(Debug, thiserror::Error)]
#[error("disk '{id}'")]
pub struct SpotCheckError {
    /// The disk.
    pub id: String,
    /// The error.
    pub source: DiskError,
}

impl SpotChecks {
    /// Make them and add them to `state`. Waits for storage; until then, writes to blocks not yet
    /// read wait. A disk that cannot be read gets no spot check, and a log line says so.
    ///
    /// # Errors
    /// When `state` is not that of the machine that they were ordered for.
    pub fn add_to(self, state: &mut MachineState) -> Result<(), SectionError> {
        for (slot, check) in self.0 {
            let hash = match check.take() {
                Ok(hash) => hash,
                Err(e) => {
                    log::warn!("{slot}: cannot make a spot check: {e}");
                    continue;
                }
            };
            let Some(section) = state.devices.iter_mut().find(|section| section.id == slot) else {
                let found = format!("without {slot}");
                return Err(SectionError::Kind { found, expected: "a machine with this disk" });
            };
            let mut transport: VirtioMmio = section.read()?;
            let mut disk: Disk = transport.device.read()?;
            disk.spot_check = Some(HexArray(hash));
            transport.device = Section::of(&*transport.device.id, &disk)?;
            *section = Section::of(&*section.id, &transport)?;
        }
        Ok(())
    }
}

/// Compare the disks of `description` with the spot checks in `sections` of the save `id`, except
/// those that are not written and those that the user vouches for. Waits for storage.
///
/// # Errors
/// The first disk that has changed or cannot be read.
pub fn check_spots(
    description: &Description,
    id: u128,
    sections: &[Section],
) -> Result<(), SpotCheckError> {
    for (slot, (disk, size)) in
        description.occupied.disks.iter().zip(&description.disk_sizes).enumerate()
    {
        let Some(disk) = disk.as_ref().filter(|d| !d.readonly && d.expect != Expect::Any) else {
            continue;
        };
        let slot = format!("{DISK}{slot}");
        let section = sections.iter().find(|section| section.id == slot);
        let transport = section.and_then(|section| section.read::<VirtioMmio>().ok());
        // A section that is no disk's is refused where devices load their states.
        let saved = transport.and_then(|transport| transport.device.read::<Disk>().ok());
        let Some(HexArray(seen)) = saved.and_then(|saved| saved.spot_check) else { continue };
        SpotCheck::verify(&disk.path, *size, id, &seen)
            .map_err(|source| SpotCheckError { id: disk.id.to_string(), source })?;
    }
    Ok(())
}
