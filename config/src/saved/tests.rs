use serde_json::{Value, json};

use super::*;

/// A machine that uses every field.
fn everything() -> saved::Config {
    let mut config = state::testing::config(7);
    config.machine.iothreads = vec!["t".into()];
    config.machine.serial = Some(saved::CharBackend::File("log".into()));
    let slot = |id: &str, address: u64, interrupt: u32, queue_sizes: Value, contents: Value| {
        let slot = json!({
            "id": id, "address": format!("{address:#x}"), "interrupt": interrupt,
            "queue_sizes": queue_sizes, "iothread": null, "contents": contents,
        });
        serde_json::from_value::<saved::Slot>(slot).unwrap()
    };
    let disk = json!({
        "id": "root", "backend": "back", "path": "image", "size": 4096, "readonly": true,
        "direct": true, "aio": "io-uring", "discard": true, "serial": "s", "iops": 1, "bps": 2,
        "kept": null,
    });
    let nic = json!({
        "id": "eth", "backend": null, "tap": {"fds": [3, 4]}, "mac": "525400000001", "pps": 3,
        "bps": 4,
    });
    let socket = json!({"socket": {"path": "p", "replay": 9}});
    // Not at this program's usual addresses.
    config.slots = vec![
        slot("disk0", 0xf010_3000, 23, json!([256, 256]), json!({"disk": disk})),
        slot("disk1", 0xf010_1000, 6, json!([64]), json!({"disk": null})),
        slot("nic0", 0xf010_2000, 7, json!([512, 512, 512, 512, 64]), json!({"nic": nic})),
        slot("nic1", 0xf010_0000, 5, json!([256, 256, 64]), json!({"nic": null})),
        slot(
            "console",
            0xf010_4000,
            10,
            json!([64, 64]),
            json!({"console": {"id": "c", "backend": socket}}),
        ),
        slot(
            "rng",
            0xf010_5000,
            11,
            json!([256]),
            json!({"rng": {"id": "r", "path": "/dev/urandom", "bps": 64}}),
        ),
    ];
    config.slots[0].iothread = Some("t".into());
    config
}

#[test]
fn what_was_saved_is_described_and_saved_again_as_it_was() {
    let config = everything();
    let description = Description::try_from(&config).unwrap();
    assert_eq!(description.disk_sizes, [4096, 0]);
    assert_eq!(description.clone().saved(7, None), config);
    let mut other = config;
    other.slots.reverse();
    assert_eq!(Description::try_from(&other).unwrap(), description, "order means nothing");
}

#[test]
fn slots_that_no_machine_has_are_refused_by_name() {
    type Change = fn(&mut saved::Config);
    let change: [(&str, Change); 17] = [
        ("disk1: its address or interrupt", |c| c.slots[1].interrupt = 23),
        ("disk1: its address or interrupt", |c| c.slots[1].address = c.slots[0].address),
        ("disk1: no slot is at address 0xf0101001", |c| c.slots[1].address.0 += 1),
        ("disk1: no slot is at address 0xf0112000", |c| c.slots[1].address.0 = 0xf011_2000),
        ("with interrupt 9", |c| c.slots[1].interrupt = 9),
        ("disk1: it is duplicated, or", |c| drop(c.slots.remove(0))),
        ("disk0: it is duplicated, or", |c| c.slots[1].id = "disk0".into()),
        ("nic: this kind of slot", |c| c.slots[1].id = "nic".into()),
        ("disk01: this kind of slot", |c| c.slots[1].id = "disk01".into()),
        ("queue size of a disk 4096", |c| c.slots[1].queue_sizes = vec![4096]),
        ("queue size of a disk 100, not a power", |c| c.slots[1].queue_sizes = vec![100]),
        ("vCPUs 0, not in 1..=254", |c| c.machine.vcpus = 0),
        ("bytes of memory: 1048576 bytes", |c| c.machine.memory.size = 1 << 20),
        ("I/O thread , must not be empty", |c| c.machine.iothreads[0].clear()),
        ("tap a/b, not an interface name", |c| {
            let saved::Contents::Nic(Some(nic)) = &mut c.slots[2].contents else { panic!() };
            nic.tap = saved::Tap::Name("a/b".into());
        }),
        ("disk , must not be empty", |c| {
            let saved::Contents::Disk(Some(disk)) = &mut c.slots[0].contents else { panic!() };
            disk.id.clear();
        }),
        ("nic1: queues of [256, 512, 64]", |c| c.slots[3].queue_sizes[1] = 512),
    ];
    for (says, change) in change {
        let mut config = everything();
        change(&mut config);
        let error = Description::try_from(&config).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
}
