//! `stratoctl remus web HOST` as it is typed: the other host is reached by ssh, with a real client and
//! a real server. That host has this one's kernel, and mounts of its own, so that its registry is at
//! the same path and is another one.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stories::debian::{Debian, output};
use stories::monitor::SOON;

use crate::protected::count_aloud;
use crate::rig::Rig;

/// Its name, which only the client's configuration knows.
const HOST: &str = "other-host";

/// The other host.
struct Host<'a> {
    rig: &'a Rig,
    /// Where the client is, to be found first.
    bin: PathBuf,
}

impl<'a> Host<'a> {
    /// Keys, configurations, and the programs that use them and nothing of this machine's.
    fn new(rig: &'a Rig) -> Result<Self> {
        let debian = Debian::get(&rig.paths).context("there is no sshd: this cannot be run")?;
        let dir = rig.file("ssh");
        let (bin, there) = (dir.join("here"), dir.join("there"));
        for made in [&bin, &there, &rig.file("r"), &rig.file("other")] {
            fs::create_dir_all(made)?;
        }
        for key in ["host", "user"] {
            let mut keygen = debian.program("usr/bin/ssh-keygen")?;
            output(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key)))?;
        }
        let dir = dir.display();
        let write = |name: &str, text: String| fs::write(format!("{dir}/{name}"), text);
        write("known", format!("{HOST} {}", fs::read_to_string(format!("{dir}/host.pub"))?))?;
        write("passwd", "root:*:0:0::/:/bin/sh\nsshd:*:65534:65534::/:/bin/false\n".into())?;
        write(
            "client",
            format!(
                "Host {HOST}\nUser root\nIdentityFile {dir}/user\nIdentitiesOnly yes\nBatchMode yes\n\
                 UserKnownHostsFile {dir}/known\nStrictHostKeyChecking yes\n\
                 ProxyCommand unshare --mount --propagation private {dir}/serve\n"
            ),
        )?;
        write(
            "server",
            format!(
                "HostKey {dir}/host\nAuthorizedKeysFile {dir}/user.pub\nStrictModes no\nUsePAM no\n\
                 PermitRootLogin yes\nPidFile none\nLogLevel ERROR\n\
                 SetEnv PATH={dir}/there:/usr/sbin:/usr/bin:/sbin:/bin\n"
            ),
        )?;
        let line = |name: &str| -> Result<String> { Ok(words(&debian.program(name)?)) };
        let sshd = line("usr/sbin/sshd")?;
        let (own, other) = (rig.file("r"), rig.file("other"));
        script(
            Path::new(&format!("{dir}/serve")),
            &format!(
                "mount -t tmpfs none /run\nmkdir -m 755 /run/sshd\n\
                 mount --bind {dir}/passwd /etc/passwd\nmount --bind {} {}\n\
                 exec {sshd} -r -i -e -f {dir}/server",
                other.display(),
                own.display()
            ),
        )?;
        let ssh = format!("exec {} -F {dir}/client \"$@\"", line("usr/bin/ssh")?);
        script(&bin.join("ssh"), &ssh)?;
        // As if it were installed there.
        let mut stratoctl = String::new();
        let installed = rig.command(&[]);
        for (name, value) in installed.get_envs() {
            let value = value.context("a variable")?.to_string_lossy();
            stratoctl += &format!("export {}='{value}'\n", name.to_string_lossy());
        }
        stratoctl += &format!("exec {} \"$@\"", words(&installed));
        script(&there.join("stratoctl"), &stratoctl)?;
        Ok(Self { rig, bin })
    }

    /// A command with the client on its path.
    fn with_client(&self, mut command: Command) -> Result<Command> {
        let path = std::env::var("PATH").context("no PATH")?;
        command.env("PATH", format!("{}:{path}", self.bin.display()));
        Ok(command)
    }

    /// A verb on this host.
    fn here(&self, args: &[&str]) -> Result<String> {
        output(&mut self.with_client(self.rig.command(args))?)
    }

    /// A verb on the other host.
    fn there(&self, args: &str) -> Result<Value> {
        let mut ssh = Command::new(self.bin.join("ssh"));
        let said = output(ssh.arg(HOST).arg(format!("stratoctl --json {args}")))?;
        serde_json::from_str(&said).with_context(|| said)
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        let _ = self.there("destroy -F web");
    }
}

/// The words of a command for a shell.
fn words(command: &Command) -> String {
    let all = [command.get_program()].into_iter().chain(command.get_args());
    all.map(|word| format!("'{}'", word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\nset -e\n{text}\n"))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[test]
fn a_domain_is_protected_by_another_host_and_continues_there() -> Result<()> {
    let rig = Rig::new("ssh")?;
    let host = Host::new(&rig)?;
    count_aloud(&rig)?;
    fs::create_dir(rig.file("witness"))?;
    let witness = format!("dir:{}", rig.file("witness").display());
    host.here(&["remus", "-i", "25", "--timeout", "400", "--witness", &witness, "web", HOST])?;
    let there = host.there("list web")?;
    ensure!(there[0]["state"] == "standby", "{there}");
    ensure!(rig.state("web")? == "running", "the other registry is another one");
    rig.kill("web")?;
    let deadline = Instant::now() + SOON;
    loop {
        let there = host.there("list web")?;
        if there[0]["replication"]["role"] == json!("primary") {
            ensure!(there[0]["state"] == "running", "{there}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{there}");
    }
}
