//! NICs: `-netdev`, the file's `net`, and the front-end in `-device virtio-net-device`.
use crate::Tap;
use crate::types::{NicQueuePairs, TapName, ValueError};

use super::draft::{DeviceKind, Draft, Net, NetFront};
use super::fields::Fields;
use super::kinds::{Kind, Model, Section};
use super::table::{Group::Network, Shape::Properties, flag};
use crate::value::{self, Rule};

const MISSING: &str = "Tap device is missing, use 'ifname' or 'fd' to configure a tap device";

/// Its row of the table.
pub(crate) const KIND: Kind = Kind {
    section: ("net", Section::List(json_net)),
    paths: &[],
    flags: &[flag(
        &["netdev"],
        Properties("tap,id=ID,ifname=TAP|fd=N|fds=N:N[,queues=N]", Some("type")),
        Network,
        netdev,
        "tap device, by name or inherited descriptor; older form \
          id=ID,netdev=TAP[,fds=N][,mac=MAC][,iothread=ID], a NIC by itself; both \
          [,throttling.pps-total=N][,throttling.bps-total=N]",
    )
    .repeatable()],
    models: &[Model {
        name: "virtio-net-device",
        id: ",id=ID",
        form: ",netdev=ID[,mac=MAC][,iothread=ID][,mq=on|off][,queue-size=N]",
        make: |f| {
            f.require(&["netdev"]);
            let netdev = f.id("netdev");
            DeviceKind::Net { netdev, front: front(f) }
        },
    }],
    resolve: |r, draft, devices| devices.nics = r.nics(draft),
};

/// `-netdev`, in both forms: which one it is depends on whether a `-device` names it.
pub(crate) fn netdev(draft: &mut Draft, f: &mut Fields) {
    let kind = f.choice("type", &[("tap", Ok(())), ("vhost-user", Err("a vhost-user back-end"))]);
    if f.has("type") && kind.is_none() {
        f.abandon();
        return;
    }
    f.require(&["id"]);
    let id = f.id("id");
    let ifname = f.text("ifname", tap_name);
    let fd = f.number("fd", 3..=i32::MAX).map(|fd| vec![fd]);
    let fds = f.text("fds", value::descriptors);
    let queues = f.parsed::<NicQueuePairs>("queues");
    let name = f.text("netdev", tap_name);
    let front = NetFront {
        mac: f.text("mac", value::mac),
        iothread: f.id("iothread"),
        ..NetFront::default()
    };
    let pps = f.rate("throttling.pps-total");
    let bps = f.rate("throttling.bps-total");
    refuse_vhost(f);
    let ways = ["ifname", "fd", "fds"].into_iter().filter(|key| f.has(key)).count();
    if ways > 1 || (f.has("ifname") && f.has("netdev")) {
        f.problem("", "ifname, fd and fds are mutually exclusive; give one of them");
    } else if ways == 0 && !f.has("netdev") {
        f.problem("", MISSING);
    }
    // The older form names the tap even if it also passes descriptors.
    let tap = fd.or(fds).map(Tap::Fds).or(ifname.or(name).map(Tap::Name));
    if let (Some(Tap::Fds(fds)), Some(queues)) = (&tap, queues)
        && fds.len() != usize::from(queues.get())
    {
        f.problem("queues", format!("{queues}, but there are {} descriptors", fds.len()));
    }
    // Kept even when its tap is wrong, so that references to it resolve.
    let Some(id) = id else { return };
    let tap = tap.unwrap_or(Tap::Fds(vec![]));
    draft.nets.push(Net { place: f.place().clone(), id, tap, queues, pps, bps, front });
}

/// An item of `net`.
pub(crate) fn json_net(draft: &mut Draft, f: &mut Fields) {
    f.require(&["iface_id"]);
    let id = f.id("iface_id");
    let name = f.text("host_dev_name", tap_name);
    let front = NetFront {
        mac: f.text("mac", value::mac),
        iothread: f.id("iothread"),
        mq: None,
        queue_size: f.parsed("queue_size"),
    };
    let fd = f.number("tap_fd", 3..=i32::MAX);
    let queues = f.parsed::<NicQueuePairs>("queues");
    let pps = f.rate("pps");
    let bps = f.rate("bps");
    f.refuse("vhost_type", "vhost-net");
    f.refuse("vhost_fd", "vhost-net");
    if !f.has("tap_fd") {
        f.require(&["host_dev_name"]);
    } else if queues.is_some_and(|queues| queues.get() != 1) {
        f.problem("queues", "must be 1 with tap_fd, which is one descriptor");
    }
    let tap = fd.map(|fd| Tap::Fds(vec![fd])).or(name.map(Tap::Name));
    // Kept even when its tap is wrong, so that references to it resolve.
    let Some(id) = id else { return };
    let tap = tap.unwrap_or(Tap::Fds(vec![]));
    draft.nets.push(Net { place: f.place().clone(), id, tap, queues, pps, bps, front });
}

/// The keys of `-device virtio-net-device` behind `id` and `netdev`.
pub(crate) fn front(f: &mut Fields) -> NetFront {
    // Only PCI has vectors, but Kuasar gives them for every machine.
    let _ = f.number("vectors", 0..=u32::MAX);
    f.refuse("rx-iothread", "an I/O thread for one direction");
    f.refuse("tx-iothread", "an I/O thread for one direction");
    NetFront {
        mac: f.text("mac", value::mac),
        iothread: f.id("iothread"),
        mq: f.boolean("mq"),
        queue_size: f.parsed("queue-size"),
    }
}

fn refuse_vhost(f: &mut Fields) {
    f.only_off("vhost", "vhost-net");
    for key in ["vhostfd", "vhostfds"] {
        f.refuse(key, "vhost-net");
    }
    f.refuse("path", "a tap in another network namespace");
    f.only_off("macnat", "MAC address translation");
}

fn tap_name(word: &str) -> Result<TapName, Rule> {
    word.parse().map_err(|e: ValueError| e.to_string())
}
