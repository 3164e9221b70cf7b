//! The keyboard controller: ports 0x60 (data) and 0x64 (command and status).
//!
//! Just enough of an i8042 with an AT keyboard and no mouse for Linux's drivers to find them
//! without waiting: every command that has an answer is answered at once. It is used for reset and
//! Ctrl-Alt-Del.
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::{
    PowerEvent, PowerSink,
    bus::BusDevice,
    irq::Line,
    model::Model,
    state::{Snapshot, StateError},
    worker::WorkerControl,
};
use ::state::{device as saved, hex::HexBytes};

const DATA: u64 = 0;
/// System control port B, whose speaker and refresh bits some code polls.
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

/// Bytes that a keyboard buffers.
const BUFFER: usize = 16;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;

const CTR_INTERRUPT: u8 = 0x01;
const CTR_SYSTEM: u8 = 0x04;
const CTR_DISABLE: u8 = 0x10;
const CTR_DISABLE_AUX: u8 = 0x20;
const CTR_TRANSLATE: u8 = 0x40;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// Ctrl, Alt and Del pressed and released, in scan code set 1 (translated) and set 2 (raw).
const CTRL_ALT_DEL_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const CTRL_ALT_DEL_2: [u8; 11] = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// Controller and keyboard.
pub struct I8042 {
    id: String,
    line: Line,
    power: PowerSink,
    registers: Registers,
}

struct Registers {
    /// The controller's command byte.
    control: u8,
    /// The controller's answer, which is read before the keyboard's bytes.
    answer: Option<u8>,
    /// A controller command that waits for its parameter on the data port.
    command: Option<u8>,
    /// The last write went to the command port.
    last_was_command: bool,
    keyboard: Keyboard,
}

struct Keyboard {
    sent: VecDeque<u8>,
    /// A keyboard command that waits for its parameter.
    command: Option<u8>,
    scanning: bool,
}

impl Default for Registers {
    fn default() -> Self {
        // As firmware leaves it.
        let control = CTR_INTERRUPT | CTR_SYSTEM | CTR_DISABLE_AUX | CTR_TRANSLATE;
        let keyboard = Keyboard { sent: VecDeque::new(), command: None, scanning: true };
        Self { control, answer: None, command: None, last_was_command: false, keyboard }
    }
}

impl I8042 {
    /// A controller that raises `line` for the keyboard and requests a reset from `power`.
    pub fn new(id: impl Into<String>, line: Line, power: PowerSink) -> Self {
        Self { id: id.into(), line, power, registers: Registers::default() }
    }

    /// Press and release Ctrl-Alt-Del; false when the guest has disabled its keyboard or has not
    /// read earlier keys yet.
    pub fn send_ctrl_alt_del(&mut self) -> bool {
        let r = &mut self.registers;
        let keys: &[u8] =
            if r.control & CTR_TRANSLATE != 0 { &CTRL_ALT_DEL_1 } else { &CTRL_ALT_DEL_2 };
        let heard = r.control & CTR_DISABLE == 0 && r.keyboard.scanning;
        if !heard || r.keyboard.sent.len() + keys.len() > BUFFER {
            return false;
        }
        r.keyboard.sent.extend(keys);
        self.interrupt();
        true
    }

    fn interrupt(&self) {
        let r = &self.registers;
        if r.control & CTR_INTERRUPT != 0 && r.output_full() {
            self.line.trigger();
        }
    }

    fn reset_cpu(&self) {
        (self.power)(PowerEvent::Reset);
    }

    fn write_command(&mut self, command: u8) {
        let r = &mut self.registers;
        r.last_was_command = true;
        r.command = None;
        match command {
            0x20 => r.answer = Some(r.control),
            0x21..=0x3f => r.answer = Some(0),
            0x60..=0x7f | 0xd1..=0xd4 => r.command = Some(command),
            0xa7 => r.control |= CTR_DISABLE_AUX,
            0xa8 => r.control &= !CTR_DISABLE_AUX,
            // No response on the mouse's clock line: there is no mouse.
            0xa9 => r.answer = Some(0x01),
            0xaa => {
                r.control |= CTR_SYSTEM;
                r.answer = Some(0x55);
            }
            0xab | 0xc0 => r.answer = Some(0),
            0xad => r.control |= CTR_DISABLE,
            0xae => r.control &= !CTR_DISABLE,
            // Output port: reset line high, A20 on, output buffer full.
            0xd0 => r.answer = Some(0x03),
            // Pulse output lines low; line 0 is the CPU's reset.
            0xf0..=0xff if command & 1 == 0 => return self.reset_cpu(),
            _ => {}
        }
        self.interrupt();
    }

    fn write_data(&mut self, byte: u8) {
        let r = &mut self.registers;
        r.last_was_command = false;
        match r.command.take() {
            Some(0x60) => r.control = byte,
            Some(0xd1) if byte & 1 == 0 => return self.reset_cpu(),
            // Put the byte into the output buffer, as if from the keyboard. 0xd3 (as if from the
            // mouse) does not set the mouse's status bit, from which drivers see that there is no
            // mouse port.
            Some(0xd2 | 0xd3) => r.answer = Some(byte),
            Some(_) => {}
            None => {
                // Sending to the keyboard enables its clock.
                r.control &= !CTR_DISABLE;
                r.keyboard.receive(byte, r.control & CTR_TRANSLATE != 0);
            }
        }
        self.interrupt();
    }

    fn read_data(&mut self) -> u8 {
        let r = &mut self.registers;
        let byte = r.answer.take().or_else(|| {
            let open = r.control & CTR_DISABLE == 0;
            if open { r.keyboard.sent.pop_front() } else { None }
        });
        // The next byte is another edge.
        self.interrupt();
        byte.unwrap_or(0)
    }
}

impl Registers {
    fn output_full(&self) -> bool {
        let keyboard = self.control & CTR_DISABLE == 0 && !self.keyboard.sent.is_empty();
        self.answer.is_some() || keyboard
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.output_full() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.control & CTR_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }
}

impl Keyboard {
    fn receive(&mut self, byte: u8, translate: bool) {
        // A command discards whatever was being sent.
        self.sent.clear();
        let scan_set: u8 = if translate { 0x41 } else { 0x02 };
        let reply: &[u8] = match (self.command.take(), byte) {
            (Some(0xf0), 0) => &[ACK, scan_set],
            (Some(_), _) => &[ACK],
            (None, 0xed | 0xf0 | 0xf3) => {
                self.command = Some(byte);
                &[ACK]
            }
            (None, 0xee) => &[0xee],
            (None, 0xf2) if translate => &[ACK, 0xab, 0x41],
            (None, 0xf2) => &[ACK, 0xab, 0x83],
            (None, 0xf4..=0xf6) => {
                self.scanning = byte != 0xf5;
                &[ACK]
            }
            (None, 0xff) => {
                self.scanning = true;
                // Acknowledged, and the self-test passes.
                &[ACK, 0xaa]
            }
            (None, _) => &[RESEND],
        };
        self.sent.extend(reply);
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = match port {
                DATA => self.read_data(),
                // The timer's output is high: code that uses it for timing ends at once.
                PORT_B => 0x20,
                COMMAND => self.registers.status(),
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            match port {
                DATA => self.write_data(*byte),
                COMMAND => self.write_command(*byte),
                _ => {}
            }
        }
    }
}

impl Model for I8042 {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        None
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
    }
}

impl Snapshot for I8042 {
    type State = saved::I8042;

    fn save(&self) -> Result<saved::I8042, StateError> {
        let r = &self.registers;
        Ok(saved::I8042 {
            control: r.control,
            answer: r.answer,
            command: r.command,
            last_was_command: r.last_was_command,
            sent: HexBytes(r.keyboard.sent.iter().copied().collect()),
            keyboard_command: r.keyboard.command,
            scanning: r.keyboard.scanning,
        })
    }

    fn restore(&mut self, s: saved::I8042) -> Result<(), StateError> {
        if s.sent.0.len() > BUFFER {
            return Err(StateError::Invalid("more bytes than a keyboard buffers"));
        }
        let saved::I8042 { control, answer, command, last_was_command, .. } = s;
        let keyboard =
            Keyboard { sent: s.sent.0.into(), command: s.keyboard_command, scanning: s.scanning };
        self.registers = Registers { control, answer, command, last_was_command, keyboard };
        // The edge may have been lost across the save; a spurious one is harmless.
        self.interrupt();
        Ok(())
    }
}
