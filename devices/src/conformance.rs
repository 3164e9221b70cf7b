//! A conformance suite: what every virtio device must withstand, whatever its type.
//!
//! Run it from a device's tests, with the back-end that the device usually has:
//! `conformance::run(|| Box::new(Rng::new("rng0", "/dev/urandom".as_ref(), None).unwrap()))`.
//! What it writes to the device is garbage, so its back-end must be one that may be overwritten.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed check ends the test")]
mod hostile;

use virtio_queue::QueueT as _;

use crate::{
    Device,
    bus::BusDevice,
    state::Section,
    testing::{
        DriverQueue, Guest, HIGH, NEXT, RAM, ThreadFault, WRITE, open_descriptors,
        with_own_descriptors,
    },
    virtio::{F_VERSION_1, VirtioDevice},
};

const QUEUE_SEL: usize = 0x30;
const QUEUE_READY: usize = 0x44;
const QUEUE_NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
const CONFIG: usize = 0x100;
const LIVE: u32 = 15;
/// A data buffer, clear of every queue.
const BUFFER: u64 = 8 << 20;

/// Builds the device, identical each time.
pub trait Make: Fn() -> Box<dyn VirtioDevice> + Sync {}
impl<F: Fn() -> Box<dyn VirtioDevice> + Sync> Make for F {}

/// Run the whole suite on devices from `make`.
///
/// # Panics
/// When a device fails.
pub fn run(make: impl Make) {
    says_what_it_is(&make);
    takes_one_step_after_the_other(&make);
    accepts_only_what_it_offers(&make);
    refuses_queues_that_cannot_be(&make);
    keeps_its_queues_to_itself(&make);
    ignores_stray_notifications(&make);
    keeps_its_configuration_space_in_bounds(&make);
    pauses_resumes_and_resets_at_any_time(&make);
    leaks_nothing_in_a_storm_of_resets(&make);
    moves_without_losing_anything(&make);
    survives_a_thread_that_refuses_its_worker(&make);
    survives_a_thread_that_loses_its_worker(&make);
    refuses_hostile_sections(&make);
    hostile::rings(&make);
    hostile::random_rings(&make);
    hostile::changing_rings(&make);
}

fn guest(make: &impl Make) -> Guest {
    Guest::new(make())
}

/// A guest whose driver accepts every offered feature.
fn live(make: &impl Make) -> Guest {
    let mut g = guest(make);
    let offered = g.offered();
    g.start(offered);
    g
}

/// Whatever has happened, a reset and re-initialisation recover the device.
fn recovers(g: &mut Guest, after: &str) {
    g.store(STATUS, 0);
    assert_eq!(g.load(STATUS), 0, "reset after {after}");
    assert_eq!(g.thread.workers(), 0, "no worker outlives a reset, after {after}");
    let offered = g.offered();
    g.start(offered);
}

fn queue_count(g: &mut Guest) -> u16 {
    (0..).take_while(|index| g.queue_max(*index) > 0).count().try_into().unwrap()
}

fn says_what_it_is(make: &impl Make) {
    let device = make();
    assert!(!device.id().is_empty());
    let sizes = device.queue_sizes().to_vec();
    for size in &sizes {
        assert!(virtio_queue::Queue::new(*size).is_ok(), "{size} is a power of two to 32768");
    }
    assert!(device.config().len() <= 4096 - CONFIG, "the configuration space fits its page");
    let mut g = guest(make);
    assert_eq!(g.load(8), device.device_type());
    assert_ne!(g.offered() & F_VERSION_1, 0);
    assert_eq!(g.offered() & 0xff, device.features() & 0xff);
    assert_eq!(usize::from(queue_count(&mut g)), sizes.len());
    let mut shown = vec![0; device.config().len()];
    g.transport.read(CONFIG as u64, &mut shown);
    assert_eq!(shown, device.config());
}

fn takes_one_step_after_the_other(make: &impl Make) {
    for (from, illegal) in [
        (0, &[2, 3 << 1, 8, 4, 12, 0x10, 0x20, 0x40][..]),
        (1, &[5, 9, 13, 0x41, 0x11, 2, 4]),
        (3, &[7, 1, 2, 4, 5]),
        (11, &[1, 3, 8, 9, 10, 7]),
        (LIVE, &[1, 3, 7, 11, 4, 8, 14]),
    ] {
        let mut g = guest(make);
        let offered = g.offered();
        match from {
            LIVE => g.start(offered),
            11 => assert!(g.negotiate(offered)),
            _ => [1, 3].into_iter().filter(|s| *s <= from).for_each(|s| g.store(STATUS, s)),
        }
        assert_eq!(g.load(STATUS), from);
        for status in illegal {
            g.store(STATUS, *status);
            assert_eq!(g.load(STATUS), from, "{status:#x} written to {from:#x}");
        }
        recovers(&mut g, "illegal status writes");
    }
}

fn accepts_only_what_it_offers(make: &impl Make) {
    let mut g = guest(make);
    let offered = g.offered();
    for bit in 0..64 {
        let asked = offered ^ 1 << bit;
        let more = asked & !offered != 0;
        let acceptable = !more && asked & F_VERSION_1 != 0;
        assert_eq!(g.negotiate(asked), acceptable, "feature bit {bit}");
        if acceptable {
            g.place_all();
            g.store(STATUS, LIVE);
            assert_eq!(g.load(STATUS), LIVE, "works without feature bit {bit}");
        }
    }
    assert!(!g.negotiate(u64::MAX));
    g.start(0);
}

fn refuses_queues_that_cannot_be(make: &impl Make) {
    let mut g = guest(make);
    let offered = g.offered();
    for index in 0..queue_count(&mut g) {
        let max = g.queue_max(index);
        let mut bad = |what: &str, size: u32, edit: &dyn Fn(&mut DriverQueue)| {
            assert!(g.negotiate(offered));
            g.place_all();
            let mut queue = g.queues[usize::from(index)].clone();
            edit(&mut queue);
            g.store(QUEUE_SEL, index.into());
            g.store(0x44, 0);
            g.configure(index, &queue, size);
            g.store(STATUS, LIVE);
            assert!(g.needs_reset(), "queue {index}, {what}");
            assert_eq!(g.thread.workers(), 0, "queue {index}, {what}");
        };
        for size in [0, 3, u32::from(max) * 2, u32::from(max) + 1, 0xffff, 0x1_0000, u32::MAX] {
            bad(&format!("size {size:#x}"), size, &|_| ());
        }
        for address in [0, 1, RAM, RAM - 4, HIGH - 16, 0xd000_0000, 1 << 32, u64::MAX - 15] {
            let size = u32::from(max);
            bad(&format!("table at {address:#x}"), size, &|q| q.descriptors = address);
            bad(&format!("available at {address:#x}"), size, &|q| q.available = address | 1);
            bad(&format!("used at {address:#x}"), size, &|q| q.used = address | 2);
        }
    }
    g.start(offered);
}

fn keeps_its_queues_to_itself(make: &impl Make) {
    let mut g = live(make);
    g.transport.pause();
    let before = g.transport.save().unwrap();
    g.transport.resume();
    g.store(QUEUE_SEL, 0);
    for value in [0, 1, 3, 0xffff, u32::MAX] {
        for offset in (0x38..0x50).chain(0x80..0xfc).step_by(4) {
            // Disabling a queue is covered elsewhere.
            if (offset, value) != (QUEUE_READY, 0) {
                g.store(offset, value);
            }
        }
    }
    g.store(QUEUE_SEL, u32::from(queue_count(&mut live(make))));
    g.transport.pause();
    let after = g.transport.save().unwrap();
    assert!(before == after, "queue registers are closed after DRIVER_OK");
    g.transport.resume();
    g.store(QUEUE_SEL, 0);
    g.store(QUEUE_READY, 0);
    assert_eq!(g.load(QUEUE_READY), 0, "a disabled queue belongs to the driver");
    assert!(g.needs_reset() && g.thread.workers() == 0, "and the device is stopped");
    recovers(&mut g, "writes to the registers of live queues");
}

fn ignores_stray_notifications(make: &impl Make) {
    let mut g = guest(make);
    let offered = g.offered();
    let queues = u32::from(queue_count(&mut g));
    for status in [0, 1, 3, 11, LIVE] {
        match status {
            11 => assert!(g.negotiate(offered)),
            LIVE => g.start(offered),
            _ => g.store(STATUS, status),
        }
        for queue in (0..queues).chain([queues, 0xffff, u32::MAX]) {
            g.store(QUEUE_NOTIFY, queue);
        }
        for notifier in g.transport.notifiers().iter() {
            notifier.write(1).unwrap();
        }
        g.thread.settle();
        assert_eq!(g.load(STATUS), status);
    }
    // Many notifications while paused count as one afterwards.
    g.transport.pause();
    for _ in 0..1000 {
        g.transport.notifiers().iter().for_each(|n| n.write(1 << 40).unwrap());
    }
    g.transport.resume();
    g.thread.settle();
    assert_eq!(g.load(STATUS), LIVE);
}

fn keeps_its_configuration_space_in_bounds(make: &impl Make) {
    for started in [false, true] {
        let mut g = if started { live(make) } else { guest(make) };
        let len = make().config().len();
        for offset in (0..len + 8).chain([0xdff, 0xef8, 0xeff]) {
            for width in [1, 2, 3, 4, 8] {
                for value in [0, 1, 0xff] {
                    let at = (CONFIG + offset) as u64;
                    g.transport.write(at, &[value; 8][..width]);
                    g.transport.read(at, &mut [0; 8][..width]);
                }
            }
        }
        g.transport.read(u64::MAX - 2, &mut [0; 8]);
        g.transport.write(u64::MAX - 2, &[0; 8]);
        let mut past = [0xee; 8];
        g.transport.read((CONFIG + len) as u64, &mut past);
        assert_eq!(past, [0; 8], "reads beyond the configuration space are zero");
        g.thread.settle();
        recovers(&mut g, "writes all over the configuration space");
    }
}

fn pauses_resumes_and_resets_at_any_time(make: &impl Make) {
    for started in [false, true] {
        let mut g = if started { live(make) } else { guest(make) };
        let status = g.load(STATUS);
        g.transport.resume();
        for _ in 0..3 {
            g.transport.pause();
            g.transport.pause();
            assert_eq!(g.thread.workers(), 0, "paused: no worker runs");
            let saved = g.transport.save().unwrap();
            assert_eq!(g.transport.save().unwrap(), saved, "saving changes nothing");
            g.transport.resume();
            g.transport.resume();
        }
        g.thread.settle();
        assert_eq!(g.load(STATUS), status);
        g.transport.pause();
        g.transport.reset();
        g.transport.reset();
        assert_eq!(g.load(STATUS), 0);
        g.transport.resume();
        assert_eq!(g.thread.workers(), 0);
        let offered = g.offered();
        g.start(offered);
        recovers(&mut g, "reset of the machine");
    }
}

fn leaks_nothing_in_a_storm_of_resets(make: &impl Make) {
    with_own_descriptors(|| {
        let mut g = live(make);
        recovers(&mut g, "nothing");
        let before = open_descriptors();
        for _ in 0..300 {
            recovers(&mut g, "another reset");
        }
        assert_eq!(open_descriptors(), before, "descriptors stay constant over resets");
    });
}

fn moves_without_losing_anything(make: &impl Make) {
    for started in [false, true] {
        let mut g = if started { live(make) } else { guest(make) };
        for index in 0..g.queues.len() {
            g.queues[index].descriptor(0, BUFFER, 512, NEXT, 1);
            g.queues[index].descriptor(1, BUFFER + 512, 1024, WRITE, 0);
            g.queues[index].publish(0);
            g.kick(u16::try_from(index).unwrap());
        }
        g.transport.pause();
        let section = g.transport.save().unwrap();
        // A queue that was empty is still empty: nothing is processed twice, which would overwrite
        // the mark.
        let done = |q: &&DriverQueue| q.used_index() == q.available_index();
        let empty: Vec<DriverQueue> = g.queues.iter().filter(done).cloned().collect();
        empty.iter().for_each(|q| q.set_used_index(0x5555));
        let mut to = Guest::with_memory(make(), g.memory.clone());
        to.transport.pause();
        to.transport.restore(&section).unwrap();
        assert_eq!(to.thread.workers(), 0, "no worker runs before resume");
        assert_eq!(to.transport.save().unwrap(), section);
        // Into an active device as well as into a fresh one.
        to.transport.restore(&section).unwrap();
        assert_eq!(to.transport.save().unwrap(), section);
        to.transport.resume();
        for notifier in to.transport.notifiers().iter() {
            notifier.write(1).unwrap();
        }
        to.thread.settle();
        assert!(empty.iter().all(|q| q.used_index() == 0x5555), "no request is served twice");
        assert_eq!(to.load(STATUS), if started { LIVE } else { 0 });
        recovers(&mut to, "restore");
    }
}

fn survives_a_thread_that_refuses_its_worker(make: &impl Make) {
    let mut g = guest(make);
    let offered = g.offered();
    // At DRIVER_OK.
    g.thread.fail(ThreadFault::Refuses);
    assert!(g.negotiate(offered));
    g.place_all();
    g.store(STATUS, LIVE);
    assert!(g.needs_reset() && g.thread.workers() == 0, "its worker was refused at the start");
    g.thread.fail(None);
    recovers(&mut g, "a worker that was refused at the start");
    // After a pause.
    g.transport.pause();
    let saved = g.transport.save().unwrap();
    g.thread.fail(ThreadFault::Refuses);
    g.transport.resume();
    assert!(g.needs_reset() && g.thread.workers() == 0, "its worker was refused after a pause");
    assert!(g.interrupted(), "the driver is notified");
    g.transport.pause();
    assert_eq!(device_section(&g.transport.save().unwrap()), device_section(&saved));
    let mut to = Guest::with_memory(make(), g.memory.clone());
    to.transport.pause();
    to.transport.restore(&g.transport.save().unwrap()).unwrap();
    g.thread.fail(None);
    recovers(&mut g, "a worker that was refused after a pause");
}

fn survives_a_thread_that_loses_its_worker(make: &impl Make) {
    let mut g = live(make);
    g.thread.fail(ThreadFault::Loses);
    g.transport.pause();
    assert!(g.needs_reset() && g.interrupted(), "the driver is notified of a lost worker");
    assert!(g.transport.save().is_err(), "its position in the queues is unknown");
    g.transport.resume();
    g.thread.fail(None);
    g.store(STATUS, 0);
    assert_eq!(g.load(STATUS), 0);
    g.transport.pause();
    let saved = g.transport.save().unwrap();
    guest(make).transport.restore(&saved).unwrap();
    g.transport.resume();
    // What the worker held may be lost: the device either works or sets DEVICE_NEEDS_RESET.
    let offered = g.offered();
    assert!(g.negotiate(offered));
    g.place_all();
    g.store(STATUS, LIVE);
    assert!(g.load(STATUS) == LIVE || g.needs_reset());
}

fn refuses_hostile_sections(make: &impl Make) {
    let mut g = live(make);
    g.transport.pause();
    let good = g.transport.save().unwrap();
    let own = device_section(&good);
    for (kind, version) in [("another-device", own.version), (&own.kind, own.version + 1)] {
        let other = Section { kind: kind.into(), version, ..own.clone() };
        refused(make, &with_device_section(&good, &other), "another device's section");
    }
    // Remove each field in turn, and add an unknown one.
    let fields: serde_json::Value = serde_json::from_str(own.state.get()).unwrap();
    for field in fields.as_object().unwrap().keys() {
        let mut less = fields.clone();
        less.as_object_mut().unwrap().remove(field);
        let less = own.with(less.to_string()).unwrap();
        refused(make, &with_device_section(&good, &less), "a section without a field");
    }
    let idle = device_section(&guest(make).transport.save().unwrap());
    refused(make, &with_device_section(&good, &idle), "an idle device's section");
    let mut more = fields;
    more["more"] = 1.into();
    let more = own.with(more.to_string()).unwrap();
    refused(make, &with_device_section(&good, &more), "a section with one more field");
    // A flipped bit may still give a valid state, such as another MAC address: what counts is that
    // the device is either in the state given or freshly reset, and works.
    for at in 0..own.state.get().len() {
        for bit in [at % 8, (at + 3) % 8] {
            let mut flipped = own.state.get().to_owned().into_bytes();
            flipped[at] ^= 1 << bit;
            // What is no longer valid JSON does not get this far.
            let flipped = String::from_utf8(flipped).ok().and_then(|text| own.with(text).ok());
            let Some(flipped) = flipped else { continue };
            let mut to = guest(make);
            let section = with_device_section(&good, &flipped);
            if to.transport.restore(&section).is_err() {
                assert_eq!((to.load(STATUS), to.thread.workers()), (0, 0));
            }
            to.transport.resume();
            to.thread.settle();
            recovers(&mut to, "a flipped bit");
        }
    }
}

fn refused(make: &impl Make, section: &Section, what: &str) {
    let mut to = guest(make);
    assert!(to.transport.restore(section).is_err(), "{what} is refused");
    assert_eq!((to.load(STATUS), to.thread.workers()), (0, 0), "{what} leaves a fresh device");
}

fn device_section(of: &Section) -> Section {
    of.read::<::state::device::VirtioMmio>().unwrap().device
}

fn with_device_section(of: &Section, device: &Section) -> Section {
    let state = of.read::<::state::device::VirtioMmio>().unwrap();
    let state = ::state::device::VirtioMmio { device: device.clone(), ..state };
    Section::of(of.id.clone(), &state).unwrap()
}
