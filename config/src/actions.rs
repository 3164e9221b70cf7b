//! What the VM does when its guest powers off, reboots or crashes.

/// What becomes of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The VM ends.
    End,
    /// It boots anew.
    Reset,
    /// It stays as it is, halted.
    Stay,
}

/// What the VM does of its own accord.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Actions {
    /// After a power-off.
    pub shutdown: Action,
    /// After a reboot.
    pub reboot: Action,
    /// The process's exit status where a reboot ends it.
    pub reboot_status: u8,
    /// After a panic. KVM's failures count as such where it does not mean to end.
    pub panic: Action,
    /// The process's exit status where a panic ends it.
    pub panic_status: u8,
    /// A triple fault is a crash, not a reboot. Kernels use it for both.
    pub triple_fault_panics: bool,
}

impl Default for Actions {
    /// As StratoVirt's microVM: whatever happens is the end.
    fn default() -> Self {
        let end = Action::End;
        Self {
            shutdown: end,
            reboot: end,
            reboot_status: 0,
            panic: end,
            panic_status: 1,
            triple_fault_panics: false,
        }
    }
}
