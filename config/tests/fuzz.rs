//! The entry functions of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]

#[path = "../../fuzz/src/cli.rs"]
mod cli;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;

#[test]
fn configurations_that_say_anything() {
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../config-examples");
    let seeds: Vec<_> = std::fs::read_dir(examples)
        .unwrap()
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .filter(|text| text.starts_with(b"{"))
        .collect();
    assert!(seeds.len() > 2);
    mutate::hammer("cli", &seeds, 3000, cli::entry);
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
    mutate::hammer("cli", &seeds, 5000, cli::entry);
}
