use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::{Device, state::Section, testing::InlineThread};

const DATA: u64 = 0;
const IER: u64 = super::IER as u64;
const IIR: u64 = super::IIR as u64;
const LSR: u64 = super::LSR as u64;

struct Bench {
    serial: Serial,
    thread: Arc<InlineThread>,
    terminal: UnixStream,
    _dir: TempDir,
}

/// A port with a peer.
fn bench() -> Bench {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("tty");
    let char = Char::socket(&path, 0).unwrap();
    let thread = InlineThread::new();
    let serial = Serial::new("serial0", Line::new().unwrap(), char, thread.clone()).unwrap();
    let terminal = UnixStream::connect(&path).unwrap();
    thread.settle();
    Bench { serial, thread, terminal, _dir: dir }
}

impl Bench {
    fn read(&mut self, port: u64) -> u8 {
        let mut byte = [0];
        self.serial.read(port, &mut byte);
        byte[0]
    }

    fn interrupted(&self) -> bool {
        self.serial.line.eventfd().read().is_ok()
    }

    fn take_input(&mut self) -> Vec<u8> {
        let mut taken = Vec::new();
        loop {
            self.thread.settle();
            while self.read(LSR) & 1 != 0 {
                taken.push(self.read(DATA));
            }
            self.thread.settle();
            if self.read(LSR) & 1 == 0 {
                return taken;
            }
        }
    }
}

#[test]
fn output_arrives_and_input_interrupts() {
    let mut b = bench();
    for byte in b"login: " {
        b.serial.write(DATA, &[*byte]);
    }
    let mut seen = [0; 7];
    b.terminal.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"login: ");
    b.serial.write(IER, &[1]);
    assert!(!b.interrupted());
    b.terminal.write_all(b"root\r").unwrap();
    b.thread.settle();
    assert!(b.interrupted());
    assert_eq!(b.take_input(), b"root\r");
}

#[test]
fn more_input_than_the_fifo_holds_waits_for_room() {
    let mut b = bench();
    let typed: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    b.terminal.write_all(&typed).unwrap();
    assert_eq!(b.take_input(), typed);
}

/// Linux reads at most 256 bytes at a time (`serial8250_rx_chars`), and then checks whether the
/// port still raises the interrupt. Input arrives meanwhile, also while the FIFO is not empty.
#[test]
fn what_a_driver_leaves_in_the_fifo_is_still_announced() {
    const TYPED: usize = 266;
    let mut b = bench();
    b.serial.write(IER, &[1]);
    b.terminal.write_all(&[b'x'; 64]).unwrap();
    b.thread.settle();
    assert!(b.interrupted());
    assert_eq!(b.read(IIR) & 1, 0);
    for taken in 0..256 {
        if taken == 10 {
            b.terminal.write_all(&[b'y'; TYPED - 64]).unwrap();
        }
        b.thread.settle();
        assert_eq!(b.read(LSR) & 1, 1, "{taken}");
        b.read(DATA);
    }
    assert_eq!(b.read(LSR) & 1, 1, "some are left");
    assert_eq!(b.read(IIR) & 0xf, 4, "received data is available");
    assert_eq!(b.take_input().len(), TYPED - 256);
    assert_eq!(b.read(IIR) & 1, 1, "there is nothing more");

    // Not to a driver that has disabled the interrupt.
    b.serial.write(IER, &[0]);
    b.terminal.write_all(b"x").unwrap();
    b.thread.settle();
    assert_eq!(b.read(IIR) & 1, 1);
}

#[test]
fn input_waits_while_the_port_is_looped_back() {
    let mut b = bench();
    b.serial.write(MCR, &[MCR_LOOP]);
    b.terminal.write_all(b"later").unwrap();
    b.thread.settle();
    for byte in 0..100 {
        b.serial.write(DATA, &[byte]);
    }
    assert_eq!(b.take_input(), (0..64).collect::<Vec<_>>(), "only its own output");
    b.serial.write(MCR, &[0]);
    assert_eq!(b.take_input(), b"later");
}

#[test]
fn a_dead_terminal_does_not_hold_the_guest_up() {
    let mut b = bench();
    b.terminal.shutdown(std::net::Shutdown::Read).unwrap();
    for _ in 0..100_000 {
        b.serial.write(DATA, b"x");
    }
    assert_eq!(b.read(LSR) & 0x60, 0x60, "always ready for more");
}

#[test]
fn any_access_of_any_width_is_survived() {
    let mut b = bench();
    for offset in (0..10).chain([255, 256, u64::MAX - 3]) {
        for width in [0, 1, 2, 3, 4, 8] {
            for value in [0, 0xff, 0x83] {
                b.serial.write(offset, &[value; 8][..width]);
                b.serial.read(offset, &mut [0; 8][..width]);
            }
        }
    }
}

#[test]
fn moves_with_its_input_and_pending_interrupt() {
    let mut b = bench();
    b.serial.write(IER, &[3]);
    b.serial.write(7, &[0x5a]);
    b.terminal.write_all(b"half a line").unwrap();
    b.thread.settle();
    b.serial.pause();
    let section = Device::save(&b.serial).unwrap();
    assert_eq!(Device::save(&b.serial).unwrap(), section);
    let mut to = bench();
    Device::restore(&mut to.serial, &section).unwrap();
    assert_eq!(Device::save(&to.serial).unwrap(), section);
    assert!(to.interrupted());
    assert_eq!(to.read(7), 0x5a);
    assert_eq!(to.take_input(), b"half a line");
    to.terminal.write_all(b", and the rest").unwrap();
    assert_eq!(to.take_input(), b", and the rest");
}

#[test]
fn paused_it_takes_no_input() {
    let mut b = bench();
    b.serial.pause();
    b.serial.pause();
    b.terminal.write_all(b"patience").unwrap();
    b.thread.settle();
    assert_eq!(b.read(LSR) & 1, 0);
    b.serial.resume();
    b.serial.resume();
    assert_eq!(b.take_input(), b"patience");
}

#[test]
fn reset_empties_it() {
    let mut b = bench();
    let fresh = Device::save(&b.serial).unwrap();
    b.serial.write(IER, &[1]);
    b.terminal.write_all(b"forgotten").unwrap();
    b.thread.settle();
    Device::reset(&mut b.serial);
    assert_eq!(Device::save(&b.serial).unwrap(), fresh);
}

#[test]
fn hostile_sections_are_refused() {
    let b = bench();
    let mut state = Snapshot::save(&b.serial).unwrap();
    state.input.0 = vec![0; 65];
    let section = Section::of("serial0", &state).unwrap();
    let mut to = bench();
    assert!(Device::restore(&mut to.serial, &section).is_err());
    for json in ["{}", "0", "[1,2]", "null"] {
        let bad = section.with(json).unwrap();
        assert!(Device::restore(&mut to.serial, &bad).is_err());
    }
}

#[test]
fn output_that_is_held_arrives_line_by_line() {
    let mut bench = bench();
    let output = bench.serial.output().clone();
    let arrived = |bench: &mut Bench| {
        bench.terminal.set_nonblocking(true).unwrap();
        let mut bytes = [0; 1024];
        bench.terminal.read(&mut bytes).map_or(Vec::new(), |n| bytes[..n].to_vec())
    };
    let say = |bench: &mut Bench, bytes: &[u8]| {
        bytes.iter().for_each(|byte| bench.serial.write(DATA, &[*byte]));
    };
    say(&mut bench, b"a");
    assert_eq!(arrived(&mut bench), b"a");
    output.hold();
    say(&mut bench, b"bc");
    assert_eq!(arrived(&mut bench), b"");
    say(&mut bench, b"\nd");
    assert_eq!(arrived(&mut bench), b"bc\n");
    output.pass_on();
    assert_eq!(arrived(&mut bench), b"d");
    // Another vCPU holds it, too.
    output.hold();
    say(&mut bench, b"e");
    output.release();
    assert_eq!(arrived(&mut bench), b"e");
    say(&mut bench, &[b'f'; 300]);
    assert_eq!(arrived(&mut bench), [b'f'; 256]);
    output.release();
    assert_eq!(arrived(&mut bench), [b'f'; 44]);
    say(&mut bench, b"g");
    assert_eq!(arrived(&mut bench), b"g");
}
