//! The thread `disks` of a primary: it reads the disks for their first copy, and writes their
//! sidecars. It may wait for storage; the thread that has the connection must not.
//!
//! ```text
//!   protector                              disks
//!        --Copy | Again | Rest-->
//!        <--Compare-- (asks the backup) --Answer-->   reads the piece
//!        <--Piece---- unless it is the same
//!        <--Passed---
//! ```
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use lineage::{
    Entry, Images, Lineage, Mark,
    pieces::{Hash, Hasher},
};

use super::{
    disks::{Disks, Watch},
    protector::{Order, Orders},
};

/// Pieces whose answers are waited for at a time. So many may wait to be sent, too, and at the
/// backup to be written.
const WINDOW: usize = 16;
/// How often it is looked whether old requests of the disks have ended.
const LOOK: Duration = Duration::from_millis(1);
/// How long until a word that could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// What the thread is asked to do.
pub enum Work {
    /// Begin to copy the disks. What it reports for that has this number.
    Copy(u64),
    /// Copy what has changed since.
    Again,
    /// Copy what has changed until the capture of the first epoch.
    Rest,
    /// What the backup has in a piece.
    Answer {
        /// The disk's number.
        disk: u16,
        /// The piece's number.
        piece: u64,
        /// Of its contents.
        hash: Hash,
    },
    /// Nothing is to be copied any more.
    Stop,
    /// Write this word into all sidecars.
    Mark(Mark),
    /// How the witness or fence is reached from now on.
    Arbiter(String),
}

/// What it reports.
pub enum Told {
    /// Ask the backup what it has in this piece.
    Compare {
        /// The disk's number.
        disk: u16,
        /// The piece's number.
        piece: u64,
    },
    /// Send these bytes.
    Piece {
        /// The disk's number.
        disk: u16,
        /// Where they begin.
        offset: u64,
        /// What is there.
        data: Vec<u8>,
    },
    /// All pieces were compared; so many have changed meanwhile.
    Passed(u64),
    /// The rest was sent.
    Rested,
    /// A disk cannot be read.
    Failed(String),
}

/// A handle of the thread.
#[derive(Clone)]
pub struct Handle {
    /// The disks.
    pub disks: Arc<Disks>,
    /// Asks it.
    pub work: Sender<Work>,
}

impl Handle {
    /// Ask it. One that has ended has said so.
    pub fn ask(&self, work: Work) {
        let _ = self.work.send(work);
    }
}

/// A new thread for `disks`, and its handle.
pub fn new(
    disks: Arc<Disks>,
    lineage: Lineage,
    arbiter: Option<String>,
    orders: Orders,
) -> (Handle, impl FnOnce() + Send + 'static) {
    let (work, inbox) = channel();
    let handle = Handle { disks: disks.clone(), work };
    let copier = Copier {
        disks,
        lineage,
        arbiter,
        orders,
        number: 0,
        watches: Vec::new(),
        pass: None,
        hasher: Hasher::default(),
        unwritten: None,
    };
    (handle, move || copier.run(&inbox))
}

struct Copier {
    disks: Arc<Disks>,
    lineage: Lineage,
    /// Unless the sidecars say it already.
    arbiter: Option<String>,
    orders: Orders,
    number: u64,
    watches: Vec<Arc<Watch>>,
    pass: Option<Pass>,
    hasher: Hasher,
    /// A word that could not be written.
    unwritten: Option<Mark>,
}

/// A pass over all pieces that have to be sent.
#[derive(Default)]
struct Pass {
    rest: bool,
    /// Where the next one is looked for.
    disk: usize,
    from: u64,
    /// Whose answers are waited for, in order.
    asked: VecDeque<(usize, u64)>,
    /// Requests are under way that are not noticed.
    waits: bool,
}

impl Copier {
    fn run(mut self, inbox: &Receiver<Work>) {
        loop {
            let waits = self.pass.as_ref().is_some_and(|pass| pass.waits);
            let limit = match (waits, self.unwritten) {
                (true, _) => LOOK,
                (false, Some(_)) => AGAIN,
                (false, None) => Duration::MAX,
            };
            match inbox.recv_timeout(limit) {
                Ok(work) => self.take(work),
                Err(RecvTimeoutError::Timeout) if waits => self.go_on(),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(mark) = self.unwritten.take() {
                        self.mark(mark);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.disks.detach();
    }

    fn take(&mut self, work: Work) {
        match work {
            Work::Copy(number) => {
                self.number = number;
                self.watches = self.disks.attach();
                self.pass = Some(Pass { waits: true, ..Pass::default() });
                self.go_on();
            }
            Work::Again if !self.watches.is_empty() => {
                self.pass = Some(Pass::default());
                self.go_on();
            }
            Work::Rest if !self.watches.is_empty() => {
                self.pass = Some(Pass { rest: true, ..Pass::default() });
                self.go_on();
            }
            Work::Again | Work::Rest => {}
            Work::Answer { disk, piece, hash } => self.answered(usize::from(disk), piece, hash),
            Work::Stop => {
                (self.pass, self.watches) = (None, Vec::new());
                self.disks.detach();
            }
            Work::Mark(mark) => self.mark(mark),
            Work::Arbiter(arbiter) => self.arbiter = Some(arbiter),
        }
    }

    fn tell(&self, told: Told) {
        self.orders.give(Order::Copied(self.number, told));
    }

    /// Ask for as many pieces as may be asked for.
    fn go_on(&mut self) {
        let Some(mut pass) = self.pass.take() else { return };
        if pass.waits && !self.disks.are_noticed() {
            self.pass = Some(pass);
            return;
        }
        pass.waits = false;
        while pass.asked.len() < WINDOW
            && let Some((disk, piece)) = self.next(&mut pass)
        {
            pass.asked.push_back((disk, piece));
            let number = u16::try_from(disk).unwrap_or(u16::MAX);
            self.tell(Told::Compare { disk: number, piece });
        }
        if !pass.asked.is_empty() {
            self.pass = Some(pass);
        } else if pass.rest {
            self.disks.unwatch();
            self.tell(Told::Rested);
        } else {
            let left = self.watches.iter().map(|watch| watch.set().len()).sum();
            self.tell(Told::Passed(left));
        }
    }

    /// The next piece that has to be sent.
    fn next(&self, pass: &mut Pass) -> Option<(usize, u64)> {
        while let Some(watch) = self.watches.get(pass.disk) {
            // Of the rest, it stays in the set until it was read: writes to it wait.
            let found = match pass.rest {
                true => watch.set().next(pass.from),
                false => watch.set().take(pass.from),
            };
            if let Some(piece) = found {
                pass.from = piece + 1;
                return Some((pass.disk, piece));
            }
            (pass.disk, pass.from) = (pass.disk + 1, 0);
        }
        None
    }

    fn answered(&mut self, disk: usize, piece: u64, theirs: Hash) {
        let Some(pass) = &mut self.pass else { return };
        if pass.asked.pop_front_if(|asked| *asked == (disk, piece)).is_none() {
            return self.fail("the backup has answered what was not asked".into());
        }
        let rest = pass.rest;
        match self.disks.read(disk, piece) {
            Ok((offset, data)) => {
                if let Some(watch) = self.watches.get(disk).filter(|_| rest) {
                    self.disks.sent(disk, piece, watch);
                }
                if self.hasher.of(&data) != theirs {
                    let disk = u16::try_from(disk).unwrap_or(u16::MAX);
                    self.tell(Told::Piece { disk, offset, data });
                }
                self.go_on();
            }
            Err(e) => {
                let id = self.disks.all().get(disk).map_or("", |(id, _)| id);
                self.fail(format!("cannot read disk '{id}': {e}"));
            }
        }
    }

    fn fail(&mut self, why: String) {
        self.pass = None;
        self.tell(Told::Failed(why));
    }

    fn mark(&mut self, mark: Mark) {
        match write(&self.disks, self.lineage, self.arbiter.as_deref(), mark) {
            Ok(()) => {
                self.unwritten = None;
                self.orders.give(Order::Marked(mark));
            }
            Err(why) => {
                log::error!("replication: cannot note that this side is {mark:?}: {why}");
                self.unwritten = Some(mark);
            }
        }
    }
}

fn write(disks: &Disks, lineage: Lineage, arbiter: Option<&str>, mark: Mark) -> Result<(), String> {
    let text = |e| qmp::Error::generic(&e).to_string();
    let paths: Vec<_> = disks.paths().collect();
    let images = Images::read(paths.iter().map(std::path::PathBuf::as_path)).map_err(text)?;
    let known = images.entry().map(|entry| entry.arbiter.clone());
    let arbiter = arbiter.map(str::to_owned).or(known).unwrap_or_default();
    images.bind(&Entry { lineage, mark, arbiter }).map_err(text)
}
