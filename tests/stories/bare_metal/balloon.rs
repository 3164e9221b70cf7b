//! A guest puts memory into its balloon and takes it out again, reports what it has freed, and is
//! saved and restored with all that. The guest checks every page itself: a page in the balloon
//! reads as zero.
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use qmp::client::Client;
use serde_json::{Value, json};
use stories::monitor::{Monitor, SOON, Vm};
use stories::resident::guest_memory;

use crate::stage::{Stage, cont, patiently, quits};
use crate::stream::until_it_listens;

/// Guest memory, and the half of it that goes into the balloon.
const MIB: u64 = 32;
const HALF: u64 = MIB << 20 >> 1;
/// Pages of that half, as the guest prints them.
const HALF_SHOWN: &str = "balloon 1000";

struct Here {
    stage: Stage,
    monitor: Monitor,
    qmp: Client,
}

impl Here {
    /// A guest that has written to all of its memory.
    fn start(story: &str, balloon: &Value, args: &[&str]) -> Result<Self> {
        let stage = Stage::new(story)?;
        Self::on(stage, balloon, args)
    }

    fn on(stage: Stage, balloon: &Value, args: &[&str]) -> Result<Self> {
        let mut config = stage.config("balloon", &MIB.to_string())?;
        let sections = config.as_object_mut().context("no object")?;
        sections.insert("balloon".into(), balloon.clone());
        let vm = Vm::described(config).machine("mem_size", MIB << 20).args(args);
        let (mut monitor, qmp) = stage.start(vm)?;
        monitor.wait_for("filled", SOON)?;
        Ok(Self { stage, monitor, qmp })
    }

    /// Asks the guest to keep `bytes`, and waits until it reports that.
    fn fill(&mut self, bytes: u64, shown: &str) -> Result<()> {
        let asked = self.qmp.execute_raw("balloon", json!({ "value": bytes }))?;
        ensure!(asked == json!({}), "{asked}");
        self.monitor.wait_for(&format!("{shown}\n"), SOON)?;
        ensure!(self.actual()? == bytes);
        Ok(())
    }

    fn property(&mut self, name: &str) -> Result<Value> {
        let path = "/machine/peripheral/balloon0";
        Ok(self.qmp.execute_raw("qom-get", json!({ "path": path, "property": name }))?)
    }

    /// How many bytes have returned to the host, as it says itself; none was refused.
    fn returned(&mut self) -> Result<u64> {
        let reclaimed = self.property("reclaimed-memory")?;
        ensure!(reclaimed.get("refused") == Some(&json!(0)), "{reclaimed}");
        reclaimed.get("returned").and_then(Value::as_u64).with_context(|| format!("{reclaimed}"))
    }

    fn actual(&mut self) -> Result<u64> {
        let info = self.qmp.execute_raw("query-balloon", json!({}))?;
        info.get("actual").and_then(Value::as_u64).with_context(|| format!("{info}"))
    }

    /// Makes the guest check all of its pages.
    fn checks(&mut self) -> Result<()> {
        self.types("c", "checked")
    }

    fn types(&mut self, what: &str, answer: &str) -> Result<()> {
        self.monitor.type_in(what)?;
        self.monitor.wait_for(answer, SOON)?;
        ensure!(!self.monitor.shown().contains("WRONG"), "{}", self.monitor.shown());
        Ok(())
    }

    /// Half of the memory goes into the balloon, and so to the host, and back.
    fn gives_half_back(&mut self) -> Result<()> {
        self.checks()?;
        let before = self.returned()?;
        self.fill(HALF, HALF_SHOWN)?;
        // Of a machine that is mapped from a save, whole units of 64 KiB.
        let returned = self.returned()? - before;
        ensure!((HALF / 100 * 95..=HALF).contains(&returned), "{returned} bytes");
        let kept = guest_memory(self.monitor.pid(), MIB)?;
        ensure!(kept <= (MIB << 20) - HALF / 100 * 95, "{kept} bytes are kept");
        self.checks()?;
        self.fill(MIB << 20, "balloon 0")?;
        self.checks()
    }

    fn saves(&mut self, name: &str, more: &Value) -> Result<()> {
        let mut arguments = json!({ "uri": format!("file:{}", self.stage.file(name).display()) });
        let members = arguments.as_object_mut().context("no object")?;
        members.extend(more.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
        let saved = patiently(&mut self.qmp, "migrate", &arguments)?;
        ensure!(saved == json!({}), "{saved}");
        Ok(())
    }

    /// Ends this machine, and resumes from `source` in another process.
    fn moves(mut self, source: &str) -> Result<Self> {
        quits(&self.stage, &mut self.monitor, &mut self.qmp)?;
        Self::restored(self.stage, source)
    }

    fn restored(stage: Stage, source: &str) -> Result<Self> {
        let args = ["-S", "-incoming", source];
        let mut monitor = Vm::described(json!({})).args(&args).start(&stage.paths, &stage.dir)?;
        let mut qmp = monitor.qmp()?;
        cont(&mut qmp)?;
        Ok(Self { stage, monitor, qmp })
    }

    fn ends(mut self) -> Result<()> {
        quits(&self.stage, &mut self.monitor, &mut self.qmp)
    }
}

fn plain() -> Value {
    json!({ "deflate_on_oom": true })
}

#[test]
fn half_of_the_memory_goes_into_the_balloon_and_back() -> Result<()> {
    for (name, args) in [("private", &[][..]), ("shared", &["-machine", "mem-share=on"])] {
        let mut here = Here::start(&format!("balloon-{name}"), &plain(), args)?;
        ensure!(here.actual()? == MIB << 20);
        here.gives_half_back().with_context(|| name.to_owned())?;
        here.ends()?;
    }
    Ok(())
}

#[test]
fn clients_are_notified_of_the_balloons_size() -> Result<()> {
    let mut here = Here::start("balloon-events", &plain(), &[])?;
    here.fill(HALF, HALF_SHOWN)?;
    // The second one is StratoVirt's name for it.
    for name in ["BALLOON_CHANGE", "BALLOON_CHANGED"] {
        let reported = here.qmp.wait_event(name, SOON)?;
        ensure!(reported.data.get("actual") == Some(&json!(HALF)), "{reported:?}");
    }
    // Bytes that are not whole pages are the guest's to keep or to give: it counts in pages.
    here.qmp.execute_raw("balloon", json!({ "value": HALF + 5 }))?;
    here.monitor.wait_for("balloon fff\n", SOON)?;
    ensure!(here.actual()? == HALF + 4096);
    // More than all memory means all of it; zero is invalid.
    here.qmp.execute_raw("balloon", json!({ "value": 1u64 << 60 }))?;
    here.monitor.wait_for("balloon 0\n", SOON)?;
    let refused = here.qmp.execute_raw("balloon", json!({ "value": 0 })).unwrap_err().to_string();
    ensure!(refused.contains("at least 1"), "{refused}");
    here.ends()
}

#[test]
fn a_restored_machine_gives_its_memory_back_however_that_is_there() -> Result<()> {
    let mut here = Here::start("balloon-restored", &plain(), &[])?;
    here.saves("saved", &json!({}))?;
    for mapped in ["on", "off", "uffd"] {
        let source = format!("file:{},mapped={mapped}", here.stage.file("saved").display());
        here = here.moves(&source)?;
        here.gives_half_back().with_context(|| format!("mapped={mapped}"))?;
    }
    here.ends()
}

#[test]
fn a_balloon_of_many_pieces_is_filled_on_a_mapped_machine() -> Result<()> {
    // 1,152 pieces of 64 KiB; the monitor counts its mappings after 1,024, behind its filter.
    const LARGE: u64 = 160;
    let stage = Stage::new("balloon-large")?;
    let mut config = stage.config("balloon", &LARGE.to_string())?;
    let sections = config.as_object_mut().context("no object")?;
    sections.insert("balloon".into(), plain());
    let vm = Vm::described(config).machine("mem_size", LARGE << 20);
    let (mut monitor, qmp) = stage.start(vm)?;
    monitor.wait_for("filled", SOON)?;
    let mut here = Here { stage, monitor, qmp };
    here.saves("saved", &json!({}))?;
    let source = format!("file:{},mapped=on", here.stage.file("saved").display());
    here = here.moves(&source)?;
    here.types("u", "scattered")?;
    here.checks()?;
    here.ends()
}

#[test]
fn what_is_in_the_balloon_stays_zero_through_incremental_saves() -> Result<()> {
    let mut here = Here::start("balloon-more", &plain(), &[])?;
    here.saves("base", &json!({ "track": true, "resume": true }))?;
    here.fill(HALF, HALF_SHOWN)?;
    here.saves("more", &json!({ "incremental": true }))?;
    for mapped in ["on", "off", "uffd"] {
        let source = format!("file:{},mapped={mapped}", here.stage.file("more").display());
        here = here.moves(&source)?;
        ensure!(here.actual()? == HALF, "the balloon is as full as it was");
        here.checks().with_context(|| format!("mapped={mapped}"))?;
    }
    // And again, from a machine whose pages are mapped from that save.
    let source = format!("file:{},mapped=on", here.stage.file("more").display());
    here = here.moves(&source)?;
    here.fill(MIB << 20, "balloon 0")?;
    here.saves("again", &json!({ "track": true, "resume": true }))?;
    here.fill(HALF, HALF_SHOWN)?;
    here.saves("last", &json!({ "incremental": true }))?;
    let source = format!("file:{}", here.stage.file("last").display());
    here = here.moves(&source)?;
    here.checks()?;
    here.ends()
}

#[test]
fn a_balloon_moves_with_its_machine_over_a_socket() -> Result<()> {
    let mut here = Here::start("balloon-stream", &plain(), &[])?;
    here.fill(HALF, HALF_SHOWN)?;
    let there = Stage::new("balloon-there")?;
    let socket = there.file("in.sock");
    let source = format!("unix:{}", socket.display());
    let args = ["-S", "-incoming", &source];
    let mut monitor = Vm::described(json!({})).args(&args).start(&there.paths, &there.dir)?;
    until_it_listens(&socket)?;
    patiently(&mut here.qmp, "migrate", &json!({ "uri": source }))?;
    let mut qmp = monitor.qmp()?;
    cont(&mut qmp)?;
    let mut there = Here { stage: there, monitor, qmp };
    ensure!(there.actual()? == HALF);
    there.checks()?;
    there.fill(MIB << 20, "balloon 0")?;
    there.checks()?;
    there.ends()?;
    here.ends()
}

#[test]
fn what_a_guest_reports_as_free_goes_back_at_once() -> Result<()> {
    let balloon = json!({ "deflate_on_oom": false, "free_page_reporting": true });
    let mut here = Here::start("balloon-report", &balloon, &[])?;
    here.types("r", "reported")?;
    // Half of the memory above 16 MiB.
    let reported = ((MIB - 16) << 20) / 2;
    let kept = guest_memory(here.monitor.pid(), MIB)?;
    ensure!(kept <= (MIB << 20) - reported / 100 * 95, "{kept} bytes are kept");
    here.checks()?;
    here.ends()
}

#[test]
fn statistics_are_there_for_who_asks_as_qemu_s_users_do() -> Result<()> {
    let mut here = Here::start("balloon-stats", &plain(), &[])?;
    let stats = here.property("guest-stats")?;
    ensure!(stats.get("last-update") == Some(&json!(0)), "{stats}");
    here.types("s", "lent")?;
    let interval = json!({ "path": "balloon0", "property": "guest-stats-polling-interval" });
    let mut set = interval.clone();
    set.as_object_mut().context("no object")?.insert("value".into(), json!(1));
    here.qmp.execute_raw("qom-set", set)?;
    ensure!(here.qmp.execute_raw("qom-get", interval)? == json!(1));
    let deadline = Instant::now() + SOON;
    let stats = loop {
        let stats = here.property("guest-stats")?;
        if stats.get("last-update") != Some(&json!(0)) || Instant::now() > deadline {
            break stats;
        }
    };
    let value = |name: &str| stats.pointer(&format!("/stats/{name}")).and_then(Value::as_u64);
    ensure!(value("stat-free-memory") == Some(5 << 20), "{stats}");
    ensure!(value("stat-total-memory") == Some(MIB << 20), "{stats}");
    ensure!(value("stat-swap-in") == Some(u64::MAX), "the guest reports no statistics: {stats}");
    ensure!(stats.get("last-update").and_then(Value::as_u64) > Some(1_700_000_000), "{stats}");
    let wrong = json!({ "path": "balloon1", "property": "guest-stats" });
    let refused = here.qmp.execute_raw("qom-get", wrong).unwrap_err().to_string();
    ensure!(refused.contains("/machine/peripheral/balloon0"), "{refused}");
    here.ends()
}

#[test]
fn a_balloon_is_empty_after_a_reset_and_is_filled_again() -> Result<()> {
    let mut here = Here::start("balloon-reset", &plain(), &[])?;
    here.fill(HALF, HALF_SHOWN)?;
    patiently(&mut here.qmp, "system_reset", &json!({}))?;
    here.monitor.wait_for("filled", SOON)?;
    // The requested size is as it was.
    here.monitor.wait_for(HALF_SHOWN, SOON)?;
    here.checks()?;
    here.ends()
}

#[test]
fn another_balloon_than_the_saved_one_is_refused() -> Result<()> {
    let mut here = Here::start("balloon-other", &plain(), &[])?;
    here.saves("saved", &json!({}))?;
    quits(&here.stage, &mut here.monitor, &mut here.qmp)?;
    let saved = here.stage.file("saved");
    let refusal = |args: &[&str]| crate::snapshot::refusal(&here.stage, Path::new(&saved), args);
    let said = refusal(&["-balloon", "deflate-on-oom=off"])?;
    ensure!(said.contains("a balloon with") && said.contains("leave -balloon out"), "{said}");
    Ok(())
}
