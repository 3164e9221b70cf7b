//! Commands that control whether the guest runs.
use qmp::{Error, schema::*};

use crate::{
    lifecycle::{self, Halt, State},
    vmm::{Ending, Vmm},
};

pub fn cont(vmm: &mut Vmm, _: Cont) -> Result<Empty, Error> {
    vmm.apply(lifecycle::Event::Resume)?;
    Ok(Empty {})
}

pub fn stop(vmm: &mut Vmm, _: Stop) -> Result<Empty, Error> {
    vmm.apply(lifecycle::Event::Pause)?;
    vmm.stays_stopped();
    Ok(Empty {})
}

/// The answer is sent before SHUTDOWN: the event loop ends after it has answered.
pub fn quit(vmm: &mut Vmm, _: Quit) -> Result<Empty, Error> {
    vmm.end(Ending { guest: false, reason: ShutdownCause::HostQmpQuit, status: 0 });
    Ok(Empty {})
}

pub fn system_reset(vmm: &mut Vmm, _: SystemReset) -> Result<Empty, Error> {
    vmm.apply(lifecycle::Event::Reset)?;
    vmm.broadcast(&Event::Reset { guest: false, reason: ShutdownCause::HostQmpSystemReset });
    Ok(Empty {})
}

pub fn system_powerdown(vmm: &mut Vmm, _: SystemPowerdown) -> Result<Empty, Error> {
    vmm.machine.press_power_button();
    vmm.broadcast(&Event::Powerdown {});
    Ok(Empty {})
}

pub fn send_key(vmm: &mut Vmm, command: SendKey) -> Result<Empty, Error> {
    let mut keys: Vec<_> = command.keys.iter().map(|key| key.data).collect();
    keys.sort_unstable();
    if keys != [QKeyCode::Alt, QKeyCode::Ctrl, QKeyCode::Delete] {
        return Err(Error::text("Invalid parameter 'keys': must be ctrl, alt and delete"));
    }
    if !vmm.machine.send_ctrl_alt_del() {
        return Err(Error::text("the guest does not read its keyboard"));
    }
    Ok(Empty {})
}

pub fn query_status(vmm: &mut Vmm, _: QueryStatus) -> Result<StatusInfo, Error> {
    Ok(StatusInfo::new(match vmm.state() {
        State::Running => RunState::Running,
        // StratoVirt knows no "prelaunch": its clients take -S for a pause.
        State::Prelaunch | State::Paused | State::Saving => RunState::Paused,
        State::PostMigrate => RunState::Postmigrate,
        State::Halted(Halt::Shutdown) | State::Shutdown => RunState::Shutdown,
        State::Halted(Halt::GuestPanicked) => RunState::GuestPanicked,
        State::Halted(Halt::InternalError) => RunState::InternalError,
    }))
}
