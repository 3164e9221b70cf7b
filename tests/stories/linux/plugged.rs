//! Disks are plugged, resized and unplugged under a Linux guest, in every way of saving and
//! restoring it. Linux accepts every feature that a slot offers, and its file system checks what it
//! reads.
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::agent::Story;
use stories::archive::{check_ext4, make_ext4, place};
use stories::monitor::{Monitor, Vm};

use crate::snapshot::Shape;

/// How the guest is saved, and the options of `-incoming` after the path.
const WAYS: [(&str, &str); 10] = [
    ("suspend", ",mapped=on"),
    ("suspend", ",mapped=off"),
    ("suspend", ",mapped=uffd"),
    ("stopped", ",mapped=on"),
    ("stopped", ",mapped=off"),
    ("stopped", ",mapped=uffd"),
    ("incremental", ",mapped=on"),
    ("incremental", ",mapped=off"),
    ("incremental", ",mapped=uffd"),
    ("stream", ""),
];

fn plug(qmp: &mut Client, id: &str, image: &Path, addr: &str) -> Result<()> {
    plug_with(qmp, id, image, addr, &json!({ "discard": "ignore" }))
}

/// Plugs a disk into a slot, with more members of `blockdev-add`.
pub fn plug_with(qmp: &mut Client, id: &str, image: &Path, addr: &str, more: &Value) -> Result<()> {
    let file = json!({ "driver": "file", "filename": image });
    let mut how = json!({ "node-name": id, "file": file, "driver": "raw" });
    if let (Some(how), Some(more)) = (how.as_object_mut(), more.as_object()) {
        how.extend(more.clone());
    }
    qmp.execute_raw("blockdev-add", how)?;
    let device = json!({ "id": id, "driver": "virtio-blk-mmio", "addr": addr });
    qmp.execute_raw("device_add", device)?;
    Ok(())
}

/// Saves the guest, which stays stopped; returns the argument of `-incoming`.
fn save(qmp: &mut Client, directory: &Path, way: &str) -> Result<String> {
    let uri = format!("file:{}", directory.display());
    let migrate = |qmp: &mut Client, arguments: Value| -> Result<()> {
        qmp.execute_raw("migrate", arguments)?;
        let info = qmp.execute_raw("query-migrate", json!({}))?;
        ensure!(info.get("status") == Some(&json!("completed")), "{info}");
        Ok(())
    };
    match way {
        "stopped" => {
            qmp.execute_raw("stop", json!({}))?;
            migrate(qmp, json!({ "uri": uri, "resume": true }))?;
        }
        "incremental" => {
            let base = format!("{uri}.base");
            migrate(qmp, json!({ "uri": base, "track": true, "resume": true }))?;
            migrate(qmp, json!({ "uri": uri, "incremental": true }))?;
        }
        "stream" => {
            let fd = File::create(directory)?;
            qmp.execute_with_fds("getfd", json!({ "fdname": "out" }), &[fd.as_fd()])?;
            migrate(qmp, json!({ "uri": "fd:out" }))?;
            return Ok(format!("exec:cat {}", directory.display()));
        }
        _ => migrate(qmp, json!({ "uri": uri }))?,
    }
    Ok(uri)
}

/// What each disk's file system contains.
const HOLDS: &str = "for f in /mnt/*; do [ $f = /mnt/lost+found ] || seq 1 20000 | cmp - $f; done";

/// The guest has a disk of that many sectors.
pub fn sees(guest: &mut Monitor, disk: &str, sectors: u64) -> Result<()> {
    let size = format!("/sys/block/{disk}/size");
    guest.sh(&format!("until [ $(cat {size}) = {sectors} ]; do usleep 10000; done")).map(drop)
}

/// The file system holds what it should, `file` can be written to it, and its free blocks can be
/// discarded.
pub fn holds(guest: &mut Monitor, file: &str) -> Result<()> {
    guest.sh("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.sh(HOLDS)?;
    guest.sh(&format!("seq 1 20000 > /mnt/{file} && sync && fstrim /mnt"))?;
    is_quiet(guest)
}

/// The kernel has met no error.
fn is_quiet(guest: &mut Monitor) -> Result<()> {
    let log = guest.sh("dmesg | grep -E 'I/O error|critical|EXT4-fs error|BUG:|Oops' || true")?;
    ensure!(log.is_empty(), "the kernel says\n{log}");
    Ok(())
}

/// A disk for a guest, with `mke2fs` and the files that it needs in one directory.
fn tools(story: &Story) -> Result<PathBuf> {
    let (tree, image) = (story.dir.join("tools"), story.dir.join("tools.img"));
    for file in story.debian.program_files("sbin/mke2fs")? {
        let name = file.file_name().context("a file without a name")?;
        place(&fs::canonicalize(&file)?, &tree.join(name))?;
    }
    make_ext4(&story.debian, &image, 32 << 20, Some(&tree))?;
    Ok(image)
}

/// A slot that was empty at boot offers every feature to Linux, whatever is plugged into it;
/// `mke2fs` then discards the whole disk.
pub fn made_by_the_guest(story: &Story, shape: Shape) -> Result<()> {
    let tools = tools(story)?;
    let mut guest = shape.vm(story)?.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mut qmp = guest.qmp()?;
    plug_with(&mut qmp, "tools", &tools, "0", &json!({ "read-only": true }))?;
    sees(&mut guest, "vda", (32 << 20) / 512)?;
    guest.sh("mkdir /tools && mount -o ro /dev/vda /tools")?;
    for (number, (discard, direct)) in
        [("unmap", true), ("ignore", true), ("unmap", false), ("ignore", false)].iter().enumerate()
    {
        let (id, size) = (format!("disk{number}"), 32 << 20);
        let image = story.dir.join(format!("{id}.img"));
        // The image has no holes.
        fs::write(&image, vec![0x5a; size])?;
        let how = json!({ "discard": discard, "cache": { "direct": direct } });
        plug_with(&mut qmp, &id, &image, "1", &how)?;
        sees(&mut guest, "vdb", size as u64 / 512)?;
        let name = format!("discard={discard}, direct={direct}");
        let mke2fs = "/tools/ld-linux-x86-64.so.2 --library-path /tools /tools/mke2fs";
        guest.sh(&format!("{mke2fs} -q -F -t ext4 -E discard,lazy_itable_init=0 /dev/vdb"))?;
        guest.sh("mount -o discard /dev/vdb /mnt")?;
        holds(&mut guest, "written").with_context(|| name.clone())?;
        holds(&mut guest, "written2").with_context(|| name.clone())?;
        guest.sh("umount /mnt")?;
        qmp.execute_raw("device_del", json!({ "id": id }))?;
        sees(&mut guest, "vdb", 0)?;
        is_quiet(&mut guest).with_context(|| name.clone())?;
        check_ext4(&story.debian, &image, false).with_context(|| name.clone())?;
        // Space that the guest discards is deallocated, or not.
        let blocks = fs::metadata(&image)?.blocks() * 512;
        let given_back = blocks < size as u64 / 2;
        ensure!(given_back == (*discard == "unmap"), "{name}: {blocks} bytes of {size} are used");
    }
    Ok(())
}

pub fn slots(story: &Story) -> Result<()> {
    let image = |name: &str| story.dir.join(name);
    let (first, plugged) = (image("first.img"), image("plugged.img"));
    make_ext4(&story.debian, &first, 16 << 20, None)?;
    make_ext4(&story.debian, &plugged, 64 << 20, None)?;
    let vm = Vm::native(&story.paths)?.machine("mem_size", 256_u64 << 20);
    let mut guest = vm.disk("first", &first, true).start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    let mut qmp = guest.qmp()?;
    plug(&mut qmp, "plugged", &plugged, "1")?;
    sees(&mut guest, "vdb", (64 << 20) / 512)?;
    guest.sh("mount -o discard /dev/vdb /mnt && seq 1 20000 > /mnt/plugged && sync")?;
    for (number, (way, how)) in WAYS.into_iter().enumerate() {
        let name = format!("{way}{how}");
        // Something else in another slot each time: a disk that can be written where a read-only
        // one was, one that has grown, an empty slot.
        let (id, other) = (format!("disk{number}"), image(&format!("other{number}.img")));
        File::create(&other)?.set_len(1 << 20)?;
        if number == 0 {
            qmp.execute_raw("device_del", json!({ "id": "first" }))?;
            plug(&mut qmp, &id, &other, "0")?;
        } else {
            plug(&mut qmp, &id, &other, "2")?;
            let size = json!({ "device": id, "size": 2 << 20 });
            qmp.execute_raw("block_resize", size)?;
        }
        let incoming = save(&mut qmp, &image(&format!("saved{number}")), way)?;
        qmp.execute_raw("quit", json!({}))?;
        guest.wait_exit()?;
        let dir = story.dir.join(number.to_string());
        std::fs::create_dir_all(&dir)?;
        let args = ["-S", "-incoming", &format!("{incoming}{how}")];
        guest = Vm::described(json!({})).args(&args).start(&story.paths, &dir)?;
        qmp = guest.qmp().with_context(|| name.clone())?;
        qmp.execute_raw("cont", json!({}))?;
        holds(&mut guest, &format!("after{number}")).with_context(|| name.clone())?;
        if number > 0 {
            sees(&mut guest, "vdc", (2 << 20) / 512).with_context(|| name)?;
            qmp.execute_raw("device_del", json!({ "id": id }))?;
            sees(&mut guest, "vdc", 0)?;
        }
    }
    guest.sh("umount /mnt")?;
    drop(guest);
    check_ext4(&story.debian, &plugged, false).map(drop)
}
