//! A guest of a few real-mode instructions on this host's own /dev/kvm.
use std::{
    io::Write,
    sync::{Arc, mpsc::channel},
    time::{Duration, Instant},
};

use config::{MemoryConfig, Topology, types::MemorySize};
use devices::{
    Memory,
    bus::{BusBuilder, BusDevice},
    reclaim::Reclaim,
    threads::ThreadStart,
};
use kvm_ioctls::{IoEventAddress, Kvm};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    clock::Clock,
    cpu_model::CpuFeatures,
    vcpu::{Buses, KvmCpu, VcpuFactory},
};
use crate::{
    kvm::{Vm, open},
    layout,
    memory::{self, origin::Origin, reclaim::Reclaimer},
    vcpu::{Cpu, Handle, Stopped},
};

/// Collects the bytes that the guest writes to a port.
struct Port(std::sync::mpsc::Sender<Vec<u8>>);
impl BusDevice for Port {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(b'?');
    }
    fn write(&mut self, _: u64, data: &[u8]) {
        let _ = self.0.send(data.to_vec());
    }
}

/// Offset and bytes of each write.
type Writes = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// Records writes to the register window.
#[derive(Default)]
struct Trap(Writes);
impl BusDevice for Trap {
    fn read(&mut self, offset: u64, _: &mut [u8]) {
        panic!("a read at {offset:#x} left the guest");
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.lock().push((offset, data.to_vec()));
    }
}

fn buses(pio: BusBuilder, mmio: BusBuilder) -> Buses {
    let (pio, mmio) = (pio.freeze(), mmio.freeze());
    Buses { pio, mmio, power: Arc::default(), console: None, applying: Arc::default() }
}

/// A virtual machine with `code` at 0x1000.
fn machine(code: &[u8]) -> (Kvm, Memory, Vm) {
    let kvm = open().unwrap();
    let memory = memory::allocate(&MemoryConfig::new(MemorySize::MIN)).unwrap();
    memory.write_slice(code, GuestAddress(0x1000)).unwrap();
    let window = Arc::new(MmapRegion::new(4096).unwrap());
    let vm = Vm::new(&kvm, crate::kvm::create_vm(&kvm).unwrap(), &memory, &window, false).unwrap();
    (kvm, memory, vm)
}

/// A vCPU that starts at 0x1000, in "unreal" mode: its data may lie above 64 KiB.
fn vcpu(kvm: &Kvm, vm: &Vm, buses: Buses) -> KvmCpu {
    let one = Topology { sockets: 1, dies: 1, clusters: 1, cores: 1, threads: 1 };
    let features = CpuFeatures::supported(kvm).unwrap();
    let fd = vm.create_vcpus(kvm, &[0], &one, &features).unwrap().pop().unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.ds.limit = u32::MAX;
    sregs.ds.g = 1;
    fd.set_sregs(&sregs).unwrap();
    let regs = kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() };
    fd.set_regs(&regs).unwrap();
    VcpuFactory::new(kvm, buses).unwrap().make(vm, fd)
}

#[test]
fn register_reads_never_exit_and_a_bound_write_does_not_either() {
    let code = [
        0x67, 0x66, 0xa1, 0x60, 0x00, 0x10, 0xf0, // mov eax, [0xf0100060]
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x66, 0xef, // out dx, eax
        0x66, 0xb8, 1, 0, 0, 0, // mov eax, 1
        0x67, 0x66, 0xa3, 0x64, 0x00, 0x10, 0xf0, // mov [0xf0100064], eax: bound
        0x66, 0xb8, 3, 0, 0, 0, // mov eax, 3
        0x67, 0x66, 0xa3, 0x64, 0x00, 0x10, 0xf0, // mov [0xf0100064], eax: another value
        0xb0, b'.', // mov al, '.'
        0xee, // out dx, al
        0xeb, 0xfd, // jmp to the out
    ];
    let kvm = open().unwrap();
    let config = MemoryConfig::new(MemorySize::MIN);
    let memory = memory::allocate(&config).unwrap();
    memory.write_slice(&code, GuestAddress(0x1000)).unwrap();
    let window = Arc::new(MmapRegion::new(4096).unwrap());
    window.as_volatile_slice().write_obj(0x1234_5678u32, 0x60).unwrap();
    let vm = Vm::new(&kvm, crate::kvm::create_vm(&kvm).unwrap(), &memory, &window, false).unwrap();
    let bound = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.bind_write(layout::VIRTIO_MMIO + 0x64, 1, &bound).unwrap();

    let (said, hear) = channel();
    let trap = Trap::default();
    let written = trap.0.clone();
    let mut pio = BusBuilder::default();
    pio.attach(0x3f8, 8, Arc::new(Mutex::new(Port(said)))).unwrap();
    let mut mmio = BusBuilder::default();
    mmio.attach(layout::VIRTIO_MMIO, 4096, Arc::new(Mutex::new(trap))).unwrap();
    let mut cpu = vcpu(&kvm, &vm, buses(pio, mmio));
    let begin = cpu.save().unwrap();
    cpu.restore(begin.clone()).unwrap();

    let vcpu = Handle::spawn(0, cpu, &ThreadStart::default(), |_, why: Stopped| panic!("{why:?}"))
        .unwrap();
    let wait = Duration::from_secs(10);
    for round in 0..20 {
        vcpu.resume(0);
        let word = hear.recv_timeout(wait).unwrap();
        assert_eq!(word, 0x1234_5678u32.to_le_bytes(), "round {round}");
        assert_eq!(hear.recv_timeout(wait).unwrap(), b".");
        vcpu.park().wait().unwrap();
        while hear.try_recv().is_ok() {}
        std::thread::yield_now();
        assert!(hear.try_recv().is_err(), "a parked vCPU is silent");
        assert_eq!(bound.read().unwrap(), 1, "the bound write was counted in the kernel");
        assert_eq!(written.lock().drain(..).collect::<Vec<_>>(), [(0x64, vec![3, 0, 0, 0])]);
        // Resuming from the saved state is the same as starting again.
        vcpu.restore(begin.clone()).wait().unwrap().unwrap();
    }
}

/// Records the writes to several ranges in one list, each with the start of its range.
struct Log(u64, Writes);
impl BusDevice for Log {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.1.lock().push((self.0 + offset, data.to_vec()));
    }
}

#[test]
fn writes_that_kvm_keeps_are_made_in_order_before_the_next_access_and_before_a_pause() {
    let code = [
        0xb0, 0x0a, // mov al, 10
        0xe6, 0x70, // out 0x70, al: kept
        0x67, 0x66, 0xa3, 0x20, 0x00, 0x10, 0xf0, // mov [0xf0100020], eax: kept
        0xe6, 0x71, // out 0x71, al
        0xb0, 0x0b, // mov al, 11
        0xb9, 200, 0, // mov cx, 200: more than the ring holds
        0xe6, 0x70, // out 0x70, al: kept
        0xe2, 0xfc, // loop to the out
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xb0, 0x0c, // mov al, 12
        0xe6, 0x70, // out 0x70, al: kept
        0xa2, 0x00, 0x20, // mov [0x2000], al
        0xf4, // hlt
    ];
    let (kvm, memory, vm) = machine(&code);
    vm.keep_writes(IoEventAddress::Pio(0x70), 1).unwrap();
    vm.keep_writes(IoEventAddress::Mmio(layout::VIRTIO_MMIO + 0x20), 8).unwrap();

    let written = Writes::default();
    let (said, hear) = channel();
    let log = |base| Arc::new(Mutex::new(Log(base, written.clone())));
    let (mut pio, mut mmio) = (BusBuilder::default(), BusBuilder::default());
    pio.attach(0x70, 2, log(0x70)).unwrap();
    pio.attach(0x3f8, 8, Arc::new(Mutex::new(Port(said)))).unwrap();
    mmio.attach(layout::VIRTIO_MMIO, 4096, log(layout::VIRTIO_MMIO)).unwrap();
    let vcpu = Handle::spawn(
        0,
        vcpu(&kvm, &vm, buses(pio, mmio)),
        &ThreadStart::default(),
        |_, why: Stopped| panic!("{why:?}"),
    )
    .unwrap();
    let wait = Duration::from_secs(10);
    vcpu.resume(0);
    hear.recv_timeout(wait).unwrap();
    let before =
        [(0x70, vec![10]), (layout::VIRTIO_MMIO + 0x20, vec![10, 0, 0, 0]), (0x71, vec![10])];
    let mut made: Vec<_> = written.lock().drain(..).collect();
    assert_eq!(made.split_off(3), vec![(0x70, vec![11]); 200]);
    assert_eq!(made, before);
    // The last write is kept until something makes the vCPU leave KVM_RUN.
    let deadline = Instant::now() + wait;
    while memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap() != 12 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(written.lock().is_empty(), vm.coalesces);
    vcpu.park().wait().unwrap();
    assert_eq!(*written.lock(), [(0x70, vec![12])]);
}

#[test]
fn a_burst_of_output_arrives_although_the_guest_does_not_exit_after_it() {
    let code = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb9, 100, 0,    // mov cx, 100
        0xee, // out dx, al
        0x40, // inc ax
        0xe2, 0xfc, // loop to the out
        0xa2, 0x00, 0x20, // mov [0x2000], al
        0xf4, // hlt
    ];
    let (kvm, _, vm) = machine(&code);
    let (said, hear) = channel();
    let mut pio = BusBuilder::default();
    pio.attach(0x3f8, 8, Arc::new(Mutex::new(Port(said)))).unwrap();
    let cpu = vcpu(&kvm, &vm, buses(pio, BusBuilder::default()));
    let begin = cpu.save().unwrap();
    let vcpu = Handle::spawn(0, cpu, &ThreadStart::default(), |_, why: Stopped| panic!("{why:?}"))
        .unwrap();
    let heard = |count| {
        let next = || hear.recv_timeout(Duration::from_secs(10)).unwrap();
        (0..count).map(|_| next()).collect::<Vec<_>>()
    };
    for pause in [false, true, false] {
        vcpu.resume(0);
        let mut bytes = heard(if pause { 10 } else { 100 });
        vcpu.park().wait().unwrap();
        if pause {
            // Nothing is kept while the machine is paused.
            bytes.extend(hear.try_iter());
            let written = bytes.len();
            std::thread::sleep(Duration::from_millis(20));
            assert!(hear.try_recv().is_err());
            vcpu.resume(0);
            bytes.extend(heard(100 - written));
            vcpu.park().wait().unwrap();
        }
        assert_eq!(bytes, (0..100).map(|byte| vec![byte]).collect::<Vec<_>>());
        vcpu.restore(begin.clone()).wait().unwrap().unwrap();
    }
}

/// Memory of each kind whose replacement KVM may not notice by itself, filled with 7.
fn memories(config: &MemoryConfig) -> Vec<(Memory, Origin)> {
    let full = vec![7; usize::try_from(config.size.bytes()).unwrap()];
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&full).unwrap();
    let anonymous = memory::allocate(config).unwrap();
    anonymous.write_slice(&full, GuestAddress(0)).unwrap();
    vec![
        (anonymous, Origin::Written),
        (memory::image::map(config, &file, &[]).unwrap(), Origin::Mapped),
    ]
}

#[test]
fn a_guest_that_runs_sees_zeros_where_memory_was_given_back_and_only_we_know_that_it_was_written() {
    const PAGE: u64 = memory::image::PAGE_SIZE;
    let code = [
        0x67, 0x66, 0xa1, 0x00, 0x50, 0x20, 0x00, // mov eax, [0x205000]
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x66, 0xef, // out dx, eax
        0x67, 0xa2, 0x00, 0x00, 0x40, 0x00, // mov [0x400000], al
        0xeb, 0xec, // jmp to the first one
    ];
    let config = MemoryConfig::new(MemorySize::MIN);
    let kvm = open().unwrap();
    for (memory, origin) in memories(&config) {
        memory.write_slice(&code, GuestAddress(0x1000)).unwrap();
        let reclaimer = Reclaimer::new(&memory, &config, origin);
        let window = Arc::new(MmapRegion::new(4096).unwrap());
        let vm =
            Vm::new(&kvm, crate::kvm::create_vm(&kvm).unwrap(), &memory, &window, false).unwrap();
        vm.log_dirty(true).unwrap();
        let (said, hear) = channel();
        let mut pio = BusBuilder::default();
        pio.attach(0x3f8, 8, Arc::new(Mutex::new(Port(said)))).unwrap();
        let cpu = vcpu(&kvm, &vm, buses(pio, BusBuilder::default()));
        let vcpu =
            Handle::spawn(0, cpu, &ThreadStart::default(), |_, why: Stopped| panic!("{why:?}"))
                .unwrap();
        let wait = Duration::from_secs(10);
        vcpu.resume(0);
        assert_eq!(hear.recv_timeout(wait).unwrap(), [7; 4]);
        memory::image::forget_dirty(&memory);
        reclaimer.discard(GuestAddress(2 << 20), 1 << 20);
        assert!((0..1000).any(|_| hear.recv_timeout(wait).unwrap() == [0; 4]));
        vcpu.park().wait().unwrap();
        let by_vcpus = vm.dirty().unwrap();
        let bit =
            |address: u64| by_vcpus[0][(address / PAGE / 64) as usize] >> (address / PAGE % 64) & 1;
        assert_eq!((bit(0x20_5000), bit(0x40_0000)), (0, 1));
        let dirty = memory::image::dirty(&memory, &by_vcpus).unwrap();
        assert_eq!(dirty, [2 << 20..3 << 20, 4 << 20..(4 << 20) + PAGE]);
        assert_eq!(reclaimer.counts().taken, 1 << 20);
    }
}

#[test]
fn a_clock_that_stood_is_ahead_by_the_gap_and_never_back() {
    let clock = |nanoseconds, date| Clock { nanoseconds, date };
    assert_eq!(clock(7, Some(1000)).at(1500), 507);
    assert_eq!(clock(7, Some(1000)).at(999), 7, "the host's date went back");
    assert_eq!(clock(7, Some(1000)).at(0), 7);
    assert_eq!(clock(7, None).at(1500), 7);
    assert_eq!(clock(u64::MAX - 1, Some(0)).at(u64::MAX), u64::MAX);
}

#[test]
fn kvm_takes_a_clock_as_it_stood_or_ahead_by_the_gap() {
    const MINUTE: u64 = 60_000_000_000;
    let kvm = open().unwrap();
    let config = MemoryConfig::new(MemorySize::MIN);
    let memory = memory::allocate(&config).unwrap();
    let window = Arc::new(MmapRegion::new(4096).unwrap());
    let mut vm =
        Vm::new(&kvm, crate::kvm::create_vm(&kvm).unwrap(), &memory, &window, false).unwrap();
    // Advanced by KVM, if it can do that, and by this program.
    for takes_date in [vm.own.takes_date, false] {
        vm.own.takes_date = takes_date;
        let now = vm.clock().unwrap().date.unwrap();
        for (date, advance, gap) in [
            (Some(now - 10 * MINUTE), false, 0),
            (Some(now - 10 * MINUTE), true, 10 * MINUTE),
            (Some(now + 10 * MINUTE), true, 0),
            (None, true, 0),
        ] {
            vm.set_clock(Clock { nanoseconds: MINUTE, date }, advance).unwrap();
            let shows = vm.clock().unwrap().nanoseconds;
            let least = MINUTE + gap;
            assert!((least..least + 5 * MINUTE).contains(&shows), "{date:?} {advance}: {shows}");
        }
    }
}
