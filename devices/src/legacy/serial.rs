//! A 16550A serial port, eight ports wide (`vm-superio`'s model).
mod output;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use vm_superio::serial::{SerialEvents, SerialState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::output::Output;
use crate::{
    backend::char::{Char, CharSource},
    bus::BusDevice,
    irq::Line,
    model::Model,
    state::{Snapshot, StateError},
    worker::{IoThread, Worker, WorkerControl, WorkerSlot},
};
use ::state::{device as saved, hex::HexBytes};

type Uart = vm_superio::Serial<Line, Room, Output>;

/// Interrupt enable register, and its bit for received data; while [`LCR_DLAB`] is set, the
/// divisor's upper half is in its place.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;
/// Interrupt identification register: its values for no interrupt and for received data.
const IIR: u8 = 2;
const IIR_NONE: u8 = 1;
const IIR_RECEIVED: u8 = 4;
const LCR: u8 = 3;
const LCR_DLAB: u8 = 0x80;
/// Line status register, and its bit for received data.
const LSR: u8 = 5;
const LSR_READY: u8 = 1;
/// Modem control register, which has the loop-back bit.
const MCR: u64 = 4;
const MCR_LOOP: u8 = 0x10;

/// The port.
///
/// The lock around the UART is needed because two threads change it: a vCPU through the registers,
/// the I/O thread by input. No thread blocks while holding it.
pub struct Serial {
    id: String,
    uart: Arc<Mutex<Uart>>,
    line: Line,
    room: Room,
    output: Output,
    input: WorkerSlot<SerialInput>,
}

/// Notifies the input worker that the guest has read all input.
#[derive(Clone)]
struct Room(Arc<EventFd>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A saturated counter has notified it already.
        let _ = self.0.write(1);
    }
}

impl Serial {
    /// A port connected to `char`; input is read on `thread` from now on.
    ///
    /// # Errors
    /// When the process has no descriptor left or the thread refuses the worker.
    pub fn new(
        id: impl Into<String>,
        line: Line,
        char: Char,
        thread: Arc<dyn IoThread>,
    ) -> io::Result<Self> {
        let room = Room(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        let Char { source, sink, .. } = char;
        let output = Output::new(sink);
        let uart = Uart::with_events(line.clone(), room.clone(), output.clone());
        let uart = Arc::new(Mutex::new(uart));
        let mut input = WorkerSlot::default();
        let worker = SerialInput { source, uart: uart.clone(), room: room.clone() };
        input.start(worker, thread)?;
        Ok(Self { id: id.into(), uart, line, room, output, input })
    }

    /// The port's output.
    pub fn output(&self) -> &Output {
        &self.output
    }

    fn replace(&mut self, state: &SerialState) -> Result<(), StateError> {
        let (line, room) = (self.line.clone(), self.room.clone());
        let uart = Uart::from_state(state, line, room, self.output.clone())
            .map_err(|_| StateError::Invalid("serial input of more bytes than the FIFO has"))?;
        *self.uart.lock() = uart;
        // There may be room for input again.
        self.room.in_buffer_empty();
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut uart = self.uart.lock();
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = u8::try_from(port).map_or(0xff, |port| read(&mut uart, port));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut uart = self.uart.lock();
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            if let Ok(register) = u8::try_from(port) {
                // Neither the line nor the sink can fail, and loop-back drops what does not fit.
                let _ = uart.write(register, *byte);
            }
            if port == MCR {
                // Input is held back during loop-back.
                self.room.in_buffer_empty();
            }
        }
    }
}

/// Read a register. The model clears the interrupt for received data when the first byte is read;
/// in a real port it lasts as long as there is data. A driver that reads a limited number of bytes
/// at a time relies on that, and would leave the remaining bytes unread.
fn read(uart: &mut Uart, port: u8) -> u8 {
    let byte = uart.read(port);
    let announced = |uart: &mut Uart| {
        uart.read(LCR) & LCR_DLAB == 0
            && uart.read(IER) & IER_RECEIVED != 0
            && uart.read(LSR) & LSR_READY != 0
    };
    match port {
        IIR if byte & IIR_NONE != 0 && announced(uart) => byte & !IIR_NONE | IIR_RECEIVED,
        _ => byte,
    }
}

impl Model for Serial {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        Some(&mut self.input)
    }

    fn reset(&mut self) {
        // The default state is a valid one.
        let _ = self.replace(&SerialState::default());
    }
}

impl Snapshot for Serial {
    type State = saved::Serial;

    fn save(&self) -> Result<saved::Serial, StateError> {
        let s = self.uart.lock().state();
        Ok(saved::Serial {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: HexBytes(s.in_buffer),
        })
    }

    fn restore(&mut self, s: saved::Serial) -> Result<(), StateError> {
        self.replace(&SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.input.0,
        })
    }
}

/// Passes input from the back-end to the UART.
struct SerialInput {
    source: CharSource,
    uart: Arc<Mutex<Uart>>,
    room: Room,
}

impl Worker for SerialInput {
    fn sources(&self) -> Vec<RawFd> {
        vec![self.source.as_raw_fd(), self.room.0.as_raw_fd()]
    }

    fn ready(&mut self, _: usize) {
        // Not signalled when the other source fired.
        let _ = self.room.0.read();
        let mut bytes = [0; 64];
        loop {
            let mut uart = self.uart.lock();
            let looped = uart.state().modem_control & MCR_LOOP != 0;
            let room = if looped { 0 } else { uart.fifo_capacity().min(bytes.len()) };
            let n = self.source.read(bytes.get_mut(..room).unwrap_or_default());
            // There is room, and raising the line cannot fail.
            let _ = uart.enqueue_raw_bytes(bytes.get(..n).unwrap_or_default());
            if n == 0 {
                break;
            }
        }
    }

    fn quiesce(&mut self, _: Option<Duration>) -> bool {
        true
    }
}
