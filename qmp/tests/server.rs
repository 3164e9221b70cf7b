//! What clients can do to a server, and what it guarantees them.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]
mod host;

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use host::{Host, LONG};
use qmp::{
    ErrorClass,
    client::{Client, ClientError},
    schema::*,
};
use serde_json::{Value, json};

fn ask(client: &mut Client, line: &str) -> String {
    client.send_line(line).unwrap();
    client.read_line(LONG).unwrap()
}

/// `line` without the digits of its timestamp.
fn timeless(line: &str) -> String {
    let (head, tail) = line.split_once("\"timestamp\"").unwrap();
    format!("{head}\"timestamp\"{}", tail.replace(|c: char| c.is_ascii_digit(), ""))
}

const STAMP: &str = r#""timestamp":{"seconds":,"microseconds":}}"#;

#[test]
fn the_lifecycle_guide_works_word_for_word() {
    let host = Host::start();
    let mut raw = UnixStream::connect(&host.path).unwrap();
    let mut greeting = [0; 110];
    let length = raw.read(&mut greeting).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        String::from_utf8_lossy(&greeting[..length]),
        format!(
            "{{\"QMP\":{{\"version\":{{\"qemu\":{{\"micro\":0,\"minor\":0,\"major\":9}},\
             \"package\":\"StratoVirt-{version}\"}},\"capabilities\":[]}}}}\r\n"
        )
    );
    drop(raw);

    let mut client = host.client();
    // No qmp_capabilities first.
    assert_eq!(
        timeless(&ask(&mut client, r#"{"execute":"stop"}"#)),
        format!(r#"{{"event":"STOP","data":{{}},{STAMP}"#)
    );
    assert_eq!(client.read_line(LONG).unwrap(), r#"{"return":{}}"#);
    assert_eq!(
        ask(&mut client, r#"{"execute":"query-status"}"#),
        r#"{"return":{"running":false,"singlestep":false,"status":"paused"}}"#
    );
    assert_eq!(
        timeless(&ask(&mut client, r#"{"execute":"cont"}"#)),
        format!(r#"{{"event":"RESUME","data":{{}},{STAMP}"#)
    );
    assert_eq!(client.read_line(LONG).unwrap(), r#"{"return":{}}"#);
    for _ in 0..2 {
        assert_eq!(
            ask(&mut client, r#"{"execute":"qmp_capabilities","id":1}"#),
            r#"{"return":{},"id":1}"#
        );
    }
    assert_eq!(ask(&mut client, r#"{"execute":"quit"}"#), r#"{"return":{}}"#);
    assert_eq!(
        timeless(&client.read_line(LONG).unwrap()),
        format!(
            r#"{{"event":"SHUTDOWN","data":{{"guest":false,"reason":"host-qmp-quit"}},{STAMP}"#
        )
    );
    client.wait_closed(LONG).unwrap();
    host.join();
}

#[test]
fn commands_may_be_joined_and_split_in_any_way() {
    let host = Host::start();
    let mut client = host.client();
    let many: String =
        (0..1000).map(|n| format!(r#"{{"execute":"query-kvm","id":{n}}}"#)).collect();
    client.send_raw(many.as_bytes()).unwrap();
    for n in 0..1000 {
        assert!(client.read_line(LONG).unwrap().ends_with(&format!("\"id\":{n}}}")));
    }
    for byte in br#"{"execute":"qmp_capabilities"}"# {
        client.send_raw(&[*byte]).unwrap();
    }
    assert_eq!(client.read_line(LONG).unwrap(), r#"{"return":{}}"#);
}

#[test]
fn mistakes_are_answered_and_forgiven() {
    let host = Host::start();
    let mut client = host.client();
    for (line, class, text) in [
        (r#"{"execute":"foo"}"#, "CommandNotFound", "The command foo has not been found"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        (r#"["execute","stop"]"#, "GenericError", "JSON parse error, expecting an object, got '['"),
        (
            r#"{"execute":"stop","arguments":["now"]}"#,
            "GenericError",
            "'arguments' must be an object",
        ),
        (
            r#"{"execute":"stop","arguments":{"x":1}}"#,
            "GenericError",
            "Parameter 'x' is unexpected",
        ),
        (r#"{"execute":"stop","extra":1}"#, "GenericError", "member 'extra' is unexpected"),
        (r#"{"execute":"stop","execute":"stop"}"#, "GenericError", "duplicate key 'execute'"),
        (r#"{"execute":"st\u0000op"}"#, "GenericError", "NUL in a string"),
        (r#"{"execute":"\ud800"}"#, "GenericError", "JSON parse error"),
        (r#"{"execute":"getfd","arguments":{"fdname":1e999}}"#, "GenericError", "out of range"),
        (r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#, "GenericError", "No file descriptor"),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#,
            "GenericError",
            "'oob' is not available",
        ),
    ] {
        let answer: Value = serde_json::from_str(&ask(&mut client, line)).unwrap();
        assert_eq!(answer["error"]["class"], class, "{line}");
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(text), "{line}: {desc}");
    }
    client.send_raw(b"{\"execute\":\"\xff\"}\n\xef\xbb\xbf\n").unwrap();
    for _ in 0..2 {
        assert!(client.read_line(LONG).unwrap().contains("JSON parse error"));
    }
    // None of these requests has stopped the machine.
    assert!(client.execute(&QueryStatus {}).unwrap().running);
    assert_eq!(client.take_events(), []);
}

#[test]
fn the_protocol_describes_itself() {
    let host = Host::start();
    let mut client = host.client();
    let commands: Vec<String> =
        client.execute(&QueryCommands {}).unwrap().into_iter().map(|c| c.name).collect();
    let events: Vec<String> =
        client.execute(&QueryEvents {}).unwrap().into_iter().map(|e| e.name).collect();
    assert!(commands.contains(&"query-commands".into()) && commands.contains(&"stop".into()));
    let schema = client.execute(&QueryQmpSchema {}).unwrap();
    let described = |kind| -> Vec<String> {
        schema.iter().filter(|e| e.meta_type == kind).map(|e| e.name.clone()).collect()
    };
    // Commands without a handler are not in the schema.
    assert_eq!(described(SchemaMetaType::Command), commands);
    assert_eq!(described(SchemaMetaType::Event), events);
    assert_eq!(&client.execute(&QueryVersion {}).unwrap(), client.version());
}

#[test]
fn a_typed_client_gets_typed_answers() {
    let host = Host::start();
    let mut client = host.client();
    client.execute(&QmpCapabilities::default()).unwrap();
    client.execute(&Stop {}).unwrap();
    // The event came before the return and has been kept.
    let stop = client.wait_event("STOP", Duration::ZERO).unwrap();
    assert_eq!(stop.data, json!({}));
    let refused = client.execute(&DeviceDel { id: "x".into() }).unwrap_err();
    let ClientError::Refused { error, .. } = refused else { panic!("{refused}") };
    assert_eq!(error.class(), ErrorClass::CommandNotFound);
    let late = client.wait_event("RESUME", Duration::from_millis(1)).unwrap_err();
    assert_eq!(late.to_string(), "no RESUME event from the QMP server within 1ms");
}

#[test]
fn two_clients_that_race_see_one_history() {
    let host = Host::start();
    let race = |name: &'static str, other: &'static str| {
        let mut client = host.client();
        move || {
            for _ in 0..200 {
                client.execute_raw(name, json!({})).unwrap();
            }
            // A last event that both must receive.
            client.execute_raw(other, json!({})).unwrap();
            client.execute(&QueryStatus {}).unwrap();
            client
        }
    };
    let (stop, cont) = (race("stop", "stop"), race("cont", "stop"));
    let (mut a, mut b) = thread::scope(|scope| {
        let (a, b) = (scope.spawn(stop), scope.spawn(cont));
        (a.join().unwrap(), b.join().unwrap())
    });
    let mut heard = [&mut a, &mut b].map(|client| {
        client.execute(&QueryStatus {}).unwrap();
        client.take_events()
    });
    let [first, second] = &mut heard;
    assert_eq!(first, second);
    let names: Vec<_> = first.iter().map(|e| e.event.as_str()).collect();
    // They alternate: no client has seen a change that did not happen.
    for (n, name) in names.iter().enumerate() {
        assert_eq!(*name, if n % 2 == 0 { "STOP" } else { "RESUME" });
    }
}

#[test]
fn who_sends_without_reading_waits_and_loses_nothing() {
    const COUNT: usize = 5000;
    let host = Host::start();
    let mut eager = host.client();
    let mut pen = eager.stream().try_clone().unwrap();
    let id = "x".repeat(1000);
    // 5 MB of answers, far more than is kept for a client that does not read.
    let many = format!(r#"{{"execute":"qmp_capabilities","id":"{id}"}}"#).repeat(COUNT);
    let writer = thread::spawn(move || pen.write_all(many.as_bytes()));
    // Both directions are full and blocked; another client is served.
    host.settle();
    assert!(!writer.is_finished());
    host.client().execute(&QueryStatus {}).unwrap();
    for _ in 0..COUNT {
        assert_eq!(eager.read_line(LONG).unwrap(), format!(r#"{{"return":{{}},"id":"{id}"}}"#));
    }
    writer.join().unwrap().unwrap();
}

#[test]
fn who_never_stops_asking_leaves_the_others_their_turn() {
    let host = Host::start();
    let mut greedy = UnixStream::connect(&host.path).unwrap();
    let mut pen = greedy.try_clone().unwrap();
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let many = br#"{"execute":"qmp_capabilities"}"#.repeat(1000);
            while !enough.load(Ordering::Relaxed) {
                pen.write_all(&many).unwrap();
            }
            pen.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(|| std::io::copy(&mut greedy, &mut std::io::sink()).unwrap());
        let mut other = host.client();
        let served = (0..200).try_for_each(|_| other.execute(&QueryStatus {}).map(drop));
        enough.store(true, Ordering::Relaxed);
        served.unwrap();
    });
}

#[test]
fn who_never_reads_is_dropped_and_the_others_are_not() {
    let host = Host::start();
    let mut deaf = host.client();
    let mut other = host.client();
    // An event is some 90 bytes; 1 MiB and what the kernel holds must be passed.
    let rest = (0..20_000).find(|_| {
        other.execute(&Stop {}).unwrap();
        other.execute(&Cont {}).unwrap();
        assert_eq!(other.take_events().len(), 2);
        // A hang-up can be detected without reading the input before it.
        let mut poll = [rustix::event::PollFd::new(deaf.stream(), rustix::event::PollFlags::RDHUP)];
        rustix::event::poll(&mut poll, Some(&Default::default())).unwrap() > 0
    });
    assert!(rest.is_some(), "it was never dropped");
    deaf.wait_closed(LONG).unwrap();
    // What the kernel had taken is still there.
    assert_eq!(deaf.take_events()[0].event, "STOP");
    other.execute(&QueryStatus {}).unwrap();
}

#[test]
fn a_huge_or_incomplete_line_costs_other_clients_nothing() {
    let host = Host::start();
    let mut half = host.client();
    half.send_raw(br#"{"execute":"st"#).unwrap();
    let mut huge = host.client();
    let mut pen = huge.stream().try_clone().unwrap();
    let writer = thread::spawn(move || {
        pen.write_all(b"{\"a\":\"").unwrap();
        for _ in 0..64 {
            pen.write_all(&[b'x'; 1 << 18]).unwrap();
        }
        pen.write_all(b"\"}\n{\"execute\":\"query-status\"}\n").unwrap();
    });
    let mut other = host.client();
    for _ in 0..100 {
        other.execute(&QueryStatus {}).unwrap();
    }
    writer.join().unwrap();
    assert!(huge.read_line(LONG).unwrap().contains("longer than 1048576 bytes"));
    assert!(huge.read_line(LONG).unwrap().contains("\"running\":true"));
    half.send_raw(br#"op"}"#).unwrap();
    half.wait_event("STOP", LONG).unwrap();
}

#[test]
fn all_clients_together_have_a_bound_on_memory() {
    const MAX_MEMORY: usize = 16 << 20;
    let host = Host::start();
    let mut client = host.client();
    // Each message is shorter than the limit, and never ends.
    let half = format!("{{\"execute\":\"{}", "x".repeat(1_000_000));
    let mut others: Vec<_> = (0..40).map(|_| UnixStream::connect(&host.path).unwrap()).collect();
    for other in &mut others {
        other.set_write_timeout(Some(LONG)).unwrap();
        // An error means that it was dropped already.
        let _ = other.write_all(half.as_bytes());
        assert_eq!(
            ask(&mut client, r#"{"execute":"query-status"}"#),
            r#"{"return":{"running":true,"singlestep":false,"status":"running"}}"#
        );
    }
    let is_open = |other: &mut UnixStream| {
        other.set_nonblocking(true).unwrap();
        let _greeting = other.read(&mut [0; 4096]);
        let end = other.read(&mut [0; 4096]);
        matches!(&end, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
    };
    let begin = Instant::now();
    loop {
        let left = others.iter_mut().map(is_open).filter(|open| *open).count();
        assert!(left > 0 && begin.elapsed() < LONG, "{left} of 40 are left");
        // The server may not have read all yet.
        if left <= MAX_MEMORY / half.len() {
            break;
        }
    }
}

#[test]
fn who_has_said_all_still_gets_all_answers() {
    let host = Host::start();
    let id = "x".repeat(30_000);
    let command = format!(r#"{{"execute":"qmp_capabilities","id":"{id}"}}"#);
    // From less than the kernel buffers to more than the server accepts before the client reads.
    for count in 1..15 {
        let mut client = host.client();
        let mut pen = client.stream().try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                pen.write_all(command.repeat(count).as_bytes()).unwrap();
                pen.shutdown(Shutdown::Write).unwrap();
            });
            host.settle();
            for _ in 0..count {
                assert!(client.read_line(LONG).unwrap().ends_with("x\"}"));
            }
        });
        client.wait_closed(LONG).unwrap();
    }
}

#[test]
fn who_dies_in_the_middle_is_forgotten() {
    let host = Host::start();
    for _ in 0..50 {
        let mut client = host.client();
        client.send_raw(&br#"{"execute":"query-qmp-schema"}"#.repeat(50)).unwrap();
        client.read_line(LONG).unwrap();
        // Unread answers: the server's next write fails.
        drop(client);
    }
    let mut client = host.client();
    client.send_raw(br#"{"execute":"#).unwrap();
    drop(client);
    host.client().execute(&QueryStatus {}).unwrap();
}

#[test]
fn an_idle_server_sleeps() {
    let host = Host::start();
    let mut client = host.client();
    client.execute(&QueryStatus {}).unwrap();
    host.settle();
}

#[test]
fn an_answer_may_come_later() {
    let host = Host::start();
    let (mut patient, mut other) = (host.client(), host.client());
    patient
        .send_line(
            r#"{"execute":"system_powerdown","id":"first"}{"execute":"query-kvm","id":"second"}"#,
        )
        .unwrap();
    // Until the job exists, the patient client is not affected, only the others.
    while let Err(e) = other.execute(&SystemReset {}) {
        assert!(e.to_string().contains("no request is pending"), "{e}");
    }
    assert_eq!(patient.read_line(LONG).unwrap(), r#"{"return":"late","id":"first"}"#);
    assert!(patient.read_line(LONG).unwrap().ends_with(r#""id":"second"}"#));

    // The answer to a client that has left is discarded, and does not go to the next one.
    patient.send_line(r#"{"execute":"system_powerdown"}{"execute":"stop"}"#).unwrap();
    other.execute_raw("query-status", json!({})).unwrap();
    drop(patient);
    // The server notices when it sends something.
    other.execute(&Stop {}).unwrap();
    let mut next = host.client();
    while let Err(e) = next.execute(&SystemReset {}) {
        assert!(e.to_string().contains("no request is pending"), "{e}");
    }
    next.execute(&QueryStatus {}).unwrap();
}

#[test]
fn the_last_words_reach_everybody_who_listens() {
    let host = Host::start();
    let (mut slow, mut deaf, mut other) = (host.client(), host.client(), host.client());
    // More than the kernel buffers for a client that does not read yet.
    for _ in 0..3000 {
        other.execute(&Stop {}).unwrap();
        other.execute(&Cont {}).unwrap();
    }
    deaf.send_raw(b"{").unwrap();
    let reader = thread::spawn(move || {
        slow.wait_event("SHUTDOWN", LONG).unwrap();
        slow.wait_closed(LONG).unwrap();
        slow.take_events().len()
    });
    other.execute(&Quit {}).unwrap();
    assert_eq!(reader.join().unwrap(), 6000, "the deaf one does not hold the others up");
    drop(deaf);
    host.join();
}

#[test]
fn a_server_does_not_wait_forever_for_a_client_that_does_not_read() {
    let host = Host::with_timeout(Duration::from_millis(100));
    let (_deaf, mut other) = (host.client(), host.client());
    for _ in 0..3000 {
        other.execute(&Stop {}).unwrap();
        other.execute(&Cont {}).unwrap();
    }
    other.execute(&Quit {}).unwrap();
    host.join();
}

#[test]
fn descriptors_come_with_their_command() {
    let host = Host::start();
    let mut client = host.client();
    let getfd = |name: &str| format!(r#"{{"execute":"getfd","arguments":{{"fdname":"{name}"}}}}"#);
    let pipe = || {
        let (reader, writer) = std::io::pipe().unwrap();
        (reader, OwnedFd::from(writer))
    };
    // What arrives at the other end of a pipe, once the server has closed this end.
    let said = |mut reader: std::io::PipeReader, length: usize| {
        let mut text = vec![0; length];
        reader.read_exact(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    };
    let closed = |mut reader: std::io::PipeReader| assert_eq!(reader.read(&mut [0]).unwrap(), 0);

    let (reader, writer) = pipe();
    client.execute_with_fds("getfd", json!({"fdname": "one"}), &[writer.as_fd()]).unwrap();
    drop(writer);
    assert_eq!(said(reader, 3), "one");

    // Of several, the last one counts; the others are closed.
    let ((unused, a), (reader, b)) = (pipe(), pipe());
    client.execute_with_fds("getfd", json!({"fdname": "two"}), &[a.as_fd(), b.as_fd()]).unwrap();
    drop((a, b));
    assert_eq!(said(reader, 3), "two");
    closed(unused);

    // Sent with a command that does not use it, and two in a row.
    let ((first, a), (second, b)) = (pipe(), pipe());
    let joined = format!("{}{}", r#"{"execute":"query-kvm"}"#, getfd("three"));
    client.send_with_fds(joined.as_bytes(), &[a.as_fd()]).unwrap();
    client.send_with_fds(getfd("four").as_bytes(), &[b.as_fd()]).unwrap();
    drop((a, b));
    assert!(client.read_line(LONG).unwrap().contains("CommandNotFound"));
    for _ in 0..2 {
        assert_eq!(client.read_line(LONG).unwrap(), r#"{"return":{}}"#);
    }
    assert_eq!((said(first, 5), said(second, 4)), ("three".into(), "four".into()));

    // An unused descriptor is closed, and not given to a later command.
    let (unused, a) = pipe();
    client.execute_with_fds("query-status", json!({}), &[a.as_fd()]).unwrap();
    drop(a);
    client.execute_raw("getfd", json!({"fdname": "five"})).unwrap_err();
    closed(unused);

    // As QEMU's own clients do it: ahead of the command, with a meaningless byte.
    let (reader, a) = pipe();
    client.send_with_fds(b" ", &[a.as_fd()]).unwrap();
    client.execute_raw("getfd", json!({"fdname": "six"})).unwrap();
    drop(a);
    assert_eq!(said(reader, 3), "six");

    // As many as the kernel allows.
    let ((reader, a), (unused, b)) = (pipe(), pipe());
    let mut many = [b.as_fd(); 253];
    many[252] = a.as_fd();
    client.execute_with_fds("getfd", json!({"fdname": "seven"}), &many).unwrap();
    drop((a, b));
    assert_eq!(said(reader, 5), "seven");
    closed(unused);
    let (unused, a) = pipe();
    client.execute_with_fds("query-status", json!({}), &[a.as_fd(); 253]).unwrap();
    client.execute_with_fds("query-status", json!({}), &[a.as_fd(); 253]).unwrap();
    drop((a, client));
    closed(unused);
}
