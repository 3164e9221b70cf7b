//! The devices that are not virtio: serial port, keyboard controller, clock, power, panic.
use std::{io, sync::Arc};

use config::{CharBackend, MachineConfig};
use devices::{
    PowerSink,
    backend::char::{Char, CharError, CharSink},
    bus::{BusDevice, BusError},
    irq::Line,
    legacy::{
        cmos::Cmos,
        i8042::I8042,
        power::{self, Power},
        pvpanic::Pvpanic,
        serial::Serial,
    },
    worker::IoThread,
};
use kvm_ioctls::IoEventAddress;
use parking_lot::Mutex;

use super::{
    kvm::vcpu::BusesBuilder,
    layout::{
        ACPI_POWER_PORT, CMOS_PORT, GED_IRQ, HOLE_START, I8042_PORT, KEYBOARD_IRQ,
        PCI_ADDRESS_PORT, PVPANIC_PORT, SERIAL_IRQ, SERIAL_PORT,
    },
};
use crate::{
    backing::Backing,
    event::{Callbacks, Event},
    kvm::{KvmError, Vm},
    machine::Shared,
};

/// Why the devices could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// Two devices at one port.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The serial port's back-end.
    #[error("cannot connect the serial port")]
    Char(#[from] CharError),
    /// The process has no descriptors or threads left.
    #[error("cannot create a device")]
    Io(#[from] io::Error),
}

/// All of them. Those that the monitor itself controls keep their own type.
pub struct Legacy {
    all: Vec<Shared>,
    /// The devices' interrupt lines, each with its interrupt.
    lines: Vec<(Line, u32)>,
    serial: Option<Shared>,
    keyboard: Arc<Mutex<I8042>>,
    power: Arc<Mutex<Power>>,
}

impl Legacy {
    /// Build them and attach them to the port bus. The second value is the name of the serial
    /// port's back-end in `query-chardev`.
    pub(crate) fn new(
        config: &MachineConfig,
        buses: &mut BusesBuilder,
        thread: Arc<dyn IoThread>,
        backing: Backing<'_>,
    ) -> Result<(Self, Option<Outside>), LegacyError> {
        let sink: PowerSink = {
            let latch = buses.power.clone();
            Arc::new(move |event| latch.set(event))
        };
        let mut all: Vec<Shared> = Vec::new();
        let mut attach = |port: u16, ports: u64, device: Arc<Mutex<dyn BusDevice>>| {
            buses.pio.attach(u64::from(port), ports, device)
        };
        let mut lines = Vec::new();
        let mut line = |gsi| -> io::Result<Line> {
            let line = Line::new()?;
            lines.push((line.clone(), gsi));
            Ok(line)
        };

        let (mut chardev, mut port) = (None, None);
        if let Some(backend) = &config.serial {
            let char = backing.char(backend)?;
            chardev = Some(Outside::of(&char));
            let serial = Serial::new("serial0", line(SERIAL_IRQ)?, char, thread)?;
            buses.console = Some(serial.output().clone());
            let serial = Arc::new(Mutex::new(serial));
            attach(SERIAL_PORT, 8, serial.clone())?;
            port = Some(serial.clone() as Shared);
            all.push(serial);
        }

        let keyboard = I8042::new("i8042", line(KEYBOARD_IRQ)?, sink.clone());
        let keyboard = Arc::new(Mutex::new(keyboard));
        // Data and command; the ports between them are unused here.
        attach(I8042_PORT, 5, keyboard.clone())?;
        all.push(keyboard.clone());

        let low = config.memory.size.bytes().min(HOLE_START);
        let cmos = Cmos::new("cmos", low, config.memory.size.bytes().saturating_sub(low));
        let cmos = Arc::new(Mutex::new(cmos));
        attach(CMOS_PORT, 2, cmos.clone())?;
        all.push(cmos);

        let power = Arc::new(Mutex::new(Power::new("power", line(GED_IRQ)?, sink.clone())));
        attach(ACPI_POWER_PORT, power::PORTS, power.clone())?;
        all.push(power.clone());

        let pvpanic = Arc::new(Mutex::new(Pvpanic::new("pvpanic", sink)));
        attach(PVPANIC_PORT, 1, pvpanic.clone())?;
        all.push(pvpanic);
        Ok((Self { all, lines, serial: port, keyboard, power }, chardev))
    }

    /// Connect their interrupts to `vm`, which may keep writes that only select what is accessed
    /// next.
    pub(crate) fn bind(&self, vm: &Vm) -> Result<(), KvmError> {
        for (port, ports) in [(CMOS_PORT, 1), (PCI_ADDRESS_PORT, 4)] {
            vm.keep_writes(IoEventAddress::Pio(port.into()), ports)?;
        }
        self.lines.iter().try_for_each(|(line, gsi)| vm.bind_line(line, *gsi))
    }

    /// Undo [`Legacy::bind`].
    pub(crate) fn unbind(&self, vm: &Vm) -> Result<(), KvmError> {
        self.lines.iter().try_for_each(|(line, gsi)| vm.unbind_line(line, *gsi))
    }

    pub(crate) fn devices(&self) -> impl Iterator<Item = Shared> {
        self.all.iter().cloned()
    }

    /// The serial port, if there is one.
    pub(crate) fn serial(&self) -> Option<&Shared> {
        self.serial.as_ref()
    }

    /// Press the ACPI power button.
    pub fn press_power_button(&self) {
        self.power.lock().press_power_button();
    }

    /// Notify the guest that its generation id has changed.
    pub(crate) fn generation_changed(&self) {
        self.power.lock().generation_changed();
    }

    /// Type Ctrl-Alt-Del; false when the guest has not enabled its keyboard.
    pub fn send_ctrl_alt_del(&self) -> bool {
        self.keyboard.lock().send_ctrl_alt_del()
    }
}

/// The back-end side of a serial port or console.
pub(crate) struct Outside {
    /// Its back-end, such as `pty:/dev/pts/3`.
    pub name: String,
    pub sink: CharSink,
}

impl Outside {
    pub(crate) fn of(char: &Char) -> Self {
        Self { name: char.name.clone(), sink: char.sink.clone() }
    }
}

/// Open a character back-end.
pub(crate) fn open(backend: &CharBackend, callbacks: &Callbacks) -> Result<Char, CharError> {
    let Callbacks { report, start, .. } = callbacks;
    match backend {
        CharBackend::Stdio => {
            let report = report.clone();
            Char::stdio(move || report(Event::Escape), start)
        }
        CharBackend::Pty => Char::pty(),
        CharBackend::File(path) => Char::file(path, start),
        CharBackend::Socket { path, replay } => Char::socket(path, *replay as usize),
    }
}
