//! An Ethernet switch in user space. Each port is a tap in a network namespace, and each direction
//! of each port's link is a [`Line`] of its own, which a test changes at run time. It learns
//! addresses as a real one does, so a host that moves has to announce itself.
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, PipeWriter, Read, Write, pipe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::line::{Counts, Impairment, Line};

/// Longest frame: taps without offloads pass none that is longer than the MTU, which is 65,535 at
/// most.
const LONGEST: usize = 1 << 16;
/// Frames taken from one port before the others have their turn.
const BATCH: usize = 64;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A direction of a port's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the host to the switch.
    Up,
    /// From the switch to the host.
    Down,
}

/// A running switch; ended when dropped, and its taps are gone then.
pub struct Switch {
    shared: Arc<Mutex<Shared>>,
    /// Closing it ends the thread.
    alive: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Up and down, by port.
    lines: Vec<[Line; 2]>,
    /// The port where each address was last seen.
    learnt: HashMap<Mac, usize>,
}

impl Shared {
    fn line(&mut self, port: usize, direction: Direction) -> Option<&mut Line> {
        self.lines.get_mut(port)?.get_mut(direction as usize)
    }
}

impl Switch {
    /// Joins `taps`, which do not block. Their order numbers the ports; `seed` determines what is
    /// random.
    ///
    /// # Errors
    /// No more descriptors or threads.
    pub fn new(taps: Vec<File>, seed: u64) -> Result<Self> {
        let now = Instant::now();
        let seeds = (0..).step_by(2).map(|number| seed.wrapping_add(number)).take(taps.len());
        let lines = seeds.map(|seed| [Line::new(now, seed), Line::new(now, !seed)]).collect();
        let shared = Arc::new(Mutex::new(Shared { lines, learnt: HashMap::new() }));
        let (end, alive) = pipe()?;
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name("switch".to_owned()).spawn(move || {
            let mut work = Work { taps, shared: &theirs, under_way: BinaryHeap::new(), count: 0 };
            if let Err(error) = work.run(&end) {
                eprintln!("the switch has failed: {error:#}");
            }
        })?;
        Ok(Self { shared, alive: Some(alive), thread: Some(thread) })
    }

    /// Changes one direction of a port's link, from now on.
    ///
    /// # Errors
    /// There is no such port.
    pub fn set(&self, port: usize, direction: Direction, impairment: Impairment) -> Result<()> {
        let mut shared = lock(&self.shared);
        shared.line(port, direction).with_context(|| format!("no port {port}"))?.set(impairment);
        Ok(())
    }

    /// Changes both directions of a port's link.
    ///
    /// # Errors
    /// There is no such port.
    pub fn set_both(&self, port: usize, impairment: Impairment) -> Result<()> {
        self.set(port, Direction::Up, impairment)?;
        self.set(port, Direction::Down, impairment)
    }

    /// What has become of the frames of one direction of a port's link.
    ///
    /// # Errors
    /// There is no such port.
    pub fn counts(&self, port: usize, direction: Direction) -> Result<Counts> {
        let mut shared = lock(&self.shared);
        Ok(shared.line(port, direction).with_context(|| format!("no port {port}"))?.counts())
    }

    /// The port where that address was last seen, if it has sent anything.
    #[must_use]
    pub fn port_of(&self, mac: Mac) -> Option<usize> {
        lock(&self.shared).learnt.get(&mac).copied()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        drop(self.alive.take());
        // What it says about its failure it has printed.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A frame on a line, ordered by its arrival; the number keeps the order of those that arrive at
/// the same time.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    due: Instant,
    number: u64,
    port: usize,
    is_up: bool,
    frame: Arc<[u8]>,
}

/// What the switch's thread works on.
struct Work<'a> {
    taps: Vec<File>,
    shared: &'a Mutex<Shared>,
    under_way: BinaryHeap<Reverse<UnderWay>>,
    count: u64,
}

impl Work<'_> {
    fn run(&mut self, end: &std::io::PipeReader) -> Result<()> {
        let mut buffer = vec![0; LONGEST];
        loop {
            self.deliver();
            let next = self.under_way.peek().map(|Reverse(first)| {
                let left = first.due.saturating_duration_since(Instant::now());
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
            });
            let mut ready = vec![PollFd::new(end, PollFlags::IN)];
            ready.extend(self.taps.iter().map(|tap| PollFd::new(tap, PollFlags::IN)));
            match poll(&mut ready, next.as_ref()) {
                Err(Errno::INTR) => continue,
                other => other.context("cannot wait for frames")?,
            };
            let events: Vec<bool> = ready.iter().map(|fd| !fd.revents().is_empty()).collect();
            let Some((false, ports)) = events.split_first() else { return Ok(()) };
            for (port, _) in ports.iter().enumerate().filter(|(_, ready)| **ready) {
                self.take(port, &mut buffer)?;
            }
        }
    }

    /// Takes what a host has sent.
    fn take(&mut self, port: usize, buffer: &mut [u8]) -> Result<()> {
        for _ in 0..BATCH {
            let Some(mut tap) = self.taps.get(port) else { return Ok(()) };
            let length = match tap.read(buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).with_context(|| format!("port {port}")),
            };
            let frame = buffer.get(..length).unwrap_or_default().into();
            self.send(port, Direction::Up, Instant::now(), frame);
        }
        Ok(())
    }

    fn send(&mut self, port: usize, direction: Direction, now: Instant, frame: Arc<[u8]>) {
        let mut shared = lock(self.shared);
        let due = shared.line(port, direction).and_then(|line| line.send(now, frame.len()));
        if let Some(due) = due {
            self.count += 1;
            let is_up = direction == Direction::Up;
            let under_way = UnderWay { due, number: self.count, port, is_up, frame };
            self.under_way.push(Reverse(under_way));
        }
    }

    /// Delivers everything that is due, and what becomes due by that.
    fn deliver(&mut self) {
        let now = Instant::now();
        while self.under_way.peek().is_some_and(|Reverse(first)| first.due <= now) {
            let Some(Reverse(UnderWay { due, port, is_up, frame, .. })) = self.under_way.pop()
            else {
                return;
            };
            let direction = if is_up { Direction::Up } else { Direction::Down };
            let mut shared = lock(self.shared);
            let line = shared.line(port, direction);
            if !line.is_some_and(|line| line.arrives(frame.len())) {
                continue;
            }
            if is_up {
                let to = switch(&mut shared, port, &frame);
                drop(shared);
                for port in to {
                    self.send(port, Direction::Down, due, Arc::clone(&frame));
                }
            } else if let Some(mut tap) = self.taps.get(port) {
                drop(shared);
                // A host whose interface is down does not receive.
                let _ = tap.write(&frame);
            }
        }
    }
}

/// Learns where the sender of a frame is; returns the ports that the frame goes to.
fn switch(shared: &mut Shared, from: usize, frame: &[u8]) -> Vec<usize> {
    let address = |at: usize| frame.get(at..at + 6).and_then(|mac| Mac::try_from(mac).ok());
    let is_group = |mac: &Mac| mac.first().is_some_and(|byte| byte & 1 == 1);
    let (Some(destination), Some(source)) = (address(0), address(6)) else { return Vec::new() };
    if !is_group(&source) {
        shared.learnt.insert(source, from);
    }
    match shared.learnt.get(&destination).filter(|_| !is_group(&destination)) {
        Some(&port) if port == from => Vec::new(),
        Some(&port) => vec![port],
        None => (0..shared.lines.len()).filter(|port| *port != from).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALPHA: Mac = [2, 0, 0, 0, 0, 1];
    const BETA: Mac = [2, 0, 0, 0, 0, 2];

    fn frame(to: Mac, from: Mac) -> Vec<u8> {
        [&to[..], &from[..], &[8, 0]].concat()
    }

    #[test]
    fn addresses_are_learnt_and_move() {
        let now = Instant::now();
        let lines = (0..3).map(|seed| [Line::new(now, seed), Line::new(now, seed)]).collect();
        let mut shared = Shared { lines, learnt: HashMap::new() };
        assert_eq!(switch(&mut shared, 0, &frame(BETA, ALPHA)), [1, 2], "not known yet");
        assert_eq!(switch(&mut shared, 1, &frame(ALPHA, BETA)), [0]);
        assert_eq!(switch(&mut shared, 0, &frame([0xff; 6], ALPHA)), [1, 2], "a broadcast");
        assert_eq!(switch(&mut shared, 2, &frame([0xff; 6], ALPHA)), [0, 1], "it has moved");
        assert_eq!(switch(&mut shared, 1, &frame(ALPHA, BETA)), [2]);
        assert!(switch(&mut shared, 2, &frame(ALPHA, ALPHA)).is_empty(), "it is there");
        assert!(switch(&mut shared, 2, &[0; 11]).is_empty(), "no frame");
    }
}
