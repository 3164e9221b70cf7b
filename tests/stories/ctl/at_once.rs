//! Several `stratoctl` at once, and many domains.
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::rig::Rig;

fn spawn(rig: &Rig, args: &[&str]) -> Result<Child> {
    let mut command = rig.command(args);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

/// Runs both at once; returns how many succeeded, and the messages of the others.
fn both(rig: &Rig, one: &[&str], other: &[&str]) -> Result<(usize, String)> {
    let children = [spawn(rig, one)?, spawn(rig, other)?];
    let mut done = 0;
    let mut said = String::new();
    for child in children {
        let out = child.wait_with_output()?;
        ensure!(matches!(out.status.code(), Some(0 | 1)), "{one:?}, {other:?}: {}", out.status);
        done += usize::from(out.status.success());
        said.push_str(&String::from_utf8(out.stderr)?);
    }
    ensure!(!said.contains("panicked"), "{said}");
    Ok((done, said))
}

#[test]
fn of_two_at_once_one_wins_and_the_other_says_why() -> Result<()> {
    let rig = Rig::new("two")?;
    rig.config("vm.json", "count", "plain 1")?;
    for _ in 0..5 {
        let create = ["create", "vm.json"];
        let (done, said) = both(&rig, &create, &create)?;
        ensure!(done == 1 && said.contains("a domain 'vm' already"), "{done}: {said}");
        let (done, said) = both(&rig, &["rename", "vm", "a"], &["rename", "vm", "b"])?;
        ensure!(done == 1 && said.contains("no domain 'vm'"), "{done}: {said}");
        let name = if rig.state("a")? == "running" { "a" } else { "b" };
        let (done, said) = both(&rig, &["pause", name], &["unpause", name])?;
        ensure!(done == 2, "{said}");
        let (done, said) = both(&rig, &["destroy", name], &["destroy", name])?;
        ensure!(done == 1 && said.contains("no domain"), "{done}: {said}");

        let new = ["new", "vm.json"];
        let (done, said) = both(&rig, &new, &new)?;
        ensure!(done == 1 && said.contains("already"), "{done}: {said}");
        let (done, said) = both(&rig, &["start", "vm"], &["start", "vm"])?;
        ensure!(done == 1 && said.contains("running already"), "{done}: {said}");
        let (done, said) = both(&rig, &["suspend", "vm"], &["suspend", "vm"])?;
        ensure!(done == 1 && said.contains("'vm' is"), "{done}: {said}");
        ensure!(rig.state("vm")? == "suspended");
        let (done, said) = both(&rig, &["resume", "vm"], &["resume", "vm"])?;
        ensure!(done == 1 && said.contains("running already"), "{done}: {said}");
        // `destroy` is allowed at any time; a save that it interrupts does not exist.
        both(&rig, &["suspend", "vm"], &["destroy", "vm"])?;
        let state = rig.state("vm")?;
        ensure!(["registered", "suspended"].contains(&state.as_str()), "it is {state}");
        let (done, said) = both(&rig, &["delete", "-f", "vm"], &["delete", "-f", "vm"])?;
        ensure!(done == 1 && said.contains("no domain 'vm'"), "{done}: {said}");
    }
    Ok(())
}

#[test]
fn a_hundred_domains() -> Result<()> {
    const DOMAINS: usize = 100;
    let rig = Rig::new("hundred")?;
    rig.config("vm.json", "hello", "halt")?;
    let names: Vec<String> = (0..DOMAINS).map(|number| format!("vm-{number:02}")).collect();
    let each = |args: &(dyn Fn(&str) -> Vec<String> + Sync)| -> Result<()> {
        thread::scope(|scope| {
            let threads: Vec<_> = names
                .chunks(DOMAINS / 4)
                .map(|names| {
                    let rig = &rig;
                    scope.spawn(move || -> Result<()> {
                        for name in names {
                            let args = args(name);
                            rig.ok(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
                        }
                        Ok(())
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => anyhow::bail!("a thread panicked"),
            })
        })
    };
    let all_are = |state: &str| -> Result<Vec<Value>> {
        let began = Instant::now();
        let Value::Array(rows) = rig.ok(&["list"])? else { anyhow::bail!("no list") };
        println!("list of {} domains, {state}: {:?}", rows.len(), began.elapsed());
        let listed: Vec<_> = rows.iter().filter_map(|row| row.get("name")?.as_str()).collect();
        ensure!(listed == names, "{listed:?}");
        ensure!(rows.iter().all(|row| row.get("state") == Some(&json!(state))), "{rows:?}");
        Ok(rows)
    };
    let words = |verb: &'static str| move |name: &str| vec![verb.to_owned(), name.to_owned()];
    each(&|name| ["create", "vm.json", "--name", name].map(str::to_owned).to_vec())?;
    let rows = all_are("running")?;
    let mut ids: Vec<_> = rows.iter().filter_map(|row| row.get("id")?.as_u64()).collect();
    ids.sort_unstable();
    ids.dedup();
    ensure!(ids.len() == DOMAINS && ids.last().context("none")? < &1000, "{ids:?}");
    // With a low limit on open files.
    let list = rig.command(&[]);
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 32; exec \"$0\" list"]).arg(list.get_program());
    few.envs(list.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let table = String::from_utf8(few.output()?.stdout)?;
    let running = table.lines().filter(|line| line.contains(" running ")).count();
    ensure!(running == DOMAINS, "{table}");
    each(&words("pause"))?;
    all_are("paused")?;
    each(&words("unpause"))?;
    each(&words("destroy"))?;
    let Value::Array(rows) = rig.ok(&["list"])? else { anyhow::bail!("no list") };
    ensure!(rows.is_empty(), "{rows:?}");
    Ok(())
}
