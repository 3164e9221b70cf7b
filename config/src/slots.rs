//! The number of slots for disks and NICs of a machine. A slot takes one of the interrupts for
//! virtio, as does every other virtio device, so all of them share one budget.
use std::fmt;

use super::{
    MachineConfig, Occupancy,
    limits::{DISK_SLOTS, NIC_SLOTS, VIRTIO_SLOTS},
};

/// Slots for disks and for NICs, made from [`Wanted`]: at least one for each device, and no more
/// than there are interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotCounts {
    disks: usize,
    nics: usize,
}

/// The slots and devices that need interrupts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Slots for disks; `None`: the default number, or as many as there are disks.
    pub disk_slots: Option<usize>,
    /// Slots for NICs, likewise.
    pub nic_slots: Option<usize>,
    /// Disks.
    pub disks: usize,
    /// NICs.
    pub nics: usize,
    /// Devices that have a slot of their own, which no other device can use.
    pub others: Vec<&'static str>,
}

/// Why a machine cannot have its slots.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotsError {
    /// More disks than slots for them.
    #[error("{slots} slots for disks are fewer than the disks that are configured ({disks})")]
    Disks {
        /// Slots.
        slots: usize,
        /// Disks.
        disks: usize,
    },
    /// More NICs than slots for them.
    #[error("{slots} slots for NICs are fewer than the NICs that are configured ({nics})")]
    Nics {
        /// Slots.
        slots: usize,
        /// NICs.
        nics: usize,
    },
    /// More slots than interrupts.
    #[error("{0}")]
    NoRoom(NoRoom),
}

/// All users of interrupts, when there are too few.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoRoom {
    wanted: Wanted,
    slots: SlotCounts,
}

impl SlotCounts {
    /// Slots for disks, the first ones: `addr` 0 is vda.
    pub fn disks(self) -> usize {
        self.disks
    }

    /// Slots for NICs, after those for disks: `addr` 0 is eth0.
    pub fn nics(self) -> usize {
        self.nics
    }

    /// Both.
    pub fn total(self) -> usize {
        self.disks + self.nics
    }
}

impl Wanted {
    /// The requirements of `config` with the current contents of its slots.
    pub fn of(config: &MachineConfig, occupied: &Occupancy) -> Self {
        Self {
            disk_slots: Some(config.slots.disks),
            nic_slots: Some(config.slots.nics),
            disks: config.disks.len().max(occupied.disks.len()),
            nics: config.nics.len().max(occupied.nics.len()),
            others: config.devices.iter().map(|device| device.facts().slot()).collect(),
        }
    }
}

impl TryFrom<Wanted> for SlotCounts {
    type Error = SlotsError;

    fn try_from(wanted: Wanted) -> Result<Self, SlotsError> {
        let (disks, nics) = (wanted.disks, wanted.nics);
        let slots = Self {
            disks: wanted.disk_slots.unwrap_or(disks.max(DISK_SLOTS)),
            nics: wanted.nic_slots.unwrap_or(nics.max(NIC_SLOTS)),
        };
        if slots.disks < disks {
            return Err(SlotsError::Disks { slots: slots.disks, disks });
        }
        if slots.nics < nics {
            return Err(SlotsError::Nics { slots: slots.nics, nics });
        }
        let all = slots.disks.saturating_add(slots.nics).saturating_add(wanted.others.len());
        match all <= VIRTIO_SLOTS {
            true => Ok(slots),
            false => Err(SlotsError::NoRoom(NoRoom { wanted, slots })),
        }
    }
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wanted, slots } = self;
        let all = slots.disks.saturating_add(slots.nics).saturating_add(wanted.others.len());
        write!(f, "{all} virtio devices and slots, at most {VIRTIO_SLOTS} are allowed: ")?;
        write!(f, "{} for disks ({} configured), ", slots.disks, wanted.disks)?;
        write!(f, "{} for NICs ({} configured)", slots.nics, wanted.nics)?;
        for name in &wanted.others {
            write!(f, ", 1 for the {name}")?;
        }
        let configured = wanted.disks.saturating_add(wanted.nics) + wanted.others.len();
        match configured <= VIRTIO_SLOTS {
            true => f.write_str("; -machine disk-slots=N,nic-slots=N, or keys of these names in machine-config, set lower numbers"),
            false => f.write_str("; remove some devices"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(wanted: Wanted) -> Result<(usize, usize), String> {
        let made = SlotCounts::try_from(wanted);
        made.map(|slots| (slots.disks(), slots.nics())).map_err(|e| e.to_string())
    }

    #[test]
    fn four_for_disks_and_two_for_nics_unless_there_are_more() {
        assert_eq!(counts(Wanted::default()), Ok((4, 2)));
        assert_eq!(counts(Wanted { disks: 4, nics: 2, ..Wanted::default() }), Ok((4, 2)));
        assert_eq!(counts(Wanted { disks: 7, nics: 3, ..Wanted::default() }), Ok((7, 3)));
    }

    #[test]
    fn as_many_as_are_asked_for() {
        let asked = |disks, nics| Wanted {
            disk_slots: Some(disks),
            nic_slots: Some(nics),
            others: vec!["console", "rng"],
            ..Wanted::default()
        };
        assert_eq!(counts(asked(0, 0)), Ok((0, 0)));
        assert_eq!(counts(asked(16, 0)), Ok((16, 0)));
        assert_eq!(counts(asked(0, 16)), Ok((0, 16)));
        assert!(counts(asked(16, 1)).is_err());
    }

    #[test]
    fn what_does_not_fit_is_reported_with_all_that_takes_up_slots() {
        let many = Wanted { disks: 16, others: vec!["console", "rng"], ..Wanted::default() };
        assert_eq!(
            counts(many.clone()).unwrap_err(),
            "20 virtio devices and slots, at most 18 are allowed: 16 for disks (16 configured), 2 for \
             NICs (0 configured), 1 for the console, 1 for the rng; -machine \
             disk-slots=N,nic-slots=N, or keys of these names in machine-config, set lower numbers"
        );
        assert_eq!(counts(Wanted { nic_slots: Some(0), ..many.clone() }), Ok((16, 0)));
        assert!(
            counts(Wanted { disks: 19, ..many.clone() })
                .unwrap_err()
                .ends_with("remove some devices")
        );
        let few = Wanted { disk_slots: Some(1), disks: 2, ..Wanted::default() };
        assert_eq!(
            counts(few).unwrap_err(),
            "1 slots for disks are fewer than the disks that are configured (2)"
        );
        let few = Wanted { nic_slots: Some(0), nics: 1, ..Wanted::default() };
        assert!(counts(few).unwrap_err().starts_with("0 slots for NICs"));
    }
}
