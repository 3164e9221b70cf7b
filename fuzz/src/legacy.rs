//! A guest that reads and writes the ports of the non-virtio devices in any order, with serial
//! input and button presses, pauses, resets and saved states in between.
use std::{fs::File, io::Write, sync::Arc, time::Duration};

use devices::{
    Device, PowerSink,
    backend::char::Char,
    bus::BusDevice,
    irq::Line,
    legacy::{cmos::Cmos, i8042::I8042, power::Power, pvpanic::Pvpanic, serial::Serial},
    testing::InlineThread,
};

use crate::input::Input;

/// All the devices; some are also kept by themselves.
struct Ports {
    serial: Serial,
    keyboard: I8042,
    cmos: Cmos,
    power: Power,
    panic: Pvpanic,
}

impl Ports {
    fn one(&mut self, number: u8) -> &mut dyn BusDevice {
        match number % 8 {
            0..3 => &mut self.serial,
            3 | 4 => &mut self.keyboard,
            5 => &mut self.cmos,
            6 => &mut self.power,
            _ => &mut self.panic,
        }
    }

    fn device(&mut self, number: u8) -> &mut dyn Device {
        match number % 8 {
            0..3 => &mut self.serial,
            3 | 4 => &mut self.keyboard,
            5 => &mut self.cmos,
            6 => &mut self.power,
            _ => &mut self.panic,
        }
    }
}

/// No input may cause a panic or an unbounded wait.
pub fn entry(input: &[u8]) {
    let mut input = Input(input);
    let sink: PowerSink = Arc::new(|_| {});
    let thread = InlineThread::new();
    let char = Char::pty().unwrap();
    let path = char.name.trim_start_matches("pty:");
    let mut typist = File::options().write(true).open(path).unwrap();
    let line = || Line::new().unwrap();
    let mut ports = Ports {
        serial: Serial::new("serial0", line(), char, thread.clone()).unwrap(),
        keyboard: I8042::new("i8042", line(), sink.clone()),
        cmos: Cmos::new("cmos", 1 << 28, 0),
        power: Power::new("power", line(), sink.clone()),
        panic: Pvpanic::new("pvpanic", sink),
    };
    for _ in 0..300 {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 12 {
            0..5 => {
                let (number, offset, width) = (input.u8(), input.u8() % 9, input.u8() % 4);
                let value = input.bytes::<8>();
                ports.one(number).write(offset.into(), &value[..1 << width]);
            }
            5..8 => {
                let (number, offset, width) = (input.u8(), input.u8() % 9, input.u8() % 4);
                ports.one(number).read(offset.into(), &mut [0; 8][..1 << width]);
            }
            8 => {
                let byte = input.u8();
                let _ = typist.write(&[byte; 64][..usize::from(byte & 63)]);
            }
            9 => match input.u8() % 2 {
                0 => drop(ports.keyboard.send_ctrl_alt_del()),
                _ => ports.power.press_power_button(),
            },
            10 => {
                let device = ports.device(input.u8());
                device.pause();
                let section = device.save().unwrap();
                if let Some(section) = input.change(&section) {
                    let _ = device.restore(&section);
                }
                device.resume();
            }
            _ => {
                let device = ports.device(input.u8());
                device.pause();
                device.reset();
                device.resume();
            }
        }
        // A worker that always has more work would never finish.
        for _ in 0..8 {
            if thread.turn(Duration::ZERO) == 0 {
                break;
            }
        }
    }
}
