//! Init of the replicated guest: one static program, no crates. Everything that it knows is in its
//! memory, so that a lost or doubled piece of it shows. It serves requests on TCP port 7000 of
//! 10.9.0.2, one a line and each answered by one line:
//!
//! ```text
//! next WORD                 NUMBER HASH                the next number, and the hash over all that were given
//! write PAGES BYTES MS      ok                         from now on writes BYTES of each of PAGES pages every MS
//!                                                      milliseconds, round after round; with 0 pages, nothing
//! memory                    ROUND PAGES BYTES SUM      the checksum of these pages, between two rounds
//! record                    NUMBER                     after the next record is on the disk and flushed
//! records                   NUMBER                     after all records were read back from the disk
//! uptime                    MILLISECONDS               of its monotonic clock
//! free                      KIBIBYTES                  that its kernel could still give
//! reboot, poweroff          ok                         and does so a moment later
//! anything else             error: ...
//! ```
//!
//! On UDP port 7000 it sends every datagram back.
#![no_main]
mod basics;
#[path = "../counted.rs"]
mod counted;

use std::ffi::{c_int, c_long};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use basics::{attach, bring_up};
use counted::{FIRST_HASH, PAGE, checksum, fill, hash, record};

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(how: c_int) -> c_int;
}

const DISK: &str = "/dev/vda";
const ADDRESS: [u8; 4] = [10, 9, 0, 2];
const PORT: u16 = 7000;

const O_DIRECT: c_int = 0o40_000;
const RB_AUTOBOOT: c_int = 0x0123_4567;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const SYS_FINIT_MODULE: c_long = 313;

/// Everything that the guest knows.
static COUNTER: Mutex<(u64, u64)> = Mutex::new((0, FIRST_HASH));
static AREA: Mutex<Area> = Mutex::new(Area::NONE);
static AREA_CHANGED: Condvar = Condvar::new();
/// How many records there are.
static RECORDS: Mutex<u64> = Mutex::new(0);

/// A page, and memory for O_DIRECT.
#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; PAGE]);

/// Records that are read back at once.
const AT_ONCE: usize = 64;

/// As [`Page`], for so many.
#[repr(align(4096))]
struct Pages([u8; AT_ONCE * PAGE]);

/// The memory that is written again and again.
struct Area {
    pages: Vec<Page>,
    bytes: usize,
    period: Duration,
    round: u64,
    /// Tells a thread that waits for the next round that it is another area.
    number: u64,
}

impl Area {
    const NONE: Self =
        Self { pages: Vec::new(), bytes: 0, period: Duration::ZERO, round: 0, number: 0 };
}

/// `main` rather than Rust's own start, which expects standard input and output to be open.
#[unsafe(no_mangle)]
extern "C" fn main() -> c_int {
    // An error here can only be reported; the kernel panics when init ends.
    let _ = fs::create_dir("/dev");
    let _ = fs::create_dir("/proc");
    attach(c"devtmpfs", c"/dev");
    attach(c"proc", c"/proc");
    let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") else { return 1 };
    if let Err(error) = serve(&mut log) {
        // One write is one record; <0> is shown whatever the log level is.
        let _ = log.write_all(format!("<0>guest: failed: {error}\n").as_bytes());
    }
    loop {
        thread::park();
    }
}

fn serve(log: &mut File) -> io::Result<()> {
    load_modules();
    // What is lost at a failover is sent again soon, so that a client sees how long the failover
    // takes and not TCP's timer. Kernels before 6.11 do not have it.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_rto_min_us", "10000");
    bring_up(ADDRESS)?;
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    let datagrams = UdpSocket::bind(("0.0.0.0", PORT))?;
    thread::spawn(move || drop(send_back(&datagrams)));
    thread::spawn(write_rounds);
    log.write_all(b"<0>guest: ready\n")?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || drop(answer(&stream)));
    }
    Ok(())
}

/// Sends every datagram back.
fn send_back(socket: &UdpSocket) -> io::Result<()> {
    let mut datagram = [0; 64];
    loop {
        let (length, from) = socket.recv_from(&mut datagram)?;
        // A client that has gone meanwhile misses it.
        let _ = socket.send_to(&datagram[..length], from);
    }
}

/// Answers one client, until it hangs up.
fn answer(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        let answer = carry_out(&words).unwrap_or_else(|error| format!("error: {error}"));
        let mut to = stream;
        to.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

fn carry_out(words: &[&str]) -> io::Result<String> {
    match *words {
        ["next", word] => {
            let mut counter = lock(&COUNTER);
            counter.0 += 1;
            counter.1 = hash(counter.1, counter.0, word);
            Ok(format!("{} {:016x}", counter.0, counter.1))
        }
        ["write", pages, bytes, ms] => {
            let (pages, bytes, ms) = (number(pages)?, number(bytes)?, number(ms)?);
            let mut area = lock(&AREA);
            // In the same place each time: freed and allocated again and again, it would leave holes
            // that fill the memory.
            area.pages.clear();
            area.pages.resize(pages as usize, Page([0; PAGE]));
            (area.number, area.round) = (area.number + 1, 0);
            area.bytes = (bytes as usize).min(PAGE);
            area.period = Duration::from_millis(ms);
            AREA_CHANGED.notify_all();
            Ok("ok".to_owned())
        }
        ["memory"] => {
            let area = lock(&AREA);
            let sum = area.pages.iter().fold(FIRST_HASH, |sum, page| checksum(sum, &page.0));
            Ok(format!("{} {} {} {sum:016x}", area.round, area.pages.len(), area.bytes))
        }
        ["record"] => {
            let mut records = lock(&RECORDS);
            let mut block = Page([0; PAGE]);
            record(*records + 1, &mut block.0);
            let disk = disk()?;
            disk.write_all_at(&block.0, *records * PAGE as u64)?;
            disk.sync_all()?;
            *records += 1;
            Ok(records.to_string())
        }
        ["records"] => {
            let records = lock(&RECORDS);
            let disk = disk()?;
            let (mut found, mut wanted) = (Box::new(Pages([0; AT_ONCE * PAGE])), [0; PAGE]);
            for first in (1..=*records).step_by(AT_ONCE) {
                let count = (*records + 1 - first).min(AT_ONCE as u64) as usize;
                let found = &mut found.0[..count * PAGE];
                disk.read_exact_at(found, (first - 1) * PAGE as u64)?;
                for (number, found) in (first..).zip(found.chunks_exact(PAGE)) {
                    record(number, &mut wanted);
                    if found != wanted {
                        return Err(io::Error::other(format!("record {number} is not on the disk")));
                    }
                }
            }
            Ok(records.to_string())
        }
        ["uptime"] => {
            let uptime = fs::read_to_string("/proc/uptime")?;
            // Seconds with two decimals.
            let first = uptime.split(' ').next().unwrap_or_default();
            Ok(format!("{}0", first.replace('.', "").trim_start_matches('0')))
        }
        ["free"] => {
            let known = fs::read_to_string("/proc/meminfo")?;
            let line = known.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
            let words = line.map(str::trim).and_then(|line| line.strip_suffix(" kB"));
            words.map(str::to_owned).ok_or_else(|| io::Error::other("no MemAvailable"))
        }
        ["reboot"] => Ok(end_soon(RB_AUTOBOOT)),
        ["poweroff"] => Ok(end_soon(RB_POWER_OFF)),
        _ => Err(io::Error::other("no such request")),
    }
}

/// Ends the guest once the answer has left it.
fn end_soon(how: c_int) -> String {
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        // SAFETY: it takes a number. Without the right to it, it fails, which a test notices.
        unsafe { reboot(how) };
    });
    "ok".to_owned()
}

/// Writes the area, round after round, never two rounds at the same time as a request reads it.
fn write_rounds() {
    let mut area = lock(&AREA);
    loop {
        if area.pages.is_empty() {
            area = AREA_CHANGED.wait(area).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let began = Instant::now();
        area.round += 1;
        let Area { round, bytes, period, number, .. } = *area;
        for (page, place) in (0..).zip(&mut area.pages) {
            fill(&mut place.0, round, page, bytes);
        }
        // Without the lock meanwhile; a new area ends the wait.
        loop {
            let left = period.saturating_sub(began.elapsed());
            area = AREA_CHANGED
                .wait_timeout(area, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(area, _)| area);
            if area.number != number || began.elapsed() >= period {
                break;
            }
        }
    }
}

fn disk() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(DISK)
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::Error::other(format!("{text} is not a number")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the drivers that Debian's kernel has in modules. Another kernel refuses them, and has its
/// own: what is missing shows when it is used.
fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for module in order.lines().flat_map(|name| File::open(format!("/modules/{name}"))) {
        // SAFETY: an open file, an empty string of parameters and no flags.
        unsafe { syscall(SYS_FINIT_MODULE, module.as_raw_fd(), c"".as_ptr(), 0) };
    }
}
