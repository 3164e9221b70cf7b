//! Small archives made here replace those of the distributions.
use sha2::{Digest, Sha256};

use super::*;

/// A directory with an archive, its `sources.list`, and what is fetched from it.
struct Archive(PathBuf);

impl Archive {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("packages-{name}.{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("Packages"), "").unwrap();
        let this = Self(fs::canonicalize(dir).unwrap());
        this.sources(&format!("file:{} ./", this.0.display()));
        this
    }

    fn sources(&self, archive: &str) {
        fs::write(self.0.join("sources.list"), format!("deb [trusted=yes] {archive}\n")).unwrap();
    }

    /// Adds a package with one file, whose content is its name.
    fn add(&self, name: &str, depends: &str, file: &str) {
        let (version, root) = ("1:2-3", self.0.join("tree"));
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, name).unwrap();
        fs::create_dir_all(root.join("DEBIAN")).unwrap();
        let mut control = format!("Package: {name}\nVersion: {version}\nArchitecture: amd64\n");
        control += "Maintainer: a test <test@example.org>\nDescription: a test\n";
        if !depends.is_empty() {
            control += &format!("Depends: {depends}\n");
        }
        fs::write(root.join("DEBIAN/control"), &control).unwrap();
        let deb = self.0.join(format!("{name}_2-3_amd64.deb"));
        output(Command::new("dpkg-deb").arg("--build").arg(&root).arg(&deb)).unwrap();
        fs::remove_dir_all(root).unwrap();
        let bytes = fs::read(&deb).unwrap();
        let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let mut index = fs::read_to_string(self.0.join("Packages")).unwrap();
        let deb = deb.file_name().unwrap().display();
        index +=
            &format!("{control}Filename: ./{deb}\nSize: {}\nSHA256: {digest}\n\n", bytes.len());
        fs::write(self.0.join("Packages"), index).unwrap();
    }

    fn add_tools(&self) {
        self.add("qemu-system-x86", "seabios (>= 1)", "usr/bin/qemu-system-x86_64");
        self.add("seabios", "", "usr/share/seabios/bios.bin");
        for tool in TOOLS.iter().filter(|tool| **tool != "qemu-system-x86") {
            self.add(tool, "", &format!("usr/bin/{tool}"));
        }
    }

    fn fetch(&self) -> Result<PathBuf> {
        let home = self.0.join("home");
        fetch(&home, Some(&self.0.join("sources.list")))?;
        Ok(home.join("root"))
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn has(root: &Path, files: &[(&str, &str)]) {
    for (file, package) in files {
        assert_eq!(fs::read_to_string(root.join(file)).unwrap(), *package, "{file}");
    }
}

#[test]
fn debians_kernel_and_tools_come_with_what_they_depend_on() {
    let archive = Archive::new("debian");
    archive.add("linux-image-cloud-amd64", "linux-image-6.1-cloud-amd64 (= 1:2-3)", "doc");
    archive.add("linux-image-6.1-cloud-amd64", "", "boot/vmlinuz-6.1");
    archive.add_tools();
    let root = archive.fetch().unwrap();
    has(
        &root,
        &[
            ("boot/vmlinuz-6.1", "linux-image-6.1-cloud-amd64"),
            ("usr/bin/qemu-system-x86_64", "qemu-system-x86"),
            ("usr/share/seabios/bios.bin", "seabios"),
            ("usr/bin/iproute2", "iproute2"),
        ],
    );
    assert!(!archive.0.join("home/apt").exists(), "nothing of apt's is left");
}

#[test]
fn ubuntus_kernel_has_another_name_and_its_modules_in_other_packages() {
    let archive = Archive::new("ubuntu");
    archive.add("linux-image-virtual", "linux-image-6.8-generic", "doc");
    archive.add("linux-image-6.8-generic", "", "boot/vmlinuz-6.8");
    archive.add("linux-modules-6.8-generic", "", "lib/modules/6.8/tun.ko");
    archive.add("linux-modules-extra-6.8-generic", "", "lib/modules/6.8/extra.ko");
    archive.add_tools();
    let root = archive.fetch().unwrap();
    has(
        &root,
        &[
            ("boot/vmlinuz-6.8", "linux-image-6.8-generic"),
            ("lib/modules/6.8/tun.ko", "linux-modules-6.8-generic"),
            ("lib/modules/6.8/extra.ko", "linux-modules-extra-6.8-generic"),
            ("usr/bin/busybox-static", "busybox-static"),
        ],
    );
}

#[test]
fn sources_without_a_kernel_are_refused_with_what_they_lack() {
    let archive = Archive::new("without");
    archive.add_tools();
    let error = archive.fetch().unwrap_err().to_string();
    assert!(
        error.contains("linux-image-cloud-amd64 (Debian) and no linux-image-virtual"),
        "{error}"
    );
    assert!(!error.contains("network"), "{error}");
}

#[test]
fn sources_without_a_tool_are_refused_with_its_name() {
    let archive = Archive::new("tools");
    archive.add("linux-image-cloud-amd64", "linux-image-6.1-cloud-amd64", "doc");
    archive.add("linux-image-6.1-cloud-amd64", "", "boot/vmlinuz-6.1");
    let error = archive.fetch().unwrap_err().to_string();
    assert!(error.contains("do not have all of qemu-system-x86"), "{error}");
    assert!(error.contains("Unable to locate package"), "{error}");
}

#[test]
fn an_archive_that_cannot_be_reached_is_the_networks_fault_not_the_sources() {
    let archive = Archive::new("unreachable");
    // Nothing listens on the first port.
    archive.sources("http://127.0.0.1:1 ./");
    let error = archive.fetch().unwrap_err().to_string();
    assert!(error.starts_with("packages cannot be fetched"), "{error}");
    assert!(error.contains("network") && error.contains("127.0.0.1"), "{error}");
}

#[test]
fn apt_reports_how_much_there_is_to_fetch() {
    let listing = "Reading package lists...\n'http://x/a.deb' a.deb 1000 SHA256:0\n'http://x/b.deb' b.deb 24 SHA256:0\n";
    assert_eq!(sizes(listing), 1024);
}

#[test]
fn apt_reports_what_it_would_install() {
    let line = "Inst libc6 (2.36-9+deb12u10 Debian:12.11/oldstable [amd64])";
    assert_eq!(to_install(line).as_deref(), Some("libc6=2.36-9+deb12u10"));
    assert_eq!(to_install("Conf libc6 (2.36 Debian [amd64])"), None);
}
