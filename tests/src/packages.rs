//! Where guests and tools come from: packages of Debian or Ubuntu, fetched and unpacked, not
//! installed. apt fetches them and checks the signatures, with a state directory of its own: of the
//! machine's files it reads only the sources, and it changes none.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::debian::output;
use crate::progress::Step;

/// A distribution's names of the packages.
#[derive(Debug)]
struct Distribution {
    name: &'static str,
    /// The metapackage that depends on the newest kernel for virtual machines, a package whose name
    /// begins with [`IMAGE`].
    kernel: &'static str,
    /// What replaces that prefix in the names of packages that belong to the kernel.
    companions: &'static [&'static str],
}

/// The first distribution whose kernel is in apt's sources is used.
const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution { name: "Debian", kernel: "linux-image-cloud-amd64", companions: &[] },
    Distribution {
        name: "Ubuntu",
        kernel: "linux-image-virtual",
        companions: &["linux-modules-", "linux-modules-extra-"],
    },
];
const IMAGE: &str = "linux-image-";
/// Fetched with all their dependencies; both distributions use the same names.
const TOOLS: [&str; 9] = [
    "qemu-system-x86",
    "busybox-static",
    "e2fsprogs",
    "xfsprogs",
    "iproute2",
    "etcd-server",
    "openssl",
    "openssh-server",
    "sqlite3",
];
/// apt's message when it reaches no archive.
const UNREACHABLE: [&str; 9] = [
    "Could not resolve",
    "Temporary failure",
    "Could not connect",
    "Unable to connect",
    "Cannot initiate the connection",
    "Connection failed",
    "Connection refused",
    "timed out",
    "Network is unreachable",
];

/// Identifies a choice of packages.
#[must_use]
pub fn wanted() -> String {
    format!("{DISTRIBUTIONS:?} {TOOLS:?}\n")
}

/// Fills `home` with the unpacked packages, from `sources` (a file as `/etc/apt/sources.list`)
/// instead of this machine's, if given.
///
/// # Errors
/// No network, or no sources that have the packages; says which.
pub fn fetch(home: &Path, sources: Option<&Path>) -> Result<()> {
    fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    let home = fs::canonicalize(home)?;
    let apt = Apt::new(&home, sources)?;

    let step = Step::spinner("Reading the package lists");
    let complaints = apt.update()?;
    let (distribution, kernel) = apt.kernel(&complaints)?;
    let packages = apt.resolve(distribution, &kernel, &complaints)?;
    step.done();

    let what = format!("Fetching {}'s kernel, busybox, QEMU and etcd", distribution.name);
    apt.download(&packages, &what)?;

    let packages: Vec<_> = fs::read_dir(&apt.archives)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "deb"))
        .collect();
    let root = home.join("root");
    let step = Step::count("Unpacking", packages.len());
    for package in &packages {
        output(Command::new("dpkg").arg("-x").arg(package).arg(&root))?;
        step.advance();
    }
    step.done();
    fs::remove_dir_all(home.join("apt")).context("cannot remove apt's state")
}

/// apt with its state under a directory of our own.
struct Apt {
    config: PathBuf,
    archives: PathBuf,
}

impl Apt {
    fn new(home: &Path, sources: Option<&Path>) -> Result<Self> {
        let archives = home.join("apt/cache/archives");
        for dir in [home.join("apt/state/lists/partial"), archives.join("partial")] {
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        // With an empty status file nothing counts as installed: apt resolves every dependency.
        fs::write(home.join("apt/status"), "")?;
        let config = home.join("apt/apt.conf");
        let apt = home.join("apt");
        let apt = apt.display();
        let mut text = format!(
            "Dir::State \"{apt}/state\";\nDir::State::status \"{apt}/status\";\nDir::Cache \"{apt}/cache\";\n\
             APT::Sandbox::User \"root\";\nAPT::Install-Recommends \"false\";\nAPT::Architecture \"amd64\";\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n"
        );
        if let Some(sources) = sources {
            let sources = sources.display();
            text.push_str(&format!(
                "Dir::Etc::sourcelist \"{sources}\";\nDir::Etc::sourceparts \"/dev/null\";\n"
            ));
        }
        fs::write(&config, text)?;
        Ok(Self { config, archives })
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", &self.config)
            .env("LC_ALL", "C")
            .current_dir(&self.archives)
            .args(args);
        command
    }

    /// Fetches the package lists. Returns apt's warnings: it does not fail when it cannot fetch a
    /// list.
    fn update(&self) -> Result<String> {
        let out = self.command("apt-get", &["update", "-qq"]).stdin(Stdio::null()).output();
        let out = out.context("cannot run apt-get")?;
        let complaints = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), failure("cannot read the package lists", &complaints));
        Ok(complaints)
    }

    /// The newest kernel, and its distribution.
    fn kernel(&self, complaints: &str) -> Result<(&'static Distribution, String)> {
        for distribution in &DISTRIBUTIONS {
            let depends = self.command("apt-cache", &["depends", distribution.kernel]).output();
            let depends = depends.context("cannot run apt-cache")?;
            let depends = String::from_utf8_lossy(&depends.stdout);
            let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
            if let Some(kernel) = names.into_iter().find(|name| name.starts_with(IMAGE)) {
                return Ok((distribution, kernel.to_owned()));
            }
        }
        let names = DISTRIBUTIONS.each_ref().map(|one| format!("{} ({})", one.kernel, one.name));
        let lacks = format!(
            "apt's sources have no {}: they must name the main archive of one of them for amd64",
            names.join(" and no ")
        );
        bail!(failure(&lacks, complaints))
    }

    /// All packages that are needed, each as NAME=VERSION.
    fn resolve(
        &self,
        distribution: &Distribution,
        kernel: &str,
        complaints: &str,
    ) -> Result<Vec<String>> {
        // The names come from a simulation, because packages in a local archive (file:) would not
        // be copied.
        let mut install = vec!["install", "-s", "-qq", "--no-install-recommends"];
        install.extend(TOOLS);
        let out = self.command("apt-get", &install).stdin(Stdio::null()).output();
        let out = out.context("cannot run apt-get")?;
        let said = String::from_utf8_lossy(&out.stderr);
        let lacks = format!("apt's sources do not have all of {}", TOOLS.join(", "));
        ensure!(out.status.success(), failure(&lacks, &format!("{complaints}{said}")));
        let mut packages: Vec<_> =
            String::from_utf8_lossy(&out.stdout).lines().filter_map(to_install).collect();
        packages.push(kernel.to_owned());
        let version = kernel.strip_prefix(IMAGE).unwrap_or(kernel);
        packages.extend(distribution.companions.iter().map(|begin| format!("{begin}{version}")));
        Ok(packages)
    }

    fn download(&self, packages: &[String], what: &str) -> Result<()> {
        let mut args = vec!["download", "-qq"];
        args.extend(packages.iter().map(String::as_str));
        let uris: Vec<_> = args.iter().copied().chain(["--print-uris"]).collect();
        let bytes = sizes(&output(&mut self.command("apt-get", &uris))?);
        let step = Step::bytes(what, bytes);
        let child = self
            .command("apt-get", &args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run apt-get")?;
        watch(child, &self.archives, &step)?;
        step.done();
        Ok(())
    }
}

/// What failed, and the cause as far as apt's messages show it; the messages follow.
fn failure(what: &str, said: &str) -> String {
    let said = said.trim();
    if UNREACHABLE.iter().any(|words| said.contains(words)) {
        return format!(
            "packages cannot be fetched: an archive of apt's sources cannot be reached. Is there a \
             network, and does apt know the proxy (http_proxy), if one is needed?\n{said}"
        );
    }
    if said.is_empty() { what.to_owned() } else { format!("{what}\n{said}") }
}

/// In a line of `apt-get install -s`, `Inst NAME (VERSION ...`: what is to be installed.
fn to_install(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let version = rest.strip_prefix('(')?.split_whitespace().next()?;
    Some(format!("{name}={version}"))
}

/// Adds up the sizes in `apt-get --print-uris`: `'URI' FILE SIZE HASH`.
fn sizes(listing: &str) -> u64 {
    listing
        .lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum()
}

/// Shows on `step` how much has arrived until `child` is done.
fn watch(mut child: Child, archives: &Path, step: &Step) -> Result<()> {
    loop {
        step.at(arrived(archives) + arrived(&archives.join("partial")));
        if child.try_wait()?.is_some() {
            let out = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&out.stderr);
            ensure!(out.status.success(), failure("apt-get could not fetch the packages", &said));
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn arrived(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|entry| entry.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|file| file.len())
        .sum()
}

#[cfg(test)]
mod tests;
