//! Real work in a protected guest, for how many bytes its checkpoints take on the wire: an archive of
//! a kernel's modules is unpacked into memory, or a database runs transactions as in TPC-B
//! (`xtask/guest/real.sh`).
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use qmp::schema::ReplicationStart;
use stories::debian::{Debian, output};
use stories::guest;

use super::{MIB, Manner, begin, epochs, last, sampler, settle, unprotect};
use crate::bench::control::Connection;
use crate::bench::measure::{LIMIT, Turn, send};
use crate::bench::monitors::{Found, Guest};
use crate::bench::rig::Rig;
use crate::bench::{Message, Metric, Scenario};

const INIT: &str = include_str!("../../../guest/real.sh");
/// The database, which is a shell for its language.
const DATABASE: &str = "usr/bin/sqlite3";
/// Milliseconds from one checkpoint to the next: what `stratoctl remus` has by default.
const INTERVAL: u64 = 200;
/// Pieces of work whose checkpoints are measured in each turn.
const PIECES: usize = 4;

/// Measures in `turns` turns, each with a new guest.
///
/// # Errors
/// The packages lack something, or the guest cannot work.
pub fn measure(
    rig: &Rig,
    debian: &Debian,
    found: &Found,
    scenario: Scenario,
    turns: usize,
) -> Result<()> {
    let what = if scenario == Scenario::RemusUnpack { "unpack" } else { "database" };
    let initramfs = initramfs(rig, debian)?;
    let sample = sampler(scenario, Manner::Backup.name());
    for _ in 0..turns {
        rig.interrupt.check()?;
        send(&Message::Step(scenario.title().to_owned()))?;
        let turn = Turn::new(rig, found, scenario);
        let guest = Guest { mib: MIB, initramfs: Some(initramfs.clone()), ..turn.linux(what)? };
        let mut run = turn.start(&guest)?;
        let (connection, _) = run.connect()?;
        let Connection::Qmp(mut client) = connection else { bail!("not QMP") };
        while run.wait_figure(LIMIT)?.0 != "work" {}
        let start = ReplicationStart { interval: Some(INTERVAL), ..Default::default() };
        let protected = begin(rig, found, &mut client, Manner::Backup, start)?;
        settle(&mut run)?;
        let after = last(&mut client)?;
        for _ in 0..PIECES {
            run.wait_figure(LIMIT)?;
        }
        for epoch in epochs(&mut client, after)? {
            let raw = (epoch.dirty_pages * 4096) as f64;
            if epoch.encode_us.is_some() && raw > 0.0 {
                sample(Metric::DirtyPages, epoch.dirty_pages as f64)?;
                sample(Metric::WireShare, epoch.wire_bytes as f64 / raw * 100.0)?;
            }
        }
        if let Some(protected) = protected {
            unprotect(&mut client, protected)?;
        }
    }
    Ok(())
}

/// The initramfs with both, made at the first call.
fn initramfs(rig: &Rig, debian: &Debian) -> Result<PathBuf> {
    let path = rig.dir.join("real.cpio");
    if path.exists() {
        return Ok(path);
    }
    let archive = rig.dir.join("modules.tar.gz");
    pack(&debian.modules()?.join("kernel"), &archive)?;
    let mut programs = vec![("modules.tar.gz".to_owned(), archive)];
    for file in debian.program_files(DATABASE)? {
        let name = file.file_name().context("a file without a name")?.to_string_lossy();
        programs.push((format!("lib/{name}"), file));
    }
    let programs: Vec<_> =
        programs.iter().map(|(name, file)| (name.as_str(), file.as_path())).collect();
    fs::write(&path, guest::system(debian, INIT, &[], &["lib"], &programs)?)?;
    Ok(path)
}

/// Packs a directory.
fn pack(dir: &Path, archive: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("-czf").arg(archive).arg("-C").arg(dir).arg(".").stdin(Stdio::null());
    output(&mut tar).map(drop)
}
