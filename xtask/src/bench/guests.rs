//! The guests that the monitors boot: a program of a few instructions, and Linux with an init that
//! measures.
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};

use stories::archive::Cpio;
use stories::debian::Debian;
use stories::guest::static_program;
use stories::kernel;

/// The byte that the payload writes: it is not in the output of any monitor.
pub const FIRST_BYTE: u8 = 0xa5;
/// The host's side of the tap.
pub const HOST_ADDRESS: &str = "10.0.0.1/24";
/// The address of the guest's peer.
const PEER_PORT: u16 = 5001;
/// The modules that a distribution's kernel needs for disks and NICs on either bus.
const MODULES: &[&str] = &["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net"];
/// Source of that init.
const INIT: &str = "xtask/guest/init.rs";

/// Where the payload is loaded and entered.
const PAYLOAD_ADDRESS: u32 = 0x100_0000;
/// `mov dx, 0x3f8; mov al, FIRST_BYTE; out dx, al; hlt; jmp` back to the `hlt`: the same in 32-bit
/// and 64-bit mode, so that it does not matter how a monitor enters it.
const PAYLOAD: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, FIRST_BYTE, 0xee, 0xf4, 0xeb, 0xfd];

/// Bytes that [`talker_elf`] fills.
pub const FILL: u32 = 64 << 20;
/// Where it fills them.
const FILLED: u32 = 0x200_0000;
/// Fills memory: `mov edi, FILLED; mov ecx, FILL / 4; mov eax, 0x5a5a5a5a; cld; rep stosd`. It is
/// also the same in both modes.
const FILLING: [u8; 18] = {
    let ([a, b, c, d], [e, f, g, h]) = (FILLED.to_le_bytes(), (FILL / 4).to_le_bytes());
    [0xbf, a, b, c, d, 0xb9, e, f, g, h, 0xb8, 0x5a, 0x5a, 0x5a, 0x5a, 0xfc, 0xf3, 0xab]
};
/// Writes [`FIRST_BYTE`] repeatedly, 65,536 ticks of the TSC apart, which is some 20 us: in a loop,
/// `mov dx, 0x3f8; mov al, FIRST_BYTE; out dx, al; rdtsc; mov esi, eax`, and until it is time
/// `rdtsc; sub eax, esi; cmp eax, 65536; jb` back to this `rdtsc`. It is also the same in both
/// modes.
///
/// A number of iterations would take milliseconds on a KVM that emulates 32-bit code. A restored
/// guest continues at an instruction that depends on when it was saved, and the time from there to
/// its next byte is measured as part of the restore.
const TALKING: [u8; 24] = [
    0x66, 0xba, 0xf8, 0x03, 0xb0, FIRST_BYTE, 0xee, 0x0f, 0x31, 0x89, 0xc6, 0x0f, 0x31, 0x29, 0xf0,
    0x3d, 0, 0, 1, 0, 0x72, 0xf5, 0xeb, 0xe8,
];

/// Guest memory that the payload touches, KiB: the page that it is in.
pub const TOUCHED_KIB: u64 = 4;

/// The guest that [`super::snapshots`] saves and restores, as [`payload_elf`].
#[must_use]
pub fn talker_elf() -> Vec<u8> {
    elf(&[&FILLING[..], &TALKING].concat())
}

/// The same without the memory that it fills.
#[must_use]
pub fn small_talker_elf() -> Vec<u8> {
    elf(&TALKING)
}

/// The payload as an ELF file with a 64-bit entry and Xen's note for PVH's 32-bit one.
#[must_use]
pub fn payload_elf() -> Vec<u8> {
    elf(&PAYLOAD)
}

fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const NOTE: u64 = HEADER + 2 * PROGRAM_HEADER;
    const NOTE_SIZE: u64 = 20;
    const CODE: u64 = 0x1000;
    let address = u64::from(PAYLOAD_ADDRESS);
    let size = code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC for x86-64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [address, HEADER, 0] {
        file.extend(field.to_le_bytes());
    }
    for field in [0_u16, 0, HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // Type and flags; offset, virtual and physical address, size in file and memory, alignment.
    let mut program_header = |kind: u32, flags: u32, fields: [u64; 6]| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        fields.iter().for_each(|field| file.extend(field.to_le_bytes()));
    };
    program_header(1, 5, [CODE, address, address, size, size, 0x1000]);
    program_header(4, 4, [NOTE, 0, 0, NOTE_SIZE, NOTE_SIZE, 4]);
    for field in [4_u32, 4, 18] {
        file.extend(field.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(PAYLOAD_ADDRESS.to_le_bytes());
    file.resize(CODE as usize, 0);
    file.extend(code);
    file
}

/// Builds the init and an initramfs with it into `dir`: bare, and with the modules of Debian's
/// kernel. Returns the paths in this order.
///
/// # Errors
/// rustc fails, or Debian's kernel lacks a module.
pub fn make_initramfs(debian: &Debian, dir: &Path) -> Result<[PathBuf; 2]> {
    let init = dir.join("init");
    static_program(INIT, &init)?;
    let init = fs::read(&init)?;
    let paths = ["bare.cpio", "modules.cpio"].map(|name| dir.join(name));
    let [bare, with_modules] = &paths;
    for path in &paths {
        let mut cpio = Cpio::new(Vec::new());
        cpio.program("init", &init)?;
        if path == with_modules {
            cpio.directory("modules")?;
            let mut order = String::new();
            for module in kernel::modules(&debian.modules()?, MODULES)? {
                cpio.file(&format!("modules/{}", module.file), &module.content)?;
                order.push_str(&module.file);
                order.push('\n');
            }
            cpio.file("modules/order", order.as_bytes())?;
        }
        fs::write(path, cpio.finish()?)
            .with_context(|| format!("cannot write {}", bare.display()))?;
    }
    Ok(paths)
}

/// Serves the guests' network measurements for as long as this process lives: reads everything,
/// writes endlessly, or echoes, depending on the first byte.
///
/// # Errors
/// The port is taken.
pub fn serve_peer() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PEER_PORT))
        .with_context(|| format!("cannot listen on TCP port {PEER_PORT}"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // The guest notices errors at its own end.
            thread::spawn(move || drop(serve(stream)));
        }
    });
    Ok(())
}

fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 256 << 10];
    let mut task = [0];
    stream.read_exact(&mut task)?;
    match task {
        [b'S'] => {
            while stream.read(&mut buffer)? > 0 {}
            stream.write_all(&task)?;
        }
        [b'R'] => loop {
            stream.write_all(&buffer)?;
        },
        _ => loop {
            let bytes = stream.read(&mut buffer)?;
            let Some(message @ [_, ..]) = buffer.get(..bytes) else { break };
            stream.write_all(message)?;
        },
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn the_payload_has_one_entry_for_either_protocol() {
        let elf = payload_elf();
        assert_eq!(elf[24..32], u64::from(PAYLOAD_ADDRESS).to_le_bytes());
        let flat = kernel::flat(&elf).unwrap();
        assert_eq!(flat, PAYLOAD);
        // Its entry is at its beginning, so no jump is needed. An entry 8 bytes further needs one.
        assert_eq!(kernel::flat_entered_at_start(&elf).unwrap(), PAYLOAD);
        let mut later = elf.clone();
        later[24] += 8;
        let jump = [0xe9, 3, 0, 0, 0];
        assert_eq!(kernel::flat_entered_at_start(&later).unwrap()[..5], jump);
        assert_eq!(kernel::flat_entered_at_start(&later).unwrap()[5..], PAYLOAD[5..]);
        let note = [4_u32.to_le_bytes(), 4_u32.to_le_bytes(), 18_u32.to_le_bytes(), *b"Xen\0"];
        let note = [note.concat(), PAYLOAD_ADDRESS.to_le_bytes().to_vec()].concat();
        assert_eq!(elf[64 + 2 * 56..][..20], note);
    }

    #[test]
    fn the_init_is_one_static_program() {
        let init = env::temp_dir().join(format!("init.{}", std::process::id()));
        static_program(INIT, &init).unwrap();
        let elf = fs::read(&init).unwrap();
        fs::remove_file(&init).unwrap();
        // An executable at fixed addresses, without the name of a dynamic linker.
        assert_eq!(elf[16..18], 2_u16.to_le_bytes());
        assert!(!elf.windows(9).any(|bytes| bytes == b"/lib64/ld"));
    }

    #[test]
    fn the_peer_reads_to_the_end_and_echoes() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || drop(serve(stream)));
            }
        });
        let mut sink = TcpStream::connect(address).unwrap();
        sink.write_all(b"Ssome bytes").unwrap();
        sink.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        sink.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"S");

        let mut echo = TcpStream::connect(address).unwrap();
        echo.write_all(b"P").unwrap();
        for message in [[1; 64], [2; 64]] {
            echo.write_all(&message).unwrap();
            let mut back = [0; 64];
            echo.read_exact(&mut back).unwrap();
            assert_eq!(back, message);
        }
    }
}
