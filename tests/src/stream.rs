//! A connection on which both ends send continuously. Each byte encodes its position in the stream,
//! so that a lost, repeated or moved byte is noticed at once. This is the host's end and, as a
//! module of `init/load.rs`, the guest's.
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

/// Bytes sent at a time.
const PIECE: usize = 4096;
/// The pause after a piece, in steps of `load`.
pub const PACE: u32 = 20;

/// The state of one end of a connection.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes that were sent.
    pub sent: AtomicU64,
    /// Bytes that were received, and were right.
    pub received: AtomicU64,
    /// Why it has ended.
    pub ended: OnceLock<String>,
}

/// Sends and receives on `stream`, in two threads, until it ends; sends a piece each `pause`, so
/// that data is always in flight and yet there is time for other work.
///
/// # Errors
/// The connection cannot be used twice.
pub fn exchange(stream: &TcpStream, tally: &Arc<Tally>, pause: Duration) -> io::Result<()> {
    let ends = [send as fn(TcpStream, &Tally, Duration) -> io::Result<()>, receive];
    for end in ends {
        let (stream, tally) = (stream.try_clone()?, Arc::clone(tally));
        thread::spawn(move || {
            let why =
                end(stream, &tally, pause).err().map_or("closed".to_owned(), |e| e.to_string());
            // The first reason counts.
            let _ = tally.ended.set(why);
        });
    }
    Ok(())
}

fn send(mut stream: TcpStream, tally: &Tally, pause: Duration) -> io::Result<()> {
    let mut piece = [0; PIECE];
    loop {
        fill(tally.sent.load(Ordering::Relaxed), &mut piece);
        let sent = stream.write(&piece)?;
        tally.sent.fetch_add(sent as u64, Ordering::Relaxed);
        thread::sleep(pause);
    }
}

fn receive(mut stream: TcpStream, tally: &Tally, _: Duration) -> io::Result<()> {
    let (mut piece, mut wanted) = ([0; PIECE], [0; PIECE]);
    loop {
        let length = stream.read(&mut piece)?;
        if length == 0 {
            return Ok(());
        }
        let at = tally.received.load(Ordering::Relaxed);
        fill(at, &mut wanted);
        if piece.get(..length) != wanted.get(..length) {
            return Err(io::Error::other(format!("WRONG bytes after byte {at}")));
        }
        tally.received.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// The stream's contents from byte `at` on.
fn fill(at: u64, piece: &mut [u8]) {
    for (place, byte) in (at..).zip(piece) {
        // A word's number, in its eight bytes.
        *byte = ((place / 8) >> (place % 8 * 8)) as u8;
    }
}
