//! Messages that are exchanged beside the machine itself where a stream has a return path.
//!
//! ```text
//!   source                                             receiver
//!   Hello Config              ------------------->     has it room, the CPU, the disks and taps?
//!                             <-- Accept | Refuse --
//!   (Pages | Zeros).. Section.. End ------------->     complete? build the machine
//!                             <--- Ready | Failed --
//!   release disks and taps; Go ------------------>     take them
//!                             <- Running | Failed --
//! ```
//! The machine is built before `Ready`, with its disks open but not locked and its taps checked but
//! not attached: locking and attaching is all that can still fail after `Go`.
//!
//! Until `Go` is sent, the guest continues at the source whatever fails. After that only `Failed`
//! gives it back. Silence or the end of the stream does not, because the receiver may run the
//! guest: the outcome is unknown then, and the guest stays stopped at the source until a user who
//! knows it sends `cont`.
use std::{
    io::{self, BufReader, Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{event::PollFlags, io::Errno};
use serde::{Deserialize, Serialize};
use state::{
    Frames, Section, SectionError,
    config::Id,
    cpu::Cpu,
    frame::{Kind, Reader, StreamError, VERSION, Writer},
};

use super::{receive::ReceiveError, save::SaveError, send::Cancel};

/// How long the receiver may take to answer `Hello`.
pub const ACCEPT_LIMIT: Duration = Duration::from_secs(5);
/// How long the receiver may take for each later answer.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long a receiver that is ready waits for `Go`. Less than [`ANSWER_LIMIT`]: a source whose
/// `Go` is lost still receives `Failed` and has its machine back, where silence would leave it in
/// doubt.
pub const GO_LIMIT: Duration = Duration::from_secs(20);
/// Longest body of `Hello`, in bytes.
pub const LONGEST_HELLO: usize = 64 << 10;

/// Body of [`Kind::Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest and newest format version that the sender supports.
    pub versions: [u32; 2],
    /// Id of this migration.
    pub id: Id,
    /// The machine's name.
    pub domain: String,
    /// The `cpu` section, so that a receiver can check it before memory is sent. It may be missing
    /// here, and is in the state in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Section>,
}

impl Hello {
    /// The greeting of the migration `id` of the machine called `domain`, whose guest sees the CPU
    /// `cpu`.
    ///
    /// # Errors
    /// When the CPU has no saved form.
    pub fn new(id: &Id, domain: &str, cpu: Option<&Cpu>) -> Result<Self, SectionError> {
        let cpu = cpu.map(|cpu| Section::of("", cpu)).transpose()?;
        Ok(Self { versions: [VERSION; 2], id: *id, domain: domain.into(), cpu })
    }
}

/// The receiver's answers, as the source reads them.
pub struct Answers {
    reader: Option<Reader<BufReader<Timed>>>,
    from: Option<Timed>,
    /// When reading times out. Locked, because the reader that checks it is inside another reader.
    deadline: Arc<Mutex<Instant>>,
}

/// One answer.
pub struct Said {
    /// Its kind.
    pub kind: Kind,
    /// The reason, if it gives one.
    pub text: String,
}

impl Answers {
    /// Answers read from `fd`.
    pub fn new(fd: OwnedFd, cancel: Cancel) -> Self {
        let deadline = Arc::new(Mutex::new(Instant::now()));
        let from = Some(Timed { fd, cancel, deadline: deadline.clone() });
        Self { reader: None, from, deadline }
    }

    /// The next answer.
    ///
    /// # Errors
    /// An error of the kind `TimedOut` when none comes within `limit`, `UnexpectedEof` when the
    /// receiver has gone; else what is wrong with the answer.
    pub fn next(&mut self, limit: Duration) -> io::Result<Said> {
        *self.deadline.lock() = Instant::now() + limit;
        let failed = |e: StreamError| match e {
            StreamError::Io(e) => e,
            StreamError::Truncated { .. } => io::Error::from(io::ErrorKind::UnexpectedEof),
            other => io::Error::other(other),
        };
        if let Some(from) = self.from.take() {
            self.reader = Some(Reader::begin(BufReader::new(from)).map_err(failed)?);
        }
        let reader = self.reader.as_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut body = Vec::new();
        let kind = reader.next(&mut body).map_err(failed)?;
        body.truncate(4096);
        Ok(Said { kind, text: String::from_utf8_lossy(&body).into_owned() })
    }
}

/// Reads until a deadline.
struct Timed {
    fd: OwnedFd,
    cancel: Cancel,
    deadline: Arc<Mutex<Instant>>,
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.deadline.lock().saturating_duration_since(Instant::now());
            self.cancel.wait_for(&self.fd, PollFlags::IN, Some(left))?;
            match rustix::io::read(&self.fd, &mut *buf) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

/// The machine is complete at the receiver: all that is left is to release it here.
pub struct HandOver {
    pub(super) say: Box<dyn FnMut(Kind) -> io::Result<()>>,
    pub(super) answers: Answers,
}

impl HandOver {
    /// Send `Go`, once this machine has released its disks and taps, and wait for the outcome.
    ///
    /// # Errors
    /// [`SaveError::Refused`] when the receiver gives the machine back, [`SaveError::Unknown`] when
    /// it may have it.
    pub fn go(mut self) -> Result<(), SaveError> {
        let unknown = |why: io::Error| SaveError::Unknown { why };
        let went = (self.say)(Kind::Go);
        // A receiver that gave up earlier has sent `Failed`, and does not read `Go` any more.
        let said = self.answers.next(ANSWER_LIMIT);
        let said = said.map_err(|e| unknown(went.err().unwrap_or(e)))?;
        match said.kind {
            Kind::Running => Ok(()),
            Kind::Failed => Err(SaveError::Refused { why: said.text }),
            other => Err(unknown(io::Error::other(format!("it answered with {}", other.name())))),
        }
    }
}

/// Answers of the receiver. If this is dropped before [`Voice::settle`], the machine is the
/// source's again.
pub struct Voice(Option<Writer<Box<dyn Write + Send>>>);

impl Voice {
    /// Answers that are written to `to`.
    ///
    /// # Errors
    /// When `to` cannot be written.
    pub fn new(to: OwnedFd) -> io::Result<Self> {
        let to: Box<dyn Write + Send> = Box::new(std::fs::File::from(to));
        Ok(Self(Some(Writer::begin(to)?)))
    }

    /// For a sender that reads no answers.
    pub const fn silent() -> Self {
        Self(None)
    }

    /// Whether the sender reads answers.
    pub const fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    /// Send an answer of this `kind`, with the reason `why`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn say(&mut self, kind: Kind, why: &str) -> io::Result<()> {
        let Some(to) = &mut self.0 else { return Ok(()) };
        to.frame(kind, &[why.as_bytes()])?;
        to.flush()
    }

    /// Report that the machine cannot run here, and why: it is the source's again.
    pub fn fail(mut self, kind: Kind, why: &str) {
        // If it cannot be written, the source has gone, or notices by the end of the stream.
        let _ = self.say(kind, why);
        self.0 = None;
    }

    /// The machine stays here: from now on nothing that happens to it is reported to the source.
    pub fn settle(mut self) {
        if let Err(e) = self.say(Kind::Running, "") {
            log::warn!("cannot report to the source that the machine has arrived: {e}");
        }
        self.0 = None;
    }
}

impl Drop for Voice {
    fn drop(&mut self) {
        let _ = self.say(Kind::Failed, "the receiver has ended");
    }
}

/// The greeting of a stream that begins with one, because its sender wants answers.
///
/// # Errors
/// When it cannot be read, or is not understood here.
pub fn greeted<R: Read>(frames: &mut Frames<R>) -> Result<Option<Greeted>, ReceiveError> {
    let mut body = Vec::new();
    let kind = frames.take(&mut body)?;
    if kind != Kind::Hello {
        frames.put_back(kind, body);
        return Ok(None);
    }
    let bounded = Some(&body).filter(|body| body.len() <= LONGEST_HELLO);
    let hello = bounded.and_then(|body| serde_json::from_slice::<Hello>(body).ok());
    let Hello { versions: [oldest, newest], id, domain, cpu } =
        hello.ok_or(ReceiveError::Greeting)?;
    if !(oldest..=newest).contains(&VERSION) {
        return Err(ReceiveError::Versions { oldest, newest });
    }
    log::info!("machine {domain:?} is arriving, migration {id:?}");
    let cpu = cpu.map(|section| section.read()).transpose().map_err(ReceiveError::Cpu)?;
    Ok(Some(Greeted { cpu }))
}

/// Contents of a greeting.
pub struct Greeted {
    /// The CPU that the guest was promised, if the source sends it in advance.
    pub cpu: Option<Cpu>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The result at a source that receives these answers, after its `Go` was read if `taken`.
    fn gone(taken: bool, says: impl FnOnce(Voice)) -> Result<(), SaveError> {
        let (near, far) = UnixStream::pair().unwrap();
        says(Voice::new(far.into()).unwrap());
        let answers = Answers::new(near.into(), Cancel::new().unwrap());
        let say = move |kind| match (kind, taken) {
            (Kind::Go, true) => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
        };
        HandOver { say: Box::new(say), answers }.go()
    }

    #[test]
    fn only_a_word_gives_the_machine_back_whether_go_has_arrived_or_not() {
        for taken in [true, false] {
            let refused = gone(taken, |voice| voice.fail(Kind::Failed, "too late"));
            assert!(
                matches!(&refused, Err(SaveError::Refused { why }) if why == "too late"),
                "{refused:?}"
            );
            let dropped = gone(taken, drop);
            assert!(matches!(dropped, Err(SaveError::Refused { .. })), "{dropped:?}");
            gone(taken, Voice::settle).unwrap();
            // The receiver was killed, or does not follow the protocol.
            let silent = gone(taken, |mut voice| voice.0 = None);
            assert!(matches!(silent, Err(SaveError::Unknown { .. })), "{silent:?}");
            let strange = gone(taken, |mut voice| voice.say(Kind::Accept, "").unwrap());
            assert!(matches!(strange, Err(SaveError::Unknown { .. })), "{strange:?}");
        }
    }

    #[test]
    fn a_greeting_says_what_the_cpu_promises_or_does_not() {
        let cpu = Cpu { cpuid: Vec::new() };
        for cpu in [None, Some(&cpu)] {
            let hello = Hello::new(&7.into(), "vm", cpu).unwrap();
            let mut to = Writer::begin(Vec::new()).unwrap();
            to.frame(Kind::Hello, &[&serde_json::to_vec(&hello).unwrap()]).unwrap();
            let bytes = to.into_inner();
            let found = greeted(&mut Frames::begin(&*bytes).unwrap()).unwrap().unwrap();
            assert_eq!(found.cpu.as_ref(), cpu);
        }
        for wrong in [&br#"{"versions":[3,3],"id":"00","domain":""}"#[..], b"[]", &[b' '; 70_000]] {
            let mut to = Writer::begin(Vec::new()).unwrap();
            to.frame(Kind::Hello, &[wrong]).unwrap();
            let bytes = to.into_inner();
            assert!(greeted(&mut Frames::begin(&*bytes).unwrap()).is_err());
        }
    }
}
