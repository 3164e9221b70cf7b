//! Disks: `-drive`, the file's `drive`, and the front-end in `-device virtio-blk-device`.
use crate::Aio;

use super::draft::{BlkFront, DeviceKind, Draft, Drive};
use super::fields::{Fields, choose};
use super::kinds::{FileKey, Kind, Model, Section};
use super::table::{Group::Storage, Shape::Properties, flag};
use crate::value::{self, Rule};

const FORMATS: &[(&str, Result<(), &str>)] = &[("raw", Ok(())), ("qcow2", Err("format 'qcow2'"))];

/// Its row of the table.
pub(crate) const KIND: Kind = Kind {
    section: ("drive", Section::List(json_drive)),
    paths: &[FileKey { key: "path_on_host", needed: true }],
    flags: &[flag(
        &["drive"],
        Properties("id=ID,file=PATH[,readonly=on|off][,direct=on|off]", None),
        Storage,
        drive,
        "raw image: readonly (off), direct (on): O_DIRECT; a disk by itself unless a -device uses \
         it; also [,serial=TEXT] [,iothread=ID] [,discard=unmap|ignore] [,aio=io_uring|native|off] \
         [,throttling.iops-total=N] [,throttling.bps-total=N]",
    )
    .repeatable()],
    models: &[Model {
        name: "virtio-blk-device",
        id: ",id=ID",
        form: ",drive=ID[,serial=TEXT][,iothread=ID][,num-queues=N][,queue-size=N]",
        make: |f| {
            f.require(&["drive"]);
            let drive = f.id("drive");
            DeviceKind::Blk { drive, front: front(f) }
        },
    }],
    resolve: |r, draft, devices| devices.disks = r.disks(draft),
};

/// `-drive`, in both forms: which one it is depends on whether a `-device` names it.
pub(crate) fn drive(draft: &mut Draft, f: &mut Fields) {
    let interface =
        f.choice("if", &[("none", Ok(())), ("pflash", Err("a firmware flash (pflash)"))]);
    if f.has("if") && interface.is_none() {
        // A flash drive has other keys than a disk.
        f.abandon();
        return;
    }
    f.require(&["id", "file"]);
    let id = f.id("id");
    let path = f.path("file");
    let readonly = f.boolean("readonly").unwrap_or(false);
    let direct = f.boolean("direct").unwrap_or(true);
    let front = BlkFront {
        serial: f.text("serial", value::disk_serial),
        iothread: f.id("iothread"),
        queues: None,
        queue_size: None,
    };
    let aio = f
        .choice(
            "aio",
            &[
                // Linux AIO is requested for asynchronous I/O, which io_uring does as well.
                ("native", Ok(Aio::Auto)),
                ("io_uring", Ok(Aio::IoUring)),
                ("off", Ok(Aio::Off)),
            ],
        )
        .unwrap_or(Aio::Auto);
    let discard = f.discard("discard").unwrap_or(false);
    let old_iops = f.rate("iops");
    let iops = f.rate("throttling.iops-total").or(old_iops);
    let bps = f.rate("throttling.bps-total");
    if f.has("iops") && f.has("throttling.iops-total") {
        f.problem("iops", "the same as throttling.iops-total; give one of them");
    }
    let probe = f.choice("format", FORMATS).is_none();
    let _ = f.text("media", media);
    let _ = f.text("detect-zeroes", detect_zeroes);
    f.refuse("unit", "a firmware flash (pflash)");
    f.refuse("l2-cache-size", "format 'qcow2'");
    f.refuse("refcount-cache-size", "format 'qcow2'");
    let Some(id) = id else { return };
    let path = path.unwrap_or_default();
    let place = f.place().clone();
    draft.drives.push(Drive {
        place,
        id,
        path,
        readonly,
        direct,
        aio,
        discard,
        probe,
        iops,
        bps,
        front,
    });
}

/// The kind of drive: only a disk.
pub fn media(word: &str) -> Result<(), Rule> {
    choose(word, &[("disk", Ok(())), ("cdrom", Err("media 'cdrom'"))])
}

/// Handling of writes of zeroes: no special one.
pub fn detect_zeroes(word: &str) -> Result<(), Rule> {
    let looking = Err("detecting zeroes in writes");
    choose(word, &[("off", Ok(())), ("on", looking), ("unmap", looking)])
}

/// An item of `drive`.
pub(crate) fn json_drive(draft: &mut Draft, f: &mut Fields) {
    f.require(&["drive_id", "path_on_host", "read_only", "direct"]);
    let id = f.id("drive_id");
    let path = f.path("path_on_host");
    let readonly = f.boolean("read_only").unwrap_or(false);
    let direct = f.boolean("direct").unwrap_or(true);
    let front = BlkFront {
        serial: f.text("serial_num", value::disk_serial),
        iothread: f.id("iothread"),
        queues: f.parsed("num_queues"),
        queue_size: f.parsed("queue_size"),
    };
    let iops = f.rate("iops");
    let bps = f.rate("bps");
    let discard = f.discard("discard").unwrap_or(false);
    let probe = f.choice("format", FORMATS).is_none();
    let Some(id) = id else { return };
    draft.drives.push(Drive {
        place: f.place().clone(),
        id,
        path: path.unwrap_or_default(),
        readonly,
        direct,
        aio: Aio::Auto,
        discard,
        probe,
        iops,
        bps,
        front,
    });
}

/// The keys of `-device virtio-blk-device` behind `id` and `drive`.
pub(crate) fn front(f: &mut Fields) -> BlkFront {
    // Without firmware there is no boot order to take part in.
    let _ = f.number("bootindex", 0..=u32::MAX);
    BlkFront {
        serial: f.text("serial", value::disk_serial),
        iothread: f.id("iothread"),
        queues: f.parsed("num-queues"),
        queue_size: f.parsed("queue-size"),
    }
}
