//! The transport's saved form.
use ::state::{device as saved, hex::Hex};

use super::Transport;
use crate::{
    Device,
    state::{Section, StateError},
    virtio::{
        VirtioDevice,
        transport::{CoreState, Driver, QueueConfig},
    },
};

pub(super) fn save(t: &Transport<impl VirtioDevice + ?Sized>) -> Result<Section, StateError> {
    let CoreState { device_type, status, causes, generation, offered, driver, active, device } =
        t.core.save()?;
    let queues = driver.queues.iter().map(|q| saved::VirtioQueue {
        size: q.size,
        ready: q.ready,
        descriptors: Hex(q.descriptors),
        driver: Hex(q.driver),
        device: Hex(q.device),
    });
    let state = saved::VirtioMmio {
        device_type,
        status,
        interrupt_status: causes,
        config_generation: generation,
        device_features_sel: driver.device_features_sel,
        driver_features_sel: driver.driver_features_sel,
        device_features: Hex(offered),
        driver_features: Hex(driver.features),
        unknown_features: driver.unknown_features,
        queue_sel: driver.queue_sel,
        queues: queues.collect(),
        active,
        device,
    };
    Ok(Section::of(t.id(), &state)?)
}

/// When this fails half-way, the caller resets the transport.
pub(super) fn restore(
    t: &mut Transport<impl VirtioDevice + ?Sized>,
    section: &Section,
) -> Result<(), StateError> {
    let state: saved::VirtioMmio = section.read()?;
    let driver = Driver {
        device_features_sel: state.device_features_sel,
        driver_features_sel: state.driver_features_sel,
        features: state.driver_features.0,
        unknown_features: state.unknown_features,
        queue_sel: state.queue_sel,
        queues: state.queues.into_iter().map(queue).collect(),
    };
    t.core.restore(CoreState {
        device_type: state.device_type,
        status: state.status,
        causes: state.interrupt_status,
        generation: state.config_generation,
        offered: state.device_features.0,
        driver,
        active: state.active,
        device: state.device,
    })?;
    t.show_selected();
    Ok(())
}

fn queue(q: saved::VirtioQueue) -> QueueConfig {
    let saved::VirtioQueue { size, ready, descriptors, driver, device } = q;
    QueueConfig { size, ready, descriptors: descriptors.0, driver: driver.0, device: device.0 }
}
