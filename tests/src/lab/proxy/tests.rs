use super::*;

const MS: Duration = Duration::from_millis(1);
/// How much later than asked for something may come on a busy machine.
const LATE: Duration = Duration::from_millis(500);
/// How long nothing must come.
const NOTHING: Duration = Duration::from_millis(100);

/// A proxy on the loopback, and the two ends of a connection through it.
fn connected() -> (Proxy, TcpStream, TcpStream) {
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let any = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let proxy = Proxy::new(&any, Address::Tcp(far.local_addr().unwrap())).unwrap();
    let (near, far) = connect(&proxy, &far);
    (proxy, near, far)
}

fn connect(proxy: &Proxy, far: &TcpListener) -> (TcpStream, TcpStream) {
    let Address::Tcp(at) = proxy.address() else { unreachable!() };
    let before = proxy.accepted();
    let near = TcpStream::connect(at).unwrap();
    let far = far.accept().unwrap().0;
    while proxy.accepted() == before {
        thread::yield_now();
    }
    near.set_nodelay(true).unwrap();
    for end in [&near, &far] {
        end.set_read_timeout(Some(10 * LATE)).unwrap();
    }
    (near, far)
}

/// The next bytes that come.
fn next(mut from: &TcpStream, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    from.read_exact(&mut buffer).unwrap();
    buffer
}

fn comes_nothing(mut from: &TcpStream) {
    from.set_read_timeout(Some(NOTHING)).unwrap();
    let error = from.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    from.set_read_timeout(Some(10 * LATE)).unwrap();
}

#[test]
fn bytes_and_ends_pass_in_both_directions() {
    let (proxy, mut near, mut far) = connected();
    near.write_all(b"there").unwrap();
    assert_eq!(next(&far, 5), b"there");
    far.write_all(b"and back").unwrap();
    assert_eq!(next(&near, 8), b"and back");
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
    far.write_all(b"still").unwrap();
    assert_eq!(next(&near, 5), b"still");
    drop(far);
    assert_eq!(near.read(&mut [0]).unwrap(), 0);
    assert_eq!((proxy.delivered(Direction::Forth), proxy.delivered(Direction::Back)), (5, 13));
    assert_eq!(proxy.accepted(), 1);
}

#[test]
fn a_unix_socket_is_passed_on_and_removed() {
    let dir = std::env::temp_dir().join(format!("proxy.{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let far = UnixListener::bind(dir.join("far")).unwrap();
    let near = dir.join("near");
    let proxy = Proxy::new(&Address::Unix(near.clone()), Address::Unix(dir.join("far"))).unwrap();
    let mut stream = UnixStream::connect(&near).unwrap();
    stream.write_all(b"hello").unwrap();
    let (mut other, _) = far.accept().unwrap();
    let mut got = [0; 5];
    other.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    drop(proxy);
    assert!(!near.exists());
    assert_eq!(other.read(&mut got).unwrap(), 0);
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_delay_does_not_limit_the_rate() {
    let (proxy, mut near, far) = connected();
    proxy.set(Direction::Forth, Treatment { delay: 100 * MS, ..Treatment::default() });
    let began = Instant::now();
    let sent: Vec<u8> = (0..1_u32 << 20).map(|n| n as u8).collect();
    let copy = sent.clone();
    let sender = thread::spawn(move || near.write_all(&copy).map(|()| near));
    assert_eq!(next(&far, sent.len()), sent);
    let took = began.elapsed();
    assert!((100 * MS..100 * MS + LATE).contains(&took), "{took:?}");
    drop(sender.join().unwrap().unwrap());
}

#[test]
fn a_rate_is_kept() {
    let (proxy, mut near, far) = connected();
    proxy.set(Direction::Forth, Treatment { rate: Some(1 << 20), ..Treatment::default() });
    let began = Instant::now();
    near.write_all(&[1; 256 << 10]).unwrap();
    next(&far, 256 << 10);
    let took = began.elapsed();
    assert!((250 * MS..250 * MS + LATE).contains(&took), "{took:?}");
}

#[test]
fn a_cut_in_one_direction_leaves_the_other_and_loses_nothing() {
    let (proxy, mut near, mut far) = connected();
    proxy.set(Direction::Forth, Treatment { cut: true, ..Treatment::default() });
    near.write_all(b"later").unwrap();
    comes_nothing(&far);
    far.write_all(b"now").unwrap();
    assert_eq!(next(&near, 3), b"now");
    near.shutdown(Shutdown::Write).unwrap();
    comes_nothing(&far);
    proxy.set(Direction::Forth, Treatment::default());
    assert_eq!(next(&far, 5), b"later");
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
}

#[test]
fn one_bit_is_flipped_where_it_was_asked_for() {
    let (proxy, mut near, far) = connected();
    near.write_all(&[0; 10]).unwrap();
    assert_eq!(next(&far, 10), [0; 10]);
    proxy.flip(Direction::Forth, 100_000);
    near.write_all(&vec![0; 200_000]).unwrap();
    let got = next(&far, 200_000);
    let wrong: Vec<_> = got.iter().enumerate().filter(|(_, byte)| **byte != 0).collect();
    assert_eq!(wrong.len(), 1);
    assert_eq!((wrong[0].0, wrong[0].1.count_ones()), (100_000, 1));
}

#[test]
fn hanging_up_is_noticed_by_both() {
    let (proxy, mut near, mut far) = connected();
    proxy.hang_up();
    assert_eq!(near.read(&mut [0]).unwrap(), 0);
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_is_forgotten_is_silent_and_the_next_connection_works() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let any = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let proxy = Proxy::new(&any, Address::Tcp(listener.local_addr().unwrap())).unwrap();
    let (mut near, far) = connect(&proxy, &listener);
    proxy.forget();
    near.write_all(b"into the void").unwrap();
    comes_nothing(&far);
    drop(far);
    comes_nothing(&near);
    near.write_all(b"still").unwrap();
    let (mut near, far) = connect(&proxy, &listener);
    near.write_all(b"again").unwrap();
    assert_eq!(next(&far, 5), b"again");
}

#[test]
fn of_a_half_open_connection_one_end_knows() {
    let (proxy, mut near, mut far) = connected();
    proxy.half_open(Direction::Forth);
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
    comes_nothing(&near);
    near.write_all(b"nobody hears").unwrap();
}

#[test]
fn a_sender_waits_when_too_much_is_under_way() {
    let (proxy, mut near, far) = connected();
    proxy.set(Direction::Forth, Treatment { cut: true, ..Treatment::default() });
    let sender = thread::spawn(move || near.write_all(&vec![3; 32 << 20]).map(|()| near));
    thread::sleep(NOTHING);
    assert!(!sender.is_finished());
    proxy.set(Direction::Forth, Treatment::default());
    assert!(next(&far, 32 << 20).iter().all(|byte| *byte == 3));
    sender.join().unwrap().unwrap();
}
