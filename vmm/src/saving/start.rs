//! Turns a client's request for a save into an order for the checkpoint thread. Nothing is opened
//! here.
use std::path::PathBuf;

use qmp::{Error, server::Ticket};

use super::{
    phase::{Phase, Receiver, Terms},
    status::{Fate, Stop, UnderWay},
};
use crate::{
    checkpoint::{
        self, Cancel, Directory, Hello, Peer, Stream,
        job::{Open, Order, new_id},
    },
    vmm::Vmm,
};

/// Destination of a save.
pub(crate) enum To {
    /// Into a directory.
    Directory(PathBuf),
    /// To a process that resumes the machine or stores it; with the name of the destination, and
    /// whether the process answers.
    Stream(checkpoint::To, String, bool),
}

/// Options of a save.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct How {
    /// The machine runs on here afterwards, if it ran.
    pub resume: bool,
    /// Only what has changed since the last save.
    pub incremental: bool,
    /// The next save can be incremental.
    pub track: bool,
    /// Copies of the disks belong to it.
    pub disks: bool,
}

/// A client's request for a save.
pub(super) struct SaveRequest {
    pub to: To,
    pub how: How,
    pub by: Ticket,
}

impl Vmm {
    /// Order the save from the thread.
    ///
    /// # Errors
    /// When it cannot start; nothing has changed then.
    pub(super) fn start_save(
        &mut self,
        SaveRequest { to, how, by }: SaveRequest,
    ) -> Result<UnderWay, Error> {
        let base = match (self.saving.log.base(), how.incremental) {
            (Some(base), true) => Some(base.clone()),
            (None, true) => {
                return Err(Error::text(
                    "Parameter 'incremental': there is no base save; give track to the save before",
                ));
            }
            (_, false) => None,
        };
        self.machine.prepare_to_save().map_err(|e| Error::generic(&e))?;
        let (memory, size) =
            (self.machine.memory().clone(), self.machine.config().memory.size.bytes());
        let id = new_id().map_err(|e| Error::generic(&e))?;
        let disks = match how.disks {
            true => self.copies_of_disks()?,
            false => Vec::new(),
        };
        let receiver = match to {
            To::Directory(_) => Receiver::Directory,
            To::Stream(_, _, false) => Receiver::Mute,
            To::Stream(_, _, true) => Receiver::Answers,
        };
        let terms = Terms { resume: how.resume, receiver };
        let (cancel, place, open): (_, _, Open) = match to {
            To::Directory(path) => {
                let (place, memory) = (path.display().to_string(), memory.clone());
                let disks = how.disks.then(|| disks.clone());
                let open = move |_: &_| {
                    let directory = Directory::create(&path, memory, size, base)?;
                    Ok(Box::new(match disks {
                        Some(disks) => directory.with_disks(id, disks)?,
                        None => directory,
                    }) as Box<_>)
                };
                (None, place, Box::new(open))
            }
            To::Stream(to, place, dialogue) => {
                let cancel = Cancel::new().map_err(|e| Error::generic(&e))?;
                let given = cancel.clone();
                let (memory, config) = (memory.clone(), self.machine.description(id, None));
                let (name, cpu) = (&config.machine.name, self.machine.cpu());
                let hello = dialogue.then(|| Hello::new(&config.id, name, cpu.as_ref()));
                let hello = hello.transpose().map_err(|e| Error::generic(&e))?;
                let open = move |progress: &_| {
                    let peer = Peer::reach(to, given)?;
                    let begun = Stream::begin(peer, memory, &config, hello.as_ref(), progress)?;
                    Ok(Box::new(begun) as Box<_>)
                };
                (Some(cancel), place, Box::new(open))
            }
        };
        let Terms { resume, .. } = terms;
        let order = Order { open, memory, cancel, place, resume, patient: terms.is_stream() };
        let job = self.saving.thread.save(order).map_err(|e| Error::generic(&e))?;
        let (phase, fate, stop) = (Phase::Copying, Fate::Wanted, Stop::Never);
        Ok(UnderWay { phase, job, id, how, terms, disks, by, fate, stop })
    }
}
