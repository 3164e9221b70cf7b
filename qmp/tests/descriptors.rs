//! A server short of descriptors, in a separate process: the limit applies to a process.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests, too")]
mod host;

use std::{fs::File, thread, time::Duration};

use host::{Host, LONG, connect};
use qmp::{client::Client, schema::*};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

#[test]
fn a_server_without_descriptors_neither_dies_nor_spins() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let limit = |soft| {
        setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: hard }).unwrap();
    };

    // Clients get half of the descriptors, in this process of server and clients.
    limit(4096);
    let host = Host::start();
    let mut clients: Vec<Client> = (0..1000).map(|_| host.client()).collect();
    for client in &mut clients {
        client.execute(&QueryStatus {}).unwrap();
    }
    clients.truncate(2);
    let mut client = clients.pop().unwrap();
    // The server closes the others later.
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    while open() > 100 {
        thread::yield_now();
    }

    // None left: a client that connects has to wait.
    limit(512);
    let mut ballast = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        ballast.push(file);
    }
    ballast.pop();
    let path = host.path.clone();
    let waiting = thread::spawn(move || connect(&path));
    client.execute(&QueryStatus {}).unwrap();
    host.settle();
    assert!(!waiting.is_finished());

    // One client leaves: the waiting one is accepted.
    drop(ballast);
    drop(clients);
    waiting.join().unwrap().execute(&QueryStatus {}).unwrap();
    client.wait_event("none", Duration::from_millis(1)).unwrap_err();
    client.execute(&Stop {}).unwrap();
    client.wait_event("STOP", LONG).unwrap();
}
