//! What is said beside the machine itself where a stream goes both ways.
//!
//! ```text
//!   source                                             receiver
//!   Hello Config              ------------------->     has it room, the CPU, the disks and taps?
//!                             <-- Accept | Refuse --
//!   (Pages | Zeros).. Section.. End ------------->     whole? build the machine
//!                             <--- Ready | Failed --
//!   release disks and taps; Go ------------------>     take them
//!                             <- Running | Failed --
//! ```
//! The machine is built before `Ready`, with its disks open and not locked and its taps looked at and not
//! attached: taking these is all that is left to fail after `Go`.
//!
//! Before `Go` whatever fails leaves the guest running at the source. After it only `Failed` gives it
//! back: silence and the end of the stream do not, because the receiver may run it. Then the outcome
//! is unknown, and the guest stays stopped at the source until somebody who knows says `cont`.
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

/// How long the answer to `Hello` may take.
pub const ACCEPT_LIMIT: Duration = Duration::from_secs(5);
/// How long each later answer may take.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long a receiver that is ready waits for `Go`. Less than [`ANSWER_LIMIT`]: a source whose `Go` is lost
/// still hears `Failed`, and has its machine again, where silence would leave it in doubt.
pub const GO_LIMIT: Duration = Duration::from_secs(20);
/// Longest body of `Hello`, in bytes.
pub const LONGEST_HELLO: usize = 64 << 10;

/// Body of [`Kind::Hello`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest and newest format that the sender speaks.
    pub versions: [u32; 2],
    /// Of this migration.
    pub id: Id,
    /// The machine's name.
    pub domain: String,
    /// The `cpu` section, so that a receiver can tell before memory is sent. It may be missing, and is in
    /// the state in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Section>,
}

impl Hello {
    /// That of the migration `id` of the machine called `domain`, which has shown its guest `cpu`.
    ///
    /// # Errors
    /// When that has no saved form.
    pub fn new(id: &Id, domain: &str, cpu: Option<&Cpu>) -> Result<Self, SectionError> {
        let cpu = cpu.map(|cpu| Section::of("", cpu)).transpose()?;
        Ok(Self { versions: [VERSION; 2], id: *id, domain: domain.into(), cpu })
    }
}

/// Answers of the receiver, as the source hears them.
pub struct Answers {
    reader: Option<Reader<BufReader<Timed>>>,
    from: Option<Timed>,
    /// The lock, because the reader that looks at it is inside of another one.
    deadline: Arc<Mutex<Instant>>,
}

/// One of them.
pub struct Said {
    /// Its kind.
    pub kind: Kind,
    /// Why, if it says so.
    pub text: String,
}

impl Answers {
    /// What comes from `fd`.
    pub fn new(fd: OwnedFd, cancel: Cancel) -> Self {
        let deadline = Arc::new(Mutex::new(Instant::now()));
        let from = Some(Timed { fd, cancel, deadline: deadline.clone() });
        Self { reader: None, from, deadline }
    }

    /// The next one.
    ///
    /// # Errors
    /// An error of the kind `TimedOut` when none comes within `limit`, `UnexpectedEof` when the
    /// receiver has gone; else what is wrong with what it says.
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

/// The machine is whole at the receiver: all that is left is to let go of it.
pub struct HandOver {
    pub(super) say: Box<dyn FnMut(Kind) -> io::Result<()>>,
    pub(super) answers: Answers,
}

impl HandOver {
    /// Say `Go`; the source has let go of everything. How it ends.
    ///
    /// # Errors
    /// [`SaveError::Refused`] when the receiver gives the machine back, [`SaveError::Unknown`] when it
    /// may have it.
    pub fn go(mut self) -> Result<(), SaveError> {
        let unknown = |why: io::Error| SaveError::Unknown { why };
        let went = (self.say)(Kind::Go);
        // One that has given up before it was told has said so, and does not take the word any more.
        let said = self.answers.next(ANSWER_LIMIT);
        let said = said.map_err(|e| unknown(went.err().unwrap_or(e)))?;
        match said.kind {
            Kind::Running => Ok(()),
            Kind::Failed => Err(SaveError::Refused { why: said.text }),
            other => Err(unknown(io::Error::other(format!("it answers with {}", other.name())))),
        }
    }
}

/// What the receiver says. Dropped before the machine is here to stay, it gives it back.
pub struct Voice(Option<Writer<Box<dyn Write + Send>>>);

impl Voice {
    /// Say it to `to`.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn new(to: OwnedFd) -> io::Result<Self> {
        let to: Box<dyn Write + Send> = Box::new(std::fs::File::from(to));
        Ok(Self(Some(Writer::begin(to)?)))
    }

    /// The sender listens to nothing.
    pub const fn silent() -> Self {
        Self(None)
    }

    /// Whether anything is heard.
    pub const fn is_heard(&self) -> bool {
        self.0.is_some()
    }

    /// Say `kind`, and `why`.
    ///
    /// # Errors
    /// When the source does not take it.
    pub fn say(&mut self, kind: Kind, why: &str) -> io::Result<()> {
        let Some(to) = &mut self.0 else { return Ok(()) };
        to.frame(kind, &[why.as_bytes()])?;
        to.flush()
    }

    /// The machine does not come about here, and why: it is the source's again.
    pub fn fail(mut self, kind: Kind, why: &str) {
        // A source that does not take it has gone, or finds out.
        let _ = self.say(kind, why);
        self.0 = None;
    }

    /// The machine is here: whatever becomes of it from now on, the source has no part in it.
    pub fn settle(mut self) {
        if let Err(e) = self.say(Kind::Running, "") {
            log::warn!("the source is not told that the machine is here: {e}");
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
/// When it cannot be read, or is none that is understood here.
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
    log::info!("machine {domain:?} comes in, migration {id:?}");
    let cpu = cpu.map(|section| section.read()).transpose().map_err(ReceiveError::Cpu)?;
    Ok(Some(Greeted { cpu }))
}

/// What a greeting has told.
pub struct Greeted {
    /// What the guest has been promised, if the source says so beforehand.
    pub cpu: Option<Cpu>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// How a source fares whose `Go` is taken or not, and which then hears this.
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
            // Killed, or of another mind.
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
