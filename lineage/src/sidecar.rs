//! The sidecar of an image: a file beside it with the word that says whether a guest starts from it.
//!
//! ```text
//!   0       slot: 512 bytes          4096    slot: 512 bytes
//!   magic, sequence number, lineage, word with its data, arbiter, zeroes, crc
//! ```
//! Both numbers and text are little-endian. A word is written into the slot that does not have the
//! last one, and is durable before [`Sidecar::update`] returns. A power cut in the middle leaves a
//! slot whose checksum does not fit, so that the word before is read from the other one. If neither
//! slot is whole, no start is allowed: a sidecar never looks as if it said `free`.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
};

use replication::{Bond, Incarnation, Lineage, Mark, Pair, Side, Term};
use rustix::fs::{FlockOperation, flock};

const MAGIC: [u8; 8] = *b"SIDECAR1";
/// Bytes of a slot: a sector, the least that a medium writes.
const SLOT: usize = 512;
/// From one slot to the other: in physical blocks of their own, as a block that is being written
/// when the power fails may lose all of its sectors.
const STEP: u64 = 4096;
const SLOTS: u64 = 2;
/// Where the text begins.
const TEXT: usize = 80;
/// Where the checksum of everything before it is.
const CRC: usize = SLOT - 4;
/// Longest [`Entry::arbiter`], in bytes.
pub const ARBITER_LIMIT: usize = CRC - TEXT;

/// What a sidecar says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The guest that the image belongs to.
    pub lineage: Lineage,
    /// Whether it starts.
    pub mark: Mark,
    /// How the witness or the fence is reached, as it was configured; at most [`ARBITER_LIMIT`]
    /// bytes, empty if there is none.
    pub arbiter: String,
}

/// Why a sidecar cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum SidecarError {
    #[error("{path}: cannot {what} the sidecar")]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error(
        "{path}: the sidecar is damaged, so it is unknown whether the guest runs elsewhere. If it does \
         not, remove this file and the image starts as one that was never replicated"
    )]
    Damaged { path: PathBuf },
    #[error(
        "{image} is a block device: nothing beside it survives a restart of the host. Name a file on \
         a file system for its sidecar"
    )]
    Device { image: PathBuf },
    #[error("the description of the arbiter has {0} bytes; {ARBITER_LIMIT} are allowed")]
    Arbiter(usize),
}

/// A sidecar, by its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    path: PathBuf,
}

impl Sidecar {
    /// The one at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The one beside `image`: its path, without symbolic links, with `.sidecar` appended.
    ///
    /// # Errors
    /// When the image does not exist, or is a block device.
    pub fn beside(image: &Path) -> Result<Self, SidecarError> {
        let failed = |source| SidecarError::Io { path: image.into(), what: "find", source };
        let mut path = image.canonicalize().map_err(failed)?.into_os_string();
        if fs::metadata(&path).map_err(failed)?.file_type().is_block_device() {
            return Err(SidecarError::Device { image: image.into() });
        }
        path.push(".sidecar");
        Ok(Self::at(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says; `None` for an image that was never part of a replicated guest.
    ///
    /// # Errors
    /// When it cannot be read, or neither slot is whole.
    pub fn read(&self) -> Result<Option<Entry>, SidecarError> {
        match File::open(&self.path) {
            Ok(file) => {
                flock(&file, FlockOperation::LockShared)
                    .map_err(|e| self.failed("lock", e.into()))?;
                Ok(Some(self.last(&file)?.entry))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.failed("open", e)),
        }
    }

    /// Replace what it says by what `decide` returns, durably; `None` leaves it as it is. Updates by
    /// several processes happen one after another. Returns what it says then.
    ///
    /// # Errors
    /// When it cannot be read, or the word may not be durable: then it is either word.
    pub fn update(
        &self,
        decide: impl FnOnce(Option<&Entry>) -> Option<Entry>,
    ) -> Result<Option<Entry>, SidecarError> {
        let file = match self.open() {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // Created whole, so that a power cut leaves no file that says nothing.
                let Some(entry) = decide(None) else { return Ok(None) };
                self.create(&entry)?;
                return Ok(Some(entry));
            }
            Err(e) => return Err(self.failed("open", e)),
        };
        flock(&file, FlockOperation::LockExclusive).map_err(|e| self.failed("lock", e.into()))?;
        let last = self.last(&file)?;
        let Some(entry) = decide(Some(&last.entry)) else { return Ok(Some(last.entry)) };
        let slot = encode(&entry, last.sequence.saturating_add(1))?;
        let at = (last.index + 1) % SLOTS * STEP;
        file.write_all_at(&slot, at).map_err(|e| self.failed("write", e))?;
        file.sync_data().map_err(|e| self.failed("sync", e))?;
        Ok(Some(entry))
    }

    /// As [`Sidecar::update`] with this word, in the lineage and with the arbiter that it names
    /// already.
    ///
    /// # Errors
    /// As [`Sidecar::update`]; when there is no sidecar.
    pub fn mark(&self, mark: Mark) -> Result<(), SidecarError> {
        let with = |entry: Option<&Entry>| entry.map(|e| Entry { mark, ..e.clone() });
        match self.update(with)? {
            Some(_) => Ok(()),
            None => Err(self.failed("find", io::ErrorKind::NotFound.into())),
        }
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path)
    }

    fn create(&self, entry: &Entry) -> Result<(), SidecarError> {
        let slot = encode(entry, 1)?;
        let mut new = self.path.clone().into_os_string();
        new.push(format!(".{}.new", std::process::id()));
        let new = PathBuf::from(new);
        let failed = |what| move |source| self.failed(what, source);
        let file = File::create(&new).map_err(failed("create"))?;
        let written = file
            .write_all_at(&slot, 0)
            .and_then(|()| file.set_len(SLOTS * STEP))
            .and_then(|()| file.sync_all());
        // Not a rename, which would replace what another process has written meanwhile.
        let linked = written.and_then(|()| fs::hard_link(&new, &self.path));
        let removed = fs::remove_file(&new);
        linked.map_err(failed("create"))?;
        removed.map_err(failed("create"))?;
        self.sync_directory().map_err(failed("sync"))
    }

    fn sync_directory(&self) -> io::Result<()> {
        let parent = self.path.parent().filter(|path| !path.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// The slot that was written last.
    fn last(&self, file: &File) -> Result<Slot, SidecarError> {
        let mut last: Option<Slot> = None;
        for index in 0..SLOTS {
            let mut bytes = [0; SLOT];
            match file.read_exact_at(&mut bytes, index * STEP) {
                Ok(()) => {}
                // Cut short by something else than this code; the other slot may be whole.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(e) => return Err(self.failed("read", e)),
            }
            if let Some((sequence, entry)) = decode(&bytes)
                && last.as_ref().is_none_or(|last| last.sequence < sequence)
            {
                last = Some(Slot { index, sequence, entry });
            }
        }
        last.ok_or_else(|| SidecarError::Damaged { path: self.path.clone() })
    }

    fn failed(&self, what: &'static str, source: io::Error) -> SidecarError {
        SidecarError::Io { path: self.path.clone(), what, source }
    }
}

struct Slot {
    index: u64,
    sequence: u64,
    entry: Entry,
}

/// A word, with everything that it may have with it.
#[derive(Default, PartialEq, Eq)]
struct Parts {
    word: u8,
    side: u8,
    term: u64,
    first: u128,
    second: u128,
}

impl From<Mark> for Parts {
    fn from(mark: Mark) -> Self {
        let bound = |word, Bond { term, pair, side }: Bond| Self {
            word,
            side: u8::from(side == Side::Backup),
            term: term.0,
            first: pair.primary.0,
            second: pair.backup.0,
        };
        let plain = |word, term: Term| Self { word, term: term.0, ..Self::default() };
        match mark {
            Mark::Free { term } => plain(1, term),
            Mark::Protected(bond) => bound(2, bond),
            Mark::Fencing(bond) => bound(3, bond),
            Mark::Fenced { term } => plain(4, term),
            Mark::Running { term, promoted: None } => plain(5, term),
            Mark::Running { term, promoted: Some(Incarnation(first)) } => {
                Self { side: 1, first, ..plain(5, term) }
            }
            Mark::Outdated { term } => plain(6, term),
            Mark::Inconsistent { term } => plain(7, term),
        }
    }
}

impl Parts {
    /// The mark; `None` when no mark has these parts.
    fn mark(self) -> Option<Mark> {
        let term = Term(self.term);
        let pair = Pair { primary: Incarnation(self.first), backup: Incarnation(self.second) };
        let side = if self.side == 0 { Side::Primary } else { Side::Backup };
        let bond = Bond { term, pair, side };
        let mark = match self.word {
            1 => Mark::Free { term },
            2 => Mark::Protected(bond),
            3 => Mark::Fencing(bond),
            4 => Mark::Fenced { term },
            5 => {
                let promoted = (self.side == 1).then_some(Incarnation(self.first));
                Mark::Running { term, promoted }
            }
            6 => Mark::Outdated { term },
            7 => Mark::Inconsistent { term },
            _ => return None,
        };
        (Self::from(mark) == self).then_some(mark)
    }
}

fn encode(entry: &Entry, sequence: u64) -> Result<[u8; SLOT], SidecarError> {
    let text = entry.arbiter.as_bytes();
    let Some(length) = u32::try_from(text.len()).ok().filter(|_| text.len() <= ARBITER_LIMIT)
    else {
        return Err(SidecarError::Arbiter(text.len()));
    };
    let Parts { word, side, term, first, second } = entry.mark.into();
    let fields = [
        &MAGIC[..],
        &sequence.to_le_bytes(),
        &entry.lineage.0.to_le_bytes(),
        &[word, side, 0, 0],
        &length.to_le_bytes(),
        &term.to_le_bytes(),
        &first.to_le_bytes(),
        &second.to_le_bytes(),
        text,
    ];
    let mut bytes = fields.concat();
    bytes.resize(CRC, 0);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let mut slot = [0; SLOT];
    slot.copy_from_slice(&bytes);
    Ok(slot)
}

/// The sequence number and the contents; `None` for anything that [`encode`] does not write.
fn decode(bytes: &[u8; SLOT]) -> Option<(u64, Entry)> {
    fn at<const N: usize>(bytes: &[u8], from: usize) -> Option<[u8; N]> {
        bytes.get(from..from + N)?.try_into().ok()
    }
    let length = usize::try_from(u32::from_le_bytes(at(bytes, 36)?)).ok()?;
    let [word, side] = at(bytes, 32)?;
    let parts = Parts {
        word,
        side,
        term: u64::from_le_bytes(at(bytes, 40)?),
        first: u128::from_le_bytes(at(bytes, 48)?),
        second: u128::from_le_bytes(at(bytes, 64)?),
    };
    let text = bytes.get(TEXT..TEXT + length)?;
    let entry = Entry {
        lineage: Lineage(u128::from_le_bytes(at(bytes, 16)?)),
        mark: parts.mark()?,
        arbiter: String::from_utf8(text.to_vec()).ok()?,
    };
    let sequence = u64::from_le_bytes(at(bytes, 8)?);
    // Whatever else might be wrong, the bytes would be others.
    (encode(&entry, sequence).ok()? == *bytes).then_some((sequence, entry))
}

#[cfg(test)]
mod tests;
