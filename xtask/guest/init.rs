//! Init of the guests that `cargo compare` measures: one static program, no crates. It reports that
//! it runs, measures what its environment (from the kernel's command line) specifies, and prints
//! each figure as a line `bench NAME VALUE` through /dev/kmsg, which reaches the serial port
//! whatever the console is.
//!
//! `bench=` is `init` (nothing more), `busy` (every processor spins), `all` (disk, network, then
//! `busy`), `small` (the same, but of the disk only requests of 4 KiB, one at a time), `scatter`
//! (touches memory, then endlessly writes to pages all over it) or `work` (computes, and says every
//! second how much; once per `period=`, in microseconds, it also writes `pages=` pages all over
//! memory. With `paced=work` the period is the time that so much work takes while nothing disturbs
//! it). `seconds=` is how long each figure is measured.
#![no_main]
#[path = "../../tests/src/init/basics.rs"]
mod basics;

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};
use std::{env, thread};

use basics::{attach, bring_up, until};

unsafe extern "C" {
    fn mmap(
        address: *mut c_void,
        length: usize,
        protection: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

const DISK: &str = "/dev/vda";
/// The address of the server on the host's side of the tap, and this side's address.
const PEER: &str = "10.0.0.1:5001";
const ADDRESS: [u8; 4] = [10, 0, 0, 2];

const O_DIRECT: c_int = 0o40_000;
const SYS_IO_SETUP: c_long = 206;
const SYS_IO_GETEVENTS: c_long = 208;
const SYS_IO_SUBMIT: c_long = 209;
const SYS_FINIT_MODULE: c_long = 313;
const IOCB_CMD_PREAD: u16 = 0;

const PROT_READ_WRITE: c_int = 3;
/// MAP_NORESERVE: the kernel would refuse to reserve nearly all of its memory.
const MAP_PRIVATE_ANONYMOUS_NORESERVE: c_int = 0x4022;
const MADV_NOHUGEPAGE: c_int = 15;

/// The number of pages that `scatter` writes repeatedly, the distance between them, how much memory
/// it touches once, and how often it writes.
const SCATTERED: usize = 2000;
const DISTANCE: usize = 512 << 10;
const TOUCHED: usize = (700 << 20) / SCATTERED;
const PERIOD: Duration = Duration::from_millis(100);

/// The distance between two pages that `work` writes, and the steps of a unit of work: some 10 us.
const APART: usize = 64 << 10;
const UNIT: usize = 5_000;

const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;
const DEPTH: usize = 32;

/// Memory aligned for O_DIRECT.
#[repr(align(4096))]
struct Aligned([u8; LARGE]);

/// `main` rather than Rust's own start, which expects standard input and output to be open.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    // An error here can only be reported; the kernel panics when init ends.
    let _ = fs::create_dir("/dev");
    attach(c"devtmpfs", c"/dev");
    let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") else { return 1 };
    say(&mut log, "init", 1.0);
    if let Err(error) = measure(&mut log) {
        let _ = writeln!(log, "<0>bench failed {error}");
    }
    loop {
        thread::park();
    }
}

fn measure(log: &mut File) -> io::Result<()> {
    let wanted = env::var("bench").unwrap_or_default();
    let seconds = env::var("seconds").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let time = Duration::from_secs_f64(seconds);
    if wanted == "init" {
        return Ok(());
    }
    if wanted == "scatter" {
        return scatter(log);
    }
    if wanted == "work" {
        return work(log);
    }
    if wanted == "all" || wanted == "small" {
        load_modules()?;
        let mut buffer = Box::new(Aligned([0x5a; LARGE]));
        disk(log, time, &mut buffer.0, wanted == "all").map_err(|error| in_step("disk", &error))?;
        network(log, time, &mut buffer.0).map_err(|error| in_step("network", &error))?;
    }
    let processors = thread::available_parallelism()?.get();
    for _ in 1..processors {
        thread::spawn(spin);
    }
    say(log, "busy", processors as f64);
    spin()
}

fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

/// New memory that is not touched yet.
fn area(length: usize) -> io::Result<&'static mut [u8]> {
    // SAFETY: new, private memory; huge pages would touch what lies between the pages, too.
    unsafe {
        let none = std::ptr::null_mut();
        let area = mmap(none, length, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0);
        if area.addr() == usize::MAX {
            return Err(io::Error::last_os_error());
        }
        // A kernel without huge pages refuses, and has none.
        madvise(area, length, MADV_NOHUGEPAGE);
        Ok(std::slice::from_raw_parts_mut(area.cast::<u8>(), length))
    }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Computes, and dirties pages. Prints `work` every second: units of work per second.
fn work(log: &mut File) -> io::Result<()> {
    let pages = number("pages").unwrap_or(0) as usize;
    let period = Duration::from_micros(number("period").unwrap_or(25_000));
    let by_work = env::var("paced").is_ok_and(|paced| paced == "work");
    let area = area(pages.max(1) * APART)?;
    area.chunks_exact_mut(APART).for_each(|part| part[0] = 1);
    let mut random = Random(88_172_645_463_325_252);
    let mut unit = || (0..UNIT).fold(0, |sum, _| sum ^ random.below(u64::MAX));
    // How much the period is worth: the best of some tries, as something may disturb them.
    let tries = (0..20).map(|_| {
        let (began, mut units) = (Instant::now(), 0_u64);
        while began.elapsed() < period {
            std::hint::black_box(unit());
            units += 1;
        }
        units
    });
    let worth = tries.max().unwrap_or(1);
    let (mut began, mut units, mut said) = (Instant::now(), 0_u64, Instant::now());
    let (mut all, mut round) = (0_u64, 0_u64);
    loop {
        round += 1;
        for page in area.chunks_exact_mut(APART).take(pages) {
            page[..8].copy_from_slice(&round.to_le_bytes());
        }
        std::hint::black_box(&mut *area);
        while if by_work { units < worth } else { began.elapsed() < period } {
            std::hint::black_box(unit());
            units += 1;
        }
        all += std::mem::take(&mut units);
        // The next period begins on time, unless this one was too long by far.
        began = if began.elapsed() < 2 * period { began + period } else { Instant::now() };
        let elapsed = said.elapsed();
        if elapsed >= Duration::from_secs(1) {
            say(log, "work", all as f64 / elapsed.as_secs_f64());
            (all, said) = (0, Instant::now());
        }
    }
}

/// Prints `scattered` when all memory is touched and every page has been written once more.
fn scatter(log: &mut File) -> io::Result<()> {
    let area = area(SCATTERED * DISTANCE)?;
    for part in area.chunks_exact_mut(DISTANCE) {
        for page in part[..TOUCHED].chunks_mut(SMALL) {
            page[0] = 1;
        }
    }
    for round in 0_u64.. {
        for page in area.chunks_exact_mut(DISTANCE) {
            page[..8].copy_from_slice(&round.to_le_bytes());
        }
        if round == 1 {
            say(log, "scattered", SCATTERED as f64);
        }
        // Keeps the compiler from leaving out what is never read.
        std::hint::black_box(&mut *area);
        thread::sleep(PERIOD);
    }
    Ok(())
}

fn say(log: &mut File, name: &str, value: f64) {
    // One write is one record.
    let _ = log.write_all(format!("<0>bench {name} {value:.3}\n").as_bytes());
}

fn in_step(step: &str, error: &io::Error) -> io::Error {
    io::Error::other(format!("{step}: {error}"))
}

/// A distribution's kernel has its drivers in modules, which are then beside this program.
fn load_modules() -> io::Result<()> {
    let Ok(order) = fs::read_to_string("/modules/order") else { return Ok(()) };
    for name in order.lines() {
        let module = File::open(format!("/modules/{name}"))?;
        // SAFETY: an open file, an empty string of parameters and no flags.
        if unsafe { syscall(SYS_FINIT_MODULE, module.as_raw_fd(), c"".as_ptr(), 0) } != 0 {
            return Err(in_step(name, &io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn disk(log: &mut File, time: Duration, buffer: &mut [u8; LARGE], all: bool) -> io::Result<()> {
    let disk =
        until(|| OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(DISK))?;
    let size = io::Seek::seek(&mut &disk, io::SeekFrom::End(0))?;
    let large = size / LARGE as u64;
    // Everything is in the host's page cache, and the first requests have been made.
    for block in 0..large.min(32) {
        disk.read_exact_at(buffer, block * LARGE as u64)?;
    }
    if all {
        let rate = repeat(time, |count| {
            disk.read_exact_at(buffer, count % large * LARGE as u64).map(|()| LARGE)
        })?;
        say(log, "seq_read", rate / 1e6);
    }

    let mut random = Random(88_172_645_463_325_252);
    let rate = repeat(time, |_| {
        let at = random.below(size / SMALL as u64) * SMALL as u64;
        disk.read_exact_at(&mut buffer[..SMALL], at).map(|()| 1)
    })?;
    say(log, "rand_read_1", rate);
    if all {
        say(log, "rand_read_32", deep(&disk, size, time, buffer, &mut random)?);
    }

    // The first block stays as it is: some monitors protect it in images of a format not declared.
    let rate = repeat(time, |_| {
        let at = (1 + random.below(size / SMALL as u64 - 1)) * SMALL as u64;
        disk.write_all_at(&buffer[..SMALL], at).map(|()| 1)
    })?;
    say(log, "rand_write_1", rate);
    if !all {
        return Ok(());
    }
    let rate = repeat(time, |count| {
        disk.write_all_at(buffer, (1 + count % (large - 1)) * LARGE as u64).map(|()| LARGE)
    })?;
    say(log, "seq_write", rate / 1e6);
    Ok(())
}

/// Repeats `step` for `time`; returns the sum of its results per second.
fn repeat(time: Duration, mut step: impl FnMut(u64) -> io::Result<usize>) -> io::Result<f64> {
    let started = Instant::now();
    let mut sum = 0;
    for count in 0.. {
        sum += step(count)?;
        let elapsed = started.elapsed();
        if elapsed >= time {
            return Ok(sum as f64 / elapsed.as_secs_f64());
        }
    }
    unreachable!("u64 does not run out")
}

/// Xorshift: cheap, and the same in every guest.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// `struct iocb` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Control {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// Random reads, [`DEPTH`] of them under way at any time; reads per second.
fn deep(
    disk: &File,
    size: u64,
    time: Duration,
    buffer: &mut [u8; LARGE],
    random: &mut Random,
) -> io::Result<f64> {
    let checked = |result: c_long| match result {
        0.. => Ok(result as usize),
        _ => Err(io::Error::last_os_error()),
    };
    let mut context: c_ulong = 0;
    // SAFETY: `context` is what the kernel fills in.
    checked(unsafe { syscall(SYS_IO_SETUP, DEPTH, &raw mut context) })?;
    let mut controls: [Control; DEPTH] = std::array::from_fn(|slot| Control {
        data: slot as u64,
        opcode: IOCB_CMD_PREAD,
        fd: disk.as_raw_fd() as u32,
        buffer: buffer[slot * SMALL..].as_mut_ptr() as u64,
        bytes: SMALL as u64,
        ..Control::default()
    });
    let mut idle: Vec<usize> = (0..DEPTH).collect();
    let mut events = [Event::default(); DEPTH];
    let mut done = 0;
    let started = Instant::now();
    loop {
        let elapsed = started.elapsed();
        if elapsed >= time {
            // What is still under way reads into `buffer`, which outlives it: wait.
            while idle.len() < DEPTH {
                let got = wait(context, &mut events)?;
                idle.extend(std::iter::repeat_n(0, got));
            }
            return Ok(done as f64 / elapsed.as_secs_f64());
        }
        let mut list = Vec::with_capacity(DEPTH);
        for slot in idle.drain(..) {
            controls[slot].offset = (random.below(size / SMALL as u64) * SMALL as u64) as i64;
            list.push(&raw mut controls[slot]);
        }
        let mut from = 0;
        while from < list.len() {
            let rest = &list[from..];
            // SAFETY: every pointer leads to a control block whose buffer is 4 KiB of `buffer` of
            // its own.
            from += checked(unsafe { syscall(SYS_IO_SUBMIT, context, rest.len(), rest.as_ptr()) })?;
        }
        let got = wait(context, &mut events)?;
        for event in &events[..got] {
            if event.result != SMALL as i64 {
                return Err(io::Error::other(format!("a read gave {}", event.result)));
            }
            idle.push(event.data as usize);
        }
        done += got;
    }
}

fn wait(context: c_ulong, events: &mut [Event; DEPTH]) -> io::Result<usize> {
    let none = std::ptr::null::<c_void>();
    // SAFETY: room for as many events as are asked for at most.
    let got =
        unsafe { syscall(SYS_IO_GETEVENTS, context, 1_usize, DEPTH, events.as_mut_ptr(), none) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(got as usize) }
}

fn network(log: &mut File, time: Duration, buffer: &mut [u8; LARGE]) -> io::Result<()> {
    bring_up(ADDRESS)?;

    // Until the peer has read everything.
    let mut peer = connect(b'S')?;
    say(log, "begin", 1.0);
    let started = Instant::now();
    let mut bytes = 0_u64;
    while started.elapsed() < time {
        peer.write_all(&buffer[..64 << 10])?;
        bytes += 64 << 10;
    }
    peer.shutdown(Shutdown::Write)?;
    peer.read_exact(&mut buffer[..1])?;
    say(log, "tcp_out", bytes as f64 * 8.0 / 1e9 / started.elapsed().as_secs_f64());

    let mut peer = connect(b'R')?;
    say(log, "begin", 1.0);
    let rate = repeat(time, |_| match peer.read(&mut buffer[..])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        bytes => Ok(bytes),
    })?;
    drop(peer);
    say(log, "tcp_in", rate * 8.0 / 1e9);

    let mut peer = connect(b'P')?;
    say(log, "begin", 1.0);
    let rate = repeat(time, |_| {
        peer.write_all(&buffer[..64])?;
        peer.read_exact(&mut buffer[..64]).map(|()| 1)
    })?;
    say(log, "tcp_round_trips", rate);
    Ok(())
}

fn connect(task: u8) -> io::Result<TcpStream> {
    let address: SocketAddr = PEER.parse().map_err(io::Error::other)?;
    let mut peer = until(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)))?;
    peer.set_nodelay(true)?;
    peer.write_all(&[task])?;
    Ok(peer)
}
