//! The figures as a picture (SVG): a panel for each metric, a bar for each monitor.
use std::fmt::Write;

use super::figures::{Figures, Row, Summary, short};

const COLUMNS: usize = 3;
const PANEL_WIDTH: f64 = 400.0;
const MARGIN: f64 = 24.0;
const LABEL_WIDTH: f64 = 118.0;
const VALUE_WIDTH: f64 = 70.0;
const BAR: f64 = 18.0;
const STEP: f64 = 26.0;
const HEADING: f64 = 40.0;
/// This monitor's colour first.
const COLOURS: [&str; 5] = ["#1b6ca8", "#9aa5b1", "#b8b08d", "#8fb3a3", "#b39bb0"];

/// Draws `figures`.
#[must_use]
pub fn draw(figures: &Figures) -> String {
    let rows = figures.rows();
    let panel_height = HEADING + STEP * figures.monitors.len() as f64 + 20.0;
    let mut body = String::new();
    let mut top = MARGIN;
    let mut rest = rows.as_slice();
    while let [first, ..] = rest {
        let count = rest.iter().take_while(|row| row.scenario == first.scenario).count();
        let (scenario, after) = rest.split_at(count);
        text(
            &mut body,
            MARGIN,
            top + 18.0,
            "font-size=\"18\" font-weight=\"bold\"",
            first.scenario.title(),
        );
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

fn panel(body: &mut String, figures: &Figures, row: &Row, left: f64, top: f64) {
    let (label, unit) = row.metric.label();
    let better = if row.metric.more_is_better() { "more is better" } else { "less is better" };
    text(
        body,
        left,
        top + 14.0,
        "font-size=\"13\" font-weight=\"bold\"",
        &format!("{label}, {unit}"),
    );
    text(body, left, top + 29.0, "font-size=\"11\" fill=\"#667\"", better);
    let most = row.cells.iter().flatten().map(|cell| cell.max).fold(f64::MIN_POSITIVE, f64::max);
    let room = PANEL_WIDTH - MARGIN - LABEL_WIDTH - VALUE_WIDTH;
    for (index, ((name, _), cell)) in figures.monitors.iter().zip(&row.cells).enumerate() {
        let y = STEP.mul_add(index as f64, top + HEADING);
        let colour = COLOURS.get(index % COLOURS.len()).copied().unwrap_or_default();
        text(body, left, y + 13.0, "font-size=\"12\"", name);
        let at = |value: f64| room.mul_add(value / most, left + LABEL_WIDTH);
        match cell {
            Some(cell) => bar(body, cell, at, (y, colour)),
            None => text(body, at(0.0), y + 13.0, "font-size=\"12\" fill=\"#889\"", "none"),
        }
    }
}

/// A bar as long as the median, a whisker from the least to the greatest, and the median in figures.
fn bar(body: &mut String, cell: &Summary, at: impl Fn(f64) -> f64, (y, colour): (f64, &str)) {
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
    text(body, max + 6.0, y + 13.0, "font-size=\"12\"", &short(cell.median));
}

fn text(body: &mut String, x: f64, y: f64, style: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Metric, Scenario};

    #[test]
    fn every_figure_has_a_bar_and_every_gap_a_word() {
        let mut figures = Figures::default();
        for name in ["ours", "a<b"] {
            figures.monitor(name.to_owned(), String::new());
        }
        figures.sample(Scenario::Payload, Metric::Api, "ours".to_owned(), 2.0);
        figures.sample(Scenario::Payload, Metric::Api, "a<b".to_owned(), 4.0);
        figures.sample(Scenario::Linux, Metric::TcpIn, "ours".to_owned(), 9.0);
        let svg = draw(&figures);
        // Three bars on a background.
        assert_eq!(svg.matches("<rect").count(), 4);
        assert_eq!(svg.matches(">none<").count(), 1);
        assert!(svg.contains("a&lt;b") && svg.contains(">4.00<"), "{svg}");
        assert_eq!(svg.matches("less is better").count(), 1);
        assert_eq!(svg.matches("more is better").count(), 1);
    }
}
