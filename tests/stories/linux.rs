//! Stories of real Linux guests.
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use stories::agent::{Agent, SERVE, Story, Told, serve};

const STORIES: &[Told] = &[("kvm_is_there", kvm_is_there)];

fn kvm_is_there(_: &Story) -> Result<()> {
    let kvm = kvm_ioctls::Kvm::new()?;
    ensure!(kvm.get_api_version() == 12);
    kvm.create_vm()?;
    println!("cpus {:?}", std::fs::read_to_string("/proc/loadavg"));
    Ok(())
}

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some(SERVE) {
        return serve(STORIES);
    }
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let agent = Arc::new(Mutex::new(Agent::new(args.nocapture)));
    let trial = |&(name, _): &Told| {
        let agent = Arc::clone(&agent);
        Trial::test(name, move || {
            let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            agent.run(name).map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let conclusion = libtest_mimic::run(&args, STORIES.iter().map(trial).collect());
    agent.lock().unwrap_or_else(PoisonError::into_inner).finish()?;
    conclusion.exit()
}
