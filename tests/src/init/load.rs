//! What keeps a guest busy while it is saved: `load FILE PEER PACE`. Every PACE milliseconds it
//! counts. It writes records to FILE and reports each once it is on the disk, reads them back past
//! the page cache, and exchanges a stream with PEER (`10.9.0.1:7000`). It checks everything that it
//! can, and reports every error as WRONG.
//!
//! ```text
//! load: count 120 clock 3500 sent 81920 received 73728    now and then; milliseconds, bytes
//! load: record 17                                         17 and all before it will stay
//! load: connection: REASON
//! load: WRONG ...
//! ```
#[path = "../stream.rs"]
mod stream;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{env, io, thread};

use stream::Tally;

/// Bytes of a record.
const RECORD: usize = 512;
const O_DIRECT: i32 = 0o40_000;

fn main() {
    let args: Vec<_> = env::args().skip(1).collect();
    let [file, peer, pace] = args.as_slice() else {
        eprintln!("usage: load FILE PEER PACE");
        exit(2);
    };
    let Ok(pace) = pace.parse().map(Duration::from_millis) else {
        eprintln!("load: {pace} is not a number of milliseconds");
        exit(2);
    };
    let tally = Arc::new(Tally::default());
    let connected = TcpStream::connect(peer)
        .and_then(|peer| stream::exchange(&peer, &tally, pace * stream::PACE));
    if let Err(error) = connected {
        say(&format!("connection: {error}"));
    }
    let written = Arc::new(AtomicU64::new(0));
    for work in [write as fn(&str, &AtomicU64, Duration) -> io::Result<()>, read] {
        let (file, written) = (file.clone(), Arc::clone(&written));
        thread::spawn(move || {
            if let Err(error) = work(&file, &written, pace * 5) {
                say(&format!("WRONG {file}: {error}"));
            }
        });
    }
    count(&tally, pace);
}

/// Writes one line in one piece, even if other threads write, too.
fn say(what: &str) {
    // Without a console the line is lost.
    let _ = io::stdout().write_all(format!("load: {what}\n").as_bytes());
}

/// Counts step by step, and checks that no clock goes backwards.
fn count(tally: &Tally, pace: Duration) {
    let began = Instant::now();
    let (mut last, mut next_report) = (began, Duration::ZERO);
    let mut ended = false;
    for step in 1_u64.. {
        thread::sleep(pace);
        let now = Instant::now();
        if now < last {
            say(&format!("WRONG the clock went {:?} back at step {step}", last - now));
        }
        last = now;
        if !ended && let Some(why) = tally.ended.get() {
            ended = true;
            say(&format!("connection: {why}"));
        }
        if now - began >= next_report {
            next_report = now - began + pace * 25;
            // The machine's own clock, not this program's.
            let clock = fs::read_to_string("/proc/uptime").unwrap_or_default();
            let clock = clock.split_whitespace().next().unwrap_or("?").replace('.', "");
            let (sent, received) = (&tally.sent, &tally.received);
            let (sent, received) = (sent.load(Ordering::Relaxed), received.load(Ordering::Relaxed));
            say(&format!("count {step} clock {clock}0 sent {sent} received {received}"));
        }
    }
}

fn record(number: u64) -> [u8; RECORD] {
    let mut record = [b'.'; RECORD];
    let text = format!("record {number:>10}");
    for (to, from) in record.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    record[RECORD - 1] = b'\n';
    record
}

fn write(file: &str, written: &AtomicU64, pause: Duration) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).create_new(true).open(file)?;
    for number in 1.. {
        file.write_all(&record(number))?;
        file.sync_all()?;
        say(&format!("record {number}"));
        written.store(number, Ordering::Release);
        thread::sleep(pause);
    }
    Ok(())
}

/// Every record must be on the disk, whatever is in the page cache.
fn read(file: &str, written: &AtomicU64, pause: Duration) -> io::Result<()> {
    #[repr(align(4096))]
    struct Aligned([u8; RECORD]);
    let mut found = Aligned([0; RECORD]);
    while written.load(Ordering::Acquire) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(file)?;
    for step in 0_u64.. {
        let number = step.wrapping_mul(0x9e37_79b9) % written.load(Ordering::Acquire) + 1;
        file.read_exact_at(&mut found.0, (number - 1) * RECORD as u64)?;
        if found.0 != record(number) {
            return Err(io::Error::other(format!("record {number} is missing")));
        }
        thread::sleep(pause);
    }
    Ok(())
}
