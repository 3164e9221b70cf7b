//! A back-end whose peer the test holds: datagrams for frames, and injected faults.
use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixDatagram,
    },
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

use crate::backend::net::{HEADER, NetBackend, Offloads, frame::Frame};

/// What the test observes and controls while the device runs.
#[derive(Default)]
pub struct Switches {
    /// Error number of every transfer from now on; 0: none.
    pub fault: AtomicI32,
    pub offloads: AtomicU64,
    pub active: AtomicUsize,
    /// System calls so far.
    pub calls: AtomicUsize,
}

pub struct Wire {
    queues: Vec<UnixDatagram>,
    header: bool,
    switches: Arc<Switches>,
}

impl Wire {
    /// A wire and its peers, all non-blocking.
    pub fn new(queues: usize, header: bool) -> (Self, Vec<UnixDatagram>, Arc<Switches>) {
        let switches = Arc::new(Switches::default());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..queues {
            let (a, b) = UnixDatagram::pair().unwrap();
            a.set_nonblocking(true).unwrap();
            b.set_nonblocking(true).unwrap();
            ours.push(a);
            theirs.push(b);
        }
        (Self { queues: ours, header, switches: switches.clone() }, theirs, switches)
    }

    fn call(&self) -> io::Result<()> {
        self.switches.calls.fetch_add(1, SeqCst);
        match self.switches.fault.load(SeqCst) {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }
}

impl NetBackend for Wire {
    fn queues(&self) -> usize {
        self.queues.len()
    }
    fn fd(&self, queue: usize) -> RawFd {
        self.queues[queue].as_raw_fd()
    }
    fn has_header(&self) -> bool {
        self.header
    }
    fn has_uso(&self) -> bool {
        false
    }
    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize> {
        self.call()?;
        into.read_from(self.fd(queue), spill)
    }
    fn read_buffer(&self, queue: usize, into: &mut [u8]) -> io::Result<usize> {
        self.call()?;
        if self.header {
            return self.queues[queue].recv(into);
        }
        into[..HEADER].fill(0);
        Ok(self.queues[queue].recv(&mut into[HEADER..])? + HEADER)
    }
    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize> {
        self.call()?;
        if !self.header {
            frame.skip(HEADER);
        }
        frame.write_to(self.fd(queue))
    }
    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize> {
        self.call()?;
        self.queues[0].send(if self.header { frame } else { &frame[HEADER..] })
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.switches.offloads.store(offloads.0, SeqCst);
        Ok(())
    }
    fn set_active_queues(&self, queues: usize) -> io::Result<()> {
        self.switches.active.store(queues, SeqCst);
        Ok(())
    }
}
