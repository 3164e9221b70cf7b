//! A network of a test.
use std::{
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixDatagram,
    },
};

use crate::backend::net::{NetBackend, Offloads, frame::Frame};

/// A network whose frames are datagrams. The test holds the peer socket.
pub struct Wire(pub UnixDatagram);

impl NetBackend for Wire {
    fn queues(&self) -> usize {
        1
    }
    fn fd(&self, _: usize) -> RawFd {
        self.0.as_raw_fd()
    }
    fn has_header(&self) -> bool {
        true
    }
    fn has_uso(&self) -> bool {
        false
    }
    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.fd(queue), spill)
    }
    fn read_buffer(&self, _: usize, into: &mut [u8]) -> io::Result<usize> {
        self.0.recv(into)
    }
    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize> {
        frame.write_to(self.fd(queue))
    }
    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize> {
        self.0.send(frame)
    }
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_active_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}
