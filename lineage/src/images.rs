//! The images of one guest, and whether it may start from them.
use std::path::{Path, PathBuf};

use replication::{
    Agreement, Arbiter, Bond, Denial, Digest, Exit, From, Identity, Incarnation, Lineage, Mark,
    OnLoss, Output, Rules, Settings, Side, Start, Term,
};

use crate::sidecar::{Entry, Sidecar, SidecarError};

/// Why the images cannot be used together, or a start from them is refused.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum ImagesError {
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    #[error(
        "{first} and {second} belong to two guests, by their sidecars (lineages {this:032x} and \
         {that:032x}): give the images of one guest"
    )]
    TwoGuests { first: PathBuf, second: PathBuf, this: u128, that: u128 },
    #[error("{image}: {denial}. {help}")]
    Refused { image: PathBuf, denial: Denial, help: String },
    #[error(
        "{image}: it was protected, so its guest may run on the other host: {arbiter} has to be \
         asked. {help}"
    )]
    Asks { image: PathBuf, arbiter: String, help: String },
}

/// The images of one guest, with what their sidecars say.
#[derive(Debug)]
pub struct Images {
    images: Vec<Known>,
}

#[derive(Debug, Clone)]
struct Known {
    path: PathBuf,
    sidecar: Sidecar,
    /// `None`: never part of a replicated guest.
    entry: Option<Entry>,
}

/// What the words allow a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permission {
    /// It was never replicated: anything.
    Unbound,
    /// It starts, and nobody has to be asked.
    Run {
        /// The first term in which it may be protected.
        term: Term,
        /// The promotion that it rests on.
        promoted: Option<Incarnation>,
    },
    /// The term has to be won first, by a [`replication::Start`] from this word.
    Claim(Entry),
}

impl Images {
    /// Read the sidecars of `images`, of which the guest may write to all: an image that it only
    /// reads may belong to many guests.
    ///
    /// # Errors
    /// When one cannot be read, or two belong to different guests.
    pub fn read<'a>(images: impl IntoIterator<Item = &'a Path>) -> Result<Self, ImagesError> {
        let mut named = Vec::new();
        for image in images {
            match Sidecar::beside(image) {
                Ok(sidecar) => named.push((image.into(), sidecar)),
                // It has none unless one was named for it.
                Err(SidecarError::Device { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Self::with_sidecars(named)
    }

    /// As [`Images::read`], with sidecars that were named for the images, as block devices need.
    ///
    /// # Errors
    /// As [`Images::read`].
    pub fn with_sidecars(
        images: impl IntoIterator<Item = (PathBuf, Sidecar)>,
    ) -> Result<Self, ImagesError> {
        let mut all = Vec::new();
        for (path, sidecar) in images {
            let entry = sidecar.read()?;
            all.push(Known { path, sidecar, entry });
        }
        let mut bound =
            all.iter().filter_map(|image: &Known| Some((image, image.entry.as_ref()?.lineage)));
        if let Some((first, lineage)) = bound.next()
            && let Some((other, second)) = bound.find(|(_, other)| *other != lineage)
        {
            let (first, other) = (first.path.clone(), other.path.clone());
            let (Lineage(this), Lineage(that)) = (lineage, second);
            return Err(ImagesError::TwoGuests { first, second: other, this, that });
        }
        Ok(Self { images: all })
    }

    /// The word of all of them together: the one that forbids most. They differ when a process has
    /// died while it wrote them one after another, so that it had not yet acted on the later word.
    fn strictest(&self) -> Option<(&Known, &Entry)> {
        let bound = self.images.iter().filter_map(|image| Some((image, image.entry.as_ref()?)));
        bound.max_by_key(|(_, entry)| strictness(&entry.mark))
    }

    /// What they say together; `None` for images that were never part of a replicated guest.
    #[must_use]
    pub fn entry(&self) -> Option<&Entry> {
        self.strictest().map(|(_, entry)| entry)
    }

    /// What a start may do.
    ///
    /// # Errors
    /// [`ImagesError::Refused`], with what can be done about it.
    pub fn permission(&self) -> Result<Permission, ImagesError> {
        let Some((image, entry)) = self.strictest() else { return Ok(Permission::Unbound) };
        let bound = matches!(entry.mark, Mark::Protected(_) | Mark::Fencing(_));
        if bound && !entry.arbiter.is_empty() {
            return Ok(Permission::Claim(entry.clone()));
        }
        // Nothing has to be asked, so neither the incarnation nor the settings matter.
        let me = Identity { lineage: entry.lineage, incarnation: Incarnation(0) };
        let (_, outputs) = Start::new(me, entry.mark, unused(), Rules::ALL);
        let decided = outputs.iter().find_map(|output| match *output {
            Output::Run { term, from: From::Disk, promoted } => {
                Some(Ok(Permission::Run { term, promoted }))
            }
            Output::Exit(Exit::Refused(denial)) => Some(Err(denial)),
            _ => None,
        });
        decided.unwrap_or(Err(Denial::NoArbiter)).map_err(|denial| {
            let help = help(denial, image, entry);
            ImagesError::Refused { image: image.path.clone(), denial, help }
        })
    }

    /// Check that a guest may start without asking anybody.
    ///
    /// # Errors
    /// As [`Images::permission`]; when somebody has to be asked.
    pub fn check(&self) -> Result<(), ImagesError> {
        match (self.permission()?, self.strictest()) {
            (Permission::Claim(Entry { arbiter, .. }), Some((image, entry))) => {
                let (path, help) = (image.path.clone(), help(Denial::NoArbiter, image, entry));
                Err(ImagesError::Asks { image: path, arbiter, help })
            }
            _ => Ok(()),
        }
    }

    /// As [`Images::permission`] for a start that the user forces: only an image that was being
    /// filled is refused, as it has no contents that a guest ever had.
    ///
    /// # Errors
    /// As [`Images::permission`].
    pub fn permission_by_force(&self) -> Result<Permission, ImagesError> {
        match (self.permission(), self.strictest()) {
            (Err(ImagesError::Refused { denial, .. }), Some((_, entry)))
                if denial != Denial::Inconsistent =>
            {
                let term = entry.mark.term().next();
                Ok(Permission::Run { term, promoted: None })
            }
            (Ok(Permission::Claim(entry)), _) => {
                Ok(Permission::Run { term: entry.mark.term().next(), promoted: None })
            }
            (other, _) => other,
        }
    }

    /// Write `mark` into the sidecars of all images that have one, durably.
    ///
    /// # Errors
    /// When one fails; some of them may have the word then.
    pub fn mark(&self, mark: Mark) -> Result<(), ImagesError> {
        for image in self.images.iter().filter(|image| image.entry.is_some()) {
            image.sidecar.mark(mark)?;
        }
        Ok(())
    }

    /// Write `fencing` before this side's fence is run; false when this side was fenced itself in that
    /// term or later: then it must not run it.
    ///
    /// This and [`Images::fenced`] exclude each other: both decide by the first image's sidecar, under
    /// its lock.
    ///
    /// # Errors
    /// As [`Images::mark`].
    pub fn fencing(&self, bond: Bond) -> Result<bool, ImagesError> {
        self.mark_unless(
            Mark::Fencing(bond),
            |mark| matches!(mark, Mark::Fenced { term } if *term >= bond.term),
        )
    }

    /// Write `fenced` for the peer's fence, before this side's processes are killed, so that none is
    /// started again; false when this side is the primary and fences the peer itself: then it is not
    /// to be killed.
    ///
    /// # Errors
    /// As [`Images::mark`].
    pub fn fenced(&self, term: Term) -> Result<bool, ImagesError> {
        self.mark_unless(Mark::Fenced { term }, |mark| {
            matches!(mark, Mark::Fencing(bond) if bond.term == term && bond.side == Side::Primary)
        })
    }

    /// Write `mark` into all sidecars, unless the first one says what `forbids` it.
    fn mark_unless(
        &self,
        mark: Mark,
        forbids: impl Fn(&Mark) -> bool,
    ) -> Result<bool, ImagesError> {
        for image in self.images.iter().filter(|image| image.entry.is_some()) {
            let written = image.sidecar.update(|entry| {
                let entry = entry.filter(|entry| !forbids(&entry.mark))?;
                Some(Entry { mark, ..entry.clone() })
            })?;
            if written.is_none_or(|entry| entry.mark != mark) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Write `entry` into the sidecars of all images, durably; those that have none get one.
    ///
    /// # Errors
    /// As [`Images::mark`].
    pub fn bind(&self, entry: &Entry) -> Result<(), ImagesError> {
        for image in &self.images {
            image.sidecar.update(|_| Some(entry.clone()))?;
        }
        Ok(())
    }
}

/// How much a word forbids, and how late it is.
fn strictness(mark: &Mark) -> (u8, Term) {
    let rank = match mark {
        Mark::Free { .. } => 0,
        Mark::Running { .. } => 1,
        Mark::Protected(_) => 2,
        Mark::Fencing(_) => 3,
        Mark::Outdated { .. } => 4,
        Mark::Fenced { .. } => 5,
        Mark::Inconsistent { .. } => 6,
    };
    (rank, mark.term())
}

fn unused() -> Settings {
    Settings {
        agreement: Agreement { arbiter: Arbiter::None, machine: Digest(0) },
        timeout: std::time::Duration::from_secs(1),
        period: std::time::Duration::from_millis(200),
        ack_limit: std::time::Duration::from_secs(10),
        on_loss: OnLoss::Stall,
        leave_slow: false,
    }
}

fn help(denial: Denial, image: &Known, entry: &Entry) -> String {
    let guest = format!("(lineage {:032x}, {})", entry.lineage.0, entry.mark.term());
    let sidecar = image.sidecar.path().display();
    let anyway = format!("to start from it anyway: rm {sidecar}");
    match denial {
        Denial::Outdated | Denial::Yielded => format!(
            "Start the guest {guest} on its other host, and protect it from there, which brings this \
             image up to date; or, {anyway}"
        ),
        Denial::NoArbiter | Denial::Earlier => format!(
            "Once it is certain that the guest {guest} does not run on the other host, and will not, \
             {anyway}"
        ),
        Denial::Inconsistent => format!(
            "Protect the guest {guest} from its other host again, which fills the image; or use a \
             backup of it"
        ),
    }
}

#[cfg(test)]
mod tests;
