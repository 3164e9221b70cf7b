//! The machine: what it is made of, and how all of it stops, goes on and starts anew.
use std::{
    io,
    ops::Range,
    sync::{Arc, mpsc::RecvTimeoutError},
    time::{Duration, Instant},
};

use devices::{
    Device, Memory,
    backend::{
        char::CharSink,
        disk::{DISK_STALL_LIMIT, Disk, DiskError},
        net::tap::TapError,
    },
    virtio::{VirtioDevice, blk::Block, mmio::Transport},
};
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use parking_lot::{Mutex, MutexGuard};
use vm_memory::GuestAddress;

use crate::{
    backends::Backends,
    boot::{self, BootError, Platform},
    config::MachineConfig,
    generation::GenerationId,
    io_thread::{self, Holding},
    kvm::{
        self, KvmError, Vm,
        features::Leaf,
        vcpu::{Buses, KvmCpu},
    },
    layout,
    legacy::Legacy,
    memory::{self, image},
    slots::Slots,
    vcpu::{Gone, Handle},
};

/// How long a vCPU or an I/O thread may take to come to rest while no disk has requests that the
/// host has not finished; with such, it is [`DISK_STALL_LIMIT`].
const THREAD_STALL_LIMIT: Duration = Duration::from_secs(5);
/// How long the last output may take to arrive in its file.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(1);

/// A built machine. All its vCPUs are parked until [`Machine::resume`].
///
/// The order of the fields is the order of their end: vCPUs before devices, devices before the
/// I/O threads that carry their workers, and KVM last.
pub struct Machine {
    pub(crate) vcpus: Vec<Handle<KvmCpu>>,
    pub(crate) legacy: Legacy,
    pub(crate) slots: Slots,
    pub(crate) io_threads: Vec<(String, Arc<io_thread::Handle>)>,
    pub(crate) vm: Vm,
    pub(crate) kvm: Kvm,
    pub(crate) buses: Buses,
    pub(crate) msr_list: Arc<Vec<u32>>,
    pub(crate) memory: Memory,
    pub(crate) config: MachineConfig,
    /// When the vCPUs were parked; `None` while they run or before they have ever run.
    pub(crate) parked: Option<Parked>,
    pub(crate) running: bool,
    pub(crate) apic_ids: Vec<u8>,
    /// Labels and names of the character back-ends.
    pub(crate) chardevs: Vec<(String, String)>,
    pub(crate) outputs: Vec<CharSink>,
    pub(crate) backends: Backends,
    pub(crate) generation: GenerationId,
    /// The CPUID leaves that the guest has seen, when it was restored; else this host's.
    pub(crate) seen: Option<CpuId>,
    /// CPUID as it is saved, once it is known.
    pub(crate) leaves: Option<Vec<Leaf>>,
    /// Ranges of the memory's image that are not zero although nobody may have touched them.
    pub(crate) filled: Arc<[Range<u64>]>,
    /// It is noted which pages are written.
    pub(crate) logging: bool,
    /// What a reset has cleared since they were last asked for.
    pub(crate) cleared: Vec<Range<u64>>,
    /// Other machines may have the disks.
    pub(crate) disks_released: bool,
}

/// The moment at which the guest's clocks stood still.
pub(crate) struct Parked {
    /// Host TSC, in ticks.
    pub tsc: u64,
    /// kvm-clock.
    pub clock: kvm::Clock,
    /// It is to go on as if it had not stood.
    pub advance: bool,
}

/// Why the machine could not be stopped, continued or reset.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A vCPU thread ended; the VM cannot go on.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel could not be loaded again.
    #[error("cannot load the kernel again")]
    Boot(#[from] BootError),
    /// A disk was handed over, and whoever has it now keeps it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap was handed over, and is in use now.
    #[error("NIC {id}")]
    #[expect(missing_docs, reason = "shown by the message")]
    Tap { id: String, source: TapError },
    /// The host refused something.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A disk's storage does not answer, and what was asked for has to wait for it.
    #[error(
        "disk {0} has requests that the host has not finished within a second: its storage is slow \
         or hangs. The machine is as it was; try again when the storage answers"
    )]
    Hung(String),
    /// A vCPU or I/O thread does not come to rest.
    #[error(
        "the machine's threads have not come to rest within 5 seconds: the host is overloaded. The \
         machine is as it was; try again"
    )]
    Restless,
    /// An I/O thread ended.
    #[error("an I/O thread has exited")]
    NoThread,
}

impl Machine {
    /// What it was made from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The kernel's numbers of the vCPU threads, in order of vCPUs.
    pub fn vcpu_threads(&self) -> Vec<u32> {
        self.vcpus.iter().map(Handle::thread).collect()
    }

    /// Ids and thread numbers of the I/O threads that the configuration names.
    pub fn io_threads(&self) -> impl Iterator<Item = (&str, u32)> {
        self.io_threads.iter().skip(1).map(|(id, thread)| (id.as_str(), thread.thread()))
    }

    /// Labels of the character devices and where they lead, such as `pty:/dev/pts/3`.
    pub fn chardevs(&self) -> &[(String, String)] {
        &self.chardevs
    }

    /// What tells it from other machines that go on from the same state.
    pub fn generation_id(&self) -> GenerationId {
        self.generation
    }

    /// Stop it for good: whatever its disks do, the guest does not run any more. False when some of its
    /// threads still wait for storage after about twice `patience`; nothing can be done to the machine
    /// then but [`Machine::leave`].
    pub fn stop_for_good(&mut self, patience: Duration) -> bool {
        let (deadline, answers) = (Instant::now() + patience, self.vcpus.iter().map(Handle::park));
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let answers: Vec<_> = answers.collect();
        // One that does not answer waits for a device, and not in the guest.
        let parked =
            answers.iter().filter(|answer| answer.wait_for(left(deadline)).is_ok()).count();
        let mut quiet = parked == answers.len();
        let deadline = Instant::now() + patience;
        let holds: Vec<_> =
            self.io_threads.iter().map(|(_, thread)| thread.hold(patience)).collect();
        for mut hold in holds {
            quiet &= hold.wait(left(deadline)).is_ok();
        }
        if quiet {
            self.each_device(|device| device.pause());
        }
        self.running = false;
        quiet
    }

    /// What is left to be done for a machine that was stopped for good, on a thread that may wait for
    /// storage: its output arrives, its sockets' names and what is in the file of its memory go. The
    /// machine itself is to be forgotten: its threads may still use it.
    pub fn leave(&self, quiet: bool) -> impl FnOnce() + Send + use<> {
        let outputs = self.outputs.clone();
        let memory = quiet.then(|| (self.memory.clone(), self.config.memory.clone()));
        move || {
            outputs.iter().for_each(|output| output.finish(OUTPUT_PATIENCE));
            if let Some((memory, config)) = memory {
                memory::leave_empty(&memory, &config);
            }
        }
    }

    /// Press the ACPI power button.
    pub fn press_power_button(&self) {
        self.legacy.press_power_button();
    }

    /// Type Ctrl-Alt-Del; false when the guest does not listen to its keyboard.
    pub fn send_ctrl_alt_del(&self) -> bool {
        self.legacy.send_ctrl_alt_del()
    }

    /// Let it run: devices first, then vCPUs. The guest's clocks go on from where they stood,
    /// unless it was restored as [`Saved::clock_realtime`](crate::Saved).
    ///
    /// # Errors
    /// When KVM refuses the clock, or another machine has a disk that was given away.
    pub fn resume(&mut self) -> Result<(), RunError> {
        self.hold_backends()?;
        let mut ticks = 0;
        if let Some(parked) = self.parked.take() {
            self.vm.set_clock(parked.clock, parked.advance)?;
            ticks = kvm::host_tsc().saturating_sub(parked.tsc);
        }
        self.run(ticks);
        Ok(())
    }

    /// Let it run again after a pause that only the monitor wanted, of some milliseconds. The guest's
    /// clocks have gone on meanwhile, as they do when the host takes a CPU away: held back again and
    /// again, they would fall behind the world's.
    ///
    /// # Errors
    /// As [`Machine::resume`].
    pub fn resume_after_own_pause(&mut self) -> Result<(), RunError> {
        if !self.running {
            self.hold_backends()?;
            self.parked = None;
            self.run(0);
        }
        Ok(())
    }

    fn run(&mut self, ticks: u64) {
        self.each_device(|d| d.resume());
        self.io_threads.iter().for_each(|(_, thread)| thread.go());
        self.vcpus.iter().for_each(|v| v.resume(ticks));
        self.running = true;
    }

    /// Stop it: every vCPU has left KVM, then every device worker is quiet and has nothing in
    /// flight. Doing it twice changes nothing.
    ///
    /// # Errors
    /// When a disk's storage hangs, a vCPU thread has ended, or KVM does not tell the clock. A machine
    /// that was running runs on.
    pub fn pause(&mut self) -> Result<(), RunError> {
        let stopped = self.stand_still();
        if stopped.is_err() && self.running {
            self.resume()?;
        }
        stopped
    }

    fn stand_still(&mut self) -> Result<(), RunError> {
        let begin = Instant::now();
        // All are asked before the first is waited for.
        let answers: Vec<_> = self.vcpus.iter().map(Handle::park).collect();
        for answer in answers {
            // It may be resetting a device whose disk hangs.
            self.patiently(begin, |time| answer.wait_for(time))?.ok_or(Gone)?;
        }
        if self.parked.is_none() {
            let clock = self.vm.clock()?;
            self.parked = Some(Parked { tsc: kvm::host_tsc(), clock, advance: false });
        }
        let threads: Vec<_> = self.io_threads.iter().map(|(_, thread)| &**thread).collect();
        let holds: Vec<_> = threads.iter().map(|thread| thread.hold(DISK_STALL_LIMIT)).collect();
        if let Err(e) = holds.into_iter().try_for_each(|hold| self.held(begin, hold)) {
            threads.into_iter().for_each(io_thread::Handle::go);
            return Err(e);
        }
        self.each_device(|d| d.pause());
        self.running = false;
        Ok(())
    }

    /// Let the serial port's other end be served although the machine stands still: whoever connects
    /// there is told what the guest has said. What is typed goes no further than the port's FIFO.
    pub fn serve_serial(&self) {
        if let Some(serial) = self.legacy.serial() {
            serial.lock().resume();
            // All other workers are with their devices.
            self.io_threads.iter().for_each(|(_, thread)| thread.go());
        }
    }

    fn held(&self, begin: Instant, mut hold: Holding<'_>) -> Result<(), RunError> {
        let refused = || self.hung().unwrap_or(RunError::NoThread);
        self.patiently(begin, |time| hold.wait(time))?.ok_or_else(refused)
    }

    /// The disks that something has to wait for, if there are any.
    fn hung(&self) -> Option<RunError> {
        let busy: Vec<&str> = self.backends.busy_disks().collect();
        (!busy.is_empty()).then(|| RunError::Hung(busy.join(", ")))
    }

    /// Wait for `answer`, but no longer than until [`DISK_STALL_LIMIT`] after `begin` when a disk may
    /// be what it waits for, and [`THREAD_STALL_LIMIT`] else. That something makes progress does not
    /// count: a guest could give a disk work without end. `None` when the answer will never come.
    pub(crate) fn patiently<T>(
        &self,
        begin: Instant,
        mut answer: impl FnMut(Duration) -> Result<T, RecvTimeoutError>,
    ) -> Result<Option<T>, RunError> {
        for limit in [DISK_STALL_LIMIT, THREAD_STALL_LIMIT] {
            match answer(limit.saturating_sub(begin.elapsed())) {
                Ok(answer) => return Ok(Some(answer)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => self.hung().map_or(Ok(()), Err)?,
            }
        }
        Err(RunError::Restless)
    }

    /// Change the device in slot `index`, whose I/O thread stands still meanwhile; its driver learns
    /// of it. `None` when the slot holds something else than a `T`.
    ///
    /// # Errors
    /// When the thread cannot be had: nothing has changed then.
    pub(crate) fn change<T: VirtioDevice, R>(
        &self,
        index: usize,
        change: impl FnOnce(&mut T) -> R,
    ) -> Result<Option<R>, RunError> {
        let Some((transport, thread)) = self.slots.get(index) else { return Ok(None) };
        let mut transport = self.locked(transport)?;
        if !self.running {
            return Ok(transport.update(change));
        }
        self.held(Instant::now(), thread.hold(DISK_STALL_LIMIT))?;
        let changed = transport.update(change);
        thread.go();
        Ok(changed)
    }

    /// A vCPU that resets a device keeps it locked until its disk has finished.
    pub(crate) fn locked<'a>(
        &self,
        transport: &'a Mutex<Transport>,
    ) -> Result<MutexGuard<'a, Transport>, RunError> {
        let lock = |time| transport.try_lock_for(time).ok_or(RecvTimeoutError::Timeout);
        self.patiently(Instant::now(), lock)?.ok_or(RunError::NoThread)
    }

    /// Go back to the state before the first instruction, with the kernel loaded anew. The machine
    /// is paused before and after.
    ///
    /// KVM gets a new virtual machine for it, behind the same devices, memory and threads: it has no
    /// reset, and does not tell all that a guest may have changed in a vCPU.
    ///
    /// # Errors
    /// When the kernel cannot be loaded again (its file has gone) or KVM refuses. The machine is good
    /// for nothing then.
    pub fn reset(&mut self) -> Result<(), RunError> {
        self.pause()?;
        self.each_device(|d| d.reset());
        if self.logging {
            self.cleared = image::union(&self.cleared, &image::used(&self.memory, &self.filled)?);
        }
        memory::clear(&self.memory, &self.config.memory)?;
        let entry = load_kernel(&self.memory, &self.config, &self.slots, &self.apic_ids)?;
        self.generation.write(&self.memory)?;
        self.legacy.unbind(&self.vm)?;
        self.slots.unbind(&self.vm)?;
        let fd = kvm::create_vm(&self.kvm)?;
        let vm = Vm::new(&self.kvm, fd, &self.memory, self.slots.register_window())?;
        self.legacy.bind(&vm)?;
        self.slots.bind(&vm)?;
        let seen = self.seen.as_ref();
        let fds = vm.create_vcpus(&self.kvm, &self.apic_ids, &self.config.topology, seen)?;
        if let Some(first) = fds.first() {
            kvm::entry::set(first, &entry.registers)?;
        }
        for (vcpu, fd) in self.vcpus.iter_mut().zip(fds) {
            vcpu.replace(KvmCpu::new(fd, self.buses.clone(), self.msr_list.clone()))?;
        }
        self.vm = vm;
        if self.logging {
            self.vm.log_dirty(true)?;
        }
        // A machine that has not run yet has no pause to make up for.
        self.parked = None;
        Ok(())
    }

    /// Let other machines have the disks and the taps that have a name, until this one runs again. The
    /// machine is paused.
    pub fn release_backends(&mut self) {
        self.disks_released = true;
        self.each_disk(|disk| {
            disk.release();
            Ok(())
        })
        .ok();
        self.release_taps();
    }

    /// Have the disks and taps again that were released.
    ///
    /// # Errors
    /// When another machine has one.
    pub fn hold_backends(&mut self) -> Result<(), RunError> {
        if self.disks_released {
            self.each_disk(Disk::hold)?;
            self.hold_taps()?;
            self.disks_released = false;
        }
        Ok(())
    }

    fn each_disk(&self, act: impl Fn(&Disk) -> Result<(), DiskError>) -> Result<(), DiskError> {
        let transports = (0..self.config.slots.disks()).filter_map(|slot| self.slots.get(slot));
        for (transport, _) in transports {
            if let Some(disk) = transport.lock().device::<Block>().and_then(|block| block.disk()) {
                act(disk)?;
            }
        }
        Ok(())
    }

    /// All devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Shared> {
        self.legacy.devices().chain(self.slots.devices().map(|(_, device)| device))
    }

    fn each_device(&mut self, mut act: impl FnMut(&mut dyn Device)) {
        for device in self.devices() {
            act(&mut *device.lock());
        }
    }
}

/// A device as the machine keeps it: the bus that carries guest accesses holds it too.
pub(crate) type Shared = Arc<Mutex<dyn Device>>;

/// Put the kernel into guest memory, and what tells it of this machine.
pub(crate) fn load_kernel(
    memory: &Memory,
    config: &MachineConfig,
    slots: &Slots,
    apic_ids: &[u8],
) -> Result<boot::Entry, BootError> {
    let platform = Platform {
        apic_ids,
        slots: &slots.boot_list(),
        serial: config.serial.is_some(),
        vmgenid: Some(GuestAddress(layout::GENERATION_ID)),
    };
    boot::load(memory, &config.boot, &platform)
}
