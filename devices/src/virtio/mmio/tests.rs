use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use virtio_queue::QueueT;

use super::{registers::CONFIG_GENERATION, *};
use crate::{
    testing::{Guest, HIGH, RAM, open_descriptors, with_own_descriptors},
    virtio::{
        ActivateError, Activation, ActiveQueue, F_VERSION_1,
        interrupt::INT_USED,
        transport::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK},
    },
    worker::{Worker, WorkerControl, WorkerSlot},
};

/// A device whose worker counts notifications.
#[derive(Default)]
struct Probe {
    worker: WorkerSlot<Counter>,
    config: Vec<u8>,
    refuse: bool,
    features: u64,
    agreed: u64,
    queues: Vec<u16>,
    resets: u32,
    kicks: Arc<AtomicU32>,
}

struct Counter {
    queues: Vec<ActiveQueue>,
    kicks: Arc<AtomicU32>,
}

impl Worker for Counter {
    fn sources(&self) -> Vec<i32> {
        self.queues.iter().map(|q| std::os::fd::AsRawFd::as_raw_fd(&q.notify)).collect()
    }
    fn ready(&mut self, index: usize) {
        if self.queues[index].notify.read().is_ok() {
            self.kicks.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        true
    }
}

impl Device for Probe {
    fn id(&self) -> &str {
        "probe"
    }
    fn pause(&mut self) {
        self.worker.park().unwrap();
    }
    fn resume(&mut self) {
        self.worker.unpark().unwrap();
    }
    fn reset(&mut self) {
        self.worker.stop().unwrap();
        self.resets += 1;
    }
    fn save(&self) -> Result<Section, StateError> {
        let next = self.worker.parked()?.map(|w| w.queues[0].queue.next_avail());
        let state = serde_json::value::to_raw_value(&next).unwrap();
        Ok(Section { kind: "probe".into(), id: "probe".into(), version: 1, state })
    }
    fn restore(&mut self, section: &Section) -> Result<(), StateError> {
        let next: Result<Option<u16>, _> = serde_json::from_str(section.state.get());
        let next = next.map_err(|e| StateError::Section(e.into()))?;
        if let (Some(next), Some(worker)) = (next, self.worker.parked_mut()) {
            worker.queues[0].queue.set_next_avail(next);
        }
        Ok(())
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.config[at..at + data.len()].copy_from_slice(data);
    }
    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::MissingQueue(1));
        }
        self.agreed = with.features;
        self.queues = with.queues.iter().map(|q| q.index).collect();
        let worker = Counter { queues: with.queues, kicks: self.kicks.clone() };
        self.worker
            .start(worker, with.thread)
            .map_err(|source| ActivateError::Host { what: "start", source })
    }
}

fn guest() -> Guest {
    let config = (1..=10).collect();
    Guest::new(Box::new(Probe { features: 0xa5, config, ..Probe::default() }))
}

fn probe(guest: &mut Guest) -> &mut Probe {
    guest.device().unwrap()
}

#[test]
fn identifies_itself() {
    let mut g = guest();
    assert_eq!([0, 4, 8].map(|at| g.load(at)), [0x7472_6976, 2, 42]);
    assert_eq!(g.offered(), 0xa5 | F_VERSION_1);
    g.store(DEVICE_FEATURES_SEL, 2);
    assert_eq!(g.load(DEVICE_FEATURES), 0);
    assert_eq!(SHM.map(|at| g.load(at)), [u32::MAX; 4]);
    assert_eq!((g.queue_max(0), g.queue_max(1), g.queue_max(2)), (256, 16, 0));
    assert_eq!(g.queue_max(0xffff), 0);
    g.store(QUEUE_SEL, u32::MAX);
    assert_eq!(g.load(QUEUE_SIZE_MAX), 0);
}

#[test]
fn starts_the_device_and_stops_it() {
    let mut g = guest();
    assert_eq!(g.load(INTERRUPT_STATUS), 0);
    g.start(0x21);
    assert_eq!(probe(&mut g).agreed, 0x21 | F_VERSION_1);
    assert_eq!(probe(&mut g).queues, [0, 1]);
    assert_eq!(g.load(INTERRUPT_STATUS), INT_USED);
    g.kick(1);
    g.store(QUEUE_NOTIFY, 0);
    g.thread.settle();
    assert_eq!(probe(&mut g).kicks.load(Ordering::Relaxed), 2);
    g.store(STATUS, 0);
    assert_eq!([STATUS, INTERRUPT_STATUS, QUEUE_READY].map(|at| g.load(at)), [0; 3]);
    assert_eq!(g.thread.workers(), 0);
}

#[test]
fn acknowledging_leaves_bit_0_and_clears_bit_1() {
    let mut g = guest();
    g.start(0);
    g.update(|p: &mut Probe| p.config[0] = 9).unwrap();
    assert!(g.interrupted());
    assert_eq!(g.load(INTERRUPT_STATUS), INT_USED | INT_CONFIG);
    g.store(INTERRUPT_ACK, INT_USED);
    assert_eq!(g.load(INTERRUPT_STATUS), INT_USED | INT_CONFIG);
    g.store(INTERRUPT_ACK, u32::MAX);
    assert_eq!(g.load(INTERRUPT_STATUS), INT_USED);
}

#[test]
fn a_change_while_the_driver_starts_is_reported_once_it_is_ready() {
    for changes in [false, true] {
        let mut g = guest();
        assert!(g.negotiate(F_VERSION_1));
        g.place_all();
        if changes {
            g.update(|p: &mut Probe| p.config[0] = 9).unwrap();
        }
        assert!(!g.interrupted(), "a driver that is not ready is not interrupted");
        g.store(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(g.interrupted(), changes);
        let config = if changes { INT_CONFIG } else { 0 };
        assert_eq!(g.load(INTERRUPT_STATUS), INT_USED | config);
    }
}

#[test]
fn a_queue_that_is_taken_back_is_given_back() {
    let mut g = guest();
    g.start(0);
    g.store(QUEUE_SEL, 1);
    assert_eq!(g.load(QUEUE_READY), 1);
    g.store(QUEUE_READY, 0);
    assert_eq!(g.load(QUEUE_READY), 0);
    assert_eq!(g.thread.workers(), 0, "no worker accesses its memory any more");
    assert!(g.needs_reset());
    g.store(STATUS, 0);
    g.start(0);
    assert_eq!(g.thread.workers(), 1);
}

#[test]
fn shows_the_configuration_and_its_changes() {
    let mut g = guest();
    let before = g.load(CONFIG_GENERATION);
    let mut bytes = [0xff; 8];
    g.transport.read(0x106, &mut bytes);
    assert_eq!(bytes, [7, 8, 9, 10, 0, 0, 0, 0]);
    g.update(|p: &mut Probe| p.config = vec![0xee; 3]).unwrap();
    assert_eq!([g.load(0x100), g.load(0x104), g.load(0x108)], [0x00ee_eeee, 0, 0]);
    assert_ne!(g.load(CONFIG_GENERATION), before);
    assert!(!g.interrupted(), "no interrupt before DRIVER_OK");
}

/// A type other than the device's.
struct Other;
impl Device for Other {
    fn id(&self) -> &str {
        "other"
    }
    fn pause(&mut self) {}
    fn resume(&mut self) {}
    fn reset(&mut self) {}
    fn save(&self) -> Result<Section, StateError> {
        Err(StateError::Invalid("other"))
    }
    fn restore(&mut self, _: &Section) -> Result<(), StateError> {
        Err(StateError::Invalid("other"))
    }
}
impl VirtioDevice for Other {
    fn device_type(&self) -> u32 {
        0
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[]
    }
    fn config(&self) -> Vec<u8> {
        vec![0; 8192]
    }
    fn write_config(&mut self, _: u64, _: &[u8]) {}
    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }
}

#[test]
fn a_configuration_too_large_for_the_page_is_cut() {
    let mut g = Guest::new(Box::new(Other));
    assert_eq!(g.load(0xffc), 0);
    g.start(0);
}

#[test]
fn the_driver_writes_the_configuration_within_its_bounds() {
    let mut g = guest();
    g.transport.write(0x101, &[0xaa]);
    assert_eq!(g.load(0x100), 0x0403_0201, "not before DRIVER");
    g.start(0);
    g.transport.write(0x101, &[0xaa]);
    g.transport.write(0x109, &[0xbb, 0xcc]);
    g.transport.write(0xffe, &[0xbb; 8]);
    g.transport.write(u64::MAX, &[0xbb]);
    assert_eq!(g.load(0x100), 0x0403_aa01);
    assert_eq!(g.load(0x108), 0x0a09);
}

#[test]
fn odd_accesses_do_nothing() {
    let mut g = guest();
    g.negotiate(F_VERSION_1);
    let page = |g: &mut Guest| (0..4096).step_by(4).map(|at| g.load(at)).collect::<Vec<_>>();
    let before = page(&mut g);
    for offset in (0..0x110).chain(0xff0..0x1010).chain([u64::MAX - 1, u64::MAX]) {
        for width in [0, 1, 2, 3, 4, 8] {
            let mut data = [0xff; 8];
            g.transport.read(offset, &mut data[..width]);
            if width != 4 || offset % 4 != 0 {
                let in_config = (0xf9..0x10a).contains(&offset);
                if !in_config {
                    g.transport.write(offset, &data[..width]);
                }
            }
        }
    }
    assert!(page(&mut g) == before, "no register has changed");
}

#[test]
fn status_goes_forward_one_step_after_the_other() {
    let mut g = guest();
    for (write, expected) in [
        (2, 0),           // DRIVER before ACKNOWLEDGE
        (8, 0),           // FEATURES_OK first
        (4, 0),           // DRIVER_OK first
        (1, 1),           //
        (5, 1),           // DRIVER_OK before DRIVER
        (9, 1),           // FEATURES_OK before DRIVER
        (0x31, 1),        // bits that do not exist
        (0xffff_ff01, 1), // and FAILED is one that does
    ] {
        g.store(STATUS, write);
        if write & FAILED != 0 {
            assert_eq!(g.load(STATUS), 0x81);
            g.store(STATUS, 0x83);
            assert_eq!(g.load(STATUS), 0x81, "a failed driver has to reset");
        } else {
            assert_eq!(g.load(STATUS), expected, "after writing {write:#x}");
        }
    }
    assert!(g.negotiate(F_VERSION_1));
    for write in [1, 3, 8, 10, 0x40] {
        g.store(STATUS, write);
        assert_eq!(g.load(STATUS), 11, "bits cannot be cleared");
    }
    g.store(STATUS, 0);
    assert_eq!(g.load(STATUS), 0);
}

#[test]
fn driver_ok_without_features_ok_is_ignored() {
    let mut g = guest();
    assert!(!g.negotiate(F_VERSION_1 | 2), "a bit never offered");
    assert_eq!(g.load(STATUS), 3);
    g.store(STATUS, 15);
    g.store(STATUS, 7);
    assert_eq!(g.load(STATUS), 3);
    assert_eq!(g.thread.workers(), 0);
}

#[test]
fn features_are_negotiated_once_and_truthfully() {
    let mut g = guest();
    assert!(!g.negotiate(0xa5), "VERSION_1 is not optional");
    assert!(!g.negotiate(u64::MAX));
    g.negotiate(0);
    g.store(STATUS, 0);
    for status in [1, 3] {
        g.store(STATUS, status);
    }
    for (half, value) in [(1, 1), (7, 1), (7, 0)] {
        g.store(DRIVER_FEATURES_SEL, half);
        g.store(DRIVER_FEATURES, value);
    }
    g.store(STATUS, 11);
    assert_eq!(g.load(STATUS), 3, "a bit above 63");

    assert!(g.negotiate(F_VERSION_1 | 1));
    g.store(DRIVER_FEATURES_SEL, 0);
    g.store(DRIVER_FEATURES, 0xa4);
    g.place_all();
    g.store(STATUS, 15);
    assert_eq!(probe(&mut g).agreed, F_VERSION_1 | 1, "fixed by FEATURES_OK");
}

#[test]
fn hostile_queue_set_ups_need_a_reset() {
    let good = |g: &mut Guest| {
        assert!(g.negotiate(F_VERSION_1));
        crate::testing::DriverQueue::new(&g.memory, 0, 256)
    };
    let mut g = guest();
    for size in [0, 3, 100, 257, 512, 0x8000, 0xffff, 0x1_0000, 0x1_0010, u32::MAX] {
        let q = good(&mut g);
        g.configure(0, &q, size);
        g.store(STATUS, 15);
        assert!(g.needs_reset(), "size {size:#x}");
        assert_ne!(g.load(INTERRUPT_STATUS) & INT_CONFIG, 0);
        assert!(g.interrupted());
    }
    for bad in [0, 1, RAM, RAM - 2, HIGH - 16, 1 << 32, 0xd000_0000, !15, u64::MAX] {
        for ring in 0..3 {
            let mut q = good(&mut g);
            *[&mut q.descriptors, &mut q.available, &mut q.used][ring] = bad;
            g.configure(0, &q, 256);
            g.store(STATUS, 15);
            assert!(g.needs_reset(), "ring {ring} at {bad:#x}");
            assert_eq!(g.thread.workers(), 0);
            g.store(STATUS, 15);
            assert!(g.needs_reset(), "only a reset helps");
        }
    }
    g.start(0);
}

#[test]
fn queue_registers_are_closed_while_the_device_runs() {
    let mut g = guest();
    g.place_all();
    assert_eq!(g.load(QUEUE_READY), 0, "not before FEATURES_OK");
    g.start(0);
    let before = g.transport.core.driver.clone();
    for value in [0, 1, 3, u32::MAX] {
        for offset in (QUEUE_SIZE..0xfc).step_by(4).filter(|at| ![0x50, 0x64, 0x70].contains(at)) {
            g.store(QUEUE_SEL, 0);
            // Disabling a queue is tested elsewhere.
            if (offset, value) != (QUEUE_READY, 0) {
                g.store(offset, value);
            }
        }
    }
    g.store(QUEUE_SEL, before.queue_sel);
    assert_eq!(g.transport.core.driver, before);
    assert_eq!(g.thread.workers(), 1);
}

#[test]
fn a_ready_queue_has_to_be_taken_back_before_it_is_changed() {
    let mut g = guest();
    g.negotiate(F_VERSION_1);
    let q = g.place(0, 128);
    g.store(QUEUE_SIZE, 64);
    assert_eq!(g.transport.core.driver.queues[0].size, 128);
    g.store(QUEUE_READY, 0);
    assert_eq!(g.load(QUEUE_READY), 0);
    g.configure(0, &q, 64);
    assert_eq!(g.transport.core.driver.queues[0].size, 64);
}

#[test]
fn stray_notifications_are_ignored() {
    let mut g = guest();
    for queue in [0, 1, 2, 0xffff, u32::MAX] {
        g.store(QUEUE_NOTIFY, queue);
    }
    g.negotiate(F_VERSION_1);
    g.place(0, 16);
    g.store(QUEUE_NOTIFY, 0);
    g.store(STATUS, 15);
    g.store(QUEUE_NOTIFY, 1);
    g.store(QUEUE_NOTIFY, 0xffff);
    g.thread.settle();
    assert_eq!(probe(&mut g).queues, [0]);
    assert_eq!(probe(&mut g).kicks.load(Ordering::Relaxed), 0);
}

#[test]
fn a_device_that_cannot_begin_asks_for_a_reset_and_recovers() {
    let mut g = guest();
    probe(&mut g).refuse = true;
    g.negotiate(F_VERSION_1);
    g.place_all();
    g.store(STATUS, 15);
    assert!(g.needs_reset());
    probe(&mut g).refuse = false;
    g.start(0);
}

#[test]
fn a_storm_of_resets_leaks_nothing() {
    with_own_descriptors(|| {
        let mut g = guest();
        g.start(0);
        g.store(STATUS, 0);
        let before = open_descriptors();
        for _ in 0..500 {
            g.start(0);
            g.transport.notifiers()[0].write(7).unwrap();
            g.store(STATUS, 0);
        }
        assert_eq!(g.thread.workers(), 0);
        assert_eq!(open_descriptors(), before);
        g.start(0);
        assert_eq!(
            probe(&mut g).kicks.load(Ordering::Relaxed),
            0,
            "old notifications are discarded"
        );
    });
}

#[test]
fn saved_state_survives_at_every_stage() {
    for stage in 0..6 {
        let mut g = guest();
        for (n, status) in [1, 3, 11].into_iter().enumerate() {
            if stage > n {
                g.store(STATUS, status);
                g.store(DRIVER_FEATURES_SEL, 1);
                g.store(DRIVER_FEATURES, 1);
            }
        }
        if stage >= 4 {
            g.place_all();
        }
        if stage == 5 {
            g.store(STATUS, 15);
            g.update(|p: &mut Probe| p.config[0] = 1).unwrap();
        }
        g.transport.pause();
        let section = g.transport.save().unwrap();
        let mut to = guest();
        to.transport.restore(&section).unwrap();
        assert_eq!(to.transport.save().unwrap(), section, "stage {stage}");
        let shown = |g: &mut Guest| (0..0x110).step_by(4).map(|at| g.load(at)).collect::<Vec<_>>();
        assert_eq!(shown(&mut to), shown(&mut g), "stage {stage}");
        assert!(!to.interrupted());
        to.transport.resume();
        assert_eq!(to.interrupted(), stage == 5, "an edge may have been lost in the migration");
    }
}

#[test]
fn restoring_runs_no_worker_before_it_knows_its_place() {
    let mut g = guest();
    g.start(0);
    let mut to = g.migrate(Box::new(Probe { features: 0xa5, ..Probe::default() }));
    assert_eq!(to.thread.workers(), 1);
    to.kick(0);
    assert_eq!(probe(&mut to).kicks.load(Ordering::Relaxed), 1);
    to.store(STATUS, 0);
    assert_eq!(to.thread.workers(), 0);
    to.start(0);
}

#[test]
fn hostile_saved_states_are_refused_and_leave_a_fresh_device() {
    let mut g = guest();
    g.start(1);
    g.transport.pause();
    let section = g.transport.save().unwrap();
    let good: serde_json::Value = serde_json::from_str(section.state.get()).unwrap();
    let edits: &[(&str, serde_json::Value)] = &[
        ("/status", 4.into()),
        ("/status", 0xffu32.into()),
        ("/status", 11.into()),
        ("/status", 0x10f.into()),
        ("/active", false.into()),
        ("/interrupt_status", 4.into()),
        ("/interrupt_status", 0.into()),
        ("/device_features", "0x0".into()),
        ("/device_features", "0xffffffffffffffff".into()),
        ("/driver_features", "0xffffffffffffffff".into()),
        ("/driver_features", "0x1".into()),
        ("/driver_features", 1.into()),
        ("/unknown_features", true.into()),
        ("/queues", serde_json::json!([])),
        ("/queues/0/size", 0.into()),
        ("/queues/0/size", 3.into()),
        ("/queues/0/size", 0x1_0000.into()),
        ("/queues/1/descriptors", "0x1".into()),
        ("/queues/1/driver", "0xffffffffffffffff".into()),
        ("/queues/1/device", format!("{RAM:#x}").into()),
        ("/device_type", 1.into()),
        ("/device/state", serde_json::json!([1, 2, 3])),
        ("/device", serde_json::Value::Null),
    ];
    for (at, value) in edits {
        let mut bad = good.clone();
        *bad.pointer_mut(at).unwrap() = value.clone();
        let bad = section.with(bad.to_string()).unwrap();
        let mut to = guest();
        assert!(to.transport.restore(&bad).is_err(), "{at} = {value}");
        assert_eq!((to.load(STATUS), to.thread.workers()), (0, 0), "{at} = {value}");
        to.start(0);
    }
    for (kind, version) in [("virtio-mmio", 2), ("virtio-mmio", 0), ("probe", 1)] {
        let other = Section { kind: kind.into(), version, ..section.clone() };
        assert!(guest().transport.restore(&other).is_err());
    }
}

#[test]
fn reset_returns_to_power_on() {
    let mut g = guest();
    let fresh = g.transport.save().unwrap();
    g.start(0);
    g.transport.pause();
    g.transport.reset();
    assert_eq!(g.transport.save().unwrap(), fresh);
    assert_eq!(probe(&mut g).resets, 1 + 1, "negotiation begins with a reset");
}
