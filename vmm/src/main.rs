//! `stratovirt`: one process, one lightweight virtual machine, controlled over QMP.
#![forbid(unsafe_code)]
// Only glibc passes the arguments to programs without the standard library's entry point.
#![cfg_attr(all(target_env = "gnu", not(test)), no_main)]
use std::{
    env,
    fmt::Display,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use config::{
    CharBackend, MachineConfig,
    cli::{self, Action, Invocation, Log},
    incoming::Source,
};
use machine::{Callbacks, Machine, memory::own, preflight};
use qmp::{
    schema::{Event, ShutdownCause},
    server::Servers,
};
use vmm::{
    announce::Schedule,
    arriving::{Arriving, Handed, Over},
    bare, bounds,
    checkpoint::{self, Arrival, Arrived, RestoreError, Voice},
    daemon::{self, Ready, Side},
    event_loop::EventLoop,
    explain::explain,
    lifecycle, logging,
    pidfile::PidFile,
    seccomp::Confinement,
    signals,
    spawner::{self, Spawner},
    terminal::Raw,
    threads::{Starting, Threads},
    vmm::{Ending, Vmm},
};

/// Exit statuses.
const SUCCESS: u8 = 0;
const FAILURE: u8 = 1;

#[cfg(all(target_env = "gnu", not(test)))]
machine::entry_point!(start);

#[cfg(not(all(target_env = "gnu", not(test))))]
fn main() -> std::process::ExitCode {
    start().into()
}

/// Run as the command line says; returns the exit status.
fn start() -> u8 {
    own::share_heap();
    if spawner::is_this() {
        return if spawner::serve().is_ok() { SUCCESS } else { FAILURE };
    }
    let mut ready = None;
    if cli::daemonizes(env::args_os().skip(1)) {
        match daemon::split() {
            Ok(Side::Starter(code)) => return code,
            Ok(Side::Daemon(side)) => ready = Some(side),
            Err(e) => return fails(format_args!("stratovirt: cannot run in the background: {e}")),
        }
    }
    let invocation = match cli::parse(env::args_os().skip(1)) {
        Ok(Action::Run(invocation)) => invocation,
        Ok(Action::PrintHelp(text) | Action::PrintVersion(text)) => {
            // A reader that has closed its end does not want more.
            let _ = writeln!(io::stdout(), "{}", text.trim_end());
            return SUCCESS;
        }
        Err(problems) => return fails(problems),
    };
    let ended = run(&invocation, ready);
    logging::finish(bounds::COMMAND);
    match ended {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<cli::Problems>() {
            Some(problems) => fails(problems),
            None => fails(format_args!("stratovirt: {error:#}")),
        },
    }
}

/// Print the error to standard error, if that is still open.
fn fails(why: impl Display) -> u8 {
    let _ = writeln!(io::stderr(), "{why}");
    FAILURE
}

fn run(invocation: &Invocation, mut ready: Option<Ready>) -> anyhow::Result<u8> {
    let file = match &invocation.log {
        Log::File(path) => Some(path.as_path()),
        Log::Off | Log::Stderr => None,
    };
    let log = || format!("-D: cannot log to {}", file.unwrap_or(Path::new("stderr")).display());
    let in_background = ready.is_some();
    // No other thread has started yet. Every thread that starts from here on is registered with
    // this.
    let confinement = match invocation.disable_seccomp || invocation.no_machine {
        true => Confinement::default(),
        false => Confinement::begin(invocation.spawn)?,
    };
    logging::start(file, &confinement.thread_start()).with_context(log)?;
    invocation.warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let pidfile = invocation.pidfile.as_deref().map(PidFile::create).transpose()?;

    if invocation.no_machine {
        bare::run(&invocation.control, ready)?;
        return Ok(SUCCESS);
    }
    signals::handle_those_of_files().context("cannot handle SIGBUS")?;
    let mut events = EventLoop::new().context("cannot set up the main loop")?;
    let threads =
        Starting::begin(&events.notify(), &confinement).context("cannot start a thread")?;
    // A client that can connect gets an answer. A machine that is built here exists by then.
    let bind = |events: &EventLoop| bare::servers(&invocation.control, events.registry());
    log::info!(target: "VmConfig", "{}", what(invocation));
    // Dropped after the machine: only then is its source notified that it may resume.
    let mut answer = Voice::silent();
    let mut promotion = None;
    let (machine, halted, servers, waiting, paused) = match &invocation.incoming {
        None => {
            let (config, places) = (&invocation.machine, &invocation.places);
            let start = confinement.thread_start();
            let helpers = threads.helpers();
            let built = Machine::new(config, Callbacks { report: events.report(), start, helpers });
            confinement.check()?;
            let machine = built.map_err(|e| explain(places, preflight(config, e), config))?;
            if !machine::arch::has_hardware_virtualization() {
                log::warn!(
                    "this host's CPU has neither vmx nor svm, so its KVM only runs kernels built \
                     for it: a distribution's kernel may hang before any output"
                );
            }
            (machine, None, bind(&events)?, Vec::new(), invocation.paused)
        }
        Some(incoming) => {
            let (report, notify) = (events.report(), events.notify());
            let flags = &invocation.machine;
            let helpers = threads.helpers();
            let arrival = Arrival::begin(incoming, flags, report, notify, &confinement, helpers)
                .map_err(RestoreError::from)?;
            let patient = matches!(incoming.source, Source::Directory { .. });
            let arriving = Arriving::new(bind(&events)?, arrival, invocation.paused, patient);
            // A backup is there when its primary can connect; its machine may never arrive.
            let is_backup = matches!(incoming.source, Source::Replica(_));
            if let Some(ready) = ready.take_if(|_| is_backup) {
                ready.tell().context("cannot detach from the terminal")?;
            }
            let waited = events.wait_for_machine(arriving);
            let (handed, over) = waited.context("the main loop cannot wait for events")?;
            let Handed { servers, paused, waiting } = handed;
            match over {
                Over::Arrived(arrived) => {
                    let Arrived { machine, halted, answer: to_the_source, promotion: by } =
                        *arrived;
                    (answer, promotion) = (to_the_source, by);
                    (machine, halted, servers, waiting, paused)
                }
                Over::Ended(ending) => {
                    last_event(servers, ending);
                    return Ok(ending.status);
                }
                Over::Failed(error) => {
                    let reason = ShutdownCause::HostError;
                    last_event(servers, Ending { guest: false, reason, status: 1 });
                    confinement.check()?;
                    return Err(error.into());
                }
            }
        }
    };
    let mapped = invocation.incoming.as_ref().and_then(checkpoint::mapped);
    if let Some(path) = machine.config().memory.path.as_ref().or(mapped.as_ref()) {
        signals::memory_is(path);
    }
    let _raw = uses_stdio(machine.config()).then(Raw::enter).flatten();
    let Threads { checkpointer, files, storage, end } = threads.finish()?;
    let spawner = match (invocation.disable_seccomp, invocation.spawn) {
        (true, _) => Spawner::AtNeed,
        (false, true) => {
            Spawner::start(in_background).context("cannot start the process for exec:")?
        }
        (false, false) => Spawner::Forbidden,
    };
    confinement.finish()?;
    let mut vmm =
        Vmm::new(machine, servers, invocation.actions, checkpointer, files, storage, spawner);
    if invocation.incoming.is_some() {
        vmm.announce(Schedule::default(), None)?;
    }
    // Everything that can fail has been done, and the guest has not executed an instruction yet.
    answer.settle();
    let stopped = match &promotion {
        Some(promotion) => vmm.comes_by(promotion),
        None => false,
    };
    match halted {
        Some(why) => vmm.apply(lifecycle::Event::Halt(why))?,
        None if paused || stopped => {}
        None => {
            vmm.apply(lifecycle::Event::Resume)?;
            vmm.log_vcpus();
        }
    }
    if let Some(promotion) = promotion {
        // The guest runs here and nowhere else.
        if let Err(e) = vmm.promoted(*promotion) {
            log::error!("the guest runs, but cannot be protected again: {e}");
        }
    }
    if let Some(ready) = ready {
        ready.tell().context("cannot detach from the terminal")?;
    }
    events.answer(&mut vmm, waiting);
    let ending = events.run(&mut vmm).context("the main loop cannot wait for events")?;
    vmm.shut_down(ending, &end, pidfile);
    Ok(ending.status)
}

/// Send SHUTDOWN to all clients of a monitor that ends without ever having had a machine.
fn last_event(mut servers: Servers, ending: Ending) {
    let event = Event::Shutdown { guest: ending.guest, reason: ending.reason };
    servers.broadcast(&event);
    // Dropping this removes the sockets' names.
    drop(servers.shutdown(bounds::COMMAND));
}

/// Describes what is to be run, for the log. Programs parse two kinds of its lines, `VmConfig` and
/// `Vcpu`.
fn what(invocation: &Invocation) -> String {
    match &invocation.incoming {
        Some(incoming) => match &incoming.source {
            Source::Directory { path, .. } => format!("from the directory {}", path.display()),
            Source::Stream(_) => "from a stream".to_owned(),
            Source::Replica(_) => "as a backup".to_owned(),
        },
        None => {
            let config = &invocation.machine;
            format!("{} vCPUs, {} bytes of memory", config.cpus, config.memory.size)
        }
    }
}

fn uses_stdio(machine: &MachineConfig) -> bool {
    machine.chars().any(|backend| *backend == CharBackend::Stdio)
}
