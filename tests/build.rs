//! Builds the bare-metal guests of `guest/` with the C compiler that also links Rust programs.
use std::env;
use std::path::PathBuf;
use std::process::Command;

/// One program for each, linked with the shared parts.
const GUESTS: [&str; 15] = [
    "hello",
    "count",
    "split",
    "blk",
    "plug",
    "generation",
    "exits",
    "type",
    "net",
    "fill",
    "flood",
    "clock",
    "ledger",
    "diary",
    "balloon",
];
const SHARED: [&str; 3] = ["start.S", "runtime.c", "virtio.c"];

/// General registers only: some hosts' KVM interprets every instruction.
const FLAGS: &[&str] = &[
    "-m64",
    "-O2",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
];

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-env-changed=CC");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    for guest in GUESTS {
        let mut command = Command::new(&compiler);
        command.current_dir("guest").args(FLAGS).args(["-T", "link.ld"]).args(SHARED);
        if guest == "flood" {
            // As many requests as a disk takes by default.
            command.arg("-DSIZE=256");
        }
        command.arg(format!("{guest}.c")).arg("-o").arg(out.join(format!("{guest}.elf")));
        let done = command.output().map_err(|error| {
            format!(
                "cannot run the C compiler {}: {error}; install one (apt-get install gcc) or name it with CC",
                compiler.display()
            )
        })?;
        if !done.status.success() {
            return Err(format!("{guest}.c:\n{}", String::from_utf8_lossy(&done.stderr)));
        }
    }
    // Not a guest: what makes the host fail.
    let mut command = Command::new(&compiler);
    command.current_dir("guest").args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
    let done = command.arg("fail.c").arg("-o").arg(out.join("fail.so")).output();
    let done = done.map_err(|error| format!("cannot run the C compiler: {error}"))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!("fail.c:\n{}", String::from_utf8_lossy(&done.stderr))),
    }
}
