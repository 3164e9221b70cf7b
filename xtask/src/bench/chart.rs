//! The figures as a picture (SVG): what was compared where and when, then a panel for each metric
//! with a bar for each monitor.
use std::fmt::Write;

use super::figures::{Figures, Row, Summary, short};

const LEGEND: &str = "Bars are medians, lines reach from the least to the greatest value. \
                      xN: the median divided by this monitor's.";
const COLUMNS: usize = 3;
const PANEL_WIDTH: f64 = 400.0;
const MARGIN: f64 = 24.0;
const LABEL_WIDTH: f64 = 118.0;
const VALUE_WIDTH: f64 = 112.0;
const BAR: f64 = 18.0;
const STEP: f64 = 26.0;
const HEADING: f64 = 40.0;
/// A line of text below the title.
const LINE: f64 = 17.0;
/// How many characters of a reason fit into a panel.
const REASON: usize = 42;
/// This monitor's colour first.
const COLOURS: [&str; 5] = ["#1b6ca8", "#9aa5b1", "#b8b08d", "#8fb3a3", "#b39bb0"];
const SMALL: &str = "font-size=\"12\"";
const GREY: &str = "font-size=\"11\" fill=\"#667\"";

/// Draws `figures`.
#[must_use]
pub fn draw(figures: &Figures) -> String {
    let rows = figures.rows();
    let panel_height = HEADING + STEP * figures.monitors.len() as f64 + 20.0;
    let mut body = String::new();
    let mut top = header(&mut body, figures);
    let mut rest = rows.as_slice();
    while let [first, ..] = rest {
        let count = rest.iter().take_while(|row| row.scenario == first.scenario).count();
        let (scenario, after) = rest.split_at(count);
        let style = "font-size=\"18\" font-weight=\"bold\"";
        text(&mut body, MARGIN, top + 18.0, style, first.scenario.title());
        top += 36.0;
        for (index, row) in scenario.iter().enumerate() {
            let left = MARGIN + (index % COLUMNS) as f64 * PANEL_WIDTH;
            let line = (index / COLUMNS) as f64;
            panel(&mut body, figures, row, left, line.mul_add(panel_height, top));
        }
        top += panel_height * count.div_ceil(COLUMNS) as f64 + 12.0;
        rest = after;
    }
    let width = PANEL_WIDTH.mul_add(COLUMNS as f64, 2.0 * MARGIN);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {top}\" width=\"{width}\" height=\"{top}\" font-family=\"sans-serif\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

/// What was compared, when and where. Returns where the panels begin.
fn header(body: &mut String, figures: &Figures) -> f64 {
    let about = &figures.about;
    let runs = match figures.runs {
        0 => String::new(),
        runs => format!("n = {runs} runs of each, "),
    };
    let mut lines =
        vec![format!("{}; {}; {runs}in turns", about.date, about.host), LEGEND.to_owned()];
    lines.extend(figures.monitors.iter().map(|(name, version)| format!("{name}: {version}")));
    if !figures.missing.is_empty() {
        lines.push(format!("Not on this host: {}", figures.missing.join(", ")));
    }
    let mut y = MARGIN + 20.0;
    text(body, MARGIN, y, "font-size=\"22\" font-weight=\"bold\"", &figures.title);
    y += 8.0;
    for line in lines {
        y += LINE;
        text(body, MARGIN, y, SMALL, &line);
    }
    y + MARGIN
}

fn panel(body: &mut String, figures: &Figures, row: &Row, left: f64, top: f64) {
    let (label, unit) = row.metric.label();
    let better = if row.metric.more_is_better() { "more is better" } else { "less is better" };
    let style = "font-size=\"13\" font-weight=\"bold\"";
    text(body, left, top + 14.0, style, &format!("{label}, {unit}"));
    text(body, left, top + 29.0, GREY, &format!("{better}, n = {}", samples(row)));
    let most = row.cells.iter().flatten().map(|cell| cell.max).fold(f64::MIN_POSITIVE, f64::max);
    let width = PANEL_WIDTH - MARGIN - LABEL_WIDTH - VALUE_WIDTH;
    for (index, ((name, _), cell)) in figures.monitors.iter().zip(&row.cells).enumerate() {
        let y = STEP.mul_add(index as f64, top + HEADING);
        let colour = COLOURS.get(index % COLOURS.len()).copied().unwrap_or_default();
        text(body, left, y + 13.0, SMALL, name);
        let at = |value: f64| width.mul_add(value / most, left + LABEL_WIDTH);
        match cell {
            Some(cell) => bar(body, cell, index == 0, at, (y, colour)),
            None => {
                let why = figures.why_missing(row.scenario, row.metric, name);
                missing(body, at(0.0), y + 13.0, &why);
            }
        }
    }
}

/// How many values each monitor has; a range if the numbers differ.
fn samples(row: &Row) -> String {
    let counts = || row.cells.iter().flatten().map(|cell| cell.samples);
    match (counts().min(), counts().max()) {
        (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
        (_, most) => most.unwrap_or(0).to_string(),
    }
}

/// A bar as long as the median, a whisker from the lowest to the highest value, the median as a
/// number and, for all but this monitor, the ratio.
fn bar(
    body: &mut String,
    cell: &Summary,
    ours: bool,
    at: impl Fn(f64) -> f64,
    (y, colour): (f64, &str),
) {
    let (start, end, min, max) = (at(0.0), at(cell.median), at(cell.min), at(cell.max));
    let middle = y + BAR / 2.0;
    // Writing to a string does not fail.
    let _ = writeln!(
        body,
        "<rect x=\"{start:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
         <path d=\"M{min:.1} {middle:.1}H{max:.1}M{min:.1} {:.1}v8M{max:.1} {:.1}v8\" stroke=\"#222\" fill=\"none\"/>",
        (end - start).max(1.0),
        middle - 4.0,
        middle - 4.0,
    );
    let ratio = match cell.ratio {
        Some(ratio) if !ours => format!(" (x{ratio:.2})"),
        _ => String::new(),
    };
    text(body, max + 6.0, y + 13.0, SMALL, &format!("{}{ratio}", short(cell.median)));
}

/// Why there is no bar: as much as fits, and all of it as a tooltip.
fn missing(body: &mut String, x: f64, y: f64, why: &str) {
    let line = why.lines().next().unwrap_or_default();
    let mut shown: String = line.chars().take(REASON).collect();
    if shown.len() < why.len() {
        shown.push_str("...");
    }
    let (shown, why) = (escaped(&shown), escaped(why));
    let _ =
        writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" {GREY}><title>{why}</title>{shown}</text>");
}

fn text(body: &mut String, x: f64, y: f64, style: &str, words: &str) {
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{}</text>", escaped(words));
}

/// Escaped for XML, without terminal control characters, which a monitor's last messages may have.
fn escaped(words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    words.chars().filter(|&c| c == '\n' || !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::about::About;
    use crate::bench::{Metric, Scenario};

    fn figures() -> Figures {
        let mut figures = Figures::default();
        figures.about = About { date: "2026-01-02".to_owned(), host: "2 x CPU".to_owned() };
        figures.title = "this & that".to_owned();
        figures.runs = 5;
        figures.missing.push("other".to_owned());
        for (name, version) in [("ours", "1.0"), ("a<b", "2.0")] {
            figures.monitor(name.to_owned(), version.to_owned());
        }
        figures.sample(Scenario::Payload, Metric::Api, "ours".to_owned(), 2.0);
        figures.sample(Scenario::Payload, Metric::Api, "a<b".to_owned(), 4.0);
        figures.sample(Scenario::Snapshots, Metric::LivePause, "ours".to_owned(), 9.0);
        figures
    }

    #[test]
    fn every_figure_has_a_bar_and_a_ratio_and_every_gap_its_reason() {
        let svg = draw(&figures());
        // Three bars on a background.
        assert_eq!(svg.matches("<rect").count(), 4);
        assert!(svg.contains("a&lt;b") && svg.contains(">4.00 (x2.00)<"), "{svg}");
        assert!(svg.contains(">2.00<"), "{svg}");
        assert_eq!(svg.matches("must be stopped for a save</text>").count(), 1);
        assert_eq!(svg.matches("less is better, n = 1").count(), 2);
    }

    #[test]
    fn it_says_what_was_compared_when_and_where() {
        let svg = draw(&figures());
        assert!(svg.contains(">this &amp; that<"), "{svg}");
        assert!(svg.contains("2026-01-02; 2 x CPU; n = 5 runs of each"), "{svg}");
        assert!(svg.contains("ours: 1.0") && svg.contains("a&lt;b: 2.0"), "{svg}");
        assert!(svg.contains("Not on this host: other"), "{svg}");
    }

    #[test]
    fn a_long_reason_is_cut_and_kept_whole_for_the_pointer() {
        let mut body = String::new();
        let why = format!("failed: \u{1b}{}\nand more", "x".repeat(60));
        missing(&mut body, 0.0, 0.0, &why);
        assert!(body.contains("x...</text>") && body.contains("and more</title>"), "{body}");
        assert!(!body.contains('\u{1b}'));
    }
}
