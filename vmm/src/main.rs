//! `stratovirt`: one process, one lightweight virtual machine, steered over QMP.
#![forbid(unsafe_code)]
use std::{env, io::Write, path::Path, process::ExitCode};

use anyhow::Context;
use machine::{
    Machine,
    config::{CharBackend, MachineConfig},
    survey,
};
use qmp::server::Server;
use vmm::{
    announce::Schedule,
    checkpoint::{self, job::Checkpointer},
    cli::{self, Action, Invocation, Log},
    daemon::{self, Side},
    event_loop::EventLoop,
    file_signals, last_words, lifecycle, logging,
    pidfile::PidFile,
    seccomp,
    spawner::{self, Spawner},
    terminal::Raw,
    vmm::Vmm,
};

fn main() -> ExitCode {
    if spawner::is_this() {
        return if spawner::serve().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let invocation = match cli::parse(env::args_os().skip(1)) {
        Ok(Action::Run(invocation)) => invocation,
        Ok(Action::PrintHelp(text) | Action::PrintVersion(text)) => {
            // A reader that has gone has read enough.
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::FAILURE;
        }
    };
    match run(&invocation) {
        Ok(code) => code,
        Err(error) => {
            match error.downcast_ref::<cli::Problems>() {
                Some(problems) => eprintln!("{problems}"),
                None => eprintln!("stratovirt: {error:#}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: &Invocation) -> anyhow::Result<ExitCode> {
    let mut ready = None;
    if invocation.daemonize {
        match daemon::split().context("cannot go into the background")? {
            Side::Starter(code) => return Ok(code),
            Side::Daemon(side) => ready = Some(side),
        }
    }
    let file = match &invocation.log {
        Log::File(path) => Some(path.as_path()),
        Log::Off | Log::Stderr => None,
    };
    let log = || format!("-D: cannot log to {}", file.unwrap_or(Path::new("stderr")).display());
    logging::start(file).with_context(log)?;
    last_words::prepare(file).with_context(log)?;
    invocation.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let _pidfile = invocation.pidfile.as_deref().map(PidFile::create).transpose()?;

    let mut events = EventLoop::new().context("cannot set up the main loop")?;
    let (machine, halted) = match &invocation.incoming {
        None => {
            let (config, places) = (&invocation.machine, &invocation.places);
            let built = Machine::new(config, events.report());
            (built.map_err(|e| places.explain(survey(config, e)))?, None)
        }
        Some(incoming) => checkpoint::restore(incoming, &invocation.machine, events.report())?,
    };
    let mapped = invocation.incoming.as_ref().and_then(checkpoint::mapped);
    let mapped = machine.config().memory.path.clone().or(mapped);
    file_signals::handle(mapped.as_deref()).context("cannot handle the signals of files")?;
    let _raw = uses_stdio(machine.config()).then(Raw::enter).flatten();
    // Only now: whoever can connect gets an answer.
    let servers = invocation
        .control
        .iter()
        .enumerate()
        .map(|(i, path)| Server::bind(path, events.registry(), EventLoop::server_token(i)))
        .collect::<Result<Vec<_>, _>>()?;
    let checkpointer =
        Checkpointer::spawn(events.notify()).context("cannot start a thread for saving")?;
    let spawner = match (invocation.disable_seccomp, invocation.spawn) {
        (true, _) => Spawner::AtNeed,
        (false, true) => Spawner::start().context("cannot start the process for exec:")?,
        (false, false) => Spawner::Forbidden,
    };
    if !invocation.disable_seccomp {
        seccomp::confine(invocation.spawn)?;
    }
    let mut vmm = Vmm::new(machine, servers, invocation.actions, checkpointer, spawner);
    if invocation.incoming.is_some() {
        vmm.announce(Schedule::default(), None)?;
    }
    match halted {
        Some(why) => vmm.apply(lifecycle::Event::Halt(why))?,
        None if invocation.paused => {}
        None => vmm.apply(lifecycle::Event::Resume)?,
    }
    if let Some(ready) = ready {
        ready.tell().context("cannot let go of the terminal")?;
    }
    let ending = events.run(&mut vmm).context("the main loop cannot wait for events")?;
    vmm.shut_down(ending);
    Ok(ExitCode::from(ending.status))
}

fn uses_stdio(machine: &MachineConfig) -> bool {
    let console = machine.console.as_ref().map(|c| &c.backend);
    machine.serial.iter().chain(console).any(|b| *b == CharBackend::Stdio)
}
