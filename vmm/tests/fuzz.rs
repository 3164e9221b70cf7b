//! The entry functions of `fuzz/`, with inputs that a dice makes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use machine::memory::allocate;
use vmm::checkpoint::{Config, Progress, read_state, receive, stream::Kind};

#[path = "../../fuzz/src/cli.rs"]
mod cli;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/state.rs"]
mod state;

#[test]
fn configurations_that_say_anything() {
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../config-examples");
    let seeds: Vec<_> = std::fs::read_dir(examples)
        .unwrap()
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .filter(|text| text.starts_with(b"{"))
        .collect();
    assert!(seeds.len() > 2);
    let words =
        ["{", "}", "[", "]", "\"", ":", ",", "null", "true", "1e9", "-1", "\"256G\"", "\"0\""];
    mutate::hammer(&seeds, &words, 3000, cli::entry);
}

#[test]
fn command_lines_that_say_anything() {
    let seeds = [
        "-kernel\nk\n-append\na b\n-m\n256M\n-smp\n4,sockets=2,cores=2\n-serial\nstdio\n-qmp\nunix:s,server,nowait",
        "-kernel\nk\n-drive\nid=d,file=f,direct=off,throttling.iops-total=5\n-device\nvirtio-blk-device,drive=d,id=b,iothread=i\n-object\niothread,id=i\n-api-channel\nunix:s",
        "-netdev\ntap,id=n,ifname=t,queues=2\n-device\nvirtio-net-device,netdev=n,id=e,mac=52:54:00:12:34:56\n-machine\ntype=microvm,mem-share=on\n-name\nn\n-D\n-S",
        "-chardev\nsocket,id=c,path=p,server,nowait\n-device\nvirtconsole,chardev=c,id=v\n-rng\nrandom_file=/dev/urandom,bytes_per_sec=5\n-pidfile\np\n-incoming\nfile:d,mapped=off\n-action\nreboot=reset",
    ];
    let seeds = seeds.map(|seed| seed.as_bytes().to_vec());
    let words = [
        ",",
        "=",
        "\n",
        "on",
        "off",
        "id=",
        ",,",
        "18446744073709551615",
        "0x",
        "-1",
        "4G",
        ":",
        "-h",
    ];
    mutate::hammer(&seeds, &words, 5000, cli::entry);
}

/// An input from which `state` makes these frames.
fn frames(kinds: &[(Kind, &[u8])]) -> Vec<u8> {
    let number = |kind: &Kind| Kind::ALL.iter().position(|k| k == kind).unwrap_or(0) as u8;
    let frame = |(kind, body): &(Kind, &[u8])| {
        [&[number(kind)][..], &(body.len() as u16).to_le_bytes(), body].concat()
    };
    [&[1][..], &kinds.iter().flat_map(frame).collect::<Vec<_>>()].concat()
}

#[test]
fn states_that_say_anything() {
    let config = br#"{"id":7,"machine":{"name":"m","uuid":"u","cpus":1,"topology":{"sockets":1,"dies":1,"clusters":1,"cores":1,"threads":1},"memory":{"size":16777216,"shared":false,"path":null,"prealloc":false,"dump":true},"boot":{"kernel":"k","initrd":null,"cmdline":""},"iothreads":[],"serial":null,"disks":[],"nics":[],"console":null,"rng":null},"occupied":{"disks":[],"nics":[]},"disk_sizes":[],"base":null}"#;
    let section = |name: &str, rest: &str| -> Vec<u8> {
        [&[name.len() as u8][..], name.as_bytes(), rest.as_bytes()].concat()
    };
    let chips: machine::kvm::chips::ChipState =
        serde_json::from_str(r#"{"irqchips":[[],[],[]],"pit":[]}"#).unwrap();
    let parts = [
        section("cpu", r#"{"leaves":[]}"#),
        section("interrupt controllers", &serde_json::to_string(&chips).unwrap()),
        section("clock", "5"),
        section(
            "device serial0",
            r#"{"id":"serial0","section":{"kind":"serial","version":1,"body":[1,2]}}"#,
        ),
    ];
    let mut whole: Vec<(Kind, &[u8])> = vec![(Kind::Config, config)];
    whole.extend(parts.iter().map(|part| (Kind::Section, &part[..])));
    let sums: Vec<u8> = (0..8 * 4).collect();
    let mut saved = whole.clone();
    saved.extend([(Kind::Sums, &sums[..]), (Kind::End, &[])]);
    let saved = frames(&saved);
    // The seeds are read to their end.
    let read = read_state(&state::stream(&saved[1..])[..]).map(drop);
    assert!(read.is_ok(), "{read:?}");

    let page = [&4096u64.to_le_bytes()[..], &[7; 4096]].concat();
    let zeros = [4096u64.to_le_bytes(), 8192u64.to_le_bytes()].concat();
    let mut sent: Vec<(Kind, &[u8])> =
        vec![(Kind::Config, config), (Kind::Pages, &page), (Kind::Zeros, &zeros)];
    sent.extend(&whole);
    sent.push((Kind::End, &[]));
    let sent = frames(&sent);
    let allocate = |config: &Config| Ok(allocate(&config.machine.memory).unwrap());
    let stream = state::stream(&sent[1..]);
    let received = receive(&stream[..], |_| Ok(()), allocate, &Progress::default()).map(drop);
    assert!(received.is_ok(), "{received:?}");
    let bare = [&[0][..], &state::stream(&saved[1..])].concat();
    let words =
        ["{", "}", "[", "]", "\"", ":", ",", "null", "true", "18446744073709551615", "-1", "1e9"];
    mutate::hammer(&[saved, sent, bare], &words, 5000, state::entry);
}
