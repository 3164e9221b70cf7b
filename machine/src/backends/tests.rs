use std::{fs, path::PathBuf, sync::Arc};

use config::{
    Aio, DiskConfig, Expect, NicConfig, Tap,
    places::{Place, VirtioSlot},
    types::{DiskQueueSize, DiskQueues, MemorySize, NicQueuePairs, NicQueueSize},
};
use devices::{
    backend::net::{NetBackend, NoNetwork},
    bus::BusBuilder,
    virtio::net::{Net, NetSettings},
};
use lineage::{Entry, Lineage, Mark, Sidecar, Term};

use super::{
    OpenDisk, PlugError,
    bay::{Bay, Kind, MAX_WAITING, Open},
    nics::Nics,
};
use crate::{
    io_thread, memory,
    slots::{Handle, Slots},
};

fn config(id: &str, backend: Option<&str>) -> NicConfig {
    NicConfig {
        id: id.parse().unwrap(),
        tap: Tap::Fds(Vec::new()),
        mac: Some([2, 0, 0, 0, 0, 1]),
        queue_pairs: NicQueuePairs::default(),
        queue_size: NicQueueSize::default(),
        pps: None,
        bps: None,
        iothread: None,
        backend: backend.map(|name| name.parse().unwrap()),
    }
}

fn disk_config(path: PathBuf, readonly: bool) -> DiskConfig {
    DiskConfig {
        id: "vda".parse().unwrap(),
        path,
        readonly,
        direct: false,
        serial: None,
        aio: Aio::Off,
        discard: false,
        iops: None,
        bps: None,
        queues: DiskQueues::default(),
        queue_size: DiskQueueSize::default(),
        iothread: None,
        backend: None,
        probe: false,
        expect: Expect::default(),
    }
}

fn back_end() -> Arc<dyn NetBackend> {
    Arc::new(NoNetwork::new(1).unwrap())
}

fn open(id: &str) -> Open<Nics> {
    Open { config: config(id, None), backend: back_end() }
}

/// Devices without back-ends, and the slots that they are in.
fn devices(count: usize) -> (Vec<Handle<Net>>, Slots) {
    let thread = Arc::new(io_thread::Handle::without_thread().unwrap());
    let at = |n: u32| VirtioSlot { address: 0xd000_0000 + n * 0x1000, irq: 5 + n };
    let places =
        (0..count as u32).map(|n| Place { id: format!("nic{n}"), at: at(n), queue_sizes: None });
    let places: Vec<_> = places.collect();
    let window = Slots::window(&places).unwrap();
    let memory = memory::addresses(MemorySize::MIN).unwrap();
    let mut slots = Slots::new(places, window, memory).unwrap();
    let mut bus = BusBuilder::default();
    let handles = (0..count).map(|n| {
        let settings = NetSettings { queue_pairs: 1, queue_size: 256, ..NetSettings::default() };
        let net = Net::new(format!("nic{n}"), settings, None).unwrap();
        slots.add(&mut bus, Box::new(net), thread.clone()).unwrap()
    });
    (handles.collect(), slots)
}

#[test]
fn a_bay_says_what_is_free_and_what_is_in_the_way() {
    let (handles, _slots) = devices(2);
    let mut bay: Bay<Nics> = Bay::new(3, handles, &[Some(config("eth", Some("lan")))]);
    assert_eq!(bay.first_free().unwrap(), 1);
    assert_eq!(bay.locate(1).unwrap().0, 4, "among the slots of the machine");
    assert!(matches!(bay.locate(2), Err(PlugError::NoSlot { what: "net", max: 2 })));
    assert!(["eth", "lan"].iter().all(|name| bay.knows(name)) && !bay.knows("wan"));
    assert!(matches!(bay.remove("lan"), Err(PlugError::InUse(_))));
    assert!(bay.remove("wan").unwrap().is_none());

    bay.add(open("wan"));
    assert!(bay.knows("wan"));
    assert!(matches!(bay.take("dmz", 0), Err(PlugError::NoBackend(_))));
    assert!(matches!(bay.take("wan", 0), Err(PlugError::Occupied(0))));
    let mut taken = bay.take("wan", 1).unwrap();
    Nics::rename(&mut taken.config, "eth1".parse().unwrap());
    bay.occupy(1, taken.config, ());
    assert!(matches!(bay.first_free(), Err(PlugError::Full { what: "net", max: 2 })));
    assert_eq!((bay.find("eth1"), bay.find_backend("wan")), (Some(1), Some(1)));

    let mut gone = bay.vacate(0, ()).unwrap();
    assert!(Nics::detach(&mut gone), "its back-end has a name of its own");
    assert_eq!((&*gone.id, gone.mac), ("lan", None));
    assert!(!Nics::detach(&mut gone));
    assert_eq!(bay.occupied().count(), 1);
}

#[test]
fn not_all_back_ends_there_are_may_wait() {
    let mut bay: Bay<Nics> = Bay::new(0, Vec::new(), &[]);
    assert!(matches!(bay.first_free(), Err(PlugError::NoSlots { what: "net" })));
    for n in 0..MAX_WAITING {
        bay.has_room().unwrap();
        bay.add(open(&n.to_string()));
    }
    assert!(matches!(bay.has_room(), Err(PlugError::TooManyWait)));
    assert_eq!(bay.take_waiting().len(), MAX_WAITING);
    bay.has_room().unwrap();
}

#[test]
fn an_image_is_opened_for_writing_only_if_its_sidecar_allows_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![0; 4096]).unwrap();
    let config = |readonly| disk_config(path.clone(), readonly);
    assert!(OpenDisk::open(config(false), &[]).is_ok(), "never replicated");
    let sidecar = Sidecar::beside(&path).unwrap();
    let term = Term(4);
    for (mark, allowed) in [
        (Mark::Free { term }, true),
        (Mark::Running { term, promoted: None }, true),
        (Mark::Outdated { term }, false),
        (Mark::Inconsistent { term }, false),
    ] {
        let entry = Entry { lineage: Lineage(1), mark, arbiter: String::new() };
        sidecar.update(|_| Some(entry)).unwrap();
        let opened = OpenDisk::open(config(false), &[]);
        assert_eq!(opened.is_ok(), allowed, "{mark:?}");
        if let Err(error) = opened {
            let text = error.to_string();
            assert!(text.contains("disk.img") && text.contains("term 4"), "{text}");
            // Nothing is left locked.
            assert!(OpenDisk::open(config(true), &[]).is_ok(), "to be read");
        }
    }
    fs::write(sidecar.path(), "?").unwrap();
    let text = OpenDisk::open(config(false), &[]).unwrap_err().to_string();
    assert!(text.contains("disk.img.sidecar: the sidecar is damaged"), "{text}");
}
