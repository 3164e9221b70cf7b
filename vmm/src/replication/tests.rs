//! Both threads of a replication, joined by a socket, without machines: what arrives, and what a
//! broken link, a failed checkpoint or a hostile peer does.
mod bad_frames;

use std::{
    fs,
    io::{Read, Write, pipe},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    ops::Range,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use config::{
    Description, MemoryConfig,
    incoming::{Arbiter as Given, Place, Tls},
};
use machine::{
    Memory, Pages, Taken, Tsc,
    memory::{allocate, image, staging},
};
use parking_lot::Mutex;
use qmp::schema::{
    Event, ReplicationAnswer, ReplicationBlackhole, ReplicationInfo, ReplicationRecord,
    ReplicationResult, ReplicationSide, ReplicationStatus, ReplicationWord, ShutdownCause,
};
use replication::{
    Answer, Command, Digest, Epoch, Exit, Frame, Hello, Identity, Incarnation, Input, Lineage,
    Message, OnLoss, Primary, Question, Record, Rules, Settings, Settled, Side, Term, Word, wire,
};
use state::cpu::Cpu;
use state::testing::{MEMORY, config, sections};
use transport::{Descriptors, Names, Security, testing::Authority};

use super::{
    beside::{Key, Socket},
    copier,
    disks::Disks,
    entrance,
    history::Pause,
    keeper::{Keeper, Wanted, Work},
    offer::{self, Host as Offered, Offer},
    outside::Outside,
    process::Process,
    protector::{Manner, Order, Orders, Protector, Report, Task, Way},
    settings::agreement,
    standby::{self, Builder, Promotion, Standby, Tell, ToStandby},
};
use crate::{
    checkpoint::{IncomingError, ReceiveError, Received},
    wake::Wake,
};

mod disks;

const TIMEOUT: Duration = Duration::from_millis(400);
const TSC: Tsc = Tsc { khz: 2_000_000, ticks: 0, own: true };
const LONG: Duration = Duration::from_secs(20);

fn room() -> Memory {
    allocate(&MemoryConfig::new(MEMORY.try_into().unwrap())).unwrap()
}

/// The whole memory.
fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    image::read(memory, 0, &mut bytes).unwrap();
    bytes
}

fn settings(arbiter: &Given, on_loss: OnLoss) -> Settings {
    Settings {
        agreement: agreement(arbiter, true),
        timeout: TIMEOUT,
        period: Duration::from_millis(5),
        ack_limit: LONG,
        on_loss,
        leave_slow: false,
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "in vain for: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Builds nothing but what building does to memory, and takes its time to put that back.
struct Nobody {
    disks: Vec<Wanted>,
    rooms: Arc<Mutex<Vec<Memory>>>,
    built: Arc<Mutex<u32>>,
    before: Option<(Memory, Vec<u8>)>,
    done: Sender<Result<(), String>>,
    answers: Receiver<Result<(), String>>,
    wake: Wake,
}

impl Nobody {
    fn answer_in(&self, delay: Duration, act: impl FnOnce() + Send + 'static) {
        let (done, wake) = (self.done.clone(), self.wake.clone());
        thread::spawn(move || {
            thread::sleep(delay);
            act();
            // The backup may have ended meanwhile.
            let _ = done.send(Ok(()));
            wake.wake();
        });
    }
}

impl Builder for Nobody {
    fn disks(&self, _: &Description) -> Result<Vec<Wanted>, String> {
        Ok(self.disks.clone())
    }

    fn room(
        &mut self,
        _: Description,
        guest: Option<(Option<Cpu>, Tsc)>,
    ) -> Result<Memory, String> {
        if let Some((_, tsc)) = guest {
            tsc.fits(TSC, false).map_err(|e| e.to_string())?;
        }
        let memory = room();
        self.rooms.lock().push(memory.clone());
        Ok(memory)
    }

    fn build(&mut self, received: Received) {
        let memory = received.memory;
        let before = bytes(&memory);
        image::write(&memory, 0, &[0xaa; 3 * 4096]).unwrap();
        self.before = Some((memory, before));
        *self.built.lock() += 1;
        self.answer_in(Duration::ZERO, || {});
    }

    fn forget(&mut self) {
        let (memory, before) = self.before.take().unwrap();
        self.answer_in(TIMEOUT / 8, move || image::write(&memory, 0, &before).unwrap());
    }

    fn take(&mut self) {
        self.answer_in(Duration::ZERO, || {});
    }

    fn answer(&mut self) -> Option<Result<(), String>> {
        self.answers.try_recv().ok()
    }
}

struct Backup {
    orders: Sender<ToStandby>,
    wake: Wake,
    status: Arc<Mutex<ReplicationInfo>>,
    /// What memory was given, the last last.
    rooms: Arc<Mutex<Vec<Memory>>>,
    /// How often the machine was built.
    built: Arc<Mutex<u32>>,
    /// Asks the thread that has the disks.
    storage: Sender<Work>,
    thread: JoinHandle<Result<Promotion, ReceiveError>>,
}

impl Backup {
    fn at(path: &Path, arbiter: Given) -> Self {
        Self::asking(path, arbiter, Witness::default())
    }

    fn asking(path: &Path, arbiter: Given, witness: Witness) -> Self {
        Self::keeping(path, arbiter, witness, (Vec::new(), 0))
    }

    /// With these disks, and a journal for so many bytes.
    fn keeping(path: &Path, arbiter: Given, witness: Witness, disks: (Vec<Wanted>, u64)) -> Self {
        let listener = UnixListener::bind(path).unwrap().into();
        Self::listening(listener, Security::Plain(false), arbiter, witness, disks)
    }

    fn listening(
        listener: OwnedFd,
        security: Security,
        arbiter: Given,
        witness: Witness,
        (disks, journal): (Vec<Wanted>, u64),
    ) -> Self {
        let (orders, inbox) = channel();
        let (wake, status) = (Wake::new().unwrap(), Arc::<Mutex<ReplicationInfo>>::default());
        let rooms = Arc::<Mutex<Vec<Memory>>>::default();
        let (built, (done, answers)) = (Arc::<Mutex<u32>>::default(), channel());
        let builder = Nobody {
            disks,
            rooms: rooms.clone(),
            built: built.clone(),
            before: None,
            done,
            answers,
            wake: wake.clone(),
        };
        let task = standby::Task {
            listener,
            security,
            arbiter,
            incarnation: Incarnation(2),
            process: Process::own(),
            orders: inbox,
            wake: wake.clone(),
            status: status.clone(),
        };
        let (answers, woken) = (orders.clone(), wake.clone());
        let tell = move |told| {
            if let Tell::Ask(query, lineage) = told {
                let record = decided(&witness, query.question);
                answers.send(ToStandby::Answer(answer(&query.event(lineage), record))).unwrap();
                woken.wake();
            }
        };
        let (keeper, keep) = Keeper::with_room(wake.clone(), journal);
        let storage = keeper.other();
        // It ends once nobody can ask it any more.
        thread::spawn(keep);
        let thread = thread::spawn(move || Standby::new(task, builder, keeper, tell).run());
        Self { orders, wake, status, rooms, built, storage, thread }
    }

    fn memory(&self) -> Vec<u8> {
        bytes(self.rooms.lock().last().unwrap())
    }

    fn end(self) -> Result<Promotion, ReceiveError> {
        self.orders.send(ToStandby::End).unwrap();
        self.wake.wake();
        self.thread.join().unwrap()
    }
}

/// How an agent connects.
type Connect = Box<dyn Fn() -> Option<Descriptors> + Send + Sync>;

/// What the main thread of a primary knows.
struct Host {
    connect: Connect,
    memory: Memory,
    dirty: Mutex<Vec<Range<u64>>>,
    /// The number of the last epoch that was captured.
    captured: Mutex<u64>,
    disks: Option<Arc<Disks>>,
    /// Checkpoints fail.
    fails: Mutex<bool>,
    /// The guest does not run for want of room, and for how many percent of the time it rests; and
    /// the most that was.
    parked: Mutex<bool>,
    throttle: Mutex<(u8, u8)>,
    /// The guest does not run, as an epoch is sent out of its memory; and how often that was so.
    stopped: Mutex<bool>,
    stops: Mutex<u32>,
    /// All states that were told.
    told: Mutex<Vec<ReplicationStatus>>,
    /// What is known of the outside.
    outside: Mutex<Outside>,
    /// Why the backup has refused the offer.
    reasons: Mutex<Vec<String>>,
    record: Witness,
    /// The witness does not answer.
    alone: Mutex<bool>,
}

struct Protected {
    host: Arc<Host>,
    orders: Arc<Orders>,
    status: Arc<Mutex<ReplicationInfo>>,
    main: JoinHandle<Option<Exit>>,
}

/// What is special about a machine that is protected.
struct Special {
    tsc: Tsc,
    disks: Option<Arc<Disks>>,
    ack_limit: Duration,
    manner: Manner,
}

impl Default for Special {
    fn default() -> Self {
        Self { tsc: TSC, disks: None, ack_limit: LONG, manner: Manner::default() }
    }
}

impl Protected {
    fn by(peer: &Path, arbiter: &Given, on_loss: OnLoss) -> Self {
        Self::asking(peer, arbiter, on_loss, Witness::default())
    }

    fn asking(peer: &Path, arbiter: &Given, on_loss: OnLoss, record: Witness) -> Self {
        Self::with_tsc(peer, arbiter, on_loss, record, TSC)
    }

    fn with_tsc(peer: &Path, arbiter: &Given, on_loss: OnLoss, record: Witness, tsc: Tsc) -> Self {
        Self::with(peer, arbiter, on_loss, record, Special { tsc, ..Special::default() })
    }

    fn with(
        peer: &Path,
        arbiter: &Given,
        on_loss: OnLoss,
        record: Witness,
        special: Special,
    ) -> Self {
        let way = Way { peer: Some(peer.to_owned()), security: Security::Plain(false) };
        Self::through((way, Box::new(|| None)), arbiter, on_loss, record, special)
    }

    fn through(
        (way, connect): (Way, Connect),
        arbiter: &Given,
        on_loss: OnLoss,
        record: Witness,
        Special { tsc, disks, ack_limit, manner }: Special,
    ) -> Self {
        let leave_slow = ack_limit < LONG;
        let settings = Settings { ack_limit, leave_slow, ..settings(arbiter, on_loss) };
        let me = Identity { lineage: Lineage(1), incarnation: Incarnation(1) };
        let (wake, status) = (Wake::new().unwrap(), Arc::<Mutex<ReplicationInfo>>::default());
        let (to, inbox) = channel();
        let memory = room();
        let orders = Arc::new(Orders { to, wake: wake.clone() });
        let copier = disks.clone().map(|disks| {
            let arbiter = Some("witness dir:1".to_owned());
            let (handle, run) = copier::new(disks, me.lineage, arbiter, (*orders).clone());
            thread::spawn(run);
            handle
        });
        let task = Task {
            primary: Primary::new(me, Term(1), settings, Rules::ALL),
            offer: Offer {
                timeout: TIMEOUT,
                heartbeat: None,
                key: Some(Key::new().unwrap()),
                disks: true,
                host: Offered::of(arbiter.clone(), tsc, None),
                config: config(1),
            },
            way,
            disks: copier,
            memory: memory.clone(),
            manner,
            start: true,
            orders: inbox,
            wake,
            status: status.clone(),
            history: Arc::default(),
        };
        let host = Arc::new(Host {
            memory,
            dirty: Mutex::default(),
            captured: Mutex::default(),
            disks,
            fails: Mutex::default(),
            parked: Mutex::default(),
            throttle: Mutex::default(),
            stopped: Mutex::default(),
            stops: Mutex::default(),
            told: Mutex::default(),
            outside: Mutex::default(),
            reasons: Mutex::default(),
            record,
            alone: Mutex::default(),
            connect,
        });
        let (report, reports) = channel();
        thread::spawn(move || Protector::new(task, move |r| report.send(r).unwrap()).run());
        let (of_main, given) = (host.clone(), orders.clone());
        let main = thread::spawn(move || of_main.serve(&reports, &given));
        Self { host, orders, status, main }
    }

    fn state(&self) -> ReplicationStatus {
        self.status.lock().state
    }

    fn is_protected(&self) {
        wait_for("protection", || self.state() == ReplicationStatus::Protected);
    }

    /// The guest changes memory, and this is at the backup.
    fn writes(&self, random: &mut fastrand::Rng) {
        for _ in 0..random.usize(1..40) {
            let at = random.u64(..MEMORY / 4096) * 4096;
            let mut page = [0; 4096];
            match random.u8(..3) {
                0 => {}
                1 => random.fill(&mut page),
                _ => page[random.usize(..4096)] = random.u8(..),
            }
            self.puts(at, &page);
        }
    }

    /// The guest changes a page, once it runs.
    fn puts(&self, at: u64, page: &[u8; 4096]) {
        // As one step, so that no checkpoint is in between.
        let mut dirty = loop {
            let dirty = self.host.dirty.lock();
            if !*self.host.stopped.lock() && !*self.host.parked.lock() {
                break dirty;
            }
            drop(dirty);
            thread::sleep(Duration::from_millis(1));
        };
        image::write(&self.host.memory, at, page).unwrap();
        dirty.push(at..at + 4096);
    }

    /// Everything that was written until now is at the backup.
    fn settles(&self) {
        let last = *self.host.captured.lock();
        wait_for("a later checkpoint", || self.status.lock().acked > last);
    }

    fn is_equal(&self, backup: &Backup) {
        self.settles();
        assert!(bytes(&self.host.memory) == backup.memory(), "the memories differ");
    }

    fn command(&self, command: Command) {
        self.orders.give(Order::Command(Input::Command(command)));
    }
}

impl Host {
    fn serve(&self, reports: &Receiver<Report>, orders: &Orders) -> Option<Exit> {
        for report in reports {
            match report {
                Report::Log => {
                    self.dirty.lock().clear();
                    orders.give(Order::Logging(Arc::new([])));
                }
                Report::Harvest => {
                    let dirty = std::mem::take(&mut *self.dirty.lock());
                    orders.give(Order::Changed(image::union(&dirty, &[])));
                }
                Report::Capture { .. } if *self.fails.lock() => {
                    orders.give(Order::Failed("as the test wants it".into()));
                }
                Report::Capture { epoch, left, mut staging, most, .. } => {
                    let mut dirty = self.dirty.lock();
                    let ranges = image::union(&left, &std::mem::take(&mut *dirty));
                    let pages = if staging::bytes(&ranges) > most {
                        *self.stopped.lock() = true;
                        *self.stops.lock() += 1;
                        Pages::InPlace(ranges)
                    } else {
                        staging.fill(&self.memory, &ranges).unwrap();
                        Pages::Staged(staging)
                    };
                    self.disks.iter().for_each(|disks| disks.capture(epoch.0));
                    *self.captured.lock() = epoch.0;
                    let none = Duration::ZERO;
                    let taken = Box::new(Taken {
                        state: sections().try_into().unwrap(),
                        pages,
                        harvest: none,
                        copy: none,
                        state_time: none,
                        system: none,
                    });
                    let pause = Pause {
                        began: Instant::now(),
                        park: none,
                        harvest: none,
                        copy: none,
                        state: none,
                        all: none,
                    };
                    let outside = Box::new((self.outside.lock().clone(), None));
                    orders.give(Order::Captured { epoch, taken, pause, outside, gates: None });
                }
                Report::Ask(query) if !*self.alone.lock() => {
                    let answer = Answer::Record(decided(&self.record, query.question));
                    let (nonce, question) = (query.nonce, query.question);
                    orders.give(Order::Answered { nonce, question, answer });
                }
                Report::Copied => *self.stopped.lock() = false,
                Report::Tell { state, reason, .. } => {
                    self.told.lock().push(state);
                    self.reasons.lock().extend(reason);
                }
                Report::Park(park) => *self.parked.lock() = park,
                Report::Throttle(percent) => {
                    let mut throttle = self.throttle.lock();
                    *throttle = (percent, throttle.1.max(percent));
                }
                Report::Connect => {
                    (self.connect)().into_iter().for_each(|ends| {
                        orders.give(Order::Connected(ends));
                    });
                }
                Report::Ask(_) | Report::Unlog | Report::Released(_) => {}
                Report::Over(exit, _) => return exit,
            }
        }
        None
    }
}

/// Grants what is claimed first.
type Witness = Arc<Mutex<Option<Record>>>;

fn decided(witness: &Witness, question: Question) -> Option<Record> {
    let mut record = witness.lock();
    if let Question::Claim { word, party, .. } = question {
        record.get_or_insert(Record { word, winner: party, settled: None });
    }
    *record
}

/// What an agent answers to a backup.
fn answer(asked: &Event, record: Option<Record>) -> ReplicationAnswer {
    let Event::ReplicationNeeds { nonce, need, .. } = *asked else { panic!("{asked:?}") };
    let record = record.map(|record| ReplicationRecord {
        word: match record.word {
            Word::Promote => ReplicationWord::Promote,
            _ => ReplicationWord::Solo,
        },
        side: match record.winner.side {
            Side::Primary => ReplicationSide::Primary,
            Side::Backup => ReplicationSide::Backup,
        },
        incarnation: record.winner.incarnation.to_string(),
        settled: None,
        yielded_to: None,
    });
    let result = ReplicationResult::Record;
    ReplicationAnswer { nonce, need, result, fd: None, write_fd: None, record, reason: None }
}

/// Forwards connections between two sockets, until they are cut.
struct Link {
    ends: Arc<Mutex<Vec<UnixStream>>>,
    /// No other connection is forwarded.
    gone: Arc<Mutex<bool>>,
    /// How long each 64 KiB take.
    slow: Arc<Mutex<Duration>>,
    /// Nothing is forwarded meanwhile.
    stuck: Arc<Mutex<bool>>,
}

impl Link {
    fn between(from: &Path, to: &Path) -> Self {
        let (listener, to) = (UnixListener::bind(from).unwrap(), to.to_owned());
        let ends = Arc::<Mutex<Vec<UnixStream>>>::default();
        let gone = Arc::<Mutex<bool>>::default();
        let slow = Arc::<Mutex<Duration>>::default();
        let stuck = Arc::<Mutex<bool>>::default();
        let (kept, over, slows, held) = (ends.clone(), gone.clone(), slow.clone(), stuck.clone());
        thread::spawn(move || {
            for near in listener.incoming() {
                if *over.lock() {
                    continue;
                }
                let (near, far) = (near.unwrap(), UnixStream::connect(&to).unwrap());
                for (mut from, mut to) in [(&near, &far), (&far, &near)]
                    .map(|(a, b)| (a.try_clone().unwrap(), b.try_clone().unwrap()))
                {
                    let (slow, stuck) = (slows.clone(), held.clone());
                    thread::spawn(move || {
                        let mut piece = vec![0; 64 << 10];
                        // A cut ends it.
                        while let Ok(length @ 1..) = from.read(&mut piece) {
                            while *stuck.lock() {
                                thread::sleep(Duration::from_millis(1));
                            }
                            if to.write_all(&piece[..length]).is_err() {
                                break;
                            }
                            let share = u32::try_from(length).unwrap();
                            thread::sleep(*slow.lock() * share / (64 << 10));
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
                kept.lock().extend([near, far]);
            }
        });
        Self { ends, gone, slow, stuck }
    }

    fn cut(&self) {
        for end in self.ends.lock().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (near, far) = (directory.path().join("near"), directory.path().join("far"));
    (directory, near, far)
}

fn witness() -> Given {
    Given::Witness("dir:1".into())
}

#[test]
fn memory_is_equal_whatever_the_guest_writes_and_how_often_the_link_breaks() {
    memory_is_equal(Manner::default());
    let uncompressed = Manner { compress: false, ..Manner::default() };
    memory_is_equal(uncompressed);
}

/// The guest is stopped while such an epoch is sent.
#[test]
fn memory_is_equal_although_an_epoch_is_too_large_to_be_copied_aside() {
    let stops = memory_is_equal(Manner { max_staging: 64 << 10, ..Manner::default() });
    assert!(stops > 0, "none was too large");
}

/// How often the guest stood still.
fn memory_is_equal(manner: Manner) -> u32 {
    let (_directory, near, far) = places();
    let backup = Backup::at(&far, Given::None);
    let link = Link::between(&near, &far);
    let witness = Witness::default();
    let protected = Protected::with(
        &near,
        &Given::None,
        OnLoss::Stall,
        witness,
        Special { manner, ..Special::default() },
    );
    let mut random = fastrand::Rng::with_seed(1);
    protected.writes(&mut random);
    protected.is_protected();
    for _ in 0..5 {
        for _ in 0..10 {
            protected.writes(&mut random);
            thread::sleep(Duration::from_millis(3));
        }
        protected.is_equal(&backup);
        let stalls = protected.status.lock().stalls;
        link.cut();
        protected.writes(&mut random);
        wait_for("a stall", || protected.status.lock().stalls > stalls);
        protected.is_protected();
    }
    protected.is_equal(&backup);
    assert_eq!(backup.rooms.lock().len(), 1, "nothing was sent again from the beginning");
    assert_eq!(backup.status.lock().state, ReplicationStatus::Standby);
    *protected.host.stops.lock()
}

/// For as long as it lasts, memory is bounded, and the guest stays protected and runs.
#[test]
fn a_guest_that_changes_more_than_the_link_takes_is_slowed_down() {
    const MOST: u64 = 2 << 20;
    let (_directory, near, far) = places();
    let backup = Backup::at(&far, Given::None);
    let link = Link::between(&near, &far);
    let manner = Manner { max_staging: MOST, ..Manner::default() };
    let witness = Witness::default();
    let protected = Protected::with(
        &near,
        &Given::None,
        OnLoss::Stall,
        witness,
        Special { manner, ..Special::default() },
    );
    protected.is_protected();
    // 3 MB/s.
    *link.slow.lock() = Duration::from_millis(20);
    let mut random = fastrand::Rng::with_seed(1);
    let (mut rounds, mut held) = (0, 0);
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        // Some 20 MB/s, if nothing stops it.
        for _ in 0..40 {
            let mut page = [0; 4096];
            random.fill(&mut page);
            protected.puts(random.u64(..MEMORY / 4096) * 4096, &page);
        }
        rounds += 1;
        let rests = u32::from(protected.host.throttle.lock().0);
        thread::sleep(Duration::from_millis(8) + Duration::from_millis(8) * rests / 100);
        let shown = protected.status.lock().clone();
        assert_eq!(shown.stalls, 0);
        assert!(shown.staged_bytes <= MOST, "{} bytes", shown.staged_bytes);
        held = held.max(shown.staged_bytes);
    }
    assert!(rounds > 20 && held > MOST / 2, "{rounds} rounds, {held} bytes");
    assert!(protected.host.throttle.lock().1 > 0, "it was never slowed down");
    *link.slow.lock() = Duration::ZERO;
    protected.is_equal(&backup);
    wait_for("full speed", || protected.host.throttle.lock().0 == 0);
}

#[test]
fn replication_into_nothing_takes_checkpoints_and_never_calls_the_guest_protected() {
    for blackhole in [ReplicationBlackhole::Checkpoint, ReplicationBlackhole::Harvest] {
        let (_directory, nobody, _) = places();
        let manner = Manner { blackhole: Some(blackhole), ..Manner::default() };
        let (none, witness) = (Given::None, Witness::default());
        let protected = Protected::with(
            &nobody,
            &none,
            OnLoss::Stall,
            witness,
            Special { manner, ..Special::default() },
        );
        wait_for("checkpoints", || protected.state() == ReplicationStatus::Blackhole);
        protected.writes(&mut fastrand::Rng::with_seed(1));
        let seen = protected.status.lock().acked;
        wait_for("more of them", || protected.status.lock().acked > seen + 5);
        assert_eq!(protected.status.lock().stalls, 0);
        let told = protected.host.told.lock().clone();
        assert!(!told.contains(&ReplicationStatus::Protected), "{told:?}");
        protected.command(Command::Unprotect);
        assert_eq!(protected.main.join().unwrap(), None);
    }
}

#[test]
fn a_backup_that_has_built_the_machine_serves_its_primary_again() {
    let (_directory, near, far) = places();
    let backup = Backup::at(&far, Given::None);
    let link = Link::between(&near, &far);
    let protected = Protected::by(&near, &Given::None, OnLoss::Stall);
    let mut random = fastrand::Rng::with_seed(5);
    protected.is_protected();
    for flap in 1..5 {
        *link.gone.lock() = true;
        link.cut();
        protected.writes(&mut random);
        wait_for("a machine", || *backup.built.lock() == flap);
        *link.gone.lock() = false;
        protected.is_protected();
        protected.writes(&mut random);
        protected.is_equal(&backup);
    }
    assert_eq!(backup.rooms.lock().len(), 1, "nothing was sent again from the beginning");
    assert_eq!(backup.status.lock().state, ReplicationStatus::Standby);
}

#[test]
fn after_a_false_suspicion_only_what_has_changed_is_sent_again() {
    let (_directory, near, far) = places();
    let record = Witness::default();
    let backup = Backup::asking(&far, witness(), record.clone());
    let link = Link::between(&near, &far);
    let protected = Protected::asking(&near, &witness(), OnLoss::Claim, record.clone());
    let mut random = fastrand::Rng::with_seed(6);
    let mut contents = vec![0; MEMORY as usize];
    random.fill(&mut contents);
    image::write(&protected.host.memory, 0, &contents).unwrap();
    protected.host.dirty.lock().push(0..MEMORY);
    protected.is_protected();
    protected.is_equal(&backup);
    let full = protected.status.lock().wire_bytes;
    for term in 2..5 {
        *link.gone.lock() = true;
        link.cut();
        (0..10).for_each(|_| protected.writes(&mut random));
        wait_for("the term's end", || protected.status.lock().term == term);
        wait_for("the backup to know", || {
            backup.status.lock().state == ReplicationStatus::Abandoned
        });
        (0..10).for_each(|_| protected.writes(&mut random));
        // The next term is open.
        *record.lock() = None;
        *link.gone.lock() = false;
        let (settings, arbiter) = (settings(&witness(), OnLoss::Claim), witness());
        let way = Way { peer: Some(near.clone()), security: Security::Plain(false) };
        let manner = Manner::default();
        protected.orders.give(Order::Again { settings, arbiter, way, manner });
        protected.is_protected();
        let warm = protected.status.lock().wire_bytes;
        assert!(full > MEMORY && warm < MEMORY / 4, "{full} bytes, then {warm}");
        protected.is_equal(&backup);
    }
    assert_eq!(backup.rooms.lock().len(), 1);
}

#[test]
fn nobody_is_suspected_while_the_second_path_has_signs_of_life() {
    for second_path in [true, false] {
        let (_directory, near, far) = places();
        let record = Witness::default();
        let backup = Backup::asking(&far, witness(), record.clone());
        let link = Link::between(&near, &far);
        let protected = Protected::asking(&near, &witness(), OnLoss::Claim, record);
        if second_path {
            let ends =
                [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
            ends[0].connect(ends[1].local_addr().unwrap()).unwrap();
            let [here, there] = ends.map(|end| Socket::new(end.into()).unwrap());
            protected.orders.give(Order::Beside(here));
            backup.orders.send(ToStandby::Beside(there)).unwrap();
            backup.wake.wake();
            let both = || [&protected.status, &backup.status].map(|s| s.lock().second_path_beats);
            wait_for("signs of life", || both().iter().all(|beats| *beats > 0));
        }
        protected.is_protected();
        *link.stuck.lock() = true;
        thread::sleep(3 * TIMEOUT);
        *link.stuck.lock() = false;
        let stalls = || protected.status.lock().stalls + backup.status.lock().stalls;
        if second_path {
            let acked = protected.status.lock().acked;
            wait_for("checkpoints", || protected.status.lock().acked > acked);
            assert_eq!(stalls(), 0);
            protected.is_protected();
        } else {
            wait_for("a suspicion", || stalls() > 0);
        }
        drop(backup.end());
    }
}

#[test]
fn a_monitor_that_ends_leaves_no_backup_that_would_continue() {
    for arbiter in [Given::None, witness()] {
        let (_directory, _, far) = places();
        let backup = Backup::at(&far, arbiter.clone());
        let on_loss = if arbiter == Given::None { OnLoss::Stall } else { OnLoss::Claim };
        let protected = Protected::by(&far, &arbiter, on_loss);
        protected.is_protected();
        protected.command(Command::Quit);
        let record = protected.host.clone();
        assert_eq!(protected.main.join().unwrap(), Some(Exit::Done));
        match arbiter {
            // It has said that it never will.
            Given::None => assert!(backup.thread.join().unwrap().is_err()),
            _ => {
                assert_eq!(record.record.lock().unwrap().word, Word::End);
                assert!(backup.end().is_err());
            }
        }
    }
}

#[test]
fn a_checkpoint_that_fails_ends_the_term_instead_of_holding_output_for_ever() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, witness());
    let protected = Protected::by(&far, &witness(), OnLoss::Claim);
    protected.is_protected();
    *protected.host.fails.lock() = true;
    wait_for("the term's end", || {
        protected.host.told.lock().contains(&ReplicationStatus::Degraded)
    });
    assert_eq!(protected.host.record.lock().unwrap().word, Word::Solo);
    assert_eq!(protected.status.lock().term, 2);
    let told = protected.host.told.lock().clone();
    let at = |state| told.iter().position(|told| *told == state);
    assert!(at(ReplicationStatus::Stalled) < at(ReplicationStatus::Degraded), "{told:?}");
    assert!(at(ReplicationStatus::Protected) < at(ReplicationStatus::Stalled), "{told:?}");
    assert!(backup.end().is_err());
}

#[test]
fn a_backup_that_does_not_suit_says_why_before_anything_is_sent() {
    let slow = Tsc { khz: 1_900_000, ..TSC };
    let cases = [
        (witness(), TSC, "for the primary, the witness \"dir:1\" decides; for the backup, neither"),
        (Given::None, slow, "ticks at 1900000 kHz, this host's at 2000000 kHz"),
        (Given::None, Tsc { own: false, ..TSC }, "a TSC of their own"),
    ];
    for (arbiter, tsc, why) in cases {
        let (_directory, _, far) = places();
        let backup = Backup::at(&far, Given::None);
        let on_loss = if arbiter == Given::None { OnLoss::Stall } else { OnLoss::Claim };
        let protected = Protected::with_tsc(&far, &arbiter, on_loss, Witness::default(), tsc);
        assert_eq!(protected.main.join().unwrap(), None, "unprotected, and unharmed");
        let reasons = protected.host.reasons.lock().clone();
        assert!(reasons.iter().any(|said| said.contains(why)), "{reasons:?}");
        assert!(backup.rooms.lock().is_empty(), "it has made room");
        assert_eq!(backup.status.lock().state, ReplicationStatus::Listening);
        assert!(backup.end().is_err());
    }
}

#[test]
fn the_backup_continues_the_guest_and_its_primary_ends() {
    let (_directory, near, far) = places();
    let record = Witness::default();
    let backup = Backup::asking(&far, witness(), record.clone());
    let link = Link::between(&near, &far);
    let protected = Protected::asking(&near, &witness(), OnLoss::Claim, record.clone());
    protected.is_protected();
    // The guest was stopped, and clients do not know yet that it had reset itself before.
    let reset = Event::Reset { guest: true, reason: ShutdownCause::GuestReset };
    let outside = Outside { paused: true, events: vec![reset], output: Vec::new() };
    *protected.host.outside.lock() = outside.clone();
    let mut random = fastrand::Rng::with_seed(4);
    (0..20).for_each(|_| protected.writes(&mut random));
    protected.is_equal(&backup);
    // It has neither its backup nor the witness any more.
    (*protected.host.alone.lock(), *link.gone.lock()) = (true, true);
    link.cut();
    // Its machine has changed it a little.
    let memory =
        |rooms: &Mutex<Vec<Memory>>| bytes(rooms.lock().last().unwrap()).split_off(3 * 4096);
    let rooms = backup.rooms.clone();
    let promotion = backup.thread.join().unwrap().unwrap();
    assert_eq!((promotion.term, promotion.promoted), (Term(2), Some(Incarnation(2))));
    assert_eq!(promotion.outside, outside);
    assert!(promotion.epoch.0 >= protected.status.lock().acked);
    assert!(bytes(&protected.host.memory).split_off(3 * 4096) == memory(&rooms));
    assert_eq!(protected.state(), ReplicationStatus::Stalled);
    *protected.host.alone.lock() = false;
    wait_for("the fence", || protected.state() == ReplicationStatus::Fenced);
    if let Some(record) = &mut *record.lock() {
        record.settled = Some(Settled::Running);
    }
    assert_eq!(protected.main.join().unwrap(), Some(Exit::Fenced));
}

#[test]
fn a_late_connection_does_not_replace_the_one_that_works() {
    let (directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let protected = Protected::by(&far, &Given::None, OnLoss::Stall);
    protected.is_protected();
    let other = directory.path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    let late = UnixStream::connect(&other).unwrap();
    protected.orders.give(Order::Connected(Descriptors::socket(late.into()).unwrap()));
    let (mut late, _) = listener.accept().unwrap();
    late.set_read_timeout(Some(LONG)).unwrap();
    // It is closed again; at most the offer has come.
    late.read_to_end(&mut Vec::new()).unwrap();
    protected.is_equal(&backup);
    let info = protected.status.lock().clone();
    assert_eq!((info.state, info.stalls), (ReplicationStatus::Protected, 0));
}

/// Writes and checkpoints, through what joins these two.
fn replicates(protected: &Protected, backup: &Backup) {
    protected.is_protected();
    let mut random = fastrand::Rng::with_seed(6);
    for _ in 0..5 {
        (0..20).for_each(|_| protected.writes(&mut random));
        protected.is_equal(backup);
    }
}

#[test]
fn over_tcp_both_sides_speak_tls_and_a_stranger_gets_nowhere() {
    let (ours, theirs) = (Authority::generate(), Authority::generate());
    let (own, stranger) = (ours.directory(&ours), theirs.directory(&ours));
    let tls = Tls::Directory(own.path().to_owned());
    let place = Place::Tcp("127.0.0.1:0".into());
    let (listener, file) = entrance::listen(&place, &tls).unwrap();
    assert!(file.is_none());
    let address = SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
    let security = entrance::security(&tls).unwrap();
    let backup =
        Backup::listening(listener, security, Given::None, Witness::default(), (Vec::new(), 0));
    let protected = |directory: &Path| {
        let connect = move || {
            let stream = TcpStream::connect(address).unwrap();
            Some(Descriptors::socket(stream.into()).unwrap())
        };
        // The address is in the certificates.
        let security = Security::Client(transport::client(directory).unwrap(), Names::OfAddress);
        let way = Way { peer: None, security };
        let (arbiter, on_loss) = (Given::None, OnLoss::Stall);
        let way = (way, Box::new(connect) as Connect);
        Protected::through(way, &arbiter, on_loss, Witness::default(), Special::default())
    };
    let refused = protected(stranger.path());
    wait_for("the end", || refused.main.is_finished());
    assert!(!refused.host.told.lock().contains(&ReplicationStatus::Syncing));
    assert_eq!(backup.status.lock().state, ReplicationStatus::Listening);
    replicates(&protected(own.path()), &backup);
    drop(backup.end());
    // Without certificates, only this host may connect.
    let everywhere = Place::Tcp("0.0.0.0:0".into());
    let refused = entrance::listen(&everywhere, &Tls::Local);
    assert!(matches!(refused, Err(IncomingError::Unencrypted(_))));
    entrance::listen(&everywhere, &Tls::Off).unwrap();
}

/// A backup and its primary, connected by two pipes.
fn through_pipes(far: &Path, arbiter: Given, on_loss: OnLoss) -> (Backup, Protected) {
    let backup = Backup::at(far, arbiter.clone());
    let (orders, wake) = (backup.orders.clone(), backup.wake.clone());
    let connect = move || {
        let ((read, written), (back, answered)) = (pipe().unwrap(), pipe().unwrap());
        let theirs = Descriptors::pipes(read.into(), answered.into()).unwrap();
        orders.send(ToStandby::Connected(theirs)).unwrap();
        wake.wake();
        Some(Descriptors::pipes(back.into(), written.into()).unwrap())
    };
    let way = Way { peer: None, security: Security::Plain(false) };
    let way = (way, Box::new(connect) as Connect);
    let special = Special::default();
    let protected = Protected::through(way, &arbiter, on_loss, Witness::default(), special);
    (backup, protected)
}

#[test]
fn a_connection_may_be_two_pipes_that_are_handed_over_at_both_sides() {
    let (_directory, _, far) = places();
    let (backup, protected) = through_pipes(&far, Given::None, OnLoss::Stall);
    replicates(&protected, &backup);
    drop(backup.end());
}

#[test]
fn a_fence_that_ends_processes_needs_to_know_them() {
    let local = Given::Fence("local".into());
    let (_directory, _, far) = places();
    let (backup, protected) = through_pipes(&far, local.clone(), OnLoss::Claim);
    assert_eq!(protected.main.join().unwrap(), None, "unprotected, and unharmed");
    let reasons = protected.host.reasons.lock().clone();
    let why = "the fence 'local' needs the other side's process: the connection is no Unix socket";
    assert!(reasons.iter().any(|said| said.contains(why)), "{reasons:?}");
    assert!(backup.rooms.lock().is_empty(), "it has made room");
    assert!(backup.end().is_err());
    // Here it is this one.
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, local.clone());
    let protected = Protected::by(&far, &local, OnLoss::Claim);
    replicates(&protected, &backup);
    drop(backup.end());
}

/// The first frames of a primary, of which `change` makes something else.
fn greeting(lineage: u128, change: impl FnOnce(&mut state::Config)) -> Vec<u8> {
    greeting_after(Epoch(0), lineage, change)
}

/// The same, where `epoch` is the last one that was captured.
fn greeting_after(epoch: Epoch, lineage: u128, change: impl FnOnce(&mut state::Config)) -> Vec<u8> {
    let mut config = config(1);
    change(&mut config);
    let host = Offered::of(Given::None, TSC, None);
    let offer = Offer { timeout: TIMEOUT, heartbeat: None, key: None, disks: true, host, config };
    let mut bytes = offer.encode().unwrap();
    let message = Message::Hello(Hello {
        lineage: Lineage(lineage),
        incarnation: Incarnation(77),
        bound: None,
        claimed: false,
        agreement: agreement(&Given::None, true),
    });
    bytes.extend(wire::encode(&Frame { term: Term(1), epoch, message }));
    bytes
}

#[test]
fn no_peer_disturbs_a_backup_or_the_primary_that_it_has() {
    let (_directory, _, far) = places();
    let backup = Backup::at(&far, Given::None);
    let end = Message::End { digest: Digest(1) };
    let end = wire::encode(&Frame { term: Term(1), epoch: Epoch(1), message: end });
    let offer = greeting(1, |_| {}).len()
        - wire::encode(&Frame {
            term: Term(1),
            epoch: Epoch(0),
            message: Message::Hello(Hello {
                lineage: Lineage(1),
                incarnation: Incarnation(77),
                bound: None,
                claimed: false,
                agreement: agreement(&Given::None, true),
            }),
        })
        .len();
    let hostile = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        [31u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat(),
        // Another machine, larger than any host; one without a greeting; contents before it.
        greeting(9, |config| config.machine.memory.size = 1 << 62),
        greeting(9, |config| config.machine.vcpus = 0),
        greeting(1, |_| {})[..offer].to_vec(),
        [&greeting(1, |_| {})[..offer], &end].concat(),
        greeting(1, |_| {}).iter().map(|byte| byte ^ 0x10).collect(),
    ];
    let sends = || -> Vec<UnixStream> {
        let send = |bytes: &Vec<u8>| {
            let mut peer = UnixStream::connect(&far).unwrap();
            // It may be closed meanwhile.
            let _ = peer.write_all(bytes);
            thread::sleep(Duration::from_millis(10));
            peer
        };
        hostile.iter().map(send).collect()
    };
    let before = sends();
    let protected = Protected::by(&far, &Given::None, OnLoss::Stall);
    protected.is_protected();
    let meanwhile = sends();
    // A second primary is refused, with the reason.
    let mut second = UnixStream::connect(&far).unwrap();
    second.write_all(&greeting(1, |_| {})).unwrap();
    second.set_read_timeout(Some(LONG)).unwrap();
    let mut aside = offer::process(Process::own().as_ref());
    second.read_exact(&mut aside).unwrap();
    let mut answer = [0; 4];
    second.read_exact(&mut answer).unwrap();
    assert_eq!(u32::from_le_bytes(answer), 10, "Refuse");
    protected.writes(&mut fastrand::Rng::with_seed(3));
    protected.is_equal(&backup);
    let info = protected.status.lock().clone();
    assert_eq!((info.state, info.stalls), (ReplicationStatus::Protected, 0));
    drop((before, meanwhile, fs::metadata(&far)));
    assert!(backup.end().is_err());
}
