//! `remus-report`: what the last checkpoints of a protected domain cost, as numbers and as a picture.
mod chart;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use qmp::{
    client::{Client, ClientError},
    schema::{
        Distribution, QueryReplicationEpochs, QueryVersion, ReplicationEpoch, ReplicationEpochs,
    },
};
use serde_json::json;
use state::regular_file::open_regular;

use super::super::{Answer, Context, attach::date_time};
use crate::{failure::Failure, matrix::Verb, show::Table, verbs::RemusReport};

pub fn report(ctx: &Context, args: &RemusReport) -> anyhow::Result<Answer> {
    let name = &args.domain;
    let (_, mut status) = ctx.inspect(Verb::RemusReport, name)?;
    let client = status.client()?;
    let monitor = client.execute(&QueryVersion {})?.package;
    let epochs = epochs(client)?;
    if epochs.epochs.is_empty() {
        let what = format!("no checkpoint of '{name}' has been taken");
        let hint = format!("`stratoctl remus {name} HOST` protects it");
        return Err(Failure::hint(what, hint).into());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let about = format!(
        "{} UTC; {monitor}, stratoctl {}",
        date_time(now.as_secs()),
        env!("CARGO_PKG_VERSION")
    );
    let chart =
        chart::draw(name.as_str(), &about, &epochs.epochs).context("cannot draw the picture")?;
    let csv = write(&args.directory, &format!("{name}-remus.csv"), &csv(&epochs.epochs))?;
    let svg = write(&args.directory, &format!("{name}-remus.svg"), &chart)?;

    let text = format!("{}{}\n{}", summary(&epochs), csv.display(), svg.display());
    let json = json!({
        "name": name,
        "csv": csv,
        "svg": svg,
        "checkpoints": epochs.epochs.len(),
        "period-us": epochs.period_us,
        "pause-us": epochs.pause_us,
        "dirty-pages": epochs.dirty_pages,
        "held-bytes": epochs.held_bytes,
        "encode-us": epochs.encode_us,
        "ack-us": epochs.ack_us,
        "commit-lag-us": epochs.commit_lag_us,
    });
    Ok(Answer::new(text, json))
}

/// Everything that the monitor remembers, which is more than one reply holds.
fn epochs(client: &mut Client) -> Result<ReplicationEpochs, ClientError> {
    let mut all = client.execute(&QueryReplicationEpochs::default())?;
    while let Some(last) = all.epochs.last() {
        let after = Some(last.number);
        let more = client.execute(&QueryReplicationEpochs { after })?.epochs;
        // New ones come while it is asked, each time fewer.
        if more.len() < 2 {
            break;
        }
        all.epochs.extend(more);
    }
    Ok(all)
}

fn write(directory: &Path, name: &str, contents: &str) -> anyhow::Result<PathBuf> {
    let path = directory.join(name);
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    open_regular(&path, &mut options)
        .and_then(|mut file| file.write_all(contents.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// A column of the CSV file: its heading, and its value, which may not be known yet.
type Column = (&'static str, fn(&ReplicationEpoch) -> Option<u64>);

const COLUMNS: [Column; 16] = [
    ("number", |e| Some(e.number)),
    ("term", |e| Some(e.term)),
    ("epoch", |e| Some(e.epoch)),
    ("at_us", |e| Some(e.at_us)),
    ("period_us", |e| e.period_us),
    ("pause_us", |e| Some(e.pause_us)),
    ("park_us", |e| Some(e.park_us)),
    ("harvest_us", |e| Some(e.harvest_us)),
    ("copy_us", |e| Some(e.copy_us)),
    ("state_us", |e| Some(e.state_us)),
    ("dirty_pages", |e| Some(e.dirty_pages)),
    ("held_bytes", |e| Some(e.held_bytes)),
    ("encode_us", |e| e.encode_us),
    ("wire_bytes", |e| Some(e.wire_bytes)),
    ("ack_us", |e| e.ack_us),
    ("commit_lag_us", |e| e.commit_lag_us),
];

fn csv(epochs: &[ReplicationEpoch]) -> String {
    let row = |cells: Vec<String>| cells.join(",") + "\n";
    let heading = row(COLUMNS.map(|(heading, _)| heading.to_owned()).to_vec());
    let cell = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    let rows = epochs
        .iter()
        .map(|epoch| row(COLUMNS.iter().map(|(_, value)| cell(value(epoch))).collect()));
    heading + &rows.collect::<String>()
}

/// A table for people.
fn summary(epochs: &ReplicationEpochs) -> String {
    let mut table = Table::new(["", "MEDIAN", "99 %", "LARGEST"]);
    let mut line = |title: &str, figure: &Distribution, shown: fn(u64) -> String| {
        let values = [figure.p50, figure.p99, figure.max].map(shown);
        let [p50, p99, max] = values;
        table.row([title.to_owned(), p50, p99, max]);
    };
    let ms = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    line("period", &epochs.period_us, ms);
    line("pause", &epochs.pause_us, ms);
    line("dirty pages", &epochs.dirty_pages, |pages| pages.to_string());
    line("held output", &epochs.held_bytes, crate::show::bytes);
    line("lag", &epochs.commit_lag_us, ms);
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(number: u64) -> ReplicationEpoch {
        ReplicationEpoch {
            number,
            term: 1,
            epoch: number,
            at_us: number * 25_000,
            period_us: (number > 1).then_some(25_000),
            pause_us: 600,
            dirty_pages: 200,
            held_bytes: 1536,
            commit_lag_us: Some(4_000),
            ..Default::default()
        }
    }

    #[test]
    fn the_numbers_have_a_heading_and_what_is_not_known_is_empty() {
        let text = csv(&[epoch(1), epoch(2)]);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("number,term,epoch,at_us,period_us,pause_us,"), "{text}");
        assert_eq!(lines[1], "1,1,1,25000,,600,0,0,0,0,200,1536,,0,,4000");
        assert_eq!(lines[2], "2,1,2,50000,25000,600,0,0,0,0,200,1536,,0,,4000");
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn a_summary_has_units() {
        let held = Distribution { count: 2, p50: 1536, ..Default::default() };
        let pause = Distribution { count: 2, p50: 600, p99: 1700, max: 2001, ..Default::default() };
        let all = ReplicationEpochs { held_bytes: held, pause_us: pause, ..Default::default() };
        let text = summary(&all);
        assert!(text.contains("pause        0.600 ms  1.700 ms  2.001 ms\n"), "{text}");
        assert!(text.contains("held output  1.5 KiB "), "{text}");
    }

    #[test]
    fn the_picture_says_what_it_shows_and_has_a_panel_for_each_figure() {
        let epochs: Vec<_> = (1..=5000).map(epoch).collect();
        let svg = chart::draw("web", "2026-01-02 03:04 UTC; <1.0>", &epochs).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for words in [
            "Protection of web: the last 125 s",
            "UTC; &lt;1.0&gt;",
            "5000 checkpoints; each point is the largest of 7",
            "Period, ms",
            "Pause, ms",
            "Dirty pages",
            "Held output, KiB",
            "Lag of output, ms",
        ] {
            assert!(svg.contains(words), "{words}");
        }
        assert_eq!(svg.matches("stroke=\"#1B6CA8\"").count(), 5);
        assert!(svg.len() < 200 << 10, "{} bytes", svg.len());
        // One checkpoint is a picture, too.
        chart::draw("", "", &[epoch(1)]).unwrap();
    }
}
