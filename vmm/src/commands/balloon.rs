//! The memory balloon: how much memory the guest keeps, and its memory statistics.
use std::time::UNIX_EPOCH;

use machine::Balloon as Device;
use qmp::{Error, ErrorClass, schema::*};
use serde_json::Value;

use super::invalid;
use crate::vmm::Vmm;

/// Path prefix of devices with an id, among QEMU's objects.
const DEVICES: &str = "/machine/peripheral/";
const STATS: &str = "guest-stats";
const INTERVAL: &str = "guest-stats-polling-interval";
/// Not known to QEMU.
const RECLAIMED: &str = "reclaimed-memory";

pub fn balloon(vmm: &mut Vmm, command: Balloon) -> Result<Empty, Error> {
    if command.value == 0 {
        return Err(invalid("value", 0, "must be at least 1: no guest can run without memory"));
    }
    let device = vmm.machine.balloon().ok_or_else(not_active)?;
    device.set_target(command.value);
    vmm.machine.show_balloon();
    Ok(Empty {})
}

pub fn query_balloon(vmm: &mut Vmm, _: QueryBalloon) -> Result<BalloonInfo, Error> {
    let device = vmm.machine.balloon().ok_or_else(not_active)?;
    Ok(BalloonInfo { actual: device.actual() })
}

fn not_active() -> Error {
    Error::new(ErrorClass::DeviceNotActive, "No balloon device has been activated")
}

pub fn qom_get(vmm: &mut Vmm, command: QomGet) -> Result<Value, Error> {
    let device = object(vmm, &command.path)?;
    match command.property.as_str() {
        STATS => serde_json::to_value(stats(device)).map_err(|e| Error::generic(&e)),
        INTERVAL => Ok(device.control.polling_interval().into()),
        RECLAIMED => {
            let counts = vmm.machine.reclaimed();
            let reclaimed = ReclaimedMemory { returned: counts.taken, refused: counts.refused };
            serde_json::to_value(reclaimed).map_err(|e| Error::generic(&e))
        }
        other => Err(unknown(device, other)),
    }
}

pub fn qom_set(vmm: &mut Vmm, command: QomSet) -> Result<Empty, Error> {
    let device = object(vmm, &command.path)?;
    match command.property.as_str() {
        INTERVAL => {
            let seconds = command.value.as_u64().and_then(|seconds| u32::try_from(seconds).ok());
            let seconds = seconds.ok_or_else(|| {
                invalid("value", &command.value, format!("seconds, 0 to {}", u32::MAX))
            })?;
            device.control.set_polling_interval(seconds);
            Ok(Empty {})
        }
        name @ (STATS | RECLAIMED) => {
            Err(Error::text(format!("Property '{name}' is not writable; {INTERVAL} is")))
        }
        other => Err(unknown(device, other)),
    }
}

/// The object at `path`, which can only be the balloon.
fn object<'v>(vmm: &'v Vmm, path: &str) -> Result<&'v Device, Error> {
    let id = path.strip_prefix(DEVICES).unwrap_or(path);
    vmm.machine.balloon().filter(|device| device.id == id).ok_or_else(|| {
        let known = match vmm.machine.balloon() {
            Some(device) => format!("only {DEVICES}{}, the balloon, is available", device.id),
            None => "only balloons are available, and this machine has none".into(),
        };
        Error::new(ErrorClass::DeviceNotFound, format!("Device '{path}' not found; {known}"))
    })
}

fn unknown(device: &Device, property: &str) -> Error {
    let text = format!(
        "Property 'virtio-balloon-device.{property}' not found; '{}' has {STATS}, {INTERVAL} and \
         {RECLAIMED}",
        device.id
    );
    Error::text(text)
}

fn stats(device: &Device) -> GuestStats {
    let Some(stats) = device.control.stats() else { return GuestStats::default() };
    let since = stats.updated.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let each = stats.each().map(|(name, value)| (name.to_owned(), value.unwrap_or(u64::MAX)));
    GuestStats { stats: each.collect(), last_update: since }
}
