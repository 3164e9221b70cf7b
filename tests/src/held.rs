//! A file system whose server answers as the test lets it: a FUSE mount (linux/fuse.h) that holds
//! every request of the selected kinds, as a dead NFS server would, or fails them, as a broken disk.
//! Needs root. The files are in memory, in one flat directory.
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::monitor::SOON;

/// A request of the kernel, by its number in `enum fuse_opcode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op(u32);

#[expect(missing_docs, reason = "the kernel's own names")]
impl Op {
    pub const LOOKUP: Self = Self(1);
    pub const OPEN: Self = Self(14);
    pub const READ: Self = Self(15);
    pub const WRITE: Self = Self(16);
    pub const FSYNC: Self = Self(20);
    pub const FLUSH: Self = Self(25);
    pub const STATFS: Self = Self(17);
    pub const GETATTR: Self = Self(3);
    pub const SETATTR: Self = Self(4);
    pub const LINK: Self = Self(13);
    pub const FALLOCATE: Self = Self(43);
}

const ROOT: u64 = 1;
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const ENOSYS: i32 = 38;
/// Longest piece of data that the kernel sends at once.
const LONGEST_WRITE: u32 = 128 << 10;

/// The mount; unmounted when dropped, and the requests that it holds fail then.
pub struct Held {
    place: PathBuf,
    shared: Arc<Shared>,
}

struct Shared {
    device: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// By number, from 2: names and contents.
    files: BTreeMap<u64, (Vec<String>, Vec<u8>)>,
    holds: BTreeSet<Op>,
    /// Kinds of requests that fail, for which file, and how.
    fails: Vec<(Op, String, i32)>,
    /// See [`Held::repeat_links`].
    repeats: bool,
    /// Requests that wait for their answer.
    kept: Vec<Request>,
}

impl Held {
    /// Mounts at `place`, an empty directory that it makes, with `files`, by name.
    ///
    /// # Errors
    /// Without root or FUSE.
    pub fn mount(place: &Path, files: &[(&str, &[u8])]) -> Result<Self> {
        fs::create_dir(place)?;
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.context("/dev/fuse")?;
        let fd = device.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other");
        let options = CString::new(options)?;
        mount("held", place, "fuse", MountFlags::empty(), Some(&*options)).context("mount")?;
        let number = (2..).zip(files);
        let files = number.map(|(n, (name, data))| (n, (vec![(*name).to_owned()], data.to_vec())));
        let state = State { files: files.collect(), ..State::default() };
        let shared = Shared { device, state: Mutex::new(state), changed: Condvar::new() };
        let this = Self { place: place.to_owned(), shared: Arc::new(shared) };
        let shared = this.shared.clone();
        thread::spawn(move || shared.serve());
        Ok(this)
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Requests of this kind get no answer from now on.
    pub fn hold(&self, op: Op) {
        self.shared.state().holds.insert(op);
    }

    /// Requests of this kind for the file `name` fail with this error number from now on.
    pub fn fail(&self, op: Op, name: &str, error: i32) {
        self.shared.state().fails.push((op, name.to_owned(), error));
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        self.shared.state().fails.clear();
    }

    /// From now on links are made, and answered as if they had been there before: so an NFS server
    /// answers that gets a request again because its first reply was lost.
    pub fn repeat_links(&self) {
        self.shared.state().repeats = true;
    }

    /// Waits until one of this kind is held.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_held(&self, op: Op) -> Result<()> {
        let waits = |state: &mut State| state.kept.iter().all(|request| request.op != op);
        let (_state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.state(), SOON, waits)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(!timeout.timed_out(), "no request {op:?} came");
        Ok(())
    }

    /// Stops holding: the held requests are answered in order.
    ///
    /// # Errors
    /// The kernel does not take an answer.
    pub fn release(&self) -> Result<()> {
        let mut state = self.shared.state();
        state.holds.clear();
        for request in std::mem::take(&mut state.kept) {
            let answer = state.answer(&request);
            self.shared.reply(&request, answer)?;
        }
        Ok(())
    }

    /// Releases all when dropped: before the test waits for the monitor, which may wait for a held
    /// request.
    #[must_use]
    pub fn until_dropped(&self) -> Guard<'_> {
        Guard(self)
    }

    /// The contents of file `name`.
    #[must_use]
    pub fn contents(&self, name: &str) -> Vec<u8> {
        let state = self.shared.state();
        let file = state.files.values().find(|(known, _)| known.iter().any(|known| known == name));
        file.map(|(_, data)| data.clone()).unwrap_or_default()
    }
}

/// See [`Held::until_dropped`].
pub struct Guard<'a>(&'a Held);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // An error: nothing is held.
        let _ = self.0.release();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Aborts the held requests; a process that waits for one gets an error.
        let _ = self.release();
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests until the file system is unmounted.
    fn serve(&self) {
        let mut buffer = vec![0; LONGEST_WRITE as usize + 4096];
        while let Ok(length) = (&self.device).read(&mut buffer) {
            let Some(request) = buffer.get(..length).and_then(Request::parse) else { continue };
            let mut state = self.state();
            if state.holds.contains(&request.op) {
                state.kept.push(request);
                self.changed.notify_all();
                continue;
            }
            let answer = state.answer(&request);
            // A request that was abandoned meanwhile.
            let _ = self.reply(&request, answer);
        }
    }

    fn reply(&self, request: &Request, answer: Option<Result<Vec<u8>, i32>>) -> Result<()> {
        let Some(answer) = answer else { return Ok(()) };
        let (error, data) = answer.map_or_else(|error| (-error, Vec::new()), |data| (0, data));
        let length = u32::try_from(16 + data.len())?;
        let header = [&length.to_le_bytes()[..], &error.to_le_bytes(), &request.unique];
        let result = (&self.device).write_all(&[&header.concat()[..], &data].concat());
        match result {
            // The process that asked has been killed.
            Err(e) if e.raw_os_error() == Some(ENOENT) => Ok(()),
            other => Ok(other?),
        }
    }
}

struct Request {
    op: Op,
    unique: [u8; 8],
    node: u64,
    body: Vec<u8>,
}

impl Request {
    /// `struct fuse_in_header`, and the body.
    fn parse(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            op: Op(u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?)),
            unique: bytes.get(8..16)?.try_into().ok()?,
            node: u64::from_le_bytes(bytes.get(16..24)?.try_into().ok()?),
            body: bytes.get(40..)?.to_vec(),
        })
    }

    fn u32(&self, at: usize) -> u32 {
        let bytes = self.body.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    fn name(&self, at: usize) -> String {
        let bytes = self.body.get(at..).unwrap_or_default();
        String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
    }
}

impl State {
    /// `None`: the kernel waits for no answer.
    fn answer(&mut self, request: &Request) -> Option<Result<Vec<u8>, i32>> {
        if let Some(error) = self.failure(request) {
            return Some(Err(error));
        }
        let answer = match request.op.0 {
            // FORGET, BATCH_FORGET, INTERRUPT
            2 | 42 | 36 => return None,
            // INIT: struct fuse_init_out.
            26 => {
                let words = [7, 31, request.u32(8), 0, 12 << 16 | 16, LONGEST_WRITE, 1];
                Ok(words.iter().flat_map(|w: &u32| w.to_le_bytes()).chain([0; 36]).collect())
            }
            1 => self.lookup(&request.name(0)),
            3 => self.attributes(request.node),
            4 => self.set_attributes(request),
            // OPEN, OPENDIR: struct fuse_open_out. FOPEN_KEEP_CACHE: opening waits for no write.
            14 | 27 => Ok([&[0; 8][..], &2u32.to_le_bytes(), &[0; 4]].concat()),
            15 => self.read(request),
            16 => self.write(request),
            // STATFS: struct fuse_kstatfs
            17 => {
                Ok([&[0; 40][..], &4096u32.to_le_bytes(), &255u32.to_le_bytes(), &[0; 32]].concat())
            }
            // RELEASE, RELEASEDIR, FSYNC, FLUSH
            18 | 29 | 20 | 25 => Ok(Vec::new()),
            28 => Ok(self.directory(request)),
            13 => self.link(request),
            43 => self.allocate(request),
            // CREATE: struct fuse_create_in, then the name
            35 => {
                let number = self.files.keys().max().map_or(2, |last| last + 1);
                let name = request.name(16);
                self.files.insert(number, (vec![name.clone()], Vec::new()));
                self.lookup(&name).map(|entry| [&entry[..], &[0; 16]].concat())
            }
            // UNLINK
            10 => {
                let name = request.name(0);
                self.files.values_mut().for_each(|(names, _)| names.retain(|known| *known != name));
                self.files.retain(|_, (names, _)| !names.is_empty());
                Ok(Vec::new())
            }
            _ => Err(ENOSYS),
        };
        Some(answer)
    }

    fn failure(&self, request: &Request) -> Option<i32> {
        let (names, _) = self.files.get(&request.node)?;
        let fails = |(op, name, _): &&(Op, String, i32)| *op == request.op && names.contains(name);
        self.fails.iter().find(fails).map(|(_, _, error)| *error)
    }

    /// Of `struct fuse_read_in` the offset and the size: entries, each a `struct fuse_dirent`.
    fn directory(&self, request: &Request) -> Vec<u8> {
        let (from, size) = (request.u64(8), request.u32(16) as usize);
        let entries =
            self.files.iter().flat_map(|(node, (names, _))| names.iter().map(move |n| (node, n)));
        let mut answer = Vec::new();
        for (offset, (node, name)) in (1_u64..).zip(entries).filter(|(offset, _)| *offset > from) {
            let header = [&node.to_le_bytes()[..], &offset.to_le_bytes()].concat();
            let length = name.len() as u32;
            let entry = [&header[..], &length.to_le_bytes(), &8_u32.to_le_bytes(), name.as_bytes()]
                .concat();
            if answer.len() + entry.len().next_multiple_of(8) > size {
                break;
            }
            answer.extend(entry);
            answer.resize(answer.len().next_multiple_of(8), 0);
        }
        answer
    }

    /// `struct fuse_link_in`, and the new name.
    fn link(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let name = request.name(8);
        if self.lookup(&name).is_ok() {
            return Err(EEXIST);
        }
        self.files.get_mut(&request.u64(0)).ok_or(ENOENT)?.0.push(name.clone());
        if self.repeats { Err(EEXIST) } else { self.lookup(&name) }
    }

    /// Of `struct fuse_fallocate_in` the offset and the length.
    fn allocate(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let (_, data) = self.files.get_mut(&request.node).ok_or(ENOENT)?;
        let end = usize::try_from(request.u64(8) + request.u64(16)).unwrap_or(usize::MAX);
        if data.is_empty() {
            // Takes no memory until it is written.
            *data = vec![0; end];
        }
        data.resize(data.len().max(end), 0);
        Ok(Vec::new())
    }

    /// `struct fuse_entry_out`
    fn lookup(&self, name: &str) -> Result<Vec<u8>, i32> {
        let is_so = |known: &(_, &(Vec<String>, _))| known.1.0.iter().any(|known| known == name);
        let node = *self.files.iter().find(is_so).ok_or(ENOENT)?.0;
        Ok([&node.to_le_bytes()[..], &[0; 32], &self.attr(node)?].concat())
    }

    /// `struct fuse_attr_out`
    fn attributes(&self, node: u64) -> Result<Vec<u8>, i32> {
        Ok([&[0; 16][..], &self.attr(node)?].concat())
    }

    /// `struct fuse_attr`
    fn attr(&self, node: u64) -> Result<Vec<u8>, i32> {
        let (mode, size): (u32, u64) = match self.files.get(&node) {
            Some((_, data)) => (0o100_600, data.len() as u64),
            None if node == ROOT => (0o040_700, 0),
            None => return Err(ENOENT),
        };
        let wide = [node, size, size.div_ceil(512), 0, 0, 0];
        let narrow = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0];
        let wide = wide.iter().flat_map(|n| n.to_le_bytes());
        Ok(wide.chain(narrow.iter().flat_map(|n: &u32| n.to_le_bytes())).collect())
    }

    /// Of `struct fuse_setattr_in`: the size.
    fn set_attributes(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        const SIZE: u32 = 1 << 3;
        let size = usize::try_from(request.u64(16)).unwrap_or(usize::MAX);
        if request.u32(0) & SIZE != 0 {
            self.files.get_mut(&request.node).ok_or(ENOENT)?.1.resize(size, 0);
        }
        self.attributes(request.node)
    }

    fn read(&self, request: &Request) -> Result<Vec<u8>, i32> {
        let (_, data) = self.files.get(&request.node).ok_or(ENOENT)?;
        let from = usize::try_from(request.u64(8)).unwrap_or(usize::MAX);
        let rest = data.get(from..).unwrap_or_default();
        Ok(rest.iter().take(request.u32(16) as usize).copied().collect())
    }

    fn write(&mut self, request: &Request) -> Result<Vec<u8>, i32> {
        let (_, data) = self.files.get_mut(&request.node).ok_or(ENOENT)?;
        let from = usize::try_from(request.u64(8)).unwrap_or(usize::MAX);
        let new = request.body.get(40..).unwrap_or_default();
        data.resize(data.len().max(from + new.len()), 0);
        data.splice(from..from + new.len(), new.iter().copied());
        Ok([u32::try_from(new.len()).unwrap_or(0).to_le_bytes(), [0; 4]].concat())
    }
}

/// Waits for `condition`, which is checked every millisecond.
///
/// # Errors
/// It does not come true.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !condition() {
        ensure!(Instant::now() < deadline, "{what}: it did not");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
