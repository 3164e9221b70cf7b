use std::{
    io::{Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use vmm_sys_util::tempdir::TempDir;

use super::{gated::CharKeeper, output::BACKLOG, *};
use crate::{backend::writer::Writer, threads::ThreadStart};

fn read_all(source: &mut CharSource) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), [0; 7]);
    loop {
        match source.read(&mut piece) {
            0 => return all,
            n => all.extend_from_slice(&piece[..n]),
        }
    }
}

/// Whether the descriptor that the worker waits on is ready.
fn fires(source: &CharSource) -> bool {
    !events(source.epoll.as_fd()).is_empty()
}

fn pipe_as(read_by_us: bool) -> (Char, std::fs::File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    if read_by_us {
        let own = own(reader.as_fd(), OFlags::RDONLY).unwrap();
        (Char::assemble("test", Some(own), None, None).unwrap(), writer.into())
    } else {
        let output = Output::inherited(writer.as_fd(), &ThreadStart::default()).unwrap();
        (Char::assemble("test", None, Some(output), None).unwrap(), reader.into())
    }
}

#[test]
fn a_dead_reader_blocks_no_thread_and_costs_a_bounded_backlog() {
    let (char, mut reader) = pipe_as(false);
    let chunk = [b'z'; 1024];
    for _ in 0..10 << 10 {
        char.sink.send(&chunk);
    }
    let dropped = char.sink.dropped();
    assert!(dropped > (9 << 20) && dropped < (10 << 20), "{dropped} bytes dropped");
    // The reader resumes: the source is notified, and the backlog is flushed in order.
    let mut source = char.source;
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    while got < (10 << 20) - usize::try_from(dropped).unwrap() {
        got += reader.read(&mut buffer).unwrap();
        assert!(fires(&source) || got >= BACKLOG);
        assert_eq!(source.read(&mut []), 0);
    }
    char.sink.send(b"!");
    assert_eq!(reader.read(&mut buffer).unwrap(), 1);
    assert_eq!(buffer[0], b'!');
    assert!(!fires(&source), "nothing waits, nothing is watched");
}

#[test]
fn output_without_a_reader_at_all_is_dropped() {
    let (char, reader) = pipe_as(false);
    drop(reader);
    char.sink.send(b"into the void");
    assert_eq!(char.sink.dropped(), 13);
}

#[test]
fn the_flags_of_inherited_descriptors_stay_as_they_are() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let _output = Output::inherited(writer.as_fd(), &ThreadStart::default()).unwrap();
    let _input = own(reader.as_fd(), OFlags::RDONLY).unwrap();
    for fd in [&reader, &writer] {
        assert!(!rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let output = Output::inherited(ours.as_fd(), &ThreadStart::default()).unwrap();
    let char = Char::assemble("test", None, Some(output), None).unwrap();
    for _ in 0..1 << 10 {
        char.sink.send(&[0; 1024]);
    }
    assert!(char.sink.dropped() > 0);
    assert!(!rustix::fs::fcntl_getfl(&ours).unwrap().contains(OFlags::NONBLOCK));
    drop(theirs);
}

#[test]
fn end_of_input_is_quiet() {
    let (mut char, mut writer) = pipe_as(true);
    assert!(!fires(&char.source));
    writer.write_all(b"last words").unwrap();
    drop(writer);
    assert!(fires(&char.source));
    assert_eq!(read_all(&mut char.source), b"last words");
    assert!(!fires(&char.source), "a hang-up causes no busy loop");
    assert_eq!(char.source.read(&mut [0; 9]), 0);
}

#[test]
fn input_that_cannot_be_waited_on_is_read_all_the_same() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("script");
    std::fs::write(&path, "some commands").unwrap();
    for (path, content) in [(path.as_path(), "some commands"), (Path::new("/dev/null"), "")] {
        let file = std::fs::File::open(path).unwrap();
        let own = own(file.as_fd(), OFlags::RDONLY).unwrap();
        let mut char = Char::assemble("test", Some(own), None, None).unwrap();
        assert_eq!(read_all(&mut char.source), content.as_bytes());
        assert!(!fires(&char.source));
    }
}

#[test]
fn ctrl_a_x_leaves_and_ctrl_a_twice_is_one() {
    let quits = Arc::new(AtomicU32::new(0));
    let (mut char, mut writer) = pipe_as(true);
    let counter = quits.clone();
    char.source.escape = Some(Escape::new(Box::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    })));
    for (typed, passed, leaves) in [
        (&b"plain x"[..], &b"plain x"[..], 0),
        (b"\x01\x01\x01ab", b"\x01\x01b", 0),
        (b"\x01", b"", 0),
        (b"x after a pause", b" after a pause", 1),
        (b"\x01qz", b"z", 0),
        (b"\x01x\x01x", b"", 2),
    ] {
        writer.write_all(typed).unwrap();
        assert_eq!(read_all(&mut char.source), passed);
        assert_eq!(quits.swap(0, Ordering::Relaxed), leaves, "{typed:?}");
    }
}

#[test]
fn a_file_is_appended_to() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("log");
    for text in ["one", " two"] {
        Char::file(&path, &ThreadStart::default()).unwrap().sink.send(text.as_bytes());
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
    assert!(matches!(
        Char::file(dir.as_path(), &ThreadStart::default()),
        Err(CharError::Open { .. })
    ));
}

#[test]
fn a_full_disk_costs_output_only() {
    let char = Char::file(Path::new("/dev/full"), &ThreadStart::default()).unwrap();
    char.sink.send(b"lost");
    assert_eq!(char.sink.dropped(), 4);
}

#[test]
fn a_pty_carries_bytes_both_ways_and_survives_its_terminal() {
    let mut char = Char::pty().unwrap();
    let path = char.name.strip_prefix("pty:").unwrap().to_owned();
    for _ in 0..2 {
        let mut terminal = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        terminal.write_all(b"\x03ls\r").unwrap();
        // The kernel passes a terminal's bytes on with a delay.
        let mut typed = Vec::new();
        while typed.len() < 4 {
            let mut fds = [PollFd::from_borrowed_fd(char.source.epoll.as_fd(), PollFlags::IN)];
            let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
            let fired = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&patience)));
            assert_eq!(fired, Ok(1), "input is announced");
            typed.extend(read_all(&mut char.source));
        }
        assert_eq!(typed, b"\x03ls\r", "raw, no echo");
        char.sink.send(b"a\nb");
        let mut seen = [0; 3];
        terminal.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"a\nb");
    }
    assert!(!fires(&char.source));
}

#[test]
fn a_socket_serves_one_connection_after_the_other() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut char = Char::socket(&path, 0).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions_mode() & 0o777, 0o600);
    char.sink.send(b"no reader");
    let mut first = UnixStream::connect(&path).unwrap();
    let mut second = UnixStream::connect(&path).unwrap();
    first.write_all(b"1").unwrap();
    second.write_all(b"2").unwrap();
    assert!(fires(&char.source));
    assert_eq!(read_all(&mut char.source), b"1");
    char.sink.send(b"hello");
    let mut seen = [0; 5];
    first.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello");
    drop(first);
    assert!(fires(&char.source));
    assert_eq!(read_all(&mut char.source), b"2", "the next in line");
    char.sink.send(b"again");
    second.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"again");
    drop(char);
    assert!(!path.exists());
}

trait PermissionsMode {
    fn permissions_mode(&self) -> u32;
}
impl PermissionsMode for std::fs::Metadata {
    fn permissions_mode(&self) -> u32 {
        std::os::unix::fs::PermissionsExt::mode(&self.permissions())
    }
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Char::socket(&path, 0).unwrap());
    let live = UnixListener::bind(&path).unwrap();
    assert!(matches!(Char::socket(&path, 0), Err(CharError::InUse { .. })));
    drop(live);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Char::socket(&path, 0), Err(CharError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let long = dir.as_path().join("x".repeat(200));
    assert!(matches!(Char::socket(&long, 0), Err(CharError::Open { .. })));
}

fn take(stream: &mut UnixStream, source: &mut CharSource, len: usize) -> Vec<u8> {
    let mut got = vec![0; len];
    let mut at = 0;
    while at < len {
        // The backlog is flushed as the reader makes room.
        source.read(&mut []);
        at += stream.read(&mut got[at..]).unwrap();
    }
    got
}

#[test]
fn each_connection_gets_the_output_that_it_has_missed() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut char = Char::socket(&path, 8).unwrap();
    char.sink.send(b"in the beginning");
    for (said, replayed) in [("", "eginning"), ("!\n", "inning!\n"), ("0123456789", "23456789")] {
        char.sink.send(said.as_bytes());
        let mut client = UnixStream::connect(&path).unwrap();
        assert_eq!(char.source.read(&mut [0; 9]), 0);
        assert_eq!(take(&mut client, &mut char.source, 8), replayed.as_bytes());
        char.sink.send(b"live");
        assert_eq!(take(&mut client, &mut char.source, 4), b"live", "behind it, and once");
        char.sink.send(replayed.as_bytes());
        assert_eq!(take(&mut client, &mut char.source, 8), replayed.as_bytes());
        drop(client);
        assert_eq!(char.source.read(&mut [0; 9]), 0);
    }
}

#[test]
fn a_long_replay_is_whole_however_slowly_it_is_read() {
    const SIZE: usize = 1 << 20;
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut char = Char::socket(&path, SIZE).unwrap();
    let text: Vec<u8> = (0..3 * SIZE).map(|i| (i / 7) as u8).collect();
    text.chunks(1000).for_each(|piece| char.sink.send(piece));
    let mut client = UnixStream::connect(&path).unwrap();
    char.source.read(&mut []);
    char.sink.send(b"and then");
    let got = take(&mut client, &mut char.source, SIZE + 8);
    assert!(got[..SIZE] == text[2 * SIZE..] && got[SIZE..] == *b"and then");
    assert_eq!(char.sink.dropped(), 0);
    // A reader that reads nothing costs no more memory than the replay and the backlog.
    let dead = UnixStream::connect(&path).unwrap();
    drop(client);
    char.source.read(&mut []);
    text.chunks(1000).for_each(|piece| char.sink.send(piece));
    assert!(char.sink.dropped() > 0);
    assert!(char.sink.room() <= BACKLOG + SIZE);
    drop(dead);
}

#[test]
fn a_guest_that_reads_nothing_blocks_no_client() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut char = Char::socket(&path, 16).unwrap();
    char.sink.send(b"hello");
    for word in ["one ", "two "] {
        let mut stream = UnixStream::connect(&path).unwrap();
        // No room in the guest.
        assert_eq!(char.source.read(&mut []), 0);
        stream.write_all(word.as_bytes()).unwrap();
        let mut said = [0; 5];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
        assert_eq!(char.source.read(&mut []), 0);
    }
    // Earlier input arrives once there is room, followed by later input.
    let mut third = UnixStream::connect(&path).unwrap();
    third.write_all(b"three").unwrap();
    assert_eq!(char.source.read(&mut []), 0);
    let mut typed = Vec::new();
    let mut piece = [0; 3];
    while let n @ 1.. = char.source.read(&mut piece) {
        typed.extend_from_slice(&piece[..n]);
    }
    assert_eq!(String::from_utf8(typed).unwrap(), "one two three");
}

#[test]
fn a_file_that_hangs_costs_output_and_blocks_no_thread() {
    let (reader, writer) = std::io::pipe().unwrap();
    let (mut reader, hung) = (reader, std::fs::File::from(OwnedFd::from(writer)));
    let writer = Writer::spawn("test", hung, &ThreadStart::default(), |_, _| ()).unwrap();
    let char = Char::assemble("test", None, Some(Output::File(writer)), None).unwrap();
    let sent = 2 << 20;
    for _ in 0..sent / 1024 {
        char.sink.send(&[b'x'; 1024]);
    }
    let dropped = usize::try_from(char.sink.dropped()).unwrap();
    assert!(dropped > 0 && dropped < sent, "{dropped} of {sent} bytes were dropped");
    // When the file accepts output again, the whole backlog arrives, also at shutdown.
    let arrived = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    char.sink.finish(Duration::from_secs(60));
    drop(char);
    assert_eq!(arrived.join().unwrap().unwrap().len(), sent - dropped);
}

#[test]
fn a_socket_has_its_mode_from_the_first_moment_on() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let seen = AtomicUsize::new(0);
    let end = Instant::now() + Duration::from_secs(60);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while seen.load(Ordering::Relaxed) < 100 && Instant::now() < end {
                if let Ok(found) = std::fs::symlink_metadata(&path) {
                    assert_eq!(found.permissions().mode() & 0o777, 0o600);
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // On a busy host, the watcher may see few of them: as many are made as it takes.
        while !watcher.is_finished() {
            drop(Char::socket(&path, 0).unwrap());
        }
        watcher.join().unwrap();
    });
    assert_eq!(seen.into_inner(), 100, "the socket was hardly ever seen");
}

/// What has arrived, if anything has.
fn arrived(reader: &mut std::fs::File) -> String {
    let mut buffer = [0; 1 << 12];
    let n = match events(reader.as_fd()).contains(PollFlags::IN) {
        true => reader.read(&mut buffer).unwrap(),
        false => 0,
    };
    String::from_utf8(buffer[..n].to_vec()).unwrap()
}

#[test]
fn output_behind_a_gate_leaves_with_its_checkpoint() {
    let (char, mut reader) = pipe_as(false);
    let mut keeper = CharKeeper::new(char.sink.clone()).unwrap();
    char.sink.send(b"before, ");
    keeper.marker().shut();
    char.sink.send(b"first, ");
    keeper.marker().mark(1);
    char.sink.send(b"second, ");
    assert_eq!(arrived(&mut reader), "before, ");
    keeper.release(1);
    assert_eq!(arrived(&mut reader), "first, ");
    keeper.discard();
    char.sink.send(b"third, ");
    assert_eq!(arrived(&mut reader), "");
    drop(keeper);
    char.sink.send(b"last");
    assert_eq!(arrived(&mut reader), "third, last");
    assert_eq!(char.sink.dropped(), 0);
}

#[test]
fn who_waits_for_room_behind_a_gate_is_woken_when_there_is_some() {
    let (char, mut reader) = pipe_as(false);
    let mut source = char.source;
    let mut keeper = CharKeeper::new(char.sink.clone()).unwrap();
    keeper.marker().shut();
    char.sink.send(&[b'a'; BACKLOG]);
    assert_eq!(char.sink.room(), 0);
    assert!(!fires(&source));
    keeper.marker().mark(1);
    // The reader takes what it gets.
    let reading = std::thread::spawn(move || {
        let mut all = vec![0; BACKLOG];
        reader.read_exact(&mut all).unwrap();
        reader
    });
    keeper.release(1);
    assert!(fires(&source));
    source.read(&mut []);
    assert_eq!(char.sink.room(), BACKLOG);
    while !reading.is_finished() {
        source.read(&mut []);
    }
    source.read(&mut []);
    assert!(!fires(&source));
    drop(keeper);
    char.sink.send(b"end");
    assert_eq!(arrived(&mut reading.join().unwrap()), "end");
}
