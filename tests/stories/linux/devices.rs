//! Disks and networks do what a guest expects, and the host sees the results.
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use stories::agent::Story;
use stories::archive::{make_ext4, read_ext4};
use stories::net::Tap;

use crate::snapshot::Shape;

pub fn file_in_the_image(story: &Story, shape: Shape) -> Result<()> {
    let image = story.dir.join("data.img");
    make_ext4(&story.debian, &image, 64 << 20, None)?;
    let vm = shape.vm(story)?.disk("data", &image, false);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    ensure!(guest.sh("cat /sys/block/vda/size")? == ((64 << 20) / 512).to_string());
    ensure!(guest.sh("cat /sys/block/vda/serial")? == "data");
    guest.sh(
        "mount /dev/vda /mnt && seq 1 100000 > /mnt/numbers && echo 'from the guest' > /mnt/letter",
    )?;
    // Read back from the disk rather than from the page cache.
    let sum = guest.sh("sync; echo 3 > /proc/sys/vm/drop_caches; md5sum < /mnt/numbers")?;
    ensure!(sum == guest.sh("seq 1 100000 | md5sum")?, "the disk does not keep what is written");
    guest.sh("umount /mnt")?;
    guest.qmp()?.execute_raw("quit", json!({}))?;
    guest.wait_exit()?;
    ensure!(read_ext4(&story.debian, &image, "/letter")? == "from the guest\n");
    let numbers: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    ensure!(
        read_ext4(&story.debian, &image, "/numbers")? == numbers,
        "the image holds something else"
    );
    Ok(())
}

pub fn read_only_disk(story: &Story, shape: Shape) -> Result<()> {
    let image = story.dir.join("data.img");
    make_ext4(&story.debian, &image, 16 << 20, None)?;
    let before = fs::read(&image)?;
    let vm = shape.vm(story)?.disk("data", &image, true);
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    ensure!(guest.sh("cat /sys/block/vda/ro")? == "1", "the guest takes the disk for writable");
    ensure!(guest.sh("echo nonsense > /dev/vda").is_err(), "the guest wrote to a read-only disk");
    guest.sh("mount -o ro,noload /dev/vda /mnt && ls /mnt")?;
    drop(guest);
    ensure!(fs::read(&image)? == before, "the image has changed");
    Ok(())
}

pub fn ping_and_tcp(story: &Story, shape: Shape) -> Result<()> {
    let _tap = Tap::create(&story.debian, "tap0", "10.9.0.1/24")?;
    let vm = shape.vm(story)?.nic("net0", "tap0", "52:54:00:12:34:56");
    let mut guest = vm.start(&story.paths, &story.dir)?;
    guest.wait_ready()?;
    ensure!(guest.sh("cat /sys/class/net/eth0/address")? == "52:54:00:12:34:56");
    guest.sh("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up")?;
    let ping = guest.sh("ping -c 3 -i 0.2 10.9.0.1")?;
    ensure!(ping.contains("3 packets received"), "{ping}");

    // Megabytes in both directions at once, each side checking the other's.
    let listener = TcpListener::bind("10.9.0.1:7000")?;
    let host = thread::spawn(move || -> Result<String> {
        let (mut stream, _) = listener.accept()?;
        let mut sending = stream.try_clone()?;
        let sender = thread::spawn(move || -> std::io::Result<()> {
            // Kept open: busybox's nc stops sending when the peer closes the connection.
            sending.write_all(&numbers())
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received)?;
        match sender.join() {
            Ok(sent) => sent?,
            Err(_) => bail!("sending panicked"),
        }
        Ok(String::from_utf8(received)?)
    });
    let sum = guest.sh("seq 1 1000000 | md5sum")?;
    let got = guest.sh("seq 1 1000000 | nc 10.9.0.1 7000 > /tmp/got; md5sum < /tmp/got")?;
    ensure!(got == sum, "the guest received something else than was sent");
    let received = match host.join() {
        Ok(received) => received?,
        Err(_) => bail!("receiving panicked"),
    };
    ensure!(
        received.as_bytes() == numbers(),
        "the host received {} bytes of something else",
        received.len()
    );
    Ok(())
}

/// What `seq 1 1000000` prints.
fn numbers() -> Vec<u8> {
    (1..=1_000_000).flat_map(|number| format!("{number}\n").into_bytes()).collect()
}
