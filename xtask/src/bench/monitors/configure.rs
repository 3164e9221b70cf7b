//! The configuration of each monitor to run a guest.
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use super::Guest;

/// The NIC's address in every guest.
const MAC: &str = "52:54:00:12:34:56";

/// `key=value,key=value` with a path that may have commas in it, as QEMU reads it.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

pub fn ours(command: &mut Command, guest: &Guest, socket: &Path, dir: &Path) -> Result<()> {
    let mut config = json!({
        "boot-source": { "kernel_image_path": guest.kernel, "boot_args": guest.cmdline },
        "machine-config": { "vcpu_count": guest.vcpus, "mem_size": guest.mib << 20 },
        "serial": { "stdio": true },
    });
    if let Some(initramfs) = &guest.initramfs
        && let Some(source) = config.get_mut("boot-source").and_then(|v| v.as_object_mut())
    {
        source.insert("initrd_fs_path".to_owned(), json!(initramfs));
    }
    if let (Some((disk, tap)), Some(config)) = (&guest.devices, config.as_object_mut()) {
        let drive = json!({ "drive_id": "disk", "path_on_host": disk, "read_only": false, "direct": false });
        let nic = json!({ "iface_id": "nic", "host_dev_name": tap, "mac": MAC });
        config.insert("drive".to_owned(), json!([drive]));
        config.insert("net".to_owned(), json!([nic]));
    }
    let file = dir.join("vm.json");
    fs::write(&file, config.to_string())?;
    command.arg("-config").arg(file);
    command.arg("-api-channel").arg(format!("unix:{}", socket.display()));
    Ok(())
}

/// [`ours`] with the fewest slots to plug devices into that leave one for each kind.
pub fn few_slots(command: &mut Command, guest: &Guest, socket: &Path, dir: &Path) -> Result<()> {
    ours(command, guest, socket, dir)?;
    command.args(["-machine", "microvm,disk-slots=1,nic-slots=1"]);
    Ok(())
}

/// `bare.c`, which has neither devices nor a control socket.
pub fn bare(command: &mut Command, guest: &Guest, _: &Path, _: &Path) -> Result<()> {
    command.arg(&guest.kernel).arg(guest.mib.to_string());
    Ok(())
}

pub fn qemu(command: &mut Command, guest: &Guest, socket: &Path, _dir: &Path) -> Result<()> {
    // KVM without hardware virtualization lists a register that it does not allow to be set.
    let machine = "-cpu host,-arch-capabilities -nodefaults -no-user-config -nographic -no-reboot -serial stdio";
    command.args(machine.split(' '));
    let acpi = if guest.acpi { "on" } else { "off" };
    command.arg("-M").arg(format!("microvm,accel=kvm,acpi={acpi}"));
    command.args(["-smp", &guest.vcpus.to_string(), "-m", &guest.mib.to_string()]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", escaped(socket)));
    command.arg("-kernel").arg(&guest.kernel);
    if let Some(initramfs) = &guest.initramfs {
        command.arg("-initrd").arg(initramfs).args(["-append", &guest.cmdline]);
    }
    if let Some((disk, tap)) = &guest.devices {
        let disk = escaped(disk);
        command.args([
            "-drive".to_owned(),
            format!("id=disk,file={disk},format=raw,if=none,cache=writeback"),
            "-device".to_owned(),
            "virtio-blk-device,drive=disk".to_owned(),
            "-netdev".to_owned(),
            format!("tap,id=nic,ifname={tap},script=no,downscript=no"),
            "-device".to_owned(),
            format!("virtio-net-device,netdev=nic,mac={MAC}"),
        ]);
    }
    Ok(())
}

pub fn firecracker(command: &mut Command, guest: &Guest, socket: &Path, dir: &Path) -> Result<()> {
    let mut config = json!({
        "boot-source": { "kernel_image_path": guest.kernel, "boot_args": guest.cmdline },
        "machine-config": { "vcpu_count": guest.vcpus, "mem_size_mib": guest.mib },
        "drives": [],
    });
    if let Some(initramfs) = &guest.initramfs
        && let Some(source) = config.get_mut("boot-source").and_then(|v| v.as_object_mut())
    {
        source.insert("initrd_path".to_owned(), json!(initramfs));
    }
    if let (Some((disk, tap)), Some(config)) = (&guest.devices, config.as_object_mut()) {
        let drive = json!({ "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false });
        let nic = json!({ "iface_id": "nic", "host_dev_name": tap, "guest_mac": MAC });
        config.insert("drives".to_owned(), json!([drive]));
        config.insert("network-interfaces".to_owned(), json!([nic]));
    }
    let file = dir.join("firecracker.json");
    fs::write(&file, config.to_string())?;
    command.arg("--api-sock").arg(socket).arg("--config-file").arg(file);
    Ok(())
}

pub fn cloud_hypervisor(
    command: &mut Command,
    guest: &Guest,
    socket: &Path,
    _: &Path,
) -> Result<()> {
    command.arg("--api-socket").arg(socket).arg("--kernel").arg(&guest.kernel);
    command.arg("--cpus").arg(format!("boot={}", guest.vcpus));
    command.arg("--memory").arg(format!("size={}M", guest.mib));
    command.args(["--serial", "tty", "--console", "off"]);
    if let Some(initramfs) = &guest.initramfs {
        command.arg("--initramfs").arg(initramfs).args(["--cmdline", &guest.cmdline]);
    }
    if let Some((disk, tap)) = &guest.devices {
        command.arg("--disk").arg(format!("path={}", disk.display()));
        command.arg("--net").arg(format!("tap={tap},mac={MAC}"));
    }
    Ok(())
}

pub fn stratovirt(command: &mut Command, guest: &Guest, socket: &Path, dir: &Path) -> Result<()> {
    // Its system-call filter kills it at `stop` if it was built by a Rust version whose sleep is
    // clock_nanosleep.
    command.args(["-machine", "microvm", "-serial", "stdio", "-disable-seccomp"]);
    command.args(["-smp", &guest.vcpus.to_string(), "-m", &guest.mib.to_string()]);
    command.arg("-qmp").arg(format!("unix:{},server,nowait", socket.display()));
    command.arg("-kernel").arg(&guest.kernel);
    match &guest.initramfs {
        Some(initramfs) => {
            command.args([OsStr::new("-initrd"), initramfs.as_os_str()]);
            command.args(["-append", &guest.cmdline]);
        }
        // It requires an initrd or a root disk, even for a guest that needs neither.
        None => {
            let nothing = dir.join("nothing.cpio");
            fs::write(&nothing, [0; 512])?;
            command.arg("-initrd").arg(nothing);
        }
    }
    if let Some((disk, tap)) = &guest.devices {
        command.args([
            "-drive".to_owned(),
            format!("id=disk,file={},direct=off", disk.display()),
            "-device".to_owned(),
            "virtio-blk-device,drive=disk,id=blk".to_owned(),
            "-netdev".to_owned(),
            format!("tap,id=nic,ifname={tap}"),
            "-device".to_owned(),
            format!("virtio-net-device,netdev=nic,id=net,mac={MAC}"),
        ]);
    }
    Ok(())
}
