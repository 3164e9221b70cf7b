//! What the VM does when its guest powers off, reboots or crashes.

/// What happens to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The VM ends.
    End,
    /// It reboots.
    Reset,
    /// It stays halted.
    Stay,
}

/// The VM's reactions to guest events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Actions {
    /// After a power-off.
    pub shutdown: Action,
    /// After a reboot.
    pub reboot: Action,
    /// The process's exit status when a reboot ends it.
    pub reboot_status: u8,
    /// After a panic. A KVM failure counts as one unless the action for it is to end.
    pub panic: Action,
    /// The process's exit status when a panic ends it.
    pub panic_status: u8,
    /// A triple fault counts as a crash, not a reboot. Kernels use it for both.
    pub fault_panics: bool,
}

impl Default for Actions {
    /// As StratoVirt's microVM: each of these events ends the VM.
    fn default() -> Self {
        let end = Action::End;
        Self {
            shutdown: end,
            reboot: end,
            reboot_status: 0,
            panic: end,
            panic_status: 1,
            fault_panics: false,
        }
    }
}
