//! How fast this monitor answers while something is blocked: a save that makes no progress, storage
//! that hangs, a guest that floods its disks.
pub mod answers;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use qmp::client::{Client, ClientError};
use rustix::fs::{FileType, Mode};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Message;
use super::measure::{LIMIT, SETTLE, introduce, send, with_last_words};
use super::monitors::{Found, OURS};
use super::rig::Rig;
use super::run::Run;
use stories::archive::make_ext4;
use stories::debian::{Debian, output};
use stories::{bounds, payloads};

/// How often each question is asked in each situation, unless the command line says otherwise.
pub const TIMES: usize = 50;
/// An answer that takes longer counts as missing.
const SILENCE: Duration = Duration::from_secs(10);
/// How long `stop` has been pending when another client asks.
const HEAD_START: Duration = Duration::from_millis(10);
/// Disks that the guest floods, and bytes of each; the images are sparse.
const DISKS: usize = 8;
const DISK: u64 = 512 << 20;
/// Bytes of the file system that is frozen.
const FILE_SYSTEM: u64 = 64 << 20;
/// The guests: one that halts, one that writes to its disk endlessly, one that floods its disks.
const HALTS: &[u8] = payloads::HELLO;
const WRITES: &[u8] = payloads::BLK;
const FLOODS: &[u8] = payloads::FLOOD;

/// What is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// A save to a FIFO that is never opened.
    Fifo,
    /// A save into a file system that is frozen.
    FrozenSave,
    /// A disk whose image is in a file system that is frozen.
    FrozenDisk,
    /// A guest that keeps the queues of its disks full of WRITE_ZEROES.
    Flood,
}

impl Hold {
    const ALL: [Self; 4] = [Self::Fifo, Self::FrozenSave, Self::FrozenDisk, Self::Flood];

    /// For people.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Fifo => "A save to a FIFO that is never opened",
            Self::FrozenSave => "A save into a frozen file system",
            Self::FrozenDisk => "A disk in a frozen file system",
            Self::Flood => "A guest that floods 8 disks with WRITE_ZEROES",
        }
    }
}

/// What is asked meanwhile, by another client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// `query-status`.
    Status,
    /// `stop`; a refusal is an answer.
    Stop,
    /// `query-status` while another client's `stop` has not been answered.
    Meanwhile,
    /// `quit`.
    Quit,
    /// SIGTERM; its answer is SHUTDOWN and the end of the connection.
    Signal,
}

impl Question {
    const ALL: [Self; 5] = [Self::Status, Self::Stop, Self::Meanwhile, Self::Quit, Self::Signal];

    /// For people.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Status => "query-status",
            Self::Stop => "stop",
            Self::Meanwhile => "query-status during stop",
            Self::Quit => "quit",
            Self::Signal => "SIGTERM, to the end",
        }
    }

    /// How long the answer may take.
    #[must_use]
    pub const fn bound(self) -> Duration {
        match self {
            Self::Status | Self::Meanwhile => bounds::QUESTION,
            Self::Stop | Self::Quit => bounds::COMMAND,
            Self::Signal => bounds::SIGNAL,
        }
    }
}

/// The outcome of a question.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It succeeded, after so many seconds.
    Done(f64),
    /// It was refused, after so many seconds.
    Refused(f64),
    /// No answer came in the time allowed.
    Silence,
}

impl Answer {
    /// Seconds; infinite without an answer.
    const fn seconds(self) -> f64 {
        match self {
            Self::Done(seconds) | Self::Refused(seconds) => seconds,
            Self::Silence => f64::INFINITY,
        }
    }
}

/// Creates every situation that it can, and asks everything `times` times in each.
///
/// # Errors
/// The requesting process has ended. A situation that cannot be created here is only reported.
pub fn measure(rig: &Rig, debian: &Debian, times: usize) -> Result<()> {
    let found = Found::build(OURS.name, rig.paths.stratovirt.clone());
    introduce(std::slice::from_ref(&found))?;
    send(&Message::Plan(Hold::ALL.len() * times * 3))?;
    for hold in Hold::ALL {
        let asked = Stage::new(rig, debian, &found, hold).and_then(|stage| {
            for _ in 0..times {
                // A stopped guest no longer floods, and a monitor that has ended is not blocked.
                for questions in [
                    &[Question::Status, Question::Stop][..],
                    &[Question::Quit],
                    &[Question::Signal],
                ] {
                    send(&Message::Step(hold.title().to_owned()))?;
                    stage.ask(questions)?;
                }
            }
            Ok(())
        });
        if let Err(error) = asked {
            send(&Message::NotHeld { hold, error: with_last_words(rig, &error) })?;
        }
    }
    Ok(())
}

/// What all runs of one situation share.
struct Stage<'a> {
    rig: &'a Rig,
    found: &'a Found,
    hold: Hold,
    kernel: PathBuf,
    disks: Vec<PathBuf>,
    /// The target of the save.
    target: PathBuf,
    file_system: Option<PathBuf>,
}

impl<'a> Stage<'a> {
    fn new(rig: &'a Rig, debian: &Debian, found: &'a Found, hold: Hold) -> Result<Self> {
        let dir = rig.dir.join("held");
        fs::create_dir_all(&dir)?;
        let kernel = dir.join("kernel");
        let (guest, disks) = match hold {
            Hold::Fifo | Hold::FrozenSave => (HALTS, 0),
            Hold::FrozenDisk => (WRITES, 1),
            Hold::Flood => (FLOODS, DISKS),
        };
        fs::write(&kernel, guest)?;
        let file_system = match hold {
            Hold::FrozenSave | Hold::FrozenDisk => Some(mount(debian, &dir)?),
            Hold::Fifo | Hold::Flood => None,
        };
        let place = file_system.as_ref().unwrap_or(&dir);
        let target = place.join("saved");
        let disks: Vec<_> = (0..disks).map(|disk| place.join(format!("disk{disk}"))).collect();
        match hold {
            Hold::Fifo => {
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(rustix::fs::CWD, &target, FileType::Fifo, mode, 0)?;
            }
            Hold::FrozenSave => fs::create_dir_all(&target)?,
            Hold::FrozenDisk | Hold::Flood => {}
        }
        Ok(Self { rig, found, hold, kernel, disks, target, file_system })
    }

    /// Starts a machine, creates the situation, and asks.
    fn ask(&self, questions: &[Question]) -> Result<()> {
        // Other files each time: the kernel ends a killed process's io_uring asynchronously, and
        // the locks on its disks last until then.
        for disk in &self.disks {
            let _ = fs::remove_file(disk);
            let bytes = if self.file_system.is_some() { 1 << 20 } else { DISK };
            fs::File::create(disk)?.set_len(bytes)?;
        }
        let mut run = Run::launch(self.found, &self.rig.dir, |socket| self.command(socket))?;
        drop(run.connect()?);
        match self.hold {
            Hold::Fifo | Hold::FrozenSave | Hold::FrozenDisk => run.wait_byte(b'\n', LIMIT)?,
            Hold::Flood => run.wait_byte(b'!', LIMIT)?,
        };
        let mut clients = [connect(run.socket())?, connect(run.socket())?];
        let frozen = self.file_system.as_deref().map(Frozen::new).transpose()?;
        let saving = match self.hold {
            Hold::Fifo | Hold::FrozenSave => Some(self.begin_save(run.socket())?),
            Hold::FrozenDisk | Hold::Flood => None,
        };
        thread::sleep(SETTLE);
        let answers =
            questions.iter().try_for_each(|&question| self.one(question, &mut clients, run.pid()));
        // First thaw the file system: the kernel keeps a process until its writes have ended.
        drop(frozen);
        drop((saving, run));
        answers
    }

    /// Asks one question, and reports the answer.
    fn one(&self, question: Question, clients: &mut [Client; 2], pid: u32) -> Result<()> {
        let [client, other] = clients;
        let send = |question, answer| send(&Message::Held { hold: self.hold, question, answer });
        if question != Question::Stop {
            return send(question, ask(client, question, pid)?);
        }
        let (stop, meanwhile) = thread::scope(|scope| {
            let stop = scope.spawn(|| ask(client, question, pid));
            thread::sleep(HEAD_START);
            let meanwhile = ask(other, Question::Meanwhile, pid);
            (stop.join().unwrap_or_else(|_| Err(anyhow!("the client panicked"))), meanwhile)
        });
        send(Question::Stop, stop?)?;
        send(Question::Meanwhile, meanwhile?)
    }

    /// Requests a save, with a client that does not wait for the answer.
    fn begin_save(&self, socket: &Path) -> Result<Client> {
        let mut client = connect(socket)?;
        let uri = format!("file:{}", self.target.display());
        let command = json!({ "execute": "migrate", "arguments": { "uri": uri } });
        client.send_line(&command.to_string())?;
        Ok(client)
    }

    fn command(&self, socket: &Path) -> Result<Command> {
        let disks: Vec<Value> = self
            .disks
            .iter()
            .enumerate()
            .map(|(number, disk)| {
                json!({
                    "drive_id": format!("disk{number}"), "path_on_host": disk,
                    "read_only": false, "direct": false,
                })
            })
            .collect();
        let word = match self.hold {
            Hold::Fifo | Hold::FrozenSave => "halt",
            Hold::FrozenDisk | Hold::Flood => "busy",
        };
        let config = json!({
            "boot-source": { "kernel_image_path": self.kernel, "boot_args": word },
            "machine-config": { "vcpu_count": 1, "mem_size": 64 << 20 },
            "serial": { "stdio": true },
            "drive": disks,
        });
        let file = self.rig.dir.join("held.json");
        fs::write(&file, config.to_string())?;
        let mut command = self.found.program()?;
        command.arg("-config").arg(file);
        command.arg("-api-channel").arg(format!("unix:{}", socket.display()));
        Ok(command)
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        if let Some(place) = &self.file_system {
            // Otherwise it disappears with this process's mount namespace.
            let _ = output(Command::new("umount").arg(place));
        }
        // For the next situation; an error shows when that is created.
        let _ = fs::remove_dir_all(self.rig.dir.join("held"));
    }
}

fn connect(socket: &Path) -> Result<Client> {
    let mut client = Client::connect(socket, SILENCE)?;
    client.execute_raw("qmp_capabilities", json!({}))?;
    client.set_timeout(SILENCE);
    Ok(client)
}

fn ask(client: &mut Client, question: Question, pid: u32) -> Result<Answer> {
    let command = match question {
        Question::Status | Question::Meanwhile => "query-status",
        Question::Stop => "stop",
        Question::Quit => "quit",
        Question::Signal => return signal(client, pid),
    };
    let asked = Instant::now();
    let answer = client.execute_raw(command, json!({}));
    let seconds = asked.elapsed().as_secs_f64();
    match answer {
        Ok(_) => Ok(Answer::Done(seconds)),
        Err(ClientError::Refused { .. }) => Ok(Answer::Refused(seconds)),
        Err(ClientError::Timeout { .. }) => Ok(Answer::Silence),
        Err(error) => Err(error).context(command),
    }
}

fn signal(client: &mut Client, pid: u32) -> Result<Answer> {
    let pid = Pid::from_raw(pid.cast_signed()).context("a process without a number")?;
    let asked = Instant::now();
    kill_process(pid, Signal::TERM)?;
    match client.wait_event("SHUTDOWN", SILENCE).and_then(|_| client.wait_closed(SILENCE)) {
        Ok(()) => Ok(Answer::Done(asked.elapsed().as_secs_f64())),
        Err(ClientError::Timeout { .. }) => Ok(Answer::Silence),
        Err(error) => Err(error).context("SIGTERM"),
    }
}

/// A new file system in a file, mounted in this process's mount namespace.
fn mount(debian: &Debian, dir: &Path) -> Result<PathBuf> {
    let (image, place) = (dir.join("image"), dir.join("mounted"));
    make_ext4(debian, &image, FILE_SYSTEM, None)?;
    fs::create_dir_all(&place)?;
    output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&place))
        .context("cannot mount a file system to freeze (this needs root)")?;
    Ok(place)
}

/// A frozen file system. Thawed when this is dropped, and also if this process is killed: the shell
/// that froze it then reads the end of its input.
struct Frozen(Child);

impl Frozen {
    fn new(place: &Path) -> Result<Self> {
        let script = "fsfreeze -f \"$1\" && echo frozen && read -r line; fsfreeze -u \"$1\"";
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start sh")?;
        let mut said = String::new();
        BufReader::new(shell.stdout.take().context("a child without output")?)
            .read_line(&mut said)?;
        let frozen = Self(shell);
        ensure!(said == "frozen\n", "fsfreeze cannot freeze {}", place.display());
        Ok(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(mut input) = self.0.stdin.take() {
            // If it has ended, it has thawed the file system.
            let _ = input.write_all(b"\n");
        }
        let _ = self.0.wait();
    }
}
