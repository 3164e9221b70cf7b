//! The machine: its parts, and how they are stopped, resumed and reset together.
use std::{io, ops::Range, sync::Arc, time::Duration};

use config::MachineConfig;
use devices::{
    Device, Memory,
    backend::{
        char::CharSink,
        disk::{Disk, DiskError},
        net::tap::TapError,
    },
};
use kvm_ioctls::Kvm;
use parking_lot::Mutex;

use crate::{
    arch::{
        Clock, CpuFeatures, CpuModel, KvmCpu, Moment, VcpuFactory, entry, host_ticks,
        legacy::Legacy,
    },
    backends::Backends,
    balloon::Balloon,
    boot::BootError,
    generation::GenerationId,
    io_thread,
    kvm::{self, KvmError, Vm},
    memory::{self, dirty_logs::DirtyLogs, image, reclaim::Reclaimer},
    reload::Reloaded,
    rest::Rest,
    slots::Slots,
    undo::Undo,
    vcpu::{Gone, Handle},
};

/// How long to wait for the last output to reach its file.
const OUTPUT_DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// A built machine. All its vCPUs are parked until [`Machine::resume`].
///
/// The fields are dropped in this order: vCPUs before devices, devices before the I/O threads that
/// run their workers, and KVM last.
pub struct Machine {
    pub(crate) vcpus: Vec<Handle<KvmCpu>>,
    pub(crate) legacy: Legacy,
    pub(crate) slots: Slots,
    pub(crate) io_threads: Vec<(String, Arc<io_thread::Handle>)>,
    pub(crate) vm: Vm,
    pub(crate) kvm: Kvm,
    pub(crate) vcpu_factory: VcpuFactory,
    pub(crate) memory: Memory,
    pub(crate) config: MachineConfig,
    /// When the vCPUs were parked; `None` while they run or before they have ever run.
    pub(crate) parked: Option<Parked>,
    pub(crate) running: bool,
    pub(crate) rest: Rest,
    pub(crate) cpu_ids: Vec<u8>,
    /// Labels and names of the character back-ends.
    pub(crate) chardevs: Vec<(String, String)>,
    pub(crate) outputs: Vec<CharSink>,
    pub(crate) backends: Backends,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) generation: GenerationId,
    /// The CPU features that the guest of a restored machine has seen; otherwise those of this
    /// host.
    pub(crate) seen: Option<CpuFeatures>,
    /// The same in saved form, once it is known.
    pub(crate) cpu_model: Option<CpuModel>,
    /// Ticks per millisecond of the TSC of a restored machine.
    pub(crate) tsc_khz: Option<u32>,
    /// Ranges of guest memory that are not zero although they may not have been touched.
    pub(crate) filled: Arc<[Range<u64>]>,
    /// Gives memory back to the host, for devices.
    pub(crate) reclaimer: Arc<Reclaimer>,
    /// Pages written by other processes.
    pub(crate) dirty_logs: DirtyLogs,
    /// Dirty page logging is on.
    pub(crate) logging: bool,
    /// Ranges that a reset has cleared since they were last queried.
    pub(crate) cleared: Vec<Range<u64>>,
    /// Other machines may have the disks.
    pub(crate) disks_released: bool,
    /// What its memory was before it was built, until it runs.
    pub(crate) undo: Option<Undo>,
}

/// The moment at which the guest's clocks were stopped.
pub(crate) struct Parked {
    /// [`host_ticks`] at that moment.
    pub ticks: u64,
    /// The guest's paravirtual clock.
    pub clock: Clock,
    /// The clock is to continue as if it had not been stopped.
    pub advance: bool,
    /// All clocks are to continue as if the guest had run since then.
    pub runs_since: Option<Moment>,
}

/// Why the machine could not be paused, resumed or reset.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A vCPU thread ended; the VM cannot run any more.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// KVM refused a step.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The boot data that describe this machine to the guest could not be written.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk was handed over, and its new owner keeps it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap was handed over and is still in use.
    #[error("NIC {id}")]
    #[expect(missing_docs, reason = "shown by the message")]
    Tap { id: String, source: TapError },
    /// The host refused a system call.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A disk's storage does not answer, and the operation has to wait for it.
    #[error(
        "disk {0} has requests that the host has not finished in time: its storage is slow or \
         hangs. The machine is unchanged; try again when the storage answers"
    )]
    Hung(String),
    /// A vCPU, an I/O thread or a device does not become quiet.
    #[error(
        "{0} has not come to rest in time: the host is overloaded, or a file that it waits for \
         hangs. The machine is unchanged; try again"
    )]
    Restless(String),
    /// An I/O thread ended.
    #[error("an I/O thread has exited")]
    NoThread,
}

impl Machine {
    /// The configuration that it was built from.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The kernel's thread ids of the vCPU threads, in order of vCPUs.
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

    /// The id that distinguishes it from other machines restored from the same state.
    pub fn generation_id(&self) -> GenerationId {
        self.generation
    }

    /// What remains to be done for a machine that was stopped for good, on a thread that may wait
    /// for storage: flush its output, remove its sockets' names and empty its memory file. The
    /// machine itself must be leaked: its threads may still use it.
    pub fn leave(&self, quiet: bool) -> impl FnOnce() + Send + use<> {
        let outputs = self.outputs.clone();
        let memory = quiet.then(|| (self.memory.clone(), self.config.memory.clone()));
        move || {
            outputs.iter().for_each(|output| output.finish(OUTPUT_DRAIN_LIMIT));
            if let Some((memory, config)) = memory {
                memory::leave_empty(&memory, &config);
            }
        }
    }

    /// Send `output` of each character device to its back-end, as if its guest had sent it: what a
    /// machine that ran before may not have sent any more.
    pub fn send_again(&self, output: &[Vec<u8>]) {
        for (sink, bytes) in self.outputs.iter().zip(output).filter(|(_, bytes)| !bytes.is_empty())
        {
            sink.send(bytes);
        }
    }

    /// Press the ACPI power button.
    pub fn press_power_button(&self) {
        self.legacy.press_power_button();
    }

    /// Type Ctrl-Alt-Del; false when the guest has not enabled its keyboard.
    pub fn send_ctrl_alt_del(&self) -> bool {
        self.legacy.send_ctrl_alt_del()
    }

    /// Let it run: devices first, then vCPUs. The guest's clocks continue from where they stopped,
    /// unless it was restored with [`Saved::clock_realtime`](crate::Saved).
    ///
    /// # Errors
    /// When KVM refuses the clock, or another machine has a disk that was released.
    pub fn resume(&mut self) -> Result<(), RunError> {
        self.hold_backends()?;
        let ticks = self.restart_clocks()?;
        self.run(ticks);
        Ok(())
    }

    /// Let the guest's clock resume from where it was stopped; returns for how many ticks of the
    /// host's counter that was, or would have been.
    pub(crate) fn restart_clocks(&mut self) -> Result<i64, KvmError> {
        let Some(parked) = self.parked.take() else { return Ok(0) };
        let mut clock = parked.clock;
        if let Some(since) = parked.runs_since {
            let ran = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
            clock.nanoseconds = clock.nanoseconds.saturating_add(ran);
        }
        self.vm.set_clock(clock, parked.advance)?;
        let until = parked.runs_since.map_or_else(host_ticks, |since| since.ticks);
        Ok(until.wrapping_sub(parked.ticks).cast_signed())
    }

    /// Let the guest's clocks go on, when it first runs, as if it had run since `moment` with the
    /// state that it was restored from: kvm-clock, and the TSC of each vCPU where that is the
    /// guest's own. They never go back.
    pub fn runs_since(&mut self, moment: Moment) {
        if let Some(parked) = &mut self.parked {
            parked.runs_since = Some(moment);
        }
    }

    /// Let it run again after a pause of some milliseconds that the monitor itself needed. The
    /// guest's clocks have advanced meanwhile, as they do when the host preempts a vCPU: stopped
    /// again and again, they would fall behind real time.
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

    pub(crate) fn run(&mut self, ticks: i64) {
        self.undo = None;
        self.rest.ends();
        self.each_device(|d| d.resume());
        self.io_threads.iter().for_each(|(_, thread)| thread.go());
        self.vcpus.iter().for_each(|v| v.resume(ticks));
        self.running = true;
    }

    /// Keep the vCPUs of a running machine out of the guest for `time`, without waiting for that. Its
    /// clocks and devices go on. Whatever is requested meanwhile ends it.
    pub fn rest_vcpus(&self, time: Duration) {
        if self.running {
            self.vcpus.iter().for_each(|vcpu| vcpu.rest(time));
        }
    }

    /// Serve the serial port's back-end although the machine is paused: a client that connects
    /// there gets the guest's past output. Its input gets no further than the port's FIFO.
    pub fn serve_serial(&mut self) {
        if let Some(serial) = self.legacy.serial() {
            self.rest.ends();
            serial.lock().resume();
            // All other workers are with their devices, so only this one runs.
            self.io_threads.iter().for_each(|(_, thread)| thread.go());
        }
    }

    /// Return to the state before the first instruction, with a freshly loaded kernel. The machine
    /// is paused before and after.
    ///
    /// This makes a new KVM virtual machine behind the same devices, memory and threads: KVM has no
    /// reset, and does not report all that a guest may have changed in a vCPU.
    ///
    /// # Errors
    /// When the host's memory does not suffice or KVM refuses: the machine is then unusable.
    pub fn reset(&mut self, kernel: &Reloaded) -> Result<(), RunError> {
        self.pause()?;
        self.each_device(|d| d.reset());
        if self.logging {
            self.cleared = image::union(&self.cleared, &image::used(&self.memory, &self.filled)?);
        }
        memory::clear(&self.memory, &self.config.memory)?;
        self.reclaimer.note_cleared();
        kernel.copy_to(&self.memory)?;
        self.generation.write(&self.memory)?;
        self.legacy.unbind(&self.vm)?;
        self.slots.unbind(&self.vm)?;
        let fd = kvm::create_vm(&self.kvm)?;
        let vm = Vm::new(&self.kvm, fd, &self.memory, self.slots.register_window(), false)?;
        self.legacy.bind(&vm)?;
        self.slots.bind(&vm)?;
        let features = match &self.seen {
            Some(features) => features.clone(),
            None => CpuFeatures::supported(&self.kvm)?,
        };
        let fds = vm.create_vcpus(&self.kvm, &self.cpu_ids, &self.config.topology, &features)?;
        if let Some(first) = fds.first() {
            entry::set(first, &kernel.entry.registers)?;
        }
        for (vcpu, fd) in self.vcpus.iter_mut().zip(fds) {
            vcpu.replace(self.vcpu_factory.make(&vm, fd))?;
        }
        self.vm = vm;
        if self.logging {
            self.vm.log_dirty(true)?;
        }
        // A machine that has not run yet has no pause to compensate for.
        self.parked = None;
        Ok(())
    }

    /// Let other machines have the disks and the named taps until this one runs again. The machine
    /// is paused.
    pub fn release_backends(&mut self) {
        self.disks_released = true;
        self.each_disk(|disk| {
            disk.release();
            Ok(())
        })
        .ok();
        self.release_taps();
    }

    /// Take back the disks and taps that were released.
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
        self.backends
            .block_devices()
            .try_for_each(|device| device.lock().device().disk().map_or(Ok(()), &act))
    }

    /// All devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Shared> {
        self.legacy.devices().chain(self.slots.devices().map(|(_, device)| device))
    }

    pub(crate) fn each_device(&mut self, mut act: impl FnMut(&mut dyn Device)) {
        for device in self.devices() {
            act(&mut *device.lock());
        }
    }
}

/// A device as the machine keeps it: the bus that carries guest accesses holds it too.
pub(crate) type Shared = Arc<Mutex<dyn Device>>;
