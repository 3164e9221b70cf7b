//! Every file of `config-examples/` boots, with this host's paths and taps in place of its own.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::agent::{EXAMPLES, NamedTest, Story};
use stories::guest::{Kernel, initramfs, root_disk};
use stories::monitor::{BOOT, Vm};
use stories::net::Tap;

/// Prefix of the names of these tests; the file's name follows.
const NAME: &str = "the_example_boots_";

/// One test for each file in `dir`.
pub fn stories(dir: &Path) -> Result<Vec<NamedTest>> {
    let mut stories: Vec<NamedTest> = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        stories.push((format!("{NAME}{}", entry?.file_name().display()), example));
    }
    ensure!(!stories.is_empty(), "{} is empty", dir.display());
    stories.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(stories)
}

fn example(story: &Story) -> Result<()> {
    let file = story.name.strip_prefix(NAME).context("not an example")?;
    boots(story, &fs::read_to_string(story.paths.cache.join(EXAMPLES).join(file))?)
}

fn boots(story: &Story, text: &str) -> Result<()> {
    let mut config: Value = serde_json::from_str(text)?;
    let mut taps = Vec::new();
    if let Some(boot) = config.get_mut("boot-source") {
        put(boot, "kernel_image_path", json!(Kernel::Elf.path(&story.paths)));
        // Debian's drivers are modules: they are in the initramfs, whatever the root file system
        // is.
        if let Value::Object(boot) = boot {
            boot.insert("initrd_fs_path".to_owned(), json!(initramfs(&story.paths)));
        }
    }
    for (number, drive) in items(&mut config, "drive").enumerate() {
        let image = story.dir.join(format!("disk{number}.img"));
        root_disk(&story.debian, &image)?;
        put(drive, "path_on_host", json!(image));
    }
    for (number, net) in items(&mut config, "net").enumerate() {
        let name = format!("tap{number}");
        taps.push(Tap::create(&story.debian, &name, &format!("10.9.{number}.1/24"))?);
        put(net, "host_dev_name", json!(name));
    }
    for (number, console) in items(&mut config, "console").enumerate() {
        put(console, "socket_path", json!(story.dir.join(format!("console{number}.sock"))));
    }
    let on_stdio = config.get("serial").is_some();
    let mut guest = Vm::described(config).start(&story.paths, &story.dir)?;
    if on_stdio {
        guest.wait_for("guest: init", BOOT)?;
        guest.wait_ready()?;
    }
    let mut qmp = guest.qmp()?;
    let status = qmp.execute_raw("query-status", json!({}))?;
    ensure!(status.get("running") == Some(&json!(true)), "{status}");
    qmp.execute_raw("quit", json!({}))?;
    guest.wait_exit()?;
    Ok(())
}

fn items<'v>(config: &'v mut Value, list: &str) -> impl Iterator<Item = &'v mut Value> {
    config.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten()
}

fn put(object: &mut Value, key: &str, value: Value) {
    if let Some(member) = object.get_mut(key) {
        *member = value;
    }
}
