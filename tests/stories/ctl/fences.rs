//! Fences that are slow, that fail, and that cross.
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::rig::Rig;
use crate::two::{Stopped, Two, replication, script, until};

/// The fence that `rig` has of its peer, whose side is the other one. It fails while there is a file
/// `fails` in the rig's directory, and hangs while there is one called `hangs`.
fn fence(rig: &Rig, peer: &Rig, side: &str) -> Result<[String; 2]> {
    let stratoctl = rig.command(&[]).get_program().to_string_lossy().into_owned();
    let text = format!(
        "cd '{}'\n>began\n[ ! -e fails ] || exit 1\nwhile [ -e hangs ]; do sleep 0.02; done\n\
         exec '{stratoctl}' --root '{}' fence \"$@\" --side {side}",
        rig.dir.display(),
        peer.file("r").display()
    );
    let program = script(rig, "fence", &text)?;
    Ok(["--fence".to_owned(), format!("exec:{}", program.display())])
}

fn begun(rig: &Rig) -> Result<()> {
    until("a fence", || Ok(rig.file("began").exists()))?;
    Ok(fs::remove_file(rig.file("began"))?)
}

#[test]
fn nobody_continues_before_a_fence_has_succeeded_and_where_two_cross_the_primary_wins() -> Result<()>
{
    let two = Two::new("fences")?;
    let Two { here, there, .. } = &two;
    let (own, theirs) = (fence(here, there, "backup")?, fence(there, here, "primary")?);
    let receive = two.receiver(there, &theirs);
    two.protect_through(here, &own, &receive)?;
    fs::write(here.file("fails"), "")?;
    there.kill("web")?;
    for kept in ["fails", "hangs"] {
        begun(here)?;
        sleep(Duration::from_millis(300));
        let info = replication(here)?;
        ensure!(info["state"] == "stalled" && info["claimed"] == json!(true), "{kept}: {info}");
        fs::write(here.file("hangs"), "")?;
        if kept == "fails" {
            fs::remove_file(here.file("fails"))?;
        }
    }
    fs::remove_file(here.file("hangs"))?;
    here.wait_replication("web", "state", "degraded")?;
    there.ok(&["destroy", "-F", "web"])?;

    // The link is cut, and both reach for their fence; the primary's takes longer.
    two.protect_through(here, &own, &receive)?;
    fs::write(here.file("hangs"), "")?;
    let link = Stopped::link(there)?;
    begun(here)?;
    begun(there)?;
    sleep(Duration::from_millis(300));
    ensure!(replication(here)?["state"] == "stalled", "{}", replication(here)?);
    ensure!(replication(there)?["state"] == "suspecting", "{}", replication(there)?);
    fs::remove_file(here.file("hangs"))?;
    here.wait_replication("web", "state", "degraded")?;
    ensure!(there.state("web")? == "killed");
    drop(link);
    here.says("web", "tally")
}
