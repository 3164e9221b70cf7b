//! The raw values that a driver has written.
use super::QueueConfig;

/// What the driver has written since the last reset. Every transport has these registers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::virtio) struct Driver {
    /// Which 32 of the offered feature bits it reads.
    pub device_features_sel: u32,
    /// Which 32 feature bits it writes.
    pub driver_features_sel: u32,
    /// The feature bits that it has accepted.
    pub features: u64,
    /// A bit above 63 was set, which cannot have been offered.
    pub unknown_features: bool,
    /// The queue that it configures.
    pub queue_sel: u32,
    /// All queues.
    pub queues: Vec<QueueConfig>,
}

/// A register of the selected queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtio) enum QueueField {
    /// Descriptors.
    Size,
    /// Address of the descriptor table.
    Descriptors(Half),
    /// Address of the available ring.
    Driver(Half),
    /// Address of the used ring.
    Device(Half),
}

/// A half of a 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtio) enum Half {
    Low,
    High,
}

impl Driver {
    pub(super) fn new(queues: usize) -> Self {
        Self { queues: vec![QueueConfig::default(); queues], ..Self::default() }
    }

    pub(super) fn selected(&self) -> usize {
        usize::try_from(self.queue_sel).unwrap_or(usize::MAX)
    }

    pub(super) fn selected_mut(&mut self) -> Option<&mut QueueConfig> {
        let selected = self.selected();
        self.queues.get_mut(selected)
    }
}

impl Half {
    pub(super) fn set(self, whole: &mut u64, value: u32) {
        let value = u64::from(value);
        *whole = match self {
            Self::Low => *whole & !0xffff_ffff | value,
            Self::High => *whole & 0xffff_ffff | value << 32,
        };
    }
}
