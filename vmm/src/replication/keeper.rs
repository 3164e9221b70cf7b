//! The thread `disks` of a backup: it has the images of the disks and their journal. It may wait for
//! storage; the thread that hears the primary must not.
//!
//! ```text
//!   standby                                  disks
//!        --Open-->     images are made or checked, and locked; room is reserved
//!        --Fill, Compare, Change..-->  pieces are written to the images
//!        --First-->    synced: the images are at the first epoch, and the journal begins
//!        --Append-->   in the journal, durably: may be acknowledged
//!        --Apply-->    in the images; synced and trimmed from time to time
//!        --Settle-->   everything is in the images, durably, and nothing in the journal
//! ```
//! The order of these steps is that of [`lineage::JournalFile`].
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use lineage::{
    Change, Entry, Epoch, Image, Images, JournalError, JournalFile, Lineage, Mark, Medium, Place,
    TRIM_AFTER,
    pieces::{Hash, Hasher},
};
use machine::disk::{Aio, Disk, OpenOptions};
use replication::Rules;
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::wake::Wake;

/// Bytes of epochs that the journal holds: more than a primary sends without an acknowledgement,
/// even when one write of its guest is as long as a request can be.
const JOURNAL: u64 = 288 << 20;
/// How long until a word that could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A disk of the machine that is offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its id.
    pub id: String,
    /// Where its image is here.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// A change of a disk.
#[derive(Debug, Clone)]
pub struct Written {
    /// The disk's number.
    pub disk: u16,
    /// First byte.
    pub offset: u64,
    /// What is there now, or how many zeroes.
    pub contents: Result<Vec<u8>, u64>,
}

impl Written {
    /// Bytes that it occupies.
    fn len(&self) -> usize {
        self.contents.as_ref().map_or(0, Vec::len)
    }

    fn change(&self) -> Change<'_> {
        let Self { disk, offset, .. } = *self;
        match &self.contents {
            Ok(data) => Change::Write { disk, offset, data },
            Err(length) => Change::Zero { disk, offset, length: *length },
        }
    }
}

/// What the thread is asked to do.
pub enum Work {
    /// Take these images, in place of others.
    Open(Vec<Wanted>),
    /// The guest that they are of, and how its witness or fence is reached.
    Bind(Lineage, String),
    /// What is in a piece?
    Compare {
        /// The connection that it was asked by.
        connection: u64,
        /// The disk's number.
        disk: u16,
        /// The piece's number.
        piece: u64,
    },
    /// Write this to an image, which is being filled.
    Change(Written),
    /// The images are filled: this is the first epoch.
    First(Place),
    /// Take what was written in this epoch.
    Append(Epoch, Vec<Written>),
    /// Nothing can keep this epoch from the images any more.
    Apply(Epoch),
    /// Epochs after this one will come again, or never.
    DropAfter(Epoch),
    /// The guest is about to run from these images; the answer has this number.
    Settle(u64),
    /// Write this word into all sidecars.
    Mark(Mark),
    /// As `Mark`; then leave the images to the machine.
    Release(Mark),
    /// Be as slow as storage can be.
    #[cfg(test)]
    Hang(Duration),
}

/// What it answers.
pub enum Done {
    /// To [`Work::Open`]: what the sidecars say.
    Opened(Result<Option<Entry>, String>),
    /// To [`Work::Compare`].
    Piece {
        /// As in the question.
        connection: u64,
        /// As in the question.
        disk: u16,
        /// As in the question.
        piece: u64,
        /// Of its contents.
        hash: Hash,
    },
    /// To [`Work::First`] and [`Work::Append`]: the epoch is durable.
    Durable(Epoch, Result<(), String>),
    /// The images cannot be filled.
    NotFilled(String),
    /// An epoch that counts cannot be brought into the images.
    NotApplied(String),
    /// To [`Work::Settle`].
    Settled(u64, Result<(), String>),
    /// To [`Work::Mark`] and [`Work::Release`].
    Marked(Mark),
    /// The word cannot be written; it is tried again.
    NotMarked(String),
}

/// The handle of the thread.
pub struct Keeper {
    work: Sender<Work>,
    done: Receiver<Done>,
    /// Bytes that wait to be written to images that are being filled.
    queued: Arc<AtomicUsize>,
}

impl Keeper {
    /// The handle, and the body of the thread. `wake` is woken after each answer.
    pub fn new(wake: Wake) -> (Self, impl FnOnce() + Send + 'static) {
        Self::with_room(wake, JOURNAL)
    }

    /// As [`Keeper::new`], with a journal for so many bytes of epochs.
    pub fn with_room(wake: Wake, capacity: u64) -> (Self, impl FnOnce() + Send + 'static) {
        let (work, inbox) = channel();
        let (answers, done) = channel();
        let queued = Arc::<AtomicUsize>::default();
        let thread = Thread {
            answers,
            wake,
            queued: queued.clone(),
            capacity,
            taken: None,
            bound: (Lineage(0), String::new()),
            hasher: Hasher::default(),
            unwritten: None,
        };
        (Self { work, done, queued }, move || thread.run(&inbox))
    }

    /// Ask the thread. One that has ended has said so.
    pub fn ask(&self, work: Work) {
        if let Work::Change(written) = &work {
            self.queued.fetch_add(written.len(), Ordering::Relaxed);
        }
        let _ = self.work.send(work);
    }

    /// Bytes that wait to be written to images that are being filled.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Another way to ask the thread.
    #[cfg(test)]
    pub fn other(&self) -> Sender<Work> {
        self.work.clone()
    }

    /// The next answer, once there is one.
    pub fn done(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }

    /// Open images, and wait for that: what their sidecars say.
    ///
    /// # Errors
    /// Why they cannot be used.
    pub fn open(&self, wanted: Vec<Wanted>) -> Result<Option<Entry>, String> {
        self.ask(Work::Open(wanted));
        loop {
            match self.done.recv() {
                Ok(Done::Opened(opened)) => return opened,
                Ok(_) => {}
                Err(_) => return Err("the thread that has the disks has ended".into()),
            }
        }
    }
}

struct Thread {
    answers: Sender<Done>,
    wake: Wake,
    queued: Arc<AtomicUsize>,
    /// Of the journal.
    capacity: u64,
    taken: Option<Taken>,
    bound: (Lineage, String),
    hasher: Hasher,
    /// A word that could not be written, and whether the images are to be left then.
    unwritten: Option<(Mark, bool)>,
}

/// Images that are open.
struct Taken {
    /// None once they were left to the machine.
    images: Vec<File>,
    locks: Vec<Disk>,
    sidecars: Images,
    /// Room for the journal, and its size.
    room: File,
    capacity: u64,
    journal: Option<JournalFile<File>>,
}

impl Thread {
    fn run(mut self, inbox: &Receiver<Work>) {
        loop {
            let limit = match (&self.unwritten, &self.taken) {
                (Some(_), _) => AGAIN,
                (None, Some(Taken { journal: Some(_), .. })) => TRIM_AFTER,
                _ => Duration::MAX,
            };
            match inbox.recv_timeout(limit) {
                Ok(work) => self.take(work),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if let Some((mark, release)) = self.unwritten.take() {
                self.mark(mark, release);
            }
            if let Some(taken) = &mut self.taken
                && let Err(e) = taken.trim_if_due()
            {
                // It would fail again and again.
                taken.journal = None;
                self.tell(Done::NotApplied(text(&e)));
            }
        }
    }

    fn tell(&self, done: Done) {
        let _ = self.answers.send(done);
        self.wake.wake();
    }

    fn take(&mut self, work: Work) {
        let Some(taken) = &mut self.taken else {
            return match work {
                Work::Open(wanted) => self.open(&wanted),
                Work::Bind(lineage, arbiter) => self.bound = (lineage, arbiter),
                Work::Change(written) => self.written(&written),
                _ => {}
            };
        };
        let done = match work {
            Work::Open(wanted) => {
                // Their locks are released first: they may be the same.
                self.taken = None;
                return self.open(&wanted);
            }
            Work::Bind(lineage, arbiter) => {
                self.bound = (lineage, arbiter);
                return;
            }
            Work::Compare { connection, disk, piece } => {
                match taken.hash(&mut self.hasher, usize::from(disk), piece) {
                    Ok(hash) => Done::Piece { connection, disk, piece, hash },
                    Err(e) => Done::NotFilled(format!("cannot read an image: {e}")),
                }
            }
            Work::Change(written) => {
                let filled = taken.fill(&written);
                self.written(&written);
                match filled {
                    Ok(()) => return,
                    Err(e) => Done::NotFilled(format!("cannot write to an image: {e}")),
                }
            }
            Work::First(place) => {
                let begun = taken.begin(self.bound.0, place);
                Done::Durable(place.epoch, begun.map_err(|e| text(&e)))
            }
            Work::Append(epoch, written) => {
                Done::Durable(epoch, taken.append(epoch, &written).map_err(|e| text(&e)))
            }
            Work::Apply(epoch) => match taken.apply(epoch) {
                Ok(()) => return,
                Err(e) => Done::NotApplied(text(&e)),
            },
            Work::DropAfter(epoch) => {
                let dropped = taken.journal.as_mut().map(|journal| journal.drop_after(epoch));
                match dropped {
                    Some(Err(e)) => Done::NotApplied(text(&e)),
                    Some(Ok(())) | None => return,
                }
            }
            Work::Settle(number) => Done::Settled(number, taken.settle().map_err(|e| text(&e))),
            #[cfg(test)]
            Work::Hang(time) => return std::thread::sleep(time),
            Work::Mark(mark) => return self.mark(mark, false),
            Work::Release(mark) => return self.mark(mark, true),
        };
        self.tell(done);
    }

    fn written(&self, written: &Written) {
        self.queued.fetch_sub(written.len(), Ordering::Relaxed);
        // What waits for room may go on.
        self.wake.wake();
    }

    fn open(&mut self, wanted: &[Wanted]) {
        let opened = Taken::open(wanted, self.capacity).map(|taken| {
            let entry = taken.sidecars.entry().cloned();
            self.taken = Some(taken);
            entry
        });
        self.tell(Done::Opened(opened));
    }

    fn mark(&mut self, mark: Mark, release: bool) {
        let Some(taken) = &mut self.taken else { return };
        let (lineage, arbiter) = self.bound.clone();
        match taken.sidecars.bind(&Entry { lineage, mark, arbiter }) {
            Ok(()) => {
                if release {
                    (taken.images, taken.locks) = (Vec::new(), Vec::new());
                }
                self.unwritten = None;
                self.tell(Done::Marked(mark));
            }
            Err(e) => {
                self.unwritten = Some((mark, release));
                self.tell(Done::NotMarked(text(&e)));
            }
        }
    }
}

fn text(error: &(dyn std::error::Error + 'static)) -> String {
    qmp::Error::generic(error).to_string()
}

impl Taken {
    /// Make or check, and lock, the images, and reserve room.
    fn open(wanted: &[Wanted], capacity: u64) -> Result<Self, String> {
        let (mut images, mut locks) = (Vec::new(), Vec::new());
        for Wanted { id, path, size } in wanted {
            let failed = |e: io::Error| {
                format!(
                    "the image of disk '{id}' here, {}: {e}; name another with -drive \
                     id={id},file=PATH",
                    path.display()
                )
            };
            let is_new = make(path, *size).map_err(failed)?;
            let options = OpenOptions { aio: Aio::Off, ..OpenOptions::default() };
            let lock = Disk::open(path, &options).map_err(|e| {
                let hint = "where both sides are on one host, they need different images";
                format!(
                    "the image of disk '{id}' here: {} ({hint}); name another with -drive \
                     id={id},file=PATH",
                    text(&e)
                )
            })?;
            if lock.is_device() {
                return Err(format!(
                    "the image of disk '{id}' here, {}, is a block device; a file is needed: name \
                     one with -drive id={id},file=PATH",
                    path.display()
                ));
            }
            let file = File::options().read(true).write(true).open(path).map_err(failed)?;
            let found = Image::size(&file).map_err(failed)?;
            if found != *size {
                return Err(format!(
                    "the image of disk '{id}' here, {}, has {found} bytes, and the primary's has \
                     {size}: remove it, or name another with -drive id={id},file=PATH",
                    path.display()
                ));
            }
            match fallocate(&file, FallocateFlags::empty(), 0, *size) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) => {
                    log::warn!("{}: its file system reserves no room", path.display());
                }
                Err(e) => {
                    if is_new {
                        let _ = fs::remove_file(path);
                    }
                    return Err(failed(e.into()));
                }
            }
            images.push(file);
            locks.push(lock);
        }
        let sidecars = Images::read(wanted.iter().map(|one| one.path.as_path()));
        let sidecars = sidecars.map_err(|e| text(&e))?;
        let first = wanted.first().ok_or("there are no disks")?;
        let path = JournalFile::beside(&first.path)
            .map_err(|e| format!("{}: {e}", first.path.display()))?;
        let room = JournalFile::reserve(&path, capacity)
            .map_err(|e| format!("{}: {}", path.display(), text(&e)))?;
        Ok(Self { images, locks, sidecars, capacity, room, journal: None })
    }

    fn hash(&self, hasher: &mut Hasher, disk: usize, piece: u64) -> io::Result<Hash> {
        let image = self.images.get(disk).ok_or(io::ErrorKind::NotFound)?;
        hasher.hash(image, piece..piece + 1)?.pop().ok_or(io::ErrorKind::NotFound.into())
    }

    fn fill(&self, written: &Written) -> io::Result<()> {
        let image = self.images.get(usize::from(written.disk)).ok_or(io::ErrorKind::NotFound)?;
        match &written.contents {
            Ok(data) => Medium::write_at(image, written.offset, data),
            Err(length) => image.zero(written.offset, *length),
        }
    }

    fn begin(&mut self, lineage: Lineage, place: Place) -> Result<(), JournalError> {
        for (disk, image) in self.images.iter().enumerate() {
            let failed = |source| JournalError::Image { disk, what: "sync", source };
            image.sync_all().map_err(failed)?;
        }
        let failed = |source| JournalError::Io { what: "open", source };
        let room = self.room.try_clone().map_err(failed)?;
        self.journal = Some(JournalFile::format(room, lineage, place, self.capacity, Rules::ALL)?);
        Ok(())
    }

    fn journal(&mut self) -> Result<&mut JournalFile<File>, JournalError> {
        self.journal.as_mut().ok_or(JournalError::Failed)
    }

    fn append(&mut self, epoch: Epoch, written: &[Written]) -> Result<(), JournalError> {
        if written.is_empty() {
            return self.journal()?.append_nothing(epoch);
        }
        let changes = || written.iter().map(Written::change);
        match self.journal()?.append(epoch, changes()) {
            Err(JournalError::Full { .. }) => {
                self.trim()?;
                self.journal()?.append(epoch, changes())?;
            }
            other => other?,
        }
        self.journal()?.sync()
    }

    fn apply(&mut self, through: Epoch) -> Result<(), JournalError> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        while journal.order().last_applied() < through && journal.apply(&self.images)?.is_some() {}
        Ok(())
    }

    fn trim(&mut self) -> Result<(), JournalError> {
        let Some(journal) = &mut self.journal else { return Ok(()) };
        journal.sync_images(&self.images)?;
        journal.trim()
    }

    fn trim_if_due(&mut self) -> Result<(), JournalError> {
        match &self.journal {
            Some(journal) if journal.trim_due(Instant::now()) => self.trim(),
            _ => Ok(()),
        }
    }

    fn settle(&mut self) -> Result<(), JournalError> {
        self.journal.as_mut().ok_or(JournalError::Failed)?.settle(&self.images).map(drop)
    }
}

/// Make an image of `size` bytes at `path`, unless there is one; whether it was made. An empty one
/// is as good as none.
fn make(path: &Path, size: u64) -> io::Result<bool> {
    use std::os::unix::fs::OpenOptionsExt;
    match fs::metadata(path) {
        Ok(found) if found.is_file() && found.len() == 0 => {
            File::options().write(true).open(path)?.set_len(size)?;
            return Ok(false);
        }
        Ok(_) => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let options = File::options().write(true).create_new(true).mode(0o600).clone();
    let file = options.open(path)?;
    file.set_len(size)?;
    file.sync_all()?;
    let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(true)
}
