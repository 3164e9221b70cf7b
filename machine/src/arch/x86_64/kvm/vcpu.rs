//! A KVM vCPU: enters the guest and forwards its port and memory-mapped accesses to the buses.
use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Instant,
};

use devices::{
    PowerEvent,
    bus::{Bus, BusBuilder},
    legacy::serial::Output,
};
use kvm_bindings::kvm_device_attr;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use parking_lot::Mutex;

use super::{
    bursts::Bursts,
    clock::guest_tsc_is_its_own,
    state::{self, VcpuState, guest_ticks},
};
use crate::{
    arch::layout::SERIAL_PORT,
    kvm::{KvmError, Vm, coalesced::Ring},
    vcpu::{
        Cpu, Exit, Stopped,
        kick::{self, Kicked, Kicker},
    },
};

/// The ports of the serial port.
const SERIAL: Range<u16> = SERIAL_PORT..SERIAL_PORT + 8;

/// The buses that accesses go to; shared by all vCPUs.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Set by the devices behind the ports, checked after each write to one.
    pub power: Arc<PowerLatch>,
    /// Output of the serial port, if there is one.
    pub console: Option<Output>,
    /// Held while the writes that KVM has kept are applied. A lock, as any vCPU may have to apply
    /// those of another one, and the others must not overtake them.
    pub applying: Arc<Mutex<()>>,
}

impl Buses {
    /// Apply the writes that KVM has kept in `ring`; whether there is console output among them.
    fn apply(&self, ring: &Ring) -> bool {
        if ring.is_empty() {
            return false;
        }
        let mut output = false;
        let _applying = self.applying.lock();
        ring.drain(|write| {
            output |= write.pio && write.at == u64::from(SERIAL_PORT);
            let bus = if write.pio { &self.pio } else { &self.mmio };
            bus.write(write.at, write.data());
        });
        output
    }
}

/// The buses while devices are attached to them.
#[derive(Default)]
pub struct BusesBuilder {
    /// Ports.
    pub(in crate::arch::x86_64) pio: BusBuilder,
    /// Memory-mapped registers.
    pub mmio: BusBuilder,
    pub(in crate::arch::x86_64) power: Arc<PowerLatch>,
    pub(in crate::arch::x86_64) console: Option<Output>,
}

impl BusesBuilder {
    /// The buses, to which nothing can be attached any more.
    pub fn freeze(self) -> Buses {
        let (pio, mmio) = (self.pio.freeze(), self.mmio.freeze());
        let (power, console) = (self.power, self.console);
        Buses { pio, mmio, power, console, applying: Arc::default() }
    }
}

/// The machine-wide event that a write to a port requested.
#[derive(Debug, Default)]
pub struct PowerLatch(AtomicU8);

impl PowerLatch {
    /// Remember `event` for the vCPU that is writing.
    pub fn set(&self, event: PowerEvent) {
        let code = match event {
            PowerEvent::Reset => 1,
            PowerEvent::Shutdown => 2,
            PowerEvent::Panicked => 3,
        };
        self.0.store(code, Ordering::Relaxed);
    }

    fn take(&self) -> Option<PowerEvent> {
        if self.0.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match self.0.swap(0, Ordering::Relaxed) {
            1 => Some(PowerEvent::Reset),
            2 => Some(PowerEvent::Shutdown),
            3 => Some(PowerEvent::Panicked),
            // Another vCPU was faster.
            _ => None,
        }
    }
}

/// Makes vCPUs.
#[derive(Clone)]
pub struct VcpuFactory {
    buses: Buses,
    /// MSRs that are saved.
    msr_list: Arc<Vec<u32>>,
}

impl VcpuFactory {
    /// A factory for vCPUs whose accesses go to `buses`.
    ///
    /// # Errors
    /// When KVM does not list the MSRs of a vCPU's state.
    pub fn new(kvm: &Kvm, buses: Buses) -> Result<Self, KvmError> {
        Ok(Self { buses, msr_list: Arc::new(state::msr_list(kvm)?) })
    }

    /// The vCPU `fd` of `vm`.
    pub fn make(&self, vm: &Vm, fd: VcpuFd) -> KvmCpu {
        let (buses, msr_list) = (self.buses.clone(), self.msr_list.clone());
        let bursts = Bursts::new(vm, SERIAL_PORT, buses.console.clone());
        KvmCpu { fd, buses, msr_list, kicked: None, kept: None, bursts, khz: (0, 0) }
    }
}

/// One vCPU.
pub struct KvmCpu {
    fd: VcpuFd,
    buses: Buses,
    msr_list: Arc<Vec<u32>>,
    kicked: Option<Kicked>,
    /// Writes that KVM has kept. `None` until the vCPU has a thread.
    kept: Option<Ring>,
    bursts: Bursts,
    /// Frequencies of the TSC in ticks per millisecond: the guest's and the host's. They differ
    /// only for a guest that was restored on another host.
    khz: (u32, u32),
}

impl KvmCpu {
    fn failed(&mut self, what: &str) -> Exit {
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        log::error!("the guest cannot continue: {what} at rip {rip:#x}");
        Exit::Stopped(Stopped::Failed)
    }

    /// Enter the guest once.
    fn enter(&mut self) -> Exit {
        let Self { fd, buses, kicked, kept, bursts, .. } = self;
        let size = || kicked.as_ref().map_or(1, Kicked::io_size).max(1);
        let exit = fd.run();
        let apply = |bursts: &mut Bursts| {
            if kept.as_ref().is_some_and(|ring| buses.apply(ring)) {
                bursts.kept();
            }
        };
        // Before the access that ended the run is carried out, and before a kicked vCPU parks.
        apply(bursts);
        // Any access but one to the port may block.
        let at_port = match &exit {
            Ok(VcpuExit::IoIn(port, _) | VcpuExit::IoOut(port, _)) => SERIAL.contains(port),
            _ => false,
        };
        if !at_port {
            bursts.pass_on();
        }
        match exit {
            Ok(VcpuExit::MmioRead(at, data)) => or_ones(buses.mmio.read(at, data), data),
            Ok(VcpuExit::MmioWrite(at, data)) => drop(buses.mmio.write(at, data)),
            Ok(VcpuExit::IoIn(port, data)) => {
                for item in data.chunks_mut(size()) {
                    or_ones(buses.pio.read(u64::from(port), item), item);
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                for item in data.chunks(size()) {
                    buses.pio.write(u64::from(port), item);
                }
                if port == SERIAL_PORT {
                    bursts.exited(Instant::now());
                }
                if let Some(event) = buses.power.take() {
                    return Exit::Stopped(Stopped::Power(event));
                }
            }
            Ok(VcpuExit::Shutdown) => return Exit::Stopped(Stopped::Fault),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return self.failed(&format!("KVM cannot enter it (hardware reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => {
                return self.failed("KVM internal error (an instruction it cannot emulate)");
            }
            Ok(other) => {
                let what = format!("KVM exit {other:?}");
                return self.failed(&what);
            }
            Err(e) if e.errno() == libc::EINTR => {
                let kick = kicked.as_ref().is_none_or(Kicked::clear);
                let ended = if kick { bursts.end() } else { bursts.tick() };
                if ended {
                    apply(bursts);
                }
                return Exit::Kicked;
            }
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) if e.errno() == libc::EFAULT => {
                return self.failed(
                    "the host cannot provide a page of guest memory: the file that it is mapped \
                     from was truncated, or its disk is full or fails (KVM_RUN: EFAULT)",
                );
            }
            Err(e) => return self.failed(&format!("KVM_RUN: {e}")),
        }
        Exit::Handled
    }
}

/// An unclaimed read returns ones, as on an empty bus.
fn or_ones(claimed: bool, data: &mut [u8]) {
    if !claimed {
        data.fill(0xff);
    }
}

impl Cpu for KvmCpu {
    type State = VcpuState;
    type Error = KvmError;
    type Kicker = Kicker;

    fn kicker(&mut self) -> io::Result<Kicker> {
        let (kicker, kicked) = kick::pair(&self.fd)?;
        self.kicked = Some(kicked);
        self.kept = Some(Ring::map(&self.fd)?);
        Ok(kicker)
    }

    fn run(&mut self) -> Exit {
        let exit = self.enter();
        if matches!(exit, Exit::Stopped(_)) {
            self.bursts.end();
        }
        exit
    }

    fn resumed(&mut self, ticks: i64) {
        let by = guest_ticks(ticks.unsigned_abs(), self.khz.0, self.khz.1);
        let by = if ticks < 0 { by.wrapping_neg() } else { by };
        if by != 0 && guest_tsc_is_its_own() {
            let held = tsc::hold_back(&self.fd, by).map_err(|e| e.to_string());
            let timer = held.and_then(|()| state::rearm(&self.fd).map_err(|e| e.to_string()));
            if let Err(e) = timer {
                log::debug!("the guest's TSC ran during the pause: {e}");
            }
        }
        // Informs a guest that uses kvm-clock that it was paused, so that its watchdog does not
        // report a soft lock-up. For a guest without kvm-clock: EINVAL, nothing to do.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn save(&self) -> Result<VcpuState, KvmError> {
        VcpuState::save(&self.fd, &self.msr_list, self.khz.1)
    }

    fn restore(&mut self, state: VcpuState) -> Result<(), KvmError> {
        self.khz = state.restore(&self.fd)?;
        Ok(())
    }
}

/// The guest's TSC keeps counting while its vCPUs are parked; the offset compensates for the pause.
mod tsc {
    use vmm_sys_util::ioctl::ioctl_with_ref;

    use super::{VcpuFd, io, kvm_device_attr};

    /// `KVM_VCPU_TSC_CTRL` and its `KVM_VCPU_TSC_OFFSET` (Linux, Documentation/virt/kvm).
    const TSC_CTRL: u32 = 0;
    const TSC_OFFSET: u64 = 0;
    vmm_sys_util::ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xae, 0xe1, kvm_device_attr);
    vmm_sys_util::ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, 0xae, 0xe2, kvm_device_attr);

    /// Reduce the vCPU's TSC by `ticks`, or increase it by as many if they wrap around. All vCPUs get
    /// the same, so they stay in step.
    pub fn hold_back(fd: &VcpuFd, ticks: u64) -> io::Result<()> {
        let mut offset = 0u64;
        let attr = |addr: *mut u64| kvm_device_attr {
            group: TSC_CTRL,
            attr: TSC_OFFSET,
            addr: addr as u64,
            flags: 0,
        };
        // SAFETY: KVM writes the eight bytes of `offset`.
        check(unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attr(&raw mut offset)) })?;
        offset = offset.wrapping_sub(ticks);
        // SAFETY: KVM reads the eight bytes of `offset`.
        check(unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attr(&raw mut offset)) })
    }

    fn check(status: libc::c_int) -> io::Result<()> {
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
