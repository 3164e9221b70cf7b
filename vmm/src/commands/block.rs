//! Disks' back-ends.
use std::sync::atomic::Ordering;

use machine::{
    PlugError, PluggedDisk,
    config::{Aio, DiskConfig, limits},
};
use qmp::{Error, schema::*};

use super::{invalid, plug_error};
use crate::{
    cli::{self, value},
    vmm::Vmm,
};

pub fn blockdev_add(vmm: &mut Vmm, command: BlockdevAdd) -> Result<Empty, Error> {
    let refuse = |key, value: &str, allowed| Err(invalid(key, value, allowed));
    let name = &command.node_name;
    value::id(name).map_err(|rule| invalid("node-name", name, rule))?;
    if let Some(id) = command.id.as_ref().filter(|id| *id != name) {
        return refuse("id", id, "must be as node-name: leave it out");
    }
    let filename = &command.file.filename;
    let path = value::path(filename).map_err(|rule| invalid("file.filename", filename, rule))?;
    if let Some(driver) = command.driver.as_deref().filter(|d| *d != "raw") {
        return refuse("driver", driver, "only 'raw' images are built yet");
    }
    let kinds = ["file", "host_device"];
    if let Some(driver) = command.file.driver.as_deref().filter(|d| !kinds.contains(d)) {
        return refuse("file.driver", driver, "must be 'file' or 'host_device'");
    }
    if command.backing.is_some() {
        return refuse("backing", "...", "raw images have no backing file");
    }
    if let Some(options) = &command.options {
        return refuse("options", &options.to_string(), "raw images have none: leave it out");
    }
    let qcow2 = [
        ("l2-cache-size", command.l2_cache_size),
        ("refcount-cache-size", command.refcount_cache_size),
    ];
    if let Some((key, Some(bytes))) = qcow2.into_iter().find(|(_, bytes)| bytes.is_some()) {
        return refuse(key, &bytes.to_string(), "format 'qcow2' is not built yet: leave it out");
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
    if let Some(iops) = command.throttling_iops_total {
        value::number(&iops.to_string(), limits::DISK_IOPS)
            .map_err(|rule| invalid("throttling.iops-total", iops, rule))?;
    }
    let cache = command.cache.unwrap_or_default();
    if cache.no_flush == Some(true) {
        return refuse("cache.no-flush", "true", "a guest's flush always reaches the disk");
    }
    let unlimited = |n: Option<u64>| n.filter(|n| *n > 0);
    let config = DiskConfig {
        id: command.node_name,
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
        iops: unlimited(command.throttling_iops_total),
        bps: unlimited(command.throttling_bps_total),
        queues: 1,
        queue_size: limits::DEFAULT_QUEUE_SIZE,
        iothread: None,
        backend: None,
        probe: command.driver.is_none(),
    };
    vmm.machine.add_disk_backend(config).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

pub fn blockdev_del(vmm: &mut Vmm, command: BlockdevDel) -> Result<Empty, Error> {
    vmm.machine.remove_disk_backend(&command.node_name).map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

pub fn block_resize(vmm: &mut Vmm, command: BlockResize) -> Result<Empty, Error> {
    let BlockResize { device, node_name, size } = command;
    let Some(name) = device.as_ref().or(node_name.as_ref()) else {
        return Err(Error::text("Parameter 'device' or 'node-name' is needed"));
    };
    if size % 512 != 0 {
        return Err(invalid("size", size, "must be a multiple of 512"));
    }
    let meant = |disk: &PluggedDisk| {
        device.as_ref().is_none_or(|id| *id == disk.config.id)
            && node_name.as_ref().is_none_or(|name| name == disk.config.backend())
    };
    let disk = disks(vmm)?.into_iter().find(meant);
    let id = disk.map(|disk| disk.config.id).ok_or(PlugError::NoDevice(name.clone()));
    let resized = id.and_then(|id| vmm.machine.resize_disk(&id, size));
    resized.map_err(|e| plug_error(&e))?;
    Ok(Empty {})
}

pub fn query_block(vmm: &mut Vmm, _: QueryBlock) -> Result<Vec<BlockInfo>, Error> {
    let info = |disk: PluggedDisk| BlockInfo {
        device: disk.config.id.clone(),
        qdev: Some(disk.config.id.clone()),
        r#type: "unknown".into(),
        removable: false,
        locked: false,
        io_status: Some(BlockDeviceIoStatus::Ok),
        inserted: Some(device_info(disk.config, disk.size)),
    };
    Ok(disks(vmm)?.into_iter().map(info).collect())
}

pub fn query_named_block_nodes(
    vmm: &mut Vmm,
    _: QueryNamedBlockNodes,
) -> Result<Vec<BlockDeviceInfo>, Error> {
    let plugged = disks(vmm)?.into_iter().map(|disk| device_info(disk.config, disk.size));
    let waiting =
        vmm.machine.waiting_disks().map(|(config, size)| device_info(config.clone(), size));
    Ok(plugged.chain(waiting).collect())
}

fn disks(vmm: &Vmm) -> Result<Vec<PluggedDisk>, Error> {
    vmm.machine.disks().map_err(|e| Error::generic(&e))
}

fn device_info(config: DiskConfig, size: u64) -> BlockDeviceInfo {
    let file = config.path.to_string_lossy().into_owned();
    let actual_size = std::fs::metadata(&config.path).ok().map(|m| {
        use std::os::unix::fs::MetadataExt;
        m.blocks().saturating_mul(512)
    });
    BlockDeviceInfo {
        file: file.clone(),
        node_name: Some(config.backend().to_owned()),
        ro: config.readonly,
        drv: "raw".into(),
        backing_file_depth: 0,
        encrypted: false,
        detect_zeroes: BlockdevDetectZeroes::Off,
        bps: config.bps.unwrap_or(0),
        bps_rd: 0,
        bps_wr: 0,
        iops: config.iops.unwrap_or(0),
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
            device: Some(disk.config.id.clone()),
            qdev: Some(disk.config.id.clone()),
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
    Ok(disks(vmm)?.into_iter().map(stats).collect())
}
