//! A monitor made of a socket, so that every order of questions and answers can be had.
use std::{
    io::{BufRead, BufReader, IoSliceMut},
    mem::MaybeUninit,
    sync::mpsc::{Receiver, Sender, channel},
    time::Instant,
};

use replication::{Answer, Incarnation, Party, Record, Side, Word};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;

const LONG: Duration = Duration::from_secs(60);
const GUEST: &str = "00000000-0000-0000-0000-000000000007";

/// The monitor's end of a connection to a server.
struct Monitor {
    stream: UnixStream,
    read: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Monitor {
    fn say(&mut self, value: &Value) {
        self.stream.write_all(format!("{value}\n").as_bytes()).unwrap();
    }

    fn needs(&mut self, data: &Value) {
        let timestamp = json!({ "seconds": 0, "microseconds": 0 });
        self.say(&json!({ "event": NEEDS, "data": data, "timestamp": timestamp }));
    }

    /// The next command, with its descriptors in `fds`.
    fn command(&mut self) -> Value {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut chunk = [0; 4096];
            let iov = &mut [IoSliceMut::new(&mut chunk)];
            let got = recvmsg(&self.stream, iov, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
            assert!(got.bytes > 0, "the server has hung up");
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            self.read.extend(&chunk[..got.bytes]);
        }
    }

    /// The next command, which is accepted; its arguments.
    fn accept(&mut self, name: &str) -> Value {
        let command = self.command();
        assert_eq!(command["execute"], name, "{command}");
        self.say(&json!({ "return": {} }));
        command["arguments"].clone()
    }

    fn refuse(&mut self, name: &str) {
        let command = self.command();
        assert_eq!(command["execute"], name, "{command}");
        self.say(&json!({ "error": { "class": "GenericError", "desc": "no longer needed" } }));
    }
}

/// Means that wait for the test, and say what they were asked.
struct Script {
    asked: Receiver<Option<Need>>,
    dialled: Sender<Result<OwnedFd, Unknown>>,
    answer: Sender<Said>,
    fenced: Sender<Said>,
}

fn means() -> (Means, Script) {
    let (heard, asked) = channel();
    let (dialled, dials) = channel();
    let (answer, answers) = channel();
    let (fenced, fences) = channel();
    let (dial, witness, fence) = (heard.clone(), heard.clone(), heard);
    let means = Means {
        dial: Box::new(move || {
            let _ = dial.send(None);
            dials.recv().unwrap_or_else(|_| Err(Unknown::new("the test is over")))
        }),
        witness: Box::new(move |need| {
            let _ = witness.send(Some(*need));
            answers.recv().unwrap_or(Said::Superseded)
        }),
        fence: Box::new(move |need| {
            let _ = fence.send(Some(*need));
            fences.recv().unwrap_or(Said::Superseded)
        }),
    };
    (means, Script { asked, dialled, answer, fenced })
}

/// A server for `monitor`, in a thread; it ends when the monitor hangs up.
fn serve(means: Means) -> (Monitor, thread::JoinHandle<(End, Vec<String>)>) {
    let (own, theirs) = UnixStream::pair().unwrap();
    own.set_read_timeout(Some(LONG)).unwrap();
    let mut monitor = Monitor { stream: own, read: Vec::new(), fds: Vec::new() };
    let server = thread::spawn(move || {
        let mut client = Client::on(theirs, LONG).unwrap();
        let mut said = Vec::new();
        let mut server = Server::new(means).unwrap();
        let end = server.run(&mut client, || true, |line| said.push(line.to_owned())).unwrap();
        (end, said)
    });
    let version = json!({ "qemu": { "micro": 1, "minor": 0, "major": 5 }, "package": "" });
    monitor.say(&json!({ "QMP": { "version": version, "capabilities": [] } }));
    (monitor, server)
}

fn look(nonce: u64, term: u64) -> Value {
    json!({ "nonce": nonce, "need": "look", "lineage": GUEST, "term": term })
}

#[test]
fn a_record_is_passed_on_as_it_is() {
    let (means, script) = means();
    let (mut monitor, server) = serve(means);
    monitor.needs(&json!({ "nonce": 5, "need": "claim", "lineage": GUEST, "term": 2,
        "word": "solo", "side": "primary", "incarnation": GUEST }));
    let asked = script.asked.recv_timeout(LONG).unwrap().unwrap();
    assert_eq!(asked.word(), "claim");
    let winner = Party { side: Side::Backup, incarnation: Incarnation(9) };
    let record = Record { word: Word::Promote, winner, settled: None };
    script.answer.send(Ok(Answer::Record(Some(record))).into()).unwrap();
    let record = json!({ "word": "promote", "side": "backup",
        "incarnation": "00000000-0000-0000-0000-000000000009" });
    let wanted = json!({ "nonce": 5, "need": "claim", "result": "record", "record": record });
    assert_eq!(monitor.accept(ANSWER), wanted);
    monitor.needs(&look(6, 3));
    script.answer.send(Ok(Answer::Record(None)).into()).unwrap();
    let wanted = json!({ "nonce": 6, "need": "look", "result": "record", "record": null });
    assert_eq!(monitor.accept(ANSWER), wanted);
    drop(monitor);
    assert_eq!(server.join().unwrap(), (End::HungUp, vec![]));
}

#[test]
fn a_connection_comes_with_its_descriptor() {
    let (means, script) = means();
    let (mut monitor, server) = serve(means);
    monitor.needs(&json!({ "nonce": 1, "need": "connect" }));
    script.dialled.send(Err(Unknown::new("nobody listens"))).unwrap();
    let wanted = json!({ "nonce": 1, "need": "connect", "result": "unknown",
        "reason": "nobody listens" });
    assert_eq!(monitor.accept(ANSWER), wanted);
    monitor.needs(&json!({ "nonce": 2, "need": "connect" }));
    let (backup, connection) = UnixStream::pair().unwrap();
    script.dialled.send(Ok(connection.into())).unwrap();
    let name = monitor.accept("getfd")["fdname"].clone();
    let wanted = json!({ "nonce": 2, "need": "connect", "result": "connected", "fd": name });
    assert_eq!(monitor.accept(ANSWER), wanted);
    let mut passed = UnixStream::from(monitor.fds.pop().unwrap());
    passed.write_all(b"Hello\n").unwrap();
    let mut line = String::new();
    BufReader::new(&backup).read_line(&mut line).unwrap();
    assert_eq!(line, "Hello\n");
    // One that comes too late is closed at both ends.
    drop(passed);
    monitor.needs(&json!({ "nonce": 3, "need": "connect" }));
    let (backup, connection) = UnixStream::pair().unwrap();
    script.dialled.send(Ok(connection.into())).unwrap();
    let name = monitor.accept("getfd")["fdname"].clone();
    monitor.refuse(ANSWER);
    assert_eq!(monitor.accept("closefd")["fdname"], name);
    monitor.fds.clear();
    assert_eq!(BufReader::new(&backup).read_line(&mut line).unwrap(), 0);
    drop(monitor);
    let (end, said) = server.join().unwrap();
    assert_eq!((end, said.len()), (End::HungUp, 1));
}

#[test]
fn what_hangs_holds_up_its_own_kind_only() {
    let (means, script) = means();
    let (mut monitor, server) = serve(means);
    monitor.needs(&json!({ "nonce": 1, "need": "connect" }));
    monitor.needs(&look(2, 1));
    // Asked again and again while there is no answer: worked on once.
    for _ in 0..10 {
        monitor.needs(&look(2, 1));
    }
    monitor.needs(&json!({ "nonce": 3, "need": "fence", "lineage": GUEST, "term": 1 }));
    script.fenced.send(Said::Down).unwrap();
    let wanted = json!({ "nonce": 3, "need": "fence", "result": "down" });
    assert_eq!(monitor.accept(ANSWER), wanted);
    // The same nonce for another question.
    monitor.needs(&look(2, 2));
    script.answer.send(Said::Superseded).unwrap();
    let wanted = json!({ "nonce": 2, "need": "look", "result": "superseded" });
    assert_eq!(monitor.accept(ANSWER), wanted);
    script.answer.send(Said::Record { record: None }).unwrap();
    assert_eq!(monitor.accept(ANSWER)["record"], Value::Null);
    script.dialled.send(Err(Unknown::new("late"))).unwrap();
    assert_eq!(monitor.accept(ANSWER)["reason"], "late");
    let asked: Vec<_> = script.asked.try_iter().collect();
    assert_eq!(asked.len(), 4, "a connection, two looks and a fence: {asked:?}");
    drop(monitor);
    server.join().unwrap();
}

#[test]
fn nonsense_and_other_events_do_no_harm() {
    let (means, script) = means();
    let (mut monitor, server) = serve(means);
    monitor.needs(&json!({ "nonce": 1, "need": "money" }));
    monitor.needs(&json!({ "nonce": -1, "need": "connect" }));
    monitor.needs(&json!([]));
    let timestamp = json!({ "seconds": 0, "microseconds": 0 });
    monitor.say(&json!({ "event": "STOP", "data": {}, "timestamp": timestamp }));
    for nonce in 0..2 * MAX_NEEDS as u64 {
        monitor.needs(&look(nonce, 1));
    }
    let begin = Instant::now();
    for _ in 0..MAX_NEEDS {
        script.answer.send(Said::Superseded).unwrap();
        monitor.accept(ANSWER);
    }
    assert!(begin.elapsed() < LONG);
    drop(monitor);
    let (end, said) = server.join().unwrap();
    assert_eq!((end, said.len()), (End::HungUp, 3));
}
