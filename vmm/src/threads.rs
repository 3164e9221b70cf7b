//! The threads beside the main one, and the system-call filter behind which none can be started. Both are
//! prepared while the machine is built: the main thread starts one thread, and that does the rest.
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    thread::Builder,
};

use anyhow::Context;

use crate::{checkpoint::job::Checkpointer, ending::End, files::Files, seccomp::Filter};

/// What the threads are reached by.
pub struct Threads {
    /// Saves.
    pub checkpointer: Checkpointer,
    /// Opens files.
    pub files: Files,
    /// Ends what may hang.
    pub end: End,
    /// The filter, unless there is to be none.
    pub filter: Option<Filter>,
}

type Prepared = io::Result<Option<Filter>>;

/// Threads that are being started.
pub struct Starting {
    checkpointer: Checkpointer,
    files: Files,
    end: End,
    prepared: Receiver<Prepared>,
}

impl Starting {
    /// Begin. `notify` is called when one of them has something to say; it must not block. `filter`
    /// makes the filter.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn begin(
        notify: &Arc<dyn Fn() + Send + Sync>,
        filter: Option<impl FnOnce() -> Filter + Send + 'static>,
    ) -> io::Result<Self> {
        let (checkpointer, save) = Checkpointer::new(notify.clone());
        let (files, serve) = Files::new(notify.clone());
        let (end, release) = End::new();
        let (report, prepared) = channel();
        let begin = move || -> Prepared {
            Builder::new().name("files".into()).stack_size(128 << 10).spawn(serve)?;
            Builder::new().name("end".into()).stack_size(64 << 10).spawn(release)?;
            Ok(filter.map(|make| make()))
        };
        Builder::new().name("checkpoint".into()).stack_size(256 << 10).spawn(move || {
            // The process ends when it is not received.
            let _ = report.send(begin());
            drop(report);
            save();
        })?;
        Ok(Self { checkpointer, files, end, prepared })
    }

    /// Wait until all are there.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn finish(self) -> anyhow::Result<Threads> {
        let Self { checkpointer, files, end, prepared } = self;
        let filter = prepared.recv().context("a thread has ended before it began")?;
        let filter = filter.context("cannot start a thread")?;
        Ok(Threads { checkpointer, files, end, filter })
    }
}
