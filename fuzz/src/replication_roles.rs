//! Both roles of a monitor whose peer sends anything: frames with right checksums and any bodies,
//! among them those of a real session. Whatever comes, the thread of the role ends in order, and a
//! primary's memory is what it was.
//!
//! An input is a sequence of frames: the kind, a length of two bytes, and the body.
use std::{
    io::{Read, Write},
    net::Shutdown,
    ops::Range,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use config::{Description, MemoryConfig, incoming::Arbiter};
use machine::{
    Memory, Pages, Taken, Tsc,
    memory::{allocate, image},
};
use replication::{
    Command, Epoch, Identity, Incarnation, Input, Lineage, Message, OnLoss, Primary, Rules,
    Settings, Term, wire,
};
use state::{
    cpu::Cpu,
    testing::{MEMORY, config, sections},
};
use transport::{Descriptors, Security};
use vmm::{
    checkpoint::Received,
    replication::{
        history::Pause,
        keeper::{Keeper, Wanted},
        offer::{Host, Offer},
        protector::{self, Manner, Order, Orders, Protector, Report, Way},
        settings::agreement,
        standby::{self, Builder, Standby, ToStandby},
    },
    wake::Wake,
};

/// A byte of each side comes more often.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer waits for what it answers to.
const PATIENCE: Duration = Duration::from_millis(20);
const TSC: Tsc = Tsc { khz: 2_000_000, ticks: 0, own: true };
/// Kind, length and checksum.
const AROUND: usize = 12;

fn memory() -> Memory {
    allocate(&MemoryConfig::new(MEMORY.try_into().unwrap())).unwrap()
}

/// The frames that an input describes.
fn frames(mut input: &[u8]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let [kind, low, high, rest @ ..] = input {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, left) = rest.split_at(length);
        let mut frame = u32::from(*kind).to_le_bytes().to_vec();
        frame.extend(u32::try_from(length).unwrap().to_le_bytes());
        frame.extend(body);
        frame.extend(crc32fast::hash(&frame).to_le_bytes());
        frames.push(frame);
        input = left;
    }
    frames
}

/// The input that describes these frames.
fn input(mut bytes: &[u8]) -> Vec<u8> {
    let mut input = Vec::new();
    while let Some((kind, rest)) = bytes.split_first_chunk::<4>()
        && let Some((length, _)) = rest.split_first_chunk::<4>()
    {
        let size = u32::from_le_bytes(*length) as usize;
        let Some(body) = bytes.get(8..8 + size) else { break };
        if let (Ok(kind), Ok(length)) =
            (u8::try_from(u32::from_le_bytes(*kind)), u16::try_from(size))
        {
            input.push(kind);
            input.extend(length.to_le_bytes());
            input.extend(body);
        }
        bytes = bytes.get(size + AROUND..).unwrap_or_default();
    }
    input
}

/// Gives memory, and builds nothing.
struct Nothing(u32, Wake);

impl Builder for Nothing {
    fn disks(&self, _: &Description) -> Result<Vec<Wanted>, String> {
        Ok(Vec::new())
    }

    fn room(
        &mut self,
        description: Description,
        _: Option<(Option<Cpu>, Tsc)>,
    ) -> Result<Memory, String> {
        match description.config.memory.size.bytes() {
            MEMORY => Ok(memory()),
            other => Err(format!("{other} bytes")),
        }
    }

    fn build(&mut self, _: Received) {
        self.done();
    }

    fn forget(&mut self) {
        self.done();
    }

    fn take(&mut self) {
        self.done();
    }

    fn answer(&mut self) -> Option<Result<(), String>> {
        self.0 = self.0.checked_sub(1)?;
        Some(Ok(()))
    }
}

impl Nothing {
    fn done(&mut self) {
        self.0 += 1;
        self.1.wake();
    }
}

struct Backup {
    address: SocketAddr,
    end: Box<dyn FnOnce()>,
}

impl Backup {
    fn start() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("replication-roles-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let (orders, inbox) = channel();
        let wake = Wake::new().unwrap();
        let task = standby::Task {
            listener: listener.into(),
            security: Security::Plain(false),
            arbiter: Arbiter::None,
            incarnation: Incarnation(2),
            process: None,
            orders: inbox,
            wake: wake.clone(),
            status: Arc::default(),
        };
        let builder = Nothing(0, wake.clone());
        let (keeper, keep) = Keeper::new(wake.clone());
        let thread = thread::spawn(move || {
            thread::scope(|scope| {
                scope.spawn(keep);
                drop(Standby::new(task, builder, keeper, |_| {}).run());
            });
        });
        let end = Box::new(move || {
            // It may have ended.
            let _ = orders.send(ToStandby::End);
            wake.wake();
            thread.join().unwrap();
        });
        Self { address, end }
    }
}

/// A backup whose primary sends these frames.
pub fn backup(input: &[u8]) {
    let backup = Backup::start();
    let mut stream = UnixStream::connect_addr(&backup.address).unwrap();
    for frame in frames(input) {
        if stream.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // It has read everything when it closes the connection.
    let _ = stream.read_to_end(&mut Vec::new());
    (backup.end)();
}

struct Protected {
    memory: Memory,
    orders: Arc<Orders>,
    status: Arc<parking_lot::Mutex<qmp::schema::ReplicationInfo>>,
    main: thread::JoinHandle<()>,
}

impl Protected {
    /// A primary that is connected to `stream`.
    fn start(stream: UnixStream) -> Self {
        let settings = Settings {
            agreement: agreement(&Arbiter::None, true),
            timeout: TIMEOUT,
            period: Duration::from_millis(2),
            ack_limit: TIMEOUT,
            on_loss: OnLoss::Continue,
            leave_slow: false,
        };
        let me = Identity { lineage: Lineage(1), incarnation: Incarnation(1) };
        let (wake, (to, inbox)) = (Wake::new().unwrap(), channel());
        let (memory, status) = (memory(), Arc::default());
        image::write(&memory, 0x5000, b"guest").unwrap();
        let host = Host::of(Arbiter::None, TSC, None);
        let task = protector::Task {
            primary: Primary::new(me, Term(1), settings, Rules::ALL),
            offer: Offer {
                timeout: TIMEOUT,
                heartbeat: None,
                key: None,
                disks: true,
                host,
                config: config(1),
            },
            way: Way { peer: None, security: Security::Plain(false) },
            disks: None,
            memory: memory.clone(),
            manner: Manner::default(),
            history: Arc::default(),
            start: true,
            orders: inbox,
            wake: wake.clone(),
            status: Arc::clone(&status),
        };
        let (report, reports) = channel();
        let run = move || Protector::new(task, move |told| drop(report.send(told))).run();
        let thread = thread::spawn(run);
        let orders = Arc::new(Orders { to, wake });
        let (answers, contents) = (orders.clone(), memory.clone());
        let main = thread::spawn(move || {
            answer(&reports, &answers, &contents, stream);
            thread.join().unwrap();
        });
        Self { memory, orders, status, main }
    }

    fn end(self) {
        self.orders.give(Order::Command(Input::Forced(Command::Quit)));
        let give_up = Instant::now() + TIMEOUT;
        while !self.main.is_finished() && Instant::now() < give_up {
            thread::sleep(Duration::from_millis(1));
            self.orders.give(Order::Command(Input::Forced(Command::Quit)));
        }
        self.main.join().unwrap();
        let mut kept = [0; 5];
        image::read(&self.memory, 0x5000, &mut kept).unwrap();
        assert_eq!(&kept, b"guest");
    }
}

/// What a main thread answers, with one page that changes in each epoch.
fn answer(reports: &Receiver<Report>, orders: &Orders, memory: &Memory, stream: UnixStream) {
    const CHANGED: Range<u64> = 0x7000..0x8000;
    let mut stream = Some(stream);
    for report in reports {
        match report {
            Report::Log => orders.give(Order::Logging(Arc::new([]))),
            Report::Harvest => orders.give(Order::Changed(Vec::new())),
            Report::Capture { epoch, mut staging, .. } => {
                let text = epoch.0.to_le_bytes();
                image::write(memory, CHANGED.start, &text).unwrap();
                staging.fill(memory, &[CHANGED]).unwrap();
                let none = Duration::ZERO;
                let taken = Box::new(Taken {
                    state: sections().try_into().unwrap(),
                    pages: Pages::Staged(staging),
                    harvest: none,
                    copy: none,
                    state_time: none,
                    system: none,
                });
                let began = Instant::now();
                let (park, harvest, copy, state, all) = (none, none, none, none, none);
                let pause = Pause { began, park, harvest, copy, state, all };
                let outside = Box::default();
                orders.give(Order::Captured { epoch, taken, pause, outside, gates: None });
            }
            Report::Connect => {
                if let Some(stream) = stream.take() {
                    orders.give(Order::Connected(Descriptors::socket(stream.into()).unwrap()));
                }
            }
            Report::Over(..) => return,
            _ => {}
        }
    }
}

/// Reads what a primary sends; the last epoch that was complete.
fn read_epochs(mut from: UnixStream, last: &Mutex<Epoch>) {
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(length @ 1..) = from.read(&mut piece) {
        bytes.extend(&piece[..length]);
        while let Some((_, size)) = bytes.split_first_chunk::<8>().map(|(header, _)| {
            let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
            ((), size as usize + AROUND)
        }) && bytes.len() >= size
        {
            let frame: Vec<u8> = bytes.drain(..size).collect();
            if let Ok((frame, _)) = wire::decode(&frame)
                && let Message::End { .. } = frame.message
            {
                *last.lock().unwrap() = frame.epoch;
            }
        }
    }
}

/// A primary whose backup sends these frames.
pub fn primary(input: &[u8]) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let protected = Protected::start(near);
    let last = Arc::new(Mutex::new(Epoch(0)));
    let (from, seen) = (far.try_clone().unwrap(), last.clone());
    let reader = thread::spawn(move || read_epochs(from, &seen));
    for frame in frames(input) {
        // What is acknowledged has to be there.
        if let Ok((acked, _)) = wire::decode(&frame)
            && acked.message == Message::Ack
        {
            let until = Instant::now() + PATIENCE;
            while *last.lock().unwrap() < acked.epoch && Instant::now() < until {
                thread::sleep(Duration::from_micros(100));
            }
        }
        if far.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = far.shutdown(Shutdown::Both);
    protected.end();
    reader.join().unwrap();
}

/// What each side of a real session has sent, as inputs: for the backup, and for the primary.
#[allow(dead_code, reason = "for seeds")]
pub fn session() -> (Vec<u8>, Vec<u8>) {
    let backup = Backup::start();
    let (near, middle) = UnixStream::pair().unwrap();
    let far = UnixStream::connect_addr(&backup.address).unwrap();
    let protected = Protected::start(near);
    let copy = |mut from: UnixStream, mut to: UnixStream| {
        thread::spawn(move || {
            let (mut all, mut piece) = (Vec::new(), vec![0; 64 << 10]);
            while let Ok(length @ 1..) = from.read(&mut piece) {
                all.extend(&piece[..length]);
                if to.write_all(&piece[..length]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
            all
        })
    };
    let there = copy(middle.try_clone().unwrap(), far.try_clone().unwrap());
    let back = copy(far.try_clone().unwrap(), middle.try_clone().unwrap());
    while protected.status.lock().acked < 4 {
        thread::sleep(Duration::from_millis(1));
    }
    let _ = middle.shutdown(Shutdown::Both);
    let _ = far.shutdown(Shutdown::Both);
    let sent = (input(&there.join().unwrap()), input(&back.join().unwrap()));
    protected.end();
    (backup.end)();
    sent
}
