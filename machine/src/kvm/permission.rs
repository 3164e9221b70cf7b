//! How a user who may not open /dev/kvm gets permission.
use std::{fs, os::unix::fs::MetadataExt};

/// Read and write for the group.
const GROUP: u32 = 0o060;

/// The command that helps on this host.
pub(super) fn fix() -> String {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let device = fs::metadata("/dev/kvm").map(|device| (device.mode(), device.gid()));
    let (mode, gid) = device.unwrap_or_default();
    command(mode, gid, &groups)
}

/// By membership if a group other than root's has access; otherwise by an ACL entry for the user
/// alone.
fn command(mode: u32, gid: u32, groups: &str) -> String {
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, number) = (fields.next()?, fields.nth(1)?);
        (number.parse() == Ok(gid)).then_some(name)
    });
    match name.filter(|_| gid != 0 && mode & GROUP == GROUP) {
        Some(name) => format!("sudo usermod -aG {name} $USER, then log in again"),
        None => "sudo setfacl -m u:$USER:rw /dev/kvm, which lasts until the host reboots".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_one_that_the_device_has() {
        let groups = "root:x:0:\nkvm:x:108:alice\nvirt:x:64055:\n";
        assert!(command(0o20660, 108, groups).starts_with("sudo usermod -aG kvm $USER"));
        assert!(command(0o20660, 64055, groups).starts_with("sudo usermod -aG virt $USER"));
        // No such group, one without access, and root's own.
        for (mode, gid) in [(0o20660, 36), (0o20600, 108), (0o20660, 0)] {
            assert!(command(mode, gid, groups).starts_with("sudo setfacl -m u:$USER:rw /dev/kvm"));
        }
    }
}
