use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::*;

#[test]
fn a_late_kick_does_not_stop_a_running_vcpu() {
    let mut cpu = Counter::from(0);
    let stray = cpu.kicker().unwrap();
    let entries = cpu.entries.clone();
    let vcpu = Handle::spawn(0, cpu, &ThreadStart::default(), |_, _| {}).unwrap();
    stray.kick();
    vcpu.resume(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while entries.load(Ordering::SeqCst) <= 1000 {
        assert!(Instant::now() < deadline, "it has stopped");
        std::thread::yield_now();
    }
    vcpu.park().wait().unwrap();
    assert!(vcpu.save().wait().unwrap().unwrap() > 1000);
}

#[test]
fn a_vcpu_that_rests_stays_out_of_the_guest_and_still_parks_at_once() {
    let cpu = Counter::from(0);
    let entries = cpu.entries.clone();
    let vcpu = Handle::spawn(0, cpu, &ThreadStart::default(), |_, _| {}).unwrap();
    vcpu.resume(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while entries.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    vcpu.rest(Duration::from_secs(60));
    loop {
        let before = entries.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        if entries.load(Ordering::SeqCst) == before {
            break;
        }
        assert!(Instant::now() < deadline, "it does not rest");
    }
    vcpu.park().wait_for(Duration::from_secs(20)).unwrap();
    let before = entries.load(Ordering::SeqCst);
    vcpu.rest(Duration::from_secs(60));
    vcpu.resume(0);
    while entries.load(Ordering::SeqCst) == before {
        assert!(Instant::now() < deadline, "a rest does not outlast a pause");
    }
}

#[test]
fn parks_saves_and_runs_on() {
    let vcpu = Handle::spawn(0, Counter::from(0), &ThreadStart::default(), |_, _| {}).unwrap();
    vcpu.resume(0);
    vcpu.park().wait().unwrap();
    let save = || vcpu.save().wait().unwrap().unwrap();
    assert_eq!(save(), save(), "a parked vCPU does not run");
    vcpu.restore(1_000_000_000).wait().unwrap().unwrap();
    vcpu.resume(0);
    vcpu.park().wait().unwrap();
    assert!(save() >= 1_000_000_000);
}

#[test]
fn a_vcpu_that_a_device_has_held_for_long_does_what_was_asked_for_last() {
    let mut cpu = Counter::from(0);
    let (held, free) = channel();
    cpu.device = Some(free);
    let entries = cpu.entries.clone();
    let vcpu = Handle::spawn(0, cpu, &ThreadStart::default(), |_, _| {}).unwrap();
    vcpu.resume(0);
    while entries.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    // The caller gives up one request and sends another.
    let given_up = vcpu.park();
    vcpu.resume(3);
    let last = vcpu.park();
    held.send(()).unwrap();
    last.wait_for(Duration::from_secs(20)).unwrap();
    drop(given_up);
    assert_eq!(entries.load(Ordering::SeqCst), 1, "it does not run");
}

#[test]
fn a_thread_carries_another_vcpu() {
    let mut vcpu = Handle::spawn(0, Counter::from(5), &ThreadStart::default(), |_, _| {}).unwrap();
    let cpu = Counter::from(1_000_000_000);
    let entries = cpu.entries.clone();
    vcpu.replace(cpu).unwrap();
    assert_eq!(vcpu.save().wait().unwrap(), Ok(1_000_000_000));
    let entered = entries.load(Ordering::SeqCst);
    vcpu.resume(0);
    while entries.load(Ordering::SeqCst) == entered {
        std::thread::yield_now();
    }
    vcpu.park().wait_for(Duration::from_secs(20)).expect("kicked by its own kicker");
}

#[test]
fn state_asked_of_a_running_vcpu_is_refused_and_it_runs_on() {
    let vcpu = Handle::spawn(0, Counter::from(0), &ThreadStart::default(), |_, _| {}).unwrap();
    vcpu.resume(0);
    let early = vcpu.save();
    vcpu.kick();
    assert!(early.wait().is_err());
    vcpu.park().wait().unwrap();
}

/// A guest that only counts how often it is entered.
struct Counter {
    entries: Arc<AtomicU64>,
    kicked: Arc<AtomicBool>,
    /// A device that blocks its first entry until it is released.
    device: Option<Receiver<()>>,
}
impl From<u64> for Counter {
    fn from(entries: u64) -> Self {
        Self { entries: Arc::new(entries.into()), kicked: Arc::default(), device: None }
    }
}
struct Flag(Arc<AtomicBool>);
impl Kick for Flag {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn thread(&self) -> u32 {
        0
    }
}
impl Cpu for Counter {
    type State = u64;
    type Error = ();
    type Kicker = Flag;
    fn kicker(&mut self) -> io::Result<Flag> {
        Ok(Flag(self.kicked.clone()))
    }
    fn run(&mut self) -> Exit {
        self.entries.fetch_add(1, Ordering::SeqCst);
        if let Some(device) = self.device.take() {
            device.recv().unwrap();
        }
        match self.kicked.swap(false, Ordering::SeqCst) {
            true => Exit::Kicked,
            false => Exit::Handled,
        }
    }
    fn resumed(&mut self, _: i64) {}
    fn save(&self) -> Result<u64, ()> {
        Ok(self.entries.load(Ordering::SeqCst))
    }
    fn restore(&mut self, state: u64) -> Result<(), ()> {
        self.entries.store(state, Ordering::SeqCst);
        Ok(())
    }
}
