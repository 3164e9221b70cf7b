//! A relay between a primary and its backup, which reads the frames that it passes on: so a primary
//! can be killed at a step of an epoch that no clock would hit.
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::namespace::Namespace;

/// Kind and length of a frame.
const HEADER: usize = 8;
/// Its checksum.
const CRC: usize = 4;
/// Longest frame, in bytes: more than any of the monitor's.
const LONGEST: usize = 8 << 20;

/// The step of an epoch, or of the beginning of a term, at which nothing more gets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The backup takes the machine that it was offered, and the primary does not hear that.
    Offered,
    /// The backup has the first epoch, and does not hear that it may run the guest.
    Armed,
    /// The epoch was captured; the backup does not hear of it.
    Begun,
    /// The backup has the first half of a frame.
    Torn,
    /// It has some of the pages.
    Pages,
    /// It has all pages and the state, and not the end.
    Ending,
    /// It has the whole epoch, and the primary does not hear that.
    Acknowledged,
    /// The primary has just heard it, and releases the output.
    Released,
}

impl Step {
    /// The steps of an epoch, in order.
    pub const ALL: [Self; 6] =
        [Self::Begun, Self::Torn, Self::Pages, Self::Ending, Self::Acknowledged, Self::Released];

    /// What is done with a frame of this kind, which the backup has sent (`back`) or is to get, when
    /// `pages` of its epoch have passed.
    const fn cut(self, kind: u32, back: bool, pages: u64) -> Option<Cut> {
        match (self, back, kind) {
            (Self::Offered, true, ACCEPT)
            | (Self::Armed, false, ARMED)
            | (Self::Begun, false, BEGIN) => Some(Cut::Before),
            (Self::Torn, false, PAGES..=SECTION) => Some(Cut::Within),
            (Self::Pages, false, PAGES..=SECTION) if pages > 0 => Some(Cut::Before),
            (Self::Ending, false, END) => Some(Cut::Before),
            (Self::Acknowledged, true, ACK) => Some(Cut::Before),
            (Self::Released, true, ACK) => Some(Cut::After),
            _ => None,
        }
    }
}

// Kinds of frames, as the crate `replication` numbers them.
const ACCEPT: u32 = 9;
const END: u32 = 11;
const ACK: u32 = 12;
const ARMED: u32 = 14;
const BEGIN: u32 = 32;
const PAGES: u32 = 33;
const SECTION: u32 = 36;

/// Where the connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Before,
    Within,
    After,
}

#[derive(Default)]
struct State {
    step: Option<Step>,
    reached: bool,
    failed: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done with this frame. Once it was cut, nothing passes any more.
    fn cut(&self, kind: u32, back: bool, pages: u64) -> Option<Cut> {
        let mut state = self.lock();
        if state.reached {
            return Some(Cut::Before);
        }
        let cut = state.step?.cut(kind, back, pages)?;
        state.reached = true;
        drop(state);
        self.changed.notify_all();
        Some(cut)
    }
}

/// The relay. Its threads end with the connection.
pub struct Relay(Arc<Shared>);

impl Relay {
    /// Listens in `host`, at the address that is returned, and passes on to the backup at `to`,
    /// which must not encrypt.
    ///
    /// # Errors
    /// It cannot listen there.
    pub fn start(host: &Namespace, to: SocketAddr) -> Result<(Self, SocketAddr)> {
        let listener = host.enter(|| TcpListener::bind("127.0.0.1:0"))??;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        // Not waited for: it ends with the connection.
        let _ = host.spawn("relay", move || {
            if let Err(error) = serve(&listener, to, &theirs) {
                theirs.lock().failed = Some(error.to_string());
                theirs.changed.notify_all();
            }
        })?;
        Ok((Self(shared), address))
    }

    /// Lets nothing more through from this step of the next epoch on.
    pub fn cut_at(&self, step: Step) {
        self.0.lock().step = Some(step);
    }

    /// Waits until an epoch is at this step. Nothing gets through any more then.
    ///
    /// # Errors
    /// There is none within `limit`.
    pub fn wait(&self, step: Step, limit: Duration) -> Result<Instant> {
        let deadline = Instant::now() + limit;
        self.cut_at(step);
        let mut state = self.0.lock();
        while !state.reached {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no epoch was at the step {step:?} within {limit:?}");
            if let Some(error) = &state.failed {
                anyhow::bail!("the relay: {error}");
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Instant::now())
    }
}

/// One connection: a primary that connects again after a suspicion is not wanted here.
fn serve(listener: &TcpListener, to: SocketAddr, shared: &Arc<Shared>) -> Result<()> {
    let (primary, _) = listener.accept()?;
    let backup = TcpStream::connect(to).context("the backup does not listen")?;
    primary.set_nodelay(true)?;
    backup.set_nodelay(true)?;
    let (from_backup, to_primary) = (backup.try_clone()?, primary.try_clone()?);
    let theirs = Arc::clone(shared);
    let back = thread::Builder::new()
        .name("relay-back".to_owned())
        .spawn(move || pass(&from_backup, &to_primary, true, &theirs))?;
    // An end is what the test makes, by killing one of them.
    let _ = pass(&primary, &backup, false, shared);
    let _ = back.join();
    Ok(())
}

/// Passes on whole frames until one side ends; then the other one sees that.
fn pass(mut from: &TcpStream, mut to: &TcpStream, back: bool, shared: &Shared) -> io::Result<()> {
    let passed = frames(&mut from, &mut to, back, shared);
    // What has been cut off still has to be read, or who sends it would wait, and not be killed in
    // the middle of its work.
    let _ = io::copy(&mut from, &mut io::sink());
    let _ = to.shutdown(Shutdown::Write);
    passed
}

fn frames(
    from: &mut impl Read,
    to: &mut impl Write,
    back: bool,
    shared: &Shared,
) -> io::Result<()> {
    let mut frame = Vec::new();
    let mut pages = 0;
    loop {
        frame.resize(HEADER, 0);
        from.read_exact(&mut frame)?;
        let number = |at: usize| {
            let bytes = frame.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let (kind, length) = (number(0), number(4) as usize);
        if length > LONGEST {
            return Err(io::Error::other(format!("a frame of kind {kind} has {length} bytes")));
        }
        frame.resize(HEADER + length + CRC, 0);
        from.read_exact(frame.get_mut(HEADER..).unwrap_or_default())?;
        pages = match kind {
            BEGIN => 0,
            PAGES..=SECTION => pages + 1,
            _ => pages,
        };
        let cut = shared.cut(kind, back, pages - u64::from((PAGES..=SECTION).contains(&kind)));
        let part = match cut {
            Some(Cut::Before) => return Ok(()),
            Some(Cut::Within) => frame.len() / 2,
            None | Some(Cut::After) => frame.len(),
        };
        to.write_all(frame.get(..part).unwrap_or_default())?;
        if cut.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u32, body: &[u8]) -> Vec<u8> {
        let length = body.len() as u32;
        [&kind.to_le_bytes(), &length.to_le_bytes(), body, &[0; CRC]].concat()
    }

    /// How much of an epoch and of its acknowledgement passes.
    fn passed(step: Step) -> (usize, usize) {
        let shared = Shared::default();
        shared.lock().step = Some(step);
        let epoch: Vec<u8> = [
            frame(BEGIN, &[0; 32]),
            frame(PAGES, &[1; 64]),
            frame(PAGES, &[1; 64]),
            frame(SECTION, &[2; 16]),
            frame(38, &[]),
            frame(END, &[0; 8]),
        ]
        .concat();
        let (mut to, mut back) = (Vec::new(), Vec::new());
        let _ = frames(&mut &epoch[..], &mut to, false, &shared);
        if to.len() == epoch.len() {
            let _ = frames(&mut &frame(ACK, &[])[..], &mut back, true, &shared);
        }
        assert!(shared.lock().reached, "{step:?}");
        // Not even a sign of life passes afterwards.
        let _ = frames(&mut &frame(15, &[])[..], &mut Vec::new(), false, &shared);
        (to.len(), back.len())
    }

    #[test]
    fn each_step_lets_more_of_an_epoch_through() {
        let (begin, pages, all) = (32 + 12, 64 + 12, 44 + 2 * 76 + 28 + 12 + 20);
        let at = Step::ALL.map(passed);
        let wanted = [
            (0, 0),
            (begin + pages / 2, 0),
            (begin + pages, 0),
            (all - 20, 0),
            (all, 0),
            (all, 12),
        ];
        assert_eq!(at, wanted);
    }
}
