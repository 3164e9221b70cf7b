//! Back-ends of disks.
use std::{
    collections::BTreeMap, os::unix::fs::MetadataExt, path::PathBuf, sync::atomic::Ordering,
};

use config::{
    Aio, DiskConfig, Expect, cli,
    types::{DiskIops, DiskQueueSize, DiskQueues, PerSecond, Rate},
    value,
};
use machine::{OpenDisk, PlugError, PluggedDisk};
use qmp::{Error, schema::*, server::Ticket, table::Host};
use serde::Serialize;

use super::{invalid, plug_error};
use crate::{files::Job, vmm::Vmm};

pub fn blockdev_add(
    vmm: &mut Vmm,
    command: BlockdevAdd,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let refuse = |key, value: &str, allowed| Err(invalid(key, value, allowed));
    let name = &command.node_name;
    let id = super::id("node-name", name)?;
    if let Some(id) = command.id.as_ref().filter(|id| *id != name) {
        return refuse("id", id, "must be as node-name: leave it out");
    }
    let filename = &command.file.filename;
    let path = value::path(filename).map_err(|rule| invalid("file.filename", filename, rule))?;
    if let Some(driver) = command.driver.as_deref().filter(|d| *d != "raw") {
        return refuse("driver", driver, "only 'raw' images are supported");
    }
    let kinds = ["file", "host_device"];
    if let Some(driver) = command.file.driver.as_deref().filter(|d| !kinds.contains(d)) {
        return refuse("file.driver", driver, "must be 'file' or 'host_device'");
    }
    if command.backing.is_some() {
        return refuse("backing", "...", "raw images have no backing file");
    }
    if let Some(options) = &command.options {
        return refuse(
            "options",
            &options.to_string(),
            "not available for raw images: leave it \
                                                        out",
        );
    }
    let qcow2 = [
        ("l2-cache-size", command.l2_cache_size),
        ("refcount-cache-size", command.refcount_cache_size),
    ];
    if let Some((key, Some(bytes))) = qcow2.into_iter().find(|(_, bytes)| bytes.is_some()) {
        return refuse(key, &bytes.to_string(), "format 'qcow2' is not supported: leave it out");
    }
    if let Some(media) = &command.media {
        cli::media(media).map_err(|rule| invalid("media", media, rule))?;
    }
    let zeroes = match command.detect_zeroes {
        None | Some(BlockdevDetectZeroes::Off) => "off",
        Some(BlockdevDetectZeroes::On) => "on",
        Some(BlockdevDetectZeroes::Unmap) => "unmap",
    };
    cli::detect_zeroes(zeroes).map_err(|rule| invalid("detect-zeroes", zeroes, rule))?;
    let iops = rate("throttling.iops-total", command.throttling_iops_total)?;
    let bps = rate("throttling.bps-total", command.throttling_bps_total)?;
    let cache = command.cache.unwrap_or_default();
    if cache.no_flush == Some(true) {
        return refuse("cache.no-flush", "true", "a guest's flush always reaches the disk");
    }
    let config = DiskConfig {
        id,
        path,
        readonly: command.read_only.unwrap_or(false),
        direct: cache.direct.unwrap_or(true),
        serial: None,
        aio: match command.file.aio {
            Some(BlockdevAio::IoUring) => Aio::IoUring,
            Some(BlockdevAio::Off | BlockdevAio::Threads) => Aio::Off,
            // Linux AIO gives nothing that io_uring does not.
            Some(BlockdevAio::Native) | None => Aio::Auto,
        },
        discard: command.discard == Some(BlockdevDiscard::Unmap),
        iops,
        bps,
        // The slot has its own queues.
        queues: DiskQueues::default(),
        queue_size: DiskQueueSize::default(),
        iothread: None,
        backend: None,
        probe: command.driver.is_none(),
        expect: Expect::default(),
    };
    vmm.machine.admits_disk_backend(&config.id).map_err(|e| plug_error(&e))?;
    vmm.files.check_idle(&config.id)?;
    let (id, what) = (config.id.clone(), format!("opening {}", config.path.display()));
    let add = |vmm: &mut Vmm, opened: Result<OpenDisk, PlugError>| {
        let disk = opened.map_err(|e| plug_error(&e))?;
        // Other clients' commands were carried out meanwhile: the machine may be saved by now.
        let (why, disk) = match vmm.admit(BlockdevAdd::NAME, super::ALIVE) {
            Ok(()) => match vmm.machine.add_disk_backend(disk) {
                Ok(()) => return Ok(Empty {}),
                Err(refused) => (plug_error(&refused.0), refused.1),
            },
            Err(why) => (why, disk),
        };
        vmm.close_file("closing a rejected disk".into(), disk);
        Err(why)
    };
    let own = vmm.machine.own_images();
    let open = move || OpenDisk::open(config, &own);
    vmm.with_files(Job::new(what, open, add).about(&id), ticket);
    Ok(None)
}

/// A limit per second; 0 means none.
fn rate<const MIN: u64, const MAX: u64>(
    key: &str,
    number: Option<u64>,
) -> Result<Option<Rate<MIN, MAX>>, Error> {
    let number = number.unwrap_or(0);
    Rate::or_unlimited(number).map_err(|rule| invalid(key, number, rule))
}

pub fn blockdev_del(
    vmm: &mut Vmm,
    command: BlockdevDel,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let name = &command.node_name;
    vmm.files.check_idle(name)?;
    let disk = vmm.machine.remove_disk_backend(name).map_err(|e| plug_error(&e))?;
    vmm.with_files(Job::close(format!("closing '{name}'"), disk, |_| Empty {}), ticket);
    Ok(None)
}

/// Refused while the machine is saved: the size is part of its state.
pub fn block_resize(
    vmm: &mut Vmm,
    command: BlockResize,
    ticket: &Ticket,
) -> Result<Option<Empty>, Error> {
    let BlockResize { device, node_name, size } = command;
    let Some(name) = device.as_ref().or(node_name.as_ref()) else {
        return Err(Error::text("Parameter 'device' or 'node-name' is required"));
    };
    if size % 512 != 0 {
        return Err(invalid("size", size, "must be a multiple of 512"));
    }
    let meant = |disk: &PluggedDisk| {
        device.as_ref().is_none_or(|id| disk.config.id == *id)
            && node_name.as_ref().is_none_or(|name| name == disk.config.backend())
    };
    let disk = vmm.machine.disks().find(meant);
    let id = disk.map(|disk| disk.config.id.to_string()).ok_or(PlugError::NoDevice(name.clone()));
    let id = id.map_err(|e| plug_error(&e))?;
    vmm.files.check_idle(&id)?;
    if vmm.saving().status() == MigrationStatus::Active {
        let why = "the machine is being saved; resize its disk after the save";
        return Err(Error::text(format!("'{id}' cannot be resized now: {why}")));
    }
    let image = vmm.machine.begin_resize(&id, size).map_err(|e| plug_error(&e))?;
    let what = format!("resizing {}", image.path().display());
    let name = id.clone();
    let end = move |vmm: &mut Vmm, resized: Result<(), PlugError>| {
        // Also after a failed resize: the guest is to see the actual size.
        let shown = vmm.machine.end_resize(&id);
        resized.and(shown).map(|()| Empty {}).map_err(|e| plug_error(&e))
    };
    let resize = move || image.resize(size).map(drop).map_err(PlugError::from);
    vmm.with_files(Job::new(what, resize, end).about(&name).resizes(), ticket);
    Ok(None)
}

pub fn query_block(
    vmm: &mut Vmm,
    _: QueryBlock,
    ticket: &Ticket,
) -> Result<Option<Vec<BlockInfo>>, Error> {
    let paths = vmm.machine.disks().map(|disk| disk.config.path);
    with_used_space(vmm, paths.collect(), |vmm, used| block_info(vmm, &used), ticket);
    Ok(None)
}

/// Describe the disks; `used` is what is known of the space that their images take up.
pub(super) fn block_info(vmm: &Vmm, used: &Used) -> Result<Vec<BlockInfo>, Error> {
    let info = |disk: PluggedDisk| BlockInfo {
        device: disk.config.id.to_string(),
        qdev: Some(disk.config.id.to_string()),
        r#type: "unknown".into(),
        removable: false,
        locked: false,
        io_status: Some(BlockDeviceIoStatus::Ok),
        inserted: Some(device_info(disk.config, disk.size, used)),
    };
    Ok(vmm.machine.disks().map(info).collect())
}

pub fn query_named_block_nodes(
    vmm: &mut Vmm,
    _: QueryNamedBlockNodes,
    ticket: &Ticket,
) -> Result<Option<Vec<BlockDeviceInfo>>, Error> {
    let tell = |vmm: &mut Vmm, used: Used| {
        let plugged = vmm.machine.disks().map(|disk| device_info(disk.config, disk.size, &used));
        let waiting =
            vmm.machine.waiting_disks().map(|(c, size)| device_info(c.clone(), size, &used));
        Ok(plugged.chain(waiting).collect::<Vec<_>>())
    };
    let plugged = vmm.machine.disks().map(|disk| disk.config.path);
    let paths = plugged.chain(vmm.machine.waiting_disks().map(|(config, _)| config.path.clone()));
    with_used_space(vmm, paths.collect(), tell, ticket);
    Ok(None)
}

/// Bytes that the images of these paths take up on the host.
pub(super) type Used = BTreeMap<PathBuf, u64>;

/// Have `tell` answer `ticket` with what the file system reports for `paths`, or without it where
/// the file system does not answer soon.
fn with_used_space<R: Serialize + 'static>(
    vmm: &mut Vmm,
    paths: Vec<PathBuf>,
    tell: impl Fn(&mut Vmm, Used) -> Result<R, Error> + Clone + Send + 'static,
    ticket: &Ticket,
) {
    let look = move || {
        let blocks = |path: PathBuf| Some((path.metadata().ok()?.blocks(), path));
        paths
            .into_iter()
            .filter_map(blocks)
            .map(|(n, path)| (path, n.saturating_mul(512)))
            .collect()
    };
    let without = tell.clone();
    let job = Job::new("checking the images of disks".into(), look, tell);
    vmm.with_files(job.or_without(move |vmm| without(vmm, Used::new())), ticket);
}

fn device_info(config: DiskConfig, size: u64, used: &Used) -> BlockDeviceInfo {
    let file = config.path.to_string_lossy().into_owned();
    let actual_size = used.get(&config.path).copied();
    BlockDeviceInfo {
        file: file.clone(),
        node_name: Some(config.backend().to_owned()),
        ro: config.readonly,
        drv: "raw".into(),
        backing_file_depth: 0,
        encrypted: false,
        detect_zeroes: BlockdevDetectZeroes::Off,
        bps: config.bps.map_or(0, PerSecond::get),
        bps_rd: 0,
        bps_wr: 0,
        iops: config.iops.map_or(0, DiskIops::get),
        iops_rd: 0,
        iops_wr: 0,
        cache: BlockdevCacheInfo { writeback: true, direct: config.direct, no_flush: false },
        write_threshold: 0,
        image: ImageInfo { filename: file, format: "raw".into(), virtual_size: size, actual_size },
    }
}

pub fn query_blockstats(vmm: &mut Vmm, _: QueryBlockstats) -> Result<Vec<BlockStats>, Error> {
    let stats = |disk: PluggedDisk| {
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        let s = &disk.stats;
        BlockStats {
            device: Some(disk.config.id.to_string()),
            qdev: Some(disk.config.id.to_string()),
            node_name: Some(disk.config.backend().to_owned()),
            stats: BlockDeviceStats {
                rd_bytes: count(&s.rd_bytes),
                wr_bytes: count(&s.wr_bytes),
                rd_operations: count(&s.rd_operations),
                wr_operations: count(&s.wr_operations),
                flush_operations: count(&s.flush_operations),
                unmap_operations: count(&s.unmap_operations),
                failed_rd_operations: count(&s.failed_rd_operations),
                failed_wr_operations: count(&s.failed_wr_operations),
                failed_flush_operations: count(&s.failed_flush_operations),
                failed_unmap_operations: count(&s.failed_unmap_operations),
                account_invalid: true,
                account_failed: true,
                ..BlockDeviceStats::default()
            },
        }
    };
    Ok(vmm.machine.disks().map(stats).collect())
}
